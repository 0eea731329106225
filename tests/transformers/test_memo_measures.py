"""Eq. 1, Eq. 2, Eq. 3, the calibration of thresholds, and the distances that keys keep."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import numpy as np  # noqa: E402
from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

import memodb_transformers as mt  # noqa: E402
from memodb_transformers.similarity import context_similarities  # noqa: E402
from memodb_transformers.thresholds import fit_falling, threshold_for  # noqa: E402


def test_similarity_is_one_minus_the_mean_total_variation_of_the_rows() -> None:
    a = [[1.0, 0.0], [0.5, 0.5]]
    b = [[0.0, 1.0], [0.25, 0.75]]
    assert mt.similarity_score(a, a) == 1.0
    assert mt.similarity_score(a, b) == pytest.approx(1 - (1.0 + 0.25) / 2)
    assert mt.similarity_score(torch.tensor(a), np.array(b)) == pytest.approx(0.375)
    assert mt.similarity_score([[1.0, 0.0]], [[0.0, 1.0]]) == 0.0


def test_rows_of_padding_do_not_count() -> None:
    a, b = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    a[..., 0] = 1.0
    b[..., 0] = 1.0
    b[0, :, 1] = torch.tensor([0.0, 1.0, 0.0, 0.0])
    assert mt.similarity_score(a, b, lengths=1) == 1.0
    assert mt.similarity_score(a, b, lengths=torch.tensor([2, 4])) == pytest.approx((0.5 + 1.0) / 2)
    assert mt.similarity_score(a, b) == pytest.approx((0.75 + 1.0) / 2)


@pytest.mark.parametrize(
    ("a", "b", "lengths"),
    [
        (np.zeros((2, 2)), np.zeros((2, 3)), None),
        (np.zeros(2), np.zeros(2), None),
        (np.zeros((0, 2, 2)), np.zeros((0, 2, 2)), None),
        (np.zeros((2, 2)), np.zeros((2, 2)), 0),
        (np.zeros((2, 2)), np.zeros((2, 2)), 3),
        (np.zeros((2, 2)), np.zeros((2, 2)), 1.5),
        (np.zeros((2, 1, 2, 2)), np.zeros((2, 1, 2, 2)), [1]),
    ],
)
def test_similarity_refuses_what_it_cannot_compare(a: object, b: object, lengths: object) -> None:
    with pytest.raises(ValueError, match="expected"):
        mt.similarity_score(a, b, lengths)


def test_memoization_rate_is_hits_over_sequences_times_layers() -> None:
    assert mt.memoization_rate(6, 4, 3) == 0.5
    assert mt.memoization_rate([4, 0, 2], 4) == 0.5
    assert mt.memoization_rate([0, 0], 0) == 0.0
    for wrong in ((13, 4, 3), (-1, 4, 3)):
        with pytest.raises(ValueError, match="between 0 and"):
            mt.memoization_rate(*wrong)
    with pytest.raises(ValueError, match="layers="):
        mt.memoization_rate(6, 4)


@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=30))
def test_the_fit_falls_and_keeps_the_mean(values: list[float]) -> None:
    fitted = fit_falling(np.array(values))
    assert np.all(np.diff(fitted) <= 1e-12)
    assert fitted.mean() == pytest.approx(np.mean(values))
    if sorted(values, reverse=True) == values:
        np.testing.assert_allclose(fitted, values)


def test_a_threshold_is_the_largest_distance_that_reaches_the_level() -> None:
    distances = [0.3, 0.1, None, 0.2, 0.4]
    similarities = [0.7, 0.95, None, 0.85, 0.75]
    # 0.7 at 0.3 and 0.75 at 0.4 do not fall: both are predicted 0.725.
    assert threshold_for(distances, similarities, 0.9) == pytest.approx(0.1)
    assert threshold_for(distances, similarities, 0.8) == pytest.approx(0.2)
    assert threshold_for(distances, similarities, 0.72) == pytest.approx(0.4)
    assert threshold_for(distances, similarities, 0.99) is None
    assert threshold_for([None], [None], 0.5) is None


def test_the_benefit_is_eq_3_with_all_costs_of_a_hit() -> None:
    row = mt.LayerProfile(
        layer=0,
        attention_seconds=10.0,
        lookup_seconds=1.0,
        hit_seconds=2.0,
        split_seconds=0.5,
        distances=(0.1, 0.2, None, 0.4),
        similarities=(0.95, 0.9, None, 0.5),
    )
    assert row.alpha(0.25) == 0.5
    assert row.benefit(0.25) == pytest.approx(0.5 * 10 - (1 + 0.5 * 2 + 0.5))
    assert row.benefit(None) == pytest.approx(-1.0)
    report = mt.ProfileReport((row,), 4, 2, 1, "sdpa")
    assert report.paying({0: 0.25}) == [0]
    assert report.paying({0: 0.05}) == []
    assert report.paying({}) == []


def test_distances_of_keys_estimate_the_mean_squared_difference() -> None:
    hidden, other = torch.randn(2, 64, 24, 48, generator=torch.Generator().manual_seed(0))
    lengths = torch.full((64,), 20)
    embedder = mt.RandomProjection.create(24, 48, key_dim=128)
    keys, others = embedder.embed(0, hidden, lengths), embedder.embed(0, other, lengths)
    assert keys.shape == (64, 128)
    assert keys.dtype == np.float32
    estimated = ((keys - others) ** 2).sum(axis=1)
    true = (hidden - other)[:, :20].square().mean(dim=(1, 2)).numpy()
    assert estimated.mean() == pytest.approx(true.mean(), rel=0.1)


def test_a_key_does_not_depend_on_the_other_rows() -> None:
    hidden = torch.randn(8, 24, 48, generator=torch.Generator().manual_seed(0))
    lengths = torch.arange(1, 9)
    embedder = mt.RandomProjection.create(24, 48)
    together = embedder.embed(0, hidden, lengths)
    for row in range(8):
        alone = embedder.embed(0, hidden[[row]], lengths[[row]])
        np.testing.assert_allclose(alone[0], together[row], atol=1e-5)


def test_the_paper_s_embedder_is_three_linear_layers_on_the_flattened_state() -> None:
    hidden = torch.randn(5, 12, 16, generator=torch.Generator().manual_seed(0))
    embedder = mt.LinearMLP.create(12, 16, layers=3, key_dim=8)
    weights = torch.from_numpy(embedder.arrays()["weights"])
    for layer in range(3):
        keys = embedder.embed(layer, hidden, torch.full((5,), 12))
        np.testing.assert_allclose(keys, (hidden.flatten(1) @ weights[layer]).numpy(), atol=1e-4)
    assert not np.allclose(embedder.embed(0, hidden, torch.full((5,), 12)), keys, atol=1e-2)


@pytest.mark.parametrize("kind", ["projection", "mlp"])
def test_neither_padding_nor_its_width_changes_a_key(kind: str) -> None:
    embedder: mt.Embedder = (
        mt.RandomProjection.create(12, 16, key_dim=8) if kind == "projection" else mt.LinearMLP.create(12, 16, 2)
    )
    hidden = torch.randn(3, 12, 16, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([5, 9, 1])
    keys = embedder.embed(1, hidden, lengths)
    spoiled = hidden.masked_fill(torch.arange(12)[None, :, None] >= lengths[:, None, None], torch.nan)
    narrow = embedder.embed(1, hidden[:, :9], lengths)
    np.testing.assert_allclose(narrow, keys, atol=1e-5)
    spoiled[:, 9:] = 1e6
    if kind == "mlp":
        np.testing.assert_allclose(embedder.embed(1, spoiled, lengths), keys, atol=1e-5)


def test_similarity_of_contexts_counts_direction_and_length_of_valid_rows() -> None:
    a = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [5.0, 5.0]]])
    opposite, half = -a, 0.5 * a
    lengths = torch.tensor([2])
    assert context_similarities(a, a, lengths).item() == pytest.approx(1.0)
    assert context_similarities(a, opposite, lengths).item() == pytest.approx(0.0)
    assert context_similarities(a, half, lengths).item() == pytest.approx(1 - 0.5 / 1.5)
    other = a.clone()
    other[0, 2] = 0.0
    assert context_similarities(a, other, lengths).item() == pytest.approx(1.0)
    assert context_similarities(torch.zeros(1, 3, 2), torch.zeros(1, 3, 2), lengths).item() == 1.0
