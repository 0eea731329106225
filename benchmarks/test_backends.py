"""All backends on the same 64-record gathers, on tmpfs and on a disk, and what else one chooses them by.

Run: ``make bench BENCH_ARGS=benchmarks/test_backends.py``

Records look like attention probabilities (rows of a softmax, float16), so that what compresses them has something to
do. Beside each gather: GB/s of a put (with checksums and flushes, the store closed at the end), milliseconds to open
and close it, bytes on the store for each byte of a record. On the disk everything was written shortly before: gathers
find it in the page cache. "zarr itself" reads the array of the backend zarr: by ``oindex``, and row by row into warm
memory, which is its quicker way.
"""

from __future__ import annotations

import shutil
import time
from statistics import median

import numpy as np
import pytest

import memodb
from benchmarks.clock import hand_over, take_turns, timed_gather
from benchmarks.profiles import chosen
from benchmarks.race import scratch

N = 64
PLAIN, ROWS = "zarr itself, oindex", "zarr itself, row by row"
#: Name -> (backend, its options).
KINDS: dict[str, tuple[str, dict]] = {
    "arena": ("arena", {}),
    "files": ("files", {}),
    "memory": ("memory", {}),
    "lmdb": ("lmdb", {}),
    "zarr": ("zarr", {}),
    "zarr, not compressed": ("zarr", {"codec": "none"}),
    "zarr, 8 records a shard": ("zarr", {"shard_records": 8}),
}
NAMES = ("floor", *KINDS, ROWS, PLAIN)


def attention_like(n: int, length: int) -> np.ndarray:
    """Return records [n, 12, length, length] float16 whose rows are probabilities; no two are alike."""
    logits = np.random.default_rng(0).standard_normal((4, 12, length, length), dtype=np.float32) * 3
    rows = np.exp(logits - logits.max(axis=-1, keepdims=True))
    few = (rows / rows.sum(axis=-1, keepdims=True)).astype(np.float16)
    values = np.empty((n, *few.shape[1:]), np.float16)
    for i in range(n):
        values[i] = np.roll(few[i % 4], i, axis=1)
    return values


class Stores:
    """One store of each kind with the same records, and what making them cost."""

    def __init__(self, folder, where, length, profile):
        self.folder, self.values = folder, attention_like(2 * N, length)
        self.facts = {name: {} for name in NAMES}
        for name, (backend, options) in KINDS.items():
            if backend == "memory" and where == "disk":
                continue
            seconds = [self._put(name, backend, options) for _ in range(profile.puts)]
            with memodb.MemoDB.open(folder / name) as db:
                stats = db.stats()
                facts = {
                    "put_gb_per_second": self.values.nbytes / median(seconds) / 1e9,
                    "bytes_per_byte": stats["bytes_on_store"] / stats["bytes_logical"],
                    "huge_share": stats["huge_page_share"],
                }
            self.facts[name] = {**facts, "open_ms": median(self._open(name) for _ in range(9)) * 1e3}

    def _put(self, name, backend, options):
        shutil.rmtree(self.folder / name, ignore_errors=True)
        np.ones(self.values.nbytes + (64 << 20), np.uint8)  # see test_put.py
        start = time.perf_counter()
        with memodb.MemoDB.create(
            self.folder / name, shape=self.values.shape[1:], dtype="float16", backend=backend, **options
        ) as db:
            for at in range(0, len(self.values), N // 2):
                db.put(self.values[at : at + N // 2])
        return time.perf_counter() - start

    def _open(self, name):
        start = time.perf_counter()
        memodb.MemoDB.open(self.folder / name).close()
        return time.perf_counter() - start

    def race(self, profile):
        """Let them take turns; every one of them is checked once."""
        import zarr

        warm = self.values[:N].copy()
        open_stores = {name: memodb.MemoDB.open(self.folder / name) for name in KINDS if self.facts[name]}
        array = zarr.open_array(self.folder / "zarr" / "values", mode="r")
        gathers = {name: db.multiget_mapped for name, db in open_stores.items()}

        def row_by_row(ids):
            for place, i in enumerate(ids.tolist()):
                rows[place] = array[i]
            return rows

        rows = np.zeros_like(warm)
        gathers |= {"floor": lambda ids: warm, PLAIN: lambda ids: array.oindex[ids], ROWS: row_by_row}
        rng = np.random.default_rng(1)
        ids = rng.choice(2 * N, N, replace=False)
        for name, gather in gathers.items():
            assert name == "floor" or np.array_equal(np.asarray(gather(ids)), self.values[ids]), name
        samples = take_turns(
            {name: timed_gather(gather) for name, gather in gathers.items()},
            lambda: rng.choice(2 * N, N, replace=False),
            rounds=profile.rounds,
            seconds=profile.seconds * 4,
            least=profile.least,
        )
        for db in open_stores.values():
            db.close()
        return samples


CASES = [(where, length) for length in chosen().backend_lengths for where in ("tmpfs", "disk")]


@pytest.fixture(scope="module", params=CASES, ids=str)
def race(request, profile):
    where, length = request.param
    with scratch("warm" if where == "tmpfs" else "cold") as folder:
        stores = Stores(folder, where, length, profile)
        return where, length, stores.facts, stores.race(profile)


@pytest.mark.parametrize("name", NAMES)
def test_backends(benchmark, race, name):
    where, length, facts, samples = race
    if name not in samples:
        pytest.skip("a backend in memory is on no disk")
    benchmark.group = f"{N} x 12x{length}x{length} float16 on {where}"
    hand_over(benchmark, samples[name], contender=name, where=where, length=length, **facts[name])
