"""The indexes of all namespaces of a store: caught up at a search, saved as files, rebuilt when in doubt.

A saved file is ``magic | format | CRC-32C of the rest | label length | label (store and factory) | index bytes``. One
that is larger than the namespace's keys can need is not read, nothing of it reaches faiss before the checksum matches,
and what faiss then makes of it is looked through (`FaissIndex.deserialize`). Only indexes that took long to build are
saved: small namespaces are searched exactly, straight from the catalog's keys.
"""

from __future__ import annotations

import contextlib
import logging
import os
import struct
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from memodb.checksum import crc32c
from memodb.errors import CorruptionError, InvalidOptionError, MemoDBError
from memodb.index.base import Distances, Ids, Keys, VectorIndex
from memodb.safe import Guard

log = logging.getLogger(__name__)
_HEAD = struct.Struct("<4sHIH")
_MAGIC, _FORMAT = b"MDBI", 1
#: A writer saves an index again once it grew by this share since it was last saved.
_SAVE_GROWTH = 0.5


class Change(Protocol):
    """One entry of a namespace's journal."""

    @property
    def sequence(self) -> int:
        """Position in the journal."""

    @property
    def mark(self) -> int:
        """What tells it from an entry of another history at the same position."""

    @property
    def ids(self) -> Ids:
        """Ids concerned."""

    @property
    def keys(self) -> Keys | None:
        """Keys added, or None for a deletion."""


class KeySource(Protocol):
    """What an index follows (the catalog)."""

    def journal(self, number: int, after: int) -> Sequence[Any]:
        """Return the changes of a namespace after a sequence number, in order."""

    def transaction(self) -> int:
        """Return the number of the last committed transaction."""

    def mark(self, number: int, sequence: int) -> int | None:
        """Return the mark of one journal entry of a namespace, None if there is no such entry."""

    def added(self, number: int) -> int:
        """Return how many records were ever put into a namespace."""

    def index_factory(self) -> str:
        """Return the factory string as of the last committed transaction."""


