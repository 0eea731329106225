"""Address ranges and warm buffers that batches stand on: taken, given back when the last view dies, used again.

One pool a process. A mapped batch stands on a *window*, a reserved range; a copied batch stands on a *buffer*, memory
that stays warm for the next one. A few large windows keep their pages until the next batch is laid over them, which
saves one pass over them (docs/decisions/0003); all others are emptied at once, so that nothing pins a segment that
compaction unlinked. While no database is open in the process, nothing idle is kept.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np

from memodb import vm

#: Windows at least this large are worth laying over; so many of them may wait at once with their pages.
_WORTH_KEEPING = 32 << 20
_KEPT_WINDOWS = 2
#: Idle reservations (address space only), and idle buffers: more would take longer to look through than to make.
_IDLE_WINDOWS, _IDLE_BUFFERS = 16, 16


@dataclass
class Limits:
    """What the gathers of this process may take.

    Parameters
    ----------
    idle_bytes
        Memory that waits for the next batch: warm copy buffers, and pages of kept windows.
    mappings
        VMAs of all batches together.
    """

    idle_bytes: int
    mappings: int


@dataclass(eq=False, slots=True)
class Range:
    """A range of addresses that a batch stands on: of one batch, from when it is taken until it is given back.

    `filled` bytes of a window hold mappings, `vmas` of them; `keep` tells whether laying the next batch over them would
    save anything, `epoch` as of when they are known to be of files that their store still has. One that is `spent` was
    given back, and may be another batch's by now.
    """

    address: int
    nbytes: int
    window: bool
    filled: int = 0
    vmas: int = 0
    keep: bool = False
    epoch: int = 0
    spent: bool = False


class Holder(vm.Span):
    """What every array, tensor storage and capsule of a batch keeps alive; its death gives the range back."""

    def __init__(self, pool: Pool, owned: Range, nbytes: int, shift: int) -> None:
        super().__init__(owned.address + shift, nbytes, writable=True)
        self._pool = pool
        self._range = owned

    def __del__(self) -> None:
        self._pool.give_back(self._range)


class Pool:
    """The ranges of this process."""

    def __init__(self) -> None:
        self.renew_locks()
        self.limits = Limits(
            min(2 << 30, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 8), vm.mapping_budget()
        )
        self._returned: deque[Range] = deque()
        self._empty: list[Range] = []
        self._kept: list[Range] = []
        self._buffers: list[Range] = []
        self._users = 0
        self._epoch = 0
        self.vmas = 0

    def limit(self, idle_bytes: int | None, mappings: int | None) -> dict[str, int]:
        """Change limits that are not None; return all, and what is in use of them."""
        with self._lock:
            if idle_bytes is not None:
                self.limits.idle_bytes = int(idle_bytes)
            if mappings is not None:
                self.limits.mappings = int(mappings)
        self._collect()
        return {
            "idle_bytes": self.limits.idle_bytes,
            "mappings": self.limits.mappings,
            "idle_bytes_in_use": self.idle_bytes(),
            "mappings_in_use": self.vmas,
        }

    def renew_locks(self) -> None:
        """Take fresh locks (in a forked child)."""
        self._lock = threading.Lock()
        # Taken wherever the last reference to a database dies, also inside what holds the other one.
        self._users_lock = threading.RLock()

    def open(self) -> None:
        """Note that a database is open: idle ranges are worth keeping."""
        with self._users_lock:
            self._users += 1

    def close(self) -> int:
        """Note that a database was closed; after the last one nothing idle is kept. Return how many are still open."""
        with self._users_lock:
            self._users -= 1
            users = self._users
        self._collect()
        return users

    def free_vmas(self) -> int:
        """Return how many more VMAs batches may take."""
        self._collect()
        return self.limits.mappings - self.vmas + sum(r.vmas for r in list(self._kept))

    def window(self, nbytes: int, vmas: int) -> Range:
        """Take a reserved range of at least `nbytes` for `vmas` mappings, aligned to huge pages.

        Mappings of an earlier batch may still lie in its first `nbytes` (to be laid over), never behind them.
        """
        self._collect()
        with self._lock:
            found = self._fit(self._kept, nbytes) or self._fit(self._empty, nbytes)
            if self.vmas + vmas > self.limits.mappings:
                self._empty_kept()
            if found is not None:
                self.vmas -= found.vmas
            self.vmas += vmas
        try:
            if found is None:
                size = vm.round_up(nbytes, vm.HUGE)
                found = Range(vm.reserve(size), size, window=True)
            elif found.filled > nbytes:
                vm.map_nothing(found.address + nbytes, found.filled - nbytes)
        except BaseException:
            with self._lock:
                self.vmas -= vmas
                if found is not None:
                    vm.unmap(found.address, found.nbytes)
            raise
        found.vmas, found.filled, found.keep, found.epoch = vmas, nbytes, False, self._epoch
        return found

    def buffer(self, nbytes: int) -> Range:
        """Take warm memory of at least `nbytes`."""
        if self._returned:
            self._collect()
        with self._lock:
            found = self._fit(self._buffers, nbytes)
        if found is None:
            size = vm.round_up(nbytes, vm.HUGE if nbytes >= vm.HUGE // 4 else vm.PAGE)
            found = Range(vm.allocate(size), size, window=False)
        return found

    @staticmethod
    def _fit(idle: list[Range], nbytes: int) -> Range | None:
        # The smallest that fits, and none that is mostly too large: that one is worth more to a larger batch.
        best = None
        for owned in idle:
            if nbytes <= owned.nbytes <= max(4 * nbytes, 4 * vm.HUGE) and (best is None or owned.nbytes < best.nbytes):
                best = owned
        if best is not None:
            idle.remove(best)
        return best

    def give_back(self, owned: Range, *, intact: bool = True) -> None:
        """Take a range back, once; `intact` tells whether it holds a whole batch.

        Runs wherever the last view dies, also inside a garbage collection that this pool triggered itself.
        """
        if owned.spent:  # by whom an interrupt had thrown out, and now by what its traceback kept
            return
        owned.spent = True
        if not intact:
            owned.filled = 0  # nobody knows how far the mapping came: never laid over
        self._returned.append(
            Range(owned.address, owned.nbytes, owned.window, owned.filled, owned.vmas, owned.keep, owned.epoch)
        )
        self._collect()

    def forget_pages(self) -> None:
        """Empty the idle windows: what they map may have been removed from its store."""
        with self._lock:
            self._epoch += 1
            self._empty_kept()

    def _collect(self) -> None:
        # Only whoever gets the lock sorts returned ranges in; whoever does not leaves them to the holder of the lock,
        # who looks again. A range that slips between the two is sorted in by the next call. A thread that holds the
        # lock sees it locked, so it never waits for itself. Not `acquire(blocking=False)`: an interrupt that lands
        # between its return and the `try` would leave the lock taken for ever; none lands inside of `with`.
        while self._returned or self._surplus():
            if self._lock.locked():
                return
            with self._lock:
                while self._returned:
                    self._sort_in(self._returned.popleft())
                self._trim()

    def _sort_in(self, owned: Range) -> None:
        if not owned.window:
            self._buffers.append(owned)
        elif self._users and owned.keep and owned.epoch == self._epoch and owned.filled >= _WORTH_KEEPING:
            self._kept.append(owned)
        else:
            self._empty_out(owned)

    def _empty_out(self, owned: Range) -> None:
        self.vmas -= owned.vmas
        owned.vmas = owned.filled = 0
        try:
            vm.map_nothing(owned.address, owned.nbytes)
        except OSError:  # at the limit of mappings even this one is refused: letting go of the range needs none
            vm.unmap(owned.address, owned.nbytes)
        else:
            self._empty.append(owned)

    def _empty_kept(self) -> None:
        while self._kept:
            self._empty_out(self._kept.pop(0))

    def _surplus(self) -> bool:
        if not self._users:
            return bool(self._empty or self._buffers or self._kept)
        return (
            len(self._kept) > _KEPT_WINDOWS
            or len(self._empty) > _IDLE_WINDOWS
            or len(self._buffers) > _IDLE_BUFFERS
            or self.idle_bytes() > self.limits.idle_bytes
        )

    def _trim(self) -> None:
        while self._surplus():
            if self._kept and len(self._empty) <= _IDLE_WINDOWS and len(self._buffers) <= _IDLE_BUFFERS:
                self._empty_out(self._kept.pop(0))
                continue
            idle = self._buffers if self._users and len(self._empty) <= _IDLE_WINDOWS else self._empty or self._buffers
            oldest = idle.pop(0)
            vm.unmap(oldest.address, oldest.nbytes)

    def idle_bytes(self) -> int:
        """Return the bytes of memory that wait for the next batch."""
        return sum(r.nbytes for r in list(self._buffers)) + sum(r.filled for r in list(self._kept))

    def hold(self, owned: Range, nbytes: int, shift: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Return `nbytes` of a range, from `shift` on, as an array whose base gives the range back when it dies."""
        try:
            return Holder(self, owned, nbytes, shift).array()
        except BaseException:
            self.give_back(owned, intact=False)
            raise


POOL = Pool()
os.register_at_fork(after_in_child=POOL.renew_locks)
