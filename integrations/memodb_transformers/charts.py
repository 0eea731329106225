"""Bar charts in plain text, for reports that are read in a terminal."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["bar_chart"]


def bar_chart(labels: Sequence[str], values: Sequence[float], *, unit: str = "", width: int = 40) -> str:
    """Draw one line a value: ``#`` to the right of the axis for gains, ``-`` to the left for losses.

    Parameters
    ----------
    labels, values
        One each a line.
    unit
        Written behind each value.
    width
        Characters of the longest bars on both sides together; every value but 0 gets one at least.
    """
    highest, lowest = max([0.0, *values]), min([0.0, *values])
    scale = width / (highest - lowest) if highest > lowest else 0.0
    left = _length(lowest, scale)
    right = _length(highest, scale)
    wide = max(map(len, labels), default=0)
    said = [f"{value:+,.0f}" for value in values]
    digits = max(map(len, said), default=0)
    lines = []
    for label, value, text in zip(labels, values, said, strict=True):
        bar = _length(value, scale)
        losing = ("-" * bar if value < 0 else "").rjust(left)
        gaining = ("#" * bar if value > 0 else "").ljust(right)
        lines.append(f"{label.ljust(wide)}  {losing}|{gaining}  {text.rjust(digits)} {unit}".rstrip() + "\n")
    return "".join(lines)


def _length(value: float, scale: float) -> int:
    return max(1, round(abs(value) * scale)) if value else 0
