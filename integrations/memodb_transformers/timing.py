"""What the profiler times: the parts of one attention layer's call, each by itself, in batches of several sizes."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import cycle
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .attention import MemoAttention
from .capture import Visit
from .costs import Errors, Shape, Shapes, fit_costs, scaling_errors
from .embedding import make_keys, usable_keys
from .forward import Ints, Spans, roll_front
from .lookup import Found, find, namespace
from .store import MemoStore

__all__ = ["LayerTimer", "cut_batch", "reference_shape"]

_REPEATS = 5


def reference_shape(shapes: Sequence[Shape]) -> Shape:
    """Choose the size that costs are measured at: the most frequent one, the larger of two."""
    counts = Counter(shapes)
    return max(counts, key=lambda shape: (counts[shape], shape.rows * shape.padded))


def cut_batch(inputs: Mapping[str, Any], spans: Spans, shape: Shape) -> dict[str, Any]:
    """Cut the inputs of a model to the first rows of a batch and to fewer positions.

    Positions are cut off where padding is: at the front where sequences are padded on the left. Tokens beyond are lost,
    so this is for timing only.
    """
    rows, padded = len(spans), spans.padded
    kept = slice(padded - shape.padded, None) if spans.starts.any() else slice(shape.padded)
    cut = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            if value.dim() > 1 and value.shape[1] == padded:
                value = value[:, kept]
            if value.dim() > 0 and len(value) == rows:
                value = value[: shape.rows]
        cut[name] = value
    return cut


class LayerTimer:
    """Times the parts of one layer.

    Parameters
    ----------
    layer
        Number of the layer.
    store
        The memo store.
    compiled
        Whether the original attention is timed under ``torch.compile``.
    """

    def __init__(self, layer: int, store: MemoStore, *, compiled: bool = False) -> None:
        self._layer, self._store, self._compiled = layer, store, compiled
        self._pools: dict[int, Ints] = {}
        self._random = np.random.default_rng(layer)
        self._faster: Callable[..., Any] | None = None
        self._times: dict[Shape, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))

    def time(self, visit: Visit, spans: Spans, lengths: Ints) -> None:
        """Time the parts of one call, each by itself; called from within the call's own forward.

        Parameters
        ----------
        visit, spans
            The call.
        lengths
            Valid lengths of the sequences before they were cut, int ``[n]``: records of these are looked for, as there
            may be none of the length that they were cut to.
        """
        memo = MemoAttention(visit.site, visit.original)
        hidden, store = visit.hidden, self._store
        look_up = self._lookup(hidden, spans, lengths)
        found = look_up()
        # A row with no neighbour borrows one: only time is measured here.
        ids = np.where(found >= 0, found, found.max())
        times = self._times[Shape(*hidden.shape[:2])]
        draws = self._draw(lengths, ids)

        def attend(hits: NDArray[np.bool_]) -> Callable[[], Any]:
            # Other records each time: those of the last one lie in the caches, where those of a new batch do not.
            drawn = [np.where(hits, next(draws), -1) for _ in range(_REPEATS)]
            distances = np.zeros(len(ids), dtype=np.float32)
            chosen = cycle([Found(some, distances, spans.lengths, len(ids)) for some in drawn])
            return lambda: memo.attend(visit.args, visit.kwargs, visit.call, spans, store, next(chosen))

        def measure(part: str, call: Callable[[], Any]) -> None:
            times[part].append(_least_seconds(call, hidden))

        def original() -> Any:
            return visit.original(*visit.args, **visit.kwargs)

        measure("miss", original)
        if self._compiled:
            # Each size by itself: compiled for all at once it would be slower than where a model is served with few.
            faster = self._faster = self._faster or torch.compile(visit.original, dynamic=False)
            faster(*visit.args, **visit.kwargs)
            measure("attention", lambda: faster(*visit.args, **visit.kwargs))
        measure("lookup", look_up)
        if ids.max() >= 0:
            measure("hit", attend(np.ones(len(ids), dtype=np.bool_)))
        if ids.max() >= 0 and len(ids) > 1:
            measure("mixed", attend(np.arange(len(ids)) % 2 == 0))

    def result(self, reference: Shape) -> dict[str, Any]:
        """Return what :class:`LayerProfile` says of costs, by the names of its fields."""
        shapes = Shapes.of(reference)
        measured = {shape: self._parts(shape) for shape in shapes.all}
        costs = fit_costs(shapes, measured)
        fitted: Errors
        linear: Errors
        fitted, linear = scaling_errors(shapes, measured, costs)
        return {
            **{f"{part}_seconds": cost.seconds(reference.rows) / reference.rows for part, cost in costs.items()},
            "batch_size": reference.rows,
            "padded_length": reference.padded,
            "fixed_seconds": {part: cost.fixed for part, cost in costs.items()},
            "scaling_error": fitted,
            "linear_error": linear,
        }

    def _parts(self, shape: Shape) -> dict[str, float | None]:
        """Take the parts of Eq. 3 from what was timed, in seconds a batch."""
        median = {part: statistics.median(times) for part, times in self._times[shape].items()}
        miss, lookup = median["miss"], median["lookup"]
        attention = median.get("attention", miss)
        # Nothing in the store fits any row: a hit cannot be timed and will not happen.
        hit = median.get("hit", attention)
        mixed = median.get("mixed")
        return {
            "attention": attention,
            "lookup": lookup,
            "hit": hit,
            "split": None if mixed is None else max(0.0, mixed - (miss + hit) / 2),
            "uncompiled": max(0.0, miss - attention),
        }

    def _draw(self, lengths: Ints, ids: Ints) -> Iterator[Ints]:
        """Draw records for one call after the other, of each row's own layer and length; ``ids`` where there are none.

        Yields
        ------
        ndarray
            int64 ``[n]``, without an end.
        """
        pools = [self._pool(length) for length in lengths.tolist()]
        while True:
            yield np.array(
                [self._random.choice(pool) if len(pool) else own for pool, own in zip(pools, ids, strict=True)]
            )

    def _pool(self, length: int) -> Ints:
        """List the records of one valid length, once: the catalog goes through all of its rows for that."""
        if length not in self._pools:
            self._pools[length] = self._store.db.ids(namespace(self._layer, length))
        return self._pools[length]

    def _lookup(self, hidden: Tensor, spans: Spans, lengths: Ints) -> Callable[[], Ints]:
        """Make the call that finds ids for a batch."""
        store, layer = self._store, self._layer
        if np.array_equal(spans.lengths, lengths):
            return lambda: find(store, layer, hidden, spans).ids

        def as_uncut() -> Ints:
            ids = np.full(len(spans), -1, dtype=np.int64)
            keys = make_keys(store.embedder, layer, roll_front(hidden, spans.starts), torch.from_numpy(spans.lengths))
            rows = np.flatnonzero((spans.lengths > 0) & usable_keys(keys))
            if len(rows):
                names = [namespace(layer, length) for length in lengths[rows].tolist()]
                ids[rows] = store.db.search(keys[rows], 1, namespace=names).ids[:, 0]
            return ids

        return as_uncut


def _least_seconds(call: Callable[[], Any], hidden: Tensor) -> float:
    """Least seconds of a call: whatever else the machine does can only add."""
    times = []
    for _ in range(_REPEATS):
        began = perf_counter()
        call()
        if hidden.is_cuda:
            torch.cuda.synchronize(hidden.device)
        times.append(perf_counter() - began)
    return min(times)
