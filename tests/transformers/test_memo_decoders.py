"""Caches and generation: a hit fills the key/value cache as the original would, decoding steps run as ever."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tiny_models import FAMILIES, join, rows_of, tiny_batch, tiny_model  # noqa: E402

import memodb_transformers as mt  # noqa: E402

ANY_DISTANCE = 1e9
ITSELF = 1e-4
DECODERS = [name for name, kind in FAMILIES.items() if kind.causal]
LENGTHS = [5, 9, 12, 5]


def prompts(seed: int = 1) -> dict[str, torch.Tensor]:
    """Make prompts padded on the left, as generation wants them."""
    return tiny_batch(LENGTHS, seed=seed, padded=12, left=range(len(LENGTHS)))


def as_generated(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Add the positions that ``generate`` gives to prompts: counted from the first token on."""
    return {**batch, "position_ids": (batch["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)}


def generate(model: Any, batch: dict[str, torch.Tensor], **settings: Any) -> torch.Tensor:
    found: torch.Tensor = model.generate(**batch, max_new_tokens=8, min_new_tokens=8, do_sample=False, **settings)
    return found


def cached(cache: Any, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Return K and V of all layers, with zeros where padding is."""
    present = batch["attention_mask"][:, None, :, None]
    return [part * present for layer in cache.layers for part in (layer.keys, layer.values)]


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("target", ["probs", "context"])
@pytest.mark.parametrize("lookup", ["layer", "sequence"])
def test_the_cache_is_filled_as_without_memoization(
    path: Path, family: str, attention: str, target: str, lookup: str
) -> None:
    model = tiny_model(family, attention=attention)
    known, new = prompts(), prompts(seed=2)
    mt.build(model, [known], path, profile=False, target=target)
    for batch, hits in ((known, 4), (rows_of(join(new, known), [4, 0, 1, 6, 2, 5, 7, 3]), 4)):
        with torch.no_grad():
            plain = model(**batch, use_cache=True)
            with mt.memoize(model, path, threshold=ITSELF, layers="all", lookup=lookup) as memo:
                found = model(**batch, use_cache=True)
        assert [row["hits"] for row in memo.stats()["layers"]] == [hits, hits]
        assert type(found.past_key_values) is type(plain.past_key_values)
        assert found.past_key_values.get_seq_length() == 12
        own, expected = (cached(output.past_key_values, batch) for output in (found, plain))
        assert all(torch.allclose(a, b, atol=1e-4, rtol=0) for a, b in zip(own, expected, strict=True))


@pytest.mark.parametrize("family", DECODERS)
def test_a_cache_handed_in_empty_is_filled_and_a_filled_one_takes_the_original_path(path: Path, family: str) -> None:
    model = tiny_model(family)
    known = prompts()
    mt.build(model, [known], path, profile=False)
    with torch.no_grad(), mt.memoize(model, path, threshold=ANY_DISTANCE, layers="all") as memo:
        cache = transformers.DynamicCache(config=model.config)
        model(**known, past_key_values=cache)
        assert [row["hits"] for row in memo.stats()["layers"]] == [4, 4]
        again = {**known, "attention_mask": torch.cat([known["attention_mask"], torch.ones(4, 12).long()], dim=1)}
        found = model(**again, past_key_values=cache).logits
        assert [row["hits"] for row in memo.stats()["layers"]] == [4, 4]
        assert [row["bypassed"] for row in memo.stats()["layers"]] == [4, 4]
    with torch.no_grad():
        cache = transformers.DynamicCache(config=model.config)
        model(**known, past_key_values=cache)
        expected = model(**again, past_key_values=cache).logits
    assert torch.allclose(found, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("settings", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
def test_generation_is_the_same_without_a_hit(path: Path, family: str, settings: dict[str, Any]) -> None:
    model = tiny_model(family)
    mt.build(model, [prompts()], path, profile=False)
    batch = prompts(seed=2)
    plain = generate(model, batch, **settings)
    with mt.memoize(model, path, threshold=0.0, layers="all") as memo:
        assert torch.equal(generate(model, batch, **settings), plain)
    layers = memo.stats()["layers"]
    assert [row["lookups"] for row in layers] == ([4, 4] if not settings else [0, 0])
    assert all(row["bypassed"] >= 4 * 7 for row in layers)


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("target", ["probs", "context"])
def test_generation_goes_on_from_prompts_that_were_looked_up(path: Path, family: str, target: str) -> None:
    model = tiny_model(family)
    known, new = prompts(), prompts(seed=2)
    mt.build(model, [as_generated(known)], path, profile=False, target=target)
    for batch in (known, rows_of(join(known, new), [6, 1, 0, 5])):
        plain = generate(model, batch)
        with mt.memoize(model, path, threshold=ITSELF, layers="all") as memo:
            assert torch.equal(generate(model, batch), plain)
        assert memo.stats()["layers"][0]["hits"] >= 2


@pytest.mark.parametrize("family", DECODERS)
def test_beams_and_sampling_work(path: Path, family: str) -> None:
    model = tiny_model(family)
    mt.build(model, [as_generated(prompts())], path, profile=False)
    for settings in ({"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}):
        plain = generate(model, prompts(), **settings)
        with mt.memoize(model, path, threshold=ITSELF, layers="all") as memo:
            assert torch.equal(generate(model, prompts(), **settings), plain)
        assert memo.stats()["layers"][0]["hits"] >= 4


def test_positions_of_the_caller_that_count_up_are_followed_and_others_are_not(path: Path) -> None:
    model = tiny_model("llama")
    known = tiny_batch(LENGTHS, padded=12)
    mt.build(model, [known], path, profile=False)
    counted = torch.arange(12).expand(4, -1) + 2
    packed = counted.clone()
    packed[1, 4:] -= 4  # two sequences in one row: positions begin again
    with torch.no_grad():
        for positions, hits in ((counted, 4), (counted[:1], 4), (packed, 3)):
            plain = model(**known, position_ids=positions).logits
            with mt.memoize(model, path, threshold=ITSELF, layers="all") as memo:
                found = model(**known, position_ids=positions).logits
            assert [row["hits"] for row in memo.stats()["layers"]] == [hits, hits]
            tokens = known["attention_mask"].bool()
            assert torch.allclose(found[tokens], plain[tokens], atol=1e-4, rtol=0)


def test_rotations_that_depend_on_the_other_sequences_are_refused(path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model = tiny_model("llama", rope_parameters=rope)
    with pytest.raises(mt.UnsupportedModelError, match="dynamic"):
        mt.build(model, [prompts()], path)
    assert not path.exists()


def test_a_decoder_that_is_given_states_to_attend_to_takes_the_original_path(path: Path) -> None:
    model = tiny_model("gpt2", add_cross_attention=True)
    batch = tiny_batch(LENGTHS)
    mt.build(model, [batch], path, profile=False)
    other = torch.randn(4, 6, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = model(**batch, encoder_hidden_states=other).logits
        with mt.memoize(model, path, threshold=ANY_DISTANCE, layers="all") as memo:
            found = model(**batch, encoder_hidden_states=other).logits
            assert [row["hits"] for row in memo.stats()["layers"]] == [0, 0]
            model(**batch, use_cache=False)
            assert [row["hits"] for row in memo.stats()["layers"]] == [4, 4]
    assert torch.equal(found, plain)
