"""The directory of a store: what lies in it, and how a new one is claimed."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
import weakref
from contextlib import suppress
from pathlib import Path

from memodb import safe, vm
from memodb.catalog import Catalog
from memodb.errors import (
    InvalidOptionError,
    MemoDBError,
    StoreExistsError,
    StoreNotFoundError,
)
from memodb.lock import WriterLock

CATALOG, VALUES, INDEX, LOCK = "catalog", "values", "index", "writer.lock"
#: The path of a store that is not kept.
MEMORY = ":memory:"
#: What the directories of such stores are called, before the process id.
_THROWAWAY = "memodb-memory-"
#: Where they are, if it can be written.
SHM = Path("/dev/shm")
OURS = {CATALOG, VALUES, INDEX, LOCK}


def is_memory(path: object) -> bool:
    """Tell whether a path, also as a `Path`, is that of a store that is not kept."""
    return isinstance(path, (str, os.PathLike)) and os.fspath(path) == MEMORY


def check(path: Path, owner: int | str | None = None) -> None:
    """See that a store's directory, and those in it, are what memodb made, before anything in them is opened.

    Raises
    ------
    UnsafePathError
        If the directory is somebody's whom nobody trusts (`safe.trusted`), or what is in it is somebody else's.
    """
    guard = safe.trusted(path, owner)
    for name in (CATALOG, VALUES, INDEX):
        with suppress(FileNotFoundError):
            guard.directory(path / name)
    guard.look(path / LOCK)


def holds_store(path: Path, owner: int | str | None = None) -> bool:
    """Tell whether a store may be at `path`; if so, it was checked (see `check`).

    Raises
    ------
    UnsafePathError
        As `check`.
    """
    if not _is_there(path / CATALOG):
        return False
    check(path, owner)
    return _is_there(path / CATALOG / "data.mdb")


def _is_there(path: Path) -> bool:
    """Tell whether there is anything, be it a link to nothing; not to be told is an error."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def claim(path: Path, permissions: int) -> tuple[WriterLock, list[Path]]:
    """Make the directory of a new store and take its lock; return that and the directories made, the innermost first.

    Raises
    ------
    StoreExistsError
        If a store, or any file that is not a store's, lives there already.
    UnsafePathError
        If an empty directory is there that somebody else made, or everybody may write.
    """
    exists = StoreExistsError(f"{path} exists already; open it with memodb.MemoDB.open, or choose another path")
    if _is_there(path) and not (path.is_dir() and _is_cut_off(path)):
        raise exists
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    _require_outside(path)
    try:
        for folder in reversed(missing):
            try:
                safe.make_directory(folder, permissions)
            except FileExistsError:
                if not folder.is_dir():
                    raise
        if safe.trusted(path).uid == os.geteuid():
            safe.set_permissions(path, permissions)  # it may have been there, empty
        for folder in missing[1:]:
            vm.sync_directory(folder.parent)
        lock = WriterLock(path / LOCK)
    except MemoDBError:
        if missing and (path / LOCK).exists() and not (path / LOCK).stat().st_size:
            (path / LOCK).unlink()  # made, and then there was no room for a word in it
        remove_empty(missing)
        raise
    try:
        if not _is_cut_off(path):  # somebody else's creation came first
            raise exists
        remove(path, keep=LOCK)
    except BaseException:
        lock.release()
        raise
    return lock, missing


def _require_outside(path: Path) -> None:
    """Refuse a directory in another store, whatever links lead there."""
    for folder in path.resolve().parents:
        if (folder / CATALOG / "data.mdb").exists():
            raise InvalidOptionError(
                f"{path} lies in the store {folder}, which owns its directory: choose a path outside (a store cannot "
                "be copied into itself either)"
            )


def remove_empty(folders: list[Path]) -> None:
    """Remove directories that a creation made, the innermost first, unless something is in them."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def _is_cut_off(path: Path) -> bool:
    """Tell whether a folder holds nothing but what a creation that was cut off leaves: no record, no settings.

    Whatever else is there is somebody's: a store that lost its catalog, for one, or files of the same names.
    """
    for entry in path.iterdir():
        if entry.name == LOCK and entry.is_file() and not entry.is_symlink():
            continue
        if entry.name not in OURS or entry.is_symlink() or not entry.is_dir():
            return False
        inside = {file.name for file in entry.iterdir()}
        if not inside <= ({"data.mdb", "lock.mdb"} if entry.name == CATALOG else set()):
            return False
    return not _is_complete(path)


def _is_complete(path: Path) -> bool:
    """Tell whether there is a store (a creation that was cut off leaves one without settings)."""
    check(path)
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
            with suppress(OSError):
                victim.unlink(missing_ok=True)


def room(path: Path, max_bytes: int | None) -> int:
    """Return the bytes that a store at `path` may grow to: the size of its file system, or `max_bytes` if less."""
    there = next((folder for folder in (path, *path.parents) if folder.exists()), Path("/"))
    size = os.statvfs(there)
    return min(size.f_blocks * size.f_frsize, max_bytes or 1 << 62)


def sync(path: Path) -> None:
    """Make a new store's directories durable, its own entry in its parent included (fsync(2) of each directory)."""
    for directory in (path / CATALOG, path / VALUES, path, path.parent):
        if directory.is_dir():  # a backend on another machine has none
            vm.sync_directory(directory)


class Throwaway:
    """The directory of a store that is gone when it is closed, or when the process ends (path ``":memory:"``).

    A process that is killed leaves it; the next one of the same user that makes such a store removes it.
    """

    def __init__(self) -> None:
        parent = SHM if os.access(SHM, os.W_OK | os.X_OK) else Path(tempfile.gettempdir())
        with suppress(OSError):  # tidying up must not keep anybody from working
            _sweep(parent)
        self.path = Path(tempfile.mkdtemp(prefix=f"{_THROWAWAY}{os.getpid()}-", dir=parent))
        safe.set_permissions(self.path, 0o700)  # whatever the umask
        self._end = weakref.finalize(self, _remove_own, self.path, os.getpid())

    def remove(self) -> None:
        """Remove it now."""
        self._end()


def _sweep(parent: Path) -> None:
    """Remove the throwaway stores of this user whose processes were killed.

    The writer's lock tells: the kernel frees it with its holder. Process ids would not do, which mean nothing where
    another container shares /dev/shm. Whoever is only about to take the lock has not written a word into it yet.
    """
    for folder in parent.glob(f"{_THROWAWAY}*"):
        try:
            found = folder.lstat()
            written = (folder / LOCK).lstat()
            if not stat.S_ISDIR(found.st_mode) or {found.st_uid, written.st_uid} != {os.getuid()}:
                continue
            if not stat.S_ISREG(written.st_mode) or not written.st_size:
                continue
            lock = WriterLock(folder / LOCK)
        except (OSError, MemoDBError):  # it lives, or somebody else removes it
            continue
        shutil.rmtree(folder, ignore_errors=True)
        lock.release()


def _remove_own(path: Path, pid: int) -> None:
    if os.getpid() == pid:  # not a forked child's
        shutil.rmtree(path, ignore_errors=True)
