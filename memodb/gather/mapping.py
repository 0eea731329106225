"""Runs of records laid side by side in a window, without a copy."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator
from itertools import repeat
from typing import Any

import numpy as np

from memodb import vm
from memodb.errors import CorruptionError, MappingUnsupportedError, MemoDBError
from memodb.extents import Extents
from memodb.gather.plan import Plan
from memodb.gather.window import POOL, Range
from memodb.threads import CREW

_EHWPOISON = 133  # errno(3): memory page has hardware error; Python does not name it
#: Bytes of small pages that one thread enters at a time.
_PIECE = 4 << 20


def map_records(extents: Extents, nbytes: int, plan: Plan) -> Range:
    """Map the records of `extents`, in order, into one contiguous range, every page present.

    Pages are private (copy-on-write): whatever is done with them, the store does not change. A window that an earlier
    batch left is overwritten in place, as the paper does from layer to layer (section 5.3).

    Raises
    ------
    MappingUnsupportedError
        If the kernel refuses (VMA or address-space limits).
    CorruptionError
        If a page cannot be read (a segment was truncated, or its disk fails).
    """
    n = len(extents)
    total = n * nbytes
    starts = plan.starts
    try:
        window = POOL.window(plan.shift + total, len(starts))
    except OSError as error:
        raise _refused(error, total) from error
    try:
        if plan.shift:  # an earlier batch may have left pages there
            vm.map_nothing(window.address, plan.shift)
        vm.map_runs(window.address + plan.shift, _runs(extents, nbytes, starts))
    except BaseException as error:
        POOL.give_back(window, intact=False)
        if isinstance(error, OSError) and not isinstance(error, (FileNotFoundError, MemoDBError)):
            raise _refused(error, total) from error
        raise
    try:
        _enter_pages(window.address + plan.shift, total, plan.small_pages)
    except BaseException as error:
        POOL.give_back(window, intact=False)
        if isinstance(error, OSError) and error.errno in (errno.EFAULT, errno.ENOMEM, _EHWPOISON, errno.EIO):
            raise CorruptionError(
                f"{n} records could not be read from their segments ({error}): a segment was truncated "
                "or its device fails; verify() tells which records are concerned"
            ) from error
        raise
    window.keep = not plan.small_pages  # small pages are taken out one by one, now or then
    return window


def _runs(extents: Extents, nbytes: int, starts: np.ndarray[Any, np.dtype[np.int64]]) -> Iterable[tuple[int, int, int]]:
    """Return (bytes, descriptor, offset) of each run."""
    n = len(extents)
    if len(starts) == n:
        lengths: Iterable[int] = repeat(nbytes)
        offset, segment = extents.offset, extents.segment
    else:
        lengths = (np.diff(starts, append=n) * nbytes).tolist()
        offset, segment = extents.offset[starts], extents.segment[starts]
    if extents.lazy:
        return _runs_of_files(extents, lengths, segment.tolist(), offset.tolist())
    fds = [segment.fd for segment in extents.segments]
    of = repeat(fds[0]) if len(fds) == 1 else map(fds.__getitem__, segment.tolist())
    return zip(lengths, of, offset.tolist(), strict=False)


def _runs_of_files(
    extents: Extents, lengths: Iterable[int], segment: list[int], offset: list[int]
) -> Iterator[tuple[int, int, int]]:
    for length, i, at in zip(lengths, segment, offset, strict=False):
        file = extents.segments[i]  # stays open until the next run is asked for
        yield length, file.fd, at


def _enter_pages(address: int, total: int, small_pages: int) -> None:
    if small_pages * vm.PAGE <= 2 * _PIECE:  # huge pages are entered sooner than a second thread is awake
        vm.populate_read(address, total)
        return

    def enter(i: int) -> None:
        vm.populate_read(address + i * _PIECE, min(_PIECE, total - i * _PIECE))

    CREW.share(enter, -(-total // _PIECE))


def _refused(error: OSError, total: int) -> MappingUnsupportedError:
    return MappingUnsupportedError(
        f'the kernel refused to map {total} bytes ({error}); strategy="copy" does without. Limits: '
        "vm.max_map_count, vm.overcommit_memory, RLIMIT_DATA, RLIMIT_AS"
    )
