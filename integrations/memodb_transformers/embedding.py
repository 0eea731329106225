"""Embedders: from the hidden state of a sequence to the key it is searched by.

An embedder must be far cheaper than what a hit saves, the Q and K projections and the scores. So there is a small
protocol, one embedder that needs no training, :class:`RandomProjection`, and the form of the AttMemo paper's,
:class:`LinearMLP`.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .errors import StoreMismatchError
from .forward import present
from .separable import Separable

__all__ = ["Embedder", "LinearMLP", "RandomProjection", "load_embedder", "make_keys", "usable_keys"]

# Squared lengths beyond this cannot be compared in float32; memodb refuses such keys.
_LARGEST_NORM = float(np.finfo(np.float32).max) / 8


@runtime_checkable
class Embedder(Protocol):
    """What recording and memoization ask of an embedder."""

    kind: str
    key_dim: int

    def embed(self, layer: int, hidden: Tensor, lengths: Tensor) -> NDArray[np.float32]:
        """Embed hidden states ``[n, L, H]`` of valid lengths int ``[n]`` into keys float32 ``[n, key_dim]``.

        Tokens begin at position 0. What stands in padded positions must not change a key, nor must their number: L may
        be less than that of the store.
        """
        ...

    def config(self) -> dict[str, Any]:
        """Return what :func:`load_embedder` needs beside the arrays, as JSON types."""
        ...

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the parameters, by name."""
        ...


