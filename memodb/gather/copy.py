"""The copy gather: records copied side by side by several threads."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np

from memodb.extents import Extents
from memodb.gather.plan import runs

#: Below this a copy is over before a thread is awake (measured: one thread wins at 6 MB, two at 25 MB).
_THREADED_BYTES = 16 << 20
#: Records up to this size are copied by one numpy call a segment; larger ones one run at a time.
_SMALL_RECORD = 64 << 10
_WORKERS = min(os.cpu_count() or 1, 8)

Bytes2D = np.ndarray[Any, np.dtype[np.uint8]]


class _Threads:
    """The copy threads of this process, started at need, stopped with the last database, gone in a forked child."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self._lock = threading.Lock()
        self._executor: ThreadPoolExecutor | None = None

    def get(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._executor is None:
                self._executor = ThreadPoolExecutor(_WORKERS, thread_name_prefix="memodb-copy")
            return self._executor

    def stop(self) -> None:
        with self._lock:
            executor, self._executor = self._executor, None
        if executor is not None:
            executor.shutdown(wait=True)


THREADS = _Threads()
os.register_at_fork(after_in_child=THREADS.forget)


def copy_records(extents: Extents, nbytes: int, out: Bytes2D) -> None:
    """Copy the records of `extents`, in order, into `out`, uint8 [n, nbytes] C-contiguous."""
    n = len(extents)
    if n * nbytes < _THREADED_BYTES or n < 2 or _WORKERS < 2:
        _copy_part(extents, nbytes, out, 0, n)
        return
    bounds = np.linspace(0, n, min(_WORKERS, n) + 1).astype(int)
    executor = THREADS.get()
    jobs = [executor.submit(_copy_part, extents, nbytes, out, a, b) for a, b in pairwise(bounds.tolist())]
    for job in jobs:
        job.result()


def _copy_part(extents: Extents, nbytes: int, out: Bytes2D, first: int, last: int) -> None:
    part = Extents(extents.segments, extents.segment[first:last], extents.offset[first:last])
    if nbytes > _SMALL_RECORD or (part.offset % nbytes).any():
        _copy_runs(part, nbytes, out[first:last])
        return
    for i in np.unique(part.segment).tolist():
        mine = np.flatnonzero(part.segment == i)
        slots = part.offset[mine] // nbytes
        source = _records(part, i, nbytes, int(slots.max()) + 1)
        if len(mine) == len(part):
            # mode="clip" spares the buffer that mode="raise" puts before `out`; the slots were checked against the
            # file's size.
            np.take(source, slots, axis=0, out=out[first:last], mode="clip")
        else:
            out[first + mine] = source[slots]


def _records(extents: Extents, segment: int, nbytes: int, count: int) -> Bytes2D:
    return extents.segments[segment].view(count * nbytes).reshape(count, nbytes)


def _copy_runs(extents: Extents, nbytes: int, out: Bytes2D) -> None:
    starts = runs(extents, nbytes)
    stops = [*starts[1:].tolist(), len(extents)]
    sources = {
        i: extents.segments[i].view(int(extents.offset[extents.segment == i].max()) + nbytes)
        for i in np.unique(extents.segment).tolist()
    }
    target = out.reshape(-1)
    runs_of = zip(
        starts.tolist(), stops, extents.segment[starts].tolist(), extents.offset[starts].tolist(), strict=True
    )
    for start, stop, segment, offset in runs_of:
        size = (stop - start) * nbytes
        target[start * nbytes : start * nbytes + size] = sources[segment][offset : offset + size]
