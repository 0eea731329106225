"""An embedder of few parameters: each token to a few numbers, then these by position to a key."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .errors import StoreMismatchError
from .forward import present

__all__ = ["Separable", "principal_tokens", "separable_keys", "token_width"]

# Tokens that the principal directions are taken of.
_TOKENS = 8192


def token_width(hidden_size: int, key_dim: int) -> int:
    """Choose the numbers kept of a token so that the embedder takes at least ten times fewer products than the MLP.

    The paper's, folded, takes ``L * H * key_dim``; this one ``L * (H * width + width * key_dim)``.
    """
    return max(1, hidden_size * key_dim // (10 * (hidden_size + key_dim)))


def separable_keys(hidden: Tensor, lengths: Tensor, tokens: Tensor, mixing: Tensor, bias: Tensor) -> Tensor:
    """Embed hidden states ``[n, L, H]``, with gradients: ``sum_p tokens(h[p]) @ mixing[p] + bias``.

    Parameters
    ----------
    hidden, lengths
        The states, and how many positions of each are valid.
    tokens, mixing, bias
        ``[H, width]``, ``[L or more, width, key_dim]``, ``[key_dim]``.
    """
    n, padded, _ = hidden.shape
    small = hidden @ tokens  # [n, L, width]
    if bool((lengths < padded).any()):
        small = torch.where(present(lengths.to(hidden.device), padded)[:, :, None], small, 0.0)
    return small.reshape(n, -1) @ mixing[:padded].reshape(-1, mixing.shape[2]) + bias


def principal_tokens(hidden: Tensor, lengths: Tensor, width: int) -> Tensor | None:
    """Find the directions in which valid tokens differ most, each scaled to variance 1.

    Training that begins with them finds better records in the end than one that begins with random directions
    (docs/memoization.md has figures).

    Parameters
    ----------
    hidden, lengths
        States float32 ``[n, L, H]``, and how many positions of each count.
    width
        How many directions.

    Returns
    -------
    Tensor or None
        float32 ``[H, width]``; None where the tokens differ in fewer.
    """
    valid = present(lengths, hidden.shape[1]).flatten().nonzero().flatten()
    chosen = np.linspace(0, len(valid) - 1, min(_TOKENS, len(valid))).round().astype(np.int64)
    values = hidden.flatten(0, 1)[valid[torch.from_numpy(chosen)]]
    size = float(values.double().square().mean()) if len(values) else 0.0
    values = values - values.mean(dim=0)
    variances, directions = torch.linalg.eigh((values.T @ values).double() / max(1, len(values)))  # ascending
    variances, directions = variances[-width:].flip(0), directions[:, -width:].flip(1)
    # What is smaller than this is what float32 rounds away.
    if len(variances) < width or not float(variances[-1]) > max(1e-6 * float(variances[0]), 1e-12 * size):
        return None
    found: Tensor = (directions / variances.sqrt()).float()
    return found


class Separable:
    """Embeds token by token into a few numbers and mixes these by position; trained, for each layer.

    The flattened state need not be multiplied by a matrix of ``L * H * key_dim`` numbers as in :class:`LinearMLP`: one
    of ``H * width``, the same for all positions, and one of ``L * width * key_dim`` are ten times fewer, and far less
    to be read for a small batch.

    Parameters
    ----------
    tokens
        float32 ``[layers, H, width]``.
    mixing
        float32 ``[layers, L, width, key_dim]``.
    biases
        float32 ``[layers, key_dim]``.
    """

    kind = "separable"

    def __init__(self, tokens: NDArray[np.float32], mixing: NDArray[np.float32], biases: NDArray[np.float32]) -> None:
        layers = tokens.shape[0] if tokens.ndim == 3 else -1
        if (
            mixing.ndim != 4
            or layers < 1
            or mixing.shape[0] != layers
            or mixing.shape[2] != tokens.shape[2]
            or biases.shape != (layers, mixing.shape[3])
        ):
            raise StoreMismatchError(
                "expected tokens [layers, H, width], mixing [layers, L, width, key_dim] and biases [layers, key_dim]; "
                f"found {list(tokens.shape)}, {list(mixing.shape)} and {list(biases.shape)}"
            )
        self.padded_length, self.key_dim = mixing.shape[1], mixing.shape[3]
        self._tokens, self._mixing, self._biases = (
            torch.from_numpy(np.ascontiguousarray(part, dtype=np.float32)) for part in (tokens, mixing, biases)
        )

    @classmethod
    def create(
        cls,
        padded_length: int,
        hidden_size: int,
        layers: int,
        *,
        key_dim: int = 128,
        width: int | None = None,
        seed: int = 0,
    ) -> Separable:
        """Draw an untrained one."""
        random = np.random.default_rng(seed)
        width = width or token_width(hidden_size, key_dim)
        tokens = random.standard_normal((layers, hidden_size, width), dtype=np.float32)
        mixing = random.standard_normal((layers, padded_length, width, key_dim), dtype=np.float32)
        scale = np.float32(np.sqrt(padded_length * hidden_size * width * key_dim))
        return cls(tokens, mixing / scale, np.zeros((layers, key_dim), dtype=np.float32))

    def embed(self, layer: int, hidden: Tensor, lengths: Tensor) -> NDArray[np.float32]:
        """Embed hidden states ``[n, L, H]`` with the layer's own matrices."""
        if hidden.shape[1] > self.padded_length:
            raise ValueError(
                f"expected hidden states of at most {self.padded_length} tokens, as the embedder was made for; found "
                f"{hidden.shape[1]}"
            )
        if self._tokens.device != hidden.device:
            self._tokens, self._mixing, self._biases = (
                part.to(hidden.device) for part in (self._tokens, self._mixing, self._biases)
            )
        keys = separable_keys(
            hidden.detach().float(), lengths, self._tokens[layer], self._mixing[layer], self._biases[layer]
        )
        found: NDArray[np.float32] = keys.cpu().numpy()
        return found

    def config(self) -> dict[str, Any]:
        """Return the kind."""
        return {"kind": self.kind}

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the matrices and biases."""
        return {
            "tokens": self._tokens.cpu().numpy(),
            "mixing": self._mixing.cpu().numpy(),
            "biases": self._biases.cpu().numpy(),
        }
