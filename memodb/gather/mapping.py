"""Runs of records laid side by side in a window, without a copy."""

from __future__ import annotations

import errno

import numpy as np

from memodb import vm
from memodb.errors import CorruptionError, MappingUnsupportedError
from memodb.extents import Extents
from memodb.gather.plan import Plan
from memodb.gather.window import POOL, Range

_EHWPOISON = 133  # errno(3): memory page has hardware error; Python does not name it


def map_records(extents: Extents, nbytes: int, plan: Plan) -> Range:
    """Map the records of `extents`, in order, into one contiguous range, every page present.

    Pages are private (copy-on-write): whatever is done with them, the store does not change.

    Raises
    ------
    MappingUnsupportedError
        If the kernel refuses (VMA or address-space limits).
    CorruptionError
        If a page cannot be read (a segment was truncated, or its disk fails).
    """
    total = len(extents) * nbytes
    starts = plan.starts
    lengths = np.diff(np.append(starts, len(extents))) * nbytes
    try:
        window = POOL.window(total, len(starts))
    except OSError as error:
        raise _refused(error, total) from error
    try:
        address = window.address
        for segment, offset, length in zip(
            extents.segment[starts].tolist(), extents.offset[starts].tolist(), lengths.tolist(), strict=True
        ):
            vm.map_private(address, length, extents.segments[segment].fd, offset)
            address += length
    except OSError as error:
        POOL.give_back(window)
        raise _refused(error, total) from error
    try:
        vm.populate_read(window.address, total)
    except OSError as error:
        POOL.give_back(window)
        if error.errno in (errno.EFAULT, errno.ENOMEM, _EHWPOISON, errno.EIO):
            raise CorruptionError(
                f"{len(extents)} records could not be read from their segments ({error}): a segment was truncated "
                "or its device fails; verify() tells which records are concerned"
            ) from error
        raise
    return window


def _refused(error: OSError, total: int) -> MappingUnsupportedError:
    return MappingUnsupportedError(
        f'the kernel refused to map {total} bytes ({error}); strategy="copy" does without. Limits: '
        "vm.max_map_count, vm.overcommit_memory, RLIMIT_DATA, RLIMIT_AS"
    )
