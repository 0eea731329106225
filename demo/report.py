"""The demo's result: gathered once, then printed as tables and drawn as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import memodb_transformers as mt

from .gather import GatherTimes

__all__ = ["Result", "text_table", "verdict", "write_table"]


@dataclass(frozen=True)
class Result:
    """All figures of one run.

    Attributes
    ----------
    title
        Model and data.
    built
        Report of the build, with the profile of the single records.
    store_bytes
        Bytes that the store takes on its file system.
    huge_pages
        Share of the store on huge pages, or None where the store does not say.
    condensed, condensed_bytes
        Report of the store of means, and the bytes that it takes.
    profile, tuned
        Profile of the store of means, and what the tuner chose for it.
    single
        Evaluation of the single records, every layer memoized, at several levels.
    mean
        Evaluation of the store of means, as tuned.
    gathers
        Gather comparisons.
    """

    title: str
    built: mt.BuildReport
    store_bytes: int
    huge_pages: float | None
    condensed: mt.CondenseReport
    condensed_bytes: int
    profile: mt.ProfileReport
    tuned: mt.TuneReport
    single: mt.EvaluationReport
    mean: mt.EvaluationReport
    gathers: list[GatherTimes]

    def runs(self) -> list[tuple[str, dict[str, Any], mt.ProfileReport | None]]:
        """Return each run with memoization by name, with its counts and the profile that foretold it."""
        named = [(f"nearest record, {level}", stats, self.built.profile) for level, stats in self.single.stats.items()]
        return [*named, *((self.tuned_name, stats, self.profile) for stats in self.mean.stats.values())]

    @property
    def tuned_name(self) -> str:
        """Name of the run of the store of means."""
        return f"means, tuned for {self.tuned.budget:g} points"


def text_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Align a table: the first column to the left, all others to the right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]

    def line(row: Sequence[str]) -> str:
        first, *others = (
            cell.ljust(width) if number == 0 else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        return "  " + "   ".join((first, *others))

    return "\n".join([line(cells[0]), "  " + "   ".join("-" * width for width in widths), *map(line, cells[1:])])


def write_table(result: Result) -> str:
    """Write the whole result as text."""
    return "\n\n".join(
        [
            f"memodb demo: {result.title}",
            _store(result),
            _end_to_end(result),
            *(_layers(*run) for run in result.runs()),
            *(_gather(times) for times in result.gathers),
            "\n".join(verdict(result)),
        ]
    )


def verdict(result: Result) -> list[str]:
    """Say in words what the figures mean, for better or worse."""
    said = []
    for name, row, plain in compared(result):
        if row["kind"] == "plain" or (row["kind"] == "condensed" and result.tuned.declined):
            continue
        change = 100 * (1 - 1 / row["speedup_vs_plain"])
        time = f"{abs(change):.0f} % {'less' if change > 0 else 'more'} time" if abs(change) >= 1 else "the same time"
        accuracy = ""
        if row["accuracy"] is not None:
            accuracy = f", accuracy {100 * (row['accuracy'] - plain['accuracy']):+.1f} points"
        said.append(f"- {name}: {100 * row['memoization_rate']:.0f} % of attention replaced, {time}{accuracy}.")
    said += _misjudged(result)
    tuned = result.tuned
    if tuned.declined:
        said.append(f"- The tuner advises against reuse here: nothing that saves time keeps {tuned.budget:g} points.")
    else:
        layers = ", ".join(map(str, sorted(tuned.thresholds)))
        said.append(
            f"- The tuner chose layers {layers}. On {tuned.sequences} sequences that had no part in the choice it lost "
            f"{tuned.loss:.1f} points (95 %: {tuned.low:.1f} to {tuned.high:.1f})."
        )
    return ["In words:", *said]


def compared(result: Result) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Return the rows of both evaluations: name, row, and the plain row that was timed in turn with it."""
    found = []
    for evaluation, title in ((result.single, "records"), (result.mean, "means")):
        plain = next(row for row in evaluation.rows if row["kind"] == "plain")
        for row in evaluation.rows:
            name = {
                "plain": f"without memoization (beside the {title})",
                "nearest": f"nearest record, {row['level']}",
                "condensed": result.tuned_name,
            }[row["kind"]]
            found.append((name, row, plain))
    return found


