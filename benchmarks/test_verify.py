"""What comparing gathered records with their checksums costs: ``open(verify="never" | "first" | "always")``.

Run: ``make bench BENCH_ARGS=benchmarks/test_verify.py``

64 records, gathered, read once and released, as `test_backends.py` does it. "first, new records" meets records that
its handle has not returned before, so it computes all checksums; "first, known records" none.
"""

from __future__ import annotations

import numpy as np
import pytest

import memodb
from benchmarks.clock import hand_over, take_turns, timed_gather
from benchmarks.profiles import chosen
from benchmarks.race import scratch
from benchmarks.test_backends import attention_like
from memodb.checks import Checks

N = 64
NAMES = ("never", "first, known records", "first, new records", "always")
CASES = [(backend, length) for length in chosen().backend_lengths for backend in ("arena", "lmdb")]


@pytest.fixture(scope="module", params=CASES, ids=str)
def race(request, profile):
    backend, length = request.param
    with scratch("warm") as folder:
        values = attention_like(2 * N, length)
        with memodb.MemoDB.create(folder / "store", shape=values.shape[1:], dtype="float16", backend=backend) as db:
            for at in range(0, 2 * N, N // 2):
                db.put(values[at : at + N // 2])
        handles = {name: memodb.MemoDB.open(folder / "store", verify=name.partition(",")[0]) for name in NAMES}
        handles["first, known records"].multiget(range(2 * N))

        def forgetful(ids):
            db = handles["first, new records"]
            db._checks = Checks("first")
            return db.multiget_mapped(ids)

        gathers = {name: db.multiget_mapped for name, db in handles.items()} | {"first, new records": forgetful}
        rng = np.random.default_rng(1)
        samples = take_turns(
            {name: timed_gather(gather) for name, gather in gathers.items()},
            lambda: rng.choice(2 * N, N, replace=False),
            rounds=profile.rounds,
            seconds=profile.seconds * 4,
            least=profile.least,
        )
        for db in handles.values():
            db.close()
    return backend, length, values.nbytes // 2, samples


@pytest.mark.parametrize("name", NAMES)
def test_verify(benchmark, race, name):
    backend, length, nbytes, samples = race
    benchmark.group = f"{backend}, {N} x 12x{length}x{length} float16 on tmpfs"
    more = samples[name].median() - samples["never"].median()
    hand_over(
        benchmark,
        samples[name],
        contender=name,
        times_never=samples[name].median() / samples["never"].median(),
        checked_gb_per_second=nbytes / more / 1e9 if more > 0 and name in NAMES[2:] else None,
    )
