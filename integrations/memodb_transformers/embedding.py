"""Embedders: from the hidden state of a sequence to the key it is searched by.

An embedder must be far cheaper than what a hit saves, the Q and K projections and the scores. So there is a small
protocol, which trained embedders meet too, and one that needs no training: :class:`RandomProjection`.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .errors import StoreMismatchError

__all__ = ["Embedder", "RandomProjection", "load_embedder"]


@runtime_checkable
class Embedder(Protocol):
    """What recording and memoization ask of an embedder."""

    kind: str
    key_dim: int

    def embed(self, layer: int, hidden: Tensor, lengths: Tensor) -> NDArray[np.float32]:
        """Embed hidden states ``[n, L, H]`` of valid lengths int ``[n]`` into keys float32 ``[n, key_dim]``.

        What stands in padded positions must not change a key.
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

    The positions are first mixed with ``mixes`` rows of random signs, then each mix ``[H]`` is projected onto
    ``key_dim / mixes`` components with its own Gaussian matrix. The squared L2 distance of two keys estimates the mean
    squared difference of the two hidden states over their valid positions, without bias (Johnson and Lindenstrauss).
    Projecting the flattened state ``[L * H]`` directly would say the same, but reads a matrix of L * H * key_dim.

    Parameters
    ----------
    signs
        float32 ``[mixes, L]`` of +1 and -1.
    projection
        float32 ``[mixes, H, key_dim / mixes]``.
    """

    kind = "projection"

    def __init__(self, signs: NDArray[np.float32], projection: NDArray[np.float32]) -> None:
        mixes, self.padded_length = signs.shape
        if projection.ndim != 3 or len(projection) != mixes:
            raise StoreMismatchError(
                f"expected a projection [{mixes}, hidden, components]; found shape {list(projection.shape)}"
            )
        self.hidden_size = projection.shape[1]
        self.key_dim = mixes * projection.shape[2]
        self._signs = torch.from_numpy(np.ascontiguousarray(signs, dtype=np.float32))
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
        signs = random.choice(np.array([-1.0, 1.0], dtype=np.float32), size=(mixes, padded_length))
        gauss = random.standard_normal((mixes, hidden_size, key_dim // mixes), dtype=np.float32)
        return cls(signs, gauss / np.float32(np.sqrt(hidden_size * key_dim)))

    def embed(self, layer: int, hidden: Tensor, lengths: Tensor) -> NDArray[np.float32]:
        """Embed hidden states ``[n, L, H]``; the projection is the same for every layer."""
        self._follow(hidden)
        lengths = lengths.to(hidden.device)
        counted = torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None]
        weights = counted / lengths[:, None].clamp(min=1).sqrt()
        mixed = torch.bmm(self._signs * weights[:, None, :], hidden.float())  # [n, mixes, H]
        keys = torch.bmm(mixed.transpose(0, 1), self._projection)  # [mixes, n, components]
        flat: NDArray[np.float32] = keys.transpose(0, 1).flatten(1).cpu().numpy()
        return flat

    def config(self) -> dict[str, Any]:
        """Return the kind."""
        return {"kind": self.kind}

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the two matrices."""
        return {"signs": self._signs.cpu().numpy(), "projection": self._projection.cpu().numpy()}

    def _follow(self, hidden: Tensor) -> None:
        if self._signs.device != hidden.device:
            self._signs, self._projection = self._signs.to(hidden.device), self._projection.to(hidden.device)


def load_embedder(config: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> Embedder:
    """Make an embedder again from what its ``config()`` and ``arrays()`` returned.

    Raises
    ------
    StoreMismatchError
        The kind is not one that this version knows, or arrays are missing.
    """
    if config.get("kind") != RandomProjection.kind:
        raise StoreMismatchError(
            f"expected an embedder of kind 'projection'; found {config.get('kind')!r}: the store was written by "
            "another version of memodb_transformers"
        )
    missing = {"signs", "projection"} - arrays.keys()
    if missing:
        raise StoreMismatchError(f"the embedder lacks its arrays {sorted(missing)}: build the store again")
    return RandomProjection(arrays["signs"], arrays["projection"])
