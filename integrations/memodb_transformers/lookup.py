"""Where records are found: keys of hidden states, the search, and which record serves which layer.

``"layer"`` is the paper's way: each layer embeds its own hidden state and searches its own records. ``"sequence"``
embeds and searches once, at the input of the first attention layer (the embedding output, or what a layer norm makes of
it); as the records of one sequence have consecutive ids, the record found tells those of all other layers.
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass, replace
from time import perf_counter

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import memodb

from .counting import counting
from .embedding import make_keys, usable_keys
from .forward import Ints, Spans, roll_front
from .store import MemoStore

__all__ = [
    "LOOKUPS",
    "Found",
    "LayerCounters",
    "Seconds",
    "fetch",
    "find",
    "gather",
    "namespace",
    "parse_namespace",
    "prefetch",
]

LOOKUPS = ("layer", "sequence")
_NAMESPACE = re.compile(r"layer=(\d+)/len=(\d+)")


def namespace(layer: int, length: int) -> str:
    """Name the namespace of one layer's records of one valid length."""
    return f"layer={layer}/len={length}"


def parse_namespace(name: str) -> tuple[int, int] | None:
    """Read layer and valid length from what :func:`namespace` returned; None: another name."""
    match = _NAMESPACE.fullmatch(name)
    return None if match is None else (int(match[1]), int(match[2]))


@dataclass(frozen=True, slots=True)
class Found:
    """What a search found.

    Attributes
    ----------
    ids
        int64 ``[n]``, -1: nothing near enough.
    distances
        Squared L2, float32 ``[n]``; infinite where there is nothing at all.
    lengths
        Valid lengths of the records found, int64 ``[n]``; those of the sequences where nothing was found.
    searched
        Sequences that were searched for: those with tokens in one stretch and a finite hidden state.
    farther
        With ``neighbours`` above 1, the second nearest of each sequence, the third, and so on: a hit reuses the mean
        of the nearest and of these.
    """

    ids: Ints
    distances: NDArray[np.float32]
    lengths: Ints
    searched: int
    farther: tuple[Found, ...] = ()

    @property
    def candidates(self) -> Ints:
        """Ids of all records to gather, those of one sequence side by side: int64 ``[n * neighbours]``, -1 for none."""
        if not self.farther:
            return self.ids
        return np.stack([self.ids, *(other.ids for other in self.farther)], axis=1).ravel()

    def within(self, threshold: float, shift: int = 0) -> Found:
        """Keep what is within a threshold, of the layer ``shift`` layers further on."""
        ids = np.where((self.ids >= 0) & (self.distances <= threshold), self.ids + shift, -1)
        return replace(self, ids=ids, farther=tuple(other.within(threshold, shift) for other in self.farther))


@dataclass
class Seconds:
    """Wall-clock seconds of the parts of one call."""

    embed: float = 0.0
    search: float = 0.0
    fetch: float = 0.0
    value: float = 0.0
    product: float = 0.0
    misses: float = 0.0
    rest: float = 0.0

    @property
    def accounted(self) -> float:
        """Sum of all parts."""
        return self.embed + self.search + self.fetch + self.attention

    @property
    def attention(self) -> float:
        """All that comes after the fetch."""
        return self.value + self.product + self.misses + self.rest


@dataclass
class LayerCounters:
    """What one layer did so far. Times are wall-clock seconds.

    Attributes
    ----------
    lookups
        Sequences that were searched for.
    hits
        Sequences whose attention came from the store.
    bypassed
        Sequences that took the original path without a search: tokens with holes, longer than the store's records, in
        training, with attention weights asked for, decoding steps, and so on; or because they are unprofitable.
    unprofitable
        Those of them whose batch is of a size at which the profile expects the layer to lose time (Eq. 3).
    embed_seconds, search_seconds, fetch_seconds
        Time to make keys, to search them, and to gather records into one tensor.
    attention_seconds
        Everything else, of which: ``value_seconds``, V (and K for a cache) of the hits; ``product_seconds``,
        probabilities times V; ``miss_seconds``, the original module for the misses.
    """

    lookups: int = 0
    hits: int = 0
    bypassed: int = 0
    unprofitable: int = 0
    embed_seconds: float = 0.0
    search_seconds: float = 0.0
    fetch_seconds: float = 0.0
    attention_seconds: float = 0.0
    value_seconds: float = 0.0
    product_seconds: float = 0.0
    miss_seconds: float = 0.0

    def count(
        self,
        *,
        lookups: int = 0,
        hits: int = 0,
        bypassed: int = 0,
        unprofitable: int = 0,
        seconds: Seconds | None = None,
    ) -> None:
        """Add what one call did; safe from several threads."""
        spent = seconds or Seconds()
        with counting():
            self.lookups += lookups
            self.hits += hits
            self.bypassed += bypassed
            self.unprofitable += unprofitable
            self.embed_seconds += spent.embed
            self.search_seconds += spent.search
            self.fetch_seconds += spent.fetch
            self.attention_seconds += spent.attention
            self.value_seconds += spent.value
            self.product_seconds += spent.product
            self.miss_seconds += spent.misses

    def reset(self) -> None:
        """Set all counts and times back to zero."""
        with counting():
            for name, value in vars(LayerCounters()).items():
                setattr(self, name, value)

    def as_dict(self) -> dict[str, int | float]:
        """Return all counts and times, of one moment."""
        with counting():
            return dict(vars(self))


