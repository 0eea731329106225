"""Damaged copies of a store, each judged in a process of its own: a signal or a hang is a result, not the run's end.

A `Court` is a child process that imported everything and forks for each case (see judge.py). A test says what harm is
done to which file; what comes back tells what a reader, and then a writer, saw.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import memodb

JUDGE = Path(__file__).with_name("judge.py")
#: No verdict within this time is a hang of the court itself; each case has a shorter alarm of its own.
SECONDS = 180
SHAPE = (1024,)
KEY_DIM = 8
RECORDS, DELETED = 14, (2, 9)
NAMES = ("layer=0", "layer=1")

#: Backend -> options under which a handful of records makes several files.
STORES: dict[str, dict[str, Any]] = {
    "arena": {"backend": "arena", "segment_bytes": 20_480, "durability": "relaxed"},
    "files": {"backend": "files", "durability": "relaxed"},
    "lmdb": {"backend": "lmdb", "durability": "none", "map_bytes": 1 << 20},
    "zarr": {"backend": "zarr", "durability": "relaxed"},
    "zarr-shards": {"backend": "zarr", "durability": "relaxed", "chunk_records": 1, "shard_records": 4},
    "zarr-blosc": {"backend": "zarr", "durability": "relaxed", "codec": "blosc", "chunk_records": 2},
    "zarr-none": {"backend": "zarr", "durability": "relaxed", "codec": "none"},
}


def records(n: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """Return records that compress a little, so that chunks have structure to damage."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 100, (n, *SHAPE)).astype(np.float32)


def keys(n: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(1000 + seed).standard_normal((n, KEY_DIM)).astype(np.float32)


def build(at: Path, seed: int = 0, **settings: Any) -> Path:
    """Make a sound store, with what has to come out of it beside it (``.npz``), and return its path."""
    values, vectors = records(RECORDS, seed), keys(RECORDS, seed)
    names = [NAMES[i % 2] for i in range(RECORDS)]
    with memodb.MemoDB.create(at, shape=SHAPE, dtype="float32", key_dim=KEY_DIM, **settings) as db:
        for part in (slice(0, 5), slice(5, 8), slice(8, RECORDS)):
            db.put(values[part], vectors[part], namespace=names[part])
        db.delete(DELETED)
    live = np.setdiff1d(np.arange(RECORDS), DELETED)
    np.savez(at.with_suffix(".npz"), ids=live, values=values[live], keys=vectors[live], names=np.array(names)[live])
    return at


def files(store: Path) -> list[str]:
    """Return the files of a store that hold something: not the locks."""
    found = (file for file in sorted(store.rglob("*")) if file.is_file())
    return [os.fspath(file.relative_to(store)) for file in found if file.name not in ("lock.mdb", "writer.lock")]


@dataclass
class Verdict:
    """What one damaged copy came to.

    Parameters
    ----------
    harm
        What was done.
    outcome
        "right", "named" (by verify), "refused" (an error of memodb's); or "wrong", "signal ...", "hang", "error ...".
    error, ids, notes
        Type of the error, records that verify named, what is to be told of it.
    """

    harm: Any
    outcome: str
    error: str = ""
    ids: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def acceptable(self) -> bool:
        return self.outcome in ("right", "named", "refused")


class Court:
    """Judges damaged copies of stores."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        command = [sys.executable, "-W", "ignore", str(JUDGE), str(folder)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.buffer = b""

    def judge(self, store: Path, *harm: dict[str, Any], writer: bool = False) -> Verdict:
        """Return the verdict on a copy of `store` that all of `harm` was done to."""
        assert self.process.stdin
        assert self.process.stdout
        case = {"store": os.fspath(store), "harm": harm, "writer": writer}
        self.process.stdin.write(json.dumps(case).encode() + b"\n")
        self.process.stdin.flush()
        while b"\n" not in self.buffer:
            ready, _, _ = select.select([self.process.stdout], [], [], SECONDS)
            assert ready, f"no verdict on {harm} within {SECONDS} s"
            read = os.read(self.process.stdout.fileno(), 1 << 16)
            assert read, f"the court ended with status {self.process.wait()} over {harm}"
            self.buffer += read
        line, _, self.buffer = self.buffer.partition(b"\n")
        return Verdict(harm, **json.loads(line))

    def all(self, store: Path, harms: Iterable[dict[str, Any]], *, writer: bool = False) -> list[Verdict]:
        """Return the verdicts on copies of `store`, one for each harm."""
        return [self.judge(store, harm, writer=writer) for harm in harms]

    def close(self) -> None:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(SECONDS)


@contextmanager
def court() -> Iterator[Court]:
    """Hold a court with a folder of its own for copies, in memory where there is such."""
    shm = Path("/dev/shm")
    parent = shm if os.access(shm, os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix=f"memodb-test-{os.getpid()}-", dir=parent))
    made = Court(folder / "court")
    try:
        yield made
    finally:
        made.close()
        shutil.rmtree(folder)


def require(verdicts: Iterable[Verdict]) -> list[Verdict]:
    """Fail with what is not acceptable; return all verdicts."""
    verdicts = list(verdicts)
    assert verdicts, "nothing was judged"
    bad = [verdict for verdict in verdicts if not verdict.acceptable]
    shown = "\n".join(f"{v.harm}: {v.outcome} {v.error} {v.notes}" for v in bad[:12])
    assert not bad, f"{len(bad)} of {len(verdicts)} damaged stores were not told of as they should:\n{shown}"
    return verdicts


def tally(verdicts: Iterable[Verdict]) -> dict[str, int]:
    """Return how many verdicts there are of each outcome."""
    counts: dict[str, int] = {}
    for verdict in verdicts:
        counts[verdict.outcome] = counts.get(verdict.outcome, 0) + 1
    return counts
