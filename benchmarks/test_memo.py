"""A memoized model beside the plain one, end to end: all hits, half, none; by layer and by sequence; with both targets.

Run: ``make bench BENCH_ARGS=benchmarks/test_memo.py``

On the clock is one forward of the model, batch 8, two threads, no padding: embedding, search, gather, page faults and
unmapping, hits, misses, and all the rest of the model. Ways take turns, each with the sequences of its round.
"""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from statistics import median

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from benchmarks import profiles  # noqa: E402
from benchmarks.clock import hand_over, take_turns  # noqa: E402
from benchmarks.memo_models import BATCH, CONFIGS, WAYS, Bench, two_threads  # noqa: E402

CASES = [(family, length) for family in CONFIGS for length in profiles.chosen().memo.lengths]


@pytest.fixture(scope="module")
def races(shm, profile):
    """Run each case once, when it is first asked for."""
    size = profile.memo
    done = {}

    def race(family, length):
        if (family, length) not in done:
            folder = shm / f"{family}-{length}"
            folder.mkdir()
            with ExitStack() as stack, two_threads():
                bench = Bench(family, length, size, folder, stack)
                ways = {way.name: bench.turn(way) for way in bench.ways}
                turns = size.turns if length > 256 else 2 * size.turns
                samples = take_turns(ways, bench.draw, rounds=turns, seconds=1e9, least=turns)
                parts = {way.name: bench.breakdown(way) for way in bench.ways}
            done[family, length] = samples, parts, bench.stored
            shutil.rmtree(folder)
        return done[family, length]

    return race


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
@pytest.mark.parametrize(("family", "length"), CASES)
def test_memo(benchmark, races, profile, family, length, way):
    samples, parts, stored = races(family, length)
    if way.name not in samples:
        pytest.skip("eager is this family's default")
    benchmark.group = f"{family}-base, {profile.memo.layers} layers, L = {length}, batch {BATCH}"
    hand_over(
        benchmark,
        samples[way.name],
        contender=way.name,
        family=family,
        length=length,
        stored=stored,
        times_plain=_times(samples[way.name], samples["plain"]),
        times_eager=_times(samples[way.name], samples["plain, eager"]) if "plain, eager" in samples else None,
        **parts[way.name],
    )


def _times(ours, other):
    """Return the median of the ratios of the rounds: what slows a round down slows both."""
    return median(a.total / b.total for a, b in zip(ours.turns, other.turns, strict=True))
