"""Stored probabilities times V: what converting halves costs, beside storing float32 and beside doing it otherwise.

Run: ``make bench BENCH_ARGS=benchmarks/test_product.py``

On the clock: the gather of eight records, the product with V, and letting the batch go.
"""

from __future__ import annotations

import time

import numpy as np
import pytest

import memodb
from benchmarks import profiles
from benchmarks.clock import Turn, hand_over, take_turns

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from benchmarks.memo_models import BATCH, HEADS, HIDDEN, two_threads  # noqa: E402
from memodb_transformers.product import weighted_values  # noqa: E402

#: Store dtype, dtype of V.
PAIRS = (("float32", "float32"), ("float16", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16"))


def at_once(probabilities, value):
    """Turn the whole batch over, then multiply."""
    context = torch.matmul(probabilities.float(), value.float().transpose(1, 2))
    return context.transpose(1, 2).flatten(2).to(value.dtype)


def as_they_are(probabilities, value):
    """Multiply in the dtype of the records."""
    context = torch.matmul(probabilities, value.to(probabilities.dtype).transpose(1, 2))
    return context.transpose(1, 2).flatten(2).to(value.dtype)


PRODUCTS = {"in blocks": weighted_values, "all at once": at_once, "as they are": as_they_are}
#: A float32 matrix is multiplied as it is by all three.
CASES = [
    (length, pair, product)
    for length in profiles.chosen().memo.lengths
    for pair in PAIRS
    for product in PRODUCTS
    if pair[0] != "float32" or product == "in blocks"
]


@pytest.fixture(scope="module")
def races(shm, profile):
    done = {}

    def race(length):
        if length in done:
            return done[length]
        random = np.random.default_rng(0)
        stores, ways = {}, {}
        values = torch.randn(BATCH, length, HEADS, HIDDEN // HEADS, generator=torch.Generator().manual_seed(0))
        for dtype in ("float32", "float16", "bfloat16"):
            store = memodb.MemoDB.create(shm / f"{length}-{dtype}", shape=(HEADS, length, length), dtype=dtype)
            for _ in range(profile.memo.known):
                scores = torch.from_numpy(random.standard_normal((1, HEADS, length, length), dtype=np.float32))
                store.put(scores.softmax(dim=-1).to(getattr(torch, dtype)))
            stores[dtype] = store

        def turn(db, multiply, value):
            def run(ids):
                start = time.perf_counter()
                batch = db.multiget_mapped(ids)
                with torch.no_grad():
                    multiply(batch.torch(), value)
                del batch
                return Turn(time.perf_counter() - start)

            return run

        for at, (stored, given), product in CASES:
            if at == length:
                value = values.to(getattr(torch, given))
                ways[(stored, given), product] = turn(stores[stored], PRODUCTS[product], value)
        with two_threads():
            done[length] = take_turns(
                ways,
                lambda: random.permutation(profile.memo.known)[:BATCH],
                rounds=5 * profile.memo.turns,
                seconds=5.0,
                least=profile.memo.turns,
            )
        for store in stores.values():
            store.close()
        return done[length]

    return race


@pytest.mark.parametrize(("length", "pair", "product"), CASES)
def test_product(benchmark, races, length, pair, product):
    stored, given = pair
    benchmark.group = f"products, L = {length}"
    samples = races(length)[pair, product]
    name = f"{stored} records, {given} V" + (f", {product}" if stored != "float32" else "")
    hand_over(benchmark, samples, contender=name, length=length)
