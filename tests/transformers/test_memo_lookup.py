"""One lookup for all layers, records that go away, many threads, compilers: the memo beside the model."""

from __future__ import annotations

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import numpy as np  # noqa: E402
from tiny_models import join, logits, rows_of, states, tiny_batch, tiny_model  # noqa: E402

import memodb  # noqa: E402
import memodb_transformers as mt  # noqa: E402

ANY_DISTANCE = 1e9
ITSELF = 1e-4


def test_the_records_of_a_sequence_have_consecutive_ids(path: Path) -> None:
    mt.build(tiny_model(layers=3), [tiny_batch([5, 9, 16, 5])] * 2, path, profile=False)
    with memodb.MemoDB.open(path) as db:
        for length in (5, 9, 16):
            first, *others = (db.ids(namespace=f"layer={layer}/len={length}") for layer in range(3))
            for layer, ids in enumerate(others, start=1):
                assert np.array_equal(ids, first + layer)


def test_one_search_serves_all_layers(path: Path) -> None:
    model = tiny_model(layers=3)
    batch = tiny_batch([5, 9, 16])
    mt.build(model, [batch], path, profile=False)
    with mt.memoize(model, path, threshold=ITSELF, layers=[1, 2], lookup="sequence") as memo:
        found = logits(model, batch)
    first, *others = memo.stats()["layers"]
    assert (first["memoized"], first["hits"]) == (False, 0)
    assert first["search_seconds"] > 0
    assert [(row["lookups"], row["hits"], row["search_seconds"]) for row in others] == [(3, 3, 0.0)] * 2
    assert torch.allclose(found, logits(model, batch), atol=1e-4)
    with mt.memoize(model, path, threshold=ITSELF, layers=[], lookup="sequence") as memo:
        assert torch.equal(logits(model, batch), logits(model, batch))
    assert memo.stats()["layers"][0]["search_seconds"] == 0.0


def test_a_layer_s_own_threshold_applies_to_the_sequence_found(path: Path) -> None:
    model = tiny_model()
    known = tiny_batch([8] * 6)
    near = {name: value[:1].clone() for name, value in known.items()}
    near["input_ids"][0, 3] = (near["input_ids"][0, 3] + 1) % 50 + 3
    mt.build(model, [known], path, profile=False)
    mt.profile(model, [known, near], path)
    with memodb.MemoDB.open(path) as db:
        assert len(db) == 12
    report = mt.profile(model, [join(known, near)], path)
    layer = report.layers[1]
    assert layer.sequence_distances[:6] == pytest.approx([0.0] * 6, abs=1e-6)
    assert layer.sequence_similarities[:6] == pytest.approx([1.0] * 6, abs=1e-4)
    assert report.layers[0].sequence_distances == report.layers[0].distances
    # The first layer's distance, and the similarity that the record of that sequence has in the second.
    assert layer.sequence_distances[6] == report.layers[0].distances[6] > 1e-3
    assert 0 < layer.sequence_similarities[6] < 1


def test_the_benefit_of_one_lookup_is_that_of_all_layers_together() -> None:
    def layer(number: int, attention: float) -> mt.LayerProfile:
        same = (0.1, 0.2, None, 0.4), (0.95, 0.9, None, 0.5)
        return mt.LayerProfile(number, attention, 3.0, 2.0, 0.0, *same, *same)

    report = mt.ProfileReport((layer(0, 1.0), layer(1, 10.0), layer(2, 6.0)), 4, 4, 1, "sdpa")
    thresholds = {0: 0.25, 1: 0.25, 2: 0.25}
    assert report.paying(thresholds) == [1]
    # Of layers 1 and 2, half the sequences save 8 and 4 seconds: 6 in all, for one lookup of 3.
    assert report.paying(thresholds, "sequence") == [1, 2]
    assert report.paying({0: 0.25, 2: 0.25}, "sequence") == []
    assert report.thresholds("conservative", "sequence") == report.thresholds("conservative")


@pytest.mark.parametrize("lookup", ["layer", "sequence"])
def test_what_is_deleted_meanwhile_is_a_miss(path: Path, lookup: str) -> None:
    model = tiny_model()
    batch = tiny_batch([5, 9, 16])
    mt.build(model, [batch], path, profile=False)
    with mt.memoize(model, path, threshold=ITSELF, layers="all", lookup=lookup) as memo:
        logits(model, batch)
        with memodb.MemoDB.open(path, mode="r+") as db:
            db.delete(db.ids(namespace="layer=1/len=9"))
        found = logits(model, batch)
    assert [row["hits"] for row in memo.stats()["layers"]] == [6, 5]
    assert torch.allclose(found, logits(model, batch), atol=1e-4)


