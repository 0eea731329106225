"""A reader in another process: ``python -m memodb.testing.reader`` opens stores and reads what it is told to.

One JSON document a line in, one out: ``{"open": path}``, ``{"read": ids, "strategy": name or null}``,
``{"ids": true}``, ``{"close": true}``. An answer is ``{"ok": value}``, or ``{"error": name of the exception, "message":
text}``. Records are answered as the SHA-256 of their bytes.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

import memodb

__all__ = ["OtherProcess", "digest"]


def digest(values: np.ndarray[Any, Any]) -> str:
    """Return the SHA-256 of an array's bytes."""
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()


class OtherProcess:
    """The process, seen from here. It ends with `close`, or when this one does."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "memodb.testing.reader"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, **question: Any) -> Any:
        """Ask, and return the answer.

        Raises
        ------
        memodb.MemoDBError
            The error of memodb that it met, as the class that it was over there.
        RuntimeError
            If it met another one, or is gone.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the reader in the other process ended with status {self._process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            kind = getattr(memodb, answer["error"], RuntimeError)
            raise kind(f"in the other process: {answer['error']}: {answer['message']}")
        return answer["ok"]

    def open(self, path: Path) -> None:
        """Open a store there, instead of the one that was open."""
        self.ask(open=str(path))

    def read(self, ids: list[int], strategy: str | None = None) -> str:
        """Return the digest of records; `strategy` None reads by ``multiget``."""
        return str(self.ask(read=ids, strategy=strategy))

    def ids(self) -> list[int]:
        """Return the ids that it sees."""
        return list(self.ask(ids=True))

    def close_store(self) -> None:
        """Close the store there."""
        self.ask(close=True)

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def _answer(question: dict[str, Any], db: memodb.MemoDB | None) -> tuple[Any, memodb.MemoDB | None]:
    if "open" in question or "close" in question:
        if db is not None:
            db.close()
        return None, memodb.MemoDB.open(question["open"]) if "open" in question else None
    assert db is not None, "no store is open"
    if "ids" in question:
        return db.ids().tolist(), db
    if question["strategy"] is None:
        return digest(db.multiget(question["read"])), db
    with db.multiget_mapped(question["read"], strategy=question["strategy"]) as batch:
        return digest(batch.numpy()), db


def main() -> None:
    """Answer until the input ends."""
    db: memodb.MemoDB | None = None
    for line in sys.stdin:
        try:
            value, db = _answer(json.loads(line), db)
            answer: dict[str, Any] = {"ok": value}
        except Exception as error:
            answer = {"error": type(error).__name__, "message": str(error)}
        print(json.dumps(answer), flush=True)
    if db is not None:
        db.close()


if __name__ == "__main__":
    main()
