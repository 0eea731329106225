"""The other process of the multi-process tests: reads one JSON command a line, answers with one JSON line.

Handles stay open between commands, so that a test can show what a handle opened *before* an event sees after it.
"""

from __future__ import annotations

import json
import sys
import zlib
from typing import Any

import numpy as np

import memodb
from memodb.testing import random_records


class Peer:
    """One handle and the batches it holds."""

    def __init__(self) -> None:
        self.db: Any = None
        self.held: Any = None

    def open(self, path: str, mode: str = "r") -> int:
        self.db = memodb.MemoDB.open(path, mode=mode)
        return len(self.db)

    def close(self) -> None:
        self.db.close()

    def put(self, n: int, seed: int, namespace: str = "", keys: list[list[float]] | None = None) -> list[int]:
        values = random_records(n, self.db.spec.shape, self.db.spec.dtype_name, seed)
        ids: list[int] = self.db.put(
            values, None if keys is None else np.array(keys, np.float32), namespace=namespace
        ).tolist()
        return ids

    def checksum(self, ids: list[int], mapped: bool = False) -> int:
        if not mapped:
            return zlib.crc32(self.db.multiget(ids))
        with self.db.multiget_mapped(ids) as batch:
            return zlib.crc32(batch.numpy())

    def checksums(self, ids: list[int], times: int) -> list[int]:
        """Gather again and again, mapped and copied by turns; return the different checksums that were seen."""
        return sorted({self.checksum(ids, mapped=bool(turn % 2)) for turn in range(times)})

    def hold(self, ids: list[int]) -> int:
        self.held = self.db.multiget_mapped(ids)
        return zlib.crc32(self.held.numpy())

    def held_checksum(self) -> int:
        return zlib.crc32(self.held.numpy())

    def drop(self) -> None:
        self.held.release()
        self.held = None

    def search(self, keys: list[list[float]], k: int = 1, namespace: str = "") -> list[list[int]]:
        found: list[list[int]] = self.db.search(np.array(keys, np.float32), k, namespace=namespace).ids.tolist()
        return found

    def watch(self, path: str, until: str, seed: int) -> dict[str, int]:
        import stamps

        return stamps.watch(path, until, seed)

    def write(self, path: str, until: str) -> int:
        import os

        import stamps

        with memodb.MemoDB.open(path, mode="r+") as db:
            writer = stamps.Writer(db)
            while not os.path.exists(until):
                writer.turn()
            writer.check()
        return writer.turns

    def ids(self) -> list[int]:
        found: list[int] = self.db.ids().tolist()
        return found

    def delete(self, ids: list[int]) -> None:
        self.db.delete(ids)

    def compact(self) -> int:
        returned: int = self.db.compact()
        return returned

    def verify(self) -> list[str]:
        return [problem.message for problem in self.db.verify()]


def main() -> None:
    peer = Peer()
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = getattr(peer, command.pop("verb"))(**command)
        except (memodb.MemoDBError, AssertionError) as error:
            answer = {"error": type(error).__name__, "message": str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
