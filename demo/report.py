"""The demo's result: gathered once, then printed as tables and drawn as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import memodb_transformers as mt

from .gather import GatherTimes

__all__ = ["NAMES", "Result", "Run", "text_table", "verdict", "write_table"]


#: What the two stores hold, by the kind of reuse that they serve.
NAMES = {"nearest": "single records", "condensed": "means"}


@dataclass(frozen=True, kw_only=True)
class Result:
    """All figures of one run; of the two stores by kind of reuse.

    Attributes
    ----------
    title
        Model and data.
    built, condensed
        How the two stores were made.
    bytes_taken
        Bytes that each takes on its file system.
    huge_pages
        Share of the single records on huge pages, or None where the store does not say.
    profiles, tuned
        Of each store.
    evaluation
        The plain model, single records and means at several levels.
    gathers
        Gather comparisons.
    """

    title: str
    built: mt.BuildReport
    condensed: mt.CondenseReport
    bytes_taken: dict[str, int]
    huge_pages: float | None
    profiles: dict[str, mt.ProfileReport]
    tuned: dict[str, mt.TuneReport]
    evaluation: mt.EvaluationReport
    gathers: list[GatherTimes]

    def runs(self) -> list[Run]:
        """Return what was run with memoization, in the order of the evaluation."""
        found = []
        for row in self.evaluation.rows:
            kind = row["kind"]
            if kind in NAMES:
                tuned = self.tuned[kind] if row["level"] == "tuned" else None
                level = row["level"] if tuned is None else f"tuned for {tuned.budget:g} points"
                found.append(
                    Run(
                        name=f"{NAMES[kind]}, {level}",
                        row=row,
                        stats=self.evaluation.stats_by_kind[kind][str(row["level"])],
                        profile=self.profiles[kind],
                        tuned=tuned,
                    )
                )
        return found

    def detailed(self) -> list[Run]:
        """Return the run of each store that is shown layer by layer: as tuned, or else the boldest one."""
        return list({run.row["kind"]: run for run in self.runs() if not run.declined}.values())

    @property
    def plain(self) -> dict[str, Any]:
        """The row of the plain model."""
        return next(row for row in self.evaluation.rows if row["kind"] == "plain")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run with memoization.

    Attributes
    ----------
    name
        What was reused, and at which level.
    row, stats
        Of the evaluation: what it measured, and counts and seconds by layer.
    profile
        What was foretold of its store.
    tuned
        At level "tuned", what the tuner chose.
    """

    name: str
    row: dict[str, Any]
    stats: dict[str, Any]
    profile: mt.ProfileReport
    tuned: mt.TuneReport | None

    @property
    def declined(self) -> bool:
        """Whether the tuner advised against reuse, so that there was none."""
        return self.tuned is not None and self.tuned.declined


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
            *map(_layers, result.detailed()),
            *(_gather(times) for times in result.gathers),
            "\n".join(verdict(result)),
        ]
    )


def verdict(result: Result) -> list[str]:
    """Say in words what the figures mean, for better or worse."""
    said = []
    for run in result.runs():
        row, tuned = run.row, run.tuned
        if tuned is not None and tuned.declined:
            said.append(
                f"- {run.name}: the tuner declined. On {tuned.chosen_on + tuned.sequences} sequences it could not show "
                f"of anything that saves time that it loses at most {tuned.budget:g} points."
            )
            continue
        said.append(
            f"- {run.name}: {100 * row['memoization_rate']:.0f} % of attention replaced, {_time(row)}, accuracy "
            f"{_change(row)} points (95 %)."
        )
        if tuned is not None:
            layers = ", ".join(map(str, sorted(tuned.thresholds)))
            many = "s" if len(tuned.thresholds) > 1 else ""
            said.append(
                f"  The tuner chose layer{many} {layers}. On {tuned.sequences} sequences without a part in the choice "
                f"it lost {tuned.loss:.1f} points (95 %: {tuned.low:.1f} to {tuned.high:.1f})."
            )
    if result.evaluation.self_hits:
        said.append(
            f"- {result.evaluation.self_hits} of the {result.evaluation.sequences} held-out sequences look to the "
            "model like recorded ones: they find themselves, and flatter a little."
        )
    return ["In words:", *said, *_misjudged(result)]


