"""The catalog proper: settings, ids, namespaces, checksums, keys and tombstones in one LMDB environment.

Tables (`memodb.catalog.tables`): META (settings, counters, the backend's state), BLOCKS (packed rows,
`memodb.catalog.rows`), NAMES (namespace -> number), COUNTS (number -> records added, records live), JOURNAL (keys and
deletions, `memodb.catalog.journal`).
"""

from __future__ import annotations

import json
import os
import stat
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lmdb
import numpy as np

from memodb.catalog import journal
from memodb.catalog.rows import ABSENT, BLOCK, DELETED, LIVE, ROW, Ids, RowCache, Rows, block_key, unpack, write_rows
from memodb.catalog.settings import parse_settings
from memodb.catalog.tables import (
    BACKEND,
    BLOCKS,
    COUNTERS,
    COUNTS,
    NAMES,
    SETTINGS,
    damaged,
    fields,
    number_in,
    scan,
    seal,
    unseal,
)
from memodb.environment import Environment
from memodb.errors import (
    CorruptionError,
    FormatVersionError,
    InvalidOptionError,
    RecordNotFoundError,
    StoreNotFoundError,
)

FORMAT = 1
#: Bytes of pages that a put writes anew.
_REWRITTEN = 64 << 10
_COUNTERS = struct.Struct("<QQQI")  # next id, live records, next journal sequence number, next namespace number
_COUNTS = struct.Struct("<QQ")
_NAME = struct.Struct("<I")
_BLOCK_KEY, _COUNTS_KEY = struct.Struct(">Q"), struct.Struct(">I")
_MOST_SEQUENCE, _MOST_NAMESPACES = 1 << 62, 1 << 31
_NAME_BYTES = 480  # LMDB's keys hold 511


