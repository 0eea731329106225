"""Masks and lengths: what counts as a sequence's length, records cut to a shorter one, buckets of lengths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tiny_models import (  # noqa: E402
    FAMILIES,
    PADDED,
    join,
    logits,
    records_by_length,
    reference_logits,
    states,
    states_alone,
    tiny_batch,
    tiny_model,
)

import memodb_transformers as mt  # noqa: E402

ANY_DISTANCE = 1e9
ITSELF = 1e-4


def hits(memo: mt.Memo) -> list[int]:
    return [row["hits"] for row in memo.stats()["layers"]]


def cut(record: torch.Tensor, length: int) -> torch.Tensor:
    """Cut a record to fewer tokens, by the book."""
    shorter = record.clone()
    shorter[:, :, length:] = 0.0
    return shorter / shorter.sum(dim=-1, keepdim=True).clamp(min=1e-30)


def test_a_longer_record_is_cut_and_its_rows_sum_to_one_again(path: Path) -> None:
    model = tiny_model()
    mt.build(model, [tiny_batch([9, 12])], path, profile=False)
    batch = tiny_batch([7, 9, 10, 12, 6, 14], seed=2)
    with mt.memoize(model, path, threshold=ANY_DISTANCE, layers="all") as memo:
        logits(model, batch)
    assert hits(memo) == [2, 2]
    with mt.memoize(model, path, threshold=ANY_DISTANCE, layers="all", length_tolerance=2) as memo:
        found = logits(model, batch)
    assert hits(memo) == [4, 4]
    stored = [records_by_length(path, layer) for layer in range(2)]
    shorter = [{**layer, 7: cut(layer[9], 7), 10: cut(layer[12], 10)} for layer in stored]
    assert torch.allclose(found, reference_logits(model, batch, shorter), atol=1e-4, rtol=0)


def test_the_nearest_record_wins_whatever_its_length(path: Path) -> None:
    model = tiny_model(layers=1)
    known = tiny_batch([9, 10])
    near = {name: value[[1]].clone() for name, value in known.items()}
    near["input_ids"][0, 9], near["attention_mask"][0, 9] = 0, 0  # the longer one without its last token
    mt.build(model, [known], path, profile=False)
    with mt.memoize(model, path, threshold=ANY_DISTANCE, layers="all", length_tolerance=1) as memo:
        found = logits(model, near)
    assert hits(memo) == [1]
    stored = records_by_length(path, 0)
    assert torch.allclose(found, reference_logits(model, near, [{9: cut(stored[10], 9)}]), atol=1e-4, rtol=0)


def test_a_row_that_attended_to_nothing_else_attends_to_all_tokens(path: Path) -> None:
    import memodb

    model = tiny_model(layers=1)
    mt.build(model, [tiny_batch([9])], path, profile=False)
    with memodb.MemoDB.open(path, mode="r+") as db:
        record = torch.zeros(1, 4, PADDED, PADDED)
        record[..., 8] = 1.0  # all attend to the token that is cut
        db.delete(db.ids())
        db.put(record, torch.zeros(1, 128), namespace="layer=0/len=9")
    batch = tiny_batch([8], seed=2)
    with mt.memoize(model, path, threshold=ANY_DISTANCE, layers="all", length_tolerance=1) as memo:
        found = logits(model, batch)
    assert hits(memo) == [1]
    uniform = torch.zeros(4, PADDED, PADDED)
    uniform[:, :, :8] = 1 / 8
    assert torch.allclose(found, reference_logits(model, batch, [{8: uniform}]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_cut_records_never_reach_padding_or_the_future(path: Path, family: str) -> None:
    model = tiny_model(family)
    mt.build(model, [tiny_batch([12, 16])], path, profile=False)
    batch = tiny_batch([10, 14], seed=2, left=[1])
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][0, 10:], other["input_ids"][1, :2] = 7, 7
    with mt.memoize(model, path, threshold=ANY_DISTANCE, layers="all", length_tolerance=2) as memo:
        found, changed = states(model, batch), states(model, other)
    assert hits(memo) == [4, 4]
    assert torch.isfinite(found).all()
    if family not in ("roberta", "xlm-roberta", "camembert"):  # those take padding by its id, not by the mask
        assert torch.equal(found, changed)
    if FAMILIES[family].causal:
        late = {**batch, "input_ids": batch["input_ids"].clone()}
        late["input_ids"][0, 9] = (late["input_ids"][0, 9] + 1) % 50 + 3
        with mt.memoize(model, path, threshold=ANY_DISTANCE, layers="all", length_tolerance=2):
            assert torch.equal(states(model, late)[0, :9], found[0, :9])


def test_contexts_cannot_be_cut(path: Path) -> None:
    model = tiny_model()
    mt.build(model, [tiny_batch([9])], path, profile=False, target="context")
    arguments: dict[str, Any] = {"threshold": 1.0, "layers": "all", "length_tolerance": 1}
    with pytest.raises(mt.StoreMismatchError, match="contexts"), mt.memoize(model, path, **arguments):
        pass


@pytest.mark.parametrize("tolerance", [-1, 1.5, True, "2"])
def test_a_tolerance_is_a_number_of_tokens(path: Path, tolerance: Any) -> None:
    model = tiny_model()
    mt.build(model, [tiny_batch([9])], path, profile=False)
    arguments: dict[str, Any] = {"threshold": 1.0, "layers": "all", "length_tolerance": tolerance}
    with pytest.raises(ValueError, match="length_tolerance"), mt.memoize(model, path, **arguments):
        pass


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("target", ["probs", "context"])
def test_each_batch_goes_to_the_smallest_bucket_that_it_fits(path: Path, family: str, target: str) -> None:
    model = tiny_model(family)
    batches = {padded: tiny_batch([5, padded], padded=padded, seed=padded) for padded in (6, 8, 12, 16, 20)}
    report = mt.build(model, batches.values(), path, buckets=(16, 8), profile=False, target=target)
    assert sorted(folder.name for folder in path.iterdir()) == ["L=16", "L=8"]
    assert [bucket.record_shape[-1 if target == "probs" else 0] for bucket in report.buckets] == [8, 16]
    assert (report.sequences, report.records, report.skipped) == (8, 16, 2)
    assert report.bytes == sum(bucket.bytes for bucket in report.buckets)
    for padded, batch in batches.items():
        new = tiny_batch([5, padded], padded=padded, seed=100 + padded)
        both = join(batch, new)
        with mt.memoize(model, path, threshold=ITSELF, layers="all") as memo:
            found = states(model, both)
        assert hits(memo) == ([2, 2] if padded <= 16 else [0, 0])
        assert [row["bypassed"] for row in memo.stats()["layers"]] == ([0, 0] if padded <= 16 else [4, 4])
        assert torch.allclose(found, states_alone(model, both), atol=1e-4, rtol=0)


def test_buckets_are_profiled_and_evaluated_each_by_itself(path: Path) -> None:
    model = tiny_model()
    batches = [tiny_batch([padded] * 20, padded=padded, seed=padded) for padded in (8, 16)]
    report = mt.build(model, batches, path, buckets=(8, 16, 32))
    assert [bucket.profile is not None for bucket in report.buckets] == [True, True]
    assert [bucket["record_shape"] for bucket in report.to_dict()["buckets"]] == [(4, 8, 8), (4, 16, 16)]
    assert "L=8" in report.to_markdown()
    profile = mt.profile(model, [tiny_batch([8] * 3, padded=8), tiny_batch([12] * 2, padded=12)], path)
    assert [(bucket.padded_length, bucket.sequences) for bucket in profile.buckets] == [(8, 3), (16, 2)]
    assert "L = 16" in profile.to_markdown()
    found = mt.evaluate(model, batches, path, levels=["moderate"], layers="all", repeats=1)
    assert found.rows[1]["bytes"] == report.bytes
    with pytest.raises(mt.InvalidBatchError, match="at most 16"):
        mt.profile(model, [tiny_batch([8], padded=20)], path)
    with mt.memoize(model, path, layers="all") as memo:
        logits(model, batches[0])
    assert set(memo.stats()["layers"][0]["threshold"] or {}) <= {8, 16}


def test_a_build_with_buckets_that_fails_removes_all_of_them(path: Path) -> None:
    def batches() -> Any:
        yield tiny_batch([5], padded=8)
        yield tiny_batch([5], padded=16)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mt.build(tiny_model(), batches(), path, buckets=(8, 16))
    assert not path.exists()
    path.mkdir()
    (path / "mine").touch()
    with pytest.raises(FileExistsError):
        mt.build(tiny_model(), [tiny_batch([5], padded=8)], path, buckets=(8, 16))
    assert [file.name for file in path.iterdir()] == ["mine"]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_mask_of_four_axes_takes_the_original_path(path: Path, attention: str) -> None:
    for family in ("bert", "llama"):
        model = tiny_model(family, attention=attention)
        store = path.with_name(family)
        mt.build(model, [tiny_batch([5])], store, profile=False)
        batch = tiny_batch([16], seed=2)
        batch["attention_mask"] = torch.ones(1, 1, PADDED, PADDED).tril().bool()
        with torch.no_grad():
            plain = model(**batch).logits
            with mt.memoize(model, store, threshold=ANY_DISTANCE, layers="all") as memo:
                found = model(**batch).logits
        assert hits(memo) == [0, 0]
        assert torch.equal(found, plain)
        with pytest.raises(mt.InvalidBatchError, match=r"attention_mask of shape \[1, 16\]"):
            mt.build(model, [batch], path.with_name("other"))


def test_a_head_mask_takes_the_original_path(path: Path) -> None:
    model = tiny_model(attention="eager")
    mt.build(model, [tiny_batch([5])], path, profile=False)
    batch = tiny_batch([5], seed=2)
    with torch.no_grad():
        plain = model.bert(**batch, head_mask=torch.zeros(2, 4))[0]
        with mt.memoize(model, path, threshold=ANY_DISTANCE, layers="all") as memo:
            found = model.bert(**batch, head_mask=torch.zeros(2, 4))[0]
    assert hits(memo) == [0, 0]
    assert torch.equal(found, plain)
