"""One segment file.

Allocated for real before use, on huge pages where the kernel gives them, mapped read-only as a whole.
"""

from __future__ import annotations

import errno
import math
import os
import stat
import time
from pathlib import Path
from typing import Any

import numpy as np

from memodb import vm
from memodb.backends.file_io import FULL, read_all
from memodb.backends.pages import LOOK_AGAIN, LOOK_AGAIN_SOON, measured_share
from memodb.backends.writer import FileWriter
from memodb.errors import CorruptionError, MemoDBError, StoreAccessError, StoreFullError
from memodb.safe import Guard

#: What lies in a segment's place is no file: a directory, a link, a socket.
_NO_FILE = {errno.EISDIR, errno.ELOOP, errno.ENOTDIR, errno.ENXIO, errno.ENODEV}


class SegmentFile:
    """An open segment. Whoever holds the object may use its descriptor and its mapping.

    Parameters
    ----------
    path
        The file.
    system
        The file system it lies on.
    capacity
        Bytes it may grow to, a multiple of the huge page size: so much address space is reserved for it.
    huge
        Whether to ask for huge pages when it grows (tmpfs).
    prefer_huge
        Whether what is read from it through the mapping shall come into the page cache in huge pages.
    create
        Make the file (it must not exist) instead of opening it read-only.
    writable
        Open for writing.
    """

    def __init__(
        self,
        path: Path,
        system: vm.FileSystem,
        capacity: int,
        *,
        huge: bool,
        prefer_huge: bool = False,
        create: bool = False,
        writable: bool = False,
    ) -> None:
        self.path = path
        self.capacity = capacity
        self.huge_share = 0.0
        self.page = system.page
        #: `huge_share`, or NaN where a look could not tell.
        self.known_share = math.nan
        self.unmappable = ""
        if system.kind == "hugetlbfs":  # docs/decisions/0005
            self.unmappable = (
                "the segments lie on hugetlbfs, where a private copy of a page is a signal (SIGBUS) once the pool of "
                "huge pages is empty; a store on tmpfs can be mapped, on huge pages as well"
            )
        self._system = system
        self._look_at = 0.0
        self.address = 0
        self.fd = -1
        self.touchable = system.in_memory
        self._whole = 0
        self._rows: np.ndarray[Any, np.dtype[np.uint8]] | None = None
        mode = os.O_RDWR if writable or create else os.O_RDONLY
        try:
            self.fd = Guard.of(path.parent).open(path, mode | (os.O_CREAT | os.O_EXCL if create else 0))
        except MemoDBError:
            raise
        except PermissionError as error:
            raise StoreAccessError(
                f"segment {path} cannot be opened: {error.strerror}; ask its owner for access"
            ) from error
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StoreFullError(f"no room for a new segment {path}: {error.strerror}; free space there") from error
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise StoreAccessError(
                    f"segment {path} cannot be opened: {error.strerror}; a store holds one descriptor a segment: raise "
                    "the limit (ulimit -n), or copy the store with larger segment_bytes"
                ) from error
            if error.errno in _NO_FILE:
                raise self._no_file(error.strerror) from error
            raise
        if not stat.S_ISREG(os.fstat(self.fd).st_mode):
            raise self._no_file("it is no file")
        self.dax = not system.in_memory and vm.is_dax(self.fd)
        self._writer = FileWriter(self.fd, system, huge=huge, dax=self.dax)
        try:
            address = vm.reserve(capacity, align=max(vm.HUGE, system.page))
            try:
                vm.map_shared(address, capacity, self.fd, 0)
            except OSError:
                vm.unmap(address, capacity)
                raise
        except OSError as error:
            raise StoreFullError(
                f"no room in this process's address space for segment {path} ({capacity} bytes): {error}; raise the "
                "limit (RLIMIT_AS, vm.max_map_count), or copy the store with smaller segment_bytes"
            ) from error
        self.address = address
        if prefer_huge:
            vm.prefer_huge(address, capacity)

    def _no_file(self, why: str | None) -> CorruptionError:
        return CorruptionError(
            f"segment {self.path} cannot be opened: {why}; restore the store from a copy, or delete what verify() names"
        )

    def __del__(self) -> None:
        if self.address:
            vm.unmap(self.address, self.capacity)
            self.address = 0
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def view(self, nbytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Return the first `nbytes` of the file as a read-only array that keeps the segment open."""
        self.require(nbytes)
        return vm.Span(self.address, nbytes, writable=False, keep=self).array()

    def rows(self, nbytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Return the file as rows of `nbytes`, made once: it does not keep the segment, which would be a cycle."""
        rows = self._rows
        if rows is None or rows.shape[1] != nbytes:
            n = self.capacity // nbytes
            rows = vm.Span(self.address, n * nbytes, writable=False).array().reshape(n, nbytes)
            self._rows = rows
        return rows

    @property
    def synchronous(self) -> bool:
        """Whether it is written through a mapping with MAP_SYNC."""
        return self._writer.synchronous

    def must_look(self) -> bool:
        """Tell whether the last `look` is long ago."""
        return time.monotonic() >= self._look_at

    def look(self, nbytes: int) -> None:
        """Measure `huge_share` from the first `nbytes` of the file (see `memodb.backends.pages`)."""
        now = time.monotonic()
        self._look_at = now + LOOK_AGAIN  # another thread need not look meanwhile
        resident: bool | None = self._system.in_memory or self.dax
        if not resident and os.fstat(self.fd).st_uid != os.geteuid() and not os.access(self.path, os.W_OK):
            resident = None
        share = measured_share(self.address, nbytes, resident=resident)
        self.known_share = share
        self.huge_share = 0.0 if math.isnan(share) else share
        if math.isnan(share):
            self._look_at = now + LOOK_AGAIN_SOON

    def require(self, nbytes: int) -> None:
        """Make sure that the file has its first `nbytes`: a page beyond its end is a SIGBUS.

        Raises
        ------
        CorruptionError
            If it was cut short, or copied without its zeros to where there is no room for them.
        """
        size = os.fstat(self.fd).st_size
        if size < nbytes:
            raise CorruptionError(
                f"segment {self.path} is {size} bytes long, its records reach to byte {nbytes}: it was truncated; "
                "restore the store from a copy"
            )
        if self.touchable and nbytes > self._whole:
            # Once a file, and again for what it grew by: records that were put have no holes, a sparse copy may, and a
            # hole is a SIGBUS where memory has run out.
            try:
                if os.lseek(self.fd, 0, os.SEEK_HOLE) < nbytes:
                    vm.populate_read(self.address, vm.round_up(nbytes, vm.PAGE))
            except OSError as error:
                raise CorruptionError(
                    f"segment {self.path} has holes (was it copied sparsely?) that cannot be filled: {error}; free "
                    "space there, or copy it again with its zeros"
                ) from error
            self._whole = nbytes

    def read_into(self, offset: int, out: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        """Copy bytes of the file from `offset` on into `out`, C-contiguous, by pread(2).

        Raises
        ------
        CorruptionError
            If the device cannot read them, or the file ends before: errors here, signals through a mapping.
        """
        read_all(self.fd, f"segment {self.path}", offset, out)

    def write(self, offset: int, values: np.ndarray[Any, Any], allocated: int, full: int) -> tuple[int, int]:
        """Write `values` (any strides) at `offset`, allocating beyond `allocated` first, up to `full` at most.

        Returns
        -------
        tuple of int
            (bytes allocated now, how many of the newly allocated lie on huge pages).

        Raises
        ------
        StoreFullError
            If the file system cannot hold them.
        """
        end = offset + values.nbytes
        # Whole huge pages, or, where there is no room for the last of them any more, just what the records take.
        sizes = {max(allocated, min(vm.round_up(end, least), full)) for least in (max(vm.HUGE, self.page), self.page)}
        for wanted in sorted(sizes, reverse=True):
            try:
                return wanted, self._writer.write(offset, values, allocated, wanted)
            except OSError as error:
                if error.errno not in FULL:
                    raise
                full_error = error
                self.truncate(allocated)
        more = ", raise vm.nr_hugepages (as root)" if self._system.kind == "hugetlbfs" else ""
        raise StoreFullError(
            f"no room for {values.nbytes} more bytes in segment {self.path}: {full_error.strerror}; "
            f"nothing was stored; free space{more}, delete and compact(), or move the store"
        ) from full_error

    def truncate(self, nbytes: int) -> bool:
        """Cut leftovers beyond `nbytes` off; return whether the file reaches so far at all."""
        size = os.fstat(self.fd).st_size
        if size > nbytes:
            os.ftruncate(self.fd, nbytes)
        return size >= nbytes

    def sync(self) -> None:
        """Flush the file's data to its device; a no-op on tmpfs."""
        self._writer.sync()
