"""How bytes get into a file, whatever it lies on: allocated first, so that no store to memory can fail.

In memory (tmpfs, hugetlbfs): through a mapping, on huge pages where the kernel gives them. On DAX: through a mapping
with MAP_SYNC. On any other disk, and where MAP_SYNC is refused: by pwrite(2).
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from memodb import vm
from memodb.backends.file_io import write_all
from memodb.threads import CREW

#: Bytes collapsed or populated by one madvise call, and copied by one thread at a time: small enough to find out where
#: huge pages ran out, and to share evenly.
_PIECE = 16 << 20


class FileWriter:
    """Allocates and writes parts of one open file. Whoever opened the file keeps it open, and cuts leftovers off.

    Parameters
    ----------
    fd
        The file, open for reading and writing where `write` shall be called.
    system
        The file system it lies on.
    huge
        Whether to ask for huge pages (tmpfs).
    dax
        Whether the file is accessed directly in persistent memory (`memodb.vm.is_dax`).

    Attributes
    ----------
    synchronous : bool
        Whether `write` goes through a mapping with MAP_SYNC.
    """

    def __init__(self, fd: int, system: vm.FileSystem, *, huge: bool, dax: bool = False) -> None:
        self._fd = fd
        self._system = system
        self._huge = huge
        self._unit = max(vm.HUGE, system.page)
        self.synchronous = dax and vm.can_map_synchronously(fd)

    def write(self, offset: int, values: np.ndarray[Any, Any], allocated: int, wanted: int) -> int:
        """Write `values` (any strides) at `offset`, and let the file grow from `allocated` bytes to `wanted` first.

        Returns
        -------
        int
            How many of the newly allocated bytes are known to lie on huge pages.

        Raises
        ------
        OSError
            ENOSPC, EDQUOT, ENOMEM or EFBIG where there is no room (the file may have grown already), others as the
            device gives them. Never a signal.
        """
        if self._system.in_memory or self.synchronous:
            return self._write_mapped(offset, values, allocated, wanted)
        if wanted > allocated:
            os.posix_fallocate(self._fd, allocated, wanted - allocated)
        self._write_through(offset, values)
        return 0

    def sync(self) -> None:
        """Make what was written durable (fdatasync(2)).

        On DAX the kernel writes the processor's cache back, wherever the file was written through a mapping, and waits
        until the lines are in persistent memory: what CLWB and SFENCE would do, which Python has no words for.
        """
        vm.sync_data(self._fd)

    def _write_mapped(self, offset: int, values: np.ndarray[Any, Any], allocated: int, wanted: int) -> int:
        end = offset + values.nbytes
        first = min(offset // self._unit * self._unit, allocated)
        address = vm.reserve(wanted - first, align=self._unit)
        base = address - first
        try:
            if wanted > allocated:
                self._grow(allocated, wanted)
            vm.map_shared(address, wanted - first, self._fd, first, writable=True, synchronous=self.synchronous)
            if offset < allocated:
                # Allocated by an earlier put; but a file that was copied sparsely has holes where it should have pages.
                start = offset // vm.PAGE * vm.PAGE
                stop = vm.round_up(min(end, allocated), vm.PAGE)
                os.posix_fallocate(self._fd, start, stop - start)
                vm.populate_write(base + start, stop - start)
            target = vm.Span(base + offset, end - offset, writable=True).array()
            step = max(_PIECE, self._unit)
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

    def _grow(self, allocated: int, wanted: int) -> None:
        if self.synchronous:
            # At once: one extent, which the file system can lay out in whole stripes (of 2 MiB: docs/dax.md).
            os.posix_fallocate(self._fd, allocated, wanted - allocated)
        else:
            os.ftruncate(self._fd, wanted)

    def _allocate(self, base: int, start: int, stop: int) -> int:
        """Allocate a range of the file, mapped at `base` + offset; return how many bytes of it lie on huge pages."""
        gained = 0
        if self.synchronous:
            # A first write to allocated blocks changes the extents, and through a MAP_SYNC mapping each such fault
            # commits the journal: every 2 MiB. So they are first entered through a mapping that promises nothing.
            for synchronous in (False, True):
                vm.map_shared(base + start, stop - start, self._fd, start, writable=True, synchronous=synchronous)
                vm.populate_write(base + start, stop - start)
            return 0
        if self._system.kind == "hugetlbfs":
            # No write(2) there. Pages are taken out of the pool now; without them a store to the mapping is SIGBUS.
            os.posix_fallocate(self._fd, start, stop - start)
            return stop - start
        if self._huge:
            # One byte in each huge page (through the descriptor: a touch of the mapping is SIGBUS on a full tmpfs)
            # lets the kernel fill the hole around it with one huge page; a range that is all hole it refuses.
            whole = range(vm.round_up(start, vm.HUGE), stop - vm.HUGE + 1, vm.HUGE)
            for page in whole:
                os.pwrite(self._fd, b"\0", page)
            if whole and vm.collapse(base + whole[0], len(whole) * vm.HUGE):
                gained = len(whole) * vm.HUGE
            else:
                gained = sum(vm.HUGE for page in whole if vm.collapse(base + page, vm.HUGE))
        if gained == stop - start:
            return gained
        os.posix_fallocate(self._fd, start, stop - start)
        return gained

    def _write_through(self, offset: int, values: np.ndarray[Any, Any]) -> None:
        # A file on a disk is written by pwrite(2): an I/O error or a full disk is an error there, a signal through a
        # mapping.
        chunks = [values] if values.flags.c_contiguous else values
        for chunk in chunks:
            data = np.ascontiguousarray(chunk).reshape(-1).view(np.uint8)
            write_all(self._fd, offset, data)
            offset += data.size
