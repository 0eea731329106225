"""The keys, as a log per namespace that an index follows: what was added, what was deleted, in commit order.

One entry is one LMDB value under (namespace, sequence number)::

    kind (1 byte: A added, D deleted) | count (4) | mark (8) | CRC-32C of the body (4) |
    CRC-32C of the key and of what stands here so far (4) | body: ids int64[count], ascending |
    keys float32[count, key_dim] (A only)

Two checksums, so that the head can be believed without reading the keys of a large entry.

The mark is drawn at random when the entry is made and stays with it. An index remembers the mark of the last entry that
it knows, so an index of another history (a store put back to an earlier day and written on) is told from this one's.
"""

from __future__ import annotations

import secrets
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lmdb
import numpy as np

from memodb.catalog.tables import JOURNAL, damaged, scan
from memodb.checksum import crc32c
from memodb.errors import CorruptionError

ADDED, DELETED = b"A", b"D"
_HEAD, _SUM = struct.Struct("<cIQI"), struct.Struct("<I")
_BODY = _HEAD.size + _SUM.size
_KEY = struct.Struct(">IQ")


@dataclass(frozen=True)
class Entry:
    """One entry of a namespace's journal: `keys` is float32 [n, key_dim] for additions, None for deletions."""

    sequence: int
    mark: int
    ids: np.ndarray[Any, np.dtype[np.int64]]
    keys: np.ndarray[Any, np.dtype[np.float32]] | None


def write_entry(
    txn: lmdb.Transaction,
    namespace: int,
    sequence: int,
    ids: np.ndarray[Any, np.dtype[np.int64]],
    keys: np.ndarray[Any, np.dtype[np.float32]] | None,
    mark: int | None = None,
) -> None:
    """Store one entry, with a mark of its own unless it takes the place of one that has one."""
    body = ids.astype("<i8").tobytes() + (b"" if keys is None else keys.astype("<f4").tobytes())
    kind = DELETED if keys is None else ADDED
    mark = secrets.randbits(64) if mark is None else mark
    key = JOURNAL + _KEY.pack(namespace, sequence)
    head = _HEAD.pack(kind, len(ids), mark, crc32c(body))
    txn.put(key, head + _SUM.pack(crc32c(key + head)) + body)


def _head(raw: memoryview | bytes, key: bytes, key_dim: int) -> tuple[bytes, int, int, int]:
    """Return kind, count, mark and the body's checksum; raise ValueError if they are not what was written there."""
    head = bytes(raw[: _HEAD.size])
    if len(raw) < _BODY or _SUM.unpack_from(raw, _HEAD.size)[0] != crc32c(key + head):
        raise ValueError("the checksum of its head does not match")
    kind, count, mark, checksum = _HEAD.unpack(head)
    expected = 8 * count if kind == DELETED else (8 + 4 * key_dim) * count
    if kind not in (ADDED, DELETED) or len(raw) != _BODY + expected:
        raise ValueError(f"kind {kind!r}, {count} keys in {len(raw) - _BODY} bytes, expected {expected}")
    return kind, count, mark, checksum


def read_mark(txn: lmdb.Transaction, namespace: int, sequence: int, key_dim: int) -> int | None:
    """Return the mark of an entry, None if there is no such entry, or it is damaged."""
    key = JOURNAL + _KEY.pack(namespace, sequence)
    raw = txn.get(key)
    if raw is None:
        return None
    try:
        return _head(raw, key, key_dim)[2]
    except ValueError:
        return None


def read_entries(
    txn: lmdb.Transaction,
    namespace: int,
    after: int,
    key_dim: int,
    path: Path,
    within: tuple[int, int] | None = None,
) -> Iterator[Entry]:
    """Yield the entries of `namespace` whose sequence number is greater than `after`, in order.

    Parameters
    ----------
    within
        Smallest and largest id of interest: entries beside that range are passed over unread.

    Raises
    ------
    CorruptionError
        If an entry does not match its checksum.
    """
    for raw_key, raw in scan(txn, JOURNAL, _KEY.pack(namespace, after + 1)):
        if len(raw_key) != _KEY.size:
            raise damaged(JOURNAL + raw_key, path, f"its key has {len(raw_key)} bytes, expected {_KEY.size}")
        found, sequence = _KEY.unpack(raw_key)
        if found != namespace:
            return
        try:
            head = _head(raw, JOURNAL + raw_key, key_dim)
            if within is None or _overlaps(raw, head[1], within):
                yield _decode(raw, head, sequence, key_dim)
        except ValueError as error:
            raise CorruptionError(
                f"the keys in namespace {namespace}, entry {sequence} of {path} are damaged: {error}; restore the "
                "store from a copy"
            ) from error


def _overlaps(raw: memoryview | bytes, count: int, within: tuple[int, int]) -> bool:
    # Ids of an entry ascend, so its first and last tell.
    if count == 0:
        return False
    first = struct.unpack_from("<q", raw, _BODY)[0]
    last = struct.unpack_from("<q", raw, _BODY + 8 * (count - 1))[0]
    return bool(first <= within[1] and last >= within[0])


def _decode(raw: memoryview | bytes, head: tuple[bytes, int, int, int], sequence: int, key_dim: int) -> Entry:
    kind, count, mark, checksum = head
    body = bytes(raw[_BODY:])
    if crc32c(body) != checksum:
        raise ValueError("its checksum does not match")
    ids = np.frombuffer(body, "<i8", count).astype(np.int64)
    if count and (ids[0] < 0 or (np.diff(ids) <= 0).any()):
        raise ValueError("its ids do not ascend")
    if kind == DELETED:
        return Entry(sequence, mark, ids, None)
    keys = np.frombuffer(body, "<f4", offset=8 * count).astype(np.float32).reshape(count, key_dim)
    return Entry(sequence, mark, ids, keys)


def drop_keys(
    txn: lmdb.Transaction,
    namespace: int,
    dead: np.ndarray[Any, np.dtype[np.int64]],
    key_dim: int,
    path: Path,
) -> None:
    """Take the keys of `dead` ids out of a namespace's additions.

    Deletions stay, because an index that lags must still learn of them, and so do emptied additions, because an index
    may remember their marks.
    """
    for entry in list(read_entries(txn, namespace, 0, key_dim, path)):
        if entry.keys is None:
            continue
        gone = np.isin(entry.ids, dead)
        if gone.any():
            write_entry(txn, namespace, entry.sequence, entry.ids[~gone], entry.keys[~gone], entry.mark)
