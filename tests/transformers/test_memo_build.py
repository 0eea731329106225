"""Building a store: what is recorded, what is held out, and that a failed build leaves nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import numpy as np  # noqa: E402
from tiny_models import PADDED, logits, snapshot, tiny_batch, tiny_model  # noqa: E402

import memodb  # noqa: E402
import memodb_transformers as mt  # noqa: E402

LENGTHS = [5, 9, 12, 16, 7, 5, 9, 12]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_records_are_the_model_s_probabilities_with_columns_of_padding_at_zero(path: Path, attention: str) -> None:
    model = tiny_model(attention=attention)
    batch = tiny_batch([5, 16, 9])
    report = mt.build(model, [batch], path)
    eager = tiny_model(attention="eager")
    with torch.no_grad():
        expected = eager(**batch, output_attentions=True).attentions
    with memodb.MemoDB.open(path) as db:
        assert len(db) == report.records == 6
        for layer in range(2):
            for row, length in enumerate([5, 16, 9]):
                ids = db.ids(namespace=f"layer={layer}/len={length}")
                record = db.multiget(ids)[0]
                assert np.all(record[:, :, length:] == 0)
                # Rows of padding too: the model goes on with them.
                own = expected[layer][row, :, :, :length].numpy()
                np.testing.assert_allclose(record[:, :, :length], own, atol=1e-6)


def test_a_build_leaves_the_model_as_it_was(path: Path) -> None:
    model = tiny_model()
    model.train()
    model.bert.encoder.layer[0].eval()
    before = snapshot(model)
    mt.build(model, [tiny_batch(LENGTHS)] * 3, path)
    assert snapshot(model) == before


def test_the_report_counts_what_the_store_holds(path: Path) -> None:
    batches = [tiny_batch(LENGTHS, seed=seed) for seed in range(5)]
    report = mt.build(tiny_model(), batches, path, store_dtype="float16")
    assert (report.sequences, report.held_out, report.skipped) == (36, 4, 0)
    assert (report.layers, report.records, report.record_shape) == (2, 72, (4, PADDED, PADDED))
    assert report.bytes == 72 * 4 * PADDED * PADDED * 2
    with memodb.MemoDB.open(path) as db:
        assert len(db) == 72
        assert db.verify() == []
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["records"] == 72
    assert plain["profile"]["sequences"] == 4
    assert "72" in report.to_markdown()


def test_held_out_sequences_are_not_in_the_store(path: Path) -> None:
    model = tiny_model()
    batch = tiny_batch([5] * 10)
    mt.build(model, [batch], path)
    with mt.memoize(model, path, threshold=1e-6, layers="all") as memo, torch.no_grad():
        model(**batch)
    assert [row["hits"] for row in memo.stats()["layers"]] == [9, 9]


def test_rows_whose_tokens_have_holes_are_skipped(path: Path) -> None:
    batch = tiny_batch([5, 5, 9])
    batch["attention_mask"][1, 2] = 0
    report = mt.build(tiny_model(), [batch], path)
    assert (report.sequences, report.skipped, report.records) == (2, 1, 4)


def test_a_store_beside_the_database_is_json_and_plain_arrays(path: Path) -> None:
    mt.build(tiny_model(), [tiny_batch([5] * 20)], path)
    files = sorted(file.name for file in (path / "transformers").iterdir())
    assert files == [
        "build.json",
        "embedder-biases.npy",
        "embedder-weights.npy",
        "memo.json",
        "model-probe.npy",
        "profile.json",
    ]
    for file in (path / "transformers").glob("*.npy"):
        assert np.load(file, allow_pickle=False).dtype == np.float32


def test_a_build_that_fails_removes_what_it_wrote(path: Path) -> None:
    model = tiny_model()
    before = snapshot(model)
    with pytest.raises(mt.InvalidBatchError, match="padded to at most 16 tokens, as the first; found 20"):
        mt.build(model, [tiny_batch([5]), tiny_batch([5], padded=20)], path)
    assert not path.exists()
    assert snapshot(model) == before


def test_an_interrupted_build_removes_what_it_wrote(path: Path) -> None:
    def batches() -> Any:
        yield tiny_batch([5])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mt.build(tiny_model(), batches(), path)
    assert not path.exists()


def test_an_existing_store_is_not_touched(path: Path) -> None:
    model = tiny_model()
    mt.build(model, [tiny_batch([5])], path)
    with pytest.raises(FileExistsError):
        mt.build(model, [tiny_batch([9])], path)
    with memodb.MemoDB.open(path) as db:
        assert len(db) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"target": "scores"}, "probs, context"),
        ({"buckets": ()}, "such as"),
        ({"buckets": (16, 1)}, "at least 2"),
        ({"buckets": (16,), "key_dim": 12, "embedder": "projection"}, "multiple of mixes"),
        ({"embedder": mt.RandomProjection.create(PADDED - 1, 32)}, "at most 15 tokens"),
        ({"embedder": mt.LinearMLP.create(PADDED - 1, 32, 2)}, "at most 480 numbers"),
        ({"embedder": "cnn"}, "mlp, separable, projection"),
        ({"epochs": 3, "embedder": "projection"}, "not trained"),
        ({"epochs": -1}, "at least 0"),
        ({"budget": 1.0, "profile": False}, "profile=True"),
        ({"budget": -1.0}, "budget .* at least 0"),
        ({"budget": True}, "budget"),
        ({"scratch_bytes": 0}, "scratch_bytes .* at least 1; found 0"),
        ({"scratch_bytes": 1e9}, "scratch_bytes"),
        ({"scratch_bytes": None}, "scratch_bytes"),
        ({"records_per_namespace": 0}, "records_per_namespace .* at least 1"),
        ({"records_per_namespace": True}, "records_per_namespace"),
        ({"records_per_namespace": 2.5}, "records_per_namespace"),
        ({"condensed_bytes": -1}, "condensed_bytes"),
        ({"condensed_bytes": "200MB"}, "condensed_bytes"),
        ({"key_dim": 0}, "key_dim"),
        ({"seed": -1}, "seed"),
        ({"namespace_by_length": False}, "must never match"),
        ({"key_dim": 12, "embedder": "projection"}, "multiple of mixes"),
        ({"store_dtype": "complex"}, "complex"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(path: Path, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        mt.build(tiny_model(), [tiny_batch([5])], path, **arguments)
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize(
    "batches",
    [[], [{"attention_mask": torch.ones(1, 4)}], [{"input_ids": torch.ones(4).long()}], ["text"]],
    ids=["none", "no ids", "one axis", "no dict"],
)
def test_batches_that_cannot_be_recorded_are_refused(path: Path, batches: list[Any]) -> None:
    with pytest.raises(mt.InvalidBatchError):
        mt.build(tiny_model(), batches, path)
    assert not path.exists()


def test_another_embedder_can_be_handed_in(path: Path) -> None:
    embedder = mt.RandomProjection.create(PADDED, 32, key_dim=32, mixes=4, seed=3)
    assert isinstance(embedder, mt.Embedder)
    model = tiny_model()
    mt.build(model, [tiny_batch([5])], path, embedder=embedder)
    with mt.memoize(model, path, threshold=1e-6, layers="all") as memo, torch.no_grad():
        model(**tiny_batch([5]))
    assert memo.stats()["memoization_rate"] == 1.0


def test_the_paper_s_embedder_can_be_handed_in_and_is_kept_with_the_store(path: Path) -> None:
    model = tiny_model()
    known = tiny_batch([5, 9, 16, 9])
    mt.build(model, [known], path, embedder=mt.LinearMLP.create(PADDED, 32, layers=2, key_dim=24))
    with memodb.MemoDB.open(path) as db:
        assert db.key_dim == 24
    with mt.memoize(model, path, threshold=1e-4, layers="all") as memo, torch.no_grad():
        found = model(**known).logits
    assert memo.stats()["memoization_rate"] == 1.0
    assert torch.allclose(found, logits(model, known), atol=1e-4)
    (path / "transformers" / "embedder-biases.npy").unlink()
    with pytest.raises(mt.StoreMismatchError, match="biases"), mt.memoize(model, path, threshold=1.0, layers="all"):
        pass


@pytest.mark.parametrize("damage", ["not json", "[]", '{"format": "else"}', '{"format": "memodb-transformers"}'])
def test_a_damaged_memo_file_is_said_to_be_one(path: Path, damage: str) -> None:
    model = tiny_model()
    mt.build(model, [tiny_batch([5])], path)
    (path / "transformers" / "memo.json").write_text(damage)
    with pytest.raises(mt.StoreMismatchError, match="build the store again"), mt.memoize(model, path):
        pass
