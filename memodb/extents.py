"""Where record bytes lie: the one shape in which backends tell the gather."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

Places = np.ndarray[Any, np.dtype[np.int64]]


class Medium(Protocol):
    """What the planner needs to know of where bytes lie."""

    @property
    def huge_share(self) -> float:
        """Share of its bytes that lies on huge pages, 0 to 1."""

    @property
    def page(self) -> int:
        """Bytes of the pages that it can be mapped in: 4 KiB, or more on a file system of larger ones (hugetlbfs)."""

    @property
    def touchable(self) -> bool:
        """Whether its bytes are memory that `rows` and `view` show, so that touching them cannot fail.

        Others are copied by `read_into`.
        """

    @property
    def unmappable(self) -> str:
        """Why its pages cannot be mapped privately (copy-on-write); empty where they can."""


class FileView(Protocol):
    """One open file that holds record bytes. It stays open for as long as the object lives."""

    @property
    def fd(self) -> int:
        """Descriptor of the file, open for reading."""

    def read_into(self, offset: int, out: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        """Copy bytes from `offset` on into `out`, C-contiguous; raise `CorruptionError` where they cannot be read."""


class SegmentView(FileView, Medium, Protocol):
    """An open file that is mapped as well."""

    def rows(self, nbytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Return the file as rows of `nbytes`, read-only; to be used while the segment is held, where extents lie."""

    def view(self, nbytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Return the first `nbytes` of the file, read-only; raise `CorruptionError` if it is shorter."""


class Extents:
    """Where each of n records lies.

    Parameters
    ----------
    segments
        The files concerned; holding them keeps their mappings and descriptors alive. Where `media` is given, a sequence
        that opens each file when it is asked for it, and need not keep it: whoever uses one holds it meanwhile.
    segment
        int64 [n], index into `segments`.
    offset
        int64 [n], byte offset of the record in that file.
    even
        Whether every offset is known to be a multiple of the records' size.
    media
        What to plan by, where not every file is asked itself.
    """

    __slots__ = ("_nbytes", "_offset", "_segment", "even", "lazy", "media", "segments", "slots")

    def __init__(
        self,
        segments: Sequence[Any],
        segment: Places,
        offset: Places,
        *,
        even: bool = False,
        media: Sequence[Medium] | None = None,
    ) -> None:
        #: Of `SegmentView`; if `lazy`, of `FileView`.
        self.segments = segments
        self.lazy = media is not None
        self.media: Sequence[Medium] = segments if media is None else media
        self.even = even
        self._segment: Places | None = segment
        self._offset: Places | None = offset
        self._nbytes = 0
        #: int64 [n]: all records lie in one file, each at a multiple of its own size, this one; else None.
        self.slots: Places | None = None

    @classmethod
    def in_one(cls, segment: SegmentView, slots: Places, nbytes: int) -> Extents:
        """Return the extents of records of `nbytes` that lie in one file, record i at ``slots[i] * nbytes``."""
        made = cls.__new__(cls)
        made.segments, made.slots, made._nbytes = (segment,), slots, nbytes
        made.media, made.lazy = made.segments, False
        made._segment = made._offset = None
        made.even = True
        return made

    @property
    def segment(self) -> Places:
        """Index into `segments`, int64 [n]."""
        if self._segment is None:
            self._segment = np.zeros(len(self), np.int64)
        return self._segment

    @property
    def offset(self) -> Places:
        """Byte offset in the file, int64 [n]."""
        if self._offset is None:
            assert self.slots is not None
            self._offset = self.slots * self._nbytes
        return self._offset

    def __len__(self) -> int:
        return len(self._offset if self.slots is None else self.slots)  # type: ignore[arg-type]
