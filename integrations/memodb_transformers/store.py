"""A memo store on disk: a memodb database, and beside it what belongs to the model.

``path/`` is the database; with length buckets it is a folder of such stores, ``path/L=64/`` and so on.
``path/transformers/`` holds, as JSON and ``.npy`` files that are read without pickle:

- ``memo.json``: which model and shape the records are of; written last, so that a broken build is no memo store
- ``model-probe.npy``: what the model makes of a fixed input
- ``embedder-*.npy``: the parameters of the embedder
- ``profile.json``: calibration and costs of each layer, once profiled
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import memodb
from memodb.safe import Guard

from .card import ModelCard
from .embedding import Embedder, load_embedder
from .errors import StoreMismatchError

__all__ = [
    "TARGETS",
    "MemoStore",
    "bucket_path",
    "open_store",
    "open_stores",
    "read_profile",
    "record_shape",
    "write_profile",
    "write_store",
]

_FORMAT = "memodb-transformers"
# 2: the records of all layers of a sequence have consecutive ids.
_VERSION = 2
_FOLDER = "transformers"
TARGETS = ("probs", "context")


@dataclass(frozen=True, slots=True)
class MemoStore:
    """An open memo store."""

    path: Path
    db: memodb.MemoDB
    card: ModelCard
    padded_length: int
    store_dtype: str
    target: str
    embedder: Embedder
    profile: dict[str, Any] | None


def record_shape(card: ModelCard, padded_length: int, target: str) -> tuple[int, ...]:
    """Tell the shape of the records of a target."""
    if target == "context":
        return (padded_length, card.heads * card.head_dim)
    return (card.heads, padded_length, padded_length)


def bucket_path(path: Path, padded_length: int) -> Path:
    """Tell where the store of one length bucket lies."""
    return path / f"L={padded_length}"


@contextmanager
def open_stores(path: str | os.PathLike[str], card: ModelCard) -> Iterator[dict[int, MemoStore]]:
    """Open a memo store, or all those of a folder of length buckets, by the length L of their records.

    Raises
    ------
    memodb.StoreNotFoundError, StoreMismatchError, memodb.UnsafePathError
        As for :func:`open_store`.
    """
    root = Path(path)
    parts = sorted(root.glob("L=*")) if root.is_dir() and not (root / _FOLDER).exists() else []
    with ExitStack() as stack:
        stores = [stack.enter_context(open_store(part, card)) for part in parts or [root]]
        if parts and len({(store.target, store.store_dtype) for store in stores}) != 1:
            raise StoreMismatchError(f"the buckets of {root} hold records of different kinds: build them again")
        yield {store.padded_length: store for store in sorted(stores, key=lambda store: store.padded_length)}


def write_store(
    path: Path, card: ModelCard, padded_length: int, store_dtype: str, target: str, embedder: Embedder
) -> None:
    """Write what makes a database a memo store."""
    folder = path / _FOLDER
    Guard.of(path).make_directory(folder)
    arrays = embedder.arrays()
    for name, array in arrays.items():
        _write_array(folder / f"embedder-{name}.npy", array)
    _write_array(folder / "model-probe.npy", card.probe)
    memo = {
        "format": _FORMAT,
        "version": _VERSION,
        "model": card.to_dict(),
        "padded_length": padded_length,
        "store_dtype": store_dtype,
        "target": target,
        "embedder": {**embedder.config(), "arrays": sorted(arrays)},
    }
    _write_json(folder / "memo.json", memo)


def write_profile(path: Path, profile: dict[str, Any]) -> None:
    """Write the profile of a memo store, in place of an earlier one."""
    _write_json(path / _FOLDER / "profile.json", profile)


def read_profile(path: Path) -> dict[str, Any] | None:
    """Read the profile of a memo store, or None where there is none yet."""
    file = path / _FOLDER / "profile.json"
    return _read_json(file) if file.exists() else None


@contextmanager
def open_store(path: str | os.PathLike[str], card: ModelCard) -> Iterator[MemoStore]:
    """Open a memo store for reading, and close it at the end.

    Raises
    ------
    memodb.StoreNotFoundError
        Nothing is at ``path``.
    StoreMismatchError
        The store is of another model, or no memo store.
    memodb.UnsafePathError
        Something in the store is none of its files.
    """
    root = Path(path)
    with memodb.MemoDB.open(root, mode="r") as db:
        file = root / _FOLDER / "memo.json"
        if not file.exists():
            raise StoreMismatchError(
                f"{root} is a memodb database, but no memo store of a model ({_FOLDER}/memo.json is missing): "
                "make one with memodb_transformers.build"
            )
        memo = _read_json(file)
        if memo.get("format") != _FORMAT or memo.get("version") != _VERSION:
            raise StoreMismatchError(
                f"expected {file} in format {_FORMAT} version {_VERSION}; found {memo.get('format')!r} version "
                f"{memo.get('version')!r}: build the store again with this version"
            )
        probe = _read_array(root / _FOLDER / "model-probe.npy")
        try:
            built = ModelCard.from_dict(memo["model"], probe)
            config = memo["embedder"]
            names = [str(name) for name in config["arrays"]]
            padded_length, store_dtype, target = int(memo["padded_length"]), memo["store_dtype"], memo["target"]
        except (KeyError, TypeError, ValueError) as error:
            raise StoreMismatchError(f"{file} is damaged ({error!r}): build the store again") from error
        built.check(card, root)
        if not all(name.isidentifier() for name in names):
            raise StoreMismatchError(f"{file} is damaged (arrays {names}): build the store again")
        shape = record_shape(built, padded_length, target)
        if target not in TARGETS or db.spec.shape != shape or db.spec.dtype_name != store_dtype:
            raise StoreMismatchError(
                f"{file} tells of records {target!r} {list(shape)} {store_dtype}, the database holds {db.spec}: build "
                "the store again"
            )
        arrays = {name: _read_array(root / _FOLDER / f"embedder-{name}.npy") for name in names}
        embedder = load_embedder(config, arrays)
        yield MemoStore(root, db, built, padded_length, store_dtype, target, embedder, read_profile(root))


def _write_array(file: Path, array: np.ndarray[Any, Any]) -> None:
    packed = io.BytesIO()
    np.save(packed, array, allow_pickle=False)
    _write(file, packed.getbuffer())


def _read_array(file: Path) -> np.ndarray[Any, Any]:
    try:
        array: np.ndarray[Any, Any] = np.load(io.BytesIO(_read(file)), allow_pickle=False)
    except memodb.UnsafePathError:
        raise
    except (OSError, ValueError, EOFError) as error:
        raise StoreMismatchError(f"{file} is missing or damaged ({error}): build the store again") from error
    return array


def _write_json(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    _write(path, text.encode())


def _write(path: Path, content: bytes | memoryview) -> None:
    """Put a file in place as a whole, with the permissions of the store's own."""
    draft = path.with_suffix(".tmp")
    draft.unlink(missing_ok=True)
    Guard.of(path.parent.parent).directory(path.parent).write(draft, content)
    os.replace(draft, path)


def _read(path: Path) -> bytes:
    """Return what is in a file, if it is the store's."""
    return Guard.of(path.parent.parent).directory(path.parent).read(path)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(_read(path))
    except ValueError as error:
        raise StoreMismatchError(f"{path} is damaged ({error}): build the store again") from error
    if not isinstance(content, dict):
        raise StoreMismatchError(f"{path} is damaged (no JSON object): build the store again")
    return content
