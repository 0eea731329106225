"""LMDB's pages, looked at before LMDB follows them.

LMDB trusts its file. A flipped bit in it can lead it beyond the end of a page or of the map (a signal), in circles, or
to an older tree that looks well. So every page is checked once, before this process lets LMDB read it: all pages at
once where there are few, and else those on the way to each key that is asked for. Pages that are written later come
from LMDB itself.
"""

from __future__ import annotations

import os
import threading
import time
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from memodb.errors import CorruptionError, FormatVersionError
from memodb.lmdb_meta import (
    HEADER,
    META_BYTES,
    PAGE,
    SEAL_AT,
    Damage,
    Meta,
    Tree,
    is_overtaken,
    pack_seal,
    page_size,
    parse_meta,
    written_by,
)
from memodb.lmdb_pages import Page, sound_leaves

#: Trees of up to so many pages are checked as a whole when the environment is opened.
CHECKED_AT_OPEN = 128
_OVERFLOW = 4
#: A meta page may be seen while it is written: what is wrong has to be wrong so many times.
_LOOKS = 5


@dataclass
class _Found:
    """What a walk met: runs of pages, each of which may belong to one thing only."""

    tree: list[int] = field(default_factory=list)
    starts: list[np.ndarray[Any, np.dtype[np.int64]]] = field(default_factory=list)
    lengths: list[np.ndarray[Any, np.dtype[np.int64]]] = field(default_factory=list)


