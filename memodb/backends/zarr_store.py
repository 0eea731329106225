"""The zarr store that holds an array: opened by URL, closed, given up in a forked child; its errors in our words."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar
from zipfile import BadZipFile

from zarr.abc.store import Store
from zarr.buffer.cpu import Buffer
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import iothread
from zarr.storage import FsspecStore, MemoryStore, ObjectStore, WrapperStore, ZipStore

from memodb.backends.zarr_local import GuardedStore
from memodb.backends.zarr_loop import run
from memodb.backends.zarr_url import Target, choose_client, fsspec_options, obstore_options
from memodb.errors import CorruptionError, MemoDBError, StoreAccessError, StoreFullError
from memodb.safe import Guard

#: What zarr calls the metadata of an array (and, of version 2, of arrays and groups).
METADATA = "zarr.json"
_NODES = (METADATA, ".zarray", ".zgroup")
#: Memory stores of this process, by name.
_MEMORY: dict[str, dict[str, Any]] = {}
#: Stores whose connections another process owns: never collected, since that would close them.
_ABANDONED: list[Store] = []
#: Connections that are being closed by the loop itself, which holds its tasks weakly.
_CLOSING: set[asyncio.Task[None]] = set()
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)


class MissingObjectError(FileNotFoundError):
    """An object that should hold a record is not in the store."""


class Counted(WrapperStore[Store]):
    """A store that counts the bytes of chunks written to it: how small a codec makes them is known here only."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self.written = 0

    async def set(self, key: str, value: Any) -> None:
        """Write an object."""
        await super().set(key, value)
        if key != METADATA:
            self.written += len(value)


