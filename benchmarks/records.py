"""The records that everybody gathers: one plain file, side by side, from which each contender's own file is filled."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import numpy as np

from benchmarks.profiles import GIB, MIB, Case, Profile


class Records:
    """`stored` different records in one plain file without a header, as users of np.memmap keep them.

    Parameters
    ----------
    path
        The file; it is made.
    shape, dtype
        Of one record.
    stored
        How many.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: str, stored: int) -> None:
        self.path = path
        self.shape = shape
        self.dtype = np.dtype(dtype)
        self.stored = stored
        first = np.random.default_rng(0).integers(0, 15_000, shape).astype(np.uint16)
        bits = np.dtype(f"u{self.dtype.itemsize}")
        values = np.memmap(path, bits, mode="w+", shape=(stored, *shape))
        for i in range(stored):
            values[i] = first + (i % 15_000)  # small integers: finite as float16 and float32 alike
        values.flush()

    @property
    def nbytes(self) -> int:
        """Bytes of one record."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def open(self, mode: str = "r") -> np.memmap:
        """Map the file: [stored, *shape]."""
        return np.memmap(self.path, self.dtype, mode=mode, shape=(self.stored, *self.shape))

    def blocks(self):
        """Yield (first id, values [m, *shape]) with some MiB each."""
        values = self.open()
        step = max(1, 32 * MIB // self.nbytes)
        for start in range(0, self.stored, step):
            yield start, values[start : start + step]


def how_many(case: Case, profile: Profile) -> int:
    """Return how many records are stored for a case: more than a cache holds, twice the batch where that fits.

    While the slow contenders take part there are six copies of the records, beyond only two: 12 GiB hold either.
    """
    most = GIB if case.total <= profile.slow_bytes else 2 * GIB
    # zarr keeps a file for each: many tiny ones would take longer to make than to measure.
    wanted = max(min(profile.store_bytes // case.nbytes, 4096), 2 * case.n)
    return max(case.n, min(wanted, most // case.nbytes))


def evict(files: list[Path]) -> float:
    """Drop files from the page cache; return the share of their pages that stayed all the same."""
    pages = cached = 0
    for path in files:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            found = _cached_pages(fd)
        finally:
            os.close(fd)
        cached += int(found.sum())
        pages += len(found)
    return cached / max(pages, 1)


_libc = ctypes.CDLL(None, use_errno=True)


def _cached_pages(fd: int) -> np.ndarray:
    """Ask mincore(2) which pages of a file are in memory."""
    size = os.fstat(fd).st_size
    if size == 0:
        return np.zeros(0, np.bool_)
    with mmap.mmap(fd, size, prot=mmap.PROT_READ) as mapping:
        view = np.frombuffer(mapping, np.uint8)
        answer = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
        failed = _libc.mincore(
            ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(size), ctypes.c_void_p(answer.ctypes.data)
        )
        del view
    if failed:
        raise OSError(ctypes.get_errno(), "mincore")
    return (answer & 1).astype(np.bool_)
