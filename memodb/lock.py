"""The writer's lock: one writer per store, across processes, freed by the kernel when its holder dies.

A POSIX record lock (fcntl(2)): unlike flock(2) it is not shared with forked children, and the kernel names its holder.
It is per process and lost when the process closes ANY descriptor of the file, so this module alone opens the file, and
remembers what this process holds.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import threading
from pathlib import Path

from memodb.errors import StoreAccessError, WriterLockedError

_FLOCK = struct.Struct("hhqqi4x")  # struct flock of 64-bit Linux: l_type, l_whence, l_start, l_len, l_pid
_held: dict[tuple[int, int], int] = {}
_held_lock = threading.Lock()


def _after_fork_in_child() -> None:
    global _held_lock
    _held_lock = threading.Lock()
    for fd in _held.values():
        os.close(fd)
    _held.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)


class WriterLock:
    """Held from construction to `release`.

    Raises
    ------
    WriterLockedError
        If another handle holds it; the message names its process.
    """

    def __init__(self, path: Path) -> None:
        self._pid = os.getpid()
        with _held_lock:
            try:
                stat = path.stat()
                if (stat.st_dev, stat.st_ino) in _held:
                    raise _locked(path, os.getpid())
            except FileNotFoundError:
                pass
            try:
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
            except PermissionError as error:
                raise StoreAccessError(
                    f"{path} cannot be written: {error.strerror}; open the store with mode='r'"
                ) from error
            try:
                fcntl.fcntl(fd, fcntl.F_SETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
            except OSError as error:
                holder = _FLOCK.unpack(
                    fcntl.fcntl(fd, fcntl.F_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
                )[4]
                os.close(fd)
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    raise _locked(path, holder) from None
                raise
            stat = os.fstat(fd)
            self._key = (stat.st_dev, stat.st_ino)
            _held[self._key] = fd

    def release(self) -> None:
        """Let the next writer in."""
        with _held_lock:
            fd = _held.pop(self._key, None) if os.getpid() == self._pid else None
            if fd is not None:
                os.close(fd)


def _locked(path: Path, pid: int) -> WriterLockedError:
    return WriterLockedError(
        f"{path.parent} is already open for writing by process {pid}; close it there, or open it with "
        "mode='r' (readers are not limited)"
    )
