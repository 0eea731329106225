"""Stored probabilities times V, against float64, in every dtype and shape that a hit can have."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from memodb_transformers import product  # noqa: E402
from memodb_transformers.product import weighted_values  # noqa: E402


def exact(probabilities: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    groups = probabilities.shape[1] // value.shape[2]
    split = value.double().transpose(1, 2).repeat_interleave(groups, dim=1)
    return (probabilities.double() @ split).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("given", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 4, 17, 8), (2, 12, 128, 64), (1, 2, 512, 16)])
def test_products_are_as_exact_as_what_they_are_made_of(stored: str, given: str, shape: tuple[int, ...]) -> None:
    n, heads, length, width = shape
    torch.manual_seed(0)
    probabilities = torch.randn(n, heads, length, length).softmax(dim=-1).to(getattr(torch, stored))
    value = torch.randn(n, length, heads, width).to(getattr(torch, given))
    found = weighted_values(probabilities, value)
    assert found.dtype == value.dtype
    assert found.shape == (n, length, heads * width)
    error = (found.double() - exact(probabilities, value)).abs().max()
    rounded = stored == "bfloat16" and product.multiplies_bfloat16()
    assert error < (5e-2 if rounded else {"float32": 1e-5, "float16": 5e-3, "bfloat16": 5e-2}[given])


@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_groups_of_heads_share_values_and_windows_are_multiplied_where_they_lie(
    stored: torch.dtype, kv_heads: int
) -> None:
    torch.manual_seed(0)
    whole = torch.rand(2, 4, 24, 24).to(stored)
    probabilities = whole[:, :, :20, :20]
    value = torch.randn(2, 20, kv_heads, 8)
    error = (weighted_values(probabilities, value).double() - exact(probabilities, value)).abs().max()
    assert error < 1e-4


def test_bfloat16_is_multiplied_as_it_is_only_where_that_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    probabilities = torch.randn(2, 4, 64, 64).softmax(dim=-1).bfloat16()
    value = torch.randn(2, 64, 4, 8)
    for fast, most in ((False, 1e-5), (True, 2e-2)):
        monkeypatch.setattr(product, "multiplies_bfloat16", lambda fast=fast: fast)
        error = (weighted_values(probabilities, value).double() - exact(probabilities, value)).abs().max()
        assert error < most
        assert (error > 1e-5) == fast


def test_blocks_that_do_not_divide_the_heads_leave_none_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "_BLOCK", 5 * 16 * 16)
    torch.manual_seed(0)
    probabilities, value = torch.rand(2, 12, 16, 16).half(), torch.randn(2, 16, 12, 4)
    error = (weighted_values(probabilities, value).double() - exact(probabilities, value)).abs().max()
    assert error < 1e-4
