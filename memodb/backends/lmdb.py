"""Records as values of an LMDB environment of their own, which anybody's LMDB client can read."""

from __future__ import annotations

import os
import shutil
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from memodb import vm
from memodb.backends.base import Locators, Usage, Values, Victim, require_options, take_options
from memodb.backends.keyed import KeyedBackend
from memodb.environment import Environment, Kind
from memodb.errors import ClosedError, CorruptionError, InvalidOptionError, MemoDBError, StoreFullError, UnsafePathError
from memodb.record import RecordSpec
from memodb.threads import CREW

if TYPE_CHECKING:
    import lmdb

Bytes1D = np.ndarray[Any, np.dtype[np.uint8]]

_key = struct.Struct(">Q").pack
_GENERATION, _KEY_BYTES = struct.Struct("<Q"), 8
#: LMDB keeps what a transaction writes in memory until it commits: so many bytes of records, and so many records.
_TRANSACTION, _RECORDS = 64 << 20, 1 << 16
#: What each of several threads copies at a time, and from how many bytes on a second one is worth waking.
_PIECE, _SHARED = 512 << 10, 1 << 20
#: An LMDB value is shorter than this.
_MOST = 1 << 32
#: Of a page: its header, and a record's key and header in a leaf. Longer records have pages of their own.
_PAGE_HEADER, _NODE, _INLINE = 16, 18, (vm.PAGE - 16) // 2 - 2
#: Records of so many bytes span enough pages for a disk to read ahead.
_READ_AHEAD = 16 << 10


#: name -> (default, test, what is expected), for `take_options`
_OPTIONS: dict[str, tuple[Any, Callable[[Any], bool], str]] = {
    "map_bytes": (1 << 30, lambda v: type(v) is int and 1 << 16 <= v <= 1 << 46, "an int, 2**16 to 2**46 (bytes)"),
    "durability": ("full", lambda v: v in ("full", "relaxed", "none"), '"full", "relaxed" or "none"'),
}


