"""Real models, where MEMODB_EVAL_DATA names a folder that has them: the same promises, with trained weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import numpy as np  # noqa: E402
from tiny_models import join, rows_of, snapshot, states, states_alone, tiny_batch  # noqa: E402

import memodb_transformers as mt  # noqa: E402
from memodb_transformers.data import read_text, to_batches  # noqa: E402

DATA = os.environ.get("MEMODB_EVAL_DATA")
pytestmark = pytest.mark.skipif(not DATA, reason="MEMODB_EVAL_DATA names no folder with real models and data")

CLASSIFIERS = ["minilm-sst2", "debertav2-sst2"]
STORIES = ["stories260k-llama", "babyllama-tok105"]
ITSELF = 1e-5


def load(name: str) -> Any:
    """Load a model; without the test's warnings as errors, which are of the loading library."""
    kind = transformers.AutoModelForCausalLM if name in STORIES else transformers.AutoModelForSequenceClassification
    return kind.from_pretrained(Path(str(DATA), "models", name), dtype=torch.float32).eval()


def sentences(name: str) -> list[dict[str, torch.Tensor]]:
    """Return two batches of eight real sequences: one to be recorded, and one of others."""
    if name in STORIES:
        lengths = [40, 25, 48, 31, 40, 17, 48, 9]
        batches = [tiny_batch(lengths, seed=seed, padded=48, left=range(8)) for seed in (1, 2)]
        if name == "stories260k-llama":  # stories that it told itself
            told = torch.from_numpy(np.load(Path(str(DATA), "data", "stories", "tokens.npy")).astype(np.int64))
            for number, batch in enumerate(batches):
                for row, length in enumerate(lengths):
                    batch["input_ids"][row, -length:] = told[8 * number + row, :length]
        return batches
    tokenizer = transformers.AutoTokenizer.from_pretrained(Path(str(DATA), "models", name))
    texts, _ = read_text(Path(str(DATA), "data", "sst2", "dev.tsv"), 16)
    return to_batches(tokenizer, texts, None, padded_length=48, batch_size=8)


@pytest.mark.parametrize("name", CLASSIFIERS + STORIES)
def test_without_a_hit_not_a_bit_changes(path: Path, name: str) -> None:
    model = load(name)
    known, new = sentences(name)
    mt.build(model, [known], path, profile=False)
    before = snapshot(model)
    with torch.no_grad():
        plain = model(**new).logits
        with mt.memoize(model, path, threshold=0.0, layers="all") as memo:
            found = model(**new).logits
    assert all(row["lookups"] == 8 and not row["hits"] for row in memo.stats()["layers"])
    assert torch.equal(found, plain)
    assert snapshot(model) == before


@pytest.mark.parametrize("name", CLASSIFIERS + STORIES)
@pytest.mark.parametrize("target", ["probs", "context"])
@pytest.mark.parametrize("lookup", ["layer", "sequence"])
@pytest.mark.parametrize("store_dtype", ["float32", "float16"])
def test_known_and_unknown_sentences_in_any_order(
    path: Path, name: str, target: str, lookup: str, store_dtype: str
) -> None:
    model = load(name)
    known, new = sentences(name)
    mt.build(model, [known], path, profile=False, target=target, store_dtype=store_dtype)
    with mt.memoize(model, path, threshold=1e-3, layers="all", lookup=lookup) as memo:
        found = states(model, known)
    assert memo.stats()["memoization_rate"] == 1.0
    assert torch.allclose(found, states(model, known), atol=1e-4 if store_dtype == "float32" else 1e-2, rtol=0)
    batch = rows_of(join(known, new), [9, 0, 3, 12, 5, 15, 1, 8])
    with mt.memoize(model, path, threshold=ITSELF, layers="all", lookup=lookup) as memo:
        found = states(model, batch)
    if store_dtype == "float32":
        assert [row["hits"] for row in memo.stats()["layers"]] == [4] * model.config.num_hidden_layers
    assert memo.stats()["layers"][0]["hits"] == 4
    assert torch.allclose(found, states_alone(model, batch), atol=1e-4 if store_dtype == "float32" else 1e-2, rtol=0)


@pytest.mark.parametrize("name", STORIES)
def test_stories_go_on_the_same(path: Path, name: str) -> None:
    model = load(name)
    known, new = sentences(name)
    mt.build(model, [known], path, profile=False)
    for batch in (known, new, rows_of(join(known, new), [0, 9, 2, 12])):
        plain = model.generate(**batch, max_new_tokens=20, do_sample=False)
        with mt.memoize(model, path, threshold=ITSELF, layers="all"):
            assert torch.equal(model.generate(**batch, max_new_tokens=20, do_sample=False), plain)
