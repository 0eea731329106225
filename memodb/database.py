"""`MemoDB`, the one public face: every verb reads as a few calls into the rooms below."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np

from memodb import arguments, interop, layout
from memodb.backends import registry
from memodb.backends.base import Locators, Victim
from memodb.catalog.catalog import check_name
from memodb.checks import Verify
from memodb.checksum import record_checksums
from memodb.errors import (
    CorruptionError,
    InvalidKeyError,
    InvalidOptionError,
    InvalidRecordError,
    StoreFullError,
    StoreNotFoundError,
)
from memodb.gather.batch import MappedBatch
from memodb.gather.gather import Source, check_strategy, copy_into, forget_pages, gather_batch
from memodb.gather.plan import Strategy
from memodb.handle import INDEX_AT_CLOSE, Handle, Writing
from memodb.lock import WriterLock
from memodb.os_errors import names_limits, naming
from memodb.problem import Problem
from memodb.record import RecordSpec

Ids = np.ndarray[Any, np.dtype[np.int64]]
Progress = Callable[[int, int], None]


class SearchResult(NamedTuple):
    """What a search found.

    Parameters
    ----------
    ids
        int64 [n, k], nearest first; -1 where there is none.
    distances
        float32 [n, k], squared L2; inf where there is none.
    """

    ids: Ids
    distances: np.ndarray[Any, np.dtype[np.float32]]


class MemoDB(Handle):
    """A store of equal-shaped records, fetched many at a time as one contiguous tensor.

    Get one from `MemoDB.create` or `MemoDB.open`. One handle at a time writes, in any process; any number read, and see
    each committed put at their next call. A handle is a context manager; it may be used by several threads, forked (the
    child reads), and pickled (the copy reads).

    Examples
    --------
    >>> import numpy as np, tempfile
    >>> path = tempfile.mkdtemp() + "/store"
    >>> with MemoDB.create(path, shape=(16, 64), dtype="float32", key_dim=8) as db:
    ...     ids = db.put(np.ones((3, 16, 64), "float32"), keys=np.eye(3, 8))
    >>> MemoDB.open(path).multiget_mapped(ids[::-1]).shape
    (3, 16, 64)
    """

    # --- opening and closing ---

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        *,
        shape: Sequence[int] | int,
        dtype: Any,
        key_dim: int | None = None,
        backend: str | None = None,
        index: str = "auto",
        max_bytes: int | None = None,
        permissions: int = 0o700,
        **backend_options: Any,
    ) -> Self:
        """Make a new store and open it for writing.

        Parameters
        ----------
        path
            Directory of the store; it must not exist, or be empty. ":memory:" makes a store that is gone when this
            handle is closed.
        shape, dtype
            Of ONE record. Every numeric numpy dtype, and "bfloat16", "float8_e4m3fn", "float8_e5m2".
        key_dim
            Width of the float32 keys; None for a store that is never searched.
        backend
            Name of the backend that holds the records (see `memodb.available_backends`). Default: "arena", and
            "memory" for ":memory:".
        index
            faiss factory string ("Flat", "HNSW32", "IVF1024,PQ32", ...), or "auto": exact while a namespace is small,
            HNSW32 beyond.
        max_bytes
            Bytes that records and catalog may take together; None for no limit.
        permissions
            Of the store's directories, whatever the umask; files have the same, less execution. 0o700: nobody else may
            look at it. 0o750, 0o770: the group of the directory may read, or write as well (docs/security.md).
        **backend_options
            Options of the backend.

        Raises
        ------
        StoreExistsError
            If there is a store, or any other file, at `path`.
        InvalidRecordError, InvalidOptionError, BackendNotFoundError
            If an argument cannot be used; nothing is made then.
        UnsafePathError
            If an empty directory at `path` is somebody else's, or everybody may write it.
        """
        return cls._create(path, shape, dtype, key_dim, backend, index, max_bytes, backend_options, permissions)

    @classmethod
    @names_limits
    def _create(
        cls,
        path: str | os.PathLike[str],
        shape: Any,
        dtype: Any,
        key_dim: int | None,
        backend: str | None,
        index: str,
        max_bytes: int | None,
        backend_options: dict[str, Any],
        permissions: int = 0o700,
        **more: Any,
    ) -> Self:
        """Make a store (see `create`); `more` are settings of `memodb.transfer`."""
        volatile = layout.is_memory(path)
        if backend is None:
            backend = "memory" if volatile else "arena"
        spec = RecordSpec.of(shape, dtype)
        allowed = arguments.as_permissions(permissions)
        loaded = registry.load(backend)
        throwaway = layout.Throwaway() if volatile else None
        where = arguments.as_path(path) if throwaway is None else throwaway.path
        limit = None if max_bytes is None else arguments.as_count("max_bytes", max_bytes)
        with naming(where):
            room = layout.room(where, limit)
        settings = {
            "uid": secrets.token_hex(8),
            "shape": list(spec.shape),
            "dtype": spec.dtype_name,
            "key_dim": None if key_dim is None else arguments.as_count("key_dim", key_dim, most=1 << 16),
            "backend": backend,
            "options": loaded.check_options(backend_options, spec, room=room),
            "index": _check_index(index, key_dim),
            "max_bytes": limit,
            **more,
        }
        with naming(where):
            lock, made = layout.claim(where, allowed)
        db, begun = None, False
        try:
            with naming(where):
                db = cls(where, "r+", lock, settings)
                db._throwaway = throwaway
                db._backend.begin()
                begun = True
                layout.sync(where)
            return db
        except BaseException:
            if db is not None and begun:
                db._backend.remove()
            layout.remove(where)  # while nobody else can be making a store here
            if db is not None:
                db._shut()
            lock.release()
            layout.remove_empty(made)
            raise

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        mode: Literal["r", "r+"] = "r",
        *,
        verify: Verify | None = None,
        owner: int | str | None = None,
    ) -> Self:
        """Open an existing store; shape, dtype, backend and index come from the store itself.

        Parameters
        ----------
        path
            Directory of the store.
        mode
            "r": read; "r+": read and write (one handle at a time).
        verify
            Whether gathers compare records with their checksums: "never", "first" (each record the first time that
            this handle returns it) or "always". Default: "never" where records lie on this machine, because reading
            every byte would undo what mapping saves (`verify` the method reads the whole store back); "always" where
            they travel (zarr on an object store).
        owner
            Name or id of the user whose store it is, if it is neither this process's user's nor root's: whoever opens a
            store trusts its owner. ``MEMODB_TRUSTED_OWNERS`` says the same to every program.

        Raises
        ------
        StoreNotFoundError
            If there is no store at `path`.
        WriterLockedError
            If `mode` is "r+" and another handle writes.
        FormatVersionError, CorruptionError, StoreAccessError
            If the store cannot be read.
        UnsafePathError
            If the store is somebody else's, or something in it is none of its files: a link, a FIFO, somebody else's,
            or one that others may write.
        """
        if layout.is_memory(path):
            raise StoreNotFoundError(
                f"{layout.MEMORY!r} is a new store each time: it is reached by the handle that create() returned, and, "
                "in the same process, by that handle's path"
            )
        where = arguments.as_path(path)
        if not isinstance(mode, str) or mode not in ("r", "r+"):
            raise InvalidOptionError(f"mode must be 'r' or 'r+', found {mode!r}; a new store is made by create()")
        with naming(where):
            found = layout.holds_store(where, owner)
        if not found:
            raise StoreNotFoundError(f"{where} holds no memodb store; memodb.MemoDB.create makes one")
        return cls._open(where, mode, owner, verify=verify)

    @classmethod
    @names_limits
    def _open(
        cls,
        where: Path,
        mode: Literal["r", "r+"],
        owner: int | str | None = None,
        *,
        unfinished: bool = False,
        verify: Verify | None = None,
    ) -> Self:
        with naming(where):
            lock = WriterLock(where / layout.LOCK) if mode == "r+" else None
        try:
            with naming(where):
                db = cls(where, mode, lock, unfinished=unfinished, verify=verify)
            db._owner = owner
            return db
        except BaseException:
            if lock is not None:
                lock.release()
            raise

    def __reduce__(self) -> tuple[Any, ...]:
        # A path and two options: whoever unpickles it opens the store by the rules of `open`.
        return MemoDB._reopened, (os.fspath(self._path), self._checks.mode, self._owner)

    @classmethod
    def _reopened(cls, path: str, verify: Verify, owner: int | str | None) -> Self:
        return cls.open(path, verify=verify, owner=owner)

    # --- writing ---

    @names_limits
    def put(self, values: Any, keys: Any = None, *, namespace: str | Sequence[str] = "") -> Ids:
        """Store records, all or none.

        Parameters
        ----------
        values
            [n, *shape] of the store's dtype: numpy, torch, anything with ``__array__`` or DLPack.
        keys
            [n, key_dim], float32; needed where the store has keys.
        namespace
            One name, or one per record.

        Returns
        -------
        numpy.ndarray
            The new ids, int64 [n], ascending. On a disk file system the records are durable when this returns.

        Raises
        ------
        InvalidRecordError, InvalidKeyError, InvalidOptionError
            If an argument does not fit; nothing is stored then.
        StoreFullError
            If they do not fit the file system or ``max_bytes``; nothing is stored then.
        ReadOnlyError, ClosedError
            If the handle cannot write.
        """
        self._check_writable()
        records = interop.as_records(self._spec, values)
        checked = self._check_keys(keys, len(records))
        names, rows = arguments.as_namespaces(namespace, len(records))
        return self._store(records, checked, names, rows)

    def _check_keys(self, keys: Any, n: int) -> np.ndarray[Any, np.dtype[np.float32]] | None:
        if self.key_dim is not None:
            return arguments.as_keys(keys, self.key_dim, n)
        if keys is not None:
            raise InvalidKeyError(f"{self._path} was created without key_dim, so its records have no keys; pass none")
        return None

    def _store(
        self,
        records: np.ndarray[Any, Any],
        keys: np.ndarray[Any, np.dtype[np.float32]] | None,
        names: list[str],
        rows: np.ndarray[Any, np.dtype[np.intp]],
        ids: Ids | None = None,
    ) -> Ids:
        if len(records) == 0:
            return np.zeros(0, np.int64)
        with self._lock:
            self._check_writable()
            self._check_room(len(records))
            with Writing(self, restores=True):
                locators = self._backend.append(records)
                self._flush()
                sums = record_checksums(self._backend.as_kept(records))
                ids = self._catalog.commit(locators, sums, names, rows, keys, self._backend.state(), ids)
            self._counters.puts += 1
            self._counters.records_put += len(ids)
            if keys is not None:
                numbers = [n for n in self._catalog.namespace_numbers(names) if n is not None]
                self._indexes.note_added(numbers, np.bincount(rows, minlength=len(names)).tolist())
        return ids

    def _check_room(self, n: int) -> None:
        limit = self._catalog.settings["max_bytes"]
        if limit is None:
            return
        used = self._backend.bytes_on_store() + self._catalog.usage()
        more = self._backend.append_bytes(n) + self._catalog.growth(n)
        if used + more > limit:
            raise StoreFullError(
                f"{n} records need {more} more bytes; {self._path} holds {used} of max_bytes={limit}; delete "
                "records and compact(), or create a store with a larger max_bytes"
            )

    @names_limits
    def delete(self, ids: Any) -> None:
        """Delete records, all or none: they are found no more at once; `compact` gives their memory back.

        Raises
        ------
        RecordNotFoundError
            If any of them does not exist; nothing is deleted then.
        InvalidIdError, ReadOnlyError, ClosedError
            As for `put`.
        """
        self._check_writable()
        wanted = np.unique(arguments.as_ids(ids))
        if len(wanted):
            with self._lock:
                self._check_writable()
                with Writing(self):
                    self._catalog.delete(wanted)

    @names_limits
    def compact(self, progress: Progress | None = None) -> int:
        """Give the space of deleted records back. Never waits for readers or batches: what they hold stays intact.

        Parameters
        ----------
        progress
            Called with (segments done, segments to do).

        Returns
        -------
        int
            Bytes given back to the file system.

        Raises
        ------
        StoreFullError
            If there is no room to move the live records of one segment; what was compacted before stays so.
        """
        with self._lock:
            self._check_writable()
            with Writing(self):
                before = self._backend.bytes_on_store()
                live_ids, rows = self._catalog.live()
                victims = self._backend.victims(rows["locator"])
            for done, victim in enumerate(victims):
                with Writing(self, restores=True):
                    moved = self._rewrite(victim, rows["locator"][victim.members])
                    self._catalog.relocate(live_ids[victim.members], moved, self._backend.state())
                with Writing(self):
                    self._backend.discard(victim.token)
                forget_pages()
                if progress is not None:
                    progress(done + 1, len(victims))
            with Writing(self):
                self._catalog.drop_dead_keys()
            # Erasing in place may take a page or two and give none back.
            return max(before - self._backend.bytes_on_store(), 0)

    def _rewrite(self, victim: Victim, locators: Locators) -> Locators:
        try:
            moved = self._backend.rewrite(victim.token, locators)
            if len(moved):
                self._flush()
        except StoreFullError as error:
            raise StoreFullError(
                f"compacting {self._path} needs room for the live records of one part at a time, now for "
                f"{len(locators)} ({len(locators) * self._spec.nbytes} bytes): {error.__cause__ or error}; free so "
                "much there, delete more, or memodb.copy() the store to where there is room. What was compacted before "
                "stays so"
            ) from error
        except FileNotFoundError as error:
            raise CorruptionError(
                f"a segment of {self._path} is missing ({error}); verify() names the records that are lost"
            ) from error
        return moved

    @names_limits
    def reindex(self, index: str | None = None) -> None:
        """Build the index anew from the keys, with another factory if `index` names one.

        Raises
        ------
        InvalidOptionError
            If faiss cannot build that factory; nothing changes then.
        """
        self._check_writable()
        factory = self.index_factory if index is None else _check_index(index, self.key_dim)
        with self._lock, Writing(self):
            self._check_writable()
            numbers = self._catalog.namespaces()
            large = [name for name, count in numbers.items() if count > INDEX_AT_CLOSE]
            old = self.index_factory
            self._catalog.change_settings(index=factory)
            try:
                self._indexes.rebuild(factory, [n for n in self._catalog.namespace_numbers(large) if n is not None])
            except BaseException:
                self._catalog.change_settings(index=old)
                self._indexes.rebuild(old, [])
                raise

    # --- reading ---

    @names_limits
    def multiget(self, ids: Any, out: np.ndarray[Any, Any] | None = None) -> np.ndarray[Any, Any]:
        """Return a copy of records as one numpy array.

        Parameters
        ----------
        ids
            n integers, in any order, repeats allowed.
        out
            A C-contiguous array [n, *shape] of the store's dtype to copy into.

        Returns
        -------
        numpy.ndarray
            [n, *shape], C-contiguous, writable; `out` if it was given.

        Raises
        ------
        RecordNotFoundError
            If any of them does not exist.
        InvalidIdError, InvalidRecordError
            If ids or `out` cannot be used.
        """
        self._check_open()
        wanted = arguments.as_ids(ids)
        if out is not None:
            _check_out(out, self._spec, len(wanted))
        out = self._gathered(wanted, lambda source, seen: self._copied(wanted, source, seen, out))
        self._counters.gathered(wanted.copy(), out.nbytes, mapped=False)
        return out

    def _copied(self, wanted: Ids, source: Source, seen: int, out: np.ndarray[Any, Any] | None) -> np.ndarray[Any, Any]:
        if out is None:
            out = gather_batch(source, self._spec, wanted, "copy").numpy(writable=True)
        elif len(wanted):
            copy_into(source, out.reshape(-1).view(np.uint8).reshape(len(wanted), self._spec.nbytes))
        self._check(wanted, out, seen)
        return out

    def _read_back(self, ids: Ids) -> np.ndarray[Any, Any]:
        """Return a copy of records that nobody compared with their checksums, for who does that."""
        return self._gathered(ids, lambda source, _: gather_batch(source, self._spec, ids, "copy").numpy())

    @names_limits
    def multiget_mapped(self, ids: Any, strategy: Strategy = "auto") -> MappedBatch:
        """Return records as one contiguous tensor, without a copy where their pages can be mapped side by side.

        Parameters
        ----------
        ids
            n integers, in any order, repeats allowed.
        strategy
            "map": map or raise; "copy": copy into a warm buffer; "auto": what is quicker.

        Returns
        -------
        MappedBatch
            [n, *shape]; valid until its last view dies, whatever happens to the database.

        Raises
        ------
        RecordNotFoundError
            If any of them does not exist.
        MappingUnsupportedError
            If `strategy` is "map" and backend, record size or kernel limits forbid it.
        InvalidIdError, InvalidOptionError, CorruptionError
            If ids or strategy cannot be used, or a segment was cut short, or (see `verify` of `open`) a record does not
            match its checksum.
        """
        self._check_open()
        check_strategy(strategy)
        wanted = arguments.as_ids(ids)

        def gather(source: Source, seen: int) -> MappedBatch:
            prepared = self._prefetched.take(wanted, strategy)
            return self._batch(source, wanted, strategy, seen) if prepared is None else prepared

        batch = self._gathered(wanted, gather)
        self._counters.gathered(batch.ids, batch.nbytes, mapped=batch.zero_copy)
        return batch

    @names_limits
    def prefetch(self, ids: Any, strategy: Strategy = "auto") -> None:
        """Begin to gather a batch in the background; the next `multiget_mapped` of the same ids hands it over.

        Worth it where gathering copies, or reads from a disk, and something else is computed meanwhile. At most two
        batches wait to be asked for; a third takes the place of the oldest.

        Parameters
        ----------
        ids, strategy
            As for `multiget_mapped`, which must be asked for exactly these.

        Raises
        ------
        RecordNotFoundError, InvalidIdError, InvalidOptionError
            As for `multiget_mapped`. What goes wrong later is raised there.
        """
        self._check_open()
        check_strategy(strategy)
        wanted = arguments.as_ids(ids).copy()

        def start(source: Source, seen: int) -> None:
            # One thread: the others belong to what is computed meanwhile.
            self._prefetched.start(wanted, strategy, lambda: self._batch(source, wanted, strategy, seen, threads=1))

        self._gathered(wanted, start)

    def _batch(
        self, source: Source, wanted: Ids, strategy: Strategy, seen: int, *, threads: int | None = None
    ) -> MappedBatch:
        batch = gather_batch(source, self._spec, wanted, strategy, threads=threads)
        if self._checks.mode != "never":
            self._check(wanted, batch.numpy(), seen)
        return batch

    @names_limits
    def search(
        self, keys: Any, k: int = 1, *, namespace: str | Sequence[str] = "", max_distance: float | None = None
    ) -> SearchResult:
        """Find the nearest stored keys.

        Parameters
        ----------
        keys
            [n, key_dim], float32.
        k
            Neighbours per key.
        namespace
            Where to look: one name, or one per key. One that nothing was ever put into finds nothing.
        max_distance
            Leave out neighbours farther than this (squared L2).

        Returns
        -------
        SearchResult
            ids [n, k], nearest first, -1 where there is none; distances [n, k], squared L2, inf where there is none.

        Raises
        ------
        InvalidKeyError
            If keys are NaN, infinite or of the wrong width, or the store has none.
        InvalidOptionError
            If `k`, `namespace` or `max_distance` cannot be used.
        """
        self._check_open()
        if self.key_dim is None:
            raise InvalidKeyError(f"{self._path} was created without key_dim, so there is nothing to search")
        wanted = arguments.as_keys(keys, self.key_dim)
        k = arguments.as_count("k", k, most=1 << 31)
        limit = arguments.as_distance(max_distance)
        names, rows = arguments.as_namespaces(namespace, len(wanted))
        numbers = self._catalog.namespace_numbers(names)
        while True:
            seen = self._catalog.transaction()
            before = self._indexes.distrusted()
            ids, distances = self._search(wanted, k, numbers, rows)
            dead = ((ids >= 0) & ~self._catalog.is_live(np.maximum(ids, 0).reshape(-1)).reshape(ids.shape)).any(axis=1)
            if not dead.any():
                break
            # Somebody deleted meanwhile, and the index learns of it at the next look; or else a saved index is wrong.
            if self._catalog.transaction() == seen:
                self._indexes.distrust({n for n in np.array(numbers, object)[rows[dead]] if n is not None}, before)
        far = distances > limit
        ids[far], distances[far] = -1, np.inf  # nearest first: what is left out stands last
        self._counters.searches += 1
        self._counters.keys_searched += len(wanted)
        return SearchResult(ids, distances)

    def _search(
        self,
        wanted: np.ndarray[Any, np.dtype[np.float32]],
        k: int,
        numbers: list[int | None],
        rows: np.ndarray[Any, np.dtype[np.intp]],
    ) -> tuple[Ids, np.ndarray[Any, np.dtype[np.float32]]]:
        ids = np.full((len(wanted), k), -1, np.int64)
        distances = np.full((len(wanted), k), np.inf, np.float32)
        for number, members in zip(numbers, arguments.grouped(rows, len(numbers)) if numbers else [], strict=True):
            if number is not None and len(members):
                ids[members], distances[members] = self._indexes.search(number, wanted[members], k)
        return ids, distances

    @names_limits
    def ids(self, namespace: str | None = None) -> Ids:
        """Return the ids of all records, or of those in one namespace, int64 [n], ascending."""
        self._check_open()
        return self._catalog.live(None if namespace is None else check_name(namespace))[0]

    @names_limits
    def namespaces(self) -> dict[str, int]:
        """Return the number of records of each namespace that was ever used."""
        self._check_open()
        return self._catalog.namespaces()

    @names_limits
    def keys(self, ids: Any) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Return the keys of records, float32 [n, key_dim].

        Raises
        ------
        InvalidKeyError
            If the store has no keys.
        RecordNotFoundError
            If any of the ids does not exist.
        """
        self._check_open()
        if self.key_dim is None:
            raise InvalidKeyError(f"{self._path} was created without key_dim, so its records have no keys")
        wanted = arguments.as_ids(ids)
        distinct, places = np.unique(wanted, return_inverse=True)
        rows = self._catalog.committed(distinct)
        if not len(distinct):
            return np.zeros((0, self.key_dim), np.float32)
        return self._catalog.keys(distinct, rows)[places]

    @names_limits
    def namespace_of(self, ids: Any) -> list[str]:
        """Return the namespace of each of `ids`."""
        self._check_open()
        return self._catalog.names_of(self._catalog.committed(arguments.as_ids(ids))["namespace"])

    @names_limits
    def __len__(self) -> int:
        self._check_open()
        return self._catalog.counters()[1]

    @names_limits
    def __contains__(self, id: object) -> bool:
        self._check_open()
        if isinstance(id, (bool, np.bool_)) or not isinstance(id, (int, np.integer)) or not 0 <= id < 1 << 63:
            return False
        return bool(self._catalog.is_live(np.array([id], np.int64))[0])

    # --- looking after it ---

    @names_limits
    def stats(self) -> dict[str, Any]:
        """Return what the store holds and what this handle did: a JSON-able dict."""
        self._check_open()
        next_id, live = self._catalog.counters()
        if self._mode == "r" and self._backend.refresh(self._catalog.backend_state()[1]):
            forget_pages()
        usage = self._backend.usage()
        return {
            "path": os.fspath(self._path),
            "backend": self.backend_name,
            "index": self.index_factory,
            "shape": list(self._spec.shape),
            "dtype": self._spec.dtype_name,
            "key_dim": self.key_dim,
            "max_bytes": self._catalog.settings["max_bytes"],
            "records": live,
            "next_id": next_id,
            "namespaces": len(self._catalog.namespaces()),
            "bytes_record": self._spec.nbytes,
            "bytes_logical": live * self._spec.nbytes,
            "bytes_on_store": usage.bytes_on_store,
            "bytes_catalog": self._catalog.usage(),
            "huge_page_share": usage.huge_bytes / usage.bytes_on_store if usage.bytes_on_store else 0.0,
            "huge_page_note": usage.huge_note,
            "filesystem": usage.filesystem,
            "values_path": usage.place,
            "dax": None if usage.dax is None else dict(usage.dax),
            "indexes_loaded": self._indexes.loaded(),
            "verify": self._checks.mode,
            "records_checked": self._checks.checked,
            **self._counters.to_dict(),
        }

    def hits_per_record(self) -> dict[str, Any]:
        """Return how often this handle gathered records: what :meth:`stats` says of it, without a look at the store.

        It can be asked after :meth:`close` as well.

        Returns
        -------
        dict
            ``records_hit``: records that were gathered at all; ``max`` and ``mean`` of how often, of these; ``times``:
            how many records were gathered once, twice, ..., by the number as a string.
        """
        return self._counters.hits_per_record()

    @names_limits
    def verify(self, progress: Progress | None = None) -> list[Problem]:
        """Read every record back against its checksum, and every key; return what is wrong, [] when the store is sound.

        Parameters
        ----------
        progress
            Called with (records done, records to do).
        """
        from memodb.verify import verify

        self._check_open()
        return verify(self, self._catalog, progress)


def _check_index(index: str, key_dim: int | None) -> str:
    if key_dim is None or (isinstance(index, str) and index == "auto"):
        return "auto"
    from memodb.index.factory import check_factory  # faiss takes a while to import

    return check_factory(index, key_dim)


def _check_out(out: Any, spec: RecordSpec, n: int) -> None:
    good = isinstance(out, np.ndarray) and out.shape == spec.batch_shape(n) and out.dtype == spec.dtype
    if not good or not out.flags.c_contiguous or not out.flags.writeable:
        found = f"{out.dtype} {list(out.shape)}" if isinstance(out, np.ndarray) else type(out).__name__
        raise InvalidRecordError(
            f"out must be a writable C-contiguous {spec.dtype_name} array {list(spec.batch_shape(n))}, found {found}"
        )
