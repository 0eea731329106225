"""Whole reads and writes of parts of an open file: the kernel may do less than it was asked for."""

from __future__ import annotations

import errno
import os
from typing import Any

import numpy as np

from memodb import os_errors
from memodb.errors import CorruptionError

#: Errors that say that there is no room, in memory included.
FULL = os_errors.FULL | {errno.ENOMEM}
#: Bytes of one pwrite(2): a large write that begins on a multiple of 2 MiB gets large folios in the page cache. (Linux
#: cuts a write after 2 GiB less a page, which would leave all that follows unaligned.)
_WRITE = 1 << 30


def read_all(fd: int, what: str, offset: int, out: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
    """Copy bytes of an open file from `offset` on into `out`, C-contiguous, by pread(2).

    Raises
    ------
    CorruptionError
        If the device cannot read them, or the file ends before: errors here, signals through a mapping. The message
        calls the file `what`.
    """
    data = memoryview(out.reshape(-1))  # type: ignore[arg-type]
    while len(data):
        try:
            got = os.preadv(fd, [data], offset)
        except OSError as error:
            raise CorruptionError(
                f"{what} cannot be read at byte {offset}: {error.strerror}; its device fails: restore the store from a "
                "copy"
            ) from error
        if not got:
            raise CorruptionError(
                f"{what} ends at byte {offset}, {len(data)} bytes too early: it was truncated; restore the store from "
                "a copy"
            )
        data, offset = data[got:], offset + got


def write_all(fd: int, offset: int, data: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
    """Write `data`, uint8 [nbytes] C-contiguous, into an open file from `offset` on, by pwrite(2)."""
    rest = memoryview(data)  # type: ignore[arg-type]
    while len(rest):
        written = os.pwrite(fd, rest[:_WRITE], offset)
        rest, offset = rest[written:], offset + written
