"""What the catalog knows of each id: a packed row, 1,022 rows a block, cached and checked once per transaction.

A lookup of ids costs a few numpy calls whatever their number; Python runs per block only, and only after somebody
committed.
"""

from __future__ import annotations

import struct
import threading
from pathlib import Path
from typing import Any

import lmdb
import numpy as np

from memodb.catalog.tables import BLOCKS
from memodb.checksum import crc32c
from memodb.errors import CorruptionError

#: Rows of a block: with what LMDB and the stamp add, they fill six pages and no more.
BLOCK = 1022
ABSENT, LIVE, DELETED = 0, 1, 2
ROW: np.dtype[Any] = np.dtype(
    {
        "names": ["locator", "checksum", "namespace", "state"],
        "formats": ["<u8", "<u4", "<u4", "<u1"],
        "offsets": [0, 8, 12, 16],
        "itemsize": 24,
    }
)
#: Before the rows of a block: number of the transaction that wrote it last, CRC-32C of key, that number and the rows.
_STAMP = struct.Struct("<QI")
_NUMBER = struct.Struct("<Q")
_ONE = np.uint64(1)
#: Up to so many cached blocks are looked at together after a commit, whichever are wanted.
_CHECKED_TOGETHER = 64
#: Blocks kept in memory at most (16,384 x 24 KiB = 400 MB, 16 million records).
_CACHED_BLOCKS = 16_384

Rows = np.ndarray[Any, np.dtype[np.void]]
Ids = np.ndarray[Any, np.dtype[np.int64]]


def block_key(block: int) -> bytes:
    """LMDB key of a block."""
    return BLOCKS + struct.pack(">Q", block)


def _sum(key: bytes, transaction: int, body: bytes) -> int:
    return crc32c(key + _NUMBER.pack(transaction) + body)


def unpack(raw: memoryview | bytes | None, block: int, path: Path) -> Rows:
    """Return a copy of the rows of one stored block (fewer than `BLOCK` for the last one).

    Raises
    ------
    CorruptionError
        If it does not match its checksum, or is none of that block.
    """
    if raw is None:
        return np.zeros(0, ROW)
    body = bytes(raw[_STAMP.size :])
    if len(raw) < _STAMP.size or len(body) % ROW.itemsize or len(body) > BLOCK * ROW.itemsize:
        raise _damaged(block, path, f"has {len(raw)} bytes, no block has")
    transaction, checksum = _STAMP.unpack_from(raw)
    if _sum(block_key(block), transaction, body) != checksum:
        raise _damaged(block, path, "does not match its checksum")
    return np.frombuffer(body, ROW)


def _damaged(block: int, path: Path, why: str) -> CorruptionError:
    return CorruptionError(
        f"the block of rows in {path} of ids {block * BLOCK} to {(block + 1) * BLOCK - 1} {why}; restore the store "
        "from a copy"
    )


