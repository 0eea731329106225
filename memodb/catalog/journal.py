"""The keys, as a log per namespace that an index follows: what was added, what was deleted, in commit order.

One entry is one LMDB value under (namespace, sequence number)::

    kind (1 byte: A added, D deleted) | CRC-32C of the rest (4) | count (4) | mark (8) | ids int64[count] |
    keys float32[count, key_dim] (A only)

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

from memodb.catalog.tables import JOURNAL, scan
from memodb.checksum import crc32c
from memodb.errors import CorruptionError

ADDED, DELETED = b"A", b"D"
_HEAD = struct.Struct("<cIIQ")
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
    txn.put(JOURNAL + _KEY.pack(namespace, sequence), _HEAD.pack(kind, crc32c(body), len(ids), mark) + body)


def read_mark(txn: lmdb.Transaction, namespace: int, sequence: int) -> int | None:
    """Return the mark of an entry, None if there is no such entry."""
    raw = txn.get(JOURNAL + _KEY.pack(namespace, sequence))
    return None if raw is None or len(raw) < _HEAD.size else int(_HEAD.unpack_from(raw)[3])


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
        found, sequence = _KEY.unpack(raw_key)
        if found != namespace:
            return
        if within is not None and not _overlaps(raw, within):
            continue
        yield _decode(bytes(raw), sequence, key_dim, f"namespace {namespace}, entry {sequence} of {path}")


def _overlaps(raw: memoryview | bytes, within: tuple[int, int]) -> bool:
    # Ids of an entry ascend, so its first and last tell; what is too damaged to tell is read, and then complained
    # about.
    try:
        count = _HEAD.unpack_from(raw)[2]
        if count == 0:
            return False
        first = struct.unpack_from("<q", raw, _HEAD.size)[0]
        last = struct.unpack_from("<q", raw, _HEAD.size + 8 * (count - 1))[0]
    except struct.error:
        return True
    return bool(first <= within[1] and last >= within[0])


def _decode(raw: bytes, sequence: int, key_dim: int, where: str) -> Entry:
    try:
        kind, checksum, count, mark = _HEAD.unpack_from(raw)
        body = memoryview(raw)[_HEAD.size :]
        if crc32c(body) != checksum:
            raise ValueError("its checksum does not match")
        ids = np.frombuffer(body, "<i8", count).astype(np.int64)
        if kind == DELETED:
            return Entry(sequence, mark, ids, None)
        keys = np.frombuffer(body, "<f4", offset=8 * count).astype(np.float32).reshape(count, key_dim)
    except (struct.error, ValueError) as error:
        raise CorruptionError(f"the keys in {where} are damaged: {error}") from error
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