def find(
    store: MemoStore,
    layer: int,
    hidden: Tensor,
    spans: Spans,
    *,
    max_distance: float | None = None,
    length_tolerance: int = 0,
    neighbours: int = 1,
    seconds: Seconds | None = None,
) -> Found:
    """Search one layer's records for each row of a batch.

    Parameters
    ----------
    store
        The memo store.
    layer, hidden
        The layer, and the hidden state ``[n, L, H]`` that it is called with.
    spans
        Where the sequences lie; those of length 0 are left out.
    max_distance
        Largest squared L2 distance of keys.
    length_tolerance
        Search records of up to so many more tokens as well.
    neighbours
        Records to find of each sequence, nearest first; above 1, all are of the sequence's own length.
    seconds
        Takes the times of embedding and search.
    """
    began = perf_counter()
    ids = np.full(len(spans), -1, dtype=np.int64)
    distances = np.full(len(spans), np.inf, dtype=np.float32)
    lengths = spans.lengths.copy()
    farther = [(np.full_like(ids, -1), np.full_like(distances, np.inf)) for _ in range(1, neighbours)]
    keys = make_keys(store.embedder, layer, roll_front(hidden, spans.starts), torch.from_numpy(spans.lengths))
    # A hidden state that is NaN, infinite or near it is the model's affair: it passes as without memoization.
    rows = np.flatnonzero((spans.lengths > 0) & usable_keys(keys))
    embedded = perf_counter()
    if len(rows):
        steps = min(length_tolerance, store.padded_length - int(spans.lengths[rows].min())) + 1
        # Shorter records say nothing of the tokens beyond their own: only longer ones can be cut to fit.
        wanted = np.minimum(spans.lengths[rows, None] + np.arange(steps), store.padded_length)  # [rows, steps]
        names = [namespace(layer, length) for length in wanted.ravel().tolist()]
        result = store.db.search(
            keys[rows].repeat(steps, axis=0), neighbours, namespace=names, max_distance=max_distance
        )
        near = result.distances[:, 0].reshape(len(rows), steps)
        best = near.argmin(axis=1)[:, None]
        distances[rows] = np.take_along_axis(near, best, axis=1)[:, 0]
        ids[rows] = np.take_along_axis(result.ids[:, 0].reshape(len(rows), steps), best, axis=1)[:, 0]
        lengths[rows] = np.take_along_axis(wanted, best, axis=1)[:, 0]
        for rank, (more, apart) in enumerate(farther, start=1):
            more[rows], apart[rows] = result.ids[:, rank], result.distances[:, rank]
    if seconds is not None:
        seconds.embed += embedded - began
        seconds.search += perf_counter() - embedded
    others = tuple(Found(more, apart, lengths, len(rows)) for more, apart in farther)
    return Found(ids, distances, lengths, len(rows), others)


def gather(db: memodb.MemoDB, found: Found) -> tuple[Tensor | None, Ints]:
    """Gather what the hits reuse: the pages of the store themselves, or the means of several neighbours.

    Returns
    -------
    records
        ``[hits, *shape]``: mapped, in the dtype of the store, where each hit has one record; else means in float32,
        made anew. None: no hit is left.
    ids
        int64 ``[n]``; -1 where there is no hit, which is also where all that was found was deleted since.
    """
    if not found.farther:
        batch, ids = fetch(db, found.ids)
        return (None if batch is None else batch.torch()), ids
    batch, candidates = fetch(db, found.candidates)
    counts = (candidates >= 0).reshape(len(found.ids), -1).sum(axis=1)
    ids = np.where(counts > 0, found.ids, -1)
    if batch is None:
        return None, ids
    records, rows = batch.torch(), counts[counts > 0]
    means = torch.empty((len(rows), *records.shape[1:]), dtype=torch.float32)
    for row, (count, end) in enumerate(zip(rows.tolist(), rows.cumsum().tolist(), strict=True)):
        means[row] = records[end - count : end].float().mean(dim=0)
    return means, ids


def fetch(db: memodb.MemoDB, ids: Ints) -> tuple[memodb.MappedBatch | None, Ints]:
    """Gather the records of the hits; what was deleted since the search is a miss. None: no hit is left."""
    try:
        while (ids >= 0).any():
            try:
                return db.multiget_mapped(ids[ids >= 0]), ids
            except memodb.RecordNotFoundError:
                ids = np.where([i >= 0 and i in db for i in ids.tolist()], ids, -1)
    except memodb.ClosedError:
        pass  # another thread has left the memoize block
    return None, np.full_like(ids, -1)


def prefetch(db: memodb.MemoDB, ids: Ints) -> None:
    """Begin to gather in the background what :func:`fetch` of the same ids will ask for."""
    if (ids >= 0).any():
        # Deleted or closed since the search: fetch sees to it.
        with suppress(memodb.RecordNotFoundError, memodb.ClosedError):
            db.prefetch(ids[ids >= 0])
