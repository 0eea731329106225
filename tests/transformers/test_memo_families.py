"""Every family: nothing changes without a hit, everything is right with one, in any mix, on either side of padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tiny_models import (  # noqa: E402
    FAMILIES,
    counted_projections,
    join,
    rows_of,
    snapshot,
    states,
    states_alone,
    tiny_batch,
    tiny_model,
)

import memodb  # noqa: E402
import memodb_transformers as mt  # noqa: E402

ANY_DISTANCE = 1e9
ITSELF = 1e-4  # the distance of a sequence to its own record, and of no other
LENGTHS = [5, 9, 16, 5, 12]

WAYS = [
    pytest.param(target, lookup, id=f"{target}-{lookup}")
    for target in ("probs", "context")
    for lookup in ("layer", "sequence")
]
EVERY = [
    pytest.param(family, attention, id=f"{family}-{attention}")
    for family, kind in FAMILIES.items()
    for attention in kind.attentions
]


def everything(model: Any, batch: Any) -> list[torch.Tensor]:
    """Run a model and return all its tensors, those of the task head too."""
    with torch.no_grad():
        output = model(**batch, output_hidden_states=True)
    return [output.logits, *output.hidden_states]


@pytest.mark.parametrize(("family", "attention"), EVERY)
@pytest.mark.parametrize("lookup", ["layer", "sequence"])
def test_without_a_hit_not_a_bit_changes(path: Path, family: str, attention: str, lookup: str) -> None:
    model = tiny_model(family, attention=attention)
    mt.build(model, [tiny_batch(LENGTHS)], path, profile=False)
    batch = tiny_batch([5, 9, 16, 12, 7], seed=2)
    plain, before = everything(model, batch), snapshot(model)
    with mt.memoize(model, path, threshold=0.0, layers="all", lookup=lookup) as memo:
        found = everything(model, batch)
    stats = memo.stats()
    assert [(row["lookups"], row["hits"], row["bypassed"]) for row in stats["layers"]] == [(5, 0, 0)] * 2
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))
    assert snapshot(model) == before
    with pytest.raises(RuntimeError, match="of the caller"), mt.memoize(model, path, threshold=0.0, layers="all"):
        raise RuntimeError("of the caller")
    assert snapshot(model) == before


@pytest.mark.parametrize(("family", "attention"), EVERY)
@pytest.mark.parametrize(("target", "lookup"), WAYS)
@pytest.mark.parametrize("store_dtype", ["float32", "float16"])
def test_a_batch_that_was_recorded_needs_neither_q_nor_k(
    path: Path, family: str, attention: str, target: str, lookup: str, store_dtype: str
) -> None:
    model = tiny_model(family, attention=attention)
    batch = tiny_batch(LENGTHS)
    mt.build(model, [batch], path, profile=False, target=target, store_dtype=store_dtype)
    with (
        mt.memoize(model, path, threshold=ANY_DISTANCE, layers="all", lookup=lookup) as memo,
        counted_projections(model, FAMILIES[family].query_and_key) as calls,
    ):
        found = states(model, batch, **({"use_cache": False} if FAMILIES[family].causal else {}))
    assert memo.stats()["memoization_rate"] == 1.0
    assert calls == []
    plain = states(model, batch)
    assert torch.allclose(found, plain, atol=1e-4 if store_dtype == "float32" else 1e-2, rtol=0)


# What a causal model computes for padding on the left, and ModernBERT for padding that is out of the window of every
# token, depends on the attention implementation: rows in which everything is masked.
MEANT = [name for name, kind in FAMILIES.items() if not kind.causal and name != "modernbert"]


@pytest.mark.parametrize("family", MEANT)
def test_padding_too_is_what_the_plain_model_makes_of_it(path: Path, family: str) -> None:
    # Task heads that pool over all positions see the rows of padding.
    model = tiny_model(family)
    batch = tiny_batch(LENGTHS, left=[1, 3])
    mt.build(model, [batch], path, profile=False)
    plain = everything(model, batch)
    with mt.memoize(model, path, threshold=ITSELF, layers="all") as memo:
        found = everything(model, batch)
    assert memo.stats()["memoization_rate"] == 1.0
    assert all(torch.allclose(a, b, atol=1e-4, rtol=0) for a, b in zip(found, plain, strict=True))


@pytest.mark.parametrize(("family", "attention"), EVERY)
@pytest.mark.parametrize(("target", "lookup"), WAYS)
@pytest.mark.parametrize("padding", ["right", "left", "both"])
def test_hits_and_misses_in_any_order_equal_each_sequence_alone(
    path: Path, family: str, attention: str, target: str, lookup: str, padding: str
) -> None:
    model = tiny_model(family, attention=attention)
    left = {"right": [], "left": range(5), "both": [0, 2, 3]}[padding]
    known, new = tiny_batch(LENGTHS, left=left), tiny_batch([5, 9, 16, 3, 12], seed=2, left=left)
    mt.build(model, [known], path, profile=False, target=target)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(3)).tolist()
    batch = rows_of(join(known, new), order)
    with mt.memoize(model, path, threshold=ITSELF, layers="all", lookup=lookup) as memo:
        found = states(model, batch)
    assert [(row["hits"], row["lookups"]) for row in memo.stats()["layers"]] == [(5, 10)] * 2
    assert torch.allclose(found, states_alone(model, batch), atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["roberta", "llama"])
@pytest.mark.parametrize("target", ["probs", "context"])
def test_the_side_and_the_width_of_padding_do_not_matter_to_what_is_found(path: Path, family: str, target: str) -> None:
    # RoBERTa counts positions from the first token, LLaMA sees distances only: the same states, wherever they lie.
    model = tiny_model(family)
    mt.build(model, [tiny_batch(LENGTHS)], path, profile=False, target=target)
    batch = tiny_batch(LENGTHS, left=[0, 1, 3, 4])
    with mt.memoize(model, path, threshold=ITSELF, layers="all") as memo:
        found = states(model, batch)
        narrow = tiny_batch(LENGTHS)
        narrow = {name: value[[0, 1, 4], :12] for name, value in narrow.items()}
        narrow_found = states(model, narrow)
    assert memo.stats()["memoization_rate"] == 1.0
    assert torch.allclose(found, states(model, batch), atol=1e-4, rtol=0)
    assert torch.allclose(narrow_found, states(model, narrow), atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_records_give_no_weight_to_padding_or_to_the_future(path: Path, family: str) -> None:
    model = tiny_model(family)
    lengths = [5, 9, 12, 7]
    mt.build(model, [tiny_batch(lengths, left=[1, 3])], path, profile=False)
    with memodb.MemoDB.open(path) as db:
        for layer in range(2):
            for length in lengths:
                record = torch.from_numpy(db.multiget(db.ids(namespace=f"layer={layer}/len={length}"))[0])
                assert not record[:, :, length:].any()
                tokens = record[:, :length, :length]
                assert torch.allclose(tokens.sum(dim=-1), torch.ones(4, length), atol=1e-5)
                assert tokens.min() >= 0
                if FAMILIES[family].causal:
                    assert not record.triu(1).any()


HEADS = [
    ("bert", "ForTokenClassification"), ("bert", "ForMaskedLM"), ("bert", "ForQuestionAnswering"),
    ("roberta", "ForMaskedLM"), ("albert", "ForMaskedLM"), ("deberta-v2", "ForTokenClassification"),
    ("deberta-v2", "ForMaskedLM"), ("deberta", "ForTokenClassification"), ("distilbert", "ForMaskedLM"),
    ("modernbert", "ForTokenClassification"), ("gpt2", "ForSequenceClassification"),
    ("gpt2", "ForTokenClassification"), ("llama", "ForSequenceClassification"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "head"), HEADS)
def test_task_heads_work(path: Path, family: str, head: str) -> None:
    model = tiny_model(family, head=head)
    known, new = tiny_batch(LENGTHS), tiny_batch([5, 9], seed=2)
    mt.build(model, [known], path, profile=False)
    batch = join(known, new)
    with torch.no_grad():
        plain = model(**batch)[0]
        with mt.memoize(model, path, threshold=ITSELF, layers="all") as memo:
            found = model(**batch)[0]
    assert [row["hits"] for row in memo.stats()["layers"]] == [5, 5]
    if family not in MEANT and plain.dim() == 3:
        tokens = batch["attention_mask"].bool()
        found, plain = found[tokens], plain[tokens]
    assert torch.allclose(found, plain, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_subclass_and_pruned_weights_work_like_any_other(path: Path, family: str) -> None:
    model = tiny_model(family)
    model.__class__ = type("Mine", (type(model),), {})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter[parameter.abs() < 0.2] = 0.0
    known, new = tiny_batch(LENGTHS), tiny_batch([5, 9], seed=2)
    mt.build(model, [known], path, profile=False)
    batch = join(new, known)
    with mt.memoize(model, path, threshold=ITSELF, layers="all") as memo:
        found = states(model, batch)
    assert [row["hits"] for row in memo.stats()["layers"]] == [5, 5]
    assert torch.allclose(found, states_alone(model, batch), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("layers", "groups", "inner"), [(4, 1, 1), (4, 2, 1), (2, 1, 2), (4, 2, 2)])
def test_albert_layers_are_told_apart_by_the_order_of_calls(path: Path, layers: int, groups: int, inner: int) -> None:
    model = tiny_model("albert", layers=layers, num_hidden_groups=groups, inner_group_num=inner)
    known, new = tiny_batch(LENGTHS), tiny_batch([5, 9], seed=2)
    report = mt.build(model, [known], path, profile=False, embedder="projection")
    batch = join(new, known)
    plain = states(model, batch)
    with mt.memoize(model, path, threshold=ITSELF, layers="all") as memo:
        found = states(model, batch)
    assert [row["hits"] for row in memo.stats()["layers"]] == [5] * report.layers
    assert torch.allclose(found, plain, atol=1e-4, rtol=0)
    some = [1, report.layers - 1]
    with mt.memoize(model, path, threshold=ITSELF, layers=some) as memo:
        found = states(model, batch)
    assert [row["layer"] for row in memo.stats()["layers"] if row["hits"]] == sorted(set(some))
    assert torch.allclose(found, plain, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_weights_asked_for_are_the_model_s_own(path: Path, family: str) -> None:
    model = tiny_model(family, attention="eager")
    mt.build(model, [tiny_batch(LENGTHS)], path, profile=False)
    batch = tiny_batch(LENGTHS)
    with torch.no_grad():
        plain = model(**batch, output_attentions=True)
        with mt.memoize(model, path, threshold=ANY_DISTANCE, layers="all") as memo:
            found = model(**batch, output_attentions=True)
    assert [row["hits"] for row in memo.stats()["layers"]] == [0, 0]
    assert len(found.attentions) == 2
    assert all(torch.equal(a, b) for a, b in zip(found.attentions, plain.attentions, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_half_precision_work(path: Path, family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family).to(dtype)
    known, new = tiny_batch(LENGTHS), tiny_batch([5, 9], seed=2)
    name = str(dtype).removeprefix("torch.")
    for target in ("probs", "context"):
        store = path.with_name(target)
        mt.build(model, [known], store, profile=False, target=target, store_dtype=name)
        batch = join(known, new)
        with mt.memoize(model, store, threshold=0.01, layers="all") as memo, torch.no_grad():
            found = model.base_model(**batch)[0]
        assert found.dtype == dtype
        assert memo.stats()["layers"][0]["hits"] == 5
        plain = states(model, batch)
        far = (found.float() * batch["attention_mask"][:, :, None] - plain).abs().mean() / plain.abs().mean()
        assert far < (0.05 if dtype == torch.bfloat16 else 0.01)
