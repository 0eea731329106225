"""The gather itself: from where records lie to one batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from memodb.errors import MappingUnsupportedError, StoreFullError
from memodb.extents import Extents
from memodb.gather.batch import MappedBatch
from memodb.gather.copy import THREADS, Bytes2D, copy_records
from memodb.gather.mapping import map_records
from memodb.gather.plan import Strategy, check_strategy, make_plan
from memodb.gather.window import POOL
from memodb.record import RecordSpec

#: Where n records come from: extents that can be mapped, or a function that copies them into uint8 [n, nbytes].
Source = Extents | Callable[[Bytes2D], None]

__all__ = ["Source", "check_strategy", "closed", "copy_into", "gather_batch", "opened"]


def gather_batch(
    source: Source, spec: RecordSpec, ids: np.ndarray[Any, np.dtype[np.int64]], strategy: Strategy
) -> MappedBatch:
    """Gather the records of `ids` [n] from `source` into one batch.

    Raises
    ------
    MappingUnsupportedError
        If `strategy` is "map" and they cannot be mapped.
    StoreFullError
        If there is no memory for a copy.
    """
    if len(ids) == 0:
        return MappedBatch(np.empty(0, np.uint8), spec, ids, zero_copy=False)
    total = len(ids) * spec.nbytes
    if isinstance(source, Extents):
        plan = make_plan(source, spec.nbytes, strategy, free_vmas=POOL.free_vmas())
        if plan.map:
            try:
                window = map_records(source, spec.nbytes, plan)
                return MappedBatch(POOL.hold(window, total).base, spec, ids, zero_copy=True)
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
    copy_into(source, held.reshape(len(ids), spec.nbytes))
    return MappedBatch(held.base, spec, ids, zero_copy=False)


def copy_into(source: Source, out: Bytes2D) -> None:
    """Copy the records of `source` into `out`, uint8 [n, nbytes] C-contiguous."""
    if isinstance(source, Extents):
        copy_records(source, out.shape[1], out)
    else:
        source(out)


def opened() -> None:
    """Note that a database was opened in this process."""
    POOL.open()


def closed() -> None:
    """Note that one was closed; after the last, idle memory and threads are given back."""
    if POOL.close() == 0:
        THREADS.stop()
