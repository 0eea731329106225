"""Copy a memo store, whole: the database and what belongs to the model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import memodb

from .beside import copy_beside
from .store import bucket_path, bucket_paths, making, permissions_of, stored_lengths

__all__ = ["copy"]


def copy(
    source: str | os.PathLike[str], destination: str | os.PathLike[str], *, backend: str | None = None, **options: Any
) -> None:
    """Copy a memo store, or a folder of length buckets, to another place or backend.

    ``memodb.copy`` copies a database alone: what it makes of a memo store is no memo store.

    Parameters
    ----------
    source, destination
        The store, and a path at which nothing is yet.
    backend, **options
        As for ``memodb.copy``; default: the backend of the source.

    Raises
    ------
    StoreMismatchError
        ``source`` is no memo store.
    memodb.StoreExistsError
        Something is at ``destination``.
    """
    root, target = Path(source), Path(destination)
    lengths = stored_lengths(root)  # says so if it is no memo store
    settings = options if backend is None else {**options, "backend": backend}
    parts = bucket_paths(root)
    with making(target, folder=bool(parts), permissions=permissions_of(options)) as place:
        for part, length in zip(parts, lengths, strict=False):
            _copy_one(part, bucket_path(place, length), settings)
        if not parts:
            _copy_one(root, place, settings)


def _copy_one(source: Path, destination: Path, settings: dict[str, Any]) -> None:
    memodb.copy(source, destination, **settings)
    copy_beside(source, destination)