@pytest.mark.parametrize("family", ["bert", "albert", "deberta-v2", "llama"])
@pytest.mark.parametrize("lookup", ["layer", "sequence"])
def test_many_threads_may_call_one_model(path: Path, family: str, lookup: str) -> None:
    model = tiny_model(family)
    known, new = tiny_batch([5, 9, 16, 5]), tiny_batch([5, 9, 12], seed=2)
    mt.build(model, [known], path, profile=False)
    everything = join(known, new)
    batches = [rows_of(everything, torch.randperm(7)[: 2 + number % 5].tolist()) for number in range(24)]
    expected = [states(model, batch) for batch in batches]
    start = threading.Barrier(6)

    def work(number: int) -> list[torch.Tensor]:
        start.wait()
        return [states(model, batch) for batch in batches[number::6]]

    with (
        mt.memoize(model, path, threshold=ITSELF, layers="all", lookup=lookup) as memo,
        ThreadPoolExecutor(6) as pool,
    ):
        found = list(pool.map(work, range(6)))
    for number, results in enumerate(found):
        for result, plain in zip(results, expected[number::6], strict=True):
            assert torch.allclose(result, plain, atol=1e-4, rtol=0)
    stats = memo.stats()
    assert stats["sequences"] == sum(len(batch["input_ids"]) for batch in batches)
    assert all(row["lookups"] == stats["sequences"] and 0 < row["hits"] < row["lookups"] for row in stats["layers"])


def test_one_thread_at_a_time_attaches(path: Path) -> None:
    model = tiny_model()
    mt.build(model, [tiny_batch([5])], path, profile=False)
    start = threading.Barrier(8)
    inside = []

    def attach(_: int) -> str:
        start.wait()
        try:
            with mt.memoize(model, path, threshold=1.0, layers="all"):
                inside.append(1)
                assert len(inside) == 1
                done.wait()
                inside.pop()
                return "attached"
        except mt.MemoizationActiveError:
            refused.release()
            return "refused"

    done, refused = threading.Event(), threading.Semaphore(0)
    with ThreadPoolExecutor(8) as pool:
        results = pool.map(attach, range(8))
        for _ in range(7):
            refused.acquire()
        done.set()
    assert sorted(results) == ["attached", *["refused"] * 7]
    assert "forward" not in vars(model.bert.encoder.layer[0].attention.self)


def test_a_compiled_model_is_refused_by_name(path: Path) -> None:
    model = tiny_model()
    mt.build(model, [tiny_batch([5])], path, profile=False)
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(mt.UnsupportedModelError, match="OptimizedModule"), mt.memoize(compiled, path):
        pass
    model.compile(backend="eager")
    with pytest.raises(mt.UnsupportedModelError, match="compiled in place"), mt.memoize(model, path):
        pass


@pytest.mark.filterwarnings("ignore:.torch.jit.trace. is deprecated:DeprecationWarning")
def test_a_memoized_model_is_neither_traced_nor_copied(path: Path) -> None:
    model = tiny_model()
    mt.build(model, [tiny_batch([16])], path, profile=False)
    ids = tiny_batch([16])["input_ids"]
    with mt.memoize(model, path, threshold=ANY_DISTANCE, layers="all") as memo, torch.no_grad():
        with pytest.raises(mt.UnsupportedModelError, match="traced"):
            torch.jit.trace(lambda ids: model(ids).logits, ids, check_trace=False)
        with pytest.raises(mt.MemoizationActiveError, match="leave the block first"):
            copy.deepcopy(model)
        with pytest.raises(mt.MemoizationActiveError, match="leave the block first"):
            pickle.dumps(model)
        model(ids)
        assert [row["hits"] for row in memo.stats()["layers"]] == [1, 1]
    assert torch.equal(logits(copy.deepcopy(model), {"input_ids": ids}), logits(model, {"input_ids": ids}))


@pytest.mark.parametrize("target", ["probs", "context"])
def test_what_comes_out_of_a_layer_may_be_written_to(path: Path, target: str) -> None:
    # Records are mapped pages that nobody may write to; a hook of the user knows nothing of that.
    model = tiny_model(layers=1)
    batch = tiny_batch([16])
    mt.build(model, [batch], path, profile=False, target=target)

    def double(module: object, args: object, output: tuple[torch.Tensor, None]) -> None:
        output[0].mul_(2.0)

    handles = [layer.attention.self.register_forward_hook(double) for layer in model.bert.encoder.layer]
    plain = logits(model, batch)
    with mt.memoize(model, path, threshold=ANY_DISTANCE, layers="all"):
        found = logits(model, batch)
    for handle in handles:
        handle.remove()
    assert torch.allclose(found, plain, atol=1e-4, rtol=0)
    with memodb.MemoDB.open(path) as db:
        assert db.verify() == []


def test_a_forward_kept_from_inside_the_block_runs_the_original_afterwards(path: Path) -> None:
    model = tiny_model()
    batch = tiny_batch([5])
    mt.build(model, [batch], path, profile=False)
    attention = model.bert.encoder.layer[0].attention.self
    with mt.memoize(model, path, threshold=ANY_DISTANCE, layers="all"):
        kept = attention.forward
    hidden = torch.randn(1, 16, 32)
    with torch.no_grad():
        assert torch.equal(kept(hidden)[0], attention(hidden)[0])
