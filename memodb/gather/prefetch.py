"""The next batch, gathered in the background while the current one is computed with."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import Any, TypeVar

import numpy as np

from memodb.gather.batch import MappedBatch

Ids = np.ndarray[Any, np.dtype[np.int64]]
#: Batches of one handle that may be prepared and not yet asked for; the oldest gives way.
_PENDING = 2
T = TypeVar("T")


class _Background:
    """The one thread of this process that prepares batches: started at need, gone in a forked child."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Know of no thread (in a forked child there is none)."""
        self._lock = threading.RLock()
        self._executor: ThreadPoolExecutor | None = None

    def submit(self, gather: Callable[[], T]) -> Future[T]:
        """Run `gather` in the background."""
        with self._lock:
            if self._executor is None:
                self._executor = ThreadPoolExecutor(1, thread_name_prefix="memodb-prefetch")
            return self._executor.submit(gather)

    def stop(self) -> None:
        """Let the thread end once it is idle."""
        with self._lock:
            executor, self._executor = self._executor, None
        if executor is not None:
            executor.shutdown(wait=False)


BACKGROUND = _Background()
os.register_at_fork(after_in_child=BACKGROUND.forget)


class Prefetched:
    """The batches of one handle that are prepared, or being prepared, and not yet asked for."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Know of none (in a forked child: nobody is preparing them any more)."""
        self._lock = threading.RLock()
        self._closed = False
        self._dropped: list[Future[MappedBatch]] = []
        self._pending: OrderedDict[tuple[bytes, str], Future[MappedBatch]] = OrderedDict()

    def start(self, ids: Ids, strategy: str, gather: Callable[[], MappedBatch]) -> None:
        """Begin to prepare the batch of `ids`, unless that is under way."""
        key = (ids.tobytes(), strategy)
        with self._lock:
            if key in self._pending or self._closed:
                return
            while len(self._pending) >= _PENDING:
                oldest = self._pending.popitem(last=False)[1]
                if not oldest.cancel() and not oldest.done():
                    self._dropped.append(oldest)
            self._dropped = [future for future in self._dropped if not future.done()]
            with suppress(RuntimeError):  # no thread to be had: then it is gathered when it is asked for
                self._pending[key] = BACKGROUND.submit(gather)

    def close(self) -> list[Future[MappedBatch]]:
        """Drop them all, and take no more; return those under way, for `drain`."""
        with self._lock:
            self._closed = True
            futures = [*self._dropped, *self._pending.values()]
            self._pending.clear()
            self._dropped.clear()
        return [future for future in futures if not future.cancel()]

    def take(self, ids: Ids, strategy: str) -> MappedBatch | None:
        """Return the prepared batch of `ids`, waiting for it if it is under way; None if there is none.

        One that could not be prepared counts as none: gathering again tells why, where the caller can see it.
        """
        if not self._pending:
            return None
        with self._lock:
            future = self._pending.pop((ids.tobytes(), strategy), None)
        if future is None or future.cancel():  # not begun: quicker done here
            return None
        return None if future.exception() is not None else future.result()


def drain(futures: list[Future[MappedBatch]]) -> None:
    """Wait until batches under way are done and gone (not from a finalizer: that may run inside one of them)."""
    if futures:
        wait(futures)
        futures.clear()
        BACKGROUND.submit(_nothing).result()  # by now the thread has let go of what it did before


def _nothing() -> None:
    pass
