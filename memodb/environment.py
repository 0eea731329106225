"""One LMDB environment per process and file, shared by every handle on it, and safe across fork.

py-lmdb refuses to open one file twice in a process, and to reopen it in a forked child before the inherited environment
is closed. So environments are counted here by (device, inode), and a forked child closes what it inherited and opens
its own at its next transaction.
"""

from __future__ import annotations

import fcntl
import os
import resource
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, cast

import lmdb

from memodb.errors import ClosedError, CorruptionError, MemoDBError, StoreFullError
from memodb.lmdb_errors import MAX_READERS, full, translated
from memodb.lmdb_guard import PageGuard
from memodb.lmdb_looks import Looking
from memodb.lock import hold_for_fork, lock_bytes, release_after_fork, wait_for_fork
from memodb.os_errors import FULL, named
from memodb.safe import Guard

#: A map that the system does not grant is halved, down to this size.
_MIN_MAP_SIZE = 1 << 28
#: What a process may map whose address space is not limited.
_UNLIMITED = 1 << 62
#: A reader whose snapshot is overtaken by two commits while it begins, begins again, so often at most.
_BEGINNINGS = 1000
#: Where the map grows with the file: how many times the file it is when the file is opened.
_MAP_PER_FILE = 4
#: After so many write transactions one looks for readers that were killed: no page that such a one might see is used
#: again, and the file would grow with every commit.
_READERS_EACH = 64


@dataclass(frozen=True, slots=True)
class Kind:
    """What an environment holds, and so how it is opened and what its errors say.

    Parameters
    ----------
    noun
        What people call it, with its article.
    when_full
        What helps on a full file system, besides space.
    map_bytes
        Address space reserved for it; the file itself only grows with what is put. See `Environment.change` for more.
    spare, spare_part
        Bytes that the file is kept longer than its pages, allocated: so many, or that part of its length (0: no part).
    spare_inside
        Whether pages inside the file that nothing is in count as spare.
    readahead
        Whether what is read from a disk is read ahead: for values of many pages.
    sync, metasync
        As for ``lmdb.open``.
    """

    noun: str
    when_full: str
    map_bytes: int
    spare: int = 256 << 10
    spare_part: int = 0
    spare_inside: bool = False
    readahead: bool = False
    sync: bool = True
    metasync: bool = True


def _check_files(path: Path, *, create: bool) -> bool:
    """See that LMDB's data is the store's, as LMDB opens it by name; return whether there was an environment.

    The lock file is seen to when it is filled, before LMDB opens it.
    """
    parent = Guard.of(path.parent)
    guard = parent.make_directory(path) if create else parent.directory(path)
    if guard.look(path / "data.mdb"):
        return True
    if create:  # what LMDB makes goes by the umask
        os.close(guard.open(path / "data.mdb", os.O_RDWR | os.O_CREAT | os.O_EXCL))
    return False


#: Its map is so large that it is never outgrown. Deleting rewrites pages before it frees any, many of them at once: so
#: it keeps an eighth of its length to spare.
CATALOG = Kind("the catalog", "delete fewer records at once", map_bytes=1 << 40, spare_part=8)


