"""`FaissIndex`: any faiss factory string, exact until the factory's training has enough keys.

Positions inside the faiss index are 0, 1, 2, ... in order of addition; a table turns them into ids. Deleted positions
are left out inside the search by an IDSelector, so k live neighbours come back while there are k.
"""

from __future__ import annotations

import os
import struct
import sys
from contextlib import suppress
from typing import Any

import faiss as _faiss
import numpy as np

from memodb.index.base import Distances, Ids, Keys, VectorIndex
from memodb.index.saved import as_hnsw, as_ivf, can_be_read, most_bytes, read_index, require_kind

__all__ = ["EXACT_LIMIT", "FaissIndex", "most_bytes"]

# Its stubs know a part of its names only.
faiss: Any = _faiss

#: "auto" searches a namespace exactly up to this many keys, and builds HNSW32 beyond.
EXACT_LIMIT = 10_000
_AUTO_LARGE = "HNSW32"
#: Breadth of the graph search while building; faiss' 40 loses recall at 128 dimensions.
_EF_CONSTRUCTION = 80
_HEAD = struct.Struct("<QQQI")
#: faiss' own advice for k-means: training points per centroid.
_POINTS_PER_CENTROID = 39


class FaissIndex(VectorIndex):
    """One namespace's keys in a faiss index (see `VectorIndex`).

    Parameters
    ----------
    key_dim
        Width of a key.
    factory
        faiss factory string, or "auto".
    """

    def __init__(self, key_dim: int, factory: str) -> None:
        self._dim = key_dim
        self._factory = factory
        self._index: Any = faiss.IndexFlatL2(key_dim)
        self._exact = True
        self._ids: Ids = np.zeros(0, np.int64)
        self._live = np.zeros(0, np.bool_)
        self._n = 0
        self._selector: Any = None

    def __len__(self) -> int:
        return int(np.count_nonzero(self._live[: self._n]))

    @property
    def worth_saving(self) -> bool:
        """True once the index is more than the bare keys, unless it would not be read back."""
        return not self._exact and can_be_read(self._index)

    def add(self, ids: Ids, keys: Keys) -> None:
        """Add keys (see `VectorIndex.add`); builds the factory's index once there are enough."""
        end = self._n + len(ids)
        if end > len(self._ids):
            size = max(end, 2 * len(self._ids), 64)
            self._ids = np.concatenate([self._ids, np.zeros(size - len(self._ids), np.int64)])
            self._live = np.concatenate([self._live, np.zeros(size - len(self._live), np.bool_)])
        self._ids[self._n : end] = ids
        self._live[self._n : end] = True
        self._n = end
        self._selector = None
        self._index.add(np.ascontiguousarray(keys, np.float32))
        if self._exact:
            self._promote()

    def _target(self) -> Any:
        """Return the index of many keys, untrained and empty."""
        return faiss.index_factory(self._dim, _AUTO_LARGE if self._factory == "auto" else self._factory)

    def _promote(self) -> None:
        if self._factory == "auto" and self._n <= EXACT_LIMIT:
            return
        target = self._target()
        if isinstance(faiss.downcast_index(target), faiss.IndexFlat):
            return
        if not target.is_trained and self._n < _training_points(target):
            return
        keys = self._index.reconstruct_n(0, self._n)
        if not target.is_trained:
            target.train(keys)
        hnsw = as_hnsw(target)
        if hnsw is not None:
            hnsw.hnsw.efConstruction = max(hnsw.hnsw.efConstruction, _EF_CONSTRUCTION)
        target.add(keys)
        self._index, self._exact = target, False

    def remove(self, ids: Ids) -> None:
        """Leave `ids` out of every further search."""
        places = np.searchsorted(self._ids[: self._n], ids)
        inside = places < self._n
        places = places[inside][self._ids[places[inside]] == ids[inside]]
        self._live[places] = False
        self._selector = None

    def search(self, keys: Keys, k: int) -> tuple[Ids, Distances]:
        """Search (see `VectorIndex.search`)."""
        live = len(self)
        wanted = min(k, live)
        ids = np.full((len(keys), k), -1, np.int64)
        distances = np.full((len(keys), k), np.inf, np.float32)
        if wanted == 0 or len(keys) == 0:
            return ids, distances
        found, near = self._known(*self._find(keys, wanted, thorough=False))
        short = (found < 0).any(axis=1)
        if short.any():
            # A graph or inverted-list search may give up before it has k live ones; then look at everything for those
            # rows.
            again = np.ascontiguousarray(keys[short])
            found[short], near[short] = self._known(*self._find(again, wanted, thorough=True))
        ids[:, :wanted] = np.where(found >= 0, self._ids[np.maximum(found, 0)], -1)
        distances[:, :wanted] = np.where(found >= 0, near, np.inf)
        return ids, distances

    def _known(self, found: Ids, near: Distances) -> tuple[Ids, Distances]:
        """Leave out positions that there are none of: with centroids that are NaN, faiss returns what was in memory."""
        return np.where(found < self._n, found, -1), near

    def _find(self, keys: Keys, k: int, *, thorough: bool) -> tuple[Ids, Distances]:
        selector = self._dead_excluded()
        index = faiss.downcast_index(self._index)
        hnsw, ivf = as_hnsw(index), as_ivf(index)
        params: Any
        if self._exact:
            params = faiss.SearchParameters(sel=selector)
        elif hnsw is not None and thorough:
            index, params = faiss.downcast_index(index.storage), faiss.SearchParameters(sel=selector)
        elif hnsw is not None:
            params = faiss.SearchParametersHNSW(sel=selector, efSearch=max(64, 2 * k))
        elif ivf is not None and ivf.this == index.this:
            lists = ivf.nlist if thorough else min(ivf.nlist, max(8, ivf.nlist // 16))
            params = faiss.SearchParametersIVF(sel=selector, nprobe=lists)
        else:
            return self._find_and_filter(keys, k)
        near, found = index.search(keys, k, params=params)
        return found, near

    def _find_and_filter(self, keys: Keys, k: int) -> tuple[Ids, Distances]:
        # Index types that take no selector: ask for as many more as there are dead, and drop those.
        ivf = as_ivf(self._index)
        if ivf is not None:
            ivf.nprobe = ivf.nlist
        near, found = self._index.search(keys, min(self._n, k + self._n - len(self)))
        found, near = self._known(found, near)
        dead = (found < 0) | ~self._live[np.maximum(found, 0)]
        order = np.argsort(dead, axis=1, kind="stable")[:, :k]
        found = np.where(np.take_along_axis(dead, order, 1), -1, np.take_along_axis(found, order, 1))
        return found, np.take_along_axis(near, order, 1)

    def _dead_excluded(self) -> Any:
        live = self._live[: self._n]
        if live.all():
            return None
        if self._selector is None:
            bits = np.packbits(live, bitorder="little")
            selector = faiss.IDSelectorBitmap(len(bits), faiss.swig_ptr(bits))
            selector.bits = bits  # faiss keeps a bare pointer
            self._selector = selector
        return self._selector

    def serialize(self) -> bytes:
        """Return the index as bytes (see `VectorIndex.serialize`)."""
        live = np.packbits(self._live[: self._n], bitorder="little").tobytes()
        body: bytes = faiss.serialize_index(self._index).tobytes()
        return _HEAD.pack(self._n, self.sequence, self.mark, self._exact) + self._ids[: self._n].tobytes() + live + body

    @classmethod
    def deserialize(cls, data: bytes, key_dim: int, factory: str) -> FaissIndex:
        """Return an index from its bytes (see `VectorIndex.deserialize`).

        faiss trusts its files: so it gets none before their sizes were bounded by their length, and what it makes of
        one must be the very kind of index that the factory makes, with positions inside that point to keys it has.
        """
        try:
            n, sequence, mark, exact = _HEAD.unpack_from(data)
            if exact not in (0, 1) or n > len(data) // 8:
                raise ValueError(f"it tells of {n} keys in {len(data)} bytes")
            made = cls(key_dim, factory)
            at = _HEAD.size
            made._ids = np.frombuffer(data, np.int64, n, at).copy()
            if n and (made._ids[0] < 0 or (np.diff(made._ids) <= 0).any()):
                raise ValueError("its ids do not ascend")
            at += 8 * n
            packed = np.frombuffer(data, np.uint8, -(-n // 8), at)
            made._live = np.unpackbits(packed, bitorder="little", count=n).astype(np.bool_)
            found = read_index(np.frombuffer(data, np.uint8, offset=at + len(packed)))
            target = faiss.IndexFlatL2(key_dim) if exact else made._target()
            # Written and read as well: what faiss reads is of other classes here and there than what it made. (It
            # does not read some that are not trained yet; of those the classes are the same.)
            with suppress(RuntimeError):
                target = read_index(faiss.serialize_index(target))
            require_kind(found, target, n)
        except (struct.error, RuntimeError, ValueError) as error:
            raise ValueError(f"not a saved index: {error}") from error
        made._index, made._n, made.sequence, made.mark, made._exact = found, n, sequence, mark, bool(exact)
        return made


def _training_points(index: Any) -> int:
    ivf = as_ivf(index)
    inner = faiss.downcast_index(index)
    points = [ivf.nlist * _POINTS_PER_CENTROID] if ivf is not None else [1_000]
    for part in (inner, ivf and faiss.downcast_index(ivf)):
        pq = getattr(part, "pq", None)
        if pq is not None:
            points.append(pq.ksub * _POINTS_PER_CENTROID)
    return max(points)


def _after_fork_in_child() -> None:
    # libgomp's threads do not survive a fork: a parallel region in the child waits for them for ever.
    if "faiss" in sys.modules:
        faiss.omp_set_num_threads(1)


os.register_at_fork(after_in_child=_after_fork_in_child)
