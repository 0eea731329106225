"""A memo store on disk: a memodb database, and beside it what belongs to the model.

``path/`` is the database; with length buckets it is a folder of such stores, ``path/L=64/`` and so on.
``path/transformers/`` holds, as JSON and ``.npy`` files that are read without pickle:

- ``memo.json``: which model and shape the records are of; written last, so that a broken build is no memo store
- ``model-probe.npy``: what the model makes of a fixed input
- ``embedder-*.npy``: the parameters of the embedder
- ``cluster-sizes.npy``, ``cluster-spreads.npy``: of a condensed store, for each record how many it is the mean of, and
  their mean squared distance to it
- ``profile.json``: calibration and costs of each layer, once profiled
- ``tuned.json``: layers and thresholds within an accuracy budget, once tuned
- ``build.json``: what the build told at its end
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import memodb
from memodb.safe import Guard, set_permissions

from .beside import MEMO_FILES, Condensed, read_condensed, read_profile
from .card import ModelCard
from .embedding import Embedder, load_embedder, make_keys
from .errors import StoreMismatchError
from .files import read_array, read_json, write_array, write_json

__all__ = [
    "TARGETS",
    "MemoStore",
    "bucket_path",
    "bucket_paths",
    "making",
    "move_into_place",
    "open_store",
    "open_stores",
    "permissions_of",
    "record_shape",
    "smallest_fitting",
    "stored_lengths",
    "write_store",
]

_FORMAT = "memodb-transformers"
# 2: the records of all layers of a sequence have consecutive ids.
_VERSION = 2
_BUCKET = re.compile(r"L=[1-9]\d*")
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
    condensed: Condensed | None = None


def record_shape(card: ModelCard, padded_length: int, target: str) -> tuple[int, ...]:
    """Tell the shape of the records of a target."""
    if target == "context":
        return (padded_length, card.heads * card.head_dim)
    return (card.heads, padded_length, padded_length)


def smallest_fitting(lengths: Iterable[int], padded: int) -> int | None:
    """Choose the bucket of a batch padded to so many tokens; None: longer than all."""
    return min((length for length in lengths if length >= padded), default=None)


def bucket_path(path: Path, padded_length: int) -> Path:
    """Tell where the store of one length bucket lies."""
    return path / f"L={padded_length}"


@contextmanager
def open_stores(
    path: str | os.PathLike[str], card: ModelCard, embedder: Embedder | None = None
) -> Iterator[dict[int, MemoStore]]:
    """Open a memo store, or all those of a folder of length buckets, by the length L of their records.

    Raises
    ------
    memodb.StoreNotFoundError, StoreMismatchError, memodb.UnsafePathError
        As for :func:`open_store`.
    """
    root = Path(path)
    parts = bucket_paths(root)
    with ExitStack() as stack:
        stores = [stack.enter_context(open_store(part, card, embedder)) for part in parts or [root]]
        for part, store in zip(parts, stores, strict=False):
            if part != bucket_path(root, store.padded_length):
                raise StoreMismatchError(
                    f"{part} holds records of L = {store.padded_length}: name the folder by them, or build again"
                )
        if parts and len({(store.target, store.store_dtype) for store in stores}) != 1:
            raise StoreMismatchError(f"the buckets of {root} hold records of different kinds: build them again")
        yield {store.padded_length: store for store in sorted(stores, key=lambda store: store.padded_length)}


def bucket_paths(path: Path) -> list[Path]:
    """List the stores of a folder of length buckets; none: it is no such folder."""
    return sorted(part for part in path.glob("L=*") if _BUCKET.fullmatch(part.name)) if path.is_dir() else []


def stored_lengths(path: str | os.PathLike[str]) -> list[int]:
    """Read which lengths L the records of a memo store have: one, or those of its buckets in the order of the folders.

    Raises
    ------
    StoreMismatchError
        There is no memo store, or a damaged one.
    """
    root = Path(path)
    parts = bucket_paths(root) or [root]
    found: list[int] = []
    for part in parts:
        file = part / MEMO_FILES / "memo.json"
        if not file.exists():
            raise StoreMismatchError(f"{part} holds no memo store of a model: make one with memodb_transformers.build")
        length = read_json(file).get("padded_length")
        if not isinstance(length, int):
            raise StoreMismatchError(f"{file} is damaged (padded_length {length!r}): build the store again")
        found.append(length)
    return found


def write_store(
    path: Path, card: ModelCard, padded_length: int, store_dtype: str, target: str, embedder: Embedder
) -> None:
    """Write what makes a database a memo store."""
    folder = path / MEMO_FILES
    Guard.of(path).make_directory(folder)
    arrays = embedder.arrays()
    for name, array in arrays.items():
        write_array(folder / f"embedder-{name}.npy", array)
    write_array(folder / "model-probe.npy", card.probe)
    memo = {
        "format": _FORMAT,
        "version": _VERSION,
        "model": card.to_dict(),
        "padded_length": padded_length,
        "store_dtype": store_dtype,
        "target": target,
        "embedder": {**embedder.config(), "arrays": sorted(arrays)},
    }
    write_json(folder / "memo.json", memo)


def permissions_of(options: Mapping[str, Any]) -> int:
    """Tell the permissions of a store that is made with these options; ``memodb.MemoDB.create`` checks them."""
    permissions: int = options.get("permissions", 0o700)
    return permissions


def move_into_place(made: Path, path: Path, taken: memodb.StoreExistsError) -> None:
    """Move what is whole to its place by one rename; ``taken`` is raised where something is there."""
    try:
        os.rename(made, path)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise
        raise taken from error


@contextmanager
def making(path: Path, *, folder: bool, permissions: int) -> Iterator[Path]:
    """Make a store, or a folder of stores, in a block; what is left by an error is removed, if it was made there.

    A folder is made beside its place, which the block is given, and moved there when all stores in it are whole: of one
    that is killed nothing can be opened at ``path``.

    Raises
    ------
    memodb.StoreExistsError
        Something is at ``path``: it is left as it is.
    """
    exists = memodb.StoreExistsError(f"{path} exists: choose another path, or remove it first")
    if path.exists() or path.is_symlink():
        raise exists
    place = Path(tempfile.mkdtemp(prefix=f"{path.name}.making-", dir=path.parent)) if folder else path
    try:
        yield place
        if folder:
            set_permissions(place, permissions)  # last: the stores in it have checked them
            move_into_place(place, path, exists)
    except BaseException as error:
        if folder or not isinstance(error, memodb.StoreExistsError):  # that one somebody else has made meanwhile
            shutil.rmtree(place, ignore_errors=True)
        raise


@contextmanager
def open_store(path: str | os.PathLike[str], card: ModelCard, embedder: Embedder | None = None) -> Iterator[MemoStore]:
    """Open a memo store for reading, and close it at the end.

    Parameters
    ----------
    path, card
        The store, and the model that it is to serve.
    embedder
        The embedder that it was built with, where that was the caller's own.

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
    try:
        opened = memodb.MemoDB.open(root, mode="r")
    except memodb.StoreNotFoundError as error:
        raise memodb.StoreNotFoundError(f"{root} holds no memo store: memodb_transformers.build makes one") from error
    with opened as db:
        file = root / MEMO_FILES / "memo.json"
        if not file.exists():
            raise StoreMismatchError(
                f"{root} is a memodb database, but no memo store of a model ({MEMO_FILES}/memo.json is missing): "
                "make one with memodb_transformers.build"
            )
        memo = read_json(file)
        if memo.get("format") != _FORMAT or memo.get("version") != _VERSION:
            raise StoreMismatchError(
                f"expected {file} in format {_FORMAT} version {_VERSION}; found {memo.get('format')!r} version "
                f"{memo.get('version')!r}: build the store again with this version"
            )
        probe = read_array(root / MEMO_FILES / "model-probe.npy")
        try:
            built = ModelCard.from_dict(memo["model"], probe)
            config = memo["embedder"]
            names = [str(name) for name in config["arrays"]]
            padded_length, store_dtype, target = int(memo["padded_length"]), memo["store_dtype"], memo["target"]
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
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
        if embedder is None:
            embedder = load_embedder(config, {n: read_array(root / MEMO_FILES / f"embedder-{n}.npy") for n in names})
        _try_out(embedder, built, padded_length, db.key_dim, root)
        profile, condensed = read_profile(root), read_condensed(root, memo)
        yield MemoStore(root, db, built, padded_length, store_dtype, target, embedder, profile, condensed)


def _try_out(embedder: Embedder, card: ModelCard, padded_length: int, key_dim: int | None, path: Path) -> None:
    """Embed nothing once: an embedder that does not fit shall say so here, not in the middle of a forward."""
    try:
        hidden = torch.zeros(1, padded_length, card.hidden_size)
        keys = make_keys(embedder, card.layers - 1, hidden, torch.tensor([padded_length]))
        problem = None if keys.shape == (1, key_dim) else f"keys of shape {list(keys.shape)}"
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        problem = str(error)
    if problem:
        raise StoreMismatchError(
            f"expected an embedder of {card.layers} layers, [{padded_length}, {card.hidden_size}] to {key_dim}, as the "
            f"store at {path} was built with; found: {problem}"
        )
