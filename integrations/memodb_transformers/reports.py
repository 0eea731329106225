"""Tables: the one way in which reports become Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["hide_bar", "markdown_table", "readable_bytes"]


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Format an aligned Markdown table; None becomes a dash, floats get four significant digits."""
    cells = [list(header), *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines) + "\n"


def hide_bar(progress: bool | None) -> bool | None:
    """Turn what a caller says of progress bars into what tqdm is told: None stays "only where a terminal is"."""
    return None if progress is None else not progress


def readable_bytes(count: float) -> str:
    """Say a number of bytes in the unit that suits it."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
