"""What a memoized model computes: hits, misses, padding, lengths, and the paths that must stay original."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tiny_models import (  # noqa: E402
    PADDED,
    logits,
    records_by_length,
    reference_logits,
    tiny_batch,
    tiny_model,
)

import memodb  # noqa: E402
import memodb_transformers as mt  # noqa: E402

ANY_DISTANCE = 1e9


def build(model: Any, lengths: list[int], path: Path, **settings: Any) -> mt.BuildReport:
    return mt.build(model, [tiny_batch(lengths)], path, profile=False, progress=False, **settings)


def hits(memo: mt.Memo) -> list[int]:
    return [row["hits"] for row in memo.stats()["layers"]]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("store_dtype", ["float32", "float16", "bfloat16", "float8_e4m3fn"])
def test_hits_multiply_the_stored_probabilities(path: Path, attention: str, store_dtype: str) -> None:
    model = tiny_model(attention=attention)
    build(model, [5, 9, 16], path, store_dtype=store_dtype)
    batch = tiny_batch([16, 5, 9, 5, 5], seed=2)
    with mt.memoize(model, path, threshold=ANY_DISTANCE, layers="all") as memo:
        found = logits(model, batch)
    assert hits(memo) == [5, 5]
    if store_dtype == "float32":
        stored = [records_by_length(path, layer) for layer in range(2)]
        assert torch.allclose(found, reference_logits(model, batch, stored), atol=1e-5, rtol=0)
    else:
        exact = path.with_name("exact")
        build(model, [5, 9, 16], exact)
        stored = [records_by_length(exact, layer) for layer in range(2)]
        rounded = [
            {length: record.to(getattr(torch, store_dtype)).float() for length, record in layer.items()}
            for layer in stored
        ]
        # bfloat16 records are multiplied in bfloat16 where that is fast: V and the context are rounded as they are.
        most = 5e-2 if store_dtype == "bfloat16" else 1e-5
        assert torch.allclose(found, reference_logits(model, batch, rounded), atol=most, rtol=0)
    assert not torch.allclose(found, logits(model, batch), atol=1e-3)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_batch_of_hits_and_misses_equals_a_row_by_row_reference(path: Path, attention: str) -> None:
    model = tiny_model(attention=attention, layers=3)
    build(model, [5, 9], path)
    batch = tiny_batch([7, 5, 16, 9, 9, 3, 5], seed=2)
    with mt.memoize(model, path, threshold=ANY_DISTANCE, layers=[0, 2]) as memo:
        found = logits(model, batch)
    stored = [records_by_length(path, 0), {}, records_by_length(path, 2)]
    assert torch.allclose(found, reference_logits(model, batch, stored), atol=1e-5, rtol=0)
    stats = memo.stats()
    assert hits(memo) == [4, 0, 4]
    assert [row["lookups"] for row in stats["layers"]] == [7, 0, 7]
    assert [row["memoized"] for row in stats["layers"]] == [True, False, True]
    assert stats["sequences"] == 7
    assert stats["memoization_rate"] == pytest.approx(8 / (7 * 3))
    assert all(row["search_seconds"] > 0 for row in stats["layers"] if row["memoized"])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_misses_alone_equal_the_plain_model_exactly(path: Path, attention: str) -> None:
    model = tiny_model(attention=attention)
    build(model, [5, 9, 16], path)
    batch = tiny_batch([5, 9, 16], seed=2)
    with mt.memoize(model, path, threshold=0.0, layers="all") as memo:
        found = logits(model, batch)
    assert hits(memo) == [0, 0]
    assert [row["lookups"] for row in memo.stats()["layers"]] == [3, 3]
    assert torch.equal(found, logits(model, batch))


def test_the_nearest_record_is_reused_and_only_within_the_threshold(path: Path) -> None:
    model = tiny_model(layers=1)
    recorded = tiny_batch([8] * 6)
    mt.build(model, [recorded], path, profile=False)
    near = {name: value[[4]].clone() for name, value in recorded.items()}
    near["input_ids"][0, 7] = (near["input_ids"][0, 7] + 1) % 50 + 3
    with memodb.MemoDB.open(path) as db:
        stored = torch.from_numpy(db.multiget(db.ids()[[4]])[0])
    with mt.memoize(model, path, threshold=ANY_DISTANCE, layers="all"):
        found = logits(model, near)
    assert torch.allclose(found, reference_logits(model, near, [{8: stored}]), atol=1e-5, rtol=0)
    with mt.memoize(model, path, threshold=1e-6, layers="all") as memo:
        logits(model, near)
    assert hits(memo) == [0]


def test_no_token_attends_to_padding_whatever_the_store_holds(path: Path) -> None:
    model = tiny_model(layers=1)
    build(model, [5], path)
    with memodb.MemoDB.open(path, mode="r+") as db:
        db.delete(db.ids())
        uniform = torch.full((1, 4, PADDED, PADDED), 1 / PADDED)
        db.put(uniform, torch.zeros(1, 128), namespace="layer=0/len=5")
    batch = tiny_batch([5], seed=2)
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][0, 5:] = 7
    with mt.memoize(model, path, threshold=ANY_DISTANCE, layers="all") as memo:
        found, changed = logits(model, batch), logits(model, other)
    assert hits(memo) == [2]
    assert torch.equal(found, changed)


def test_padding_changes_no_key(path: Path) -> None:
    model = tiny_model()
    build(model, [5], path)
    batch = tiny_batch([5])
    batch["input_ids"][0, 5:] = 7
    with mt.memoize(model, path, threshold=1e-6, layers="all") as memo:
        logits(model, batch)
    assert hits(memo) == [1, 1]


def test_records_of_another_length_are_never_reused(path: Path) -> None:
    model = tiny_model()
    build(model, [5, 5, 9], path)
    batch = tiny_batch([4, 6, 8, 10, 16], seed=2)
    with mt.memoize(model, path, threshold=ANY_DISTANCE, layers="all") as memo:
        found = logits(model, batch)
    assert hits(memo) == [0, 0]
    assert torch.equal(found, logits(model, batch))


def test_rows_whose_tokens_have_holes_take_the_original_path(path: Path) -> None:
    model = tiny_model()
    build(model, [5], path)
    batch = tiny_batch([5, 5, 5, 5], seed=2)
    mask = batch["attention_mask"]
    mask[1] = 0  # no token at all
    mask[2, 2], mask[2, 5] = 0, 1  # a hole, and five tokens all the same
    with mt.memoize(model, path, threshold=ANY_DISTANCE, layers="all") as memo:
        found = logits(model, batch)
    plain = logits(model, batch)
    assert hits(memo) == [2, 2]
    assert [row["bypassed"] for row in memo.stats()["layers"]] == [2, 2]
    assert torch.allclose(found[[1, 2]], plain[[1, 2]], atol=1e-5, rtol=0)
    assert not torch.allclose(found[[0, 3]], plain[[0, 3]], atol=1e-3)


def test_an_attention_mask_of_three_axes_takes_the_original_path(path: Path) -> None:
    model = tiny_model(attention="eager")
    build(model, [5], path)
    batch = tiny_batch([5], seed=2)
    batch["attention_mask"] = torch.zeros(1, 1, PADDED, PADDED)
    with mt.memoize(model, path, threshold=ANY_DISTANCE, layers="all") as memo:
        found = logits(model, batch)
    assert hits(memo) == [0, 0]
    assert torch.equal(found, logits(model, batch))


def test_a_batch_padded_longer_than_the_records_takes_the_original_path(path: Path) -> None:
    model = tiny_model()
    build(model, [5], path)
    batch = tiny_batch([5, 5], seed=2, padded=PADDED + 4)
    with mt.memoize(model, path, threshold=ANY_DISTANCE, layers="all") as memo:
        found = logits(model, batch)
    assert hits(memo) == [0, 0]
    assert [row["bypassed"] for row in memo.stats()["layers"]] == [2, 2]
    assert torch.equal(found, logits(model, batch))


def test_the_mask_may_be_missing_or_positional(path: Path) -> None:
    model = tiny_model()
    build(model, [16, 5], path)
    batch = tiny_batch([16, 16], seed=2)
    with mt.memoize(model, path, threshold=ANY_DISTANCE, layers="all") as memo, torch.no_grad():
        model(input_ids=batch["input_ids"])
        assert hits(memo) == [2, 2]
        short = tiny_batch([5], seed=2)
        model(short["input_ids"], short["attention_mask"])
        assert hits(memo) == [3, 3]
        model.bert(short["input_ids"], short["attention_mask"])
        assert hits(memo) == [4, 4]


def test_training_takes_the_original_path(path: Path) -> None:
    model = tiny_model()
    build(model, [5], path)
    batch = tiny_batch([5], seed=2)
    with mt.memoize(model, path, threshold=ANY_DISTANCE, layers="all") as memo:
        model.train()
        model(**batch).logits.sum().backward()
        assert model.bert.encoder.layer[0].attention.self.query.weight.grad is not None
        model.eval()
        assert hits(memo) == [0, 0]
        with torch.inference_mode():
            model(**batch)
        assert hits(memo) == [1, 1]


@pytest.mark.parametrize("lengths", [[5], [5, 9]], ids=["all hits", "hits and misses"])
def test_gradients_do_not_pass_through_what_was_reused(path: Path, lengths: list[int]) -> None:
    # The README's example runs with gradients enabled, as any model does: it reuses. What would be wrong is a gradient
    # in which a layer is silently missing.
    model = tiny_model()
    build(model, [5], path)
    batch = tiny_batch(lengths, seed=2)
    with mt.memoize(model, path, threshold=ANY_DISTANCE, layers=[1]) as memo:
        loss = model(**batch).logits[0].sum()
        assert hits(memo) == [0, 1]
        with pytest.raises(mt.GradientUnavailableError, match="looked up"):
            loss.backward()
    with mt.memoize(model, path, threshold=0.0, layers=[1]):
        model(**batch).logits.sum().backward()
    assert model.bert.encoder.layer[1].attention.self.query.weight.grad is not None


def test_attention_weights_asked_for_are_the_model_s_own(path: Path) -> None:
    model = tiny_model(attention="eager")
    build(model, [5], path)
    batch = tiny_batch([5], seed=2)
    with torch.no_grad():
        plain = model(**batch, output_attentions=True)
        with mt.memoize(model, path, threshold=ANY_DISTANCE, layers="all") as memo:
            found = model(**batch, output_attentions=True)
    assert hits(memo) == [0, 0]
    assert len(found.attentions) == 2
    assert all(torch.equal(a, b) for a, b in zip(found.attentions, plain.attentions, strict=True))


def test_an_encoder_called_past_the_model_s_door_takes_the_original_path(path: Path) -> None:
    # Lengths of an earlier forward must not be taken for those of this one.
    model = tiny_model()
    build(model, [5], path)
    with mt.memoize(model, path, threshold=ANY_DISTANCE, layers="all") as memo, torch.no_grad():
        logits(model, tiny_batch([5], seed=2))
        model.bert.encoder(torch.randn(1, PADDED, 32))
    assert hits(memo) == [1, 1]


def test_a_hidden_state_that_is_not_finite_passes_through(path: Path) -> None:
    model = tiny_model()
    build(model, [16], path)
    states = torch.randn(2, PADDED, 32)
    states[0, 3, 3] = torch.nan
    with mt.memoize(model, path, threshold=ANY_DISTANCE, layers="all") as memo, torch.no_grad():
        found = model(inputs_embeds=states).logits
    assert hits(memo) == [1, 1]
    assert found[0].isnan().all()
    assert not found[1].isnan().any()
