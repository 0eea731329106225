"""The directory that segments lie in: the store's own, or one on another file system (option ``segments_path``)."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from pathlib import Path

from memodb import vm
from memodb.errors import InvalidOptionError, StoreAccessError, StoreFullError, StoreNotFoundError, UnsafePathError
from memodb.safe import Guard, make_directory

#: What `own_directory` calls a directory. Nothing else is written to, or cleared, because settings say so.
_NAME = re.compile(r"memodb-[0-9a-f]{16}")
_PREFIX = "memodb-"


class Place:
    """Where the segments of one store lie.

    Parameters
    ----------
    own
        The backend's directory inside the store.
    elsewhere
        What `own_directory` returned when the store was created; None: segments lie in `own`.

    Raises
    ------
    StoreNotFoundError
        If the file system that `elsewhere` was on is gone.
    StoreAccessError
        If the operating system refuses access to it.
    UnsafePathError
        If `elsewhere` is no directory that memodb makes for segments, or not that of the store's owner.
    """

    def __init__(self, own: Path, elsewhere: str | None) -> None:
        self._store = own.parent
        self._outside = elsewhere is not None
        self.directory = own if elsewhere is None else Path(elsewhere)
        self._guard = Guard.of(self._store)
        if elsewhere is not None:
            self._check_elsewhere()
        try:
            self.system = vm.filesystem(self.directory.parent if self._outside else own)
        except FileNotFoundError as error:
            raise self._missing() from error
        except PermissionError as error:
            raise StoreAccessError(
                f"{self.directory}, where the records of {self._store} lie, cannot be reached: {error.strerror}; ask "
                "its owner for access"
            ) from error

    def _check_elsewhere(self) -> None:
        """See that the settings name a directory for segments of this store's owner: a writer clears it of others."""
        if not (self.directory.is_absolute() and _NAME.fullmatch(self.directory.name)):
            raise UnsafePathError(
                f"the settings of {self._store} keep its segments in {self.directory}, which memodb would never choose "
                "(expected a name like memodb-0123456789abcdef); nothing there was touched: they are damaged, or "
                "somebody changed them; restore the store from a copy"
            )
        if os.path.lexists(self.directory):
            self._guard.directory(self.directory)
            try:
                require_outside(self.directory, self._store, "segments_path")
            except InvalidOptionError as error:
                raise UnsafePathError(f"the settings of {self._store} cannot be followed: {error}") from error

    def _missing(self) -> StoreNotFoundError:
        return StoreNotFoundError(
            f"the records of {self._store} lie in {self.directory}, which does not exist: mount the file system that "
            "holds it, or restore it from a copy; what lay in memory (tmpfs, hugetlbfs) is lost with a reboot or an "
            "unmount, and so is the store then: remove its directory"
        )

    def require(self) -> None:
        """Make sure that the directory is there, for a store that has segments."""
        if self._outside and not self.directory.is_dir():
            raise self._missing()

    def make(self) -> None:
        """Make the directory, with the first segment: a store without records leaves nothing outside its own."""
        if not self._outside or self.directory.is_dir():
            return
        try:
            make_directory(self.directory, self._guard.directory_mode)
        except FileNotFoundError as error:
            raise self._missing() from error
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StoreFullError(f"no room for {self.directory}: {error.strerror}; free space there") from error
            raise StoreAccessError(
                f"{self.directory}, where the records of {self._store} shall lie, cannot be made: {error.strerror}; "
                "ask for access, or choose another segments_path"
            ) from error
        if not self.system.in_memory:
            vm.sync_directory(self.directory.parent)

    def sync(self) -> None:
        """Make new and removed segments durable (fsync(2) of the directory)."""
        vm.sync_directory(self.directory)

    def remove(self) -> None:
        """Remove the directory and all segments."""
        shutil.rmtree(self.directory, ignore_errors=True)


def require_outside(directory: Path, own: Path, option: str) -> None:
    """Make sure that a directory for records lies in no store, its own included, whatever links lead there.

    Raises
    ------
    InvalidOptionError
        If it does; the message names the option that it was given by.
    """
    real = directory.resolve()
    for folder in (real, *real.parents):
        if folder == own.resolve() or (folder / "catalog" / "data.mdb").exists():
            raise InvalidOptionError(
                f"{option}={str(directory)!r} lies in the store {folder}: records kept elsewhere need a directory "
                "outside of any store"
            )


def is_writable_directory(path: object) -> bool:
    """Tell whether `path` can be given as ``segments_path``."""
    return isinstance(path, str) and os.path.isdir(path) and os.access(path, os.W_OK | os.X_OK)


def own_directory(segments_path: str) -> str:
    """Return the path of a directory of a new store's own in `segments_path`, so that no two stores mix."""
    return os.path.join(os.path.abspath(segments_path), f"{_PREFIX}{secrets.token_hex(8)}")