class IndexSet:
    """All namespaces' indexes of one open store, by namespace number.

    Parameters
    ----------
    path
        Directory of the saved indexes.
    source
        The keys.
    key_dim
        Width of a key.
    factory
        faiss factory string, or "auto".
    owner
        Name of the store that saved files must bear, so that another store's file is never taken for this one's.
    writable
        Whether to save (the writer does).
    """

    def __init__(
        self, path: Path, source: KeySource, key_dim: int, factory: str, *, owner: str, writable: bool
    ) -> None:
        self._path = path
        self._source = source
        self._dim = key_dim
        self._factory = factory
        self._owner = owner
        self._writable = writable
        self._indexes: dict[int, VectorIndex] = {}
        self._seen: dict[int, int] = {}
        self._saved: dict[int, int] = {}
        self._grown: dict[int, int] = {}
        self._distrusted: set[int] = set()
        if writable:  # what a killed writer was saving
            for draft in path.glob("*.tmp"):
                with contextlib.suppress(OSError):
                    draft.unlink(missing_ok=True)
        self._lock = threading.RLock()

    def after_fork(self) -> None:
        """Go on in a forked child: never save; read anew what another thread was changing when the process forked."""
        undisturbed = self._lock.acquire(blocking=False)
        self._lock = threading.RLock()
        self._writable = False
        if not undisturbed:
            self._indexes.clear()
            self._seen.clear()

    def note_added(self, numbers: Iterable[int], counts: Iterable[int]) -> None:
        """Writer: remember which namespaces grew, for `save`."""
        for number, count in zip(numbers, counts, strict=True):
            self._grown[number] = self._grown.get(number, 0) + count

    def search(self, number: int, keys: Keys, k: int) -> tuple[Ids, Distances]:
        """Search one namespace (see `VectorIndex.search`), knowing everything committed when the search began."""
        with self._lock, self._translated():
            return self._current(number).search(keys, k)

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            from memodb.index.factory import reason

            raise InvalidOptionError(
                f"index {self._factory!r} of {self._path.parent} cannot serve these keys: {reason(error)}; "
                "choose another with reindex(index=...)"
            ) from error

    def _current(self, number: int) -> VectorIndex:
        transaction = self._source.transaction()
        index = self._indexes.get(number)
        if index is not None and self._seen[number] >= transaction:
            return index
        factory = self._source.index_factory()
        if factory != self._factory:  # a writer elsewhere called reindex
            self._factory = factory
            self._forget()
            index = None
        if index is None:
            index = self._load(number)
            if index is None:
                index = self._new()
        try:
            self._catch_up(number, index)
        except BaseException:
            self._indexes.pop(number, None)  # half caught up: the next search starts over
            raise
        self._indexes[number], self._seen[number] = index, transaction
        if self._writable and index.worth_saving and len(index) > (1 + _SAVE_GROWTH) * self._saved.get(number, 0):
            self._save(number, index)
        return index

    def _catch_up(self, number: int, index: VectorIndex) -> None:
        pending_ids: list[Ids] = []
        pending_keys: list[Keys] = []

        def flush() -> None:
            if pending_ids:
                index.add(np.concatenate(pending_ids), np.concatenate(pending_keys))
                pending_ids.clear()
                pending_keys.clear()

        sequence, mark = index.sequence, index.mark
        for change in self._source.journal(number, sequence):
            if change.keys is None:
                flush()
                index.remove(change.ids)
            elif len(change.ids):  # compaction leaves empty ones
                pending_ids.append(change.ids)
                pending_keys.append(change.keys)
            sequence, mark = change.sequence, change.mark
        flush()
        index.sequence, index.mark = sequence, mark

    def _new(self) -> VectorIndex:
        from memodb.index.factory import checked_factory
        from memodb.index.faiss import FaissIndex  # faiss takes a while to import: only when something is searched

        try:
            checked_factory(self._factory, self._dim)  # some kill the process, and settings may be made up
        except InvalidOptionError as error:
            raise InvalidOptionError(
                f"{self._path.parent} cannot be searched: {error}; choose another with reindex(index=...)"
            ) from error
        return FaissIndex(self._dim, self._factory)

    def _file(self, number: int) -> Path:
        return self._path / f"{number:08d}.index"

    def distrusted(self) -> frozenset[int]:
        """Return the namespaces whose indexes were built anew because they were wrong."""
        return frozenset(self._distrusted)

    def distrust(self, numbers: Iterable[int], before: frozenset[int]) -> None:
        """Build indexes anew, from the catalog alone, that returned what the catalog does not know.

        Parameters
        ----------
        numbers
            Their namespaces.
        before
            `distrusted` as of the beginning of the search that found out.

        Raises
        ------
        CorruptionError
            If that was done before that search: then the catalog contradicts itself.
        """
        with self._lock:
            for number in numbers:
                if number in before:
                    raise CorruptionError(
                        f"keys and records of namespace {number} in {self._path.parent} contradict each other; "
                        "verify() tells more; restore the store from a copy"
                    )
                if number not in self._distrusted:  # or else another thread found out first
                    log.warning("index of namespace %d returned unknown records; building it again", number)
                    self._distrusted.add(number)
                    self._indexes.pop(number, None)

    def _label(self) -> bytes:
        return f"{self._owner} {self._factory}".encode()

    def _load(self, number: int) -> VectorIndex | None:
        from memodb.index.faiss import FaissIndex, most_bytes

        file = self._file(number)
        if number in self._distrusted:
            return None
        added = self._source.added(number)
        most = _HEAD.size + len(self._label()) + most_bytes(added, self._dim, self._factory)
        try:
            data = Guard.of(self._path).read(file, most)
        except MemoDBError:
            raise
        except OSError as error:
            if not isinstance(error, FileNotFoundError):
                log.warning("saved index %s cannot be read (%s); building it again from the catalog", file, error)
            return None
        try:
            if len(data) > most:
                raise ValueError(f"it is larger than {most} bytes, which {added} keys cannot need")
            magic, version, checksum, length = _HEAD.unpack_from(data)
            body = data[_HEAD.size :]
            if (magic, version) != (_MAGIC, _FORMAT) or crc32c(body) != checksum:
                raise ValueError("its checksum or format does not match")
            if body[:length] != self._label():
                raise ValueError("it bears another store's name or another factory")
            index = FaissIndex.deserialize(body[length:], self._dim, self._factory)
            if self._source.mark(number, index.sequence) != index.mark:
                return None  # of another history: the catalog was put back to an earlier day
        except (struct.error, ValueError) as error:
            log.warning("saved index %s cannot be used (%s); building it again from the catalog", file, error)
            return None
        self._saved[number] = len(index)
        return index

    def _save(self, number: int, index: VectorIndex) -> None:
        name = self._label()
        body = name + index.serialize()
        data = _HEAD.pack(_MAGIC, _FORMAT, crc32c(body), len(name)) + body
        temporary = self._file(number).with_suffix(f".{os.getpid()}.tmp")
        try:
            guard = Guard.of(self._path.parent).make_directory(self._path)
            temporary.unlink(missing_ok=True)
            guard.write(temporary, data)
            temporary.replace(self._file(number))
        except OSError as error:  # derived data: a full disk must not fail a search
            log.warning("index of namespace %d could not be saved: %s", number, error)
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            return
        self._saved[number] = len(index)
        self._grown.pop(number, None)

    def save(self, large: int) -> None:
        """Writer.

        Bring namespaces that grew by at least `large` keys, or whose index is in memory, up to date and save them.
        """
        with self._lock:
            for number, count in list(self._grown.items()):
                if count >= large or number in self._indexes or self._file(number).exists():
                    if count >= large:
                        log.info("bringing the index of namespace %d up to date (%d new keys)", number, count)
                    try:
                        index = self._current(number)
                    except RuntimeError as error:  # faiss cannot: the next search says so, closing must not fail
                        log.warning("index of namespace %d could not be built: %s", number, error)
                        continue
                    if index.worth_saving and number in self._grown:
                        self._save(number, index)

    def rebuild(self, factory: str, numbers: Iterable[int]) -> None:
        """Forget every index, in memory and saved, take a new factory, and build those of `numbers` at once."""
        with self._lock:
            self._factory = factory
            self._forget()
            for file in self._path.glob("*.index"):
                file.unlink(missing_ok=True)
            with self._translated():
                for number in numbers:
                    self._current(number)

    def _forget(self) -> None:
        for known in (self._indexes, self._seen, self._saved, self._distrusted):
            known.clear()

    def loaded(self) -> int:
        """Return how many namespaces' indexes are in memory."""
        return len(self._indexes)
