"""What a vector index is, for one namespace."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np

Ids = np.ndarray[Any, np.dtype[np.int64]]
Keys = np.ndarray[Any, np.dtype[np.float32]]
Distances = np.ndarray[Any, np.dtype[np.float32]]


class VectorIndex(ABC):
    """Nearest neighbours among the keys of one namespace, by squared L2 distance.

    Attributes
    ----------
    sequence, mark
        The journal entry up to which the index knows additions and deletions, and the mark by which that entry is told
        from an entry of the same number in another history of the store.
    """

    sequence: int = 0
    mark: int = 0

    @abstractmethod
    def add(self, ids: Ids, keys: Keys) -> None:
        """Add `keys` [n, key_dim] under `ids` [n], ascending, greater than any before."""

    @abstractmethod
    def remove(self, ids: Ids) -> None:
        """Never return `ids` again; those that the index does not know are ignored."""

    @abstractmethod
    def search(self, keys: Keys, k: int) -> tuple[Ids, Distances]:
        """Return the `k` nearest live neighbours of each key, nearest first.

        Ids [n, k] (-1: none), distances [n, k] (inf: none).
        """

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of live keys."""

    @abstractmethod
    def serialize(self) -> bytes:
        """Return the index as bytes for `deserialize`."""

    @classmethod
    @abstractmethod
    def deserialize(cls, data: bytes, key_dim: int, factory: str) -> VectorIndex:
        """Return an index from `serialize`; raise ValueError if the bytes cannot be one of `factory` and `key_dim`."""

    @property
    @abstractmethod
    def worth_saving(self) -> bool:
        """Whether building it again would take much longer than reading it back."""
