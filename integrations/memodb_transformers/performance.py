"""The performance model, Eq. 3 of the AttMemo paper: which layers pay, from what was measured of each.

``PB = T_attention * alpha - T_overhead``, with an honest overhead: not only embedding and search, but also what a hit
still costs (gather, V projection, product) and what it costs to split a batch into hits and misses and to put it
together again. With ``lookup="sequence"`` embedding and search are paid once for all layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from .costs import PARTS, Errors
from .errors import StoreMismatchError
from .profile_report import profile_markdown
from .thresholds import LEVELS, threshold_for

__all__ = ["LayerProfile", "ProfileReport"]

Scores = tuple[float | None, ...]

# A batch so many times larger than those of the profile is the largest that a layer is asked about beforehand.
_LARGER = 16


@dataclass(frozen=True, slots=True)
class LayerProfile:
    """One layer's profile. Seconds are per sequence, in batches of ``batch_size`` padded to ``padded_length``.

    Attributes
    ----------
    layer
        Number of the layer, from 0.
    attention_seconds
        The original attention.
    lookup_seconds
        Embedding and search.
    hit_seconds
        What a hit still costs: gather, V projection, product with V.
    split_seconds
        What a batch of both hits and misses costs beyond its parts.
    distances, similarities
        For each held-out sequence the squared L2 distance of the nearest key and the similarity (Eq. 1) of its record
        to what the layer computed; None where the store has no record of that layer and length. For a store of
        contexts the similarity is that of :func:`context_similarities`.
    sequence_distances, sequence_similarities
        The same for ``lookup="sequence"``: the distance of the nearest key at the first layer, and the similarity of
        the record that the sequence found there has in this layer.
    uncompiled_seconds
        What a miss costs more than the original attention: 0 unless that was timed compiled, which misses are not.
    batch_size, padded_length
        Size of the batches that were timed; a length of 0: not known, so that costs are taken to be the same at all.
    fixed_seconds
        By part, seconds of a batch that do not grow with it. The parts are ``attention``, ``lookup``, ``hit``,
        ``split`` and ``uncompiled``.
    scaling_error, linear_error
        By part, relative errors at half the sequences (``batch``) and half the length (``length``) of this scaling, and
        of the paper's without a fixed part; None where not measured. See :func:`scaling_errors`.
    """

    layer: int
    attention_seconds: float
    lookup_seconds: float
    hit_seconds: float
    split_seconds: float
    distances: Scores
    similarities: Scores
    sequence_distances: Scores = ()
    sequence_similarities: Scores = ()
    uncompiled_seconds: float = 0.0
    batch_size: int = 1
    padded_length: int = 0
    fixed_seconds: Mapping[str, float] = field(default_factory=dict)
    scaling_error: Errors = field(default_factory=dict)
    linear_error: Errors = field(default_factory=dict)

    def threshold(self, similarity: float, lookup: str = "layer") -> float | None:
        """Largest distance at which the predicted similarity reaches ``similarity``, or None."""
        return threshold_for(*self.scores(lookup), similarity)

    def alpha(self, threshold: float | None, lookup: str = "layer") -> float:
        """Hit rate at a threshold; None: nothing is reused."""
        distances, _ = self.scores(lookup)
        if threshold is None or not distances:
            return 0.0
        return sum(d is not None and d <= threshold for d in distances) / len(distances)

    def seconds(self, part: str, batch: int | None = None, padded: int | None = None) -> float:
        """Seconds of a part, per sequence.

        Parameters
        ----------
        part
            ``"attention"``, ``"lookup"``, ``"hit"``, ``"split"`` or ``"uncompiled"``.
        batch, padded
            Sequences in the batch and tokens that they are padded to. Default: as measured.

        Raises
        ------
        ValueError
            There is no such part, or a size is below 1.
        """
        if part not in PARTS:
            raise ValueError(f"expected a part out of {', '.join(PARTS)}; found {part!r}")
        for size in (batch, padded):
            if size is not None and size < 1:
                raise ValueError(f"expected a batch of at least 1 sequence and 1 token; found {size}")
        measured: float = getattr(self, f"{part}_seconds")
        if part == "split" and batch == 1:
            return 0.0  # one sequence is a hit or a miss
        fixed = min(self.fixed_seconds.get(part, 0.0), measured * self.batch_size)
        share = padded / self.padded_length if padded is not None and self.padded_length else 1.0
        return fixed / (batch or self.batch_size) + (measured - fixed / self.batch_size) * share

    def overhead(
        self, threshold: float | None, lookup: str = "layer", batch: int | None = None, padded: int | None = None
    ) -> float:
        """T_overhead of Eq. 3, seconds a sequence: lookup, remaining cost of the hits, splitting of batches.

        With ``lookup="sequence"`` without the lookup, which all layers share. ``batch`` and ``padded`` are as for
        :meth:`benefit`.
        """
        return self._overhead(self.alpha(threshold, lookup), lookup, batch, padded)

    def benefit(
        self, threshold: float | None, lookup: str = "layer", batch: int | None = None, padded: int | None = None
    ) -> float:
        """PB of Eq. 3, seconds saved a sequence; negative where memoizing the layer loses time.

        Parameters
        ----------
        threshold
            Largest squared L2 distance at which a record is reused; None: nothing is.
        lookup
            ``"layer"`` or ``"sequence"``.
        batch, padded
            Sequences in the batch and tokens that they are padded to. Default: as measured.
        """
        alpha = self.alpha(threshold, lookup)
        return alpha * self.seconds("attention", batch, padded) - self._overhead(alpha, lookup, batch, padded)

    def _overhead(self, alpha: float, lookup: str, batch: int | None, padded: int | None) -> float:
        paid = self.seconds("lookup", batch, padded) if lookup == "layer" else 0.0
        paid += alpha * self.seconds("hit", batch, padded) + (1.0 - alpha) * self.seconds("uncompiled", batch, padded)
        return paid + (self.seconds("split", batch, padded) if 0.0 < alpha < 1.0 else 0.0)

    def scores(self, lookup: str = "layer") -> tuple[Scores, Scores]:
        """Return distances and similarities of a way to look up."""
        if lookup == "layer":
            return self.distances, self.similarities
        return self.sequence_distances, self.sequence_similarities

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> LayerProfile:
        """Read a layer's profile back.

        Raises
        ------
        AttributeError, KeyError, TypeError, ValueError, OverflowError
            It is damaged.
        """
        return cls(
            int(plain["layer"]),
            _seconds(plain["attention_seconds"]),
            _seconds(plain["lookup_seconds"]),
            _seconds(plain["hit_seconds"]),
            _seconds(plain["split_seconds"]),
            *_pairs(plain),
            *_pairs(plain, "sequence_"),
            uncompiled_seconds=_seconds(plain["uncompiled_seconds"]),
            batch_size=_size(plain["batch_size"]),
            padded_length=_size(plain["padded_length"]),
            fixed_seconds={part: _seconds(plain["fixed_seconds"][part]) for part in PARTS},
            scaling_error=_errors(plain["scaling_error"]),
            linear_error=_errors(plain["linear_error"]),
        )


@dataclass(frozen=True, slots=True)
class ProfileReport:
    """The profile of a memo store on one machine; kept beside the store.

    Attributes
    ----------
    layers
        One profile a layer.
    sequences
        Held-out sequences that it rests on.
    batch_size, threads, attention
        Sequences a batch, torch threads and attention implementation it was measured with.
    padded_length
        L of the store's records.
    buckets
        With length buckets, the profile of each store; there are no layers here then.
    self_hits
        Sequences that were left out because the store holds them.
    """

    layers: tuple[LayerProfile, ...]
    sequences: int
    batch_size: int
    threads: int
    attention: str
    padded_length: int = 0
    buckets: tuple[ProfileReport, ...] = ()
    self_hits: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any], path: Path) -> ProfileReport:
        """Read a report back.

        Raises
        ------
        StoreMismatchError
            The profile is damaged, or of an earlier version that measured less.
        """
        try:
            layers = tuple(LayerProfile.from_dict(row) for row in plain["layers"])
            sequences, batch_size, threads, padded_length, self_hits = (
                int(plain[name]) for name in ("sequences", "batch_size", "threads", "padded_length", "self_hits")
            )
            if [row.layer for row in layers] != list(range(len(layers))):
                raise ValueError(f"layers {[row.layer for row in layers]}")
            attention = str(plain["attention"])
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
            raise StoreMismatchError(
                f"the profile of {path} is damaged, or older than this version ({error!r}): profile the store again"
            ) from error
        return cls(layers, sequences, batch_size, threads, attention, padded_length, self_hits=self_hits)

    def thresholds(self, level: str | float, lookup: str = "layer") -> dict[int, float]:
        """Threshold of each layer that reaches the level's similarity at all, squared L2."""
        similarity = LEVELS[level] if isinstance(level, str) else float(level)
        found = {row.layer: row.threshold(similarity, lookup) for row in self.layers}
        return {layer: threshold for layer, threshold in found.items() if threshold is not None}

    def paying(
        self,
        thresholds: Mapping[int, float],
        lookup: str = "layer",
        batch: int | None = None,
        padded: int | None = None,
    ) -> list[int]:
        """Layers whose benefit (Eq. 3) is positive at the thresholds given, in a batch of the size given.

        With ``lookup="sequence"`` all of them together must also pay for the one lookup.
        """
        benefits = {row.layer: row.benefit(thresholds.get(row.layer), lookup, batch, padded) for row in self.layers}
        paying = [layer for layer, benefit in benefits.items() if benefit > 0]
        if lookup == "sequence" and self.layers:
            gained = sum(benefits[layer] for layer in paying)
            return paying if gained > self.layers[0].seconds("lookup", batch, padded) else []
        return paying

    def may_pay(self, thresholds: Mapping[int, float], lookup: str = "layer") -> list[int]:
        """Layers that :meth:`paying` names at the size measured, or at any up to a batch 16 times larger.

        A benefit is linear in the padded length and in one over the batch size, so it is positive somewhere if it is at
        one of the ends. One sequence alone, which is never split, is an end of its own.
        """
        lengths = (2, self.padded_length) if self.padded_length > 2 else (None,)
        ends = [(None, None), *product((1, 2, _LARGER * self.batch_size), lengths)]
        return sorted({layer for batch, padded in ends for layer in self.paying(thresholds, lookup, batch, padded)})

    def to_markdown(self) -> str:
        """Return the report as Markdown: costs, hit rates and benefits, a chart of these, and how well costs scale."""
        if self.buckets:
            return "\n".join(f"L = {bucket.padded_length}\n\n{bucket.to_markdown()}" for bucket in self.buckets)
        return profile_markdown(self)


def _pairs(row: Mapping[str, Any], prefix: str = "") -> tuple[Scores, Scores]:
    distances, similarities = (
        tuple(None if value is None else float(value) for value in row[prefix + name])
        for name in ("distances", "similarities")
    )
    if len(distances) != len(similarities) or any(not 0 <= d < float("inf") for d in distances if d is not None):
        raise ValueError("distances that are no distances, or without similarities")
    return distances, similarities


def _seconds(value: Any) -> float:
    seconds = float(value)
    if not 0.0 <= seconds < math.inf:
        raise ValueError(f"{seconds} seconds")
    return seconds


def _size(value: Any) -> int:
    size = int(value)
    if size < 1:
        raise ValueError(f"a size of {size}")
    return size


def _errors(plain: Mapping[str, Any]) -> Errors:
    return {
        part: {name: None if plain[part][name] is None else _seconds(plain[part][name]) for name in ("batch", "length")}
        for part in PARTS
    }
