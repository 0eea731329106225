"""A read transaction of LMDB's that checks pages before LMDB follows them, where not all were checked yet."""

from __future__ import annotations

from typing import Any, Self

import lmdb

from memodb.lmdb_guard import PageGuard
from memodb.lmdb_meta import Meta


class Looking:
    """Stands in for an ``lmdb.Transaction`` that reads.

    Parameters
    ----------
    txn
        The transaction.
    pages
        The guard of the file that it reads.
    meta
        What the transaction's meta page says.
    """

    def __init__(self, txn: lmdb.Transaction, pages: PageGuard, meta: Meta) -> None:
        self._txn = txn
        self._pages = pages
        self._meta = meta

    def get(self, key: bytes, default: Any = None) -> Any:
        """Return the value of a key, once the pages on the way to it are checked."""
        self._pages.check_path(self._meta, key)
        return self._txn.get(key, default)

    def cursor(self) -> Any:
        """Return a cursor, once all pages are checked: it may go anywhere."""
        self._pages.check_all(self._meta)
        return self._txn.cursor()

    def id(self) -> int:
        """Return the number of the transaction."""
        return int(self._txn.id())

    def abort(self) -> None:
        """End the transaction."""
        self._txn.abort()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._txn.abort()