def _misjudged(result: Result) -> list[str]:
    """Say where the profile promised clearly more hits than there were."""
    said = []
    for name, stats, profile in result.runs():
        if profile is None or not stats["layers"]:
            continue
        promised = sum(profile.layers[row["layer"]].alpha(row["threshold"]) for row in stats["layers"])
        promised /= len(stats["layers"])
        came = stats["memoization_rate"]
        if promised > 1.5 * came + 0.02:
            said.append(
                f"- The profile promised {100 * promised:.0f} % for {name}, {100 * came:.0f} % came: "
                "the sequences it was made with resemble the recorded ones more than the held-out ones do, so "
                "its choice of layers is too hopeful. Profile on data like that which will be served."
            )
    return said


def _store(result: Result) -> str:
    built = result.built
    shape = "x".join(map(str, built.record_shape))
    rows = [
        ("records", f"{built.records:,} ({built.sequences:,} sequences x {built.layers} layers)"),
        ("one record", f"{shape} {built.store_dtype}, {built.bytes // built.records:,} bytes"),
        ("bytes of records", f"{built.bytes:,}"),
        ("bytes on the file system", f"{result.store_bytes:,}"),
        ("on huge pages", "not reported" if result.huge_pages is None else f"{100 * result.huge_pages:.0f} %"),
        ("time to record", f"{built.seconds:.1f} s"),
        ("condensed to means", f"{result.condensed.records:,}: {result.condensed_bytes:,} bytes on the file system"),
    ]
    width = max(len(name) for name, _ in rows)
    return "The store\n" + "\n".join(f"  {name.ljust(width)}   {value}" for name, value in rows)


def _end_to_end(result: Result) -> str:
    rows = [
        (
            name,
            _percent(row["memoization_rate"]),
            _percent(row["accuracy"]),
            _percent(row["agreement"]),
            f"{row['seconds']:.3f} s",
            f"{row['speedup_vs_plain']:.2f} x",
        )
        for name, row, _ in compared(result)
    ]
    count, repeats = result.single.sequences, result.single.repeats
    title = f"End to end: {count:,} held-out sequences, median of {repeats} passes, all costs included\n"
    return title + text_table(("", "memoized", "accuracy", "agreement", "time", "speed-up"), rows)


def _layers(name: str, stats: dict[str, Any], profile: mt.ProfileReport | None) -> str:
    rows = []
    for row in stats["layers"]:
        number = row["layer"]
        parts = [row[f"{part}_seconds"] for part in ("embed", "search", "fetch", "attention")]
        plain = profile.layers[number].attention_seconds * stats["sequences"] if profile else None
        told = profile if row["memoized"] else None
        predicted = told.layers[number].alpha(row["threshold"]) if told else None
        benefit = told.layers[number].benefit(row["threshold"]) * stats["sequences"] if told else None
        rows.append(
            (
                number,
                _percent(row["hits"] / stats["sequences"]),
                _percent(predicted),
                *(f"{part:.3f} s" for part in parts),
                f"{sum(parts):.3f} s" if row["memoized"] else "-",
                "-" if plain is None else f"{plain:.3f} s",
                "-" if benefit is None else f"{benefit:+.3f} s",
            )
        )
    header = (
        "layer",
        "memoized",
        "predicted",
        "embed",
        "search",
        "fetch",
        "attention",
        "sum",
        "original",
        "predicted gain",
    )
    return f"By layer, {name}: one pass over the held-out sequences\n" + text_table(header, rows)


def _gather(times: GatherTimes) -> str:
    floor = times.seconds["already contiguous (floor)"]
    rows = [(way, f"{1e3 * taken:.2f} ms", f"{taken / floor:.2f} x") for way, taken in times.seconds.items()]
    how = "pages mapped" if times.zero_copy else "copied into a warm buffer, as its cost model chose"
    title = f"Gather and one read of everything: {times.title}, {times.nbytes / 1e6:.1f} MB (memodb: {how})\n"
    return title + text_table(("way", "time", "of floor"), rows)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"
