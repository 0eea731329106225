"""Deciding how a batch is gathered: pure functions of where the records lie and of what this machine charges."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from memodb import vm
from memodb.errors import InvalidOptionError, MappingUnsupportedError
from memodb.extents import Extents
from memodb.gather.costs import Costs

Strategy = Literal["auto", "map", "copy"]
STRATEGIES = ("auto", "map", "copy")


@dataclass(frozen=True, slots=True)
class Plan:
    """How to gather one batch.

    Parameters
    ----------
    map
        True: map the runs; False: copy.
    starts
        int64 [runs]: index of the first record of each run of records that lie side by side in one file; empty where
        that was not worth finding out.
    small_pages
        Page-table entries of 4 KiB that a mapping takes.
    shift
        Bytes behind a multiple of the huge page size at which a mapped batch shall begin.
    threads
        Threads that a copy goes quickest with.
    """

    map: bool
    starts: np.ndarray[Any, np.dtype[np.int64]]
    small_pages: int = 0
    shift: int = 0
    threads: int = 1


#: Up to so many records Python finds runs sooner than numpy, whose code and tables are cold in a busy program.
_FEW = 256
_NO_RUNS = np.zeros(0, np.int64)


def runs(extents: Extents, nbytes: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return the indices [runs] at which a new run of adjacent records begins."""
    n = len(extents)
    if n == 0:
        return _NO_RUNS
    if n <= _FEW:
        offset, segment = extents.offset.tolist(), extents.segment.tolist()
        breaks_at = [i for i in range(1, n) if offset[i] - offset[i - 1] != nbytes or segment[i] != segment[i - 1]]
        return np.array([0, *breaks_at])
    if extents.slots is not None:
        breaks = extents.slots[1:] - extents.slots[:-1] != 1
    else:
        breaks = extents.offset[1:] - extents.offset[:-1] != nbytes
    if len(extents.segments) > 1:
        breaks |= extents.segment[1:] != extents.segment[:-1]
    return np.concatenate([[0], np.flatnonzero(breaks) + 1])


def make_plan(
    extents: Extents,
    nbytes: int,
    strategy: Strategy,
    *,
    free_vmas: Callable[[], int],
    costs: Costs,
    warm_bytes: int = 1 << 62,
) -> Plan:
    """Choose between mapping and copying.

    Parameters
    ----------
    extents
        Where the records lie.
    nbytes
        Bytes of one record.
    strategy
        "map" and "copy" are obeyed; "auto" takes what the cost model finds cheaper, and on a tie the mapping (it takes
        no memory).
    free_vmas
        Tells how many VMAs this batch may still take; asked if it comes to that.
    costs
        Constants of the cost model.
    warm_bytes
        Largest copy that finds its memory warm.

    Raises
    ------
    MappingUnsupportedError
        If `strategy` is "map" and the records cannot be mapped.
    """
    check_strategy(strategy)
    n = len(extents)
    copy_seconds, threads = costs.copy_seconds(n * nbytes, n, warm=n * nbytes <= warm_bytes)
    copy = Plan(False, _NO_RUNS, threads=threads)
    if strategy == "copy":
        return copy
    if strategy == "auto" and not _may_pay(extents, nbytes, copy_seconds, costs):
        return copy
    starts = runs(extents, nbytes)
    obstacle = _obstacle(extents, nbytes, len(starts), free_vmas())
    if obstacle:
        if strategy == "map":
            raise MappingUnsupportedError(f'strategy="map": {obstacle}; strategy="auto" copies instead')
        return copy
    shift, whole = _congruent(extents, nbytes, starts)
    huge, small, loose = _pages(extents, nbytes, whole)
    if strategy == "auto":
        map_seconds = costs.map_seconds(n * nbytes, len(starts), huge=huge, small=small, loose=loose)
        if map_seconds > copy_seconds:
            return copy
    return Plan(True, starts, small_pages=int(small + loose), shift=shift)


def _may_pay(extents: Extents, nbytes: int, copy_seconds: float, costs: Costs) -> bool:
    """Tell whether mapping could be quicker, before anything is found out that takes long.

    At best all lies on huge pages, in one run. Records that are copied sooner than a run is mapped would have to lie
    side by side, and of those the first and the last tell.
    """
    n = len(extents)
    best = costs.map_call + nbytes * n / vm.HUGE * costs.huge_page
    if best > copy_seconds:
        return False
    if best + n * costs.vma <= copy_seconds or extents.slots is None:
        return True
    return int(extents.slots[-1]) - int(extents.slots[0]) == n - 1


def _obstacle(extents: Extents, nbytes: int, vmas: int, free_vmas: int) -> str:
    for medium in extents.media:
        if medium.unmappable:
            return medium.unmappable
    page = max(medium.page for medium in extents.media)
    if nbytes % page or not _aligned(extents, page):
        return (
            f"records of {nbytes} bytes are not a multiple of the {page}-byte page, so their pages cannot lie side "
            f"by side; a shape whose record is a multiple of {page} bytes can be mapped"
        )
    if vmas > free_vmas:
        return (
            f"the batch needs {vmas} mappings and {free_vmas} are left of this process's budget "
            "(a quarter of vm.max_map_count, or what gather_limits() was told); release batches, or gather fewer "
            "records at once"
        )
    return ""


def _aligned(extents: Extents, unit: int) -> bool:
    """Tell whether all records, whose size is a multiple of `unit`, begin at multiples of it."""
    return extents.even or not (extents.offset % unit).any()


def check_strategy(strategy: str) -> None:
    """Refuse a strategy that there is not, before anything is done."""
    if not isinstance(strategy, str) or strategy not in STRATEGIES:
        raise InvalidOptionError(f"strategy {strategy!r}: expected one of {', '.join(STRATEGIES)}")


def _congruent(extents: Extents, nbytes: int, starts: np.ndarray[Any, np.dtype[np.int64]]) -> tuple[int, int]:
    """Return where the batch shall begin, modulo the size of a huge page, and how many can then be entered whole.

    A huge page stays one entry only where address and file offset agree modulo its size. Records that are multiples of
    it agree wherever they are wanted. Of others, the runs that agree with one another do if the batch begins right: of
    adjacent records all, of random ones few.
    """
    n = len(extents)
    if nbytes % vm.HUGE == 0 and _aligned(extents, vm.HUGE):
        return 0, n * nbytes // vm.HUGE
    first = extents.offset[starts]
    ends = first + np.diff(starts, append=n) * nbytes
    whole = np.maximum(ends // vm.HUGE + -first // vm.HUGE, 0)
    if not whole.any():
        return 0, 0
    shifts, of = np.unique((first - starts * nbytes) % vm.HUGE, return_inverse=True)
    votes = np.bincount(of, weights=whole)
    best = int(votes.argmax())
    return int(shifts[best]), int(votes[best])


def _pages(extents: Extents, nbytes: int, whole: int) -> tuple[float, float, float]:
    """Return how many pages a mapping enters: huge ones, 4 KiB parts of huge ones, and 4 KiB pages of their own.

    `whole` is how many huge ones there could be at most.
    """
    n = len(extents)
    share = extents.media[0].huge_share
    if any(medium.huge_share != share for medium in extents.media):
        share = float(np.array([medium.huge_share for medium in extents.media])[extents.segment].mean())
    all_small = n * nbytes / vm.PAGE
    huge = whole * share
    return huge, all_small * share - huge * (vm.HUGE // vm.PAGE), all_small * (1 - share)