class PageGuard:
    """Checks the pages of one LMDB data file.

    Parameters
    ----------
    fd
        The file, open for reading; for sealing also for writing. The guard closes it.
    name
        What people call it, with its path.
    """

    def __init__(self, fd: int, name: str) -> None:
        self._fd = fd
        self._name = name
        self._lock = threading.RLock()
        self._good: set[int] = set()
        self._branches: dict[int, tuple[list[bytes], list[int]]] = {}
        self._as_of = -1
        self._page_bytes = 0
        #: Whether every page was checked, so that nothing has to be looked at before LMDB does; and also what a writer
        #: goes by.
        self.complete = self.complete_for_writing = False

    def close(self) -> None:
        """Close the file."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _bytes(self, count: int, at: int) -> bytes:
        """Return `count` bytes of the file; fewer only where it ends."""
        data = os.pread(self._fd, count, at)
        while len(data) < count:  # a read may be cut short by a signal, or by a device
            more = os.pread(self._fd, count - len(data), at + len(data))
            if not more:
                break
            data += more
        return data

    # --- meta pages ---

    def metas(self) -> list[Meta]:
        """Return what the two meta pages say; only the newest, where the other one is damaged but overtaken.

        Raises
        ------
        CorruptionError
            If one is damaged that LMDB may go by.
        FormatVersionError
            If another version of LMDB wrote the file.
        """
        last_error: Exception | None = None
        for look in range(_LOOKS):
            try:
                nbytes = self._page_bytes = page_size(self._bytes(META_BYTES, 0))
                pages = [self._bytes(nbytes, number * nbytes) for number in (0, 1)]
                held = os.fstat(self._fd).st_size // nbytes
                return self._sound(pages, held)
            except (Damage, FormatVersionError) as error:
                last_error = error
                time.sleep(0.001 * look)
        if isinstance(last_error, FormatVersionError):
            raise last_error
        raise self._damaged(last_error)

    def _sound(self, pages: list[bytes], held: int) -> list[Meta]:
        found: list[Meta] = []
        damaged: list[tuple[bytes, Damage]] = []
        for number, page in enumerate(pages):
            try:
                found.append(parse_meta(page, number, len(pages[0]), held, self._name))
            except Damage as error:
                damaged.append((page, error))
        for page, why in damaged:
            if not (found and found[0].sealed and is_overtaken(page, found[0].transaction)):
                raise why
        return found

    def seal(self, transaction: int) -> None:
        """Seal the meta page that a transaction, just committed, was written to; `metas` was asked before."""
        at = (transaction & 1) * self._page_bytes
        page = self._bytes(META_BYTES, at)
        if len(page) == META_BYTES and written_by(page) == transaction:
            os.pwrite(self._fd, pack_seal(page, transaction), at + SEAL_AT)

    def snapshot(self, transaction: int) -> Meta | None:
        """Return the meta of a transaction that is being read; None if it is not there any more."""
        return next((meta for meta in self.metas() if meta.transaction == transaction), None)

    # --- checking ---

    def open(self, transaction: int) -> None:
        """Check all pages if there are few, or some are missing; the transaction has to be read meanwhile.

        Pages that a transaction took and freed again need not have been written, so a file may be shorter than its
        pages and sound.
        """
        meta = self.snapshot(transaction)
        if meta is not None and (meta.free.pages + meta.main.pages <= CHECKED_AT_OPEN or meta.held <= meta.last):
            self.check_all(meta)

    def check_all(self, meta: Meta, *, writing: bool = False) -> None:
        """Check every page of both trees, and that no page is used twice or used and free.

        Parameters
        ----------
        meta
            Of a transaction that is being read, or written and has changed nothing yet.
        writing
            Check also what only a writer goes by: how many pages each large value has.
        """
        with self._lock:
            if self.complete_for_writing or (self.complete and not writing):
                return
            found = _Found()
            try:
                for _ in self._walk(meta, meta.main, found, writing=writing):
                    pass
                for page in self._walk(meta, meta.free, found, writing=writing, free=True):
                    self._free_pages(meta, page, found)
                _check_disjoint(found)
            except Damage as error:
                raise self._damaged(error) from None
            self.complete, self.complete_for_writing = True, writing
            self._good.clear()
            self._branches.clear()

    def check_path(self, meta: Meta, key: bytes) -> None:
        """Check the pages on the way to one key."""
        if self.complete:
            return
        with self._lock:
            if self._as_of != meta.transaction:  # branches of another snapshot may have become other pages
                self._branches.clear()
                self._as_of = meta.transaction
            try:
                self._descend(meta, key)
            except Damage as error:
                self._branches.clear()
                raise self._damaged(error) from None

    def _descend(self, meta: Meta, key: bytes) -> None:
        number, low, high = meta.main.root, b"", None
        for level in range(1, meta.main.depth + 1):
            leaf = level == meta.main.depth
            if leaf and number in self._good:
                return
            known = self._branches.get(number)
            if known is None:
                page = Page(self._read(meta, number, 1), number, meta, leaf=leaf)
                page.check_keys(low, high)
                if leaf:
                    page.large()  # LMDB hands out as much as a node says that its value has
                self._good.add(number)
                if leaf:
                    return
                known = self._branches[number] = page.keys, page.children
            keys, children = known
            place = max(0, bisect_right(keys, key, lo=1) - 1)
            low = keys[place] if place else low
            high = keys[place + 1] if place + 1 < len(keys) else high
            number = children[place]

    def _walk(self, meta: Meta, tree: Tree, found: _Found, *, writing: bool, free: bool = False) -> Iterator[Page]:
        """Check a tree and note in `found` what is in use; yield leaves: the free list's all, of the other one some."""
        seen: set[int] = set()
        todo: list[tuple[int, int, bytes, bytes | None]] = [(tree.root, 1, b"", None)] if tree.depth else []
        while todo:
            number, level, low, high = todo.pop()
            if number in seen:
                raise Damage(f"page {number} stands in the tree twice")
            seen.add(number)
            page = Page(self._read(meta, number, 1), number, meta, leaf=level == tree.depth, free=free)
            page.check_keys(low, high)
            if level < tree.depth:
                edges = [low, *page.keys[1:], high]
                bounds = [(first or b"", behind) for first, behind in pairwise(edges)]
                known = None
                if level == tree.depth - 1 and not free and seen.isdisjoint(page.children):
                    data = b"".join(self._read(meta, child, 1) for child in page.children)
                    known = sound_leaves(data, page.children, bounds, meta)
                if known is None:
                    todo.extend(
                        (child, level + 1, first, behind)
                        for child, (first, behind) in zip(page.children, bounds, strict=True)
                    )
                else:
                    found.tree.extend(page.children)
                    self._note_large(meta, *known, found, writing=writing)
                continue
            self._note_large(meta, *page.large(), found, writing=writing)
            yield page
        found.tree.extend(seen)

    def _note_large(self, meta: Meta, starts: Any, lengths: Any, found: _Found, *, writing: bool) -> None:
        if writing and len(starts):
            lengths = self._large_lengths(meta, starts, lengths)
        found.starts.append(starts)
        found.lengths.append(lengths)

    def _large_lengths(self, meta: Meta, starts: Any, needed: Any) -> Any:
        """Return how many pages values say that they have, by the first page of each: LMDB frees so many."""
        lengths = needed.copy()
        for i, number in enumerate(starts.tolist()):
            head = self._bytes(HEADER, number * meta.page_bytes)
            if len(head) < HEADER:
                raise Damage(f"page {number} lies beyond the end of the file, which was truncated")
            own, _, flags = PAGE.unpack_from(head)[:3]
            pages = int.from_bytes(head[12:16], "little")
            if own != number or flags != _OVERFLOW or not needed[i] <= pages <= meta.last + 1 - number:
                raise Damage(f"page {number}, the first of a large value, has a damaged header")
            lengths[i] = pages
        return lengths

    def _free_pages(self, meta: Meta, page: Page, found: _Found) -> None:
        """Note the pages that a leaf of the free list names."""
        for value in page.values(lambda number, count: self._read(meta, number, count)):
            ids = np.frombuffer(value, "<u8", len(value) // 8)
            count = int(ids[0]) if len(ids) else -1
            listed = ids[1 : count + 1]
            if not 0 <= count < len(ids) or (count and (listed.min() < 2 or listed.max() > meta.last)):
                raise Damage(f"the list of free pages on page {page.number} is damaged")
            found.starts.append(listed.astype(np.int64))
            found.lengths.append(np.ones(count, np.int64))

    def _read(self, meta: Meta, number: int, count: int) -> bytes:
        at = number * meta.page_bytes
        page = self._bytes(count * meta.page_bytes, at) if at < 1 << 62 else b""
        if len(page) < count * meta.page_bytes:
            raise Damage(f"page {number} lies beyond the end of the file, which was truncated")
        return page

    def _damaged(self, error: Exception | None) -> CorruptionError:
        return CorruptionError(f"{self._name} is damaged: {error}; restore the store from a copy")


def _check_disjoint(found: _Found) -> None:
    """Check that no page belongs to two things: a flipped bit in a number of a page leads to an old, free one."""
    none = np.zeros(0, np.int64)
    starts = np.concatenate([none, *found.starts, np.array(found.tree, np.int64)])
    lengths = np.concatenate([none, *found.lengths, np.ones(len(found.tree), np.int64)])
    order = np.argsort(starts, kind="stable")
    starts, ends = starts[order], (starts + lengths)[order]
    twice = np.flatnonzero(ends[:-1] > starts[1:])
    if len(twice):
        raise Damage(f"page {starts[twice[0] + 1]} is used twice, or used and free")
