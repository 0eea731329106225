"""The profile as it is printed: what each layer costs and gains, a chart, and how far the scaling can be trusted."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import TYPE_CHECKING

from .charts import bar_chart
from .costs import PARTS
from .reports import markdown_table
from .thresholds import LEVELS

if TYPE_CHECKING:
    from .performance import ProfileReport

__all__ = ["profile_markdown"]

_CHARTED = "moderate"


def profile_markdown(report: ProfileReport) -> str:
    """Format the profile of one store as Markdown."""
    header = ["layer", *(f"{part} us" for part in _parts(report)), "similarity of nearest"]
    for level in LEVELS:
        header += [f"{level} alpha", f"{level} benefit us"]
    by_sequence = any(row.sequence_distances for row in report.layers)
    if by_sequence:
        header += ["by sequence: similarity", f"{_CHARTED} alpha", f"{_CHARTED} benefit us"]
    rows = []
    for row in report.layers:
        cells: list[object] = [row.layer, *(_micro(row.seconds(part)) for part in _parts(report))]
        cells.append(_mean(row.similarities))
        for similarity in LEVELS.values():
            threshold = row.threshold(similarity)
            cells += [row.alpha(threshold), _micro(row.benefit(threshold))]
        if by_sequence:
            threshold = row.threshold(LEVELS[_CHARTED], "sequence")
            cells.append(_mean(row.sequence_similarities))
            cells += [row.alpha(threshold, "sequence"), _micro(row.benefit(threshold, "sequence"))]
        rows.append(cells)
    left_out = f" ({report.self_hits} more are in the store and were left out)" if report.self_hits else ""
    note = (
        f"us per sequence, from {report.sequences} held-out sequences{left_out}, batches of {report.batch_size}, "
        f"{report.threads} threads, attention {report.attention}. Benefit is Eq. 3 of the AttMemo paper: above 0 the "
        "layer pays."
    )
    if by_sequence:
        note += ' By sequence: with lookup="sequence", whose one lookup is not in these benefits.'
    return "\n".join([markdown_table(header, rows), f"{note}\n", _chart(report), _scaling(report)])


def _parts(report: ProfileReport) -> list[str]:
    """Name the parts to show: what is not compiled has nothing to say of it."""
    return [part for part in PARTS if part != "uncompiled" or any(row.uncompiled_seconds for row in report.layers)]


def _chart(report: ProfileReport) -> str:
    values = [1e6 * row.benefit(row.threshold(LEVELS[_CHARTED])) for row in report.layers]
    bars = bar_chart([f"layer {row.layer}" for row in report.layers], values, unit="us")
    said = f"Benefit of each layer at level {_CHARTED}, a sequence in batches of {report.batch_size}:"
    return f"{said}\n\n```\n{bars}```\n"


def _scaling(report: ProfileReport) -> str:
    rows: list[list[object]] = []
    for part in _parts(report):
        cells: list[object] = [part, _median(row.fixed_seconds.get(part, 0.0) * 1e6 for row in report.layers)]
        for name in ("batch", "length"):
            for errors in ("scaling_error", "linear_error"):
                found = [getattr(row, errors).get(part, {}).get(name) for row in report.layers]
                cells.append(_percent(error for error in found if error is not None))
        rows.append(cells)
    header = ["part", "fixed us a batch"]
    header += ["error, half the batch", "of the paper's scaling", "error, half the length", "of the paper's scaling"]
    note = (
        "Costs are scaled to the size of each batch, fixed part + share of its tokens; errors are medians over the "
        "layers, against measurements that were not used for it. The paper's scaling has no fixed part.\n"
    )
    return markdown_table(header, rows) + "\n" + note


def _micro(seconds: float) -> float:
    """Turn seconds into microseconds, with no more digits than the clock has."""
    return round(1e6 * seconds, 1)


def _mean(scores: Iterable[float | None]) -> float | None:
    found = [score for score in scores if score is not None]
    return statistics.fmean(found) if found else None


def _median(values: Iterable[float]) -> float | None:
    found = list(values)
    return round(statistics.median(found), 1) if found else None


def _percent(errors: Iterable[float]) -> str | None:
    found = list(errors)
    return f"{100 * statistics.median(found):.0f} %" if found else None
