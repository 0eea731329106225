"""neighbours=n: a hit reuses the mean of the n nearest records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import numpy as np  # noqa: E402
from tiny_models import logits, reference_logits, tiny_batch, tiny_model  # noqa: E402

import memodb  # noqa: E402
import memodb_transformers as mt  # noqa: E402
from memodb_transformers.card import ModelCard  # noqa: E402
from memodb_transformers.embedding import make_keys  # noqa: E402
from memodb_transformers.sites import find_sites  # noqa: E402
from memodb_transformers.store import open_store  # noqa: E402

ANY_DISTANCE = 1e9
LENGTHS = [5, 9, 16]


def first_context(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Run a BERT: what its first attention returns."""
    caught: list[torch.Tensor] = []
    module = model.bert.encoder.layer[0].attention.self
    handle = module.register_forward_hook(lambda _, args, output: caught.append(output[0]))
    try:
        logits(model, batch)
    finally:
        handle.remove()
    return caught[0]


def distances_at_the_first_layer(model: Any, path: Path, batch: dict[str, torch.Tensor]) -> np.ndarray:
    """Squared L2 from the key of each sequence to that of each stored record of length 8 at layer 0."""
    with open_store(path, ModelCard.of(find_sites(model))) as store, torch.no_grad():
        hidden = model.bert.embeddings(input_ids=batch["input_ids"])
        keys = make_keys(store.embedder, 0, hidden, torch.full((len(hidden),), 8))
        stored = store.db.keys(store.db.ids("layer=0/len=8"))
    return ((keys[:, None] - stored[None]) ** 2).sum(axis=2)


@pytest.mark.parametrize("neighbours", [2, 3, 6, 50])
def test_a_hit_is_the_mean_of_the_nearest_records(path: Path, neighbours: int) -> None:
    model = tiny_model()
    mt.build(model, [tiny_batch([8] * 6)], path, profile=False)
    fresh = tiny_batch([8] * 3, seed=7)
    apart = distances_at_the_first_layer(model, path, fresh)
    with memodb.MemoDB.open(path) as db:
        records = torch.from_numpy(db.multiget(db.ids("layer=0/len=8")))
    with mt.memoize(model, path, threshold=ANY_DISTANCE, layers=[0], neighbours=neighbours) as memo:
        found = logits(model, fresh)
    assert memo.stats()["layers"][0]["hits"] == 3
    for row in range(3):
        nearest = np.argsort(apart[row])[:neighbours]
        mean = records[torch.from_numpy(nearest)].mean(dim=0)
        alone = {name: value[[row]] for name, value in fresh.items()}
        assert torch.allclose(found[[row]], reference_logits(model, alone, [{8: mean}, {}]), atol=1e-4)


def test_only_what_is_within_the_threshold_is_averaged(path: Path) -> None:
    model = tiny_model()
    mt.build(model, [tiny_batch([8] * 6)], path, profile=False)
    fresh = tiny_batch([8] * 4, seed=7)
    apart = distances_at_the_first_layer(model, path, fresh)
    second = np.sort(apart, axis=1)[:, 1]
    # Above two records of the nearest row, so that other rows have fewer within it, or none.
    threshold = float(second.min() * 1.001)
    expected = (apart <= threshold).sum(axis=1)
    assert len(set(expected.tolist())) > 1
    with memodb.MemoDB.open(path) as db:
        records = torch.from_numpy(db.multiget(db.ids("layer=0/len=8")))
    with mt.memoize(model, path, threshold=threshold, layers=[0], neighbours=4) as memo:
        found = logits(model, fresh)
    assert memo.stats()["layers"][0]["hits"] == int((expected > 0).sum())
    for row in range(4):
        near = torch.from_numpy(apart[row] <= threshold)
        stored = {8: records[near].mean(dim=0)} if near.any() else {}
        alone = {name: value[[row]] for name, value in fresh.items()}
        assert torch.allclose(found[[row]], reference_logits(model, alone, [stored, {}]), atol=1e-4)


