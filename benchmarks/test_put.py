"""Put: memodb, with checksums, beside plain ways to write the same bytes to a fresh file on /dev/shm.

Run: ``make bench BENCH_ARGS=benchmarks/test_put.py``

On the clock: making the store or file, writing, and closing it; not its removal. ``write(2)`` keeps no checksums and
no records; every byte of it is one copy into fresh pages.

Before every turn, off the clock and for all alike, as much memory is touched and freed again. In a virtual machine
whose hypervisor takes free memory back (page reporting, in blocks of 2 MiB and more), the first to touch a block waits
for it to be given again, 4 times as long as the whole write takes; who that is depends on the order of the turns.
"""

from __future__ import annotations

import shutil

import numpy as np
import pytest

import memodb
from benchmarks.clock import hand_over, take_turns, timed

SHAPE = (12, 512, 512)
NBYTES = 2 * 12 * 512 * 512
NAMES = ("np.memmap", "memodb, one put", "memodb, 8 records a put", "write(2)")


@pytest.fixture(scope="module")
def race(shm, profile):
    n = max(1, round(profile.put_bytes / NBYTES))
    values = np.random.default_rng(0).integers(0, 15_000, (n, *SHAPE), dtype=np.uint16).view(np.float16)
    path = shm / "put"

    def put(step):
        with memodb.MemoDB.create(path, shape=SHAPE, dtype="float16") as db:
            for start in range(0, n, step):
                db.put(values[start : start + step])

    def memmap():
        file = np.memmap(path, np.float16, mode="w+", shape=values.shape)
        file[:] = values
        file.flush()

    def write():
        with path.open("wb", buffering=0) as file:
            rest = memoryview(values).cast("B")
            while rest:
                rest = rest[file.write(rest) :]

    ways = {
        "memodb, one put": timed(lambda _: put(n)),
        "memodb, 8 records a put": timed(lambda _: put(8)),
        "np.memmap": timed(lambda _: memmap()),
        "write(2)": timed(lambda _: write()),
    }

    def clear(_=None):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        np.ones(n * NBYTES + (256 << 20), np.uint8)

    try:
        rounds = 2 * profile.least + 1
        return n * NBYTES, take_turns(ways, lambda: None, rounds=rounds, seconds=0, least=rounds, before=clear)
    finally:
        clear()


@pytest.mark.parametrize("name", NAMES)
def test_put(benchmark, race, name):
    nbytes, samples = race
    benchmark.group = f"put of {nbytes / 2**30:.2f} GiB on tmpfs"
    seconds = samples[name].median()
    hand_over(benchmark, samples[name], contender=name, bytes=nbytes, gb_per_second=nbytes / seconds / 1e9)
