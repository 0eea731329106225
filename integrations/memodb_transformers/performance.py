"""The performance model, Eq. 3 of the AttMemo paper: which layers pay, from what was measured of each.

``PB = T_attention * alpha - T_overhead``, with an honest overhead: not only embedding and search, but also what a hit
still costs (gather, V projection, product) and what it costs to split a batch into hits and misses and to put it
together again. With ``lookup="sequence"`` embedding and search are paid once for all layers.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .errors import StoreMismatchError
from .reports import markdown_table
from .thresholds import LEVELS, threshold_for

__all__ = ["LayerProfile", "ProfileReport"]

Scores = tuple[float | None, ...]


@dataclass(frozen=True, slots=True)
class LayerProfile:
    """One layer's profile. Seconds are per sequence, measured in batches.

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

    def threshold(self, similarity: float, lookup: str = "layer") -> float | None:
        """Largest distance at which the predicted similarity reaches ``similarity``, or None."""
        return threshold_for(*self._pairs(lookup), similarity)

    def alpha(self, threshold: float | None, lookup: str = "layer") -> float:
        """Hit rate at a threshold; None: nothing is reused."""
        distances, _ = self._pairs(lookup)
        if threshold is None or not distances:
            return 0.0
        return sum(d is not None and d <= threshold for d in distances) / len(distances)

    def overhead(self, threshold: float | None, lookup: str = "layer") -> float:
        """T_overhead of Eq. 3, seconds a sequence: lookup, remaining cost of the hits, splitting of batches.

        With ``lookup="sequence"`` without the lookup, which all layers share.
        """
        alpha = self.alpha(threshold, lookup)
        split = self.split_seconds if 0.0 < alpha < 1.0 else 0.0
        return (self.lookup_seconds if lookup == "layer" else 0.0) + alpha * self.hit_seconds + split

    def benefit(self, threshold: float | None, lookup: str = "layer") -> float:
        """PB of Eq. 3, seconds saved a sequence; negative where memoizing the layer loses time."""
        return self.alpha(threshold, lookup) * self.attention_seconds - self.overhead(threshold, lookup)

    def _pairs(self, lookup: str) -> tuple[Scores, Scores]:
        if lookup == "layer":
            return self.distances, self.similarities
        return self.sequence_distances, self.sequence_similarities


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
    """

    layers: tuple[LayerProfile, ...]
    sequences: int
    batch_size: int
    threads: int
    attention: str
    padded_length: int = 0
    buckets: tuple[ProfileReport, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any], path: Path) -> ProfileReport:
        """Read a report back.

        Raises
        ------
        StoreMismatchError
            The profile is damaged.
        """
        try:
            layers = tuple(
                LayerProfile(
                    int(row["layer"]),
                    float(row["attention_seconds"]),
                    float(row["lookup_seconds"]),
                    float(row["hit_seconds"]),
                    float(row["split_seconds"]),
                    *_pairs(row),
                    *_pairs(row, "sequence_"),
                )
                for row in plain["layers"]
            )
            sequences, batch_size, threads, padded_length = (
                int(plain[name]) for name in ("sequences", "batch_size", "threads", "padded_length")
            )
            if [row.layer for row in layers] != list(range(len(layers))):
                raise ValueError(f"layers {[row.layer for row in layers]}")
            return cls(layers, sequences, batch_size, threads, str(plain["attention"]), padded_length)
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
            raise StoreMismatchError(
                f"the profile of {path} is damaged ({error!r}): profile the store again"
            ) from error

    def thresholds(self, level: str | float, lookup: str = "layer") -> dict[int, float]:
        """Threshold of each layer that reaches the level's similarity at all, squared L2."""
        similarity = LEVELS[level] if isinstance(level, str) else float(level)
        found = {row.layer: row.threshold(similarity, lookup) for row in self.layers}
        return {layer: threshold for layer, threshold in found.items() if threshold is not None}

    def paying(self, thresholds: Mapping[int, float], lookup: str = "layer") -> list[int]:
        """Layers whose benefit (Eq. 3) is positive at the thresholds given.

        With ``lookup="sequence"`` all of them together must also pay for the one lookup.
        """
        benefits = {row.layer: row.benefit(thresholds.get(row.layer), lookup) for row in self.layers}
        paying = [layer for layer, benefit in benefits.items() if benefit > 0]
        if lookup == "sequence" and self.layers:
            gained = sum(benefits[layer] for layer in paying)
            return paying if gained > self.layers[0].lookup_seconds else []
        return paying

    def to_markdown(self) -> str:
        """Return the report as Markdown: the costs of each layer, and hit rate and benefit of each level."""
        if self.buckets:
            return "\n".join(f"L = {bucket.padded_length}\n\n{bucket.to_markdown()}" for bucket in self.buckets)
        header = ["layer", "attention us", "lookup us", "hit us", "split us", "similarity of nearest"]
        for level in LEVELS:
            header += [f"{level} alpha", f"{level} benefit us"]
        header += ["by sequence: similarity", "moderate alpha", "moderate benefit us"]
        rows = []
        for row in self.layers:
            cells: list[object] = [row.layer]
            parts = (row.attention_seconds, row.lookup_seconds, row.hit_seconds, row.split_seconds)
            cells += [1e6 * part for part in parts]
            cells.append(_mean(row.similarities))
            for similarity in LEVELS.values():
                threshold = row.threshold(similarity)
                cells += [row.alpha(threshold), 1e6 * row.benefit(threshold)]
            threshold = row.threshold(LEVELS["moderate"], "sequence")
            cells.append(_mean(row.sequence_similarities))
            cells += [row.alpha(threshold, "sequence"), 1e6 * row.benefit(threshold, "sequence")]
            rows.append(cells)
        note = (
            f"Per sequence, from {self.sequences} held-out sequences, batches of {self.batch_size}, {self.threads} "
            f"threads, {self.attention} attention. Benefit is Eq. 3 of the AttMemo paper: above 0 the layer pays. By "
            'sequence: with lookup="sequence", whose one lookup is not in these benefits.\n'
        )
        return markdown_table(header, rows) + "\n" + note


def _pairs(row: Mapping[str, Any], prefix: str = "") -> tuple[Scores, Scores]:
    distances, similarities = (
        tuple(None if value is None else float(value) for value in row[prefix + name])
        for name in ("distances", "similarities")
    )
    if len(distances) != len(similarities) or any(not 0 <= d < float("inf") for d in distances if d is not None):
        raise ValueError("distances that are no distances, or without similarities")
    return distances, similarities


def _mean(scores: Scores) -> float | None:
    found = [score for score in scores if score is not None]
    return statistics.fmean(found) if found else None
