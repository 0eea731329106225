"""What distances predict: keys of held-out sequences, what they find, and how similar that is to what was computed.

A sequence that the store holds finds itself, at distance 0 and similarity 1. That says nothing of sequences to come, so
such self-hits are told and left out. A held-out sequence that merely repeats a stored one looks the same in every way,
and is left out as well: where repeats are what is served, hits are more frequent than a profile says.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from .capture import Visit, attention_implementation, attention_visits
from .embedding import make_keys
from .fidelity import reuse_similarities
from .forward import Ints, Spans, roll_front
from .lookup import Found, find
from .recorder import canonical
from .sites import ModelSites
from .store import MemoStore

__all__ = ["Calibration", "find_self_hits"]

# Squared distance of a key to itself, as a share of its squared length, and the similarity that its record lacks to
# itself, beside what its dtype rounds. The store may have been built by the same model in bfloat16, which changes keys
# by 2e-5 and records by 3e-3; one other token in 512 changes keys by 4e-3, in 64 by ten times as much.
_SAME_KEY = 1e-4
_SAME_RECORD = 6e-3


class Calibration:
    """Distances and similarities of all layers, over batches of held-out sequences.

    Parameters
    ----------
    store
        The memo store.
    layers
        How many the model has.
    """

    def __init__(self, store: MemoStore, layers: int) -> None:
        self._store = store
        self._pairs = [_Pairs() for _ in range(layers)]
        self._by_sequence = [_Pairs() for _ in range(layers)]
        self._first: Found | None = None
        self._counted: Ints = np.zeros(0, dtype=np.int64)
        self.self_hits = 0

    @property
    def sequences(self) -> int:
        """Sequences that were counted."""
        return len(self._pairs[0].distances)

    def visit(self, visit: Visit, spans: Spans) -> None:
        """Compare with the record found by the layer itself, and with that of the sequence found at the first layer."""
        store, layer = self._store, visit.site.layer
        found = find(store, layer, visit.hidden, spans)
        own = canonical(visit, spans, store.padded_length, store.target).cpu()
        scores = _similarities(own, spans, found.ids, store)
        if layer == 0:
            usable = spans.lengths > 0
            themselves = _find_themselves(store, visit.hidden, spans, found, scores)
            self._first, self._counted = found, np.flatnonzero(usable & ~themselves)
            self.self_hits += int(themselves.sum())
        first = self._first
        assert first is not None
        self._pairs[layer].add(self._counted, found.distances, scores)
        if store.condensed is not None and store.condensed.by == "layer":
            return  # the means of different layers are of different sequences
        shifted = np.where(first.ids >= 0, first.ids + layer, -1)
        self._by_sequence[layer].add(self._counted, first.distances, _similarities(own, spans, shifted, store))

    def result(self, layer: int) -> dict[str, Any]:
        """Return what :class:`LayerProfile` says of distances, by the names of its fields."""
        own, sequence = self._pairs[layer], self._by_sequence[layer]
        return {
            "distances": tuple(own.distances),
            "similarities": tuple(own.similarities),
            "sequence_distances": tuple(sequence.distances),
            "sequence_similarities": tuple(sequence.similarities),
        }


def find_self_hits(
    model: PreTrainedModel, sites: ModelSites, store: MemoStore, inputs: dict[str, Any], spans: Spans
) -> NDArray[np.bool_]:
    """Tell which sequences of a batch the store holds, bool ``[n]``; the model is run once, with eager attention."""
    themselves = np.zeros(len(spans), dtype=np.bool_)

    def visit(visit: Visit) -> None:
        if visit.site.layer == 0:
            found = find(store, 0, visit.hidden, spans)
            own = canonical(visit, spans, store.padded_length, store.target).cpu()
            scores = _similarities(own, spans, found.ids, store)
            themselves[:] = _find_themselves(store, visit.hidden, spans, found, scores)

    asked = store.target == "probs"
    with attention_implementation(model, "eager"), attention_visits(sites, visit, probabilities=asked):
        model(**inputs)
    return themselves


def _find_themselves(
    store: MemoStore, hidden: Tensor, spans: Spans, found: Found, scores: NDArray[np.float32]
) -> NDArray[np.bool_]:
    """Tell which rows found their own record at the first layer: bool ``[n]``.

    There a hidden state depends on the sequence alone. An embedder may give different sequences one key, so the
    record has to be the same, too.
    """
    themselves = np.zeros(len(spans), dtype=np.bool_)
    rows = np.flatnonzero(found.ids >= 0)
    if not len(rows):
        return themselves
    keys = make_keys(store.embedder, 0, roll_front(hidden, spans.starts), torch.from_numpy(spans.lengths))
    own = keys[rows].astype(np.float64)
    apart = ((own - store.db.keys(found.ids[rows])) ** 2).sum(axis=1)
    rounded = max(4 * torch.finfo(hidden.dtype).eps, torch.finfo(getattr(torch, store.store_dtype)).eps)
    similar = scores[rows] >= 1.0 - max(_SAME_RECORD, rounded)
    themselves[rows] = (apart <= _SAME_KEY * (own**2).sum(axis=1)) & similar
    return themselves


class _Pairs:
    """Distances of keys and the similarities of what they found; None where nothing was found."""

    def __init__(self) -> None:
        self.distances: list[float | None] = []
        self.similarities: list[float | None] = []

    def add(self, rows: Ints, distances: NDArray[np.float32], scores: NDArray[np.float32]) -> None:
        """Add some rows of a batch."""
        for row in rows.tolist():
            known = not np.isnan(scores[row])
            self.distances.append(float(distances[row]) if known else None)
            self.similarities.append(float(scores[row]) if known else None)


def _similarities(own: Tensor, spans: Spans, ids: Ints, store: MemoStore) -> NDArray[np.float32]:
    """Compare what a layer computed with the records of these ids: ``[n]``, NaN where there is none."""
    scores = np.full(len(ids), np.nan, dtype=np.float32)
    found = Found(ids, np.zeros(len(ids), np.float32), spans.lengths, len(ids))
    rows, known = reuse_similarities(own, spans, store, found)
    scores[rows] = known
    return scores
