"""All records against all: the same as pair by pair, in little memory, and the best of them."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import memodb_transformers as mt  # noqa: E402
from memodb_transformers import similarity  # noqa: E402
from memodb_transformers.similarity import (  # noqa: E402
    best_records,
    context_matrix,
    context_similarities,
    similarity_matrix,
    similarity_scores,
)

HEADS, PADDED = 3, 10


def records(count: int, seed: int, length: int = PADDED, sharp: float = 2.0) -> Any:
    """Make random attention probabilities, with zeros beyond a valid length."""
    generator = torch.Generator().manual_seed(seed)
    made = torch.zeros(count, HEADS, PADDED, PADDED)
    scores = sharp * torch.randn(count, HEADS, length, length, generator=generator)
    made[:, :, :length, :length] = scores.softmax(dim=-1)
    return made


def contexts(count: int, seed: int) -> Any:
    return torch.randn(count, PADDED, 12, generator=torch.Generator().manual_seed(seed))


def pair_by_pair(a: Any, b: Any, length: int = PADDED) -> np.ndarray:
    rows = [
        similarity_scores(one[None].expand(len(b), -1, -1, -1), b, torch.full((len(b),), length)).numpy() for one in a
    ]
    return np.stack(rows)


@pytest.mark.parametrize("length", [1, 2, 7, PADDED])
def test_all_pairs_are_as_each_pair_by_itself(length: int) -> None:
    a, b = records(4, 1, length), records(5, 2, length)
    found = similarity_matrix(a, b, length)
    assert (found.shape, found.dtype) == ((4, 5), np.float32)
    np.testing.assert_allclose(found, pair_by_pair(a, b, length), atol=1e-6)
    assert found[1, 2] == pytest.approx(mt.similarity_score(a[1], b[2], length), abs=1e-6)
    if length > 1:
        assert found.std() > 1e-3


def test_equal_records_are_1_and_disjoint_ones_0() -> None:
    one = torch.zeros(1, HEADS, PADDED, PADDED)
    other = one.clone()
    one[..., 0], other[..., 1] = 1.0, 1.0
    np.testing.assert_allclose(similarity_matrix(one, torch.cat([one, other])), [[1.0, 0.0]], atol=1e-6)


def test_what_lies_beyond_the_length_does_not_count() -> None:
    a, b = records(3, 1, 6), records(3, 2, 6)
    expected = similarity_matrix(a, b, 6)
    for part in (a, b):
        part[:, :, 6:] = torch.rand(3, HEADS, PADDED - 6, PADDED)
        part[:, :, :, 6:] = torch.nan
    np.testing.assert_array_equal(similarity_matrix(a, b, 6), expected)


def test_heads_and_the_first_row_can_be_told_apart() -> None:
    a, b = records(3, 1, 7), records(4, 2, 7)
    by_head = similarity_matrix(a, b, 7, by_head=True)
    assert by_head.shape == (HEADS, 3, 4)
    np.testing.assert_allclose(by_head.mean(axis=0), similarity_matrix(a, b, 7), atol=1e-6)
    for head in range(HEADS):
        one = slice(head, head + 1)
        np.testing.assert_allclose(by_head[head], pair_by_pair(a[:, one], b[:, one], 7), atol=1e-6)
    first = similarity_matrix(a, b, 7, first_row=True)
    assert first[2, 1] == pytest.approx(mt.similarity_score(a[2, :, :1], b[1, :, :1]), abs=1e-6)
    assert similarity_matrix(a, b, 7, first_row=True, by_head=True).shape == (HEADS, 3, 4)


def test_some_rows_of_records_can_be_compared() -> None:
    a, b = records(3, 1), records(4, 2)
    found = similarity_matrix(a[:, :, ::3], b[:, :, ::3])
    assert found[1, 1] == pytest.approx(mt.similarity_score(a[1, :, ::3], b[1, :, ::3]), abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_dtypes_can_be_mixed(dtype: Any) -> None:
    a, b = records(3, 1), records(3, 2)
    found = similarity_matrix(a, b.to(dtype))
    np.testing.assert_allclose(found, pair_by_pair(a, b.to(dtype).float()), atol=1e-6)


def test_records_that_need_gradients_can_be_compared() -> None:
    a, b = records(2, 1).requires_grad_(), records(2, 2)
    np.testing.assert_allclose(similarity_matrix(a, b), pair_by_pair(a.detach(), b), atol=1e-6)


@pytest.mark.parametrize("side", [1, 700, 1 << 24])
@pytest.mark.parametrize("features", [1, 33, 1 << 13])
def test_blocks_of_any_size_give_the_same(monkeypatch: pytest.MonkeyPatch, side: int, features: int) -> None:
    a, b = records(5, 1), records(7, 2)
    monkeypatch.setattr(similarity, "_SIDE", side)
    monkeypatch.setattr(similarity, "_FEATURES", features)
    np.testing.assert_allclose(similarity_matrix(a, b), pair_by_pair(a, b), atol=1e-6)


def test_no_records_give_an_empty_matrix() -> None:
    assert similarity_matrix(records(0, 1), records(4, 2)).shape == (0, 4)
    assert similarity_matrix(records(3, 1), records(0, 2), by_head=True).shape == (HEADS, 3, 0)


@pytest.mark.parametrize(
    ("a", "b", "length", "said"),
    [
        ((2, 3, 4, 4), (2, 3, 5, 5), None, r"\[2, 3, 4, 4\] and \[2, 3, 5, 5\]"),
        ((2, 4, 4), (2, 4, 4), None, "heads, L, L"),
        ((2, 3, 4, 4), (2, 2, 4, 4), None, "heads"),
        ((2, 3, 4, 4), (2, 3, 4, 4), 0, "1 to 4; found 0"),
        ((2, 3, 4, 4), (2, 3, 4, 4), 5, "1 to 4; found 5"),
    ],
)
def test_shapes_and_lengths_are_checked(a: Any, b: Any, length: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        similarity_matrix(torch.rand(a), torch.rand(b), length)


PEAK = """
import resource, sys
import torch
from memodb_transformers import similarity