class Catalog:
    """The catalog of one store, open in this process.

    Parameters
    ----------
    path
        The LMDB directory.
    create_with
        Settings (JSON-able) to start a new catalog with; None opens an existing one.
    """

    def __init__(self, path: Path, *, create_with: dict[str, Any] | None = None) -> None:
        self.path = path
        self._data = os.fspath(path / "data.mdb")
        if create_with is None:
            try:
                found = os.lstat(self._data)  # what is no file is the environment's to refuse
            except FileNotFoundError:
                raise StoreNotFoundError(
                    f"{path.parent} holds no memodb store; memodb.MemoDB.create makes one"
                ) from None
            if stat.S_ISREG(found.st_mode) and found.st_size == 0:
                raise self._cut_off()
        self._env = Environment.acquire(path, create=create_with is not None)
        self._names: dict[str, int] = {}
        self._settings_seen = -1
        self._rows = RowCache(path)
        try:
            if create_with is not None:
                self._write_settings(create_with, backend_state=None)
            self.settings = self._read_settings()
        except BaseException:
            self._env.release()
            raise

    def usage(self) -> int:
        """Return the bytes that the catalog takes on its file system."""
        return sum(file.stat().st_blocks * 512 for file in self.path.iterdir())

    def growth(self, n: int) -> int:
        """Return by how many bytes `n` more records may let the file grow: keys, rows and pages that are rewritten."""
        return self._env.growth(n * (ROW.itemsize + 8 + 4 * (self.settings["key_dim"] or 0)) + _REWRITTEN)

    def replaced(self) -> bool:
        """Tell whether another store's catalog is by now where this one was."""
        return self._env.replaced()

    def close(self) -> None:
        """Let the environment go."""
        self._env.release()

    def settle(self) -> None:
        """Writer: see what a killed writer committed last, before anything is thrown away that it may name."""
        self._env.settle()

    def renew_locks(self) -> None:
        """Take fresh locks (in a forked child)."""
        self._rows.renew_lock()

    # --- settings and counters ---

    def _read_settings(self) -> dict[str, Any]:
        with self._env.read() as txn:
            raw = txn.get(SETTINGS)
            text = None if raw is None else unseal(SETTINGS, raw, self.path)
        if text is None:
            raise self._cut_off()
        try:
            version, settings = parse_settings(text, FORMAT)
        except ValueError as error:
            raise damaged(SETTINGS, self.path, error) from error
        if version != FORMAT:
            raise FormatVersionError(
                f"{self.path.parent} has format {version}, this memodb reads format {FORMAT}; use the "
                "memodb that wrote it to copy it"
            )
        return settings

    def _cut_off(self) -> StoreNotFoundError:
        return StoreNotFoundError(
            f"{self.path.parent} holds no complete memodb store: its creation was cut off, so create it again (or, if "
            "there were records, restore the catalog from a copy)"
        )

    def _write_settings(self, settings: dict[str, Any], backend_state: bytes | None) -> None:
        with self._env.write() as txn:
            txn.put(SETTINGS, seal(SETTINGS, json.dumps({**settings, "format": FORMAT}).encode()))
            if txn.get(COUNTERS) is None:
                txn.put(COUNTERS, seal(COUNTERS, _COUNTERS.pack(0, 0, 1, 0)))
            if backend_state is not None:
                txn.put(BACKEND, seal(BACKEND, backend_state))

    def change_settings(self, **changes: Any) -> None:
        """Persist changed settings."""
        self._write_settings({**self.settings, **changes}, backend_state=None)
        self.settings = self._read_settings()

    def transaction(self) -> int:
        """Return the number of the last committed transaction."""
        return self._env.last_transaction()

    def _counters(self, txn: lmdb.Transaction) -> tuple[int, int, int, int]:
        raw = txn.get(COUNTERS)
        if raw is None:
            raise CorruptionError(f"the counters in {self.path} are missing; restore the catalog from a copy")
        next_id, live, sequence, namespace = fields(_COUNTERS, COUNTERS, raw, self.path)
        # Each id that was given has a row in this file: a number that no file of its size can hold would make the cache
        # of rows, and whoever asks for all ids, take memory without end.
        most = os.stat(self._data).st_size // ROW.itemsize
        if next_id > most or live > next_id:
            raise damaged(COUNTERS, self.path, f"{live} records live of {next_id}, and at most {most} can be in it")
        if not 0 < sequence < _MOST_SEQUENCE or namespace > _MOST_NAMESPACES:
            raise damaged(COUNTERS, self.path, f"journal entry {sequence} is the next, namespace {namespace}")
        return next_id, live, sequence, namespace

    def counters(self) -> tuple[int, int]:
        """Return the next id and the number of live records."""
        with self._env.read() as txn:
            return self._counters(txn)[:2]

    def count(self) -> tuple[int, int, int]:
        """Return how many records live by the counter, by the namespaces' counts, and by the rows, as of one commit."""
        with self._env.read() as txn:
            in_namespaces = sum(live for _, live in self._counts(txn).values())
            in_rows = sum(int((rows["state"] == LIVE).sum()) for _, rows in self._blocks(txn))
            return self._counters(txn)[1], in_namespaces, in_rows

    def _blocks(self, txn: lmdb.Transaction) -> Iterator[tuple[int, Rows]]:
        """Yield (number, rows) of each block in order."""
        next_id = self._counters(txn)[0]
        for raw_key, raw in scan(txn, BLOCKS):
            block = number_in(_BLOCK_KEY, BLOCKS, raw_key, self.path)
            rows = unpack(raw, block, self.path)
            alive = np.flatnonzero(rows["state"] == LIVE)
            if len(alive) and block * BLOCK + int(alive[-1]) >= next_id:
                beyond = block * BLOCK + int(alive[-1])
                raise damaged(COUNTERS, self.path, f"the next id is {next_id}, but there is a record {beyond}")
            if block * BLOCK >= next_id:  # tombstones of a copy under way
                continue
            yield block, rows

    def _counts(self, txn: lmdb.Transaction) -> dict[int, tuple[int, int]]:
        """Return namespace number -> (records added, records live)."""
        found = {}
        for key, raw in scan(txn, COUNTS):
            added, live = fields(_COUNTS, COUNTS + key, raw, self.path)
            found[number_in(_COUNTS_KEY, COUNTS, key, self.path)] = added, live
        return found

    def _names_in(self, txn: lmdb.Transaction) -> Iterator[tuple[str, int]]:
        """Yield (name, number) of each namespace."""
        for key, raw in scan(txn, NAMES):
            yield self._text(key), fields(_NAME, NAMES + key, raw, self.path)[0]

    def _text(self, key: bytes) -> str:
        try:
            return key.decode()
        except UnicodeDecodeError as error:
            raise damaged(NAMES + key, self.path, error) from error

    def backend_state(self) -> tuple[int, bytes]:
        """Return (transaction number, what the backend asked to remember with the last commit)."""
        with self._env.read() as txn:
            raw = txn.get(BACKEND)
            return txn.id(), b"" if raw is None else unseal(BACKEND, raw, self.path)

    # --- reading ---

    @contextmanager
    def _load(self) -> Iterator[tuple[int, Any]]:
        with self._env.read() as txn:
            last = -(-self._counters(txn)[0] // BLOCK)
            # What lies beyond the last id that was given exists for nobody.
            yield txn.id(), lambda block: txn.get(block_key(block)) if block < last else None

    def rows(self, ids: Ids, transaction: int | None = None) -> Rows:
        """Return the rows of `ids` [n] (fields locator, checksum, namespace, state), whatever their state.

        They are as of `transaction`, the last one if None, or later.
        """
        return self._rows.lookup(ids, self.transaction() if transaction is None else transaction, self._load)

    def locators(self, ids: Ids, transaction: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
        """Return where the backend has the records of `ids` [n], as of `transaction` or later.

        Raises
        ------
        RecordNotFoundError
            As `committed`.
        """
        found = self._rows.locators(ids, transaction)
        if found is None:
            found = self.committed(ids, transaction)["locator"]
        return found

    def committed(self, ids: Ids, transaction: int | None = None) -> Rows:
        """Return the rows of `ids` [n], as `rows` does.

        Raises
        ------
        RecordNotFoundError
            If any of them does not exist; the message names the first few.
        """
        rows = self.rows(ids, transaction)
        missing = rows["state"] != LIVE
        if missing.any():
            self._require_rows(ids[missing & (rows["state"] == ABSENT)])
            raise RecordNotFoundError(self._explain_missing(ids[missing], rows["state"][missing]))
        return rows

    def _require_rows(self, ids: Ids) -> None:
        """Tell ids that were never given from those whose row is lost: every id below the next one has a row."""
        lost = ids[ids < self.counters()[0]]
        lost = lost[self.rows(lost)["state"] == ABSENT]  # as of a commit that is not older than the counters
        if len(lost):
            raise CorruptionError(
                f"the row of record {lost[0]} is missing in {self.path} ({len(lost)} such records); restore the store "
                "from a copy"
            )

    def _explain_missing(self, ids: Ids, states: np.ndarray[Any, Any]) -> str:
        shown = [
            f"{i} ({'deleted' if s == DELETED else 'never put'})" for i, s in zip(ids[:5], states[:5], strict=True)
        ]
        more = f" and {len(ids) - 5} more" if len(ids) > 5 else ""
        return f"no record in {self.path.parent} has id {', '.join(shown)}{more}; ids() lists those there are"

    def is_live(self, ids: Ids) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Tell for each id whether its record exists."""
        return np.asarray(self.rows(ids)["state"] == LIVE)

    def live(self, namespace: str | None = None) -> tuple[Ids, Rows]:
        """Return ids, ascending, and rows of all live records, of one namespace or of all, as of one transaction."""
        all_ids, all_rows = [np.zeros(0, np.int64)], [np.zeros(0, ROW)]
        with self._env.read() as txn:
            number = None if namespace is None else self._number(txn, namespace)
            if namespace is not None and number is None:
                return all_ids[0], all_rows[0]
            for block, rows in self._blocks(txn):
                wanted = rows["state"] == LIVE
                if number is not None:
                    wanted &= rows["namespace"] == number
                places = np.flatnonzero(wanted)
                all_ids.append(places + block * BLOCK)
                all_rows.append(rows[places])
        return np.concatenate(all_ids), np.concatenate(all_rows)

    # --- namespaces ---

    def _number(self, txn: lmdb.Transaction, name: str) -> int | None:
        key = NAMES + name.encode()
        raw = txn.get(key)
        return None if raw is None else int(fields(_NAME, key, raw, self.path)[0])

    def namespace_numbers(self, names: Sequence[str]) -> list[int | None]:
        """Return the number of each namespace, None for those that nothing was ever put into."""
        unknown = {name for name in names if name not in self._names}
        if unknown:
            with self._env.read() as txn:
                for name in unknown:
                    number = self._number(txn, name)
                    if number is not None:
                        self._names[name] = number
        return [self._names.get(name) for name in names]

    def namespaces(self) -> dict[str, int]:
        """Return the number of live records of each namespace that was ever used."""
        with self._env.read() as txn:
            counts = self._counts(txn)
            return {name: counts.get(number, (0, 0))[1] for name, number in self._names_in(txn)}

    def nameless(self, rows: Rows) -> list[int]:
        """Return the numbers of namespaces that rows are in and no name stands for, or that two names stand for.

        Raises
        ------
        CorruptionError
            If a name is damaged.
        """
        with self._env.read() as txn:
            numbers = np.array([number for _, number in self._names_in(txn)], np.int64)
        known, times = np.unique(numbers, return_counts=True)
        lost = np.setdiff1d(np.unique(rows["namespace"]).astype(np.int64), known)
        return sorted([*known[times > 1].tolist(), *lost.tolist()])

    def names_of(self, numbers: np.ndarray[Any, Any]) -> list[str]:
        """Return the name of each namespace number."""
        with self._env.read() as txn:
            names = {number: name for name, number in self._names_in(txn)}
        wanted = numbers.tolist()
        lost = next((number for number in wanted if number not in names), None)
        if lost is not None:
            raise CorruptionError(
                f"records in {self.path} are in namespace {lost}, whose name is missing; restore the store from a copy"
            )
        return [names[number] for number in wanted]

    def _intern(self, txn: lmdb.Transaction, names: Sequence[str], next_namespace: int) -> tuple[list[int], int]:
        numbers = []
        for name in names:
            number = self._number(txn, name)
            if number is None:
                number, next_namespace = next_namespace, next_namespace + 1
                key = NAMES + name.encode()
                txn.put(key, seal(key, _NAME.pack(number)))
            numbers.append(number)
        return numbers, next_namespace

    def _count(self, txn: lmdb.Transaction, number: int, *, added: int = 0, deleted: int = 0) -> None:
        key = COUNTS + _COUNTS_KEY.pack(number)
        raw = txn.get(key)
        total, live = (0, 0) if raw is None else fields(_COUNTS, key, raw, self.path)
        txn.put(key, seal(key, _COUNTS.pack(total + added, live + added - deleted)))

    # --- writing ---

    def commit(
        self,
        locators: np.ndarray[Any, np.dtype[np.uint64]],
        checksums: np.ndarray[Any, np.dtype[np.uint32]],
        names: Sequence[str],
        row_names: np.ndarray[Any, np.dtype[np.intp]],
        keys: np.ndarray[Any, np.dtype[np.float32]] | None,
        backend_state: bytes,
        ids: Ids | None = None,
    ) -> Ids:
        """Make records exist, all or none, and return their ids.

        Parameters
        ----------
        locators, checksums
            [n]: where the backend put each record, and the CRC-32C of its bytes.
        names, row_names
            The distinct namespaces, and for each record [n] which of them it belongs to.
        keys
            float32 [n, key_dim], or None for a store without keys.
        backend_state
            What the backend needs to go on from here after a restart.
        ids
            Ascending ids to use (a copy keeps them); None takes the next ones.
        """
        with self._env.write(grows=True) as txn:
            next_id, live, sequence, next_namespace = self._counters(txn)
            if ids is None:
                ids = np.arange(next_id, next_id + len(locators), dtype=np.int64)
            numbers, next_namespace = self._intern(txn, names, next_namespace)
            rows = np.zeros(len(ids), ROW)
            rows["locator"], rows["checksum"], rows["state"] = locators, checksums, LIVE
            rows["namespace"] = np.asarray(numbers, np.uint32)[row_names]
            write_rows(txn, ids, rows, self.path)
            for number, members in zip(numbers, grouped(row_names, len(names)), strict=True):
                self._count(txn, number, added=len(members))
                if keys is not None:
                    journal.write_entry(txn, number, sequence, ids[members], keys[members])
            next_id = max(next_id, int(ids[-1]) + 1)
            self._finish(txn, (next_id, live + len(ids), sequence + 1, next_namespace), backend_state)
        return ids

    def _finish(self, txn: lmdb.Transaction, counters: tuple[int, int, int, int], backend_state: bytes | None) -> None:
        txn.put(COUNTERS, seal(COUNTERS, _COUNTERS.pack(*counters)))
        if backend_state is not None:
            txn.put(BACKEND, seal(BACKEND, backend_state))

    def delete(self, ids: Ids) -> None:
        """Put tombstones on `ids` (ascending, unique), all or none.

        Raises
        ------
        RecordNotFoundError
            If any of them does not exist.
        """
        with self._env.write() as txn:
            rows = self.committed(ids).copy()  # only this writer commits, so the cache is what the transaction sees
            rows["state"] = DELETED
            write_rows(txn, ids, rows, self.path)
            next_id, live, sequence, namespaces = self._counters(txn)
            for number in np.unique(rows["namespace"]).tolist():
                members = ids[rows["namespace"] == number]
                self._count(txn, number, deleted=len(members))
                if self.settings["key_dim"]:
                    journal.write_entry(txn, number, sequence, members, None)
            self._finish(txn, (next_id, live - len(ids), sequence + 1, namespaces), None)

    def bury(self, ids: Ids, names: Sequence[str], row_names: np.ndarray[Any, np.dtype[np.intp]], next_id: int) -> None:
        """Record that `ids` (ascending) were deleted in the store that this one is a copy of; once or again.

        Parameters
        ----------
        ids, names, row_names
            As for `commit`.
        next_id
            Ids below are never given out.
        """
        with self._env.write() as txn:
            old, live, sequence, next_namespace = self._counters(txn)
            numbers, next_namespace = self._intern(txn, names, next_namespace)
            rows = np.zeros(len(ids), ROW)
            rows["state"] = DELETED
            if len(ids):
                rows["namespace"] = np.asarray(numbers, np.uint32)[row_names]
                write_rows(txn, ids, rows, self.path)
            self._finish(txn, (max(old, next_id), live, sequence, next_namespace), None)

    def relocate(self, ids: Ids, locators: np.ndarray[Any, np.dtype[np.uint64]], backend_state: bytes) -> None:
        """Record that live records (ascending ids) now lie elsewhere."""
        with self._env.write() as txn:
            rows = self.committed(ids).copy()
            rows["locator"] = locators
            write_rows(txn, ids, rows, self.path)
            self._finish(txn, self._counters(txn), backend_state)

    def drop_dead_keys(self) -> None:
        """Give back the space of deleted records' keys."""
        key_dim = self.settings["key_dim"]
        if not key_dim:
            return
        dead: dict[int, list[Ids]] = {}
        with self._env.read() as txn:
            for block, rows in self._blocks(txn):
                places = np.flatnonzero(rows["state"] == DELETED)
                for number in np.unique(rows["namespace"][places]).tolist():
                    members = places[rows["namespace"][places] == number]
                    dead.setdefault(number, []).append(members + block * BLOCK)
        for number, members_of in dead.items():
            with self._env.write() as txn:
                journal.drop_keys(txn, number, np.concatenate(members_of), key_dim, self.path)

    # --- what an index follows ---

    def journal(self, number: int, after: int, within: tuple[int, int] | None = None) -> list[journal.Entry]:
        """Return the journal of a namespace (by number) after a sequence number, in order."""
        with self._env.read() as txn:
            return list(journal.read_entries(txn, number, after, self.settings["key_dim"], self.path, within))

    def mark(self, number: int, sequence: int) -> int | None:
        """Return the mark of one journal entry, which no other entry of this or another store bears; None: no entry."""
        with self._env.read() as txn:
            return journal.read_mark(txn, number, sequence, self.settings["key_dim"])

    def added(self, number: int) -> int:
        """Return how many records were ever put into a namespace: more keys no index of it has."""
        with self._env.read() as txn:
            key = COUNTS + _COUNTS_KEY.pack(number)
            raw = txn.get(key)
            return 0 if raw is None else int(fields(_COUNTS, key, raw, self.path)[0])

    def index_factory(self) -> str:
        """Return the index factory as of the last commit: a writer elsewhere may have changed it."""
        transaction = self.transaction()
        if transaction != self._settings_seen:
            self.settings, self._settings_seen = self._read_settings(), transaction
        return str(self.settings["index"])

    def keys(self, ids: Ids, rows: Rows) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Return the keys of live records (ascending unique `ids` and their `rows`), float32 [n, key_dim].

        Raises
        ------
        RecordNotFoundError
            If one was deleted meanwhile.
        CorruptionError
            If one is missing or damaged.
        """
        out = np.full((len(ids), self.settings["key_dim"]), np.nan, np.float32)
        for number in np.unique(rows["namespace"]).tolist():
            for entry in self.journal(number, 0, within=(int(ids[0]), int(ids[-1]))):
                if entry.keys is not None:
                    places = np.minimum(np.searchsorted(ids, entry.ids), len(ids) - 1)
                    known = ids[places] == entry.ids
                    out[places[known]] = entry.keys[known]
        missing = np.isnan(out).any(axis=1)
        if missing.any():
            self.committed(ids[missing])  # deleted since the rows were read, and compacted: its key is gone with it
            raise CorruptionError(f"record {ids[missing][0]} in {self.path} has no key ({missing.sum()} such records)")
        return out


def grouped(labels: np.ndarray[Any, np.dtype[np.intp]], n: int) -> list[np.ndarray[Any, np.dtype[np.intp]]]:
    """Return, for each label 0..n-1, the ascending places where it stands."""
    order = np.argsort(labels, kind="stable")
    return np.split(order, np.searchsorted(labels[order], np.arange(1, n)))


def check_name(name: Any) -> str:
    """Return `name` if it can name a namespace.

    Raises
    ------
    InvalidOptionError
        If it is not a string of at most 480 bytes of UTF-8.
    """
    if not isinstance(name, str):
        raise InvalidOptionError(f"a namespace is a string, not {type(name).__name__}: {name!r}")
    try:
        size = len(name.encode())
    except UnicodeEncodeError as error:
        raise InvalidOptionError(f"namespace {name!r} is not valid Unicode: {error}") from error
    if size > _NAME_BYTES:
        raise InvalidOptionError(
            f"namespace {name[:40]!r}... has {size} bytes of UTF-8; at most {_NAME_BYTES} are possible"
        )
    return name
