"""A gather while another process writes: memodb puts into the same store, or np.memmap writes a plain file.

Run: ``make bench BENCH_ARGS=benchmarks/test_writer.py``

Both writers write the same bytes a second, paced; ``written_mb_per_second`` says what they achieved, ``busy`` the share
of the time that took them. Timed is memodb's gather of 64 x 6.29 MB + one full read + release. The writers take turns,
a few gathers each.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import memodb
from benchmarks.clock import Samples, hand_over, timed_gather
from benchmarks.writer import BLOCK, NBYTES, SHAPE

#: np.memmap manages about 550 MB a second on the machine this was made on.
BYTES_PER_SECOND = 200e6
GATHERS = 10
NAMES = ("no writer", "np.memmap writes", "memodb puts")


class Writer:
    """Another process that writes when told to."""

    def __init__(self, kind: str, path: Path) -> None:
        command = [sys.executable, "-m", "benchmarks.writer", kind, str(path), str(BYTES_PER_SECOND)]
        self._process = subprocess.Popen(
            command, cwd=Path(__file__).parent.parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.bytes = self.seconds = self.busy = 0.0

    def tell(self, command: str) -> None:
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()

    def stop(self) -> None:
        self.tell("stop")
        done = json.loads(self._process.stdout.readline())
        self.bytes += done["bytes"]
        self.seconds += done["seconds"]
        self.busy += done["busy_seconds"]
        self.tell("clear")
        self._process.stdout.readline()

    def close(self) -> None:
        self._process.stdin.close()
        self._process.stdout.read()
        self._process.stdout.close()
        assert self._process.wait(60) == 0


@pytest.fixture(scope="module")
def race(shm, profile):
    n, stored = (64, 128) if profile.name != "tiny" else (4, 8)
    path = shm / "store"
    # Segments as large as what is gathered: what the writer adds lies in others, and clearing it moves nothing.
    with memodb.MemoDB.create(path, shape=SHAPE, dtype="float16", segment_bytes=stored * NBYTES) as made:
        block = np.ones((BLOCK, *SHAPE), np.float16)
        for _ in range(stored // BLOCK):
            made.put(block)
    writers = {"np.memmap writes": Writer("memmap", shm / "written"), "memodb puts": Writer("memodb", path)}
    samples = {name: Samples() for name in NAMES}
    order, shuffle, rng = list(NAMES), random.Random(0), np.random.default_rng(0)
    try:
        with memodb.MemoDB.open(path) as db:
            turn = timed_gather(db.multiget_mapped)
            for number in range(-1, profile.writer_turns):
                shuffle.shuffle(order)
                for name in order:
                    writer = writers.get(name)
                    if writer is not None:
                        writer.tell("go")
                    time.sleep(2 * BLOCK * NBYTES / BYTES_PER_SECOND)  # the writer is under way
                    turns = [turn(rng.choice(stored, n, replace=False)) for _ in range(GATHERS)]
                    if writer is not None:
                        writer.stop()
                    if number >= 0:
                        samples[name].turns += turns
    finally:
        for writer in writers.values():
            writer.close()
    return n, samples, writers


@pytest.mark.parametrize("name", NAMES)
def test_gather_beside_a_writer(benchmark, race, name):
    n, samples, writers = race
    benchmark.group = f"gather of {n} x {NBYTES / 1e6:.2f} MB beside a writer"
    facts = {}
    if name in writers:
        writer = writers[name]
        facts = {
            "written_mb_per_second": writer.bytes / writer.seconds / 1e6,
            "busy": writer.busy / writer.seconds,
        }
    hand_over(benchmark, samples[name], contender=name, **facts)