class LmdbBackend(KeyedBackend):
    """One LMDB environment: key = number of the record (8 bytes, big-endian), value = its bytes.

    For stores that other programs read as well, and for small records. Batches are copied, never mapped. A record
    longer than half a page takes whole pages, its 16-byte header included: one of exactly 4096 bytes takes two.

    ``values/00000001/data.mdb`` is the environment. It never shrinks by itself, so compaction copies what lives into
    the next one (``values/00000002``) and removes the first. Where there is no room for that, it erases what is dead,
    and later puts use the pages that came free whole: then the file system gets nothing back until what lives fits its
    room, or nothing lives.

    Options (of ``MemoDB.create``)
    ------------------------------
    map_bytes : int
        Address space to map at first (default 1 GiB, or four times the file where that is more). It grows by itself,
        and takes no memory.
    durability : {"full", "relaxed", "none"}
        "full" (default): a put that returned survives a power cut on a disk file system.
        "relaxed": LMDB syncs its pages, but not the one that names the newest (``metasync=False``): a power cut may
        undo the last put, and `verify` names the records that are gone then.
        "none": nothing is synced (``sync=False``): a power cut may damage the environment as a whole. For stores that
        can be made again.
    """

    name: ClassVar[str] = "lmdb"
    abilities: ClassVar[Mapping[str, bool]] = {"maps": False, "durable": True, "remote": False, "compresses": False}

    def __init__(self, path: Path, spec: RecordSpec, options: Mapping[str, Any], *, writable: bool) -> None:
        super().__init__(path, spec, options, writable=writable)
        require_options(options, {name: good for name, (_, good, _) in _OPTIONS.items()})
        self._generation = 1
        self._kind = Kind(
            noun="the environment of records",
            when_full="delete records and compact()",
            map_bytes=options["map_bytes"],
            # A deletion takes pages for the list of those that it frees.
            spare=(256 << 10) + vm.round_up(spec.nbytes // 64, vm.PAGE),
            spare_inside=True,
            readahead=spec.nbytes >= _READ_AHEAD,
            sync=options["durability"] != "none",
            metasync=options["durability"] == "full",
        )
        self._env: Environment | None = None
        self._closed = False
        self._lock = threading.RLock()
        self._alive = np.zeros(0, np.uint64)
        self._buried = np.zeros(0, np.uint64)

    @classmethod
    def check_options(cls, options: Mapping[str, Any], spec: RecordSpec, *, room: int) -> dict[str, Any]:
        """Return the options to persist, defaults filled in (see `ValueBackend.check_options`)."""
        if spec.nbytes >= _MOST:
            raise InvalidOptionError(
                f"backend {cls.name!r} keeps each record as one LMDB value, which is shorter than {_MOST} bytes (4 "
                f"GiB); a record {spec} has {spec.nbytes}: take backend 'arena', or cut the records"
            )
        return take_options(
            cls.name,
            options,
            _OPTIONS,
        )

    # --- the environment of this generation ---

    def _folder(self, generation: int) -> Path:
        return self.path / f"{generation:08d}"

    def _data(self) -> Path:
        return self._folder(self._generation) / "data.mdb"

    @contextmanager
    def _opened(self, *, create: bool = False) -> Iterator[Environment]:
        """Hold the environment of this generation: it stays open inside, whatever another thread does."""
        with self._lock:
            if self._closed:
                raise ClosedError(f"the database {self.path.parent} is closed; open it again with MemoDB.open")
            if self._env is None:
                self._env = self._acquire(self._generation, create=create)
            env = self._env
            env.hold()
        try:
            yield env
        finally:
            env.release()

    def _acquire(self, generation: int, *, create: bool) -> Environment:
        folder = self._folder(generation)
        new = create and not (folder / "data.mdb").exists()
        env = Environment.acquire(folder, create=create, kind=self._kind)
        if new:
            try:
                vm.sync_directory(folder)
                vm.sync_directory(self.path)
            except BaseException:
                env.release()
                raise
        return env

    def _turn_to(self, generation: int, env: Environment | None = None) -> None:
        with self._lock:
            old, self._env = self._env, env
            self._generation = generation
        if old is not None:
            old.release()

    def _remove_folder(self, folder: Path) -> None:
        gone = folder.with_suffix(".gone")
        shutil.rmtree(gone, ignore_errors=True)
        # Out of sight as a whole: who opens it at this moment must not find one file of it and make the other.
        with suppress(FileNotFoundError):
            folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)

    def _remove_others(self) -> None:
        for folder in self.path.iterdir():
            if folder.suffix == ".gone":
                shutil.rmtree(folder, ignore_errors=True)
            elif folder.name.isdigit() and int(folder.name) != self._generation:
                self._remove_folder(folder)

    # --- writing ---

    def write(self, numbers: Locators, values: Values) -> None:
        """Put each record under its number, some at a time (see `KeyedBackend.write`)."""
        step = max(1, min(_TRANSACTION // self.spec.nbytes, _RECORDS))
        with self._opened(create=True) as env:
            for start in range(0, len(values), step):
                part = np.ascontiguousarray(values[start : start + step])
                rows = part.reshape(len(part), -1).view(np.uint8)
                self._put(env, numbers[start : start + step], list(rows))

    def _put(self, env: Environment, numbers: Locators, values: list[Any]) -> None:
        def put(txn: lmdb.Transaction) -> None:
            for number, value in zip(numbers.tolist(), values, strict=True):
                if not txn.put(_key(number), value, append=True):  # appending fills pages
                    raise CorruptionError(
                        f"{env.path} holds record {number} already, or a later one, which nobody put through memodb; "
                        "restore the store from a copy"
                    )

        env.change(put, more=self._taken(len(values)))

    def _taken(self, n: int) -> int:
        """Return about how many bytes `n` records take in the file."""
        if self.spec.nbytes + _NODE <= _INLINE:
            return n * (self.spec.nbytes + _NODE) + vm.PAGE
        return n * (vm.round_up(self.spec.nbytes + _PAGE_HEADER, vm.PAGE) + _NODE + 8) + vm.PAGE

    def append_bytes(self, n: int) -> int:
        """Return how many more bytes `n` records would take, whole pages and a new file's spare ones included."""
        return self._taken(n) + self._kind.spare // (2 if self._data().exists() else 1)

    def erase(self, numbers: Locators) -> None:
        """Delete records, as many at a time as there is room for: LMDB writes pages before it frees any."""
        if not len(numbers) or not self._data().exists():
            return
        most = max(1, min(_TRANSACTION // self.spec.nbytes, _RECORDS))
        with self._opened() as env:
            start, size = 0, most
            while start < len(numbers):
                group = numbers[start : start + size].tolist()

                def delete(txn: lmdb.Transaction, group: list[int] = group) -> None:
                    for number in group:
                        txn.delete(_key(number))

                try:
                    env.change(delete)
                except StoreFullError:
                    if size == 1:
                        raise
                    size = max(1, size // 4)
                else:
                    start, size = start + size, min(2 * size, most)
            # LMDB uses pages again from the second transaction on after the one that freed them. This is the first.
            env.change(_touch)

    def numbers(self, first: int) -> Locators:
        """Return the numbers from `first` on that there are values of."""
        if not self._data().exists():
            return np.zeros(0, np.uint64)
        with self._opened() as env, env.long_read() as txn:
            cursor = txn.cursor()
            keys = cursor.iternext(keys=True, values=False) if cursor.set_range(_key(first)) else iter(())
            joined = b"".join(key if len(key) == _KEY_BYTES else self._refuse(key) for key in keys)
        return np.frombuffer(joined, ">u8").astype(np.uint64)

    def _refuse(self, key: bytes | memoryview) -> bytes:
        raise CorruptionError(
            f"{self._data()} has a value under {bytes(key)[:40]!r}, which is no record's number; restore the store "
            "from a copy"
        )

    # --- reading ---

    def read(self, locators: Locators, out: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        """Copy records straight from LMDB's pages, on several threads (see `ValueBackend.read`)."""
        try:
            with self._opened() as env, env.long_read() as txn:
                # The transaction ends when all threads are done: only then may LMDB use these pages again.
                _copy([self._record(txn, number) for number in locators.tolist()], out)
        except MemoDBError as error:
            if isinstance(error, UnsafePathError) or self._closed or self._data().exists():
                raise
            # Compaction removed it before this process, a forked one, could open it again.
            raise FileNotFoundError(f"{self._data()} is gone") from None

    def _record(self, txn: lmdb.Transaction, number: int) -> Bytes1D:
        value = txn.get(_key(number))
        if value is None:
            raise FileNotFoundError(f"record {number} is not in {self._data()}")
        if len(value) != self.spec.nbytes:
            raise CorruptionError(
                f"record {number} in {self._data()} has {len(value)} bytes, expected {self.spec.nbytes}; delete what "
                "verify() names, or restore the store from a copy"
            )
        return np.frombuffer(value, np.uint8)

    # --- generations ---

    def state(self) -> bytes:
        """Return what `KeyedBackend` remembers, and the generation."""
        return super().state() + _GENERATION.pack(self._generation)

    def _note(self, state: bytes) -> int:
        """Take note of a committed state and return its generation."""
        known = len(super().state())
        super().refresh(state)
        if not state:
            return 1
        if len(state) != known + _GENERATION.size:
            raise self.damaged(f"{len(state)} bytes, expected {known + _GENERATION.size}")
        return int(_GENERATION.unpack_from(state, known)[0])

    def refresh(self, state: bytes) -> bool:
        """Take note of a committed state; a later generation is opened at the next read."""
        generation = self._note(state)
        with self._lock:
            if generation > self._generation:  # another thread may have read a later state than this one
                self._turn_to(generation)
        return False

    def restore(self, state: bytes) -> None:
        """Go back to a committed state: erase what no commit knows, and remove what compaction left."""
        generation = self._note(state)
        if generation != self._generation:
            self._turn_to(generation)
        self._remove_others()
        if not self.kept:  # nothing of this generation was ever committed: its making may have been cut off
            self._turn_to(generation)
            self._remove_folder(self._folder(generation))
        elif self._data().exists():
            with self._opened() as env:
                env.settle(checks=True)
            self.erase(self.numbers(self.next))
            with self._opened() as env:
                env.trim()

    def victims(self, locators: Locators) -> list[Victim]:
        """Return one victim, the whole environment, if it holds dead records or is mostly unused.

        It has no members: records keep their numbers, so there is nothing for the catalog to write.
        """
        kept = self.numbers(0)
        kept = kept[kept < self.next]
        self.kept = len(kept)
        self._alive = np.sort(locators)
        self._buried = np.setdiff1d(kept, locators, assume_unique=True)
        wanted = len(self._buried) > 0
        if not wanted and self.kept:
            with self._opened() as env:
                wanted = env.unused() > self.bytes_on_store() // 2 and self._has_room()
        return [Victim(self._generation, np.zeros(0, np.intp))] if wanted else []

    def _has_room(self) -> bool:
        """Tell whether what lives fits the file system a second time."""
        if not len(self._alive):
            return True
        there = os.statvfs(self.path)
        return there.f_bavail * there.f_frsize > self._taken(len(self._alive)) + 2 * self._kind.spare

    def rewrite(self, token: int, locators: Locators) -> Locators:
        """Copy what lives into the next generation; without room for that, only count out what is dead."""
        if self._has_room():
            try:
                self._turn_to(token + 1, self._copied(token + 1))
            except StoreFullError:  # somebody else took the room meanwhile
                self._remove_others()
        self.kept = len(self._alive)
        return locators

    def _copied(self, generation: int) -> Environment | None:
        """Return the environment of a new generation, made of what lives; None if nothing does."""
        if not len(self._alive):
            return None
        step = max(1, min(_TRANSACTION // self.spec.nbytes, _RECORDS))
        target = self._acquire(generation, create=True)
        try:
            with self._opened() as source:
                for start in range(0, len(self._alive), step):
                    part = self._alive[start : start + step]
                    with source.long_read() as txn:
                        self._put(target, part, [self._record(txn, number) for number in part.tolist()])
            target.trim()
            target.flush()  # whatever the durability: what it is copied from will be removed
        except BaseException:
            target.release()
            raise
        return target

    def discard(self, token: int) -> None:
        """Remove the generation that was left, or erase what is dead where it was not."""
        if token == self._generation:
            self.erase(self._buried)
            if self._data().exists():
                with self._opened() as env:
                    env.trim()  # the pages that came free are spare enough; the catalog may need the room
        else:
            self._remove_others()
        self._alive = self._buried = np.zeros(0, np.uint64)

    # --- the rest ---

    def after_fork(self) -> None:
        """Take a fresh lock; the environment opens itself again."""
        super().after_fork()
        self._lock = threading.RLock()

    def bytes_on_store(self) -> int:
        """Return the bytes allocated for LMDB's data file."""
        try:
            return self._data().stat().st_blocks * 512
        except FileNotFoundError:
            return 0

    def usage(self) -> Usage:
        """Return the allocated bytes of LMDB's data file, and where it lies."""
        kind = ""
        with suppress(OSError):
            kind = vm.filesystem(self.path).kind
        return Usage(self.bytes_on_store(), filesystem=kind, place=os.fspath(self.path))

    def close(self) -> None:
        """Let the environment go."""
        self._closed = True
        self._turn_to(self._generation)


def _touch(txn: lmdb.Transaction) -> None:
    """Change nothing, so that something is committed nevertheless."""
    last = _key((1 << 64) - 1)
    txn.put(last, b"")
    txn.delete(last)


def _copy(records: list[Bytes1D], out: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
    """Copy `records` into the rows of `out`, uint8 [n, nbytes], in pieces that several threads share."""
    n, nbytes = out.shape
    step, parts = max(1, _PIECE // nbytes), -(-nbytes // _PIECE)

    def copy_several(i: int) -> None:
        for j in range(i * step, min((i + 1) * step, n)):
            out[j] = records[j]

    def copy_part(i: int) -> None:
        j, k = divmod(i, parts)
        out[j, k * _PIECE : (k + 1) * _PIECE] = records[j][k * _PIECE : (k + 1) * _PIECE]

    if n * nbytes < _SHARED:
        for row, record in zip(out, records, strict=True):
            row[:] = record
    elif parts == 1:
        CREW.share(copy_several, -(-n // step))
    else:
        CREW.share(copy_part, n * parts)