class Place:
    """An open store, and where it is.

    Parameters
    ----------
    target
        Where the array lies.
    client, storage_options
        How it is reached, if it is on another machine.
    writable
        Whether this process is the writer.
    guard
        What the store's directory says of files and directories on this machine; None before there is one.

    Raises
    ------
    BackendUnavailableError
        If a driver is not installed.
    StoreAccessError
        If the client cannot be made, for its options or lack of credentials.
    """

    #: The process that used obstore first: its threads do not survive a fork.
    _obstore_process: ClassVar[int | None] = None

    def __init__(
        self,
        target: Target,
        client: str,
        storage_options: Mapping[str, Any],
        *,
        writable: bool,
        guard: Guard | None = None,
    ) -> None:
        self.target = target
        self._guard = guard
        self.root = Path(target.where) if target.kind == "local" else None
        self._client = choose_client(target, client) if target.kind == "remote" else ""
        self._options = storage_options
        self._writable = writable
        self._store: Counted | None = None
        _ = self.store  # made now, so that what is missing is missed now

    @property
    def store(self) -> Counted:
        """The zarr store.

        Raises
        ------
        StoreAccessError
            If it cannot be opened.
        """
        if self._store is None:
            try:
                self._store = Counted(self._open())
            except MemoDBError:
                raise
            except BadZipFile as error:
                raise CorruptionError(f"{self} is no zip file ({error}); restore it from a copy") from error
            except Exception as error:
                translated = self.failure("opened", error)
                if translated is error:
                    raise
                raise translated from error
        return self._store

    def _open(self) -> Store:
        target, read_only = self.target, not self._writable
        if target.kind == "local":
            return GuardedStore(target.where, read_only=read_only, guard=self._guard)
        if target.kind == "memory":
            return MemoryStore(_MEMORY.setdefault(target.where, {}), read_only=read_only)
        if target.kind == "zip":
            if self._guard is not None:
                self._guard.look(target.where)
            opened = ZipStore(target.where, mode="r")
            opened._sync_open()
            return opened
        if self._client == "obstore":
            return ObjectStore(self._open_obstore(), read_only=read_only)
        options = fsspec_options(target, self._options)
        return FsspecStore.from_url(target.where, storage_options=options, read_only=read_only)

    def _open_obstore(self) -> Any:
        from obstore.store import from_url

        first = Place._obstore_process = Place._obstore_process or os.getpid()
        if first != os.getpid():
            raise StoreAccessError(
                f"{self.target} cannot be read in a forked process by client='obstore', whose threads do not survive a "
                "fork: start processes by 'spawn' (multiprocessing.set_start_method), or use client='fsspec'"
            )
        return from_url(self.target.where, **obstore_options(self.target, self._options))

    def after_fork(self) -> None:
        """Give up what belongs to the parent; the store is opened anew at its next use."""
        self._writable = False
        if self._store is not None:
            _ABANDONED.append(self._store)
            self._store = None

    def close(self) -> None:
        """Close connections and files; those of the program's own stay open."""
        store, self._store = self._store, None
        if store is None:
            return
        inner = store._store
        if isinstance(inner, FsspecStore):
            _close_session(inner.fs)
        elif isinstance(inner, ZipStore):
            inner.close()

    @property
    def guard(self) -> Guard:
        """What the array's directory says of the files in it."""
        assert isinstance(self.store._store, GuardedStore)
        return self.store._store.guard

    def make_root(self) -> None:
        """Make the array's directory, if it lies on this machine."""
        if isinstance(self.store._store, GuardedStore):
            self.store._store.make_root()

    # --- objects ---

    def size(self, key: str) -> int | None:
        """Return the bytes of an object on this machine before it is read; None: it is not there, or elsewhere."""
        with contextlib.suppress(OSError, KeyError):
            if self.root is not None:
                return (self.root / key).stat().st_size
            inner = self.store._store
            if isinstance(inner, ZipStore):
                return inner._zf.getinfo(key).file_size
        return None

    def get(self, key: str, *, most: int) -> bytes | None:
        """Return an object, None if it is not there.

        Raises
        ------
        StoreAccessError
            If the store cannot be read.
        CorruptionError
            If the object takes more than `most` bytes.
        """
        size = self.size(key)
        if size is not None and size > most:
            raise CorruptionError(
                f"{key} of {self} has {size} bytes, at most {most} are possible: restore it from a copy"
            )
        found: list[Any] = []

        async def read() -> None:
            found.append(await self.store.get(key, default_buffer_prototype()))

        self.run([read], "read")
        return None if found[0] is None else bytes(found[0].to_bytes())

    def put(self, key: str, value: bytes) -> None:
        """Write a small object."""

        async def write() -> None:
            await self.store.set(key, Buffer.from_bytes(value))

        self.run([write], "written")

    def holds_something(self) -> str:
        """Return what is there already that a new array would damage; empty if nothing is.

        Raises
        ------
        StoreAccessError
            If the store cannot be read.
        """
        if self.root is not None:
            if self.root.is_dir():
                return "other files" if next(self.root.iterdir(), None) else ""
            return "a file" if self.root.exists() else ""
        return next((f"an array or group ({key})" for key in _NODES if self.get(key, most=1 << 62) is not None), "")

    def run(self, jobs: Any, done: str) -> None:
        """Run coroutine functions in zarr's loop (see `run`), a failure in our words: "cannot be `done`"."""
        try:
            run(jobs, self.concurrency)
        except (MemoDBError, MissingObjectError):
            raise
        except Exception as error:
            translated = self.failure(done, error)
            if translated is error:
                raise
            raise translated from error

    @property
    def concurrency(self) -> int:
        """How many objects are worked on at a time: as many as zarr is configured for, fewer where only CPUs work."""
        import zarr

        wanted = int(zarr.config.get("async.concurrency") or 10)
        return wanted if self.target.kind == "remote" else min(wanted, (os.cpu_count() or 1) + 2)

    def failure(self, done: str, error: Exception) -> Exception:
        """Return an error of the store as one of ours; as it is, where it tells of the device, or of a defect."""
        if isinstance(error, MemoDBError):
            return error
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in _FULL):
            return StoreFullError(f"no room at {self} ({error}); nothing was stored; free space, or delete and compact")
        if self.target.kind == "remote":
            return StoreAccessError(
                f"{self} cannot be {done}: {type(error).__name__}: {error}; check the network, the endpoint (option "
                "storage_options), that the bucket exists, and the credentials (environment or credential file), then "
                "try again"
            )
        if isinstance(error, OSError) and error.errno in _REFUSED:
            return StoreAccessError(f"{self} cannot be {done}: {error}; ask its owner for access")
        return error

    def __str__(self) -> str:
        return str(self.target)


def forget(target: Target) -> None:
    """Drop a memory store."""
    _MEMORY.pop(target.where, None)


def _close_session(fs: Any) -> None:
    """Close the connections of an fsspec file system, in the loop that they were opened in."""
    client = getattr(fs, "_s3", None) or getattr(fs, "_session", None)
    if client is None:
        return

    async def close() -> None:
        await client.close()

    if iothread[0] is threading.current_thread():  # a garbage collection there found a handle that nobody closed
        task = asyncio.get_running_loop().create_task(close())
        _CLOSING.add(task)
        task.add_done_callback(_CLOSING.discard)
        return
    with contextlib.suppress(Exception):  # the loop is gone when the interpreter ends, and connections with it
        run([close], 1)