class RandomProjection:
    """A fixed random projection of the hidden state; needs no training and keeps distances.

    The positions are first mixed with ``mixes`` rows of Gaussian weights, then each mix ``[H]`` is projected onto
    ``key_dim / mixes`` components with its own Gaussian matrix. The squared L2 distance of two keys estimates the mean
    squared difference of the two hidden states over their valid positions, without bias. Projecting the flattened state
    ``[L * H]`` directly (Johnson and Lindenstrauss) would say the same more exactly, but reads a matrix of
    L * H * key_dim. Weights of positions are continuous, not signs: of two positions with the same few signs the key
    could not tell which holds which token.

    Parameters
    ----------
    mixing
        float32 ``[mixes, L]``.
    projection
        float32 ``[mixes, H, key_dim / mixes]``.
    """

    kind = "projection"

    def __init__(self, mixing: NDArray[np.float32], projection: NDArray[np.float32]) -> None:
        if mixing.ndim != 2 or projection.ndim != 3 or len(projection) != len(mixing):
            raise StoreMismatchError(
                "expected mixing [mixes, L] and a projection [mixes, hidden, components]; found shapes "
                f"{list(mixing.shape)} and {list(projection.shape)}"
            )
        mixes, self.padded_length = mixing.shape
        self.hidden_size = projection.shape[1]
        self.key_dim = mixes * projection.shape[2]
        self._mixing = torch.from_numpy(np.ascontiguousarray(mixing, dtype=np.float32))
        self._projection = torch.from_numpy(np.ascontiguousarray(projection, dtype=np.float32))

    @classmethod
    def create(
        cls, padded_length: int, hidden_size: int, *, key_dim: int = 128, mixes: int = 8, seed: int = 0
    ) -> RandomProjection:
        """Draw a projection for hidden states ``[padded_length, hidden_size]``.

        Raises
        ------
        ValueError
            ``key_dim`` is no positive multiple of ``mixes``.
        """
        if key_dim <= 0 or mixes <= 0 or key_dim % mixes:
            raise ValueError(f"expected key_dim to be a positive multiple of mixes = {mixes}; found {key_dim}")
        random = np.random.default_rng(seed)
        mixing = random.standard_normal((mixes, padded_length), dtype=np.float32)
        gauss = random.standard_normal((mixes, hidden_size, key_dim // mixes), dtype=np.float32)
        return cls(mixing, gauss / np.float32(np.sqrt(hidden_size * key_dim)))

    def embed(self, layer: int, hidden: Tensor, lengths: Tensor) -> NDArray[np.float32]:
        """Embed hidden states ``[n, L, H]``; the projection is the same for every layer."""
        self._follow(hidden)
        lengths = lengths.to(hidden.device)
        counted = present(lengths, hidden.shape[1])
        weights = counted / lengths[:, None].clamp(min=1).float().sqrt()
        mixing = self._mixing[:, : hidden.shape[1]]
        mixed = torch.bmm(mixing * weights[:, None, :], hidden.float())  # [n, mixes, H]
        keys = torch.bmm(mixed.transpose(0, 1), self._projection)  # [mixes, n, components]
        flat: NDArray[np.float32] = keys.detach().transpose(0, 1).flatten(1).cpu().numpy()
        return flat

    def config(self) -> dict[str, Any]:
        """Return the kind."""
        return {"kind": self.kind}

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the two matrices."""
        return {"mixing": self._mixing.cpu().numpy(), "projection": self._projection.cpu().numpy()}

    def _follow(self, hidden: Tensor) -> None:
        if self._mixing.device != hidden.device:
            self._mixing, self._projection = self._mixing.to(hidden.device), self._projection.to(hidden.device)


class LinearMLP:
    """The embedder of the AttMemo paper (its section 5.2): three layers of linear neurons on the flattened state.

    As no layer bends what goes through it, all three are one matrix of ``L * H`` by ``key_dim`` and a bias, for each
    attention layer of the model; that is what is kept and multiplied. The matrix is read as a whole for every batch, so
    large batches embed a sequence far more cheaply than small ones.

    Parameters
    ----------
    weights
        float32 ``[layers, L * H, key_dim]``.
    biases
        float32 ``[layers, key_dim]``.
    """

    kind = "linear-mlp"

    def __init__(self, weights: NDArray[np.float32], biases: NDArray[np.float32]) -> None:
        if weights.ndim != 3 or biases.shape != (weights.shape[0], weights.shape[2]):
            raise StoreMismatchError(
                f"expected weights [layers, L * H, key_dim] and biases [layers, key_dim]; found {list(weights.shape)} "
                f"and {list(biases.shape)}"
            )
        self.key_dim = weights.shape[2]
        self._weights = torch.from_numpy(np.ascontiguousarray(weights, dtype=np.float32))
        self._biases = torch.from_numpy(np.ascontiguousarray(biases, dtype=np.float32))

    @classmethod
    def create(
        cls, padded_length: int, hidden_size: int, layers: int, *, key_dim: int = 128, width: int = 128, seed: int = 0
    ) -> LinearMLP:
        """Draw untrained layers ``L * H -> width -> width -> key_dim``, for each attention layer."""
        random = np.random.default_rng(seed)
        sizes = (padded_length * hidden_size, width, width, key_dim)
        weights = np.empty((layers, sizes[0], key_dim), dtype=np.float32)
        for layer in range(layers):
            first, second, third = (
                random.standard_normal((fan_in, fan_out), dtype=np.float32) / np.float32(np.sqrt(fan_in))
                for fan_in, fan_out in pairwise(sizes)
            )
            np.matmul(first, second @ third, out=weights[layer])
        return cls(weights, np.zeros((layers, key_dim), dtype=np.float32))

    def embed(self, layer: int, hidden: Tensor, lengths: Tensor) -> NDArray[np.float32]:
        """Embed hidden states ``[n, L, H]`` with the layer's own matrix."""
        if self._weights.device != hidden.device:
            self._weights, self._biases = self._weights.to(hidden.device), self._biases.to(hidden.device)
        padded, width = hidden.shape[1:]
        if padded * width > self._weights.shape[1]:
            raise ValueError(
                f"expected hidden states of at most {self._weights.shape[1]} numbers, as the embedder was made for; "
                f"found {padded} tokens of {width}"
            )
        weights = self._weights[layer].view(-1, width, self.key_dim)[:padded]
        # Position by position and summed: a product of few rows and a very long inner side keeps one core busy.
        parts = torch.bmm(hidden.detach().float().transpose(0, 1), weights)  # [L, n, key_dim]
        if bool((lengths < padded).any()):
            counted = present(lengths.to(hidden.device), padded).T
            parts = parts.masked_fill(~counted[:, :, None], 0.0)
        keys = parts.sum(dim=0) + self._biases[layer]
        found: NDArray[np.float32] = keys.cpu().numpy()
        return found

    def config(self) -> dict[str, Any]:
        """Return the kind."""
        return {"kind": self.kind}

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return matrices and biases."""
        return {"weights": self._weights.cpu().numpy(), "biases": self._biases.cpu().numpy()}


def make_keys(embedder: Embedder, layer: int, hidden: Tensor, lengths: Tensor) -> NDArray[np.float32]:
    """Embed in full precision, and without gradients, whatever the model runs in."""
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        return embedder.embed(layer, hidden, lengths)


def usable_keys(keys: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Tell which keys ``[n, key_dim]`` can be searched by: those that are finite, and not too large to compare."""
    with np.errstate(invalid="ignore", over="ignore"):
        found: NDArray[np.bool_] = np.einsum("ij,ij->i", keys, keys) <= _LARGEST_NORM
    return found


def load_embedder(config: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> Embedder:
    """Make an embedder again from what its ``config()`` and ``arrays()`` returned.

    Raises
    ------
    StoreMismatchError
        The kind is not one that this version knows, or arrays are missing.
    """
    kinds: dict[str, tuple[type[RandomProjection | LinearMLP | Separable], tuple[str, ...]]] = {
        RandomProjection.kind: (RandomProjection, ("mixing", "projection")),
        LinearMLP.kind: (LinearMLP, ("weights", "biases")),
        Separable.kind: (Separable, ("tokens", "mixing", "biases")),
    }
    if not isinstance(config.get("kind"), str) or config["kind"] not in kinds:
        raise StoreMismatchError(
            f"expected an embedder of kind {' or '.join(map(repr, kinds))}; found {config.get('kind')!r}: the store "
            "was built with an embedder of the caller's own, which has to be handed in as embedder=, or is of another "
            "version"
        )
    kind, names = kinds[config["kind"]]
    missing = set(names) - arrays.keys()
    if missing:
        raise StoreMismatchError(f"the embedder lacks its arrays {sorted(missing)}: build the store again")
    parts = [arrays[name] for name in names]
    if any(part.dtype.kind != "f" or not np.isfinite(part).all() for part in parts):
        raise StoreMismatchError("the embedder's arrays are no finite numbers: build the store again")
    return kind(*parts)