torch.set_num_threads(1)
similarity._SIDE = 1 << 20  # 4 MiB of each side, a sixteenth of what is usual
a = torch.full((16, 12, 64, 64), 1 / 64, dtype=torch.bfloat16)
b = torch.full((700, 12, 64, 64), 1 / 64, dtype=torch.bfloat16)  # 66 MiB; all of it in float32 is 131 MiB more
similarity.similarity_matrix(a[:1], b[:40])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert similarity.similarity_matrix(a, b).min() > 0.999
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_comparison_needs_little_memory_beside_its_records() -> None:
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, timeout=120, check=True)
    assert int(done.stdout) < 48 << 10  # KiB


def test_the_best_record_is_the_best_of_all_blocks() -> None:
    own, stored = records(6, 1, 7), records(20, 2, 7)
    own[3] = stored[13]
    ids = np.arange(100, 120)
    blocks = [(ids[part], stored[part]) for part in (slice(0, 7), slice(7, 8), slice(8, 20))]
    found, best = best_records(own, blocks, 7)
    every = pair_by_pair(own, stored, 7)
    np.testing.assert_array_equal(found, ids[every.argmax(axis=1)])
    np.testing.assert_allclose(best, every.max(axis=1), atol=1e-6)
    assert (found[3], best[3]) == (113, pytest.approx(1.0, abs=1e-6))
    nothing, zero = best_records(own, [], 7)
    assert (nothing.tolist(), zero.tolist()) == ([-1] * 6, [0.0] * 6)


def test_the_best_context_is_found_by_the_measure_of_contexts() -> None:
    own, stored = contexts(5, 1), contexts(9, 2)
    own[2] = stored[4]
    found, best = best_records(own, [(np.arange(9), stored)], 6, contexts=True)
    every = np.stack(
        [context_similarities(one[None].expand(9, -1, -1), stored, torch.full((9,), 6)).numpy() for one in own]
    )
    np.testing.assert_array_equal(found, every.argmax(axis=1))
    np.testing.assert_allclose(best, every.max(axis=1), atol=1e-3)
    assert found[2] == 4


def test_contexts_all_against_all_are_as_each_pair_by_itself() -> None:
    a, b = contexts(4, 1), 3.0 * contexts(30, 2)
    found = context_matrix(a, b)
    for row, one in enumerate(a):
        expected = context_similarities(one[None].expand(30, -1, -1), b, torch.full((30,), PADDED))
        np.testing.assert_allclose(found[row], expected.numpy(), atol=1e-5)
    # The heads may have an axis of their own.
    np.testing.assert_array_equal(context_matrix(a[:, None], b[:, None].to(torch.float32)), found)
    # Scale does not matter, only direction: opposite ones share nothing.
    np.testing.assert_allclose(context_matrix(a[:1], torch.cat([a[:1], -a[:1]])), [[1.0, 0.0]], atol=1e-3)
    zero = torch.zeros(1, PADDED, 12)
    assert context_matrix(zero, zero).tolist() == [[1.0]]


def test_nearly_equal_contexts_keep_three_digits() -> None:
    # torch.cdist goes by a product of matrices for more than 25 rows, in which digits are lost.
    a = contexts(40, 1)
    near = a + 1e-2 * contexts(40, 2)
    expected = context_similarities(a, near, torch.full((40,), PADDED))
    assert expected.max() < 0.998
    np.testing.assert_allclose(np.diagonal(context_matrix(a, near)), expected.numpy(), atol=2e-4)
