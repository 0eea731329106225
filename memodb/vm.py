"""The virtual-memory calls memodb lives on, and the only place that makes them.

Thin, typed wrappers over mmap(2), munmap(2), madvise(2), mincore(2), statfs(2), statx(2), syncfs(2) and PAGEMAP_SCAN.
Addresses are plain integers; errors are `OSError` with the kernel's errno, for the rooms above to put into the caller's
words. Constants are those of the Linux man pages.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

PAGE: int = mmap.PAGESIZE

PROT_NONE, PROT_READ, PROT_WRITE = 0, 1, 2
MAP_SHARED, MAP_PRIVATE, MAP_FIXED, MAP_ANONYMOUS, MAP_NORESERVE = 0x01, 0x02, 0x10, 0x20, 0x4000
MAP_SHARED_VALIDATE, MAP_SYNC = 0x03, 0x80000
MADV_HUGEPAGE, MADV_POPULATE_READ, MADV_POPULATE_WRITE, MADV_COLLAPSE = 14, 22, 23, 25
_MAP_FAILED = ctypes.c_void_p(-1).value

#: f_type of statfs(2): file systems whose bytes are memory.
_MEMORY_FILESYSTEMS = {0x01021994: "tmpfs", 0x958458F6: "hugetlbfs", 0x858458F6: "ramfs"}
_OTHER_FILESYSTEMS = {0xEF53: "ext4", 0x58465342: "xfs", 0x9123683E: "btrfs", 0x6969: "nfs", 0x794C7630: "overlayfs"}
_AT_EMPTY_PATH, _STATX_ATTR_DAX = 0x1000, 0x200000
#: ioctl(2) of /proc/self/pagemap (Linux 6.7): _IOWR('f', 16, struct pm_scan_arg), and its categories.
_PAGEMAP_SCAN = 0xC0606610
_PAGE_IS_PRESENT, _PAGE_IS_HUGE = 1 << 3, 1 << 6
_SCAN, _REGION, _REGIONS = struct.Struct("=12Q"), struct.Struct("=3Q"), 64

#: How often what the kernel puts off (EINTR, EAGAIN) is asked for: it must not be for ever.
_TRIES = 1000

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
_libc.munmap.restype = ctypes.c_int
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.restype = ctypes.c_int
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.mincore.restype = ctypes.c_int
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
_libc.statfs.restype = ctypes.c_int
_libc.statfs.argtypes = [ctypes.c_char_p, ctypes.c_void_p]
_libc.syncfs.restype = ctypes.c_int
_libc.syncfs.argtypes = [ctypes.c_int]


def _huge_page_size() -> int:
    with contextlib.suppress(OSError, ValueError):
        return int(Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size").read_text())
    return 2 << 20


#: Bytes of one huge (PMD) page: 2 MiB on x86-64.
HUGE: int = _huge_page_size()


class FlushError(OSError):
    """A flush (fsync(2) and its like) failed: nobody knows what the device holds, and to ask again tells nothing."""


def _fail(call: str) -> OSError:
    code = ctypes.get_errno()
    return OSError(code, f"{call}: {os.strerror(code)}")


def round_up(n: int, unit: int) -> int:
    """Return the smallest multiple of `unit` that is at least `n`."""
    return -(-n // unit) * unit


def _mmap(address: int | None, nbytes: int, prot: int, flags: int, fd: int, offset: int) -> int:
    got = _libc.mmap(address, nbytes, prot, flags, fd, offset)
    if got is None or got == _MAP_FAILED:
        raise _fail("mmap")
    return int(got)


def unmap(address: int, nbytes: int) -> None:
    """Give the range back to the kernel (munmap(2))."""
    if _libc.munmap(address, nbytes) != 0:
        raise _fail("munmap")


def reserve(nbytes: int, *, align: int = HUGE) -> int:
    """Reserve an address range that nothing backs yet (PROT_NONE, MAP_NORESERVE).

    Returns
    -------
    int
        Its first address, a multiple of `align`; the range is exactly `nbytes` (a multiple of the page size) long.
    """
    start = _mmap(None, nbytes + align, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
    first = round_up(start, align)
    if first > start:
        unmap(start, first - start)
    if first - start < align:
        unmap(first + nbytes, align - (first - start))
    return first


def map_runs(address: int, runs: Iterable[tuple[int, int, int]]) -> None:
    """Lay runs (nbytes, fd, offset) of file pages side by side over a reserved range, copy-on-write.

    Writes there never reach the file.
    """
    call, prot, flags = _libc.mmap, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE
    for nbytes, fd, offset in runs:
        if call(address, nbytes, prot, flags, fd, offset) != address:
            raise _fail("mmap")
        address += nbytes


def map_shared(
    address: int, nbytes: int, fd: int, offset: int, *, writable: bool = False, synchronous: bool = False
) -> None:
    """Lay the file's own pages over a reserved range.

    `synchronous` (MAP_SYNC): where a page can be written, the file system has made durable where it lies.
    """
    # hugetlbfs would set pages of its pool aside for the whole range; elsewhere MAP_NORESERVE means nothing here.
    flags = (MAP_SHARED_VALIDATE | MAP_SYNC if synchronous else MAP_SHARED) | MAP_FIXED | MAP_NORESERVE
    _mmap(address, nbytes, PROT_READ | (PROT_WRITE if writable else 0), flags, fd, offset)


def can_map_synchronously(fd: int) -> bool:
    """Tell whether an open file can be mapped with MAP_SYNC (Linux 4.15; a file on DAX), and its pages be populated.

    Without MADV_POPULATE_WRITE (Linux 5.14) a page that cannot be had would be a signal at the store to it.
    """
    try:
        address = _mmap(None, PAGE, PROT_READ, MAP_SHARED_VALIDATE | MAP_SYNC, fd, 0)
    except OSError:  # EOPNOTSUPP, or EINVAL from a kernel that does not know the flags
        return False
    unmap(address, PAGE)
    return bool(_libc.madvise(0, 0, MADV_POPULATE_WRITE) == 0)  # an empty range is refused only where it is not known


def map_nothing(address: int, nbytes: int) -> None:
    """Turn the range back into a bare reservation; whatever was mapped there is let go."""
    _mmap(address, nbytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0)


def allocate(nbytes: int) -> int:
    """Allocate anonymous memory on huge pages where the kernel gives them, every page present already."""
    address = reserve(nbytes)
    try:
        _mmap(address, nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0)
        _libc.madvise(address, nbytes, MADV_HUGEPAGE)  # advice only: refused where THP is off
        _populate(address, nbytes, MADV_POPULATE_WRITE)
    except BaseException:  # an interrupt too: populating a large range takes a while
        unmap(address, nbytes)
        raise
    return address


def populate_read(address: int, nbytes: int) -> None:
    """Enter every page of the range into the page table, for reading (MADV_POPULATE_READ, Linux 5.14).

    Raises
    ------
    OSError
        EFAULT or ENOMEM where a page cannot be had (a truncated file, a full tmpfs): what would be a SIGBUS later.
    """
    _populate(address, nbytes, MADV_POPULATE_READ)


def populate_write(address: int, nbytes: int) -> None:
    """Enter every page of the range into the page table, for writing (MADV_POPULATE_WRITE, Linux 5.14).

    Raises
    ------
    OSError
        As `populate_read`, for what would be a SIGBUS at a store.
    """
    _populate(address, nbytes, MADV_POPULATE_WRITE)


def _populate(address: int, nbytes: int, advice: int) -> None:
    for _ in range(_TRIES):
        if _libc.madvise(address, nbytes, advice) == 0:
            return
        code = ctypes.get_errno()
        if code == errno.EINVAL:  # a kernel before 5.14: pages come one by one at their first touch
            return
        if code not in (errno.EINTR, errno.EAGAIN):
            break
    raise _fail("madvise(MADV_POPULATE)")


def collapse(address: int, nbytes: int) -> bool:
    """Ask for the range to be backed by huge pages now (MADV_COLLAPSE, Linux 6.1); False where the kernel will not."""
    for _ in range(3):
        if _libc.madvise(address, nbytes, MADV_COLLAPSE) == 0:
            return True
        if ctypes.get_errno() not in (errno.EAGAIN, errno.EINTR):
            return False
    return False


def can_collapse() -> bool:
    """Tell whether the kernel knows MADV_COLLAPSE: an empty range is refused only where it does not."""
    return bool(_libc.madvise(0, 0, MADV_COLLAPSE) == 0)


def prefer_huge(address: int, nbytes: int) -> None:
    """Ask for huge pages in this range (MADV_HUGEPAGE): of a file, those that are read into the page cache from now on.

    Advice only; a kernel without transparent huge pages refuses it, and nothing is lost.
    """
    _libc.madvise(address, nbytes, MADV_HUGEPAGE)


def in_core(address: int) -> bool:
    """Tell whether the page at this mapped address is in memory (mincore(2)).

    To a process that neither owns nor may write the file the kernel says yes for every page.
    """
    found = ctypes.c_ubyte()
    if _libc.mincore(address, PAGE, ctypes.byref(found)) != 0:
        raise _fail("mincore")
    return bool(found.value & 1)


def entered_pages(address: int, nbytes: int) -> tuple[int, int] | None:
    """Return how many bytes of the range are in the page table, and how many of those by entries of huge pages.

    Nothing is read or changed. None where the kernel cannot tell (before Linux 6.7).
    """
    present = huge = 0
    regions = ctypes.create_string_buffer(_REGION.size * _REGIONS)
    start, end = address, address + nbytes
    try:
        # Opened each time: a descriptor that a fork inherited shows the parent's page table.
        fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        while start < end:
            query = bytearray(
                _SCAN.pack(
                    _SCAN.size, 0, start, end, 0, ctypes.addressof(regions), _REGIONS, 0,
                    0, _PAGE_IS_PRESENT, 0, _PAGE_IS_PRESENT | _PAGE_IS_HUGE,
                )
            )  # fmt: skip
            n = fcntl.ioctl(fd, _PAGEMAP_SCAN, query)
            for i in range(n):
                first, behind, categories = _REGION.unpack_from(regions, i * _REGION.size)
                present += behind - first
                huge += (behind - first) if categories & _PAGE_IS_HUGE else 0
            start = _SCAN.unpack(query)[4]
    except OSError:
        return None
    finally:
        os.close(fd)
    return present, huge


@dataclass(frozen=True, slots=True)
class FileSystem:
    """What a file system is.

    Parameters
    ----------
    kind
        Its name, such as "tmpfs" or "ext4"; its number where we have no name for it.
    in_memory
        Whether its bytes are memory.
    page
        Bytes of the smallest page its files can be mapped in.
    """

    kind: str
    in_memory: bool
    page: int = PAGE


def filesystem(path: str | os.PathLike[str]) -> FileSystem:
    """Tell what file system holds `path` (statfs(2))."""
    buffer = ctypes.create_string_buffer(256)
    if _libc.statfs(os.fsencode(path), buffer) != 0:
        raise _fail(f"statfs({os.fspath(path)})")
    number, block = struct.unpack_from("=qq" if ctypes.sizeof(ctypes.c_long) == 8 else "=ll", buffer)
    number &= 0xFFFFFFFF
    if number in _MEMORY_FILESYSTEMS:
        kind = _MEMORY_FILESYSTEMS[number]
        return FileSystem(kind, True, block if kind == "hugetlbfs" else PAGE)
    return FileSystem(_OTHER_FILESYSTEMS.get(number, hex(number)), False)


def is_dax(fd: int) -> bool:
    """Tell whether an open file is accessed directly in persistent memory, without a page cache (statx(2))."""
    buffer = ctypes.create_string_buffer(256)  # struct statx: stx_mask u32, stx_blksize u32, stx_attributes u64, ...
    try:
        statx = _libc.statx
    except AttributeError:  # a C library without it
        return False
    if statx(ctypes.c_int(fd), b"", ctypes.c_int(_AT_EMPTY_PATH), ctypes.c_uint(0), buffer) != 0:
        return False
    return bool(struct.unpack_from("=Q", buffer, 8)[0] & _STATX_ATTR_DAX)


def sync_directory(path: str | os.PathLike[str]) -> None:
    """Make the entries of a directory durable (fsync(2))."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        raise FlushError(error.errno, error.strerror, os.fspath(path)) from error
    finally:
        os.close(fd)


