"""One file a record: the layout of the AttMemo paper (section 5.3), on tmpfs, a disk or DAX.

Record n is the file ``n >> 20 / n >> 10 & 1023 / n & 1023`` of the store's values, in hexadecimal: its bytes and
nothing else. So any program can read one, link it, or sync it elsewhere, and no directory holds more than 1,024 of
them.
"""

from __future__ import annotations

import errno
import math
import os
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, overload

import numpy as np

from memodb import vm
from memodb.backends import dax
from memodb.backends.base import Locators, Usage, Values, require_options, take_options
from memodb.backends.descriptors import DESCRIPTORS, OpenFile
from memodb.backends.file_io import FULL, write_all
from memodb.backends.keyed import KeyedBackend
from memodb.backends.pages import LOOK_AGAIN, LOOK_AGAIN_SOON, measured_share, note
from memodb.backends.writer import FileWriter
from memodb.errors import MemoDBError, StoreAccessError, StoreFullError
from memodb.extents import Extents
from memodb.record import RecordSpec
from memodb.safe import Guard
from memodb.threads import CREW, MOST

_BITS = 10
_LEAF = (1 << _BITS) - 1
#: name -> (default, test, what is expected), for `take_options`
_OPTIONS: dict[str, tuple[Any, Callable[[Any], bool], str]] = {
    "durability": ("full", lambda v: v in ("full", "relaxed"), '"full" or "relaxed"'),
    "huge_pages": (True, lambda v: isinstance(v, bool), "True or False"),
}
#: Bytes on huge pages and groups erased, behind what every keyed backend remembers.
_MORE = struct.Struct("<QQ")
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EMFILE, errno.ENFILE}
#: Files that are looked at where pages are measured.
_LOOKED_AT = 4


