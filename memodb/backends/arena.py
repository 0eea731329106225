"""The default backend: records side by side in large segment files.

A locator is ``segment number << 32 | slot``; slot s of a segment is its bytes ``[s * nbytes, (s + 1) * nbytes)``. So
records that are multiples of the page size can be mapped side by side, and multiples of 2 MiB keep their huge pages.
Segments only grow; a number is never used again, which is why a reader may keep a segment open whatever the writer
does.
"""

from __future__ import annotations

import contextlib
import math
import os
import struct
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from memodb import vm
from memodb.backends import dax
from memodb.backends.base import Locators, Usage, ValueBackend, Values, Victim, require_options, take_options
from memodb.backends.pages import note
from memodb.backends.place import Place, is_writable_directory, own_directory, require_outside
from memodb.backends.segment import SegmentFile
from memodb.errors import CorruptionError
from memodb.extents import Extents
from memodb.record import RecordSpec
from memodb.safe import Guard

_ENTRY = np.dtype([("number", "<u4"), ("sealed", "<u4"), ("used", "<u8"), ("allocated", "<u8"), ("huge", "<u8")])
_SLOT_BITS = np.uint64(32)
_SLOT_MASK = np.uint64(0xFFFFFFFF)
_SUFFIX = ".seg"
#: The state begins with the number that the next segment gets.
_NEXT = struct.Struct("<Q")
#: Segments that `usage` looks at where pages are measured.
_LOOKED_AT = 8