@pytest.mark.parametrize("target", ["probs", "context"])
@pytest.mark.parametrize("store_dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("lookup", ["layer", "sequence"])
def test_one_neighbour_is_the_nearest_alone(path: Path, target: str, store_dtype: str, lookup: str) -> None:
    model = tiny_model()
    mt.build(model, [tiny_batch(LENGTHS * 3)], path, profile=False, target=target, store_dtype=store_dtype)
    fresh = tiny_batch(LENGTHS, seed=7)
    with mt.memoize(model, path, threshold=ANY_DISTANCE, layers="all", lookup=lookup):
        nearest = logits(model, fresh)
    with mt.memoize(model, path, threshold=ANY_DISTANCE, layers="all", lookup=lookup, neighbours=1):
        assert torch.equal(logits(model, fresh), nearest)
    with mt.memoize(model, path, threshold=ANY_DISTANCE, layers="all", lookup=lookup, neighbours=2) as memo:
        assert not torch.allclose(logits(model, fresh), nearest, atol=1e-4)
    assert memo.stats()["memoization_rate"] == 1.0


def test_contexts_are_averaged_too(path: Path) -> None:
    model = tiny_model()
    mt.build(model, [tiny_batch([8] * 4)], path, profile=False, target="context")
    with memodb.MemoDB.open(path) as db:
        mean = torch.from_numpy(db.multiget(db.ids("layer=0/len=8"))).mean(dim=0)
    with mt.memoize(model, path, threshold=ANY_DISTANCE, layers=[0], neighbours=9):
        found = first_context(model, tiny_batch([8] * 2, seed=7))
    assert torch.allclose(found, mean.expand(2, -1, -1), atol=1e-5)


def test_one_lookup_tells_the_neighbours_of_all_layers(path: Path) -> None:
    model = tiny_model()
    mt.build(model, [tiny_batch([8] * 5)], path, profile=False)
    fresh = tiny_batch([8], seed=7)
    nearest = np.argsort(distances_at_the_first_layer(model, path, fresh)[0])[:2]
    means = []
    with memodb.MemoDB.open(path) as db:
        for layer in range(2):
            ids = db.ids(f"layer={layer}/len=8")[nearest]
            means.append({8: torch.from_numpy(db.multiget(ids)).mean(dim=0)})
    with mt.memoize(model, path, threshold=ANY_DISTANCE, layers="all", lookup="sequence", neighbours=2):
        found = logits(model, fresh)
    assert torch.allclose(found, reference_logits(model, fresh, means), atol=1e-4)


def test_neighbours_that_are_deleted_are_left_out(path: Path) -> None:
    model = tiny_model()
    mt.build(model, [tiny_batch([8] * 3 + [5])], path, profile=False)
    with memodb.MemoDB.open(path, mode="r+") as db:
        ids = db.ids("layer=0/len=8")
        kept = torch.from_numpy(db.multiget(ids[1:])).mean(dim=0)
        with mt.memoize(model, path, threshold=ANY_DISTANCE, layers=[0], neighbours=3) as memo:
            db.delete([ids[0], *db.ids("layer=0/len=5")])
            fresh = tiny_batch([8, 5], seed=7)
            found = logits(model, fresh)
    assert memo.stats()["layers"][0]["hits"] == 1
    assert torch.allclose(found, reference_logits(model, fresh, [{8: kept}, {}]), atol=1e-4)


@pytest.mark.parametrize("wrong", [0, -1, True, 1.5, "2", None])
def test_a_number_of_neighbours_that_is_none_is_refused(path: Path, wrong: Any) -> None:
    model = tiny_model()
    mt.build(model, [tiny_batch([8] * 2)], path, profile=False)
    with (
        pytest.raises(ValueError, match=f"neighbours .*found {wrong!r}"),
        mt.memoize(model, path, threshold=1.0, layers="all", neighbours=wrong),
    ):
        pass


def test_neighbours_and_other_lengths_exclude_each_other(path: Path) -> None:
    model = tiny_model()
    mt.build(model, [tiny_batch([8] * 2)], path, profile=False)
    with (
        pytest.raises(ValueError, match="different lengths"),
        mt.memoize(model, path, threshold=1.0, layers="all", neighbours=2, length_tolerance=1),
    ):
        pass


@pytest.mark.parametrize("level", [0.0, 0.75, 1])
def test_a_level_may_be_a_similarity(path: Path, level: float) -> None:
    model = tiny_model()
    mt.build(model, [tiny_batch([8] * 40)], path)
    report = mt.profile(model, [tiny_batch([8] * 10), tiny_batch([8] * 10, seed=5)], path)
    with mt.memoize(model, path, level=level, layers="all") as memo:
        found = {row["layer"]: row["threshold"] for row in memo.stats()["layers"] if row["memoized"]}
    expected = {row.layer: row.threshold(level) for row in report.layers}
    assert found == {layer: threshold for layer, threshold in expected.items() if threshold is not None}
    if level == 0.75:
        with mt.memoize(model, path, level="aggressive", layers="all") as memo:
            assert {row["layer"]: row["threshold"] for row in memo.stats()["layers"] if row["memoized"]} == found


@pytest.mark.parametrize("level", [-0.1, 1.1, float("nan"), True, None, "0.8"])
def test_a_level_that_is_no_similarity_is_refused(path: Path, level: Any) -> None:
    model = tiny_model()
    mt.build(model, [tiny_batch([8] * 20)], path)
    with pytest.raises(ValueError, match="similarity from 0 to 1"), mt.memoize(model, path, level=level):
        pass


def test_one_lookup_needs_means_of_whole_sequences(path: Path) -> None:
    model = tiny_model()
    mt.build(model, [tiny_batch([8] * 6)], path, profile=False)
    by_layer, by_sequence = path.with_name("by-layer"), path.with_name("by-sequence")
    mt.condense(path, by_layer, records_per_namespace=2)
    mt.condense(path, by_sequence, records_per_namespace=2, by="sequence")
    with (
        pytest.raises(mt.StoreMismatchError, match="by='sequence'"),
        mt.memoize(model, by_layer, threshold=ANY_DISTANCE, layers="all", lookup="sequence"),
    ):
        pass
    with mt.memoize(model, by_sequence, threshold=ANY_DISTANCE, layers="all", lookup="sequence") as memo:
        logits(model, tiny_batch([8], seed=7))
    assert memo.stats()["memoization_rate"] == 1.0
