"""Training of embedders: what it learns, what it leaves alone, and the embedders that come of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tiny_models import PADDED, logits, tiny_batch, tiny_model  # noqa: E402

import memodb_transformers as mt  # noqa: E402
from memodb_transformers.embedding import load_embedder  # noqa: E402
from memodb_transformers.samples import LayerSample, Samples  # noqa: E402
from memodb_transformers.separable import principal_tokens, token_width  # noqa: E402
from memodb_transformers.training import _tests, _Trainee, assemble, retrieval, split_known, train_layer  # noqa: E402

KINDS = ("mlp", "separable")
LONG, WIDE = 6, 8


def sample(count: int = 200, *, noise: float = 1.0, lengths: Any = LONG, wide: int = WIDE) -> LayerSample:
    """A sample in which one number of one token tells all of a record; the others are noise."""
    random = np.random.default_rng(3)
    told = random.uniform(0, 1, count).astype(np.float32)
    hidden = noise * random.standard_normal((count, LONG, wide)).astype(np.float32)
    hidden[:, 1, 3] = told
    similar = 1.0 - np.abs(told[:, None] - told[None])
    lengths = np.broadcast_to(np.asarray(lengths, dtype=np.int64), (count,)).copy()
    similar[lengths[:, None] != lengths[None]] = np.nan
    return LayerSample(torch.from_numpy(hidden), lengths, similar, 1.0 - np.abs(told - told.mean()), split_known(count))


@pytest.mark.parametrize(
    ("kind", "data"),
    [("mlp", sample(200)), ("separable", sample(500, noise=0.3, wide=64))],  # a token is three numbers, of 64
    ids=KINDS,
)
def test_training_finds_out_what_records_depend_on(kind: str, data: LayerSample) -> None:
    arrays, told = train_layer(kind, 0, data, key_dim=64)
    assert told.tested == len(data.lengths) // 10  # as many decide when to stop
    assert told.oracle is not None
    assert told.found is not None
    assert told.untrained is not None
    assert told.mean is not None
    assert told.found > told.mean + 0.15
    assert told.found > told.untrained + 0.15
    assert told.found <= told.oracle
    assert 0 < told.epochs <= 30
    # What is stored finds just as well, and its distances are what they should be: how unlike the records are.
    keys = assemble(kind, [arrays]).embed(0, data.hidden, torch.from_numpy(data.lengths))
    assert retrieval(keys, data, list(_tests(data))[1::2]) == pytest.approx(told.found, abs=1e-3)
    pairs = np.triu_indices(len(keys), 1)
    apart = torch.cdist(torch.from_numpy(keys), torch.from_numpy(keys)).numpy()[pairs]
    unlike = 1.0 - data.similarities[pairs]
    assert apart.mean() == pytest.approx(unlike.mean(), rel=0.2)
    assert np.corrcoef(apart, unlike)[0, 1] > 0.8


@pytest.mark.parametrize("kind", KINDS)
def test_equal_seeds_give_equal_embedders(kind: str) -> None:
    first, told = train_layer(kind, 1, sample(60), key_dim=8, epochs=3, seed=4)
    torch.manual_seed(99)
    again, same = train_layer(kind, 1, sample(60), key_dim=8, epochs=3, seed=4)
    other, _ = train_layer(kind, 1, sample(60), key_dim=8, epochs=3, seed=5)
    later, _ = train_layer(kind, 2, sample(60), key_dim=8, epochs=3, seed=4)
    assert told.found == same.found
    for name, array in first.items():
        np.testing.assert_array_equal(array, again[name])
        assert not np.array_equal(array, other[name]) or not array.any()
        assert not np.array_equal(array, later[name]) or not array.any()


@contextmanager
def by_default(dtype: Any) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def bfloat16() -> Any:
    return by_default(torch.bfloat16)


def double() -> Any:
    return by_default(torch.float64)


def half() -> Any:
    return torch.autocast("cpu", dtype=torch.bfloat16)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", [half, torch.inference_mode, torch.no_grad, double, bfloat16])
def test_training_is_the_same_in_any_mode(kind: str, mode: Any) -> None:
    plain, _ = train_layer(kind, 0, sample(60), key_dim=8, epochs=3)
    with mode():
        arrays, told = train_layer(kind, 0, sample(60), key_dim=8, epochs=3)
    assert told.epochs == 3
    for name, array in plain.items():
        assert arrays[name].dtype == np.float32
        np.testing.assert_allclose(arrays[name], array, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_no_epochs_leave_the_embedder_as_it_began(kind: str) -> None:
    data = sample(60)
    arrays, told = train_layer(kind, 0, data, key_dim=8, epochs=0)
    assert (told.epochs, told.tested) == (0, 6)
    keys = torch.from_numpy(assemble(kind, [arrays]).embed(0, data.hidden, torch.from_numpy(data.lengths)))
    # But for their scale, which costs nothing.
    apart = torch.cdist(keys, keys).numpy()[np.triu_indices(60, 1)].mean()
    assert apart == pytest.approx((1.0 - data.similarities[np.triu_indices(60, 1)]).mean(), rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", [np.array([3]), np.array([2, 3, 4, 5, 6]), np.array([4, 4])])
def test_too_few_sequences_leave_an_embedder_all_the_same(kind: str, lengths: Any) -> None:
    arrays, told = train_layer(kind, 0, sample(len(lengths), lengths=lengths), key_dim=8)
    assert (told.tested, told.epochs) == (0, 0)
    assert told.found is told.untrained is told.oracle is told.mean is None
    assert all(np.isfinite(array).all() for array in arrays.values())
    assert any(array.any() for array in arrays.values())


def test_sequences_of_other_lengths_teach_nothing() -> None:
    lengths = np.where(np.arange(100) % 2, LONG, LONG - 2)
    data = sample(100, lengths=lengths)
    arrays, told = train_layer("separable", 0, data, key_dim=8, epochs=2)
    assert told.tested == 10
    known = data.known
    best = [
        data.similarities[row, known & (lengths == lengths[row])].max() for row in np.flatnonzero(~known)[1::2].tolist()
    ]
    assert told.oracle == pytest.approx(np.mean(best))
    assert all(np.isfinite(array).all() for array in arrays.values())


def test_the_three_layers_of_the_mlp_are_folded_into_one() -> None:
    trainee = _Trainee("mlp", LONG, WIDE, 5, seed=3)
    with torch.no_grad():
        for bias in trainee.parameters[3:]:
            bias.add_(torch.randn(bias.shape, generator=torch.Generator().manual_seed(1)))
    data = sample(9)
    folded = assemble("mlp", [trainee.folded()])
    assert isinstance(folded, mt.LinearMLP)
    np.testing.assert_allclose(
        folded.embed(0, data.hidden, torch.from_numpy(data.lengths)), trainee.embed(data), atol=1e-5
    )


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_that_are_not_finite_do_not_poison_training(shm: Path, kind: str) -> None:
    data = sample(60)
    records = np.zeros((1, 60, 2, LONG, LONG), dtype=np.float16)
    records[0, :, :, :, 0], records[0, :, :, :, 1] = (
        part[:, None, None] for part in (data.hidden[:, 1, 3].numpy(), 1 - data.hidden[:, 1, 3].numpy())
    )
    hidden = data.hidden.numpy()[None].copy()
    hidden[0, 7, 2], hidden[0, 9, 0, 0], hidden[0, 14, 5] = np.nan, np.inf, -np.inf
    records[0, 20, 1, 3] = np.nan  # scores that overflowed
    for name, array in (("hidden", hidden), ("records", records), ("lengths", data.lengths)):
        np.save(shm / f"{name}.npy", array)
    found = Samples(shm).layer(0, split_known(60))
    bad = [7, 9, 14, 20]
    assert np.isnan(found.similarities[bad]).all()
    assert np.isnan(found.similarities[:, bad]).all()
    good = np.setdiff1d(np.arange(60), bad)
    assert np.isfinite(found.similarities[np.ix_(good, good)]).all()
    np.testing.assert_allclose(found.similarities[np.ix_(good, good)], data.similarities[np.ix_(good, good)], atol=2e-3)
    assert np.isfinite(found.to_mean[good]).all()
    arrays, told = train_layer(kind, 0, found, key_dim=8, epochs=2)
    assert all(np.isfinite(array).all() for array in arrays.values())
    assert told.tested == 5  # of twelve, two are among the bad, and half decide when to stop
    assert told.mean is not None
    assert 0 < told.mean < 1


def test_what_cannot_be_computed_is_left_out_of_a_build(path: Path) -> None:
    model = tiny_model()
    batch = tiny_batch([8] * 40)
    batch["input_ids"][batch["input_ids"] == 59] = 58
    batch["input_ids"][4, 0] = batch["input_ids"][17, 2] = 59
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[59] = torch.inf
    report = mt.build(model, [batch], path, embedder="separable", epochs=2, profile=False)
    assert (report.sequences, report.skipped) == (38, 2)
    assert report.training is not None
    assert all(row.found is not None and 0 < row.found < 1 for row in report.training.layers)
    good = {name: value[[0, 1, 2, 3]] for name, value in batch.items()}
    with mt.memoize(model, path, threshold=1e-6, layers="all") as memo:
        logits(model, good)
    assert memo.stats()["memoization_rate"] == 1.0


@pytest.mark.parametrize("made", [mt.Separable.create(PADDED, 32, 2), mt.LinearMLP.create(PADDED, 32, 2)])
def test_padding_and_how_much_there_is_of_it_change_no_key(made: Any) -> None:
    hidden = torch.randn(5, PADDED, 32, generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([3, 9, 1, 9, 7])
    keys = made.embed(1, hidden, lengths)
    assert keys.shape == (5, made.key_dim)
    noisy = hidden.clone()
    for row, length in enumerate(lengths.tolist()):
        noisy[row, length:] = torch.nan
    np.testing.assert_allclose(made.embed(1, noisy, lengths), keys, atol=1e-5)
    np.testing.assert_allclose(made.embed(1, noisy[:, :9], lengths), keys, atol=1e-5)
    moved = hidden.clone()
    moved[:, 0] += 1.0
    assert np.abs(made.embed(1, moved, lengths) - keys).max() > 1e-3
    assert np.abs(made.embed(0, hidden, lengths) - keys).max() > 1e-3  # each layer has its own
    with pytest.raises(ValueError, match="at most"):
        made.embed(0, torch.zeros(1, PADDED + 1, 32), torch.tensor([PADDED + 1]))


@pytest.mark.parametrize(("width", "key_dim"), [(384, 128), (768, 128), (64, 128), (1024, 64), (4096, 256)])
def test_the_separable_embedder_takes_ten_times_fewer_products(width: int, key_dim: int) -> None:
    few = token_width(width, key_dim)
    assert 10 * (width * few + few * key_dim) <= width * key_dim  # of each token
    assert 10 * (width * (few + 1) + (few + 1) * key_dim) > width * key_dim  # as many as that allows
    cheap, paper = (
        sum(array.size for array in made.create(4, width, 1, key_dim=key_dim).arrays().values())
        for made in (mt.Separable, mt.LinearMLP)
    )
    assert cheap < paper / 2  # at L = 4; the matrix of the tokens is the same at every length


def test_a_separable_embedder_is_made_again_from_its_arrays() -> None:
    made = mt.Separable.create(PADDED, 32, 3, key_dim=16, seed=2)
    again = load_embedder(made.config(), made.arrays())
    assert isinstance(again, mt.Separable)
    assert (again.key_dim, again.padded_length) == (16, PADDED)
    hidden, lengths = torch.randn(4, PADDED, 32), torch.tensor([16, 3, 8, 8])
    np.testing.assert_array_equal(again.embed(2, hidden, lengths), made.embed(2, hidden, lengths))


@pytest.mark.parametrize(
    "damage",
    [
        {"tokens": None},
        {"mixing": np.zeros((2, 3, 4), dtype=np.float32)},
        {"tokens": np.zeros((1, 32, 3), dtype=np.float32)},
        {"biases": np.zeros((2, 5), dtype=np.float32)},
        {"biases": np.full((2, 16), np.nan, dtype=np.float32)},
        {"mixing": np.zeros((2, PADDED, 1, 16), dtype=np.int64)},
    ],
)
def test_damaged_arrays_are_refused(damage: dict[str, Any]) -> None:
    made = mt.Separable.create(PADDED, 32, 2, key_dim=16)
    arrays = {name: array for name, array in {**made.arrays(), **damage}.items() if array is not None}
    with pytest.raises(mt.StoreMismatchError):
        load_embedder(made.config(), arrays)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("family", "target"),
    [("bert", "probs"), ("bert", "context"), ("gpt2", "probs"), ("llama", "probs"), ("deberta-v2", "probs")],
)
def test_a_build_trains_for_each_family(path: Path, kind: str, family: str, target: str) -> None:
    model = tiny_model(family)
    batch = tiny_batch([5, 9, 9, 16, 5] * 8)
    report = mt.build(model, [batch], path, embedder=kind, epochs=2, target=target, profile=False)
    assert report.embedder == {"mlp": mt.LinearMLP, "separable": mt.Separable}[kind].kind
    assert report.training is not None
    assert report.training.kind == kind
    assert (report.training.sequences, [row.layer for row in report.training.layers]) == (40, [0, 1])
    for row in report.training.layers:
        assert row.tested == 4
        assert row.found is not None
        assert row.oracle is not None
        assert row.found <= row.oracle <= 1.0
    assert "random projection" in report.training.to_markdown()
    assert report.to_dict()["training"]["layers"][1]["layer"] == 1
    with mt.memoize(model, path, threshold=1e-6, layers="all") as memo:
        found = logits(model, batch)
    assert memo.stats()["memoization_rate"] == 1.0
    expected = logits(model, batch)
    valid = batch["attention_mask"].bool() if found.dim() == 3 else slice(None)
    assert torch.allclose(found[valid], expected[valid], atol=1e-3)


@pytest.mark.parametrize("mode", [half, torch.inference_mode, double, nullcontext])
def test_a_build_trains_in_any_mode(path: Path, mode: Any) -> None:
    model, batch = tiny_model(), tiny_batch([8] * 30)
    with mode():
        report = mt.build(model, [batch], path, embedder="mlp", epochs=2, profile=False)
        with mt.memoize(model, path, threshold=1e-4, layers="all") as memo:
            logits(model, batch)
    assert memo.stats()["memoization_rate"] == 1.0
    assert report.training is not None
    assert max(row.epochs for row in report.training.layers) == 2
    for array in (path / "transformers").glob("embedder-*.npy"):
        assert np.load(array).dtype == np.float32


def test_little_scratch_leaves_little_to_train_on(path: Path) -> None:
    report = mt.build(tiny_model(), [tiny_batch([8] * 30)], path, scratch_bytes=1, profile=False)
    assert report.training is not None
    assert report.training.sequences == 2
    assert [(row.tested, row.found) for row in report.training.layers] == [(0, None), (0, None)]
    assert report.records == 60
    assert "None" not in report.to_markdown()


def test_an_embedder_is_trained_on_what_it_will_see(path: Path) -> None:
    """Rows of padding are no part of a hidden state, neither in training nor in use."""
    from memodb_transformers.capture import in_inference
    from memodb_transformers.sites import find_memoizable

    model = tiny_model()
    sites = find_memoizable(model)
    batches = [tiny_batch([5, 9, 12, 16, 7], seed=seed) for seed in range(4)]
    with in_inference(model):
        samples = Samples.collect(model, sites, batches, path, PADDED, "probs")
    data = samples.layer(1, split_known(len(samples)))
    for row, length in enumerate(data.lengths.tolist()):
        assert not data.hidden[row, length:].any()
        assert data.hidden[row, :length].any()
    trainee = _Trainee("mlp", PADDED, 32, 8, seed=0)
    used = assemble("mlp", [trainee.folded()])
    with torch.no_grad():
        hidden = data.hidden.clone()
        for row, length in enumerate(data.lengths.tolist()):
            hidden[row, length:] = 5.0
    keys = used.embed(0, hidden, torch.from_numpy(data.lengths))
    np.testing.assert_allclose(keys, trainee.embed(data), atol=1e-4)


def test_training_of_the_separable_one_begins_with_what_tells_tokens_apart() -> None:
    random = torch.Generator().manual_seed(2)
    spread = torch.tensor([0.1, 5.0, 0.1, 2.0, 0.1, 0.1])
    hidden = 7.0 + torch.randn(200, 4, 6, generator=random) * spread
    lengths = torch.tensor([4, 2] * 100)
    hidden[1::2, 2:] = 1e4  # beyond the lengths: must not count
    found = principal_tokens(hidden, lengths, 2)
    assert found is not None
    assert found[:, 0].abs().argmax() == 1
    assert found[:, 1].abs().argmax() == 3
    valid = torch.cat([hidden[::2].flatten(0, 1), hidden[1::2, :2].flatten(0, 1)])
    projected = (valid - valid.mean(dim=0)) @ found
    torch.testing.assert_close(projected.T @ projected / len(projected), torch.eye(2), atol=1e-3, rtol=0.0)


def test_training_begins_with_directions_of_what_it_may_know() -> None:
    data = sample(60, wide=64)
    first = train_layer("separable", 0, data, key_dim=64, epochs=0)[0]["tokens"]
    expected = principal_tokens(data.hidden, torch.from_numpy(data.lengths * data.known), first.shape[1])
    assert expected is not None
    np.testing.assert_array_equal(first, expected.numpy())
    data.hidden[torch.from_numpy(~data.known)] += 100.0
    np.testing.assert_array_equal(train_layer("separable", 0, data, key_dim=64, epochs=0)[0]["tokens"], first)
    data.hidden[0] = 0.0  # so are hidden states handed over that were not finite
    data.similarities[0] = data.similarities[:, 0] = np.nan
    other = train_layer("separable", 0, data, key_dim=64, epochs=0)[0]["tokens"]
    known = data.known & (np.arange(60) > 0)
    expected = principal_tokens(data.hidden, torch.from_numpy(data.lengths * known), first.shape[1])
    assert expected is not None
    np.testing.assert_array_equal(other, expected.numpy())


def test_many_tokens_are_sampled_evenly() -> None:
    hidden = torch.randn(9000, 2, 3, generator=torch.Generator().manual_seed(5)) * torch.tensor([1.0, 4.0, 2.0])
    hidden[6000:] *= 10.0  # the last ones count as well
    found = principal_tokens(hidden, torch.full((9000,), 2), 2)
    assert found is not None
    variance = ((hidden.flatten(0, 1) @ found) ** 2).mean(dim=0)
    torch.testing.assert_close(variance, torch.ones(2), atol=0.1, rtol=0.0)


def test_tokens_that_hardly_differ_have_no_directions() -> None:
    one = torch.randn(1, 1, 6).expand(5, 4, 6)
    assert principal_tokens(one, torch.full((5,), 4), 2) is None
    assert principal_tokens(1e4 + 1e-3 * torch.randn(5, 4, 6), torch.full((5,), 4), 1) is None
    assert principal_tokens(torch.randn(5, 4, 6), torch.zeros(5, dtype=torch.int64), 2) is None
    assert principal_tokens(torch.randn(5, 4, 6), torch.full((5,), 4), 7) is None
    # An embedder is trained all the same: it begins with random ones.
    data = sample(60)
    data.hidden[:] = 3.0
    _, told = train_layer("separable", 0, data, key_dim=8, epochs=1)
    assert told.found is not None


def test_a_sample_that_does_not_fit_is_an_error_and_no_signal(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno
    import os

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        mt.build(tiny_model(), [tiny_batch([8] * 20)], path)
    assert list(path.parent.iterdir()) == []
