"""What is counted of a model's answers, and what a bootstrap says of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import numpy as np  # noqa: E402
from tiny_models import tiny_batch, tiny_model  # noqa: E402

from memodb_transformers.outcomes import (  # noqa: E402
    SUMS,
    compare_outputs,
    interval,
    perplexity,
    ratio,
    resample,
)


def output(values: Any) -> SimpleNamespace:
    """Make what a model with a head returns."""
    return SimpleNamespace(logits=torch.as_tensor(values, dtype=torch.float32))


def column(sums: np.ndarray, name: str) -> list[float]:
    """Take one sum of each sequence."""
    found: list[float] = sums[:, SUMS.index(name)].tolist()
    return found


def unknown(sums: np.ndarray, *names: str) -> bool:
    """Tell whether these sums apply to no sequence."""
    return all(np.isnan(column(sums, name)).all() for name in names)


def test_classes_are_counted_by_sequence() -> None:
    plain = output([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0]])
    mine = output([[2.0, 1.0], [3.0, 0.0], [1.0, 0.0]])
    sums = compare_outputs(mine, plain, {}, torch.tensor([0, 1, -100]))
    assert column(sums, "right") == [1, 0, 0]
    assert column(sums, "labelled") == [1, 1, 0]
    assert column(sums, "same") == [1, 0, 1]
    assert column(sums, "predicted") == [1, 1, 1]
    assert column(sums, "change") == pytest.approx([0, 18**0.5 / 3, 0])
    assert ratio(sums.sum(axis=0), "right", "labelled") == 0.5
    assert unknown(sums, "surprise", "followed")
    assert np.isnan(perplexity(sums.sum(axis=0)))


@pytest.mark.parametrize(
    "labels", [None, torch.tensor([0.0, 1.0]), torch.tensor([True, False]), torch.zeros(3).long(), [0, 1]]
)
def test_what_is_no_label_of_a_class_gives_no_accuracy(labels: Any) -> None:
    logits = output([[2.0, 1.0], [0.0, 3.0]])
    sums = compare_outputs(logits, logits, {}, labels)
    assert unknown(sums, "right", "labelled")
    assert column(sums, "same") == [1, 1]


def test_one_number_is_no_choice() -> None:
    sums = compare_outputs(output([[2.0], [1.0]]), output([[1.0], [1.0]]), {}, torch.tensor([0, 0]))
    assert unknown(sums, "right", "labelled", "same", "predicted")
    assert column(sums, "change") == [1.0, 0.0]


def test_tokens_are_counted_without_padding_and_without_those_that_have_no_label() -> None:
    plain = torch.zeros(2, 4, 3)
    plain[:, :, 0] = 1.0
    mine = plain.clone()
    mine[0, 1] = torch.tensor([0.0, 1.0, 0.0])
    mine[:, 3] = torch.tensor([0.0, 0.0, 9.0])  # the last of the first sequence counts, of the second it is padding
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    labels = torch.tensor([[0, 1, -100, 0], [0, -100, 0, 2]])
    sums = compare_outputs(output(mine), output(plain), {"attention_mask": mask}, labels)
    assert column(sums, "right") == [2, 1]
    assert column(sums, "labelled") == [3, 1]
    assert column(sums, "same") == [2, 2]
    assert column(sums, "predicted") == column(sums, "positions") == [4, 2]
    assert column(sums, "change") == pytest.approx([2**0.5 + 82**0.5, 0])


def test_next_tokens_are_followed_only_where_both_are_there() -> None:
    model = tiny_model("gpt2")
    batch = tiny_batch([16, 5, 7], left=[2])
    with torch.no_grad():
        found = model(**batch)
    sums = compare_outputs(found, found, batch, next_tokens=True)
    expected = []
    for ids, mask, logits in zip(batch["input_ids"], batch["attention_mask"], found.logits, strict=True):
        places = mask.nonzero()[:, 0].tolist()
        chances = logits.double().log_softmax(dim=-1)
        expected.append(-sum(chances[place, ids[place + 1]].item() for place in places[:-1]))
    assert column(sums, "surprise") == pytest.approx(expected, rel=1e-5)
    assert column(sums, "followed") == [15, 4, 6]
    assert unknown(sums, "right", "labelled")
    total = sums.sum(axis=0)
    assert perplexity(total) == pytest.approx(np.exp(sum(expected) / 25), rel=1e-5)


def test_labels_of_a_language_model_say_which_tokens_are_followed() -> None:
    model = tiny_model("llama")
    batch = tiny_batch([6, 6], padded=6)
    labels = batch["input_ids"].clone()
    labels[0, :4] = -100
    with torch.no_grad():
        found = model(**batch)
        loss = model(**batch, labels=labels).loss
    sums = compare_outputs(found, found, batch, labels, next_tokens=True)
    assert column(sums, "followed") == column(sums, "labelled") == [2, 5]
    right = (found.logits[:, :-1].argmax(dim=-1) == labels[:, 1:]).sum(dim=1).tolist()
    assert column(sums, "right") == right
    assert perplexity(sums.sum(axis=0)) == pytest.approx(loss.exp().item(), rel=1e-5)


def test_a_model_without_a_head_is_compared_by_its_hidden_state() -> None:
    model = tiny_model().bert
    batch = tiny_batch([16, 5])
    with torch.no_grad():
        plain = model(**batch)
    scaled = (1.5 * plain.last_hidden_state,)
    sums = compare_outputs(scaled, plain, batch, torch.tensor([0, 1]))
    assert column(sums, "positions") == [16, 5]
    assert column(sums, "change") == pytest.approx([8, 2.5], rel=1e-5)
    assert unknown(sums, *SUMS[:6])


def test_equal_runs_have_no_difference_in_any_draw() -> None:
    random = np.random.default_rng(3)
    sums = random.random((37, 8))
    first, second = resample([sums, sums.copy()], seed=0)
    assert first.shape == (2000, 8)
    assert np.array_equal(first, second)
    assert interval(perplexity(first) - perplexity(second), 0.95) == (0.0, 0.0)


def test_draws_depend_on_the_seed_alone() -> None:
    sums = np.random.default_rng(3).random((10, 8))
    again = [resample([sums], seed=seed, resamples=50)[0] for seed in (0, 0, 1)]
    assert np.array_equal(again[0], again[1])
    assert not np.array_equal(again[0], again[2])


def test_the_interval_of_a_share_is_that_of_the_binomial() -> None:
    sums = np.full((400, 8), np.nan)
    sums[:, SUMS.index("right")] = np.arange(400) < 300
    sums[:, SUMS.index("labelled")] = 1
    (drawn,) = resample([sums], seed=0)
    low, high = interval(ratio(drawn, "right", "labelled"), 0.95)
    error = 1.96 * (0.75 * 0.25 / 400) ** 0.5
    assert (low, high) == pytest.approx((0.75 - error, 0.75 + error), abs=0.006)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    random = np.random.default_rng(0)
    held = 0
    for trial in range(200):
        sums = np.zeros((150, 8))
        sums[:, SUMS.index("right")] = random.random(150) < 0.8
        sums[:, SUMS.index("labelled")] = 1
        (drawn,) = resample([sums], seed=trial, resamples=400)
        low, high = interval(ratio(drawn, "right", "labelled"), 0.9)
        assert low is not None
        assert high is not None
        held += low <= 0.8 <= high
    assert 0.84 <= held / 200 <= 0.96


def test_the_difference_of_two_runs_is_surer_than_either() -> None:
    random = np.random.default_rng(1)
    plain = np.zeros((300, 8))
    plain[:, SUMS.index("right")] = random.random(300) < 0.7
    plain[:, SUMS.index("labelled")] = 1
    other = plain.copy()
    other[:3, SUMS.index("right")] = 1 - other[:3, SUMS.index("right")]
    accuracies = [ratio(drawn, "right", "labelled") for drawn in resample([plain, other], seed=0)]
    (low, high), (apart_low, apart_high) = (
        interval(accuracies[0], 0.95),
        interval(accuracies[1] - accuracies[0], 0.95),
    )
    assert low is not None
    assert high is not None
    assert apart_low is not None
    assert apart_high is not None
    assert apart_high - apart_low < 0.3 * (high - low)


def test_what_does_not_apply_has_no_interval() -> None:
    assert interval(np.full(5, np.nan), 0.95) == (None, None)
    sums = np.zeros((4, 8))
    sums[0, SUMS.index("right")] = sums[0, SUMS.index("labelled")] = 1
    # Draws without the one labelled sequence tell nothing; the others do.
    (drawn,) = resample([sums], seed=0)
    assert interval(ratio(drawn, "right", "labelled"), 0.95) == (1.0, 1.0)
