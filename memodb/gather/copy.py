"""The copy gather: records copied side by side by several threads, in pieces that the memory system likes."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from memodb.extents import Extents
from memodb.threads import CREW, MOST

Bytes2D = np.ndarray[Any, np.dtype[np.uint8]]

#: Bytes that one thread copies at a time: enough to make Python's share negligible, few enough to share evenly. Pieces
#: of this size also copied quickest (docs/performance.md).
PIECE = 512 << 10
#: A large record is cut into equal parts of about this size, whole numbers of cache lines.
_LARGE = 2 * PIECE
#: Records of several segments: up to this size, and from so many a segment on, by way of one small buffer a segment.
_SMALL_RECORD, _MANY = 64 << 10, 8


def copy_records(extents: Extents, nbytes: int, out: Bytes2D, threads: int = MOST) -> None:
    """Copy the records of `extents`, in order, into `out`, uint8 [n, nbytes] C-contiguous, on up to `threads`."""
    n, slots = len(extents), extents.slots
    if not all(medium.touchable for medium in extents.media):
        _copy_from_files(extents, nbytes, out, threads)
        return
    if slots is None:
        _copy_scattered(extents, nbytes, out, threads)
        return
    segment = extents.segments[0]
    parts = _parts(nbytes)
    if parts > 1:
        slots = (slots[:, None] * parts + np.arange(parts)).reshape(-1)
        n, nbytes = n * parts, nbytes // parts
    rows, target = segment.rows(nbytes), out.reshape(n, nbytes)
    step = max(1, PIECE // nbytes)
    if n <= step or threads < 2:
        # mode="clip" spares the buffer that mode="raise" puts before `out`; the file's length was checked.
        rows.take(slots, axis=0, out=target, mode="clip")
        return

    def copy(i: int) -> None:
        part = slice(i * step, (i + 1) * step)
        rows.take(slots[part], axis=0, out=target[part], mode="clip")

    CREW.share(copy, -(-n // step), threads)


@cache
def _parts(nbytes: int) -> int:
    """Return into how many equal parts of whole cache lines a record is cut."""
    if nbytes <= _LARGE:
        return 1
    first = -(-nbytes // PIECE)
    return next((k for k in range(first, 4 * first) if nbytes % (64 * k) == 0), 1)


def _copy_from_files(extents: Extents, nbytes: int, out: Bytes2D, threads: int) -> None:
    """Copy from files whose pages may have to be read first: an I/O error is an error there, a signal in a mapping."""
    segment, offset = extents.segment.tolist(), extents.offset.tolist()

    def copy(i: int) -> None:
        extents.segments[segment[i]].read_into(offset[i], out[i])

    # A call a record: as long as one is read from its device, another may be read as well.
    CREW.share(copy, len(extents), threads if len(extents) * nbytes > _LARGE else 1)


def _copy_scattered(extents: Extents, nbytes: int, out: Bytes2D, threads: int) -> None:
    """Copy from several segments, or from places that are no multiples of a record."""
    n = len(extents)
    ends = np.zeros(len(extents.segments), np.int64)
    np.maximum.at(ends, extents.segment, extents.offset + nbytes)
    sources = [segment.view(int(end)) for segment, end in zip(extents.segments, ends.tolist(), strict=True)]
    if nbytes <= _SMALL_RECORD and n >= _MANY * len(sources) and (extents.even or not (extents.offset % nbytes).any()):
        members = [np.flatnonzero(extents.segment == i) for i in range(len(sources))]

        def copy_segment(i: int) -> None:
            rows = sources[i].reshape(-1, nbytes)
            out[members[i]] = rows[extents.offset[members[i]] // nbytes]

        CREW.share(copy_segment, len(sources), threads if n * nbytes > _LARGE else 1)
        return
    segment, offset = extents.segment.tolist(), extents.offset.tolist()
    step = max(1, PIECE // nbytes)

    def copy(i: int) -> None:
        for j in range(i * step, min((i + 1) * step, n)):
            out[j] = sources[segment[j]][offset[j] : offset[j] + nbytes]

    CREW.share(copy, -(-n // step), threads)