def sync_data(fd: int) -> None:
    """Make the bytes of an open file durable (fdatasync(2))."""
    try:
        os.fdatasync(fd)
    except OSError as error:
        raise FlushError(error.errno, error.strerror) from error


def sync_filesystem(fd: int) -> None:
    """Make everything durable that was written to the file system of an open file or directory (syncfs(2)).

    The kernel tells each descriptor of those failures only that came after it was opened: so it has to be opened before
    what is to be made durable is written.

    Raises
    ------
    OSError
        EIO, ENOSPC: something of it could not be written (Linux 5.8 and later tell).
    """
    if _libc.syncfs(fd) != 0:
        code = ctypes.get_errno()
        raise FlushError(code, f"syncfs: {os.strerror(code)}")


class Span:
    """A range of memory that numpy can stand on: every array made from it keeps it, and whatever it keeps, alive.

    Parameters
    ----------
    address, nbytes
        The range.
    writable
        Whether arrays on it may be written.
    keep
        Any object that must outlive the arrays (the mapping's owner).
    """

    def __init__(self, address: int, nbytes: int, *, writable: bool, keep: object = None) -> None:
        self.keep = keep
        self.__array_interface__ = {
            "version": 3,
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, not writable),
        }

    def array(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Return the range as uint8 [nbytes]; its base is this object."""
        return np.asarray(self)


@cache
def mapping_budget() -> int:
    """VMAs that batches may hold at once: a quarter of ``vm.max_map_count`` (the rest is for everybody else)."""
    try:
        return int(Path("/proc/sys/vm/max_map_count").read_text()) // 4
    except (OSError, ValueError):
        return 16_384
