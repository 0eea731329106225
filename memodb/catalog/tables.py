"""The tables of the catalog: ranges of one LMDB tree, told apart by the first byte of the key.

Not LMDB's named databases: py-lmdb opens those for good in a writing transaction only, so a reader that opens a store
would wait for the writer.
"""

from __future__ import annotations

from collections.abc import Iterator

import lmdb

META, BLOCKS, NAMES, COUNTS, JOURNAL = b"m", b"b", b"n", b"c", b"j"

SETTINGS, COUNTERS, BACKEND = META + b"settings", META + b"counters", META + b"backend"


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
