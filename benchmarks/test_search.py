"""Search of 64 keys of width 128 in an HNSW32 index: memodb beside faiss called directly.

Run: ``make bench BENCH_ARGS=benchmarks/test_search.py``

"faiss, same parameters" builds and searches as memodb does (efConstruction 80, efSearch 64); "faiss, its defaults" (40
and 16) is quicker and finds less: `recall` is the share of queries whose nearest neighbour was found.
"""

from __future__ import annotations

import time

import faiss
import numpy as np
import pytest

import memodb
from benchmarks.clock import hand_over, take_turns, timed

WIDTH, QUERIES = 128, 64
NAMES = ("faiss, same parameters", "memodb", "faiss, its defaults")


def _direct(keys, construction=None, search=None):
    index = faiss.index_factory(WIDTH, "HNSW32")
    if construction is not None:
        index.hnsw.efConstruction, index.hnsw.efSearch = construction, search
    start = time.perf_counter()
    index.add(keys)
    return index, time.perf_counter() - start


@pytest.fixture(scope="module")
def race(shm, profile):
    rng = np.random.default_rng(0)
    keys = rng.standard_normal((profile.keys, WIDTH), dtype=np.float32)
    same, same_seconds = _direct(keys, 80, 64)
    defaults, defaults_seconds = _direct(keys)
    exact = faiss.IndexFlatL2(WIDTH)
    exact.add(keys)
    with memodb.MemoDB.create(shm / "search", shape=(8,), dtype="uint8", key_dim=WIDTH, index="HNSW32") as db:
        db.put(np.zeros((profile.keys, 8), np.uint8), keys)
        start = time.perf_counter()
        db.search(keys[:1])  # the first search builds the index
        built = {
            "memodb": time.perf_counter() - start,
            "faiss, same parameters": same_seconds,
            "faiss, its defaults": defaults_seconds,
        }
        searches = {
            "memodb": lambda queries: db.search(queries).ids,
            "faiss, same parameters": lambda queries: same.search(queries, 1)[1],
            "faiss, its defaults": lambda queries: defaults.search(queries, 1)[1],
        }

        def draw():
            near = keys[rng.integers(0, len(keys), QUERIES)]
            return near + 0.5 * rng.standard_normal((QUERIES, WIDTH), dtype=np.float32)

        ways = {name: timed(search) for name, search in searches.items()}
        samples = take_turns(ways, draw, rounds=10 * profile.rounds, seconds=20 * profile.seconds, least=profile.least)
        queries = np.concatenate([draw() for _ in range(16)])
        nearest = exact.search(queries, 1)[1]
        recall = {name: float((search(queries) == nearest).mean()) for name, search in searches.items()}
    return samples, built, recall


@pytest.mark.parametrize("name", NAMES)
def test_search(benchmark, race, profile, name):
    samples, built, recall = race
    benchmark.group = f"search of {QUERIES} keys among {profile.keys:,} x {WIDTH}, HNSW32"
    hand_over(
        benchmark, samples[name], contender=name, keys=profile.keys, build_seconds=built[name], recall=recall[name]
    )
