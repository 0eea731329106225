"""Address ranges and warm buffers that batches stand on: taken, given back when the last view dies, used again.

One pool a process. A mapped batch stands on a *window*, a reserved range whose pages are let go when the batch dies (so
nothing pins a segment that compaction unlinked); a copied batch stands on a *buffer*, memory that stays warm for the
next one, within a budget. While no database is open in the process, nothing idle is kept.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from memodb import vm

#: Idle buffers kept warm at most, and idle reservations (address space only).
_IDLE_BYTES = min(2 << 30, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 8)
_IDLE_WINDOWS = 16


@dataclass(eq=False)
class Range:
    """A range of addresses that a batch stands on."""

    address: int
    nbytes: int
    mapped: bool
    vmas: int = 0
    keep: Any = field(default=None, repr=False)


class Holder(vm.Span):
    """What every array, tensor storage and capsule of a batch keeps alive; its death gives the range back."""

    def __init__(self, pool: Pool, owned: Range, nbytes: int) -> None:
        super().__init__(owned.address, nbytes, writable=True)
        self._pool = pool
        self._range = owned

    def __del__(self) -> None:
        self._pool.give_back(self._range)


class Pool:
    """The ranges of this process."""

    def __init__(self) -> None:
        self._renew_lock()
        self._returned: deque[Range] = deque()
        self._windows: list[Range] = []
        self._buffers: list[Range] = []
        self._users = 0
        self.vmas = 0

    def _renew_lock(self) -> None:
        self._lock = threading.Lock()

    def open(self) -> None:
        """Note that a database is open: idle ranges are worth keeping."""
        with self._lock:
            self._users += 1

    def close(self) -> int:
        """Note that a database was closed; after the last one nothing idle is kept. Return how many are still open."""
        with self._lock:
            self._users -= 1
            users = self._users
        self._collect()
        return users

    def free_vmas(self) -> int:
        """Return how many more VMAs batches may take."""
        self._collect()
        return vm.mapping_budget() - self.vmas

    def window(self, nbytes: int, vmas: int) -> Range:
        """Take a reserved range of at least `nbytes` for `vmas` mappings, aligned to huge pages."""
        self._collect()
        with self._lock:
            found = self._fit(self._windows, nbytes)
            self.vmas += vmas
        if found is None:
            try:
                size = vm.round_up(nbytes, vm.HUGE)
                found = Range(vm.reserve(size), size, mapped=True)
            except OSError:
                with self._lock:
                    self.vmas -= vmas
                raise
        found.vmas = vmas
        return found

    def buffer(self, nbytes: int) -> Range:
        """Take warm memory of at least `nbytes`."""
        self._collect()
        with self._lock:
            found = self._fit(self._buffers, nbytes)
        if found is None:
            size = vm.round_up(nbytes, vm.HUGE if nbytes >= vm.HUGE else vm.PAGE)
            found = Range(vm.allocate(size), size, mapped=False)
        return found

    @staticmethod
    def _fit(idle: list[Range], nbytes: int) -> Range | None:
        # The smallest that fits, and none that is mostly too large: that one is worth more to a larger batch.
        fitting = [r for r in idle if nbytes <= r.nbytes <= max(4 * nbytes, 4 * vm.HUGE)]
        if not fitting:
            return None
        best = min(fitting, key=lambda r: r.nbytes)
        idle.remove(best)
        return best

    def give_back(self, owned: Range) -> None:
        """Take a range back.

        Runs wherever the last view dies, also inside a garbage collection that this pool triggered itself.
        """
        self._returned.append(owned)
        self._collect()

    def _collect(self) -> None:
        # Only whoever gets the lock sorts returned ranges in; whoever does not leaves them to the holder of the lock,
        # who looks again. A range that slips between the two is sorted in by the next call.
        while self._returned or self._surplus():
            if not self._lock.acquire(blocking=False):
                return
            try:
                while self._returned:
                    self._sort_in(self._returned.popleft())
                self._trim()
            finally:
                self._lock.release()

    def _sort_in(self, owned: Range) -> None:
        if owned.mapped:
            vm.map_nothing(owned.address, owned.nbytes)
            self.vmas -= owned.vmas
            owned.keep = None
            self._windows.append(owned)
        else:
            self._buffers.append(owned)

    def _surplus(self) -> bool:
        if not self._users:
            return bool(self._windows or self._buffers)
        return len(self._windows) > _IDLE_WINDOWS or sum(r.nbytes for r in self._buffers) > _IDLE_BYTES

    def _trim(self) -> None:
        while self._surplus():
            idle = (
                self._windows
                if self._windows and (not self._users or len(self._windows) > _IDLE_WINDOWS)
                else self._buffers
            )
            oldest = idle.pop(0)
            vm.unmap(oldest.address, oldest.nbytes)

    def idle_bytes(self) -> int:
        """Return the bytes of warm memory that wait for the next batch."""
        return sum(r.nbytes for r in list(self._buffers))

    def hold(self, owned: Range, nbytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Return the first `nbytes` of a range as an array whose base gives the range back when it dies."""
        return Holder(self, owned, nbytes).array()


POOL = Pool()
os.register_at_fork(after_in_child=POOL._renew_lock)
