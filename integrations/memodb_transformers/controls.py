"""Controls: what an evaluation reuses in the place of the nearest record, in the very same sequences.

A similar record is worth its search only if it does better than one that was not searched for: a random one, or the
mean of all. And how much better it could do, the oracle tells. So that nothing but the record differs, a control makes
no decision of its own on whether a sequence is a hit: it takes those of the run with the nearest records.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

import memodb

from .attention import MemoAttention
from .condense import condense
from .fidelity import computed_records, cut_records, reuse_similarities
from .forward import Ints, Spans
from .lookup import Found, namespace
from .similarity import Floats, best_records
from .store import MemoStore, bucket_path, smallest_fitting

__all__ = ["Fidelity", "Pick", "Reuse", "best", "check_affordable", "mean", "mean_stores", "random"]

# Chooses what the hits reuse: (batch number, attention, call, spans, store, found) -> (store, found).
Pick = Callable[[int, MemoAttention, Mapping[str, Any], Spans, MemoStore, Found], tuple[MemoStore, Found]]

# Bytes of records that are compared at a time.
_READ = 128 << 20


class Reuse:
    """What one run of an evaluation reuses, as ``Memo(replace=...)``: chosen at the first pass, then always the same.

    Parameters
    ----------
    pick
        Chooses instead of the search; None: what is found is reused.
    hits
        The run whose sequences are hits here as well; it goes first over each batch.

    Attributes
    ----------
    batch
        Number of the batch that the model runs on; set by whoever runs it.
    """

    def __init__(self, pick: Pick | None = None, hits: Reuse | None = None) -> None:
        self.batch = 0
        self._pick, self._hits = pick, hits
        self._chosen: dict[tuple[int, int], tuple[MemoStore, Found]] = {}

    def __call__(
        self, attention: MemoAttention, call: Mapping[str, Any], spans: Spans, store: MemoStore, found: Found
    ) -> tuple[MemoStore, Found]:
        """Tell what a layer reuses in the present batch."""
        key = (self.batch, attention.site.layer)
        if key not in self._chosen:
            if self._hits is not None:
                store, found = self._hits._chosen[key]
            if self._pick is not None:
                store, found = self._pick(self.batch, attention, call, spans, store, found)
            self._chosen[key] = store, found
        return self._chosen[key]


class Fidelity:
    """Compares what is reused with what would have been computed; stands before a :class:`Reuse`, in an eager model.

    Attributes
    ----------
    scores
        float32 ``[hits]`` of each call so far.
    """

    def __init__(self, reuse: Reuse) -> None:
        self._reuse = reuse
        self.scores: list[Floats] = []

    def __call__(
        self, attention: MemoAttention, call: Mapping[str, Any], spans: Spans, store: MemoStore, found: Found
    ) -> tuple[MemoStore, Found]:
        """Note how similar the records of the hits are."""
        store, found = self._reuse(attention, call, spans, store, found)
        if (found.ids >= 0).any():
            own = computed_records(attention, call, spans, store)
            self.scores.append(reuse_similarities(own, spans, store, found)[1])
        return store, found


def random(seed: int) -> Pick:
    """Choose a random record of the namespace, or as many as the hit averages.

    A sequence gets the same one at all levels, and with each run of the same seed.
    """

    def pick(
        batch: int, attention: MemoAttention, call: Mapping[str, Any], spans: Spans, store: MemoStore, found: Found
    ) -> tuple[MemoStore, Found]:
        layer = attention.site.layer
        ranks = (found, *found.farther)
        chosen = np.full((len(ranks), len(found.ids)), -1, dtype=np.int64)
        for row in np.flatnonzero(found.ids >= 0).tolist():
            ids = store.db.ids(namespace(layer, int(found.lengths[row])))
            count = sum(int(rank.ids[row] >= 0) for rank in ranks)
            order = np.random.default_rng([seed, batch, layer, row]).choice(len(ids), size=count, replace=False)
            chosen[:count, row] = ids[order]
        first, *others = (replace(rank, ids=ids) for rank, ids in zip(ranks, chosen, strict=True))
        return store, replace(first, farther=tuple(others))

    return pick


def mean(means: Mapping[int, memodb.MemoDB]) -> Pick:
    """Choose the one mean of the namespace; ``means`` is what :func:`mean_stores` yields."""

    def pick(
        batch: int, attention: MemoAttention, call: Mapping[str, Any], spans: Spans, store: MemoStore, found: Found
    ) -> tuple[MemoStore, Found]:
        db = means[store.padded_length]
        ids = np.full_like(found.ids, -1)
        for row in np.flatnonzero(found.ids >= 0).tolist():
            (ids[row],) = db.ids(namespace(attention.site.layer, int(found.lengths[row])))
        return replace(store, db=db), replace(found, ids=ids, farther=())

    return pick


def best(
    batch: int, attention: MemoAttention, call: Mapping[str, Any], spans: Spans, store: MemoStore, found: Found
) -> tuple[MemoStore, Found]:
    """Choose the record of the namespace most similar to what the layer would compute; the model must be eager."""
    ids = np.full_like(found.ids, -1)
    hits = np.flatnonzero(found.ids >= 0)
    if len(hits):
        own = computed_records(attention, call, spans, store)
        pairs = np.stack([spans.lengths[hits], found.lengths[hits]], axis=1)
        for length, recorded in np.unique(pairs, axis=0).tolist():
            rows = hits[(pairs == (length, recorded)).all(axis=1)]
            name = namespace(attention.site.layer, recorded)
            blocks = _blocks(store, store.db.ids(name), length, recorded)
            ids[rows], _ = best_records(own[rows], blocks, length, contexts=store.target == "context")
    return store, replace(found, ids=ids, farther=())


def _blocks(store: MemoStore, ids: Ints, length: int, recorded: int) -> Iterator[tuple[Ints, Tensor]]:
    step = max(1, _READ // store.db.spec.nbytes)
    for start in range(0, len(ids), step):
        some = ids[start : start + step]
        records = store.db.multiget_mapped(some).torch()
        if recorded > length:
            records = cut_records(records, np.full(len(some), length), np.full(len(some), recorded))
        yield some, records


@contextmanager
def mean_stores(
    path: str | os.PathLike[str], stores: Mapping[int, MemoStore], *, seed: int = 0, progress: bool | None = None
) -> Iterator[dict[int, memodb.MemoDB]]:
    """Make the mean record of each layer and length, in a folder beside the store that goes away again.

    Parameters
    ----------
    path
        The store, or folder of length buckets.
    stores
        The same, open, by L.
    seed, progress
        As for :func:`condense`.

    Yields
    ------
    dict
        Databases with one record a namespace, by L.
    """
    place = Path(path).resolve()
    with (
        tempfile.TemporaryDirectory(prefix=f".{place.name}-means-", dir=place.parent) as folder,
        ExitStack() as stack,
    ):
        target = Path(folder) / "means"
        condense(path, target, records_per_namespace=1, seed=seed, progress=progress)
        bucketed = any(store.path != Path(path) for store in stores.values())
        yield {
            length: stack.enter_context(memodb.MemoDB.open(bucket_path(target, length) if bucketed else target))
            for length in stores
        }


def check_affordable(
    stores: Mapping[int, MemoStore],
    thresholds: Sequence[Mapping[int, Mapping[int, float]]],
    spans: Sequence[Spans],
    length_tolerance: int,
    limit: int,
) -> int:
    """Count the comparisons that the oracle may need, at most.

    Parameters
    ----------
    stores, thresholds
        The stores by L, and of each level the memoized layers of each store.
    spans
        Where the sequences of each batch lie.
    length_tolerance
        As in :func:`memoize`.
    limit
        The most comparisons of two records.

    Raises
    ------
    ValueError
        It would need more.
    """
    counts = {length: store.db.namespaces() for length, store in stores.items()}
    total = 0
    for where in spans:
        bucket = smallest_fitting(stores, where.padded)
        if bucket is None:
            continue
        lengths, times = np.unique(where.lengths[where.lengths > 0], return_counts=True)
        for length, sequences in zip(lengths.tolist(), times.tolist(), strict=True):
            reach = range(length, length + length_tolerance + 1)
            for level in thresholds:
                for layer in level[bucket]:
                    total += sequences * max(counts[bucket].get(namespace(layer, other), 0) for other in reach)
    if total > limit:
        sequences = sum(len(where) for where in spans)
        raise ValueError(
            f"expected at most {limit:,} comparisons of records for the kind 'oracle'; found that {sequences:,} "
            f"sequences at {len(thresholds)} levels may need {total:,}. Evaluate fewer sequences, layers or levels, "
            "or raise oracle_limit"
        )
    return total
