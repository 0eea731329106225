"""Does "auto" choose well? Timed beside "map" and "copy": records of 4 KiB to 50 MB, batches of 1 to 1,024.

Run: ``make bench BENCH_ARGS=benchmarks/test_auto.py``

Once with huge pages and once without; timed is gather + one full read + release. ``auto_over_best`` is auto against the
better of the two, as measured, and what the target is about. ``choice_over_best`` puts the strategy that auto chose in
auto's place: where only the first is large, noise spoke.
"""

from __future__ import annotations

import shutil

import numpy as np
import pytest

import memodb
from benchmarks.clock import hand_over, take_turns, timed_gather
from benchmarks.profiles import MIB, MOST_BATCH, chosen

STRATEGIES = ("auto", "map", "copy")


def _cells():
    profile = chosen()
    for huge in profile.grid_pages:
        for nbytes in profile.grid_sizes:
            for n in sorted({min(n, MOST_BATCH // nbytes) for n in profile.grid_batches}):
                yield huge, nbytes, n


class Stores:
    """Keeps one store at a time: cells of the same records share it."""

    def __init__(self, folder) -> None:
        self._path = folder / "auto"
        self._key = self._db = None

    def get(self, huge: bool, nbytes: int) -> memodb.MemoDB:
        """Return a store of such records, as large as their largest batch, and at least 256 MiB."""
        if self._key != (huge, nbytes):
            self.clear()
            profile = chosen()
            largest = min(max(profile.grid_batches) * nbytes, MOST_BATCH)
            stored = max(profile.store_bytes, largest) // nbytes
            self._db = memodb.MemoDB.create(self._path, shape=(nbytes,), dtype="uint8", huge_pages=huge)
            self._key = huge, nbytes
            block = np.ones((min(stored, max(1, 64 * MIB // nbytes)), nbytes), np.uint8)
            for start in range(0, stored, len(block)):
                self._db.put(block[: stored - start])
        return self._db

    def clear(self) -> None:
        """Remove the store."""
        if self._db is not None:
            self._db.close()
            shutil.rmtree(self._path)
        self._key = self._db = None


@pytest.fixture(scope="module")
def stores(shm):
    made = Stores(shm)
    yield made
    made.clear()


CELLS = list(_cells())


@pytest.mark.parametrize(
    ("huge", "nbytes", "n"),
    CELLS,
    ids=[f"{'huge' if huge else 'small'} pages, {n} x {nbytes} B" for huge, nbytes, n in CELLS],
)
def test_auto(benchmark, stores, huge, nbytes, n, profile):
    store = stores.get(huge, nbytes)
    strategies = STRATEGIES
    try:
        store.multiget_mapped([0], strategy="map").release()
        store.multiget_mapped(np.arange(n), strategy="map").release()
    except memodb.MappingUnsupportedError:
        strategies = ("auto", "copy")
    ways = {s: timed_gather(lambda ids, s=s: store.multiget_mapped(ids, strategy=s)) for s in strategies}
    rng = np.random.default_rng(0)
    samples = take_turns(
        ways,
        lambda: rng.choice(len(store), n, replace=False),
        # A cell of a few microseconds needs many rounds, and has the time for them.
        rounds=5 * profile.rounds,
        seconds=profile.seconds / 2,
        least=profile.least,
    )
    with store.multiget_mapped(rng.choice(len(store), n, replace=False)) as batch:
        chose = "map" if batch.zero_copy else "copy"
    medians = {name: found.median() * 1e3 for name, found in samples.items()}
    best = min(medians[s] for s in strategies[1:])
    benchmark.group = f"auto, {'huge' if huge else 'small'} pages"
    hand_over(
        benchmark,
        samples["auto"],
        contender=f"{n} x {nbytes} B",
        record_bytes=nbytes,
        n=n,
        huge_pages=huge,
        chose=chose,
        map_ms=medians.get("map"),
        copy_ms=medians["copy"],
        auto_over_best=medians["auto"] / best,
        choice_over_best=medians[chose] / best,
    )
