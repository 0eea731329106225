"""The writer's lock: one writer per store, across processes, freed by the kernel when its holder dies.

An open file description lock (F_OFD_SETLK, fcntl(2)). It is held by the descriptor taken here, so nothing else that the
process opens and closes (a backup of the store's folder, for one) can lose it, as it would lose a POSIX record lock. A
forked child inherits the descriptor and closes it at once, so a worker that outlives a killed writer does not keep the
store locked, as it would with flock(2). The kernel does not name the holder of such a lock; the holder writes its
process id into the file.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import threading
from contextlib import suppress
from pathlib import Path

from memodb.errors import MemoDBError, StoreAccessError, WriterLockedError
from memodb.os_errors import NO_DESCRIPTOR, named, no_descriptor
from memodb.safe import Guard

_FLOCK = struct.Struct("hhqqi4x")  # struct flock of 64-bit Linux: l_type, l_whence, l_start, l_len, l_pid
_held: set[int] = set()
_held_lock = threading.RLock()  # a garbage collection inside may release another lock


def _after_fork_in_child() -> None:
    global _held_lock
    _held_lock = threading.RLock()
    for fd in _held:
        os.close(fd)
    _held.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)


def hold_for_fork() -> bool:
    """Keep every descriptor as it is while the process forks, until `release_after_fork`; False if one is changing.

    No descriptor may be between its opening and its entry when the child looks for those to close. Whoever is about to
    fork has locks in hand that a garbage collection in such a thread may want, so it must not wait here: it lets go of
    them, and waits in `wait_for_fork`.
    """
    return _held_lock.acquire(blocking=False)


def release_after_fork() -> None:
    """Let descriptors change again (in the parent)."""
    _held_lock.release()


def wait_for_fork() -> None:
    """Wait until no descriptor is changing; with nothing in hand."""
    with _held_lock:
        pass


def lock_bytes(fd: int, kind: int, start: int, length: int, *, of_process: bool = False) -> None:
    """Lock a range of a file without waiting (F_OFD_SETLK, or F_SETLK where the lock is to be the process's).

    Parameters
    ----------
    fd
        Open for what `kind` needs.
    kind
        ``fcntl.F_RDLCK`` or ``fcntl.F_WRLCK``.
    start, length
        The range; length 0: to the end of the file.

    Raises
    ------
    OSError
        EAGAIN or EACCES if somebody else holds it.
    """
    command = fcntl.F_SETLK if of_process else fcntl.F_OFD_SETLK
    fcntl.fcntl(fd, command, _FLOCK.pack(kind, os.SEEK_SET, start, length, 0))


class WriterLock:
    """Held from construction to `release`.

    Raises
    ------
    WriterLockedError
        If another handle holds it, here or in another process; the message names the process.
    StoreAccessError
        If the file cannot be opened for writing.
    UnsafePathError
        If it is none of the store's.
    """

    def __init__(self, path: Path) -> None:
        self._pid, self._fd = os.getpid(), -1
        with _held_lock:
            try:
                fd = Guard.of(path.parent).open(path, os.O_RDWR | os.O_CREAT)
            except (FileNotFoundError, MemoDBError):
                raise
            except OSError as error:
                if no_descriptor(error):
                    raise StoreAccessError(f"{path} cannot be opened: {error.strerror}; {NO_DESCRIPTOR}") from error
                raise StoreAccessError(
                    f"{path} cannot be opened for writing: {error.strerror}; open the store with mode='r'"
                ) from error
            self._fd = fd
            _held.add(fd)
            try:
                lock_bytes(fd, fcntl.F_WRLCK, 0, 0)
                if not _is_at(fd, path):  # a creation that failed removed it meanwhile
                    raise BlockingIOError(errno.EAGAIN, "the file was removed")
                os.ftruncate(fd, 0)
                os.pwrite(fd, f"{self._pid}\n".encode(), 0)
            except OSError as error:
                holder = b""
                with suppress(OSError):
                    holder = os.pread(fd, 32, 0)
                self.release()
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    raise _locked(path, holder) from None
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise named(error, path) from error
                raise StoreAccessError(f"{path} cannot be written: {error.strerror}; free space there") from error

    def __del__(self) -> None:
        if self._fd >= 0:  # an interrupt kept its owner from ever knowing it
            self.release()

    def release(self) -> None:
        """Let the next writer in."""
        with _held_lock:
            if os.getpid() == self._pid and self._fd in _held:
                _held.discard(self._fd)
                os.close(self._fd)
                self._fd = -1


def _is_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def _locked(path: Path, holder: bytes) -> WriterLockedError:
    who = holder.strip().decode("ascii", "replace")
    return WriterLockedError(
        f"{path.parent} is already open for writing by {f'process {who}' if who.isdigit() else 'another process'}; "
        "close it there, or open it with mode='r' (readers are not limited)"
    )
