"""What the autotuner tells of its choice."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .errors import StoreMismatchError
from .reports import markdown_table

__all__ = ["TuneReport", "pooled"]


@dataclass(frozen=True, slots=True)
class TuneReport:
    """What the tuner chose.

    Attributes
    ----------
    budget, metric, confidence, lookup
        What was asked for; the metric is ``"accuracy"``, ``"agreement"`` (points) or ``"perplexity"`` (percent).
    thresholds
        The layers to memoize, and for each the largest squared L2 distance; none: do not memoize.
    loss, low, high
        Measured on sequences that had no part in the choice, with the interval of 95 %.
    sequences
        How many these were.
    chosen_on, tried
        How many sequences the choice was made with, and how many ways were tried.
    memoization_rate
        Eq. 2, on the same sequences as ``loss``.
    saved_seconds, attention_seconds
        What Eq. 3 expects to be saved a sequence, and what the attention of all layers takes.
    padded_length
        L of the store's records.
    self_hits
        Sequences that were left out because the store holds them.
    buckets
        With length buckets, the report of each store; losses and rates are then means over their sequences.
    """

    budget: float
    metric: str
    confidence: float
    lookup: str
    thresholds: Mapping[int, float]
    loss: float
    low: float
    high: float
    sequences: int
    chosen_on: int
    tried: int
    memoization_rate: float
    saved_seconds: float
    attention_seconds: float
    padded_length: int
    self_hits: int = 0
    buckets: tuple[TuneReport, ...] = ()

    @property
    def declined(self) -> bool:
        """Whether nothing should be memoized."""
        return not self.thresholds and all(part.declined for part in self.buckets)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain types."""
        plain = asdict(self)
        plain["thresholds"] = {str(layer): value for layer, value in self.thresholds.items()}
        plain["buckets"] = [part.to_dict() for part in self.buckets]
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any], path: Path) -> TuneReport:
        """Read back the report of the store at ``path``.

        Raises
        ------
        StoreMismatchError
            It is damaged.
        """
        try:
            thresholds = {int(layer): float(value) for layer, value in plain["thresholds"].items()}
            if any(not 0 <= value < float("inf") for value in thresholds.values()):
                raise ValueError(f"thresholds {thresholds}")
            parts = tuple(cls.from_dict(part, path) for part in plain["buckets"])
            return cls(**{**plain, "thresholds": thresholds, "buckets": parts})
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
            raise StoreMismatchError(f"tuned.json of {path} is damaged ({error!r}): tune the store again") from error

    def to_markdown(self) -> str:
        """Return the report as Markdown."""
        if self.buckets:
            return "\n".join(f"L = {part.padded_length}\n\n{part.to_markdown()}" for part in self.buckets)
        unit = "percent of perplexity" if self.metric == "perplexity" else f"points of {self.metric}"
        chosen = ", ".join(f"{layer} (distance up to {value:.4g})" for layer, value in sorted(self.thresholds.items()))
        share = self.saved_seconds / self.attention_seconds if self.attention_seconds else 0.0
        rows = [
            ("budget", f"{self.budget:g} {unit}"),
            ("layers", chosen or "none: do not memoize"),
            ("lost", f"{self.loss:.2f} (95 %: {self.low:.2f} to {self.high:.2f}), on {self.sequences} sequences"),
            ("memoization rate", self.memoization_rate),
            ("expected to be saved", f"{1e6 * self.saved_seconds:.0f} us a sequence, {share:.0%} of all attention"),
            ("tried", f"{self.tried} ways on {self.chosen_on} other sequences"),
        ]
        return markdown_table(("tuned", f"L = {self.padded_length}"), rows)


def pooled(parts: Sequence[TuneReport]) -> TuneReport:
    """Put the reports of several buckets together: means over the sequences of all."""
    total = sum(part.sequences for part in parts)
    weights = [part.sequences / total for part in parts]

    def mean(name: str) -> float:
        values = [float(getattr(part, name)) for part in parts]
        return sum(weight * value for weight, value in zip(weights, values, strict=True))

    loss = mean("loss")
    apart = math.sqrt(sum((weight * (part.high - part.loss)) ** 2 for weight, part in zip(weights, parts, strict=True)))
    return replace(
        parts[0],
        thresholds={},
        loss=loss,
        low=loss - apart,
        high=loss + apart,
        sequences=total,
        chosen_on=sum(part.chosen_on for part in parts),
        tried=sum(part.tried for part in parts),
        self_hits=sum(part.self_hits for part in parts),
        memoization_rate=mean("memoization_rate"),
        saved_seconds=mean("saved_seconds"),
        attention_seconds=mean("attention_seconds"),
        padded_length=max(part.padded_length for part in parts),
        buckets=tuple(parts),
    )
