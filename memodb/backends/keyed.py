"""`KeyedBackend`: records under numbers of their own, the short way to write a backend."""

from __future__ import annotations

import struct
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from memodb.backends.base import Locators, Usage, ValueBackend, Values, Victim
from memodb.errors import CorruptionError
from memodb.record import RecordSpec
from memodb.safe import Guard

_STATE = struct.Struct("<QQ")
#: Numbers stay below this.
_MOST = 1 << 62
#: Dead records that compaction takes away at a time.
_GROUP = 4096


class KeyedBackend(ValueBackend):
    """Keeps each record under a number of its own, which is its locator.

    A subclass says how records are written, read, erased and listed by number. Numbers ascend; one that was committed
    never comes again. What a crash left, and what a failed put wrote, has numbers that no commit knows: it is erased
    before those numbers are given again. Compaction moves nothing: it erases what is dead.

    Parameters
    ----------
    path, spec, options, writable
        As for `ValueBackend`. A writer finds the directory made.
    """

    def __init__(self, path: Path, spec: RecordSpec, options: Mapping[str, Any], *, writable: bool) -> None:
        super().__init__(path, spec, options, writable=writable)
        #: Number that the next record gets.
        self.next = 0
        #: Records kept, dead ones included.
        self.kept = 0
        self._dead: list[Locators] = []
        if writable:
            Guard.of(path.parent).make_directory(path)

    # --- what a subclass fills in ---

    @abstractmethod
    def write(self, numbers: Locators, values: Values) -> None:
        """Keep `values` [n, *shape] (any strides) under `numbers`, uint64 [n], ascending without gaps.

        Raises
        ------
        StoreFullError
            If they do not fit.
        """

    @abstractmethod
    def erase(self, numbers: Locators) -> None:
        """Remove the records of `numbers`; those that are not there are passed over."""

    @abstractmethod
    def numbers(self, first: int) -> Locators:
        """Return the numbers from `first` on that records are kept under, committed or not, uint64, ascending.

        A writer asks for those beyond the last commit whenever it opens, so with a large `first` this should be quick.
        """

    # `read` is left as well: see `ValueBackend.read`.

    # --- what follows from that ---

    def append(self, values: Values) -> Locators:
        """Keep records under the next numbers (see `ValueBackend.append`)."""
        numbers = np.arange(self.next, self.next + len(values), dtype=np.uint64)
        self.write(numbers, values)
        self.next += len(values)
        self.kept += len(values)
        return numbers

    def sync(self) -> None:
        """Make what was written as durable as the store promises."""

    def state(self) -> bytes:
        """Return the next number, and how many records are kept."""
        return _STATE.pack(self.next, self.kept)

    def restore(self, state: bytes) -> None:
        """Go back to a committed state: erase what no commit knows."""
        self.refresh(state)
        left = self.numbers(self.next)
        if len(left):
            self.erase(left)

    def refresh(self, state: bytes) -> bool:
        """Take note of a committed state (see `ValueBackend.refresh`)."""
        if not state:  # nothing was put yet
            self.next = self.kept = 0
            return False
        if len(state) < _STATE.size:
            raise self.damaged(f"{len(state)} bytes")
        self.next, self.kept = _STATE.unpack_from(state)
        if not self.kept <= self.next <= _MOST:
            raise self.damaged(f"{self.kept} records kept, next number {self.next}")
        return False

    def damaged(self, why: str) -> CorruptionError:
        """Return the error of a committed state that cannot be."""
        return CorruptionError(
            f"the state of the records in {self.path} is damaged: {why}; restore the store from a copy"
        )

    def victims(self, locators: Locators) -> list[Victim]:
        """Return the dead records, some thousands at a time; nothing that lives has to move."""
        kept = self.numbers(0)
        kept = kept[kept < self.next]
        self.kept = len(kept)
        dead = np.setdiff1d(kept, locators, assume_unique=True)
        self._dead = [dead[start : start + _GROUP] for start in range(0, len(dead), _GROUP)]
        return [Victim(token, np.zeros(0, np.intp)) for token in range(len(self._dead))]

    def rewrite(self, token: int, locators: Locators) -> Locators:
        """Count a group of dead records out."""
        self.kept -= len(self._dead[token])
        return locators

    def discard(self, token: int) -> None:
        """Erase a group of dead records."""
        self.erase(self._dead[token])

    def usage(self) -> Usage:
        """Return the bytes of all records kept, as if nothing were compressed, rounded or added."""
        return Usage(self.kept * self.spec.nbytes, place=str(self.path))

    def close(self) -> None:
        """Let go of every resource."""
