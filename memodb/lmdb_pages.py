"""Branch and leaf pages of LMDB's, checked so that LMDB can follow them: one, or many leaves at once.

The layout is that of LMDB 0.9 (``MDB_page`` and ``MDB_node`` in its mdb.c), little-endian, 64 bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np

from memodb.lmdb_meta import HEADER, PAGE, Damage, Meta

_BRANCH, _LEAF = 1, 2
_BIG = 1  # of a node: its value lies on overflow pages
_NODE = 8
_LONGEST_KEY = 511
#: Keys that `sound_leaves` compares are no longer.
_SHORT_KEY = 64


class Page:
    """A branch or leaf page whose header and nodes are sound."""

    def __init__(self, data: bytes, number: int, meta: Meta, *, leaf: bool, free: bool = False) -> None:
        self.number = number
        self._data = data
        self._meta = meta
        self._free = free
        own, _, flags, lower, upper = PAGE.unpack_from(data)
        if own != number or flags != (_LEAF if leaf else _BRANCH):
            raise Damage(
                f"page {number} says that it is page {own} with flags {flags:#x}, expected a "
                f"{'leaf' if leaf else 'branch'} ({_LEAF if leaf else _BRANCH:#x})"
            )
        if lower % 2 or not HEADER < lower <= upper <= len(data):
            raise Damage(f"page {number} has no room for its nodes between {lower} and {upper}")
        words = np.frombuffer(data, "<u2")
        self._at = np.frombuffer(data, "<u2", (lower - HEADER) // 2, HEADER).astype(np.int64)
        if (self._at % 2).any() or self._at.min() < upper or self._at.max() > len(data) - _NODE:
            raise Damage(f"page {number} has a node outside of its part for nodes")
        at = self._at >> 1
        low, high = words[at].astype(np.int64), words[at + 1].astype(np.int64)
        self._flags, self._key_bytes = words[at + 2].astype(np.int64), words[at + 3].astype(np.int64)
        if leaf:
            self._sizes = low | high << 16
            self._big = (self._flags & _BIG) != 0
            inside = np.where(self._big, 8, self._sizes)
            wrong = (self._flags & ~_BIG).any() or self._key_bytes.min() < 1
        else:
            children = low | high << 16 | self._flags << 32
            self.children: list[int] = children.tolist()
            inside = np.zeros_like(self._key_bytes)
            wrong = children.min() < 2 or children.max() > meta.last or (self._key_bytes[1:] < 1).any()
        used = _NODE + self._key_bytes + inside
        if wrong or self._key_bytes.max() > _LONGEST_KEY or (self._at + used > len(data)).any():
            raise Damage(f"page {number} has a damaged node")
        if int((used + used % 2).sum()) != len(data) - upper:
            raise Damage(f"page {number} has nodes that do not fill their part of it")
        begin = self._at + _NODE
        self.keys = [data[b:e] for b, e in zip(begin.tolist(), (begin + self._key_bytes).tolist(), strict=True)]
        if not leaf:
            self.keys[0] = b""

    def check_keys(self, low: bytes, high: bytes | None) -> None:
        """Check that keys ascend, from `low` on and below `high` (None: no end)."""
        order: list[Any] = self.keys
        if self._free:  # numbers in the machine's own order
            if any(len(key) not in (0, 8) for key in self.keys):
                raise Damage(f"page {self.number} has a damaged key")
            order = [int.from_bytes(key, "little") for key in self.keys]
            least: Any = int.from_bytes(low, "little")
            most: Any = None if high is None else int.from_bytes(high, "little")
        else:
            least, most = low, high
        first = 0 if hasattr(self, "_sizes") else 1  # the first key of a branch page stands for all that are smaller
        inside = order[first:]
        if inside and (inside[0] < least or (most is not None and inside[-1] >= most)):
            raise Damage(f"page {self.number} has keys that belong on another page")
        if any(not a < b for a, b in pairwise(inside)):
            raise Damage(f"page {self.number} has keys out of order")

    def large(self) -> tuple[np.ndarray[Any, np.dtype[np.int64]], np.ndarray[Any, np.dtype[np.int64]]]:
        """Return first page and number of pages of the values that lie on pages of their own."""
        places = (self._at + _NODE + self._key_bytes)[self._big]
        raw = np.frombuffer(self._data, np.uint8)
        starts = raw[places[:, None] + np.arange(8)].reshape(-1).view("<u8")
        lengths = (HEADER - 1 + self._sizes[self._big]) // self._meta.page_bytes + 1
        if len(starts) and (starts.min() < 2 or starts.max() > self._meta.last):
            raise Damage(f"page {self.number} has a value beyond the last page")
        first = starts.astype(np.int64)
        if (first + lengths > self._meta.last + 1).any():
            raise Damage(f"page {self.number} has a value that reaches beyond the last page")
        if (first + lengths > self._meta.held).any():
            raise Damage(f"page {self.number} has a value beyond the end of the file, which was truncated")
        return first, lengths

    def values(self, read: Any) -> Iterator[bytes]:
        """Yield the values of a leaf; `read(page, count)` returns pages."""
        starts, lengths = (found.tolist() for found in self.large())
        at = (self._at + _NODE + self._key_bytes).tolist()
        for i, big in enumerate(self._big.tolist()):
            size = int(self._sizes[i])
            if big:
                yield read(starts.pop(0), lengths.pop(0))[HEADER : HEADER + size]
            else:
                yield self._data[at[i] : at[i] + size]


def sound_leaves(
    data: bytes, numbers: list[int], bounds: list[tuple[bytes, bytes | None]], meta: Meta
) -> tuple[np.ndarray[Any, np.dtype[np.int64]], np.ndarray[Any, np.dtype[np.int64]]] | None:
    """Check leaves together, which takes a tenth of the time; None if one of them has to be looked at by itself.

    Parameters
    ----------
    data
        The pages, one behind the other.
    numbers, bounds
        Number of each page, and the keys (from, below; None: no end) that belong on it.
    meta
        Of the transaction.

    Returns
    -------
    tuple or None
        As `Page.large`, of all of them.
    """
    nbytes = meta.page_bytes
    raw = np.frombuffer(data, np.uint8).reshape(len(numbers), nbytes)
    words = raw.view("<u2")
    lower, upper = words[:, 6].astype(np.int64), words[:, 7].astype(np.int64)
    wrong = (raw[:, :8].copy().view("<u8")[:, 0] != np.array(numbers, np.uint64)) | (words[:, 5] != _LEAF)
    if (wrong | (lower % 2 != 0) | (lower <= HEADER) | (lower > upper) | (upper > nbytes)).any():
        return None
    counts = (lower - HEADER) // 2
    first = np.cumsum(counts) - counts
    page = np.repeat(np.arange(len(numbers)), counts)
    at = words[page, HEADER // 2 + np.arange(len(page)) - first[page]].astype(np.int64)
    if ((at % 2 != 0) | (at < upper[page]) | (at > nbytes - _NODE)).any():
        return None
    low, high, flags, key_bytes = (words[page, (at >> 1) + i].astype(np.int64) for i in range(4))
    sizes, big = low | high << 16, (flags & _BIG) != 0
    used = _NODE + key_bytes + np.where(big, 8, sizes)
    if ((flags & ~_BIG != 0) | (key_bytes < 1) | (key_bytes > _SHORT_KEY) | (at + used > nbytes)).any():
        return None
    if (np.add.reduceat(used + used % 2, first) != nbytes - upper).any():
        return None
    flat, begin = raw.reshape(-1), page * nbytes + at + _NODE
    if not _ascend(flat, begin, key_bytes, page):
        return None
    ends = begin + key_bytes
    for (least, most), i, j in zip(bounds, first.tolist(), (first + counts - 1).tolist(), strict=True):
        if data[begin[i] : ends[i]] < least or (most is not None and data[begin[j] : ends[j]] >= most):
            return None
    starts = flat[ends[big][:, None] + np.arange(8)].reshape(-1).view("<u8")
    lengths = (HEADER - 1 + sizes[big]) // nbytes + 1
    if len(starts) and (starts.min() < 2 or starts.max() > meta.last):
        return None
    behind = starts.astype(np.int64) + lengths
    if (behind > min(meta.last + 1, meta.held)).any():
        return None
    return starts.astype(np.int64), lengths


def _ascend(flat: Any, begin: Any, key_bytes: Any, page: Any) -> bool:
    """Tell whether the keys ascend within each page, as memcmp and then their lengths say."""
    width = -(-int(key_bytes.max()) // 8) * 8
    places = np.arange(width)
    padded = flat[np.minimum(begin[:, None] + places, len(flat) - 1)]
    padded[places >= key_bytes[:, None]] = 0
    keys = padded.view(">u8")
    ascends = key_bytes[:-1] < key_bytes[1:]  # of those that are the same up to the zeros behind them
    for column in range(keys.shape[1] - 1, -1, -1):
        mine, its = keys[:-1, column], keys[1:, column]
        ascends = np.where(mine == its, ascends, mine < its)
    return bool((ascends | (page[:-1] != page[1:])).all())
