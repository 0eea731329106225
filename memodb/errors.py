"""The exceptions memodb raises, one tree.

Each also inherits the builtin that a caller would catch without knowing memodb::

    MemoDBError (Exception)
    ├── InvalidIdError            (ValueError)       an id that is no non-negative integer
    ├── InvalidKeyError           (ValueError)       keys that are NaN, infinite, missing or of the wrong width
    ├── InvalidRecordError        (ValueError)       values of the wrong shape or dtype
    ├── InvalidOptionError        (ValueError)       any other argument that cannot be used
    ├── RecordNotFoundError       (KeyError)         ids that were never given or are deleted
    ├── StoreExistsError          (FileExistsError)  create() on an existing store
    ├── StoreNotFoundError        (FileNotFoundError)  open() of nothing
    ├── StoreFullError            (OSError)          file system, memory or ``max_bytes`` exhausted
    ├── StoreAccessError          (PermissionError)  the operating system refuses access to the store's files
    ├── UnsafePathError           (PermissionError)  a path in a store is a link, FIFO, foreign or writable by others
    ├── WriterLockedError         (BlockingIOError)  another writer holds the store
    ├── ReadOnlyError             (io.UnsupportedOperation)  a write through a reader
    ├── ClosedError               (ValueError)       use after close() or release()
    ├── DeviceError               (OSError)          the device failed a read, write or flush; the writer stops
    ├── CorruptionError           (OSError)          stored bytes are not what was committed
    ├── FormatVersionError        (ValueError)       the store was written by another format version
    ├── MappingUnsupportedError   (NotImplementedError)  ``strategy="map"`` where pages cannot be mapped
    ├── BackendNotFoundError      (LookupError)      no backend of that name is registered
    └── BackendUnavailableError   (ImportError)      the backend's driver is not installed
"""

from __future__ import annotations

import io

__all__ = [
    "BackendNotFoundError",
    "BackendUnavailableError",
    "ClosedError",
    "CorruptionError",
    "DeviceError",
    "FormatVersionError",
    "InvalidIdError",
    "InvalidKeyError",
    "InvalidOptionError",
    "InvalidRecordError",
    "MappingUnsupportedError",
    "MemoDBError",
    "ReadOnlyError",
    "RecordNotFoundError",
    "StoreAccessError",
    "StoreExistsError",
    "StoreFullError",
    "StoreNotFoundError",
    "UnsafePathError",
    "WriterLockedError",
]


class MemoDBError(Exception):
    """Root of every exception that memodb raises on purpose."""

    def __str__(self) -> str:
        # KeyError shows repr(message) and OSError splits its arguments; people want the sentence.
        return str(self.args[0]) if self.args else ""


class InvalidIdError(MemoDBError, ValueError):
    """An id is a bool, float, string, negative, or does not fit int64."""


class InvalidKeyError(MemoDBError, ValueError):
    """Keys are NaN, infinite, of the wrong width, or missing where the store needs them."""


class InvalidRecordError(MemoDBError, ValueError):
    """Values do not have the shape or the dtype of the store's records."""


class InvalidOptionError(MemoDBError, ValueError):
    """An argument that is neither id, key nor record cannot be used as given."""


class RecordNotFoundError(MemoDBError, KeyError):
    """Some ids were never given out, or their records are deleted."""


class StoreExistsError(MemoDBError, FileExistsError):
    """``create`` found a store, or other files, at the path."""


class StoreNotFoundError(MemoDBError, FileNotFoundError):
    """``open`` found no store at the path."""


class StoreFullError(MemoDBError, OSError):
    """The file system, the memory or the store's ``max_bytes`` cannot hold the records; nothing was changed."""


class StoreAccessError(MemoDBError, PermissionError):
    """The operating system refuses access to the store's files."""


class UnsafePathError(MemoDBError, PermissionError):
    """What lies at a path of the store is none of the store's: somebody else may have put it there, or write it."""


class WriterLockedError(MemoDBError, BlockingIOError):
    """Another handle, here or in another process, is open for writing."""


class ReadOnlyError(MemoDBError, io.UnsupportedOperation):
    """A write was asked of a handle that may only read."""


class ClosedError(MemoDBError, ValueError):
    """The database is closed, or the batch is released."""


class DeviceError(MemoDBError, OSError):
    """The device failed a read, write or flush; nothing more is written through a handle that met it.

    Attributes
    ----------
    errno : int or None
        The kernel's number of the error, such as ``errno.EIO``.
    """

    def __init__(self, message: str = "", code: int | None = None) -> None:
        super().__init__(message)
        self.errno = code

    def __reduce__(self) -> tuple[type[DeviceError], tuple[str, int | None]]:
        return DeviceError, (str(self), self.errno)


class CorruptionError(MemoDBError, OSError):
    """Bytes on the store are not those that were committed."""


class FormatVersionError(MemoDBError, ValueError):
    """The store's format is not one that this version of memodb reads."""


class MappingUnsupportedError(MemoDBError, NotImplementedError):
    """Pages cannot be mapped for this backend, record size or batch."""


class BackendNotFoundError(MemoDBError, LookupError):
    """No backend is registered under that name."""


class BackendUnavailableError(MemoDBError, ImportError):
    """A backend is known, but what it needs is not installed."""
