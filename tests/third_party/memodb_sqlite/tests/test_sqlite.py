"""The whole of what a third party writes to test its backend."""

import os
import sqlite3
from contextlib import closing

from hypothesis import HealthCheck, settings

from memodb.testing import BackendTests, StoreMachine


class TestSqlite(BackendTests):
    backend = "sqlite"

    def raw(self, path, number):
        with closing(sqlite3.connect(path / "values" / "values.db")) as db:
            return db.execute("SELECT value FROM records WHERE number = ?", (number,)).fetchone()[0]

    def damage(self, path, record, at):
        changed = bytearray(record.tobytes())
        changed[at] ^= 1
        with closing(sqlite3.connect(path / "values" / "values.db")) as db, db:
            return db.execute("UPDATE records SET value = ? WHERE value = ?", (changed, record.tobytes())).rowcount == 1


class SqliteMachine(StoreMachine):
    backend = "sqlite"


TestSqliteMachine = SqliteMachine.TestCase
TestSqliteMachine.settings = settings(
    max_examples=int(os.environ.get("MEMODB_EXAMPLES", "15")),
    stateful_step_count=30,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
