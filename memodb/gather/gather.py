"""The gather itself: from where records lie to one batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from memodb.errors import InvalidOptionError, MappingUnsupportedError, StoreFullError
from memodb.extents import Extents
from memodb.gather.batch import MappedBatch
from memodb.gather.copy import Bytes2D, copy_records
from memodb.gather.costs import costs_here
from memodb.gather.mapping import map_records
from memodb.gather.plan import Strategy, check_strategy, make_plan
from memodb.gather.prefetch import BACKGROUND
from memodb.gather.window import POOL
from memodb.record import RecordSpec
from memodb.threads import CREW, MOST

#: Where n records come from: extents that can be mapped, or a function that copies them into uint8 [n, nbytes].
Source = Extents | Callable[[Bytes2D], None]

__all__ = ["Source", "check_strategy", "closed", "copy_into", "forget_pages", "gather_batch", "gather_limits", "opened"]


def gather_batch(
    source: Source,
    spec: RecordSpec,
    ids: np.ndarray[Any, np.dtype[np.int64]],
    strategy: Strategy,
    *,
    threads: int | None = None,
) -> MappedBatch:
    """Gather the records of `ids` [n] from `source` into one batch; `threads` is for those who know better than it.

    Raises
    ------
    MappingUnsupportedError
        If `strategy` is "map" and they cannot be mapped.
    StoreFullError
        If there is no memory for a copy.
    """
    n = len(ids)
    if n == 0:
        return MappedBatch(np.empty(0, np.uint8), spec, ids, zero_copy=False)
    total = n * spec.nbytes
    if isinstance(source, Extents):
        plan = make_plan(
            source,
            spec.nbytes,
            strategy,
            free_vmas=POOL.free_vmas,
            costs=costs_here(),
            warm_bytes=POOL.limits.idle_bytes,
        )
        threads = threads or plan.threads
        if plan.map:
            try:
                held = POOL.hold(map_records(source, spec.nbytes, plan), total, plan.shift)
                return MappedBatch(held, spec, ids, zero_copy=True)
            except MappingUnsupportedError:
                if strategy == "map":
                    raise
    elif strategy == "map":
        raise MappingUnsupportedError(
            'strategy="map": this backend keeps no pages that could be mapped; strategy="auto" copies instead'
        )
    try:
        buffer = POOL.buffer(total)
    except OSError as error:
        raise StoreFullError(
            f"no memory for a batch of {total} bytes: {error}; gather fewer records at once"
        ) from error
    held = POOL.hold(buffer, total)
    copy_into(source, held.reshape(n, spec.nbytes), threads or MOST)
    return MappedBatch(held, spec, ids, zero_copy=False)


def copy_into(source: Source, out: Bytes2D, threads: int = MOST) -> None:
    """Copy the records of `source` into `out`, uint8 [n, nbytes] C-contiguous."""
    if isinstance(source, Extents):
        copy_records(source, out.shape[1], out, threads)
    else:
        source(out)


def forget_pages() -> None:
    """Let idle windows go of their pages: a store of this process gave up some of its files."""
    POOL.forget_pages()


def gather_limits(*, idle_bytes: int | None = None, mappings: int | None = None) -> dict[str, int]:
    """Set what the gathers of this process may take, and return it.

    Parameters
    ----------
    idle_bytes
        Memory kept warm for the next batch once one is released: copy buffers, and windows that still hold pages.
        Default: an eighth of the machine's memory, 2 GiB at most. 0: nothing is kept.
    mappings
        Memory mappings (VMAs) that all batches together may hold; beyond, "auto" copies. Default: a quarter of
        ``vm.max_map_count``.

    Returns
    -------
    dict
        ``idle_bytes`` and ``mappings`` as they are now; ``idle_bytes_in_use`` and ``mappings_in_use``.

    Raises
    ------
    InvalidOptionError
        If a limit is no integer of at least 0; nothing changes then.
    """
    for name, value in (("idle_bytes", idle_bytes), ("mappings", mappings)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 0):
            raise InvalidOptionError(f"{name} must be an integer of at least 0, found {value!r}")
    return POOL.limit(idle_bytes, mappings)


def opened() -> None:
    """Note that a database was opened in this process."""
    POOL.open()


def closed() -> None:
    """Note that one was closed; after the last, idle memory and threads are given back."""
    if POOL.close() == 0:
        BACKGROUND.stop()
        CREW.stop()
