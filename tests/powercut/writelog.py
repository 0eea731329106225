"""The log that dm-log-writes keeps of a device, read back: what was durable, in which order, at which moment.

The target logs a write only when a FLUSH that covers it (or the write itself, with FUA) was completed, and a mark when
it is told to. So the entries up to a place in the log are just what a device that loses its cache has at that
moment. Its format (drivers/md/dm-log-writes.c): a sector with magic number, version, number of entries and size of a
sector; then each entry, a sector of four numbers and, where it is a mark, its text, followed by the data written.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

FLUSH, FUA, DISCARD, MARKED = 1, 2, 4, 8
MAGIC, VERSION = 0x6A736677736872, 1
_SUPER, _ENTRY = struct.Struct("<QQQI"), struct.Struct("<QQQQ")


@dataclass(frozen=True)
class Entry:
    """One entry: where `nbytes` were written on the device, and where they lie in the log."""

    at: int
    nbytes: int
    flags: int
    place: int
    mark: str

    @property
    def durable(self) -> bool:
        """Whether what comes before it, or it itself, was durable when it was logged."""
        return bool(self.flags & (FLUSH | FUA | MARKED))


def entries(log: int) -> list[Entry]:
    """Return what the log (a descriptor) holds.

    Raises
    ------
    ValueError
        If it is none.
    """
    magic, version, n, sector = _SUPER.unpack(os.pread(log, _SUPER.size, 0))
    if magic != MAGIC or version != VERSION or sector not in (512, 1024, 2048, 4096):
        raise ValueError(f"no log of dm-log-writes: magic {magic:#x}, version {version}, sectors of {sector} bytes")
    found: list[Entry] = []
    place = sector
    for _ in range(n):
        head = os.pread(log, sector, place)
        start, sectors, flags, length = _ENTRY.unpack_from(head)
        mark = head[_ENTRY.size : _ENTRY.size + length].decode() if flags & MARKED else ""
        place += sector
        found.append(Entry(start * sector, sectors * sector, flags, place, mark))
        # Of what was discarded nothing follows.
        place += 0 if flags & DISCARD else sectors * sector
    return found


def apply(log: int, entry: Entry, device: int, arrived: np.ndarray | None = None) -> None:
    """Write an entry's data to a device; with `arrived`, only those of so many equal parts for which it is True."""
    if not entry.nbytes:
        return
    data = bytes(entry.nbytes) if entry.flags & DISCARD else os.pread(log, entry.nbytes, entry.place)
    if len(data) != entry.nbytes:
        raise ValueError(f"the log ends within the entry at {entry.place}")
    if arrived is not None:
        both = (np.frombuffer(part, np.uint8) for part in (data, os.pread(device, entry.nbytes, entry.at)))
        new, old = (part.reshape(len(arrived), -1) for part in both)
        data = np.where(arrived[:, None], new, old).tobytes()
    done = 0
    while done < len(data):
        done += os.pwrite(device, data[done:], entry.at + done)


@dataclass(frozen=True)
class Point:
    """A moment at which the power may go: after entry `last`; `marks` were told before, `unflushed` is on its way."""

    last: int
    marks: tuple[str, ...]
    unflushed: tuple[int, ...]


def points(log: list[Entry], begin: str) -> Iterator[Point]:
    """Yield every moment after the mark `begin` at which the durable contents, or what was acknowledged, changed.

    A mark that follows at once is waited for: the contents are the same, and more is asked of them.
    """
    marks: list[str] = []
    begun = changed = False
    for i, entry in enumerate(log):
        begun = begun or entry.mark == begin
        if entry.flags & MARKED:
            marks.append(entry.mark)
        changed = changed or entry.nbytes > 0 or bool(entry.flags & MARKED)
        last = i + 1 == len(log)
        if not (begun and changed and entry.durable) or (not last and log[i + 1].flags & MARKED):
            continue
        after = i + 1
        while after < len(log) and not log[after].durable:
            after += 1
        yield Point(i, tuple(marks), tuple(range(i + 1, after)))
        changed = False