class FilesBackend(KeyedBackend):
    """One file a record.

    Options (of ``MemoDB.create``)
    ------------------------------
    durability : {"full", "relaxed"}
        "full" (default): a put that returned survives a power cut on a disk file system; one syncfs(2) a put, which
        also flushes what others have written there. "relaxed": files reach the disk when the kernel likes; after a
        power cut `verify` names the records that did not.
    huge_pages : bool
        Ask for huge pages (default True): for records of 2 MiB and more, on tmpfs.
    """

    name: ClassVar[str] = "files"
    abilities: ClassVar[Mapping[str, bool]] = {"maps": True, "durable": True, "remote": False, "compresses": False}

    def __init__(self, path: Path, spec: RecordSpec, options: Mapping[str, Any], *, writable: bool) -> None:
        super().__init__(path, spec, options, writable=writable)
        require_options(options, {name: good for name, (_, good, _) in _OPTIONS.items()})
        self._system = vm.filesystem(path)
        self._root = os.fspath(path)
        self._guard = Guard.of(path)
        #: Directories of records that were looked at: nobody can exchange them who may not write them.
        self._leaves: set[int] = set()
        # Before anything is written: see `vm.sync_filesystem`.
        self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC) if writable else -1
        self._owner = DESCRIPTORS.owner()
        self._huge = 0
        self._erased = 0
        self._medium = _Medium()
        self._look_at = 0.0
        self._wants_huge = bool(options["huge_pages"]) and spec.nbytes >= vm.HUGE
        # As in the arena: tmpfs tells when a file is written, all others are measured when they are read.
        self._measures = spec.nbytes >= vm.HUGE and not (self._system.in_memory and self._wants_huge)

    @classmethod
    def check_options(cls, options: Mapping[str, Any], spec: RecordSpec, *, room: int) -> dict[str, Any]:
        """Return the options to persist, defaults filled in (see `ValueBackend.check_options`)."""
        return take_options(
            cls.name,
            options,
            _OPTIONS,
        )

    def _folder(self, leaf: int) -> str:
        return f"{self._root}/{leaf >> _BITS:06x}/{leaf & _LEAF:03x}"

    def _file(self, number: int) -> str:
        return f"{self._root}/{number >> 2 * _BITS:06x}/{number >> _BITS & _LEAF:03x}/{number & _LEAF:03x}"

    def _checked_file(self, number: int) -> str:
        """Return the path of a record whose directories are the store's: no link leads out of it."""
        leaf = number >> _BITS
        if leaf not in self._leaves:
            folder = self._folder(leaf)
            self._guard.directory(os.path.dirname(folder))
            self._guard.directory(folder)
            self._leaves.add(leaf)
        return self._file(number)

    # --- writing ---

    def write(self, numbers: Locators, values: Values) -> None:
        """Write one file a record, several at a time (see `KeyedBackend.write`)."""
        files = [self._file(number) for number in numbers.tolist()]
        gained = [0] * len(files)

        def work(i: int) -> None:
            gained[i] = self._write_file(files[i], np.ascontiguousarray(values[i]).reshape(-1).view(np.uint8))

        try:
            for leaf in range(int(numbers[0]) >> _BITS, (int(numbers[-1]) >> _BITS) + 1):
                folder = self._folder(leaf)
                self._guard.make_directory(os.path.dirname(folder))
                self._guard.make_directory(folder)
            CREW.share(work, len(files), MOST if values.nbytes >= vm.HUGE or len(files) > 16 else 1)
        except MemoDBError:
            raise
        except OSError as error:
            if error.errno in _REFUSED:
                raise StoreAccessError(
                    f"{error.filename or self.path} cannot be made: {error.strerror}; nothing was stored: ask the "
                    "store's owner for access, or raise the limit of open files (ulimit -n)"
                ) from error
            if error.errno not in FULL:
                raise
            raise StoreFullError(
                f"no room for {len(files)} more files of {self.spec.nbytes} bytes in {self.path}: {error.strerror}; "
                "nothing was stored; free space or inodes (df -i) there, delete and compact(), or move the store"
            ) from error
        self._huge += sum(gained)
        self._medium.huge_share = self._share_put(self.kept + len(files))

    def _write_file(self, file: str, data: np.ndarray[Any, np.dtype[np.uint8]]) -> int:
        """Write a new file; return how many bytes of it lie on huge pages."""
        fd = self._create(file)
        try:
            if data.size >= vm.HUGE and (self._system.in_memory or self._is_dax(fd)):
                whole = vm.round_up(data.size, vm.PAGE)
                writer = FileWriter(fd, self._system, huge=self._wants_huge, dax=not self._system.in_memory)
                gained = writer.write(0, data, 0, whole)
                if whole > data.size:
                    os.ftruncate(fd, data.size)
                return gained
            write_all(fd, 0, data)
            return 0
        finally:
            os.close(fd)

    def _create(self, file: str) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
        try:
            return self._guard.open(file, flags)
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
        DESCRIPTORS.clear()
        return self._guard.open(file, flags)

    def _is_dax(self, fd: int) -> bool:
        return not self._system.in_memory and vm.is_dax(fd)

    def sync(self) -> None:
        """Flush what was written, files and directories, in one syncfs(2) (tmpfs and "relaxed": nothing)."""
        if self.options["durability"] == "full" and not self._system.in_memory:
            try:
                vm.sync_filesystem(self._fd)
            except OSError as error:
                if error.errno not in FULL:
                    raise
                raise StoreFullError(
                    f"no room for what was put into {self.path}, as its flush says ({error.strerror}); nothing was "
                    "stored; free space there"
                ) from error

    def append_bytes(self, n: int) -> int:
        """Return the bytes of `n` more files, rounded to pages."""
        return n * vm.round_up(self.spec.nbytes, vm.PAGE)

    def state(self) -> bytes:
        """Return what every keyed backend remembers, how many bytes lie on huge pages, how often files were erased."""
        return super().state() + _MORE.pack(self._huge, self._erased)

    def refresh(self, state: bytes) -> bool:
        """Take note of a committed state, and let go of files that may have been unlinked since the last one."""
        super().refresh(state)
        before, own = self._erased, len(super().state())
        if state and len(state) != own + _MORE.size:
            raise self.damaged(f"{len(state)} bytes, expected {own + _MORE.size}")
        self._huge, self._erased = _MORE.unpack_from(state, own) if state else (0, 0)
        if not self._measures:
            self._medium.huge_share = self._share_put(self.kept)
        if self._erased == before:
            return False
        DESCRIPTORS.forget(self._owner)
        return True

    def _share_put(self, files: int) -> float:
        return min(1.0, self._huge / max(1, files * self.spec.nbytes))

    def numbers(self, first: int) -> Locators:
        """Return the numbers of all files from `first` on (see `KeyedBackend.numbers`)."""
        found: list[int] = []
        for high, top in _entries(self.path, first >> 2 * _BITS):
            self._guard.directory(top)
            for middle, folder in _entries(top, (first >> _BITS) - (high << _BITS)):
                base = high << 2 * _BITS | middle << _BITS
                self._guard.directory(folder)
                found.extend(base | low for low, _ in _entries(folder, first - base))
        return np.array(found, np.uint64)

    def erase(self, numbers: Locators) -> None:
        """Unlink files; whoever maps one keeps its memory."""
        for number in numbers.tolist():
            with suppress(FileNotFoundError):
                os.unlink(self._checked_file(number))
        DESCRIPTORS.forget(self._owner)
        for leaf in np.unique(numbers >> np.uint64(_BITS)).tolist():
            with suppress(OSError):  # others are in there
                os.rmdir(self._folder(leaf))
                os.rmdir(os.path.dirname(self._folder(leaf)))

    def rewrite(self, token: int, locators: Locators) -> Locators:
        """Count a group of dead records out (see `KeyedBackend.rewrite`)."""
        before = self.kept
        locators = super().rewrite(token, locators)
        self._huge = self._huge * self.kept // max(1, before)
        self._erased += 1
        return locators

    # --- reading ---

    def extents(self, locators: Locators) -> Extents:
        """Return where the records lie (see `SupportsExtents.extents`): each in its file, opened at need."""
        DESCRIPTORS.trim()
        files = _Files(self, locators.tolist())
        if self._measures and len(files) and time.monotonic() >= self._look_at:
            self._look([files[i] for i in range(0, len(files), -(-len(files) // _LOOKED_AT))])
        n = len(locators)
        return Extents(files, np.arange(n), np.zeros(n, np.int64), even=True, media=(self._medium,))

    def open_file(self, number: int) -> OpenFile:
        """Return the file of a record, open."""
        return DESCRIPTORS.get(self._owner, number, self._checked_file, self.spec.nbytes, self._guard)

    def _look(self, files: list[OpenFile]) -> float:
        """Measure what share of some files lies on huge pages (see `memodb.backends.pages`)."""
        self._look_at = time.monotonic() + LOOK_AGAIN
        shares = []
        for file in files:
            nbytes = os.fstat(file.fd).st_size // vm.HUGE * vm.HUGE
            if not nbytes:
                continue
            resident: bool | None = self._system.in_memory or self._is_dax(file.fd)
            if not resident and os.fstat(file.fd).st_uid != os.geteuid() and not os.access(file.path, os.W_OK):
                resident = None
            address = vm.reserve(nbytes)
            try:
                vm.map_shared(address, nbytes, file.fd, 0)
                share = measured_share(address, nbytes, resident=resident)
            finally:
                vm.unmap(address, nbytes)
            if not math.isnan(share):
                shares.append(share)
        if not shares:
            self._look_at = time.monotonic() + LOOK_AGAIN_SOON
        share = sum(shares) / len(shares) if shares else math.nan
        self._medium.huge_share = 0.0 if math.isnan(share) else share
        return share

    def usage(self) -> Usage:
        """Return the bytes of all files, how many lie on huge pages, and where."""
        held = self.bytes_on_store()
        share, on_dax = self._share_put(self.kept), None
        if (self.kept and not self._system.in_memory) or self._measures:
            share, on_dax = self._measured()
        why = note(
            self._system,
            share,
            wanted=bool(self.options["huge_pages"]),
            dax=on_dax is not None,
            nbytes=self.kept * self.spec.nbytes if self.spec.nbytes >= vm.HUGE else 0,
        )
        huge = 0 if math.isnan(share) else round(share * held)
        kind = self._system.kind
        if on_dax is None:
            return Usage(held, huge, why, filesystem=kind, place=self._root)
        synchronous = self.spec.nbytes >= vm.HUGE and vm.can_map_synchronously(on_dax.fd)
        durable = self.options["durability"] == "full"
        told = dax.report(self._root, synchronous=synchronous, flush="syncfs" if durable else "")
        return Usage(held, huge, why, filesystem=f"{kind}, DAX", place=self._root, dax=told)

    def _measured(self) -> tuple[float, OpenFile | None]:
        """Return what share of the last files lies on huge pages, and one that is on DAX."""
        files = []
        for number in range(max(0, self.next - _LOOKED_AT), self.next):
            with suppress(OSError):  # erased by compaction, for one
                files.append(self.open_file(number))
        on_dax = files[-1] if files and self._is_dax(files[-1].fd) else None
        return (self._look(files) if self.spec.nbytes >= vm.HUGE else 0.0), on_dax

    def bytes_on_store(self) -> int:
        """Return the bytes of all files, dead ones included, rounded to pages."""
        return self.append_bytes(self.kept)

    def close(self) -> None:
        """Close all files but those that are in use this moment."""
        DESCRIPTORS.disown(self._owner)
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class _Medium:
    """What the planner goes by for all files alike (`memodb.extents.Medium`)."""

    def __init__(self) -> None:
        self.huge_share = 0.0
        self.page = vm.PAGE
        self.touchable = False
        self.unmappable = ""


class _Files(Sequence[OpenFile]):
    """The files of one batch, each opened when it is asked for."""

    def __init__(self, backend: FilesBackend, numbers: list[int]) -> None:
        self._backend = backend
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, i: int) -> OpenFile: ...

    @overload
    def __getitem__(self, i: slice) -> Sequence[OpenFile]: ...

    def __getitem__(self, i: int | slice) -> OpenFile | Sequence[OpenFile]:
        if isinstance(i, slice):
            return _Files(self._backend, self._numbers[i])
        return self._backend.open_file(self._numbers[i])


def _entries(folder: Path, first: int) -> Iterator[tuple[int, Path]]:
    """Yield (number, path) of the entries of a directory whose names are numbers from `first` on, ascending."""
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return
    found = []
    for name in names:
        with suppress(ValueError):
            found.append((int(name, 16), name))
    for number, name in sorted(found):
        if number >= first:
            yield number, folder / name
