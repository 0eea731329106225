"""One segment file.

Allocated for real before use, on huge pages where the kernel gives them, mapped read-only as a whole.
"""

from __future__ import annotations

import errno
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from memodb import vm
from memodb.backends.pages import LOOK_AGAIN, LOOK_AGAIN_SOON, measured_share
from memodb.errors import CorruptionError, StoreAccessError, StoreFullError
from memodb.threads import CREW

#: Bytes collapsed by one madvise call, and copied by one thread at a time: small enough to find out where huge pages
#: ran out, and to share evenly.
_COLLAPSE = 16 << 20
#: Bytes of one pwrite(2): a large write that begins on a multiple of 2 MiB gets large folios in the page cache. (Linux
#: cuts a write after 2 GiB less a page, which would leave all that follows unaligned.)
_WRITE = 1 << 30


_FULL = {errno.ENOSPC, errno.ENOMEM, errno.EDQUOT, errno.EFBIG}


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
        self._huge = huge
        self._look_at = 0.0
        self.address = 0
        self.fd = -1
        self.touchable = system.in_memory
        self._whole = 0
        self._rows: np.ndarray[Any, np.dtype[np.uint8]] | None = None
        mode = os.O_RDWR if writable or create else os.O_RDONLY
        flags = mode | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT | os.O_EXCL if create else 0)
        try:
            self.fd = os.open(path, flags, 0o644)
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
            raise
        self.dax = not system.in_memory and vm.is_dax(self.fd)
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
        data = memoryview(out.reshape(-1))  # type: ignore[arg-type]
        while len(data):
            try:
                got = os.preadv(self.fd, [data], offset)
            except OSError as error:
                raise CorruptionError(
                    f"segment {self.path} cannot be read at byte {offset}: {error.strerror}; its device fails: restore "
                    "the store from a copy"
                ) from error
            if not got:
                self.require(offset + len(data))
                raise CorruptionError(f"segment {self.path} ends at byte {offset}; restore the store from a copy")
            data, offset = data[got:], offset + got

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
        unit = max(vm.HUGE, self.page)
        sizes = {max(allocated, min(vm.round_up(end, least), full)) for least in (unit, self.page)}
        for wanted in sorted(sizes, reverse=True):
            try:
                if self.touchable:
                    return wanted, self._write_mapped(offset, end, values, allocated, wanted, unit)
                if wanted > allocated:
                    os.posix_fallocate(self.fd, allocated, wanted - allocated)
                self._write_through(offset, values)
                return wanted, 0
            except OSError as error:
                if error.errno not in _FULL:
                    raise
                full_error = error
                self.truncate(allocated)
        more = ", raise vm.nr_hugepages (as root)" if self._system.kind == "hugetlbfs" else ""
        raise StoreFullError(
            f"no room for {values.nbytes} more bytes in segment {self.path}: {full_error.strerror}; "
            f"nothing was stored; free space{more}, delete and compact(), or move the store"
        ) from full_error

    def _write_mapped(
        self, offset: int, end: int, values: np.ndarray[Any, Any], allocated: int, wanted: int, unit: int
    ) -> int:
        first = min(offset // unit * unit, allocated)
        address = vm.reserve(wanted - first, align=unit)
        base = address - first
        try:
            if wanted > allocated:
                os.ftruncate(self.fd, wanted)
            vm.map_shared(address, wanted - first, self.fd, first, writable=True)
            if offset < allocated:
                # Allocated by an earlier put; but a file that was copied sparsely has holes where it should have pages.
                start = offset // vm.PAGE * vm.PAGE
                stop = vm.round_up(min(end, allocated), vm.PAGE)
                os.posix_fallocate(self.fd, start, stop - start)
                vm.populate_write(base + start, stop - start)
            target = vm.Span(base + offset, end - offset, writable=True).array()
            step = max(_COLLAPSE, unit)
            bounds = [offset, *range(allocated, wanted, step)] if wanted > allocated else [offset]
            source = values.reshape(-1).view(np.uint8) if values.flags.c_contiguous else None
            gained = [0] * len(bounds)

            def work(i: int) -> None:
                # Every page is there before it is written, so no store can find the file system full. What is copied
                # at once is still in the cache from the kernel's zeroing of it.
                start, stop = bounds[i], bounds[i + 1] if i + 1 < len(bounds) else wanted
                if allocated <= start < stop:
                    gained[i] = self._allocate(base, start, stop)
                if source is not None:
                    part = slice(max(start, offset) - offset, min(stop, end) - offset)
                    target[part] = source[part]

            CREW.share(work, len(bounds))
            if source is None:
                np.copyto(target.view(values.dtype).reshape(values.shape), values)
        finally:
            vm.unmap(address, wanted - first)
        return sum(gained)

    def _allocate(self, base: int, start: int, stop: int) -> int:
        """Allocate a range of the file, mapped at `base` + offset; return how many bytes of it lie on huge pages."""
        gained = 0
        if self._system.kind == "hugetlbfs":
            # No write(2) there. Pages are taken out of the pool now; without them a store to the mapping is SIGBUS.
            os.posix_fallocate(self.fd, start, stop - start)
            return stop - start
        if self._huge:
            # One byte in each huge page (through the descriptor: a touch of the mapping is SIGBUS on a full tmpfs)
            # lets the kernel fill the hole around it with one huge page; a range that is all hole it refuses.
            whole = range(vm.round_up(start, vm.HUGE), stop - vm.HUGE + 1, vm.HUGE)
            for page in whole:
                os.pwrite(self.fd, b"\0", page)
            if whole and vm.collapse(base + whole[0], len(whole) * vm.HUGE):
                gained = len(whole) * vm.HUGE
            else:
                gained = sum(vm.HUGE for page in whole if vm.collapse(base + page, vm.HUGE))
        if gained == stop - start:
            return gained
        os.posix_fallocate(self.fd, start, stop - start)
        return gained

    def _write_through(self, offset: int, values: np.ndarray[Any, Any]) -> None:
        # A file on a disk is written by pwrite(2): an I/O error or a full disk is an error there, a signal through a
        # mapping.
        chunks = [values] if values.flags.c_contiguous else values
        for chunk in chunks:
            data = memoryview(np.ascontiguousarray(chunk).reshape(-1).view(np.uint8))  # type: ignore[arg-type]
            while len(data):
                written = os.pwrite(self.fd, data[:_WRITE], offset)
                data, offset = data[written:], offset + written

    def truncate(self, nbytes: int) -> None:
        """Cut leftovers beyond `nbytes` off."""
        if os.fstat(self.fd).st_size > nbytes:
            os.ftruncate(self.fd, nbytes)

    def sync(self) -> None:
        """Flush the file's data to its device (fdatasync(2)); a no-op on tmpfs."""
        os.fdatasync(self.fd)
