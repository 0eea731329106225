"""Files that are opened when they are needed, and a bounded number of them that stay open for the next time."""

from __future__ import annotations

import errno
import itertools
import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np

from memodb.backends.file_io import read_all
from memodb.errors import CorruptionError, MemoDBError, StoreAccessError
from memodb.os_errors import NO_DESCRIPTOR
from memodb.safe import Guard, open_no_wait

#: Descriptors kept open: a quarter of what the process may have, so many at most.
_PART, _MOST = 4, 4096


class OpenFile:
    """A file open for reading, for as long as somebody holds the object.

    Parameters
    ----------
    path
        The file.
    nbytes
        How long it has to be: beyond its end a mapped page would read as zeros.
    guard
        Whose it has to be.

    Raises
    ------
    FileNotFoundError
        If there is none.
    CorruptionError
        If it is shorter.
    UnsafePathError
        If it is none of the store's.
    """

    __slots__ = ("fd", "path")

    def __init__(self, path: str, nbytes: int, guard: Guard) -> None:
        self.path = path
        self.fd = -1
        self.fd = open_no_wait(path, os.O_RDONLY)
        stat = os.fstat(self.fd)
        guard.check(path, stat)
        if stat.st_size < nbytes:
            raise CorruptionError(
                f"{path} is {stat.st_size} bytes long, its record has {nbytes}: it was truncated; restore the store "
                "from a copy"
            )

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def read_into(self, offset: int, out: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        """Copy bytes from `offset` on into `out`, C-contiguous, by pread(2).

        Raises
        ------
        CorruptionError
            If the device cannot read them, or the file ends before.
        """
        read_all(self.fd, self.path, offset, out)


class DescriptorCache:
    """The files that this process keeps open, the last used ones, of all owners together.

    A file is dropped from here at any time, and closed when nobody else holds it: so who uses one holds it meanwhile.
    """

    def __init__(self) -> None:
        self._owners = itertools.count()
        self._files: OrderedDict[tuple[int, int], OpenFile] = OrderedDict()
        self._most = capacity()
        #: Raised whenever files of an owner are dropped: what was being opened meanwhile may be one of those.
        self._epochs: dict[int, int] = {}
        self.renew_lock()

    def renew_lock(self) -> None:
        """Take a fresh lock (in a forked child)."""
        self._lock = threading.RLock()

    def owner(self) -> int:
        """Return a number for somebody whose files are told from others'; to be given back with `disown`."""
        number = next(self._owners)
        self._epochs[number] = 0
        return number

    def get(self, owner: int, number: int, place: Callable[[int], str], nbytes: int, guard: Guard) -> OpenFile:
        """Return file `number` of `owner`, opened now if need be: `place` tells its path, the rest is `OpenFile`'s.

        Raises
        ------
        FileNotFoundError
            If there is none.
        StoreAccessError
            If it may not be opened, or the process has no descriptor left.
        CorruptionError
            If it is too short, or its device fails.
        UnsafePathError
            If it is none of the store's.
        """
        key = owner, number
        with self._lock:
            file = self._files.get(key)
            if file is not None:
                self._files.move_to_end(key)
                return file
            epoch = self._epochs.get(owner)
        file = self._open(place(number), nbytes, guard)
        with self._lock:
            if epoch is None or self._epochs.get(owner) != epoch:
                return file  # for this once
            self._files[key] = file
            while len(self._files) > self._most:
                self._files.popitem(last=False)
        return file

    def trim(self) -> None:
        """Keep as many as the process's limit of the moment allows, the last used ones (once a batch is enough)."""
        self._most = capacity()
        if len(self._files) > self._most:
            with self._lock:
                while len(self._files) > self._most:
                    self._files.popitem(last=False)

    def _open(self, path: str, nbytes: int, guard: Guard) -> OpenFile:
        try:
            return OpenFile(path, nbytes, guard)
        except (FileNotFoundError, MemoDBError):
            raise
        except PermissionError as error:
            raise StoreAccessError(f"{path} cannot be opened: {error.strerror}; ask its owner for access") from error
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise CorruptionError(
                    f"{path} cannot be opened: {error.strerror}; restore the store from a copy, or delete what "
                    "verify() names"
                ) from error
        self.clear()  # others in this process need theirs more
        try:
            return OpenFile(path, nbytes, guard)
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            raise StoreAccessError(f"{path} cannot be opened: {error.strerror}; {NO_DESCRIPTOR}") from error

    def forget(self, owner: int) -> None:
        """Drop the files of `owner`, also those that are being opened."""
        with self._lock:
            if owner in self._epochs:
                self._epochs[owner] += 1
            for key in [key for key in self._files if key[0] == owner]:
                del self._files[key]

    def disown(self, owner: int) -> None:
        """Drop the files of `owner`, and keep none any more."""
        with self._lock:
            self.forget(owner)
            self._epochs.pop(owner, None)

    def clear(self) -> None:
        """Drop everything."""
        with self._lock:
            self._files.clear()

    def __len__(self) -> int:
        return len(self._files)


def capacity() -> int:
    """Return how many files are kept open at most, by the process's limit of the moment (RLIMIT_NOFILE)."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return _MOST if soft == resource.RLIM_INFINITY else max(1, min(soft // _PART, _MOST))


DESCRIPTORS = DescriptorCache()
os.register_at_fork(after_in_child=DESCRIPTORS.renew_lock)
