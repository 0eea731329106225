"""The tables of the catalog: ranges of one LMDB tree, told apart by the first byte of the key.

Not LMDB's named databases: py-lmdb opens those for good in a writing transaction only, so a reader that opens a store
would wait for the writer.

Small values (settings, counters, names, counts, the backend's state) are *sealed*: ``CRC-32C of key and rest (4) |
rest``. With the key, so that a value in the wrong place is noticed as well.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lmdb

from memodb.checksum import crc32c
from memodb.errors import CorruptionError

META, BLOCKS, NAMES, COUNTS, JOURNAL = b"m", b"b", b"n", b"c", b"j"

SETTINGS, COUNTERS, BACKEND = META + b"settings", META + b"counters", META + b"backend"

_WHAT = {
    SETTINGS: "the settings",
    COUNTERS: "the counters",
    BACKEND: "the backend's state",
    NAMES: "the name of a namespace",
    COUNTS: "the counts of a namespace",
}
_SEAL = struct.Struct("<I")


def scan(txn: lmdb.Transaction, table: bytes, after: bytes = b"") -> Iterator[tuple[bytes, memoryview | bytes]]:
    """Yield (key without its table, value) of a table in order, from the first key not below `after`.

    Values are buffers that die with the transaction.
    """
    cursor = txn.cursor()
    if not cursor.set_range(table + after):
        return
    for raw_key, value in cursor:
        key = bytes(raw_key)
        if key[:1] != table:
            return
        yield key[1:], value


def seal(key: bytes, value: bytes) -> bytes:
    """Return what to store for `value` under `key`."""
    return _SEAL.pack(crc32c(key + value)) + value


def unseal(key: bytes, raw: memoryview | bytes, path: Path) -> bytes:
    """Return the value that was sealed.

    Raises
    ------
    CorruptionError
        If it does not match its checksum.
    """
    value = bytes(raw[_SEAL.size :])
    if len(raw) < _SEAL.size or _SEAL.unpack_from(raw)[0] != crc32c(key + value):
        raise damaged(key, path, "its checksum does not match")
    return value


def damaged(key: bytes, path: Path, why: object) -> CorruptionError:
    """Return the error of a small value that cannot be used."""
    what = _WHAT.get(key) or _WHAT.get(key[:1]) or "a value"
    return CorruptionError(f"{what} in {path} (key {key[:60]!r}): {why}; restore the store from a copy")


def fields(layout: struct.Struct, key: bytes, raw: memoryview | bytes, path: Path) -> tuple[Any, ...]:
    """Return the fields of a sealed value of fixed size.

    Raises
    ------
    CorruptionError
        If it does not match its checksum, or has another size.
    """
    value = unseal(key, raw, path)
    if len(value) != layout.size:
        raise damaged(key, path, f"{len(value)} bytes, expected {layout.size}")
    return layout.unpack(value)


def number_in(layout: struct.Struct, table: bytes, key: bytes, path: Path) -> int:
    """Return the number that the key of a table's entry is.

    Raises
    ------
    CorruptionError
        If it has another size.
    """
    if len(key) != layout.size:
        raise damaged(table + key, path, f"its key has {len(key)} bytes, expected {layout.size}")
    return int(layout.unpack(key)[0])
