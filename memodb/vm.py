"""The virtual-memory calls memodb lives on, and the only place that makes them.

Thin, typed wrappers over mmap(2), munmap(2), madvise(2), fallocate(2) and statfs(2). Addresses are plain integers;
errors are `OSError` with the kernel's errno, for the rooms above to put into the caller's words. Constants are those of
the Linux man pages.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

PAGE: int = mmap.PAGESIZE

PROT_NONE, PROT_READ, PROT_WRITE = 0, 1, 2
MAP_SHARED, MAP_PRIVATE, MAP_FIXED, MAP_ANONYMOUS, MAP_NORESERVE = 0x01, 0x02, 0x10, 0x20, 0x4000
MADV_HUGEPAGE, MADV_POPULATE_READ, MADV_POPULATE_WRITE, MADV_COLLAPSE = 14, 22, 23, 25
_MAP_FAILED = ctypes.c_void_p(-1).value

#: f_type of statfs(2): file systems whose bytes are memory.
_MEMORY_FILESYSTEMS = {0x01021994: "tmpfs", 0x958458F6: "hugetlbfs", 0x858458F6: "ramfs"}
_OTHER_FILESYSTEMS = {0xEF53: "ext", 0x58465342: "xfs", 0x9123683E: "btrfs", 0x6969: "nfs", 0x794C7630: "overlayfs"}

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
_libc.munmap.restype = ctypes.c_int
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.restype = ctypes.c_int
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.statfs.restype = ctypes.c_int
_libc.statfs.argtypes = [ctypes.c_char_p, ctypes.c_void_p]


def _huge_page_size() -> int:
    with contextlib.suppress(OSError, ValueError):
        return int(Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size").read_text())
    return 2 << 20


#: Bytes of one huge (PMD) page: 2 MiB on x86-64.
HUGE: int = _huge_page_size()


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


def map_private(address: int, nbytes: int, fd: int, offset: int) -> None:
    """Lay file pages over a reserved range, copy-on-write: writes there never reach the file."""
    _mmap(address, nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE, fd, offset)


def map_shared(address: int, nbytes: int, fd: int, offset: int, *, writable: bool = False) -> None:
    """Lay the file's own pages over a reserved range."""
    _mmap(address, nbytes, PROT_READ | (PROT_WRITE if writable else 0), MAP_SHARED | MAP_FIXED, fd, offset)


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
    while _libc.madvise(address, nbytes, advice) != 0:
        code = ctypes.get_errno()
        if code == errno.EINVAL:  # a kernel before 5.14: pages come one by one at their first touch
            return
        if code not in (errno.EINTR, errno.EAGAIN):
            raise _fail("madvise(MADV_POPULATE)")


def collapse(address: int, nbytes: int) -> bool:
    """Ask for the range to be backed by huge pages now (MADV_COLLAPSE, Linux 6.1); False where the kernel will not."""
    for _ in range(3):
        if _libc.madvise(address, nbytes, MADV_COLLAPSE) == 0:
            return True
        if ctypes.get_errno() not in (errno.EAGAIN, errno.EINTR):
            return False
    return False


def filesystem(path: str | os.PathLike[str]) -> tuple[str, bool]:
    """Name the file system that holds `path`, and tell whether its bytes are memory (statfs(2))."""
    buffer = ctypes.create_string_buffer(256)
    if _libc.statfs(os.fsencode(path), buffer) != 0:
        raise _fail(f"statfs({os.fspath(path)})")
    kind = ctypes.c_long.from_buffer(buffer).value & 0xFFFFFFFF
    if kind in _MEMORY_FILESYSTEMS:
        return _MEMORY_FILESYSTEMS[kind], True
    return _OTHER_FILESYSTEMS.get(kind, hex(kind)), False


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
