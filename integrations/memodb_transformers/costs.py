"""How costs grow with a batch: a line through two measurements, and how far it misses a third.

``seconds(n, l) = fixed + per_sequence * n * l / L`` for a batch of n sequences padded to l tokens, where L is the
length of the reference. The AttMemo paper scales through the origin, with the total length alone (section 5.4): then a
batch of one costs a thirty-second of a batch of 32, and every layer that pays at all pays at every size. The fixed part
is what a call costs whatever its size, and what makes small batches not worth a search.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["PARTS", "Cost", "Errors", "Shape", "Shapes", "fit_costs", "scaling_errors"]

PARTS = ("attention", "lookup", "hit", "split", "uncompiled")
# Parts that are differences of what was timed and may be nothing: their errors are shares of the attention's time.
_DIFFERENCES = ("split", "uncompiled")
# Batches padded to fewer tokens are not halved: what is left of them is fixed cost.
_LEAST_HALVED = 16

Seconds = Mapping[str, float | None]
Errors = dict[str, dict[str, float | None]]


@dataclass(frozen=True, slots=True)
class Shape:
    """Sequences of a batch, and tokens that they are padded to."""

    rows: int
    padded: int


@dataclass(frozen=True, slots=True)
class Shapes:
    """The sizes that a batch is timed at: two to draw a line through, two to check it; None: not different enough.

    Attributes
    ----------
    reference
        The batch as it is.
    small
        A quarter of its sequences: with the reference, the line.
    half
        Half of its sequences, to check the line with.
    short
        All of its sequences, cut to half the length, to check the line with.
    """

    reference: Shape
    small: Shape | None
    half: Shape | None
    short: Shape | None

    @classmethod
    def of(cls, reference: Shape) -> Shapes:
        """Choose them for a batch."""
        rows, padded = reference.rows, reference.padded
        small = max(1, rows // 4)
        return cls(
            reference,
            Shape(small, padded) if small < rows else None,
            Shape(rows // 2, padded) if rows // 2 > small else None,
            Shape(rows, padded // 2) if padded >= _LEAST_HALVED else None,
        )

    @property
    def all(self) -> list[Shape]:
        """The reference first."""
        return [shape for shape in (self.reference, self.small, self.half, self.short) if shape is not None]


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds of a batch, ``fixed + per_sequence * rows * share``; neither is negative.

    Attributes
    ----------
    fixed
        Seconds of a call, whatever its size.
    per_sequence
        Seconds of one more sequence of the reference's length.
    """

    fixed: float
    per_sequence: float

    @classmethod
    def fit(cls, points: Sequence[tuple[int, float]], *, alone_fixed: bool = False) -> Cost:
        """Draw the line through ``(rows, seconds)`` of the reference, which comes first, and one other batch.

        It always goes through the reference. Where the other one would make a part negative, that part is 0.

        Parameters
        ----------
        points
            One or two of different size.
        alone_fixed
            Whether a single point is taken for fixed cost instead of growing with the batch.
        """
        rows, seconds = points[0]
        if len(points) == 1:
            return cls(seconds, 0.0) if alone_fixed else cls(0.0, seconds / rows)
        fewer, less = points[1]
        each = min(max(0.0, (seconds - less) / (rows - fewer)), seconds / rows)
        return cls(max(0.0, seconds - each * rows), each)

    def seconds(self, rows: int, share: float = 1.0) -> float:
        """Predict the seconds of a batch whose padded length is ``share`` of the reference's."""
        return self.fixed + self.per_sequence * rows * share


def fit_costs(shapes: Shapes, measured: Mapping[Shape, Seconds]) -> dict[str, Cost]:
    """Fit each part from the reference and the small batch, in seconds a batch.

    Parameters
    ----------
    shapes
        The sizes.
    measured
        Seconds of each part by size; None where a part cannot be had at that size: one sequence is not split.
    """
    costs = {}
    for part in PARTS:
        points = [
            (shape.rows, seconds)
            for shape in (shapes.reference, shapes.small)
            if shape is not None and (seconds := measured[shape][part]) is not None
        ]
        # What a split costs hardly grows with the batch: it is a handful of calls more.
        costs[part] = Cost.fit(points or [(1, 0.0)], alone_fixed=part == "split")
    return costs


def scaling_errors(
    shapes: Shapes, measured: Mapping[Shape, Seconds], costs: Mapping[str, Cost]
) -> tuple[Errors, Errors]:
    """Compare with measurements that the fit has not seen.

    Returns
    -------
    fitted, linear
        Relative errors ``|predicted - measured| / measured`` by part, of the fitted line and of the paper's scaling
        through the origin: ``"batch"`` at half the sequences, ``"length"`` at half the length, None where there was no
        such measurement. Those of ``split`` and ``uncompiled``, which may be nothing, are shares of the attention's
        time.
    """
    whole = shapes.reference
    fitted: Errors = {part: {} for part in PARTS}
    linear: Errors = {part: {} for part in PARTS}
    for name, shape in (("batch", shapes.half), ("length", shapes.short)):
        for part in PARTS:
            seconds = measured[shape][part] if shape is not None else None
            reference = measured[whole][part]
            if shape is None or seconds is None or reference is None:
                fitted[part][name] = linear[part][name] = None
                continue
            attention = measured[shape]["attention"]
            of = attention if part in _DIFFERENCES and attention else seconds
            share = shape.padded / whole.padded
            total = shape.rows * shape.padded / (whole.rows * whole.padded)
            fitted[part][name] = _error(costs[part].seconds(shape.rows, share), seconds, of)
            linear[part][name] = _error(reference * total, seconds, of)
    return fitted, linear


def _error(predicted: float, measured: float, of: float) -> float:
    return abs(predicted - measured) / of if of > 0 else 0.0
