"""Deciding how a batch is gathered: pure functions of where the records lie.

The cost model counts what was measured (docs/architecture.md): a mapping costs one VMA a run of adjacent records and
one page-table entry a page, to build and to tear down; a copy costs bandwidth.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from memodb import vm
from memodb.errors import InvalidOptionError, MappingUnsupportedError
from memodb.extents import Extents

Strategy = Literal["auto", "map", "copy"]
STRATEGIES = ("auto", "map", "copy")


@dataclass(frozen=True)
class Costs:
    """Seconds that the parts of a gather take on a machine (defaults: medians on a 2-core server, Linux 6.18)."""

    vma: float = 4e-6
    small_page: float = 0.55e-6
    huge_page: float = 5e-6
    copied_byte: float = 1 / 8e9


@dataclass(frozen=True)
class Plan:
    """How to gather one batch.

    Parameters
    ----------
    map
        True: map the runs; False: copy.
    starts
        int64 [runs]: index of the first record of each run of records that lie side by side in one file.
    why_not_map
        Why mapping is impossible; empty where it is possible.
    """

    map: bool
    starts: np.ndarray[Any, np.dtype[np.int64]]
    why_not_map: str = ""


def runs(extents: Extents, nbytes: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return the indices [runs] at which a new run of adjacent records begins."""
    if len(extents) == 0:
        return np.zeros(0, np.int64)
    breaks = (np.diff(extents.segment) != 0) | (np.diff(extents.offset) != nbytes)
    return np.concatenate([[0], np.flatnonzero(breaks) + 1]).astype(np.int64)


def make_plan(extents: Extents, nbytes: int, strategy: Strategy, *, free_vmas: int, costs: Costs | None = None) -> Plan:
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
        VMAs that this batch may still take.
    costs
        Constants of the cost model.

    Raises
    ------
    MappingUnsupportedError
        If `strategy` is "map" and the records cannot be mapped.
    """
    check_strategy(strategy)
    starts = runs(extents, nbytes)
    obstacle = ""
    if nbytes % vm.PAGE or (extents.offset % vm.PAGE).any():
        obstacle = (
            f"records of {nbytes} bytes are not a multiple of the {vm.PAGE}-byte page, so their pages cannot lie side "
            f"by side; a shape whose record is a multiple of {vm.PAGE} bytes can be mapped"
        )
    elif len(starts) > free_vmas:
        obstacle = (
            f"the batch needs {len(starts)} mappings and {free_vmas} are left of this process's budget "
            "(a quarter of vm.max_map_count); release batches, or gather fewer records at once"
        )
    if strategy == "map" and obstacle:
        raise MappingUnsupportedError(f'strategy="map": {obstacle}; strategy="auto" copies instead')
    if obstacle or strategy == "copy":
        return Plan(False, starts, obstacle)
    return Plan(
        strategy == "map"
        or _map_seconds(extents, nbytes, starts, costs or Costs()) <= _copy_seconds(extents, nbytes, costs or Costs()),
        starts,
    )


def check_strategy(strategy: str) -> None:
    """Refuse a strategy that there is not, before anything is done."""
    if strategy not in STRATEGIES:
        raise InvalidOptionError(f"strategy {strategy!r}: expected one of {', '.join(STRATEGIES)}")


def _map_seconds(extents: Extents, nbytes: int, starts: np.ndarray[Any, np.dtype[np.int64]], costs: Costs) -> float:
    huge_segments = np.array([segment.huge for segment in extents.segments], bool)
    # A huge page stays huge only where address and file offset agree modulo its size, for every record of the batch.
    on_huge = huge_segments[extents.segment] & (nbytes % vm.HUGE == 0) & (extents.offset % vm.HUGE == 0)
    huge = int(on_huge.sum())
    pages = huge * (nbytes / vm.HUGE) * costs.huge_page + (len(extents) - huge) * (nbytes / vm.PAGE) * costs.small_page
    return len(starts) * costs.vma + pages


def _copy_seconds(extents: Extents, nbytes: int, costs: Costs) -> float:
    return len(extents) * nbytes * costs.copied_byte
