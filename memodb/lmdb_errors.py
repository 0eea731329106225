"""LMDB's errors in memodb's words: what an environment is called, which one failed, and the remedy."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lmdb

from memodb.errors import (
    CorruptionError,
    DeviceError,
    FormatVersionError,
    MemoDBError,
    StoreAccessError,
    StoreFullError,
)
from memodb.os_errors import FULL, NO_DESCRIPTOR, named

#: Readers that one environment has room for.
MAX_READERS = 4096
#: LMDB calls a short write an I/O error; with less room than this on the file system it was one.
_NO_ROOM = 16 << 20


@contextmanager
def translated(noun: str, path: Path, when_full: str) -> Iterator[None]:
    """Turn LMDB's errors into memodb's, with the path and the remedy.

    Parameters
    ----------
    noun
        What people call this environment, with its article.
    path
        Its directory.
    when_full
        What helps on a full file system, besides space.
    """
    try:
        yield
    except lmdb.MapFullError as error:  # only where this process's address space is limited
        raise StoreFullError(
            f"{noun} {path} outgrew what this process maps of it: {error}; raise the limit (ulimit -v), or close the "
            "store and open it again: as much as the limit allows is mapped then"
        ) from error
    except lmdb.DiskError as error:
        raise full(noun, path, when_full, error) from error
    except (lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.InvalidError) as error:
        raise CorruptionError(f"{noun} {path} is damaged: {error}; restore it from a copy") from error
    except lmdb.PanicError as error:
        raise DeviceError(
            f"{noun} {path} cannot be used since a write of it failed: {error}; check the device (dmesg), then close "
            "and open the store",
            errno.EIO,
        ) from error
    except lmdb.ReadersFullError as error:
        raise MemoDBError(f"more than {MAX_READERS} readers are in {noun} {path} at once: {error}") from error
    except lmdb.MemoryError as error:
        raise StoreFullError(
            f"{noun} {path} gets no memory: {error}; raise the limit of this process (ulimit -v), or put less at once"
        ) from error
    except lmdb.Error as error:
        code = code_of(error)
        if code in FULL or (code == errno.EIO and _no_room(path)):
            raise full(noun, path, when_full, error) from error
        if "Too many open files" in str(error):
            raise StoreAccessError(f"{noun} {path} cannot be opened: {error}; {NO_DESCRIPTOR}") from error
        if "Permission denied" in str(error) or "Read-only file system" in str(error):
            raise StoreAccessError(
                f"{noun} {path} cannot be opened: {error}; ask its owner for access (readers too must be able to "
                f"write {path / 'lock.mdb'}, where they enter themselves)"
            ) from error
        if "MDB_VERSION_MISMATCH" in str(error) or isinstance(error, lmdb.VersionMismatchError):
            raise FormatVersionError(
                f"{noun} {path} was written by another version of LMDB: {error}; copy the store with the memodb "
                "that wrote it"
            ) from error
        if code is None:
            raise MemoDBError(f"{noun} {path} cannot be used: {error}") from error
        raise named(OSError(code, str(error)), f"{noun} {path}") from error


def full(noun: str, path: Path, when_full: str, error: Exception) -> StoreFullError:
    """Return the error of an environment that has no room."""
    return StoreFullError(f"{noun} {path} cannot grow: {error}; free space on its file system, or {when_full}")


def code_of(error: lmdb.Error) -> int | None:
    """Return the errno of an error that LMDB passes on from the operating system, None where it is LMDB's own."""
    return next((code for code in errno.errorcode if str(error).endswith(f": {os.strerror(code)}")), None)


def _no_room(path: Path) -> bool:
    room = os.statvfs(path)
    return room.f_bavail * room.f_frsize < _NO_ROOM
