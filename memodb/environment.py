"""One LMDB environment per process and file, shared by every handle on it, and safe across fork.

py-lmdb refuses to open one file twice in a process, and to reopen it in a forked child before the inherited environment
is closed. So environments are counted here by (device, inode), and a forked child closes what it inherited and opens
its own at its next transaction.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import ClassVar

import lmdb

from memodb.errors import (
    ClosedError,
    CorruptionError,
    FormatVersionError,
    MemoDBError,
    StoreAccessError,
    StoreFullError,
)
from memodb.lock import lock_bytes

#: Address space reserved for the catalog; the file itself only grows with what is put. Halved until the system grants
#: it.
_MAP_SIZE = 1 << 40
_MIN_MAP_SIZE = 1 << 28
_MAX_READERS = 4096
#: Bytes that the file is kept longer than its pages, allocated: so many, or the eighth part of it.
_SPARE, _SPARE_PART = 256 << 10, 8
#: LMDB calls a short write an I/O error; with less room than this on the file system it was one.
_NO_ROOM = 16 << 20


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """Turn LMDB's errors into memodb's, with the path and the remedy."""
    try:
        yield
    except (lmdb.MapFullError, lmdb.DiskError) as error:
        raise _full(path, error) from error
    except (lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.InvalidError, lmdb.PanicError) as error:
        raise CorruptionError(f"the catalog {path} is damaged: {error}; restore it from a copy") from error
    except lmdb.ReadersFullError as error:
        raise MemoDBError(f"more than {_MAX_READERS} readers are in the catalog {path} at once: {error}") from error
    except lmdb.Error as error:
        if "No space left" in str(error) or ("Input/output error" in str(error) and _no_room(path)):
            raise _full(path, error) from error
        if "Permission denied" in str(error) or "Read-only file system" in str(error):
            raise StoreAccessError(
                f"the catalog {path} cannot be opened: {error}; ask its owner for access (readers too must be able to "
                f"write {path / 'lock.mdb'}, where they enter themselves)"
            ) from error
        if "MDB_VERSION_MISMATCH" in str(error) or isinstance(error, lmdb.VersionMismatchError):
            raise FormatVersionError(
                f"the catalog {path} was written by another version of LMDB: {error}; copy the store with the memodb "
                "that wrote it"
            ) from error
        raise MemoDBError(f"the catalog {path} cannot be used: {error}") from error


def _full(path: Path, error: Exception) -> StoreFullError:
    return StoreFullError(
        f"the catalog {path} cannot grow: {error}; free space on its file system, or delete fewer records at once"
    )


def _no_room(path: Path) -> bool:
    room = os.statvfs(path)
    return room.f_bavail * room.f_frsize < _NO_ROOM


class Environment:
    """A counted LMDB environment. Get one from `acquire`, give it back with `release`."""

    _shared: ClassVar[dict[tuple[int, int], Environment]] = {}
    _registry_lock: ClassVar[threading.RLock] = threading.RLock()

    def __init__(self, path: Path, key: tuple[int, int] | None) -> None:
        self.path = path
        self._key = key
        self._users = 0
        # Reads and writes may run side by side (LMDB is multi-version), but neither may be under way while the process
        # forks: the child would end the parent's transaction in the shared lock table.
        self._read_gate = threading.RLock()
        self._write_gate = threading.RLock()
        self._env: lmdb.Environment | None = None
        self._guard = -1

    @classmethod
    def acquire(cls, path: Path, *, create: bool = False) -> Environment:
        """Return the process's environment for the LMDB directory `path`, opened now if nobody holds it yet."""
        with cls._registry_lock:
            data = path / "data.mdb"
            if create and not data.exists():
                path.mkdir(parents=True, exist_ok=True)
                fresh = cls(path, None)
                fresh._open(create=True)
                stat = data.stat()
                fresh._key = (stat.st_dev, stat.st_ino)
                cls._shared[fresh._key] = fresh
                fresh._users = 1
                return fresh
            stat = data.stat()
            key = (stat.st_dev, stat.st_ino)
            env = cls._shared.get(key)
            if env is None:
                env = cls(path, key)
                env._open(create=create)
                cls._shared[key] = env
            env._users += 1
            return env

    def release(self) -> None:
        """Give one use back; the last one closes the environment."""
        with self._registry_lock:
            self._users -= 1
            if self._users == 0:
                # Nobody waits for a gate with the registry in hand (see `_before_fork`): whoever holds one may want it.
                while not self._close_if_idle():
                    self._registry_lock.release()
                    time.sleep(0)
                    self._registry_lock.acquire()
                    if self._users:  # somebody opened it again meanwhile
                        return

    def _close_if_idle(self) -> bool:
        with ExitStack() as gates:
            for gate in (self._write_gate, self._read_gate):
                if not gate.acquire(blocking=False):
                    return False
                gates.callback(gate.release)
            if self._key is not None:
                self._shared.pop(self._key, None)
            self._close()
        return True

    def _close(self) -> None:
        if self._env is not None:
            self._env.close()
        self._env = None
        if self._guard >= 0:
            os.close(self._guard)
            self._guard = -1

    def _open(self, *, create: bool) -> None:
        size = _MAP_SIZE
        while True:
            try:
                with translated(self.path):
                    if not self._fill_lock_file():
                        # Made by LMDB, and filled once LMDB has let go of it (see there).
                        self._open_lmdb(size, create=create).close()
                        self._fill_lock_file()
                    self._env = self._open_lmdb(size, create=create)
                    self._hold_presence()
                    self._env.reader_check()
                self._check_length()
                return
            except BaseException as error:
                self._close()
                if not isinstance(error, MemoDBError):
                    raise
                memory = "Cannot allocate memory" in str(error) or isinstance(error.__cause__, lmdb.MemoryError)
                if not memory or size <= _MIN_MAP_SIZE:
                    raise
                size //= 2

    def _open_lmdb(self, size: int, *, create: bool) -> lmdb.Environment:
        def attempt(readonly: bool) -> lmdb.Environment:
            return lmdb.open(
                os.fspath(self.path),
                map_size=size,
                max_readers=_MAX_READERS,
                max_spare_txns=0,
                readonly=readonly,
                create=create,
                readahead=False,
            )

        try:
            # Readers too open for writing where they may: then a writer in the same process can share the environment.
            return attempt(readonly=False)
        except lmdb.Error as error:
            if create or not ("Permission denied" in str(error) or "Read-only file system" in str(error)):
                raise
            return attempt(readonly=True)

    def _length(self) -> tuple[int, int]:
        """Return (bytes that the catalog's pages need, bytes that the file has)."""
        assert self._env is not None
        needed = (self._env.info()["last_pgno"] + 1) * self._env.stat()["psize"]
        return needed, (self.path / "data.mdb").stat().st_size

    def _check_length(self) -> None:
        # LMDB maps the file without looking at its length: a page beyond its end would be a SIGBUS.
        needed, found = self._length()
        if found < needed:
            raise CorruptionError(
                f"the catalog {self.path} is {found} bytes long, its pages reach to byte {needed}: it was truncated; "
                "restore it from a copy"
            )

    def _pad(self) -> bool:
        # Two promises rest on the file being longer than its pages. Pages that a transaction took and freed again need
        # not have been written, so only a file that is surely long enough lets `_check_length` tell a truncated one.
        # And on a full file system deleting must still be possible, which rewrites pages before it frees any.
        # Best effort: what precedes it is committed, so nothing that goes wrong here may look like a failed commit.
        needed, found = self._length()
        spare = max(_SPARE, needed // _SPARE_PART)
        if found >= needed + spare // 2:
            return True
        with suppress(OSError), (self.path / "data.mdb").open("r+b") as file:
            try:
                os.posix_fallocate(file.fileno(), found, needed + spare - found)
                return True
            except OSError:
                os.truncate(file.fileno(), max(found, needed))
        return False

    def _fill_lock_file(self) -> bool:
        """Allocate the whole of LMDB's lock file; False where there is none yet.

        Readers enter themselves through a mapping of it: a hole there would be a SIGBUS on a full tmpfs. Never while
        this process has the environment open: closing any descriptor of the file drops the POSIX locks by which LMDB
        tells other processes that the environment is in use, and the next one to open it would start the lock table
        over under a live writer.
        """
        try:
            fd = os.open(self.path / "lock.mdb", os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        except OSError:  # read-only: LMDB says what it needs
            return True
        try:
            stat = os.fstat(fd)
            if stat.st_blocks * 512 < stat.st_size:
                os.posix_fallocate(fd, 0, stat.st_size)
        except OSError as error:
            raise StoreFullError(
                f"no room for a catalog in {self.path}: {error.strerror}; free space on its file system"
            ) from error
        finally:
            os.close(fd)
        return True

    def _hold_presence(self) -> None:
        """Hold LMDB's presence lock a second time, by a descriptor of our own.

        LMDB's own is gone as soon as anything in this process opens and closes the lock file, a backup of the store's
        folder for instance. An open file description lock on the same byte stays until `_close`.
        """
        with suppress(OSError):  # a read-only file system: LMDB does without locks there
            self._guard = os.open(self.path / "lock.mdb", os.O_RDWR | os.O_CLOEXEC)
            lock_bytes(self._guard, fcntl.F_RDLCK, 0, 1)

    def _hold_reader(self) -> None:
        """Hold LMDB's lock that tells other processes that this one, a reader, is alive; lost in the same way.

        Taken by the process, as LMDB does, on the byte that its process id numbers: without it, the next process to
        open the catalog would take a read transaction under way here for a dead one's.
        """
        if self._guard >= 0:
            lock_bytes(self._guard, fcntl.F_WRLCK, os.getpid(), 1, of_process=True)

    @property
    def handle(self) -> lmdb.Environment:
        """The open environment of THIS process."""
        if self._env is None:
            if self._users == 0:
                raise ClosedError(f"the database {self.path.parent} is closed; open it again with MemoDB.open")
            with self._read_gate:
                if self._env is None:
                    self._open(create=False)
        assert self._env is not None
        return self._env

    def last_transaction(self) -> int:
        """Return the number of the last committed transaction that readers see, by whichever process."""
        # Not info()["last_txnid"]: that is the meta page's, which LMDB writes a moment before readers are let see it.
        with self._read_gate:
            try:
                txn = self.handle.begin()  # over at once: it needs no guard
                number = txn.id()
                txn.abort()
                return int(number)
            except lmdb.Error as error:
                with translated(self.path):
                    raise error

    @contextmanager
    def read(self) -> Iterator[lmdb.Transaction]:
        """Open a short read transaction; what it returns are buffers that die with it."""
        with self._read_gate, translated(self.path), self.handle.begin(buffers=True) as txn:
            self._hold_reader()
            yield txn

    @contextmanager
    def write(self, *, grows: bool = False) -> Iterator[lmdb.Transaction]:
        """Open a write transaction: committed on leaving, undone by any exception.

        Parameters
        ----------
        grows
            It adds more than it takes away, so it must leave what the file has to spare to those that delete.

        Raises
        ------
        StoreFullError
            If the file system is full.
        """
        with self._write_gate, translated(self.path):
            with self._read_gate:
                handle = self.handle
                if grows and not self._pad():
                    raise _full(self.path, OSError("its file system is full"))
            with handle.begin(write=True, buffers=True) as txn:
                yield txn
            self._pad()

    @classmethod
    def _before_fork(cls) -> None:
        # A thread that holds a gate may want the registry (a garbage collection there closes a database), so nobody
        # waits for a gate with the registry in hand.
        while True:
            cls._registry_lock.acquire()
            cls._fork_gates = ExitStack()
            for gate in [gate for env in cls._shared.values() for gate in (env._write_gate, env._read_gate)]:
                if not gate.acquire(blocking=False):
                    break
                cls._fork_gates.callback(gate.release)
            else:
                return
            cls._fork_gates.close()
            cls._registry_lock.release()
            with gate:  # until whoever holds it is done
                pass

    @classmethod
    def _after_fork_in_parent(cls) -> None:
        cls._fork_gates.close()
        cls._registry_lock.release()

    @classmethod
    def _after_fork_in_child(cls) -> None:
        for env in cls._shared.values():
            env._close()
            env._read_gate, env._write_gate = threading.RLock(), threading.RLock()
        cls._registry_lock = threading.RLock()

    _fork_gates: ClassVar[ExitStack]


os.register_at_fork(
    before=Environment._before_fork,
    after_in_parent=Environment._after_fork_in_parent,
    after_in_child=Environment._after_fork_in_child,
)
