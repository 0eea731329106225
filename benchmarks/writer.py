"""The other process of `test_writer`: writes so many bytes a second while it is told to, and tells how many it wrote.

Started by the benchmark: ``python -m benchmarks.writer memodb|memmap PATH BYTES_PER_SECOND``. Lines on stdin: ``go``,
``stop`` (answered with one line of JSON), ``clear`` (answered with an empty line: what was written is gone); the end of
stdin ends it.
"""

from __future__ import annotations

import json
import os
import select
import sys
import time
from pathlib import Path

import numpy as np

import memodb

SHAPE = (12, 512, 512)
NBYTES = 2 * 12 * 512 * 512
#: Records written at once.
BLOCK = 4
#: Records of a plain file; then it begins anew.
ROOM = 256


class StoreWriter:
    """Puts into the store that is gathered from."""

    def __init__(self, path: Path) -> None:
        self._db = memodb.MemoDB.open(path, "r+")
        self._ids: list[np.ndarray] = []

    def write(self, values: np.ndarray) -> None:
        self._ids.append(self._db.put(values))

    def clear(self) -> None:
        if self._ids:
            self._db.delete(np.concatenate(self._ids))
            self._db.compact()
            self._ids.clear()

    def close(self) -> None:
        self.clear()
        self._db.close()


class MemmapWriter:
    """Writes a fresh plain file through np.memmap."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: np.memmap | None = None
        self._at = 0

    def write(self, values: np.ndarray) -> None:
        if self._file is None or self._at + len(values) > ROOM:
            self.clear()
            self._file = np.memmap(self._path, np.float16, mode="w+", shape=(ROOM, *SHAPE))
        self._file[self._at : self._at + len(values)] = values
        self._at += len(values)

    def clear(self) -> None:
        self._file, self._at = None, 0
        self._path.unlink(missing_ok=True)

    close = clear


def write_paced(writer: StoreWriter | MemmapWriter, values: np.ndarray, per_second: float) -> dict[str, float]:
    """Write block after block, none ahead of its time, until a line comes in."""
    period = values.nbytes / per_second
    blocks, busy, start = 0, 0.0, time.perf_counter()
    while True:
        wait = max(0.0, start + blocks * period - time.perf_counter())
        if select.select([sys.stdin], [], [], wait)[0]:
            break
        begin = time.perf_counter()
        writer.write(values)
        busy += time.perf_counter() - begin
        blocks += 1
    return {"bytes": blocks * values.nbytes, "seconds": time.perf_counter() - start, "busy_seconds": busy}


def main() -> None:
    """Obey stdin, which is read unbuffered: select(2) must see what was not read yet."""
    kind, path, per_second = sys.argv[1:]
    writer = (StoreWriter if kind == "memodb" else MemmapWriter)(Path(path))
    values = np.random.default_rng(1).integers(0, 15_000, (BLOCK, *SHAPE), dtype=np.uint16).view(np.float16)
    with os.fdopen(0, "rb", buffering=0) as commands:
        sys.stdin = commands  # type: ignore[assignment]
        while command := commands.readline().strip():
            if command == b"go":
                done = write_paced(writer, values, float(per_second))
                commands.readline()  # "stop"
                print(json.dumps(done), flush=True)
            else:
                writer.clear()
                print(flush=True)
    writer.close()


if __name__ == "__main__":
    main()