def write_rows(txn: lmdb.Transaction, ids: Ids, rows: Rows, path: Path) -> None:
    """Store `rows` under `ids` (ascending, unique) inside a write transaction."""
    blocks, starts = np.unique(ids // BLOCK, return_index=True)
    stops = np.append(starts[1:], len(ids))[: len(starts)]
    for block, start, stop in zip(blocks.tolist(), starts.tolist(), stops.tolist(), strict=True):
        places = ids[start:stop] % BLOCK
        old = unpack(txn.get(block_key(block)), block, path)
        new = np.zeros(max(len(old), int(places[-1]) + 1), ROW)
        new[: len(old)] = old
        new[places] = rows[start:stop]
        body = new.tobytes()
        txn.put(block_key(block), _STAMP.pack(txn.id(), _sum(block_key(block), txn.id(), body)) + body)


class RowCache:
    """Blocks of rows read so far, each known to be current as of some transaction."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.RLock()
        self.clear()

    def renew_lock(self) -> None:
        """Take a fresh lock (in a forked child).

        What another thread was changing when the process forked is read anew.
        """
        undisturbed = self._lock.acquire(blocking=False)
        self._lock = threading.RLock()
        if not undisturbed:
            self.clear()

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._slot = np.full(1, -1, np.int64)
            self._rows = np.zeros((0, BLOCK), ROW)
            self._stamp = np.zeros(0, np.uint64)
            self._checked = np.zeros(0, np.uint64)
            self._used = 0
            # Locators by id, plus 1, of what lives in the blocks that are cached (0: no such record, and zeros that
            # nobody wrote take no memory); and the transaction as of which ALL of those are known to be current.
            self._live = np.zeros(BLOCK, np.uint64)
            self._current = -1

    def locators(self, ids: Ids, transaction: int) -> np.ndarray[Any, np.dtype[np.uint64]] | None:
        """Return the locators of live records, if the cache knows them all as of `transaction`; None: look them up.

        A gather in a busy program finds the processor's caches cold, and then each numpy call takes tens of
        microseconds: so here are three.
        """
        with self._lock:
            if transaction != self._current or len(ids) == 0:
                return None
            try:
                found = self._live.take(ids)
            except IndexError:
                return None
        return found - _ONE if found.min() else None

    def lookup(self, ids: Ids, transaction: int, load: Any) -> Rows:
        """Return the rows of `ids` as of `transaction` or later.

        Parameters
        ----------
        ids
            int64 [n], not negative.
        transaction
            Number of the last committed transaction.
        load
            Context manager factory that yields ``(transaction number, get(block) -> stored bytes | None)`` of one read
            transaction.
        """
        blocks = ids // BLOCK
        with self._lock:
            slots = self._slots(blocks)
            if (slots < 0).any() or (self._checked[slots] < transaction).any():
                self._refresh(np.unique(blocks), load)
                slots = self._slots(blocks)
            if (slots < 0).any():  # blocks that nobody ever wrote: ids from the moon must not grow the cache
                found = slots >= 0
                rows = np.zeros(len(ids), ROW)
                rows[found] = self._rows[slots[found], ids[found] % BLOCK]
                return rows
            found_rows: Rows = self._rows[slots, ids % BLOCK]
            return found_rows

    def _slots(self, blocks: Ids) -> np.ndarray[Any, np.dtype[np.int64]]:
        known = blocks < len(self._slot)
        if known.all():
            return self._slot[blocks]
        return np.where(known, self._slot[np.where(known, blocks, 0)], -1)

    def _refresh(self, blocks: Ids, load: Any) -> None:
        try:
            self._read(blocks, load)
        except BaseException:  # an interrupt, a damaged block: what is half read must not be taken for what is there
            self.clear()
            raise

    def _read(self, blocks: Ids, load: Any) -> None:
        if self._used + len(blocks) > _CACHED_BLOCKS:
            self.clear()
        if self._used <= _CHECKED_TOGETHER:
            blocks = np.union1d(blocks, np.flatnonzero(self._slot >= 0))
        every = np.count_nonzero(self._slot[blocks[blocks < len(self._slot)]] >= 0) == self._used
        with load() as (number, get):
            self._current = -1
            for block in blocks.tolist():
                raw = get(block)
                if raw is None:
                    continue
                slot = int(self._slot[block]) if block < len(self._slot) else -1
                stamp = _STAMP.unpack_from(raw)[0] if len(raw) >= _STAMP.size else -1
                if slot >= 0 and stamp == self._stamp[slot]:
                    self._checked[slot] = number
                    continue
                rows = unpack(raw, block, self._path)
                if slot < 0:
                    slot = self._add(block)
                self._rows[slot, : len(rows)] = rows
                self._rows[slot, len(rows) :] = np.zeros((), ROW)
                live = self._rows[slot]["state"] == LIVE
                self._live[block * BLOCK : (block + 1) * BLOCK] = np.where(live, self._rows[slot]["locator"] + _ONE, 0)
                self._stamp[slot], self._checked[slot] = stamp, number
            self._current = number if every else -1

    def _add(self, block: int) -> int:
        if block >= len(self._slot):
            grown = np.full(max(block + 1, 2 * len(self._slot)), -1, np.int64)
            grown[: len(self._slot)] = self._slot
            live = np.zeros(len(grown) * BLOCK, np.uint64)
            for known in np.flatnonzero(self._slot >= 0).tolist():
                part = slice(known * BLOCK, (known + 1) * BLOCK)
                live[part] = self._live[part]
            self._slot, self._live = grown, live
        if self._used == len(self._rows):
            capacity = max(4, 2 * self._used)
            self._rows = np.concatenate([self._rows, np.zeros((capacity - self._used, BLOCK), ROW)])
            more = np.zeros(capacity - self._used, np.uint64)
            self._stamp = np.concatenate([self._stamp, more])
            self._checked = np.concatenate([self._checked, more])
        self._slot[block] = self._used
        self._used += 1
        return self._used - 1