class Environment:
    """A counted LMDB environment. Get one from `acquire`, give it back with `release`."""

    _shared: ClassVar[dict[tuple[int, int], Environment]] = {}
    _registry_lock: ClassVar[threading.RLock] = threading.RLock()

    def __init__(self, path: Path, key: tuple[int, int] | None, kind: Kind = CATALOG) -> None:
        self.path = path
        self.kind = kind
        self._key = key
        self._data = os.fspath(path / "data.mdb")
        self._users = 0
        # Reads and writes may run side by side (LMDB is multi-version), but neither may be under way while the process
        # forks: the child would end the parent's transaction in the shared lock table.
        self._read_gate = threading.RLock()
        self._write_gate = threading.RLock()
        # Short reads hold their gate. Long ones only pass it and are counted, so that they run side by side.
        self._quiet = threading.Condition(self._read_gate)
        self._long_reads: set[object] = set()
        self._wanted_alone = 0
        self._writes = 0
        self._env: lmdb.Environment | None = None
        self._presence = -1
        self._pages: PageGuard | None = None

    @classmethod
    def acquire(cls, path: Path, *, create: bool = False, kind: Kind = CATALOG) -> Environment:
        """Return the process's environment for the LMDB directory `path`, opened now if nobody holds it yet.

        Raises
        ------
        FileNotFoundError
            If there is none, unless `create` says to make it.
        """
        with cls._registry_lock:
            data = path / "data.mdb"
            if not _check_files(path, create=create) and create:
                fresh = cls(path, None, kind)
                fresh._open(create=True)
                stat = data.stat()
                fresh._key = (stat.st_dev, stat.st_ino)
                cls._shared[fresh._key] = fresh
                fresh._users = 1
                return fresh
            stat = data.stat()
            key = (stat.st_dev, stat.st_ino)
            env = cls._shared.get(key)
            if env is not None and env._env is None and env.path != path:
                # Closed by a fork, and since then its file was removed and the number given to another one.
                env = None
            if env is None:
                env = cls(path, key, kind)
                env._open(create=create)
                cls._shared[key] = env
            env._users += 1
            return env

    def replaced(self) -> bool:
        """Tell whether another file is by now where this one was (a removed one that is open still serves)."""
        try:
            stat = os.stat(self._data)
        except OSError:
            return False
        return (stat.st_dev, stat.st_ino) != self._key

    def hold(self) -> None:
        """Take one more use, to be given back with `release`."""
        with self._registry_lock:
            self._users += 1

    def release(self) -> None:
        """Give one use back; the last one closes the environment."""
        with self._registry_lock:
            self._users -= 1
        while True:
            with self._registry_lock:
                if self._users or self._close_if_idle():
                    return
            # Nobody waits for a gate with the registry in hand (see `_before_fork`): whoever holds one may want it.
            time.sleep(0)

    def _close_if_idle(self) -> bool:
        with ExitStack() as gates:
            for gate in (self._write_gate, self._read_gate):
                if not gate.acquire(blocking=False):
                    return False
                gates.callback(gate.release)
            if self._long_reads:
                return False
            if self._key is not None and self._shared.get(self._key) is self:
                del self._shared[self._key]
            self._close()
        return True

    def _close(self) -> None:
        if self._env is not None:
            self._env.close()
        self._env = None
        if self._pages is not None:
            self._pages.close()
            self._pages = None
        if self._presence >= 0:
            os.close(self._presence)
            self._presence = -1

    def _open(self, *, create: bool) -> None:
        size = self.kind.map_bytes
        with suppress(FileNotFoundError):
            size = max(size, _MAP_PER_FILE * (self.path / "data.mdb").stat().st_size)
        size = min(size, self._granted())
        while True:
            try:
                with self._translated():
                    self._guard_pages(create=create)
                    if not self._fill_lock_file():
                        # LMDB gives it its length; it is filled once LMDB has let go of it (see there).
                        self._open_lmdb(size, create=create).close()
                        self._fill_lock_file()
                    self._env = self._open_lmdb(size, create=create)
                    self._hold_presence()
                    self._env.reader_check()
                    self._guard_pages()
                    self._look_at_pages()
                return
            except BaseException as error:
                self._close()
                if not isinstance(error, MemoDBError):
                    raise
                memory = "Cannot allocate memory" in str(error) or isinstance(error.__cause__, lmdb.MemoryError)
                if not memory or size <= _MIN_MAP_SIZE:
                    raise
                size //= 2

    def _guard_pages(self, *, create: bool = True) -> None:
        """Check the meta pages (see `memodb.lmdb_guard`), before LMDB goes by them; of a new file, afterwards."""
        if self._pages is not None:
            return
        data, guard = self.path / "data.mdb", Guard.of(self.path)
        try:
            fd = guard.open(data, os.O_RDWR)
        except FileNotFoundError:
            return  # LMDB makes it
        except MemoDBError:
            raise
        except OSError:
            fd = guard.open(data, os.O_RDONLY)
        if os.fstat(fd).st_size == 0 and self._env is None:
            os.close(fd)
            if create:  # an earlier creation was cut off
                return
            raise CorruptionError(  # LMDB would make a new one of it
                f"{self.kind.noun} {data} is empty: it was truncated; restore the store from a copy"
            )
        self._pages = PageGuard(fd, f"{self.kind.noun} {data}")
        self._pages.metas()

    def _look_at_pages(self) -> None:
        assert self._env is not None
        assert self._pages is not None
        self._hold_reader()
        with self._env.begin() as txn:
            self._pages.open(txn.id())

    def _begin(self) -> lmdb.Transaction:
        """Begin a read transaction, in which LMDB follows no page that was not checked; with the read gate in hand."""
        for _ in range(_BEGINNINGS):
            handle = self.handle
            self._hold_reader()  # first: somebody may look for dead readers at any moment
            txn = handle.begin(buffers=True)
            pages = self._pages
            if pages is None or pages.complete:
                return txn
            try:
                meta = pages.snapshot(txn.id())
            except BaseException:
                txn.abort()
                raise
            if meta is not None:
                return cast(lmdb.Transaction, Looking(txn, pages, meta))
            txn.abort()  # two commits came since it began, and so it is older than both meta pages
        raise CorruptionError(
            f"{self.path / 'lock.mdb'} names a transaction that {self.path / 'data.mdb'} does not have: one of them is "
            "damaged; close the store in all processes and open it again, or restore it from a copy"
        )

    def _granted(self) -> int:
        """Return the largest map that leaves most of a limited address space (RLIMIT_AS) to everybody else."""
        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit == resource.RLIM_INFINITY:
            return _UNLIMITED
        file = self.path / "data.mdb"
        needed = 2 * file.stat().st_size if file.exists() else 0
        return max(_MIN_MAP_SIZE, limit // 8, needed)

    def _translated(self) -> AbstractContextManager[None]:
        return translated(self.kind.noun, self.path, self.kind.when_full)

    def _full(self, error: Exception) -> StoreFullError:
        return full(self.kind.noun, self.path, self.kind.when_full, error)

    def _open_lmdb(self, size: int, *, create: bool) -> lmdb.Environment:
        def attempt(readonly: bool) -> lmdb.Environment:
            return lmdb.open(
                os.fspath(self.path),
                map_size=size,
                max_readers=MAX_READERS,
                max_spare_txns=0,
                readonly=readonly,
                create=create,
                readahead=self.kind.readahead,
                sync=self.kind.sync,
                metasync=self.kind.metasync,
                mode=0o600,
            )

        try:
            # Readers too open for writing where they may: then a writer in the same process can share the environment.
            return attempt(readonly=False)
        except lmdb.Error as error:
            if create or not ("Permission denied" in str(error) or "Read-only file system" in str(error)):
                raise
            return attempt(readonly=True)

    def _length(self) -> tuple[int, int]:
        """Return (bytes that the pages need, bytes that the file has)."""
        needed = (self.handle.info()["last_pgno"] + 1) * self.handle.stat()["psize"]
        return needed, os.stat(self._data).st_size

    def unused(self) -> int:
        """Return about how many bytes of the file's pages hold nothing, and serve what is put next."""
        with self._read_gate:
            stat, last = self.handle.stat(), self.handle.info()["last_pgno"]
        used = 2 + stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"]
        return max(0, last + 1 - used) * stat["psize"]

    def _pad(self, more: int = 0) -> OSError | None:
        """Allocate what the file has to spare, and room for `more` bytes; return why that is not to be had."""
        # On a full file system deleting must still be possible, which rewrites pages before it frees any.
        # Best effort: what precedes it is committed, so nothing that goes wrong here may look like a failed commit.
        lacking = self.growth(more)
        if not lacking:
            return None
        needed, found = self._length()
        try:
            with (self.path / "data.mdb").open("r+b") as file:
                try:
                    os.posix_fallocate(file.fileno(), found, lacking)
                except OSError:
                    os.truncate(file.fileno(), max(found, needed))
                    raise
        except OSError as error:
            return error
        return None

    def growth(self, more: int) -> int:
        """Return by how many bytes the file grows before `more` are written, with what it has to spare; mostly 0."""
        needed, found = self._length()
        spare = self.kind.spare
        if self.kind.spare_part:
            spare = max(spare, needed // self.kind.spare_part)
        room = found - needed + (self.unused() if self.kind.spare_inside else 0)
        if found >= needed and room >= more + spare // 2:
            return 0
        return max(more + spare - room, needed - found)

    def trim(self) -> None:
        """Give back what the file is longer than it has to be: what a put that failed leaves, for one."""
        with self._write_gate, self._read_gate, suppress(OSError):
            needed, found = self._length()
            least = needed + max(0, self.kind.spare // 2 - (self.unused() if self.kind.spare_inside else 0))
            if found > least:
                os.truncate(self.path / "data.mdb", least)

    def _fill_lock_file(self) -> bool:
        """Allocate the whole of LMDB's lock file; False where LMDB has yet to say how long that is.

        Readers enter themselves through a mapping of it: a hole there would be a SIGBUS on a full tmpfs. Never while
        this process has the environment open: closing any descriptor of the file drops the POSIX locks by which LMDB
        tells other processes that the environment is in use, and the next one to open it would start the lock table
        over under a live writer.
        """
        try:
            fd = Guard.of(self.path).open(self.path / "lock.mdb", os.O_RDWR | os.O_CREAT, shared=True)
        except MemoDBError:
            raise
        except OSError:  # read-only: LMDB says what it needs
            return True
        try:
            stat = os.fstat(fd)
            if not stat.st_size:
                return False
            if stat.st_blocks * 512 < stat.st_size:
                os.posix_fallocate(fd, 0, stat.st_size)
        except OSError as error:
            raise StoreFullError(
                f"no room for {self.kind.noun} in {self.path}: {error.strerror}; free space on its file system"
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
            self._presence = os.open(self.path / "lock.mdb", os.O_RDWR | os.O_CLOEXEC)
            lock_bytes(self._presence, fcntl.F_RDLCK, 0, 1)

    def _hold_reader(self) -> None:
        """Hold LMDB's lock that tells other processes that this one, a reader, is alive; lost in the same way.

        Taken by the process, as LMDB does, on the byte that its process id numbers: without it, the next process to
        open the environment would take a read transaction under way here for a dead one's.
        """
        if self._presence >= 0:
            lock_bytes(self._presence, fcntl.F_WRLCK, os.getpid(), 1, of_process=True)

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
        while True:
            with self._read_gate:
                try:
                    txn = self.handle.begin()  # over at once: it needs no guard
                    number = txn.id()
                    txn.abort()
                    return int(number)
                except lmdb.MapResizedError:
                    pass
                except lmdb.Error as error:
                    with self._translated():
                        raise error
            self._adopt_map()

    @contextmanager
    def read(self) -> Iterator[lmdb.Transaction]:
        """Open a short read transaction; what it returns are buffers that die with it."""
        with self._translated(), ExitStack() as inside:
            while True:
                with ExitStack() as entered:
                    entered.enter_context(self._read_gate)
                    with suppress(lmdb.MapResizedError):
                        txn = entered.enter_context(self._begin())
                        inside.enter_context(entered.pop_all())
                        break
                self._adopt_map()
            yield txn

    @contextmanager
    def long_read(self) -> Iterator[lmdb.Transaction]:
        """Open a read transaction beside which other threads read and write; its buffers die with it.

        Whatever needs the process to be without transactions (a fork, a larger map) waits for its end, and so must not
        be begun inside. Nor may the environment be closed meanwhile: `hold` it.
        """
        mark, begun = object(), None
        with self._translated():
            try:
                while begun is None:
                    try:
                        with self._read_gate:
                            while self._wanted_alone or self._forking:
                                self._quiet.wait()
                            # A set and not a count: an interrupt may come between any two of these.
                            self._long_reads.add(mark)
                            begun = self._begin()
                    except lmdb.MapResizedError:
                        self._long_reads.discard(mark)
                        self._adopt_map()
                yield begun
            finally:
                with self._read_gate:
                    if begun is not None:
                        begun.abort()
                    self._long_reads.discard(mark)
                    self._quiet.notify_all()

    @contextmanager
    def write(self, *, grows: bool = False, more: int = 0) -> Iterator[lmdb.Transaction]:
        """Open a write transaction: committed on leaving, undone by any exception.

        Parameters
        ----------
        grows
            It adds more than it takes away, so it must leave what the file has to spare to those that delete.
        more
            About how many bytes it adds, where that is much.

        Raises
        ------
        StoreFullError
            If the file system is full.
        """
        with self._write_gate, self._translated():
            with self._read_gate:
                handle = self.handle
                self._writes += 1
                if self._writes % _READERS_EACH == 0:
                    handle.reader_check()
                refused = self._pad(more) if grows else None
                if refused is not None:
                    raise self._full(refused) if refused.errno in FULL else named(refused, self.path)
            try:
                txn = handle.begin(write=True, buffers=True)
            except lmdb.MapResizedError:  # another process wrote since this one opened it
                self._adopt_map()
                txn = self.handle.begin(write=True, buffers=True)
            try:
                with txn:
                    number = txn.id()
                    self._look_before_writing(number)
                    yield txn
            except lmdb.Error:
                self._leave_broken()
                raise
            if self._pages is not None:
                # It is committed: an older seal says nothing of it, and harms nothing.
                with suppress(OSError, MemoDBError):
                    self._pages.seal(number)
            self._pad()

    def _look_before_writing(self, number: int) -> None:
        """Check all pages before the first write of this process: LMDB writes where the list of free pages says."""
        pages = self._pages
        if pages is None or pages.complete_for_writing:
            return
        meta = pages.snapshot(number - 1)
        if meta is None:
            raise CorruptionError(
                f"{self.path / 'data.mdb'} has no transaction {number - 1}, which {self.path / 'lock.mdb'} names: one "
                "of them is damaged; close the store in all processes and open it again, or restore it from a copy"
            )
        pages.check_all(meta, writing=True)

    def _leave_broken(self) -> None:
        """Close LMDB's environment where it serves nobody any more: a write of the page that commits has failed.

        The next transaction opens it again, so what is committed can be read on.
        """
        try:
            self.handle.begin().abort()
        except lmdb.PanicError:
            with self._alone():
                self._close()
        except lmdb.Error:
            pass

    def change(self, work: Callable[[lmdb.Transaction], None], *, more: int = 0) -> None:
        """Call `work` with a write transaction; again with a map twice as large, until what it writes fits the map.

        Parameters
        ----------
        work
            Writes through the transaction that it is given; it may be called several times.
        more
            About how many bytes it adds; 0 if it deletes.

        Raises
        ------
        StoreFullError
            If the file system is full, or no larger map is to be had; nothing is written then.
        """
        with self._write_gate:
            while True:
                try:
                    with self.write(grows=more > 0, more=more) as txn:
                        work(txn)
                    return
                except StoreFullError as error:
                    if not isinstance(error.__cause__, lmdb.MapFullError):
                        raise
                self._set_map(2 * int(self.handle.info()["map_size"]))

    def settle(self, *, checks: bool = False) -> None:
        """Let readers see what the file holds, before a writer goes by what they see.

        Parameters
        ----------
        checks
            Check all pages, as before the first write: for who goes through all of them next, so that it is done once.

        LMDB commits by writing a page, and then tells readers of it in the lock file. A writer that is killed between
        the two leaves a commit on the disk that nobody sees as long as another process keeps the lock file, and that
        comes to light with the next writer, which takes the dead one's lock over. So that is done here.
        """
        with self._write_gate, self._translated(), suppress(lmdb.ReadonlyError):
            try:
                txn = self.handle.begin(write=True)
            except lmdb.MapResizedError:
                self._adopt_map()
                txn = self.handle.begin(write=True)
            with txn:  # empty, so there is nothing to commit
                if checks:
                    self._look_before_writing(txn.id())

    def flush(self) -> None:
        """Make everything committed durable, whatever `Kind.sync` and `Kind.metasync` say."""
        with self._write_gate, self._translated():
            self.handle.sync(True)

    def _adopt_map(self) -> None:
        """Map what another process let the file grow to; with no gate in hand but that of writing."""
        granted = self._granted()
        self._set_map(granted if granted < _UNLIMITED else 0)

    def _set_map(self, size: int) -> None:
        """Map the file anew, `size` bytes of it; 0: as many as whoever grew it."""
        with self._alone():
            try:
                self.handle.set_mapsize(size)
            except lmdb.Error as error:
                self._close()  # it has no map any more; the next transaction opens it as it was
                raise StoreFullError(
                    f"{self.kind.noun} {self.path} needs more address space ({size or 'what another process took'}): "
                    f"{error}; raise the limit of this process (ulimit -v)"
                ) from error

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold both gates while no transaction of this process is under way."""
        with self._write_gate, self._read_gate:
            self._wanted_alone += 1  # or one long read after the other could go on for ever
            try:
                while self._long_reads:
                    self._quiet.wait()
            finally:
                self._wanted_alone -= 1
                self._quiet.notify_all()
            yield

    def _hold_for_fork(self, gates: ExitStack) -> bool:
        for gate in (self._write_gate, self._read_gate):
            if not gate.acquire(blocking=False):
                return False
            gates.callback(gate.release)
        return not self._long_reads

    @classmethod
    def _before_fork(cls) -> None:
        # A thread that holds a gate may want the registry (a garbage collection there closes a database), so nobody
        # waits for a gate with the registry in hand.
        with cls._registry_lock:
            cls._forking += 1  # no long read begins from here on
        while True:
            cls._registry_lock.acquire()
            cls._fork_gates = ExitStack()
            # A list: a garbage collection in here may close a database, and so take one out.
            busy = next((env for env in list(cls._shared.values()) if not env._hold_for_fork(cls._fork_gates)), None)
            if busy is None and hold_for_fork():
                cls._fork_gates.callback(release_after_fork)
                return
            cls._fork_gates.close()
            cls._registry_lock.release()
            if busy is None:
                wait_for_fork()
            else:
                with busy._alone():  # until whoever is in there is done
                    pass

    @classmethod
    def _after_fork_in_parent(cls) -> None:
        cls._forking -= 1
        for env in list(cls._shared.values()):
            env._quiet.notify_all()
        cls._fork_gates.close()
        cls._registry_lock.release()

    @classmethod
    def _after_fork_in_child(cls) -> None:
        cls._forking = 0
        for env in list(cls._shared.values()):
            env._close()
            env._read_gate, env._write_gate = threading.RLock(), threading.RLock()
            env._quiet = threading.Condition(env._read_gate)
            env._wanted_alone = 0
        cls._registry_lock = threading.RLock()

    _fork_gates: ClassVar[ExitStack]
    _forking: ClassVar[int] = 0


os.register_at_fork(
    before=Environment._before_fork,
    after_in_parent=Environment._after_fork_in_parent,
    after_in_child=Environment._after_fork_in_child,
)
