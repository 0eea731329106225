"""Groups of keys, and running means of what belongs to each group."""

from __future__ import annotations

from collections.abc import Iterable

import faiss
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Means", "group_keys"]

_ROUNDS = 20


def group_keys(keys: NDArray[np.float32], most: int, seed: int) -> NDArray[np.int64]:
    """Cluster keys ``[n, key_dim]`` (k-means of faiss); returns the group of each, int64 ``[n]``, none of them empty.

    Parameters
    ----------
    keys
        The keys of one namespace.
    most
        Largest number of groups.
    seed
        Of the first centres.
    """
    if most >= len(keys):
        return np.arange(len(keys))
    if most == 1:
        return np.zeros(len(keys), dtype=np.int64)
    kmeans = faiss.Kmeans(
        keys.shape[1], most, niter=_ROUNDS, seed=seed, min_points_per_centroid=1, max_points_per_centroid=1 << 20
    )
    kmeans.train(np.ascontiguousarray(keys))
    nearest = kmeans.index.search(np.ascontiguousarray(keys), 1)[1][:, 0]
    return np.unique(nearest, return_inverse=True)[1].astype(np.int64)


class Means:
    """Means of records by group, and how far the records of a group lie from theirs; each record is seen once.

    Parameters
    ----------
    groups
        Number of groups.
    shape
        Shape of a record.
    """

    def __init__(self, groups: int, shape: Iterable[int]) -> None:
        self._sums = torch.zeros((groups, *shape), dtype=torch.float32)
        self._squares = np.zeros(groups)
        self._counts = np.zeros(groups, dtype=np.int64)

    def add(self, groups: NDArray[np.int64], records: Tensor) -> None:
        """Add records ``[n, *shape]`` to the groups ``[n]``."""
        whole = records.float()
        self._sums.index_add_(0, torch.from_numpy(groups), whole)
        flat = whole.flatten(1)
        np.add.at(self._squares, groups, torch.linalg.vector_norm(flat, dim=1).double().square().numpy())
        np.add.at(self._counts, groups, 1)

    def result(self) -> tuple[Tensor, NDArray[np.float32], NDArray[np.float32]]:
        """Return means ``[groups, *shape]`` float32, sizes, and mean squared distances of records to their mean."""
        counts = np.maximum(self._counts, 1)
        shaped = torch.from_numpy(counts.astype(np.float32)).view(-1, *[1] * (self._sums.dim() - 1))
        means = self._sums / shaped
        norms = torch.linalg.vector_norm(means.flatten(1), dim=1).double().square().numpy()
        spreads = np.maximum(self._squares / counts - norms, 0.0)
        return means, self._counts.astype(np.float32), spreads.astype(np.float32)
