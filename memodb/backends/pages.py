"""How large the pages of a segment are: what the planner goes by and `stats` reports, found out cheaply.

tmpfs gives huge pages when a segment is allocated, and the arena's table remembers how many. The page cache of a disk
file system is another matter: whether a range lies in a folio of 2 MiB depends on how it came into memory (a large
aligned write, or a read through a mapping that prefers huge pages) and changes when it is evicted and read again. So
that is measured: a few ranges of the segment that are in memory anyway are entered into the page table, and the kernel
tells by which kind of entries (`memodb.vm.entered_pages`). At most 8 ranges, 2 ms where all pages are small.
"""

from __future__ import annotations

import math
from pathlib import Path

from memodb import vm

#: Ranges of 2 MiB that one look enters.
_SAMPLES = 8
#: Seconds until the next look: where something was seen, and where nothing was in memory.
LOOK_AGAIN, LOOK_AGAIN_SOON = 10.0, 1.0

_SHMEM = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")


def measured_share(address: int, nbytes: int, *, resident: bool | None) -> float:
    """Measure what share of a mapped file is entered as huge pages, without reading any of it from a disk.

    Parameters
    ----------
    address, nbytes
        A shared mapping of the file, aligned to huge pages, as far as bytes were written to it.
    resident
        True: its bytes are memory, looking at them reads nothing. False: ask mincore(2). None: mincore(2) would not
        tell this process the truth, so only ranges that were read through this mapping before are looked at.

    Returns
    -------
    float
        0 to 1; NaN where nothing of it is known to be in memory, or the kernel does not tell (before Linux 6.7).
    """
    ranges = nbytes // vm.HUGE
    chosen = sorted({i * ranges // min(ranges, _SAMPLES) for i in range(min(ranges, _SAMPLES))})
    present = huge = 0
    for i in chosen:
        start = address + i * vm.HUGE
        try:
            if resident or (
                resident is False and all(vm.in_core(start + at) for at in (0, vm.HUGE // 2, vm.HUGE - vm.PAGE))
            ):
                vm.populate_read(start, vm.HUGE)
        except OSError:  # a truncated or unreadable file: reading it will say so better
            continue
        entered = vm.entered_pages(start, vm.HUGE)
        if entered is None:
            return math.nan
        present, huge = present + entered[0], huge + entered[1]
    return huge / present if present else math.nan


def note(system: vm.FileSystem, share: float, *, wanted: bool, dax: bool, nbytes: int) -> str:
    """Say why a store of `nbytes` does not lie on huge pages as a whole, and what to do; empty where all is well.

    Parameters
    ----------
    system
        Where its segments lie.
    share
        What share lies on huge pages; NaN where that is not known.
    wanted
        Whether the store was created with ``huge_pages=True``.
    dax
        Whether its files are accessed directly in persistent memory.
    nbytes
        Bytes of all records.
    """
    if system.kind == "hugetlbfs":
        return "batches are copied out of hugetlbfs; a store on tmpfs (/dev/shm) is mapped, on huge pages as well"
    if share == 1 or nbytes == 0:
        return ""
    if nbytes < vm.HUGE:
        return f"the records do not fill one huge page of {vm.HUGE} bytes yet"
    if math.isnan(share):
        if vm.entered_pages(0, 0) is None:
            return (
                f"this kernel does not tell how {system.kind} is mapped, so its pages count as small (Linux 6.7 and "
                "later tell, where /proc/self/pagemap can be read)"
            )
        return f"nothing is known to be in the page cache of {system.kind} now: ask again after reading records"
    if not wanted:
        return "the store was created with huge_pages=False; memodb.copy() makes another with huge pages"
    if dax:
        return (
            "not all extents of the segments are aligned to 2 MiB on the device: make the namespace with an alignment "
            "of 2 MiB, on it ext4 by mkfs.ext4 -b 4096 -E stride=512,stripe_width=512, or xfs by mkfs.xfs -d su=2m,sw=1"
        )
    if system.in_memory:
        return _why_not_tmpfs()
    return (
        f"the page cache of {system.kind} holds the rest in smaller pages: it was put in pieces of less than 2 MiB, or "
        f"this kernel has no large folios for {system.kind}; put many records at once, or keep the store on tmpfs "
        "(/dev/shm)"
    )


def _why_not_tmpfs() -> str:
    if not vm.can_collapse():
        return (
            "this kernel cannot make huge pages on demand (Linux 6.1 and later can, if built with transparent huge "
            "pages); mount a tmpfs with huge=always and keep the store there"
        )
    try:
        denied = "[deny]" in _SHMEM.read_text()
    except OSError:
        denied = False
    if denied:
        return f"{_SHMEM} says deny; write never or advise there (as root), then put the records again: memodb.copy()"
    return (
        "when the rest was put, memory was too fragmented or too short for huge pages; free memory or write 1 to "
        "/proc/sys/vm/compact_memory (as root), then put the records again: memodb.copy()"
    )
