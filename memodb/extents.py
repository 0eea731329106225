"""Where record bytes lie: the one shape in which backends tell the gather."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


class SegmentView(Protocol):
    """One open file that holds record bytes. It stays open and mapped for as long as the object lives."""

    @property
    def fd(self) -> int:
        """Descriptor of the file, open for reading."""

    @property
    def huge_share(self) -> float:
        """Share of its bytes that lies on huge pages, 0 to 1."""

    @property
    def page(self) -> int:
        """Bytes of the pages that it can be mapped in: 4 KiB, or more on a file system of larger ones (hugetlbfs)."""

    @property
    def in_memory(self) -> bool:
        """Whether its bytes are memory, so that touching them cannot fail; others are copied by `read_into`."""

    def read_into(self, offset: int, out: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        """Copy bytes from `offset` on into `out`, C-contiguous; raise `CorruptionError` where they cannot be read."""

    @property
    def unmappable(self) -> str:
        """Why its pages cannot be mapped privately (copy-on-write); empty where they can."""

    def view(self, nbytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Return the first `nbytes` of the file, read-only; raise `CorruptionError` if it is shorter."""


@dataclass(frozen=True, slots=True)
class Extents:
    """Where each of n records lies.

    Parameters
    ----------
    segments
        The files concerned; holding them keeps their mappings and descriptors alive.
    segment
        int64 [n], index into `segments`.
    offset
        int64 [n], byte offset of the record in that file.
    """

    segments: Sequence[SegmentView]
    segment: np.ndarray[Any, np.dtype[np.int64]]
    offset: np.ndarray[Any, np.dtype[np.int64]]

    def __len__(self) -> int:
        return len(self.offset)
