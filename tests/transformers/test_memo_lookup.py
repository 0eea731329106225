"""One lookup for all layers, records that go away, many threads, compilers: the memo beside the model."""

from __future__ import annotations

import copy
import json
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


def changed(batch: dict[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
    """Take one sequence, with another token at the fourth place."""
    near = {name: value[[row]].clone() for name, value in batch.items()}
    near["input_ids"][0, 3] = (near["input_ids"][0, 3] + 1) % 50 + 3
    return near


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
    plain = logits(model, batch)
    with mt.memoize(model, path, threshold=ITSELF, layers=[], lookup="sequence") as memo:
        assert torch.equal(logits(model, batch), plain)
    assert memo.stats()["layers"][0]["search_seconds"] == 0.0


def test_each_layer_is_calibrated_on_the_similarity_of_its_own_record(path: Path) -> None:
    model = tiny_model()
    known = tiny_batch([8] * 6)
    near = changed(known, 0)
    mt.build(model, [known], path, profile=False)
    report = mt.profile(model, [join(known, near)], path)
    assert (report.sequences, report.self_hits) == (len(near["input_ids"]), 6)
    layer = report.layers[1]
    assert report.layers[0].sequence_distances == report.layers[0].distances
    # The first layer's distance, and the similarity that the record of that sequence has in the second.
    assert layer.sequence_distances[0] == report.layers[0].distances[0] > 1e-3
    assert 0 < layer.sequence_similarities[0] < 1
    assert layer.sequence_similarities[0] != report.layers[0].sequence_similarities[0]


def test_each_layer_has_its_own_threshold_on_the_distance_of_the_sequence(path: Path) -> None:
    model = tiny_model(layers=3)
    known = tiny_batch([8] * 6)
    near = changed(known, 0)
    mt.build(model, [known], path, profile=False)
    far = mt.profile(model, [join(near, known)], path).layers[0].distances[0]
    assert far is not None
    file = path / "transformers" / "profile.json"
    profile = json.loads(file.read_text())
    for row, scores in zip(profile["layers"], ([0.9, 0.7], [0.95, 0.9], [0.9, 0.8]), strict=True):
        row.update(sequence_distances=[0.5 * far, 1.5 * far], sequence_similarities=scores)
    file.write_text(json.dumps(profile))
    expected = {"conservative": [0, 1, 0], "moderate": [0, 1, 1], "aggressive": [0, 1, 1]}
    for level, hits in expected.items():
        with mt.memoize(model, path, level=level, layers="all", lookup="sequence") as memo:
            logits(model, near)
        assert [row["hits"] for row in memo.stats()["layers"]] == hits
        assert [row["threshold"] / far for row in memo.stats()["layers"]] == pytest.approx(
            [1.5 if hit else 0.5 for hit in hits]
        )


def test_the_records_of_the_next_layer_are_gathered_ahead(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, list[int]]] = []
    prefetch, gather = memodb.MemoDB.prefetch, memodb.MemoDB.multiget_mapped

    def noted_prefetch(self: memodb.MemoDB, ids: np.ndarray, strategy: str = "auto") -> None:
        asked.append(("ahead", ids.tolist()))
        prefetch(self, ids, strategy)

    def noted_gather(self: memodb.MemoDB, ids: np.ndarray, strategy: str = "auto") -> memodb.MappedBatch:
        asked.append(("gather", ids.tolist()))
        return gather(self, ids, strategy)

    model = tiny_model(layers=4)
    batch = tiny_batch([5, 9])
    mt.build(model, [batch], path, profile=False)
    monkeypatch.setattr(memodb.MemoDB, "prefetch", noted_prefetch)
    monkeypatch.setattr(memodb.MemoDB, "multiget_mapped", noted_gather)
    with mt.memoize(model, path, threshold=ITSELF, layers=[0, 1, 3], lookup="sequence"):
        logits(model, batch)
    assert asked == [
        ("ahead", [1, 5]), ("gather", [0, 4]), ("ahead", [3, 7]), ("gather", [1, 5]), ("gather", [3, 7]),
    ]  # fmt: skip


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

    attention = model.bert.encoder.layer[0].attention.self
    with mt.memoize(model, path, threshold=ANY_DISTANCE, layers="all") as memo:
        handle = attention.register_forward_hook(double)
        found = logits(model, batch)
    assert memo.stats()["memoization_rate"] == 1.0
    plain = logits(model, batch)
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
