"""An open store: its catalog, backend, indexes and lock, from opening to closing, through forks and failures."""

from __future__ import annotations

import errno
import os
import threading
import weakref
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

import numpy as np

from memodb import layout
from memodb.backends import registry
from memodb.backends.base import Locators, SupportsExtents, ValueBackend
from memodb.catalog import Catalog
from memodb.checks import Checks, Verify
from memodb.counters import Counters
from memodb.errors import (
    BackendNotFoundError,
    BackendUnavailableError,
    ClosedError,
    CorruptionError,
    DeviceError,
    InvalidOptionError,
    InvalidRecordError,
    MemoDBError,
    ReadOnlyError,
    StoreNotFoundError,
)
from memodb.gather.gather import Source, closed, forget_pages, opened
from memodb.gather.prefetch import Prefetched, drain
from memodb.index.manager import IndexSet
from memodb.lock import WriterLock
from memodb.os_errors import LIMITS, named, naming
from memodb.record import RecordSpec
from memodb.vm import FlushError

T = TypeVar("T")
#: A namespace is indexed at close if it grew by so many keys: up to there a reader's exact search is quick anyway.
INDEX_AT_CLOSE = 10_000


class Handle:
    """What `MemoDB` is made of; the verbs are there.

    Parameters
    ----------
    path, mode
        As for `MemoDB.open`.
    lock
        The writer's lock, if this is the writer; the handle releases it.
    settings
        Settings to make a new store with; None opens an existing one.
    unfinished
        Open what `memodb.copy` has not finished, too.
    verify
        As for `MemoDB.open`.
    """

    def __init__(
        self,
        path: Path,
        mode: Literal["r", "r+"],
        lock: WriterLock | None,
        settings: dict[str, Any] | None = None,
        *,
        unfinished: bool = False,
        verify: Verify | None = None,
    ) -> None:
        self._path = path
        self._mode: Literal["r", "r+"] = mode
        self._lock = threading.RLock()
        self._writer_lock = lock
        self._owner: int | str | None = None
        self._throwaway: layout.Throwaway | None = None
        self._failed: BaseException | None = None
        self._unrestored = False
        self._closed = True
        self._counters = Counters()
        self._checks = Checks("never" if verify is None else verify)
        self._prefetched = Prefetched()
        self._seen = -1
        self._catalog = Catalog(path / layout.CATALOG, create_with=settings)
        try:
            stored = self._catalog.settings
            if stored.get("copy_of") and not unfinished and settings is None:
                raise StoreNotFoundError(
                    f"{path} holds an unfinished copy of {stored['copy_of']['path']}: call memodb.copy() (or memodb "
                    "copy) again with the same arguments, and it goes on where it stopped; or remove the directory"
                )
            self._spec, self._backend = self._make_backend(stored)
            if verify is None and self._backend.travels:
                self._checks = Checks("always")
            # Asked once: looking at a Protocol takes longer than the rest of a small gather.
            self._extents = self._backend.extents if isinstance(self._backend, SupportsExtents) else None
            with naming(path):
                if mode == "r+":
                    self._catalog.settle()
                    self._backend.restore(self._catalog.backend_state()[1])
                else:  # segments that are not there are an error now, not at the first gather
                    self._seen, state = self._catalog.backend_state()
                    self._backend.refresh(state)
        except BaseException:
            if hasattr(self, "_backend"):
                self._backend.close()
            self._catalog.close()
            raise
        self._indexes = IndexSet(
            path / layout.INDEX,
            self._catalog,
            stored["key_dim"] or 0,
            stored["index"],
            owner=stored["uid"],
            writable=mode == "r+",
        )
        self._closed = False
        opened()
        _HANDLES.add(self)

    def _make_backend(self, stored: dict[str, Any]) -> tuple[RecordSpec, ValueBackend]:
        values = self._path / layout.VALUES
        try:
            spec = RecordSpec.of(stored["shape"], stored["dtype"])
            backend = registry.load(stored["backend"])
            return spec, backend(values, spec, stored["options"], writable=self._mode == "r+")
        except (BackendNotFoundError, BackendUnavailableError) as error:
            raise type(error)(f"{self._path} cannot be opened: {error}") from error
        except MemoDBError as error:
            if not isinstance(error, (InvalidOptionError, InvalidRecordError)):  # of the settings: see below
                raise
            raise self._unusable(error) from error
        except FileNotFoundError as error:
            raise CorruptionError(f"{values} is missing ({error}); restore the store from a copy") from error
        except OSError as error:
            raise named(error, values) from error
        except (LookupError, OverflowError, TypeError, ValueError) as error:
            raise self._unusable(error) from error

    def _unusable(self, error: Exception) -> CorruptionError:
        return CorruptionError(
            f"the settings of {self._path} cannot be used ({type(error).__name__}: {error}): they are damaged, or "
            "another version of memodb wrote them; restore the store from a copy"
        )

    def close(self) -> None:
        """Close the store (a writer saves its large indexes first).

        Batches already handed out stay valid. Closing twice is fine.
        """
        with self._lock:
            try:
                if not self._closed and self._mode == "r+" and self.key_dim:
                    self._indexes.save(INDEX_AT_CLOSE)
            finally:
                try:
                    drain(self._prefetched.close())
                finally:
                    self._shut()

    def _shut(self) -> None:
        if self._closed:
            return
        # The last one first. All of them, whatever fails or is interrupted: a lock that is kept locks out its own
        # process, to whom nobody could give it back.
        with ExitStack() as steps:
            steps.callback(closed)
            if self._throwaway is not None:
                steps.callback(self._throwaway.remove)
            if self._writer_lock is not None:
                steps.callback(self._writer_lock.release)
                if self._throwaway is not None:
                    steps.callback(self._backend.remove)
            steps.callback(self._catalog.close)
            steps.callback(self._backend.close)
            steps.callback(self._prefetched.close)
            steps.callback(_HANDLES.discard, self)
            self._closed = True

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            self._shut()

    def __enter__(self) -> Self:
        self._check_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else self._mode
        return f"<MemoDB {os.fspath(self._path)!r} {self._spec}, {self.backend_name}, {state}>"

    def _after_fork(self) -> None:
        self._mode, self._writer_lock, self._throwaway = "r", None, None
        self._lock = threading.RLock()
        self._catalog.renew_locks()
        self._prefetched.forget()
        self._checks.renew_lock()
        self._indexes.after_fork()
        self._backend.after_fork()

    # --- what it is ---

    @property
    def path(self) -> Path:
        """Directory of the store."""
        return self._path

    @property
    def mode(self) -> str:
        """Either "r" or "r+"; "r" in a forked child."""
        return self._mode

    @property
    def spec(self) -> RecordSpec:
        """Shape and dtype of one record."""
        return self._spec

    @property
    def key_dim(self) -> int | None:
        """Width of the keys, None if records have none."""
        width: int | None = self._catalog.settings["key_dim"]
        return width

    @property
    def backend_name(self) -> str:
        """Name of the backend."""
        return str(self._catalog.settings["backend"])

    @property
    def index_factory(self) -> str:
        """The faiss factory string of the index, or "auto"."""
        return self._catalog.index_factory()

    @property
    def closed(self) -> bool:
        """Whether the handle was closed."""
        return self._closed

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"the database {self._path} is closed; open it again with MemoDB.open")

    def _check_writable(self) -> None:
        """Raise unless this handle may write. What the answer is for happens under the lock, and so must this."""
        self._check_open()
        if self._mode != "r+":
            raise ReadOnlyError(
                f"{self._path} is open for reading (a forked or unpickled handle always is); open it with mode='r+'"
            )
        if self._failed is not None:
            raise ReadOnlyError(
                f"an earlier write to {self._path} failed ({self._failed}), so nothing more is written through this "
                "handle; check the device, then close and open the store"
            )
        self._check_in_place()
        if self._unrestored:
            self._restore()

    def _check_in_place(self) -> None:
        """Raise if the path leads to another store by now: files that are opened from here on would be that one's."""
        if self._catalog.replaced():
            raise StoreNotFoundError(
                f"{self._path} holds another store than the one that this handle opened, which was removed or restored "
                "meanwhile; close the handle and open the store again"
            )

    def _restore(self) -> None:
        """Let the backend go back to what the catalog says is committed."""
        with self._lock, naming(self._path):
            self._catalog.settle()
            self._backend.restore(self._catalog.backend_state()[1])
            self._unrestored = False

    def _flush(self) -> None:
        """Make what the backend wrote durable; a failure, whatever its reason, ends all writing through this handle."""
        try:
            self._backend.sync()
        except OSError as error:
            cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
            if cause.errno not in LIMITS | {errno.ENOMEM}:  # a file could not be opened: nothing was flushed then
                self._failed = error
            raise

    def _source(self, locators: Locators, seen: int) -> Source:
        """Return where records come from whose locators were looked up in transaction `seen`."""
        self._check_in_place()
        if self._mode == "r" and seen != self._seen:
            number, state = self._catalog.backend_state()
            if self._backend.refresh(state):
                forget_pages()
            self._seen = number  # only now: another thread must not pass by before the backend knows
        if self._extents is not None:
            return self._extents(locators)
        backend = self._backend
        return lambda out: backend.read(locators, out)

    def _gathered(self, ids: np.ndarray[Any, np.dtype[np.int64]], gather: Callable[[Source, int], T]) -> T:
        """Look records up and gather them; again, where they were moved or removed between the two.

        `gather` gets where they come from, and the transaction in which they were looked up.
        """
        tried: tuple[bytes, bytes] | None = None
        while True:
            seen = self._catalog.transaction()
            locators = self._catalog.locators(ids, seen)
            try:
                return gather(self._source(locators, seen), seen)
            except (FileNotFoundError, _MismatchError) as error:
                if isinstance(error, MemoDBError) and not isinstance(error, _MismatchError):
                    raise
                # Compaction in another process may have come in between; without a commit it was not that, nor if
                # neither the records nor what the backend committed changed from one look to the next.
                # (What does not match needs no second state: no commit changes the bytes behind a locator, and a writer
                # that commits all the time must not keep anybody from being told.)
                mismatch = isinstance(error, _MismatchError)
                looked = locators.tobytes(), b"" if mismatch else self._catalog.backend_state()[1]
                if self._catalog.transaction() == seen or tried == looked:
                    if mismatch:
                        raise CorruptionError(str(error)) from None
                    raise CorruptionError(
                        f"what holds records of {self._path} is missing ({error}); restore the store from a copy, or "
                        "delete what verify() names"
                    ) from error
                tried = looked
            except OSError as error:
                if isinstance(error, MemoDBError):
                    raise
                raise named(error, self._path) from error

    def _check(self, ids: np.ndarray[Any, np.dtype[np.int64]], records: np.ndarray[Any, Any], seen: int) -> None:
        """Compare gathered `records` [n, ...] with their checksums, as far as `MemoDB.open` was asked to."""
        if self._checks.mode == "never":
            return
        wrong, found, expected = self._checks.damaged(
            ids, records, lambda wanted: self._catalog.committed(wanted, seen)["checksum"]
        )
        if len(wrong):
            more = f" (and {len(wrong) - 1} more of the batch)" if len(wrong) > 1 else ""
            raise _MismatchError(
                f"record {wrong[0]}{more} of {self._path}: CRC-32C {found[0]:#010x}, expected {expected[0]:#010x}; its "
                "bytes were changed on the store, or on the way: gather again, and if it stays so, delete what "
                "verify() names and put it again, or restore it from a copy"
            )


class _MismatchError(CorruptionError):
    """Records do not match their checksums: perhaps they were moved meanwhile (inside of a gather only)."""


class Writing:
    """Around a write: a failure bears a name, and one of the device ends all writing through this handle.

    Parameters
    ----------
    db
        The handle.
    restores
        Let the backend go back to what the catalog says is committed, if the write fails.
    """

    def __init__(self, db: Handle, *, restores: bool = False) -> None:
        self._db = db
        self._restores = restores

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            return
        raised = error
        if isinstance(error, OSError) and not isinstance(error, MemoDBError):
            raised = named(error, self._db._path)
        # After a failed flush nobody knows what the device holds, whatever the reason: it is never tried again.
        if isinstance(raised, DeviceError) or isinstance(error, FlushError) or isinstance(error.__cause__, FlushError):
            self._db._failed = raised
        if self._restores:
            self._db._unrestored = True
            with suppress(Exception):  # the first error is the one to see; the next write tries again
                self._db._restore()
        if raised is not error:
            raise raised from error


_HANDLES: weakref.WeakSet[Handle] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for db in list(_HANDLES):
        db._after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)
