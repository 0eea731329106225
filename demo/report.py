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
        Report of the build, with the profile.
    store_bytes
        Bytes that the store takes on its file system.
    huge_pages
        Share of the store on huge pages, or None where the store does not say.
    all_layers, profiled
        Evaluation with every layer memoized, and with those that the profiler chose.
    chosen
        Layers that the profiler chose, by level.
    gathers
        Gather comparisons.
    """

    title: str
    built: mt.BuildReport
    store_bytes: int
    huge_pages: float | None
    all_layers: mt.EvaluationReport
    profiled: mt.EvaluationReport
    chosen: dict[str, list[int]]
    gathers: list[GatherTimes]


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
            *(_layers(result, level) for level in result.all_layers.stats),
            *(_gather(times) for times in result.gathers),
            "\n".join(verdict(result)),
        ]
    )


def verdict(result: Result) -> list[str]:
    """Say in words what the figures mean, for better or worse."""
    plain = _plain(result.all_layers)
    said = []
    for name, evaluation in (("every layer memoized", result.all_layers), ("the profiler's layers", result.profiled)):
        for row in evaluation.rows:
            if row["kind"] != "nearest" or (name != "every layer memoized" and not result.chosen[row["level"]]):
                continue
            change = 100 * (1 - 1 / row["speedup_vs_plain"])
            time = (
                f"{abs(change):.0f} % {'less' if change > 0 else 'more'} time" if abs(change) >= 1 else "the same time"
            )
            said.append(
                f"- {row['level']}, {name}: {100 * row['memoization_rate']:.0f} % of attention replaced, {time}"
                + (
                    f", accuracy {100 * (row['accuracy'] - plain['accuracy']):+.1f} points"
                    if row["accuracy"] is not None
                    else ""
                )
                + "."
            )
    said += _misjudged(result)
    for level, layers in result.chosen.items():
        many = "s" if len(layers) > 1 else ""
        choice = f"would memoize layer{many} {', '.join(map(str, layers))}" if layers else "would memoize no layer"
        said.append(f"- The profiler {choice} at level {level} on this machine (benefit of Eq. 3 above 0).")
    return ["In words:", *said]


def _misjudged(result: Result) -> list[str]:
    """Say where the profile promised clearly more hits than there were."""
    profile = result.built.profile
    if profile is None:
        return []
    said = []
    for level, stats in result.all_layers.stats.items():
        promised = sum(profile.layers[row["layer"]].alpha(row["threshold"]) for row in stats["layers"])
        promised /= len(stats["layers"])
        came = stats["memoization_rate"]
        if promised > 1.5 * came + 0.02:
            said.append(
                f"- The profile promised {100 * promised:.0f} % at level {level}, {100 * came:.0f} % came: "
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
    ]
    width = max(len(name) for name, _ in rows)
    return "The store\n" + "\n".join(f"  {name.ljust(width)}   {value}" for name, value in rows)


def _plain(evaluation: mt.EvaluationReport) -> dict[str, Any]:
    return next(row for row in evaluation.rows if row["kind"] == "plain")


def _end_to_end(result: Result) -> str:
    rows = []
    for name, evaluation in (("all layers", result.all_layers), ("profiled layers", result.profiled)):
        for row in evaluation.rows:
            label = f"{row['level']}, {name}" if row["level"] else f"without memoization ({name} run)"
            rows.append(
                (
                    label,
                    _percent(row["memoization_rate"]),
                    _percent(row["accuracy"]),
                    _percent(row["agreement"]),
                    f"{row['seconds']:.3f} s",
                    f"{row['speedup_vs_plain']:.2f} x",
                )
            )
    count = result.all_layers.sequences
    title = (
        f"End to end: {count:,} held-out sequences, median of {result.all_layers.repeats} passes, all costs included\n"
    )
    return title + text_table(("", "memoized", "accuracy", "agreement", "time", "speed-up"), rows)


def _layers(result: Result, level: str) -> str:
    profile = result.built.profile
    rows = []
    stats = result.all_layers.stats[level]
    for row in stats["layers"]:
        number = row["layer"]
        parts = [row[f"{part}_seconds"] for part in ("embed", "search", "fetch", "attention")]
        plain = profile.layers[number].attention_seconds * stats["sequences"] if profile else None
        predicted = profile.layers[number].alpha(row["threshold"]) if profile else None
        benefit = profile.layers[number].benefit(row["threshold"]) * stats["sequences"] if profile else None
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
    return f"By layer, all layers at level {level}: one pass over the held-out sequences\n" + text_table(header, rows)


def _gather(times: GatherTimes) -> str:
    floor = times.seconds["already contiguous (floor)"]
    rows = [(way, f"{1e3 * taken:.2f} ms", f"{taken / floor:.2f} x") for way, taken in times.seconds.items()]
    how = "pages mapped" if times.zero_copy else "copied into a warm buffer, as its cost model chose"
    title = f"Gather and one read of everything: {times.title}, {times.nbytes / 1e6:.1f} MB (memodb: {how})\n"
    return title + text_table(("way", "time", "of floor"), rows)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"
