"""`StoreMachine`: random sequences of verbs, played on a store and on a dict at once."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import memodb
from memodb.testing.reader import OtherProcess, digest
from memodb.testing.values import assert_same_bytes, random_records

__all__ = ["StoreMachine"]

_NAMESPACES = st.sampled_from(["", "layer=0/len=8", "layer=1/len=8"])
#: Keys on a coarse grid: float32 distances between them are exact, and ties occur.
_COORDINATE = st.integers(-4, 4)
_KEY = st.tuples(_COORDINATE, _COORDINATE)


class StoreMachine(RuleBasedStateMachine):
    """State machine of a store against a dict model; subclass it, set `backend` and run its ``TestCase``.

    Verbs: put, multiget, multiget_mapped (batches are held over whatever comes next), delete, search, compact,
    reindex, reopen, copy. A second handle, open for reading from the start, has to show the same as the writer after
    every step, and so has a reader in another process whenever it is asked (unless the backend says that it is not
    "shared").

    Attributes
    ----------
    backend
        Registered name of the backend under test.
    options
        Options handed to ``MemoDB.create`` with it.
    shape, dtype
        What the records are. The default is two pages long, so that it can be mapped.
    parent
        Folder in which each run makes a private one; None for the system's temporary folder.
    """

    backend: ClassVar[str] = "arena"
    options: ClassVar[dict[str, Any]] = {}
    shape: ClassVar[tuple[int, ...]] = (2, 1024)
    dtype: ClassVar[str] = "float32"
    parent: ClassVar[Path | None] = None

    _other: ClassVar[OtherProcess | None] = None

    def __init__(self) -> None:
        super().__init__()
        self.shared = next(b for b in memodb.available_backends() if b.name == self.backend).abilities.get(
            "shared", True
        )
        self.folder = Path(tempfile.mkdtemp(prefix=f"memodb-machine-{os.getpid()}-", dir=self.parent))
        self.model: dict[int, tuple[Any, tuple[int, int], str]] = {}
        self.given = 0
        self.copies = 0
        self.held: list[tuple[memodb.MappedBatch, Any]] = []

    @initialize()
    def create(self) -> None:
        """Make the store and a reader of it."""
        self.db = memodb.MemoDB.create(
            self.folder / "store",
            shape=self.shape,
            dtype=self.dtype,
            key_dim=2,
            backend=self.backend,
            **self.options,
        )
        self._open_readers()

    @property
    def other(self) -> OtherProcess:
        """The reader in another process, started once."""
        if StoreMachine._other is None:
            StoreMachine._other = OtherProcess()
            atexit.register(StoreMachine._other.close)
        return StoreMachine._other

    @rule(rows=st.lists(st.tuples(_KEY, _NAMESPACES), max_size=5))
    def put(self, rows: list[tuple[tuple[int, int], str]]) -> None:
        """Put a batch whose rows go to different namespaces."""
        values = random_records(len(rows), self.shape, self.dtype, seed=self.given)
        keys = np.array([key for key, _ in rows], np.float32).reshape(len(rows), 2)
        ids = self.db.put(values, keys, namespace=[name for _, name in rows])
        assert ids.tolist() == list(range(self.given, self.given + len(rows)))
        self.given += len(rows)
        for record_id, value, (key, name) in zip(ids.tolist(), values, rows, strict=True):
            self.model[record_id] = (value, key, name)

    @precondition(lambda self: self.model)
    @rule(data=st.data(), reader=st.booleans())
    def multiget(self, data: st.DataObject, reader: bool) -> None:
        """Read some records, in any order and with repeats."""
        ids = data.draw(self._live_ids())
        assert_same_bytes((self.reader if reader else self.db).multiget(ids), self._expected(ids))

    @precondition(lambda self: self.model)
    @rule(data=st.data(), reader=st.booleans(), strategy=st.sampled_from(["auto", "map", "copy"]))
    def multiget_mapped(self, data: st.DataObject, reader: bool, strategy: Any) -> None:
        """Map some records and keep the batch."""
        ids = data.draw(self._live_ids())
        try:
            batch = (self.reader if reader else self.db).multiget_mapped(ids, strategy=strategy)
        except memodb.MappingUnsupportedError:
            assert strategy == "map", f"strategy {strategy!r} must fall back to copying"
            return
        expected = self._expected(ids)
        assert_same_bytes(batch.numpy(), expected)
        self.held.append((batch, expected))

    @precondition(lambda self: self.model and self.shared)
    @rule(data=st.data(), strategy=st.sampled_from([None, "auto", "copy"]))
    def read_in_another_process(self, data: st.DataObject, strategy: str | None) -> None:
        """Another process sees the same records."""
        ids = data.draw(self._live_ids())
        assert self.other.read(ids, strategy) == digest(self._expected(ids))
        assert self.other.ids() == sorted(self.model)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        """Let one batch go."""
        batch, _ = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        batch.release()

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def scribble(self, data: st.DataObject) -> None:
        """Overwrite one batch: it changes, nothing else does (the invariants look at everything)."""
        position = data.draw(st.integers(0, len(self.held) - 1))
        batch, expected = self.held[position]
        batch.numpy(writable=True).reshape(-1).view(np.uint8)[:] = 0x55
        expected.reshape(-1).view(np.uint8)[:] = 0x55

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        """Delete some records; each is gone at once for every handle."""
        ids = sorted(set(data.draw(self._live_ids())))
        self.db.delete(ids)
        for record_id in ids:
            del self.model[record_id]
            self._is_unknown(record_id)

    @rule(beyond=st.integers(0, 3))
    def unknown(self, beyond: int) -> None:
        """Ids that were never given are refused."""
        self._is_unknown(self.given + beyond)

    @rule(key=_KEY, name=_NAMESPACES, k=st.integers(1, 4), reader=st.booleans())
    def search(self, key: tuple[int, int], name: str, k: int, reader: bool) -> None:
        """Search: the distances are those of the k nearest live records of the namespace, however ties fall."""
        found = (self.reader if reader else self.db).search(np.array([key], np.float32), k, namespace=name)
        distance = {
            i: float((key[0] - x) ** 2 + (key[1] - y) ** 2) for i, (_, (x, y), of) in self.model.items() if of == name
        }
        nearest = sorted(distance.values())[:k]
        ids, distances = found.ids[0].tolist(), found.distances[0].tolist()
        assert distances == nearest + [float("inf")] * (k - len(nearest))
        assert [distance.get(i) for i in ids[: len(nearest)]] == nearest
        assert ids[len(nearest) :] == [-1] * (k - len(nearest))
        assert len(set(ids[: len(nearest)])) == len(nearest), "a record was found twice"

    @rule()
    def compact(self) -> None:
        """Compact, with whatever batches are held."""
        assert self.db.compact() >= 0

    @rule()
    def reindex(self) -> None:
        """Build the index again from the catalog's keys."""
        self.db.reindex()

    @rule()
    def reopen(self) -> None:
        """Close the writer and open it again; the reader and the batches stay."""
        self.db.close()
        self.db = memodb.MemoDB.open(self.folder / "store", mode="r+")

    @precondition(lambda self: self.copies < 2)
    @rule()
    def copy(self) -> None:
        """Copy the store, and go on with the copy."""
        self.copies += 1
        path = self.folder / f"copy{self.copies}"
        self._close()
        memodb.copy(self.folder / "store", path, backend=self.backend, **self.options)
        shutil.rmtree(self.folder / "store")
        path.rename(self.folder / "store")
        self.db = memodb.MemoDB.open(self.folder / "store", mode="r+")
        self._open_readers()

    @invariant()
    def both_handles_show_the_model(self) -> None:
        """The writer and the reader know exactly the model's records, namespace by namespace."""
        for db in (self.db, self.reader):
            assert len(db) == len(self.model)
            assert db.ids().tolist() == sorted(self.model)
            for name in ("", "layer=0/len=8", "layer=1/len=8"):
                assert db.ids(name).tolist() == sorted(i for i, (_, _, of) in self.model.items() if of == name)

    @invariant()
    def held_batches_are_as_they_were(self) -> None:
        """No verb changes what was handed out before."""
        for batch, expected in self.held:
            assert_same_bytes(batch.numpy(), expected)

    def teardown(self) -> None:
        """Check the whole store once more and remove it."""
        try:
            if hasattr(self, "db"):
                assert_same_bytes(self.db.multiget(sorted(self.model)), self._expected(sorted(self.model)))
                assert self.db.verify() == []
                self._close()
                self.held_batches_are_as_they_were()
                for batch, _ in self.held:
                    batch.release()
        finally:
            shutil.rmtree(self.folder)

    def _open_readers(self) -> None:
        self.reader = memodb.MemoDB.open(self.folder / "store")
        if self.shared:
            self.other.open(self.folder / "store")

    def _close(self) -> None:
        self.db.close()
        self.reader.close()
        if self.shared:
            self.other.close_store()

    def _live_ids(self) -> st.SearchStrategy[list[int]]:
        return st.lists(st.sampled_from(sorted(self.model)), min_size=1, max_size=8)

    def _expected(self, ids: list[int]) -> Any:
        if not ids:
            return random_records(0, self.shape, self.dtype)
        return np.stack([self.model[i][0] for i in ids])

    def _is_unknown(self, record_id: int) -> None:
        for db in (self.db, self.reader):
            assert record_id not in db
            try:
                db.multiget([record_id])
            except memodb.RecordNotFoundError:
                continue
            raise AssertionError(f"record {record_id} should be unknown")