def _segment_bytes(spec: RecordSpec, room: int) -> int:
    """Return the default of the option: whole huge pages, unless the store is so small that those would waste it."""
    wanted = max(min(room // 32, 1 << 30), room // 256)
    wanted = vm.round_up(wanted, vm.HUGE) if wanted >= vm.HUGE else max(wanted // vm.PAGE * vm.PAGE, vm.PAGE)
    return min(max(wanted, spec.nbytes), 1 << 40)


#: What the options can be; `segments_path` is looked at when it is used.
_OPTIONS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "segment_bytes": (lambda v: type(v) is int and 4096 <= v <= 1 << 40, "an int, 4096 to 2**40 (bytes)"),
    "durability": (lambda v: v in ("full", "relaxed"), '"full" or "relaxed"'),
    "huge_pages": (lambda v: isinstance(v, bool), "True or False"),
}
#: Compaction: bytes of a run that is worth an append of its own, and how many bytes of shorter ones make one.
_LONG_RUN, _TOGETHER = 4 << 20, 32 << 20
#: Up to so many records Python sorts out segments sooner than numpy, whose code and tables are cold in a busy program.
_FEW = 256


class ArenaBackend(ValueBackend):
    """Segment files in one directory, on any file system.

    Options (of ``MemoDB.create``)
    ------------------------------
    segment_bytes : int
        Size that a segment grows to; at least one record. Compaction works on one segment at a time and needs room for
        what lives in it. Default: a 32nd of the room that the store has, 1 GiB at most; beyond 256 GiB of room, a
        256th of it, so that a large store needs no more than a few hundred descriptors.
    durability : {"full", "relaxed"}
        "full" (default): a put that returned survives a power cut on a disk file system (fdatasync before the commit).
        "relaxed": record bytes reach the disk when the kernel likes; after a power cut `verify` names the records that
        did not.
    huge_pages : bool
        Ask for huge pages (default True).
    segments_path : str
        An existing directory, on any file system (hugetlbfs, a tmpfs, DAX), to keep the segments in, instead of in the
        store's own directory. The store makes a directory of its own in there, and what is persisted is the path of
        that one. It stays there when the store is moved, and is left behind when the store's directory is deleted.
    """

    name: ClassVar[str] = "arena"
    abilities: ClassVar[Mapping[str, bool]] = {"maps": True, "durable": True, "remote": False, "compresses": False}

    def __init__(self, path: Path, spec: RecordSpec, options: Mapping[str, Any], *, writable: bool) -> None:
        super().__init__(path, spec, options, writable=writable)
        require_options(options, {name: good for name, (good, _) in _OPTIONS.items()})
        self._slots = min(max(options["segment_bytes"] // spec.nbytes, 1), int(_SLOT_MASK))
        self._table = np.zeros(0, _ENTRY)
        self._next = 1
        self._open: dict[int, SegmentFile] = {}
        self._unsynced: set[int] = set()
        self._directory_unsynced = False
        self._lock = threading.RLock()
        if writable:
            Guard.of(path.parent).make_directory(path)
        self._place = Place(path, options.get("segments_path"))
        self._system = self._place.system
        self._unit = max(vm.HUGE, self._system.page)
        self._full = vm.round_up(self._slots * spec.nbytes, self._system.page)
        self._capacity = vm.round_up(self._full, self._unit)
        # tmpfs: what a put gained is in the table. What it did not ask for (a mount with huge=always), and what a page
        # cache holds, is measured; not for records that cannot be mapped whatever their pages are.
        self._measures = not (self._system.in_memory and options["huge_pages"]) and self._system.kind != "hugetlbfs"
        # What is read from a disk in folios of 2 MiB can be mapped as huge pages from then on. For smaller records the
        # disk would read several times what was asked for.
        self._prefers_huge = options["huge_pages"] and not self._system.in_memory and spec.nbytes >= vm.HUGE
        self._looks = self._measures and spec.nbytes % vm.PAGE == 0

    @classmethod
    def check_options(cls, options: Mapping[str, Any], spec: RecordSpec, *, room: int) -> dict[str, Any]:
        """Return the options to persist, defaults filled in (see `ValueBackend.check_options`)."""
        taken = take_options(
            cls.name,
            options,
            {
                "segment_bytes": (_segment_bytes(spec, room), *_OPTIONS["segment_bytes"]),
                "durability": ("full", *_OPTIONS["durability"]),
                "huge_pages": (True, *_OPTIONS["huge_pages"]),
                "segments_path": (
                    None,
                    lambda v: v is None or is_writable_directory(v),
                    "the path of an existing directory that can be written",
                ),
            },
        )
        if taken["segments_path"] is not None:
            taken["segments_path"] = own_directory(taken["segments_path"])
        return taken

    # --- writing ---

    def begin(self) -> None:
        """See that segments elsewhere lie in no store, and can be made there."""
        if self.options["segments_path"] is None:
            return
        require_outside(self._place.directory, self.path.parent, "segments_path")
        self._place.make()
        self._place.directory.rmdir()  # it comes with the first segment: a store without records leaves nothing

    def append(self, values: Values) -> Locators:
        """Write records behind the last one, into as many segments as they need (see `ValueBackend.append`)."""
        locators = np.empty(len(values), np.uint64)
        done = 0
        while done < len(values):
            entry = self._tail()
            segment = self._segment(int(entry["number"]))
            used = int(entry["used"])
            n = min(len(values) - done, self._slots - used)
            allocated, gained = segment.write(
                used * self.spec.nbytes, values[done : done + n], int(entry["allocated"]), self._full
            )
            locators[done : done + n] = (np.uint64(entry["number"]) << _SLOT_BITS) + np.arange(
                used, used + n, dtype=np.uint64
            )
            entry["used"], entry["allocated"], entry["huge"] = used + n, allocated, int(entry["huge"]) + gained
            self._unsynced.add(int(entry["number"]))
            done += n
        self._flag_huge()
        return locators

    def append_bytes(self, n: int) -> int:
        """Return how many bytes `n` more records would allocate, rounding to huge pages included."""
        room = free = allocated = 0
        if len(self._table) and not self._table[-1]["sealed"]:
            last = self._table[-1]
            allocated = int(last["allocated"])
            room = self._slots - int(last["used"])
            free = allocated - int(last["used"]) * self.spec.nbytes
        if n <= room:
            return self._allocation(n * self.spec.nbytes - free, allocated)
        full, rest = divmod(n - room, int(self._slots))
        tail = self._allocation(room * self.spec.nbytes - free, allocated)
        return tail + full * self._full + self._allocation(rest * self.spec.nbytes, 0)

    def _allocation(self, wanted: int, allocated: int) -> int:
        """Return by how much a segment of `allocated` bytes grows to hold `wanted` more."""
        return max(0, min(vm.round_up(wanted, self._unit), int(self._full) - allocated))

    def _tail(self) -> Any:
        if len(self._table) and self._table[-1]["used"] < self._slots and not self._table[-1]["sealed"]:
            return self._table[-1]
        number = self._next
        self._place.make()
        self._open[number] = self._segment_file(number, create=True)
        self._next += 1
        self._directory_unsynced = True
        self._table = np.concatenate([self._table, np.array([(number, 0, 0, 0, 0)], _ENTRY)])
        return self._table[-1]

    def _segment_file(self, number: int, *, create: bool = False) -> SegmentFile:
        return SegmentFile(
            self._file(number),
            self._system,
            self._capacity,
            huge=self.options["huge_pages"],
            prefer_huge=self._prefers_huge,
            create=create,
            writable=self.writable,
        )

    def sync(self) -> None:
        """Flush what was appended, and the directory of a new segment (tmpfs and durability "relaxed": nothing)."""
        if self.options["durability"] == "full" and not self._system.in_memory:
            for number in self._unsynced:
                self._segment(number).sync()
            if self._directory_unsynced:
                self._place.sync()
        self._unsynced.clear()
        self._directory_unsynced = False

    def state(self) -> bytes:
        """Return the table of segments."""
        return _NEXT.pack(self._next) + self._table.tobytes()

    def restore(self, state: bytes) -> None:
        """Go back to the committed table of segments: cut leftovers off, remove segments that no commit knows."""
        self._parse(state)
        known = {int(n): int(a) for n, a in zip(self._table["number"], self._table["allocated"], strict=True)}
        for file in self._place.directory.glob(f"*{_SUFFIX}"):
            if not (file.stem.isdigit() and int(file.stem) in known):
                file.unlink(missing_ok=True)
        with self._lock:
            for number in [n for n in self._open if n not in known]:
                del self._open[number]
        if len(self._table):  # only the last segment is ever appended to
            tail = int(self._table[-1]["number"])
            try:
                whole = self._segment(tail).truncate(known[tail])
            except (CorruptionError, FileNotFoundError):  # verify() and reads say so; the store must open for that
                whole = False
            if not whole:  # what is put next goes elsewhere
                self._table[-1]["sealed"] = 1
        self._unsynced.clear()

    def refresh(self, state: bytes) -> bool:
        """Drop segments that compaction removed, so that their memory can go back to the system."""
        with self._lock:
            self._parse(state)
            known = set(self._table["number"].tolist())
            gone = [number for number in self._open if number not in known]
            for number in gone:
                del self._open[number]
            return bool(gone)

    def _parse(self, state: bytes) -> None:
        if not state:  # a store that nothing was put into yet
            state = _NEXT.pack(1)
        if len(state) > _NEXT.size:
            self._place.require()
        if len(state) < _NEXT.size or (len(state) - _NEXT.size) % _ENTRY.itemsize:
            raise self._damaged(f"it has {len(state)} bytes")
        self._next = _NEXT.unpack_from(state)[0]
        self._table = np.frombuffer(state, _ENTRY, offset=_NEXT.size).copy()
        for number, sealed, used, allocated, huge in self._table.tolist():
            if not (sealed <= 1 and used <= self._slots and used * self.spec.nbytes <= allocated <= self._full):
                raise self._damaged(f"segment {number} of {used} records in {allocated} bytes cannot be")
            if huge > allocated or not 0 < number < self._next:
                raise self._damaged(f"segment {number} with {huge} of {allocated} bytes on huge pages cannot be")
        if self._next > 1 << 32 or len(np.unique(self._table["number"])) < len(self._table):
            raise self._damaged("it names a segment twice, or numbers that there are not")
        self._flag_huge()

    def _damaged(self, why: str) -> CorruptionError:
        return CorruptionError(f"the table of segments of {self.path} is damaged: {why}; restore the store from a copy")

    def _flag_huge(self) -> None:
        if self._measures:
            return
        for entry in self._table:
            segment = self._open.get(int(entry["number"]))
            if segment is not None and entry["allocated"]:
                segment.huge_share = int(entry["huge"]) / int(entry["allocated"])

    # --- reading ---

    def _file(self, number: int) -> Path:
        return self._place.directory / f"{number:08d}{_SUFFIX}"

    def _segment(self, number: int) -> SegmentFile:
        with self._lock:
            segment = self._open.get(number)
            if segment is None:
                segment = self._segment_file(number)
                self._open[number] = segment
                self._flag_huge()
            return segment

    def extents(self, locators: Locators) -> Extents:
        """Return where the records lie (see `SupportsExtents.extents`)."""
        if len(locators) == 0:
            return Extents([], np.zeros(0, np.int64), np.zeros(0, np.int64))
        first, last = int(locators.min()), int(locators.max())
        number = first >> 32
        if number == last >> 32:  # one segment, as of most small stores: worth a short way
            segment = self._ready(number)
            segment.require(((last & 0xFFFFFFFF) + 1) * self.spec.nbytes)
            return Extents.in_one(segment, (locators - np.uint64(number << 32)).view(np.int64), self.spec.nbytes)
        slots = locators & _SLOT_MASK
        if int(slots.max()) >= self._slots:  # its place would not even fit a number
            raise CorruptionError(
                f"a record of {self.path} shall lie in place {int(slots.max())} of a segment, which has {self._slots}; "
                "restore the store from a copy"
            )
        offsets = slots.view(np.int64) * self.spec.nbytes
        if len(locators) <= _FEW:
            numbers = (locators >> _SLOT_BITS).tolist()
            places = {number: i for i, number in enumerate(dict.fromkeys(numbers))}
            inverse = np.fromiter(map(places.__getitem__, numbers), np.int64, len(numbers))
            distinct = list(places)
        else:
            found, inverse = np.unique(locators >> _SLOT_BITS, return_inverse=True)
            distinct = found.tolist()
        # Whoever copies asks each segment for the bytes it needs; a mapping finds out by itself.
        return Extents([self._ready(number) for number in distinct], inverse, offsets, even=True)

    def _ready(self, number: int) -> SegmentFile:
        """Return an open segment that knows its pages."""
        segment = self._open.get(number) or self._segment(number)
        if self._looks and segment.must_look():
            segment.look(self._written(number))
        return segment

    # --- compaction ---

    def victims(self, locators: Locators) -> list[Victim]:
        """Return the segments that hold a dead record, and seal the last one if it is among them."""
        numbers = (locators >> _SLOT_BITS).astype(np.int64)
        found = []
        for entry in self._table:
            members = np.flatnonzero(numbers == int(entry["number"]))
            if len(members) < entry["used"]:
                entry["sealed"] = 1
                found.append(Victim(int(entry["number"]), members))
        # The emptiest first: on a full file system each makes room for the next.
        return sorted(found, key=lambda victim: len(victim.members))

    def rewrite(self, token: int, locators: Locators) -> Locators:
        """Append a segment's live records to the unsealed end (see `ValueBackend.rewrite`)."""
        moved = np.empty(0, np.uint64)
        if len(locators):
            slots = (locators & _SLOT_MASK).astype(np.int64)
            segment = self._segment(token)
            bounds = np.flatnonzero(np.diff(slots) != 1) + 1
            step = max(1, _TOGETHER // self.spec.nbytes)
            if not segment.touchable or len(slots) * self.spec.nbytes < _LONG_RUN * (len(bounds) + 1):
                # Short runs are brought together first: an append costs as much as many of them.
                moved = np.concatenate(
                    [self._moved(segment, slots[start : start + step]) for start in range(0, len(slots), step)]
                )
            else:
                records = segment.view((int(slots.max()) + 1) * self.spec.nbytes).reshape(-1, self.spec.nbytes)
                moved = np.concatenate([self.append(records[run[0] : run[-1] + 1]) for run in np.split(slots, bounds)])
        self._table = self._table[self._table["number"] != token]
        return moved

    def _moved(self, segment: SegmentFile, slots: np.ndarray[Any, np.dtype[np.int64]]) -> Locators:
        """Append the records of some slots again, read as a gather reads them: a disk that fails is an error."""
        nbytes = self.spec.nbytes
        if segment.touchable:
            return self.append(segment.view((int(slots.max()) + 1) * nbytes).reshape(-1, nbytes)[slots])
        records = np.empty((len(slots), nbytes), np.uint8)
        for run in np.split(np.arange(len(slots)), np.flatnonzero(np.diff(slots) != 1) + 1):
            segment.read_into(int(slots[run[0]]) * nbytes, records[run[0] : run[-1] + 1].reshape(-1))
        return self.append(records)

    def discard(self, token: int) -> None:
        """Unlink an emptied segment; batches that map it keep its memory until they die."""
        with self._lock:  # or a gather that looked before the commit would open it again in between
            self._file(token).unlink(missing_ok=True)
            self._open.pop(token, None)

    def after_fork(self) -> None:
        """Take a fresh lock."""
        super().after_fork()
        self._lock = threading.RLock()

    def _written(self, number: int) -> int:
        return int(self._table["used"][self._table["number"] == number].sum()) * self.spec.nbytes

    def bytes_on_store(self) -> int:
        """Return allocated bytes."""
        return int(self._table["allocated"].sum())

    def usage(self) -> Usage:
        """Return allocated and huge bytes, where they lie, and why pages are small where they are."""
        allocated, huge = self.bytes_on_store(), float(self._table["huge"].sum())
        share, on_dax = huge / allocated if allocated else 0.0, None
        if self._measures and allocated:
            share, on_dax = self._measured()
            huge = 0.0 if math.isnan(share) else share * allocated
        why = note(
            self._system,
            share,
            wanted=self.options["huge_pages"],
            dax=on_dax is not None,
            nbytes=int(self._table["used"].sum()) * self.spec.nbytes,
        )
        kind, place = self._system.kind, os.fspath(self._place.directory)
        if on_dax is None:
            return Usage(allocated, round(huge), why, filesystem=kind, place=place)
        flush = "fdatasync" if self.options["durability"] == "full" else ""
        told = dax.report(place, synchronous=on_dax.synchronous, flush=flush)
        return Usage(allocated, round(huge), why, filesystem=f"{kind}, DAX", place=place, dax=told)

    def _measured(self) -> tuple[float, SegmentFile | None]:
        """Return what share of the segments lies on huge pages, from a few of them, and one that is on DAX."""
        numbers = self._table["number"].tolist()
        shares, weights = [], []
        on_dax: SegmentFile | None = None
        for number in numbers[:: -(-len(numbers) // _LOOKED_AT)]:
            with contextlib.suppress(OSError):  # reads and verify() tell of a missing segment
                segment, written = self._segment(number), self._written(number)
                segment.require(written)
                segment.look(written)
                on_dax = segment if segment.dax else on_dax
                if not math.isnan(segment.known_share):
                    shares.append(segment.known_share)
                    weights.append(max(written, 1))
        return (float(np.average(shares, weights=weights)) if shares else math.nan), on_dax

    def remove(self) -> None:
        """Remove the segments, wherever they lie."""
        super().remove()
        self._place.remove()

    def close(self) -> None:
        """Forget the segments; those that batches hold stay open until they die."""
        with self._lock:
            self._open.clear()
