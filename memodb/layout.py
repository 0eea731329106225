"""The directory of a store: what lies in it, and how a new one is claimed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from memodb.catalog import Catalog
from memodb.errors import MemoDBError, StoreExistsError, StoreNotFoundError
from memodb.lock import WriterLock

CATALOG, VALUES, INDEX, LOCK = "catalog", "values", "index", "writer.lock"
OURS = {CATALOG, VALUES, INDEX, LOCK}


def claim(path: Path) -> WriterLock:
    """Make the directory of a new store and take its lock.

    Raises
    ------
    StoreExistsError
        If a store, or any file that is not a store's, lives there already.
    """
    exists = StoreExistsError(f"{path} exists already; open it with memodb.MemoDB.open, or choose another path")
    if path.exists():
        if not path.is_dir() or not {entry.name for entry in path.iterdir()} <= OURS:
            raise exists
        if _is_complete(path):
            raise exists
    path.mkdir(parents=True, exist_ok=True)
    lock = WriterLock(path / LOCK)
    if _is_complete(path):
        lock.release()
        raise exists
    remove(path, keep=LOCK)
    return lock


def _is_complete(path: Path) -> bool:
    """Tell whether there is a store (a creation that was cut off leaves one without settings)."""
    try:
        Catalog(path / CATALOG).close()
    except StoreNotFoundError:
        return False
    except MemoDBError:
        return True
    return True


def remove(path: Path, keep: str = "") -> None:
    """Remove what a store puts into its directory, except `keep`."""
    for name in OURS - {keep}:
        victim = path / name
        if victim.is_dir():
            shutil.rmtree(victim, ignore_errors=True)
        else:
            victim.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Make a new store's directories durable, its own entry in its parent included (fsync(2) of each directory)."""
    for directory in (path / CATALOG, path / VALUES, path, path.parent):
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
