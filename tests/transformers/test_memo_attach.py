"""Attaching and detaching leave no trace, and what cannot be memoized is refused before anything is touched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tiny_models import logits, snapshot, tiny_batch, tiny_model  # noqa: E402

import memodb  # noqa: E402
import memodb_transformers as mt  # noqa: E402


@pytest.fixture
def built(path: Path) -> tuple[Any, Path]:
    model = tiny_model()
    mt.build(model, [tiny_batch([5, 9, 16])], path, profile=False)
    return model, path


def test_on_exit_the_model_is_the_same_object_graph(built: tuple[Any, Path]) -> None:
    model, path = built
    before = snapshot(model)
    with mt.memoize(model, path, threshold=1.0, layers="all"):
        logits(model, tiny_batch([5]))
        inside = snapshot(model)
        assert (inside["modules"], inside["state"]) == (before["modules"], before["state"])
        assert inside["hooks"] != before["hooks"]
    assert snapshot(model) == before


def test_an_exception_in_the_block_restores_the_model(built: tuple[Any, Path]) -> None:
    model, path = built
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="of the caller"), mt.memoize(model, path, threshold=1.0, layers="all"):
        raise RuntimeError("of the caller")
    assert snapshot(model) == before


def test_a_forward_that_fails_leaves_no_lengths_behind(built: tuple[Any, Path]) -> None:
    model, path = built
    with mt.memoize(model, path, threshold=1e9, layers="all") as memo, torch.no_grad():
        with pytest.raises(IndexError):
            model(input_ids=torch.full((1, 16), 10_000))
        model.bert.encoder(torch.randn(1, 16, 32))
    assert [row["hits"] for row in memo.stats()["layers"]] == [0, 0]


def test_a_checkpoint_saved_inside_the_block_has_the_usual_names(built: tuple[Any, Path]) -> None:
    model, path = built
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with mt.memoize(model, path, threshold=1.0, layers="all"):
        inside = model.state_dict()
    assert inside.keys() == before.keys()
    assert all(torch.equal(inside[name], before[name]) for name in before)


def test_a_model_is_memoized_once_at_a_time(built: tuple[Any, Path]) -> None:
    model, path = built
    with mt.memoize(model, path, threshold=1e9, layers="all") as memo:
        with pytest.raises(mt.MemoizationActiveError, match="already"), mt.memoize(model, path):
            pass
        with pytest.raises(mt.MemoizationActiveError):
            mt.build(model, [tiny_batch([5])], path.with_name("other"))
        with pytest.raises(mt.MemoizationActiveError):
            mt.evaluate(model, [tiny_batch([5])], path)
        logits(model, tiny_batch([5]))
        assert [row["hits"] for row in memo.stats()["layers"]] == [1, 1]
    with mt.memoize(model, path, threshold=1e9, layers="all"):
        pass


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"level": "bold"}, "conservative, moderate, aggressive"),
        ({"threshold": -1.0, "layers": "all"}, "at least 0"),
        ({"threshold": float("nan"), "layers": "all"}, "at least 0"),
        ({"threshold": 1.0, "layers": "some"}, "'profiled', 'all'"),
        ({"threshold": 1.0, "layers": [0, 2]}, "numbered 0 to 1"),
        ({"threshold": 1.0, "layers": [True]}, "numbered 0 to 1"),
        ({"level": "moderate"}, "has no profile"),
        ({"threshold": 1.0}, "has no profile"),
    ],
)
def test_bad_arguments_leave_the_model_untouched(built: tuple[Any, Path], arguments: dict[str, Any], said: str) -> None:
    model, path = built
    before = snapshot(model)
    with pytest.raises(ValueError, match=said), mt.memoize(model, path, **arguments):
        pass
    assert snapshot(model) == before


def test_a_store_of_another_model_is_refused(built: tuple[Any, Path]) -> None:
    _, path = built
    for other, said in ((tiny_model(layers=3), "layers = 2; found layers = 3"), (tiny_model(seed=5), "other weights")):
        before = snapshot(other)
        with pytest.raises(mt.StoreMismatchError, match=said), mt.memoize(other, path, threshold=1.0, layers="all"):
            pass
        assert snapshot(other) == before


def test_a_store_serves_the_same_model_in_another_precision(built: tuple[Any, Path]) -> None:
    model, path = built
    half = tiny_model().to(torch.bfloat16)
    with mt.memoize(half, path, threshold=1e9, layers="all") as memo:
        found = logits(half, tiny_batch([5, 9]))
    assert found.dtype == torch.bfloat16
    assert memo.stats()["memoization_rate"] == 1.0
    assert torch.allclose(found.float(), logits(model, tiny_batch([5, 9])), atol=0.2)


def test_a_plain_database_or_nothing_is_no_memo_store(path: Path) -> None:
    model = tiny_model()
    with pytest.raises(FileNotFoundError), mt.memoize(model, path):
        pass
    memodb.MemoDB.create(path, shape=(4, 16, 16), dtype="float32", key_dim=8).close()
    with pytest.raises(mt.StoreMismatchError, match="no memo store"), mt.memoize(model, path):
        pass


def two_encoders() -> Any:
    model = tiny_model()
    model.second = tiny_model(seed=1).bert
    return model


def unsupported() -> dict[str, Any]:
    small = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = {**small, "intermediate_size": 16}
    return {
        "no transformers model": torch.nn.Linear(2, 2),
        "decoder": transformers.BertLMHeadModel(transformers.BertConfig(**bert, is_decoder=True)),
        "other family": transformers.MPNetModel(transformers.MPNetConfig(**bert)),
        "two encoders": two_encoders(),
        "encoder and decoder": transformers.EncoderDecoderModel(
            encoder=transformers.BertModel(transformers.BertConfig(**bert)),
            decoder=transformers.BertLMHeadModel(
                transformers.BertConfig(**bert, is_decoder=True, add_cross_attention=True)
            ),
        ),
    }


@pytest.mark.parametrize(
    "kind", ["no transformers model", "decoder", "other family", "two encoders", "encoder and decoder"]
)
def test_an_unsupported_model_is_refused_untouched(path: Path, kind: str) -> None:
    model = unsupported()[kind]
    modules = [(name, id(module)) for name, module in model.named_modules()]
    for attempt in (
        lambda: mt.build(model, [tiny_batch([5])], path),
        lambda: mt.memoize(model, path).__enter__(),
        lambda: mt.evaluate(model, [tiny_batch([5])], path),
        lambda: mt.profile(model, [tiny_batch([5])], path),
    ):
        with pytest.raises(mt.UnsupportedModelError) as caught:
            attempt()
        assert all(family.name in str(caught.value) for family in mt.families())
        assert isinstance(caught.value, memodb.MemoDBError)
        assert isinstance(caught.value, TypeError)
    assert [(name, id(module)) for name, module in model.named_modules()] == modules
    assert not path.exists()


def test_all_is_the_public_namespace() -> None:
    assert sorted(mt.__all__) == sorted(set(mt.__all__))
    assert all(hasattr(mt, name) for name in mt.__all__)