def _time(row: dict[str, Any]) -> str:
    change = 100 * (1 - 1 / row["speedup_vs_plain"])
    if abs(change) < 2:  # the machine's noise
        return "about the same time"
    return f"{abs(change):.0f} % {'less' if change > 0 else 'more'} time"


def _change(row: dict[str, Any]) -> str:
    if row["accuracy"] is None:
        return "-"
    low, middle, high = (100 * row[f"accuracy_change{end}"] for end in ("_low", "", "_high"))
    return f"{middle:+.1f} ({low:+.1f} to {high:+.1f})"


def _misjudged(result: Result) -> list[str]:
    """Say where the profile promised clearly more hits than there were."""
    said = []
    for run in result.runs():
        layers = run.stats["layers"]
        promised = sum(run.profile.layers[row["layer"]].alpha(row["threshold"]) for row in layers) / len(layers)
        came = run.stats["memoization_rate"]
        if promised > 1.5 * came + 0.02 and any(row["lookups"] for row in layers):
            said.append(
                f"- The profile promised {100 * promised:.0f} % for {run.name}, {100 * came:.0f} % came: the "
                "sequences it was made with resemble the recorded ones more than the held-out ones do. Profile on "
                "data like that which will be served."
            )
    return said


def _store(result: Result) -> str:
    built = result.built
    shape = "x".join(map(str, built.record_shape))
    rows = [
        ("records", f"{built.records:,} ({built.sequences:,} sequences x {built.layers} layers)"),
        ("one record", f"{shape} {built.store_dtype}, {built.bytes // built.records:,} bytes"),
        ("bytes of records", f"{built.bytes:,}"),
        ("bytes on the file system", f"{result.bytes_taken['nearest']:,}"),
        ("on huge pages", "not reported" if result.huge_pages is None else f"{100 * result.huge_pages:.0f} %"),
        ("time to record", f"{built.seconds:.1f} s"),
        ("means made of them", f"{result.condensed.records:,}, {result.bytes_taken['condensed']:,} bytes"),
    ]
    width = max(len(name) for name, _ in rows)
    return "The store\n" + "\n".join(f"  {name.ljust(width)}   {value}" for name, value in rows)


def _end_to_end(result: Result) -> str:
    named = [("without memoization", result.plain), *((run.name, run.row) for run in result.runs())]
    rows = [
        (
            name,
            _percent(row["memoization_rate"]),
            _percent(row["accuracy"]),
            "-" if row["kind"] == "plain" else _change(row),
            _percent(row["agreement"]),
            f"{row['seconds']:.3f} s",
            f"{row['speedup_vs_plain']:.2f} x",
        )
        for name, row in named
    ]
    count, repeats = result.evaluation.sequences, result.evaluation.repeats
    title = f"End to end: {count:,} held-out sequences, median of {repeats} passes, all costs included\n"
    return title + text_table(
        ("", "memoized", "accuracy", "change (95 %), points", "agreement", "time", "speed-up"), rows
    )


def _layers(run: Run) -> str:
    rows = []
    count = run.stats["sequences"]
    for row in run.stats["layers"]:
        profile = run.profile.layers[row["layer"]]
        parts = [row[f"{part}_seconds"] for part in ("embed", "search", "fetch", "attention")]
        measured = [f"{part:.3f} s" for part in (*parts, sum(parts))]
        rows.append(
            (
                row["layer"],
                _percent(row["hits"] / count),
                _percent(profile.alpha(row["threshold"])),
                *(measured if row["memoized"] else "-" * len(measured)),
                f"{profile.attention_seconds * count:.3f} s",
                f"{profile.benefit(row['threshold']) * count:+.3f} s" if row["memoized"] else "-",
            )
        )
    parts_named = ("embed", "search", "fetch", "attention", "sum")
    header = ("layer", "memoized", "predicted", *parts_named, "original", "predicted gain")
    return f"By layer, {run.name}: one pass over the held-out sequences\n" + text_table(header, rows)


def _gather(times: GatherTimes) -> str:
    floor = times.seconds["already contiguous (floor)"]
    rows = [(way, f"{1e3 * taken:.2f} ms", f"{taken / floor:.2f} x") for way, taken in times.seconds.items()]
    how = "pages mapped" if times.zero_copy else "copied into a warm buffer, as its cost model chose"
    title = f"Gather and one read of everything: {times.title}, {times.nbytes / 1e6:.1f} MB (memodb: {how})\n"
    return title + text_table(("way", "time", "of floor"), rows)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"
