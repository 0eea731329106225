"""How an attention module projects K and V, and how it ends: what a hit still has to do, without Q and scores.

A projection is described by the names of the parts that hold its weights, so that a row of ``families.py`` stays data.
All of them return ``[n, L, kv_heads, head_dim]``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

__all__ = [
    "Finish",
    "FusedConv1D",
    "FusedLinear",
    "Interleaved",
    "Nothing",
    "Output",
    "Projection",
    "Residual",
    "Separate",
]


class Projection(Protocol):
    """Where K and V of an attention module come from."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parts that hold the weights of Q, K and V."""
        ...

    def problem(self, module: nn.Module) -> str | None:
        """Say why this module cannot be projected by parts, or None."""
        ...

    def values(self, module: nn.Module, hidden: Tensor, head_dim: int) -> Tensor:
        """Project V of ``hidden`` [n, L, H]."""
        ...


def _part(module: nn.Module, name: str) -> nn.Module:
    part = getattr(module, name)
    assert isinstance(part, nn.Module)
    return part


def _call(module: nn.Module, name: str, hidden: Tensor) -> Tensor:
    projected = _part(module, name)(hidden)
    assert isinstance(projected, Tensor)
    return projected


def _split(projected: Tensor, head_dim: int) -> Tensor:
    split: Tensor = projected.unflatten(-1, (-1, head_dim))
    return split


@dataclass(frozen=True, slots=True)
class Separate:
    """Three linear modules. They are called, so adapters and quantization inside them count."""

    query: str = "query"
    key: str = "key"
    value: str = "value"

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parts that hold the weights of Q, K and V."""
        return (self.query, self.key, self.value)

    def problem(self, module: nn.Module) -> str | None:
        """Say why this module cannot be projected by parts, or None."""
        return None

    def values(self, module: nn.Module, hidden: Tensor, head_dim: int) -> Tensor:
        """Project V."""
        return _split(_call(module, self.value, hidden), head_dim)

    def keys(self, module: nn.Module, hidden: Tensor, head_dim: int) -> Tensor:
        """Project K."""
        return _split(_call(module, self.key, hidden), head_dim)


@dataclass(frozen=True, slots=True)
class _Fused:
    """One module for Q, K and V, whose weight is cut: only a plain one has a weight to cut."""

    name: str

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parts that hold the weights of Q, K and V."""
        return (self.name,)

    def problem(self, module: nn.Module) -> str | None:
        """Say why this module cannot be projected by parts, or None."""
        part = _part(module, self.name)
        if type(part) not in (nn.Linear, Conv1D):
            return f"its {self.name} is a {type(part).__name__}, whose Q, K and V cannot be told apart"
        if part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part):
            return f"its {self.name} has hooks, which a projection of V alone would pass by"
        return None


@dataclass(frozen=True, slots=True)
class FusedConv1D(_Fused):
    """GPT-2: a Conv1D of weight ``[H, 3 * H]``, columns in the order Q, K, V."""

    def values(self, module: nn.Module, hidden: Tensor, head_dim: int) -> Tensor:
        """Project V."""
        return self._third(module, hidden, head_dim, 2)

    def keys(self, module: nn.Module, hidden: Tensor, head_dim: int) -> Tensor:
        """Project K."""
        return self._third(module, hidden, head_dim, 1)

    def _third(self, module: nn.Module, hidden: Tensor, head_dim: int, which: int) -> Tensor:
        part = _part(module, self.name)
        weight, bias = part.weight, part.bias
        assert isinstance(weight, Tensor)
        assert isinstance(bias, Tensor)
        width = weight.shape[1] // 3
        columns = slice(which * width, (which + 1) * width)
        flat = torch.addmm(bias[columns], hidden.reshape(-1, hidden.shape[-1]), weight[:, columns])
        return _split(flat.view(*hidden.shape[:-1], width), head_dim)


@dataclass(frozen=True, slots=True)
class FusedLinear(_Fused):
    """ModernBERT: a Linear of weight ``[3 * H, H]``, rows in the order Q, K, V."""

    def values(self, module: nn.Module, hidden: Tensor, head_dim: int) -> Tensor:
        """Project V."""
        part = _part(module, self.name)
        weight, bias = part.weight, part.bias
        assert isinstance(weight, Tensor)
        rows = slice(2 * (weight.shape[0] // 3), None)
        cut = bias[rows] if isinstance(bias, Tensor) else None
        return _split(nn.functional.linear(hidden, weight[rows], cut), head_dim)


@dataclass(frozen=True, slots=True)
class Interleaved(_Fused):
    """DeBERTa: a Linear whose rows go head by head, Q, K and V of one head beside each other; V's bias is apart."""

    value_bias: str = "v_bias"

    def values(self, module: nn.Module, hidden: Tensor, head_dim: int) -> Tensor:
        """Project V."""
        weight, bias = _part(module, self.name).weight, getattr(module, self.value_bias)
        assert isinstance(weight, Tensor)
        assert isinstance(bias, Tensor)
        rows = weight.view(-1, 3, head_dim, weight.shape[1])[:, 2].reshape(-1, weight.shape[1])
        return _split(nn.functional.linear(hidden, rows, bias), head_dim)


class Finish(Protocol):
    """What an attention module does after the context, up to what it returns."""

    def __call__(self, module: nn.Module, context: Tensor, hidden: Tensor) -> Tensor:
        """Finish ``context`` [n, L, heads * head_dim] of the module called with ``hidden`` [n, L, H]."""
        ...

    def modules(self, module: nn.Module) -> Iterator[nn.Module]:
        """Yield the part whose input is the context, if there is one."""
        ...


@dataclass(frozen=True, slots=True)
class Nothing:
    """The context is what is returned: BERT's output projection is another module."""

    def __call__(self, module: nn.Module, context: Tensor, hidden: Tensor) -> Tensor:
        """Return the context."""
        return context

    def modules(self, module: nn.Module) -> Iterator[nn.Module]:
        """Yield nothing."""
        return iter(())


@dataclass(frozen=True, slots=True)
class Output:
    """The output projection is inside."""

    name: str

    def __call__(self, module: nn.Module, context: Tensor, hidden: Tensor) -> Tensor:
        """Project the context; dropout does nothing in inference."""
        return _call(module, self.name, context)

    def modules(self, module: nn.Module) -> Iterator[nn.Module]:
        """Yield the output projection."""
        yield _part(module, self.name)


@dataclass(frozen=True, slots=True)
class Residual:
    """ALBERT: output projection, residual and layer norm are inside."""

    name: str = "dense"
    norm: str = "LayerNorm"

    def __call__(self, module: nn.Module, context: Tensor, hidden: Tensor) -> Tensor:
        """Project the context, add the hidden state, normalise."""
        return _call(module, self.norm, hidden + _call(module, self.name, context))

    def modules(self, module: nn.Module) -> Iterator[nn.Module]:
        """Yield the output projection."""
        yield _part(module, self.name)
