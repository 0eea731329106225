"""memodb records in an SQLite table."""

import sqlite3

import numpy as np

from memodb import StoreFullError
from memodb.backends import KeyedBackend


class SqliteBackend(KeyedBackend):
    """Records as blobs of one table, ``values.db``."""

    name = "sqlite"
    abilities = {"maps": False, "durable": True, "remote": False, "compresses": False}  # noqa: RUF012

    def __init__(self, path, spec, options, *, writable):
        super().__init__(path, spec, options, writable=writable)
        self.connect()

    def connect(self):
        self.db = sqlite3.connect(self.path / "values.db", check_same_thread=False)
        if self.writable:
            self.db.execute("PRAGMA journal_mode = WAL")
            self.db.execute("CREATE TABLE IF NOT EXISTS records (number INTEGER PRIMARY KEY, value BLOB)")

    def write(self, numbers, values):
        rows = ((int(number), value.tobytes()) for number, value in zip(numbers, values))
        try:
            self.db.executemany("INSERT INTO records VALUES (?, ?)", rows)
        except sqlite3.OperationalError as error:
            raise StoreFullError(f"{self.path} has no room for {len(values)} records: {error}") from error

    def read(self, locators, out):
        for row, number in zip(out, locators.tolist()):
            found = self.db.execute("SELECT value FROM records WHERE number = ?", (number,)).fetchone()
            if found is None:
                raise FileNotFoundError(f"record {number} of {self.path}")
            row[:] = np.frombuffer(found[0], np.uint8)

    def erase(self, numbers):
        self.db.executemany("DELETE FROM records WHERE number = ?", ((int(n),) for n in numbers))
        self.db.commit()

    def numbers(self, first):
        found = self.db.execute("SELECT number FROM records WHERE number >= ? ORDER BY number", (first,))
        return np.array([number for (number,) in found], np.uint64)

    def sync(self):
        self.db.commit()

    def after_fork(self):
        super().after_fork()
        self.inherited = self.db  # never closed here: SQLite forbids it
        self.connect()

    def close(self):
        self.db.close()
