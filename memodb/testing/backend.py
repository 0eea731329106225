"""`BackendTests`: what every backend promises, one behaviour a test."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

import memodb
from memodb.testing.values import DTYPES, assert_same_bytes, flip_stored_byte, random_records

__all__ = ["BackendTests"]

#: Shapes (float32) below a page, of whole pages, of no whole number of pages, and of a whole huge page.
SHAPES: dict[str, tuple[int, ...]] = {
    "scalar": (),
    "small": (3, 5),
    "pages": (2, 4, 512),
    "ragged": (7, 331),
    "huge": (512, 1024),
}


class BackendTests:
    """Conformance suite of a backend; subclass it as ``class TestMine(BackendTests)`` and set `backend`.

    Every test makes its own store through `MemoDB.create` and uses nothing but the public API, so it says nothing
    about how a backend keeps its bytes.

    Attributes
    ----------
    backend
        Registered name of the backend under test.
    options
        Options handed to ``MemoDB.create`` with it.
    """

    backend: ClassVar[str] = "arena"
    options: ClassVar[dict[str, Any]] = {}

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        """Return an empty folder for the stores of one test; override it to choose the file system."""
        return tmp_path

    def create(self, path: Path, **settings: Any) -> memodb.MemoDB:
        """Make a store of the backend under test; override it where that takes more than a name and options."""
        return memodb.MemoDB.create(path, backend=self.backend, **{**self.options, **settings})

    def damage(self, path: Path, record: np.ndarray[Any, Any], at: int) -> bool:
        """Change byte `at` of a record in the closed store at `path`; return False if that cannot be done.

        The default finds the record by its bytes in the store's files: override it for a backend that compresses.
        """
        return flip_stored_byte(path, record, at)

    def raw(self, path: Path, number: int) -> bytes | None:
        """Return the bytes of a record of the closed store at `path`, read by the plain client of what holds them.

        Not by memodb: a file is opened, a table is queried by its own driver, and so on.

        Parameters
        ----------
        path
            A store of whose records none was ever deleted.
        number
            How many records were put before the wanted one.

        Returns
        -------
        bytes or None
            None where there is no other client.
        """
        return None

    # Writing and reading back

    def test_a_plain_client_reads_the_same_bytes(self, folder: Path) -> None:
        """What memodb put can be read without it."""
        values = random_records(5, (4, 1024), "float32")
        with self.create(folder / "store", shape=(4, 1024), dtype="float32") as db:
            db.put(values[:2])
            db.put(values[2:])
        found = [self.raw(folder / "store", number) for number in range(5)]
        if found[0] is None:
            pytest.skip(f"no other client of backend {self.backend} is known to this suite")
        assert found == [value.tobytes() for value in values]

    @pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
    def test_records_come_back_bit_for_bit(self, folder: Path, shape: tuple[int, ...]) -> None:
        """Across batches, in any order, repeated, copied or mapped, before and after reopening."""
        values = random_records(12, shape, "float32")
        wanted = [7, 0, 11, 11, 3, 4, 5, 0]
        with self.create(folder / "store", shape=shape, dtype="float32") as db:
            ids = np.concatenate([db.put(values[:5]), db.put(values[5:6]), db.put(values[6:])])
            assert_same_bytes(db.multiget(ids[wanted]), values[wanted])
        with memodb.MemoDB.open(folder / "store") as db:
            assert_same_bytes(db.multiget(ids[wanted]), values[wanted])
            for strategy in ("auto", "copy"):
                with db.multiget_mapped(ids[wanted], strategy=strategy) as batch:
                    assert_same_bytes(batch.numpy(), values[wanted])
            assert db.verify() == []

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_every_dtype(self, folder: Path, dtype: str) -> None:
        """The dtype is stored with the data and every bit pattern survives."""
        values = random_records(3, (16, 256), dtype)
        with self.create(folder / "store", shape=(16, 256), dtype=dtype) as db:
            ids = db.put(values)
        with memodb.MemoDB.open(folder / "store") as db:
            assert db.spec.dtype == values.dtype
            assert_same_bytes(db.multiget(ids), values)
            with db.multiget_mapped(ids) as batch:
                assert_same_bytes(batch.numpy(), values)

    def test_ids_are_dense_and_ascending(self, folder: Path) -> None:
        """Ids count up from 0 over all batches, whatever was deleted in between."""
        with self.create(folder / "store", shape=(4,), dtype="int32") as db:
            first = db.put(np.zeros((3, 4), np.int32))
            db.delete(first)
            db.compact()
            second = db.put(np.ones((2, 4), np.int32))
            assert first.tolist() == [0, 1, 2]
            assert second.tolist() == [3, 4]
            assert second.dtype == np.int64

    def test_empty_batches(self, folder: Path) -> None:
        """Putting, reading and deleting nothing is no error and changes nothing."""
        with self.create(folder / "store", shape=(4, 2), dtype="float32") as db:
            assert db.put(np.empty((0, 4, 2), np.float32)).shape == (0,)
            assert db.multiget([]).shape == (0, 4, 2)
            assert db.multiget_mapped([]).shape == (0, 4, 2)
            db.delete([])
            assert len(db) == 0

    def test_non_contiguous_values(self, folder: Path) -> None:
        """What is stored is what the caller's array shows, not what its memory holds."""
        values = random_records(12, (6, 8), "float32").transpose(0, 2, 1)[::2]
        with self.create(folder / "store", shape=(8, 6), dtype="float32") as db:
            assert_same_bytes(db.multiget(db.put(values)), np.ascontiguousarray(values))

    def test_wrong_values_change_nothing(self, folder: Path) -> None:
        """Values of the wrong shape or dtype are refused whole."""
        with self.create(folder / "store", shape=(4, 2), dtype="float32") as db:
            ids = db.put(np.zeros((2, 4, 2), np.float32))
            for wrong in (
                np.zeros((2, 2, 4), np.float32),
                np.zeros((2, 4, 2), np.float64),
                np.zeros((4, 2), np.float32),
            ):
                with pytest.raises(memodb.InvalidRecordError):
                    db.put(wrong)
            assert db.ids().tolist() == ids.tolist()

    def test_multiget_into_out(self, folder: Path) -> None:
        """`out` receives the records and is returned."""
        values = random_records(6, (64, 33), "float16")
        out = np.zeros((4, 64, 33), np.float16)
        with self.create(folder / "store", shape=(64, 33), dtype="float16") as db:
            ids = db.put(values)
            assert db.multiget(ids[[5, 0, 0, 2]], out=out) is out
        assert_same_bytes(out, values[[5, 0, 0, 2]])

    # Mapped batches

    def test_mapping_is_done_or_refused(self, folder: Path) -> None:
        """``"map"`` maps or says that it cannot, and then ``"auto"`` copies."""
        values = random_records(8, (4, 1024), "float32")
        with self.create(folder / "store", shape=(4, 1024), dtype="float32") as db:
            ids = db.put(values)
            try:
                batch = db.multiget_mapped(ids[::-1], strategy="map")
            except memodb.MappingUnsupportedError:
                batch = db.multiget_mapped(ids[::-1], strategy="auto")
                assert not batch.zero_copy
            else:
                assert batch.zero_copy
            assert_same_bytes(batch.numpy(), values[::-1])
            batch.release()

    @pytest.mark.parametrize("strategy", ["auto", "copy"])
    def test_writing_to_a_batch_leaves_the_store_unchanged(self, folder: Path, strategy: Any) -> None:
        """A batch is the caller's own: no write to it reaches the store or another batch."""
        values = random_records(4, (4, 1024), "uint8")
        with self.create(folder / "store", shape=(4, 1024), dtype="uint8") as db:
            ids = db.put(values)
            with (
                db.multiget_mapped(ids, strategy=strategy) as batch,
                db.multiget_mapped(ids, strategy=strategy) as other,
            ):
                batch.numpy(writable=True)[:] ^= 0xFF
                assert_same_bytes(batch.numpy(), ~values)
                assert_same_bytes(other.numpy(), values)
            assert_same_bytes(db.multiget(ids), values)
            assert db.verify() == []

    @pytest.mark.parametrize("strategy", ["auto", "copy"])
    def test_views_outlive_the_store(self, folder: Path, strategy: Any) -> None:
        """Closing the database and dropping the batch leave a view whole."""
        values = random_records(5, (4, 1024), "float32")
        db = self.create(folder / "store", shape=(4, 1024), dtype="float32")
        ids = db.put(values)
        view = db.multiget_mapped(ids, strategy=strategy).numpy()
        db.close()
        del db
        gc.collect()
        assert_same_bytes(view, values)

    @pytest.mark.parametrize("strategy", ["auto", "copy"])
    def test_batches_outlive_deletion_and_compaction(self, folder: Path, strategy: Any) -> None:
        """What was handed out stays as it was, while the records go."""
        values = random_records(8, (4, 1024), "float32")
        with self.create(folder / "store", shape=(4, 1024), dtype="float32") as db:
            ids = db.put(values)
            with db.multiget_mapped(ids, strategy=strategy) as batch:
                view = batch.numpy()
                db.delete(ids[::2])
                db.compact()
                later = db.put(random_records(8, (4, 1024), "float32", seed=1))
                assert_same_bytes(view, values)
                assert_same_bytes(db.multiget(ids[1::2]), values[1::2])
                assert_same_bytes(db.multiget(later), random_records(8, (4, 1024), "float32", seed=1))
                del view

    # Deleting

    def test_deleted_records_are_gone(self, folder: Path) -> None:
        """A deleted id is unknown everywhere, and stays so."""
        with self.create(folder / "store", shape=(4,), dtype="int32", key_dim=2) as db:
            ids = db.put(np.arange(12, dtype=np.int32).reshape(3, 4), np.eye(3, 2, dtype=np.float32))
            db.delete(ids[1:2])
        with memodb.MemoDB.open(folder / "store") as db:
            assert len(db) == 2
            assert db.ids().tolist() == [0, 2]
            assert 1 not in db
            for read in (db.multiget, db.multiget_mapped):
                with pytest.raises(memodb.RecordNotFoundError, match="1"):
                    read(ids)
            assert 1 not in db.search(np.eye(3, 2, dtype=np.float32), k=3).ids

    def test_compaction_keeps_what_lives(self, folder: Path) -> None:
        """Half of the records deleted, the other half is as before, also after reopening."""
        values = random_records(32, (4, 1024), "float32")
        with self.create(folder / "store", shape=(4, 1024), dtype="float32") as db:
            ids = db.put(values)
            db.delete(ids[::2])
            assert db.compact() >= 0
            assert_same_bytes(db.multiget(ids[1::2]), values[1::2])
        with memodb.MemoDB.open(folder / "store") as db:
            assert db.ids().tolist() == ids[1::2].tolist()
            assert_same_bytes(db.multiget(ids[1::2]), values[1::2])
            assert db.verify() == []

    # Searching

    def test_search_finds_the_nearest(self, folder: Path) -> None:
        """Ids and squared L2 distances of the k nearest keys in the namespace."""
        keys = np.array([[0, 0], [1, 0], [0, 3], [10, 10]], np.float32)
        with self.create(folder / "store", shape=(1,), dtype="int8", key_dim=2) as db:
            ids = db.put(np.zeros((4, 1), np.int8), keys)
            db.put(np.zeros((1, 1), np.int8), np.zeros((1, 2), np.float32), namespace="other")
            found = db.search(np.array([[0.25, 0]], np.float32), k=3)
            assert found.ids.tolist() == [ids[:3].tolist()]
            assert found.distances.tolist() == [[0.0625, 0.5625, 9.0625]]

    # Handles

    def test_a_reader_sees_what_is_put_later(self, folder: Path) -> None:
        """A handle opened before a put reads it without reopening."""
        values = random_records(4, (4, 1024), "float32")
        with self.create(folder / "store", shape=(4, 1024), dtype="float32") as db:
            ids = db.put(values[:2])
            with memodb.MemoDB.open(folder / "store") as reader:
                assert_same_bytes(reader.multiget(ids), values[:2])
                ids = np.concatenate([ids, db.put(values[2:])])
                assert_same_bytes(reader.multiget(ids), values)
                db.delete(ids[:1])
                with pytest.raises(memodb.RecordNotFoundError):
                    reader.multiget(ids)

    def test_a_reader_cannot_write(self, folder: Path) -> None:
        """Each verb that writes is refused by name."""
        self.create(folder / "store", shape=(4,), dtype="float32").close()
        with memodb.MemoDB.open(folder / "store") as reader:
            for write in (lambda: reader.put(np.zeros((1, 4), np.float32)), lambda: reader.delete([0]), reader.compact):
                with pytest.raises(memodb.ReadOnlyError):
                    write()

    def test_one_writer_at_a_time(self, folder: Path) -> None:
        """A second writer is refused with the pid of the first, and welcome once that one closed."""
        with (
            self.create(folder / "store", shape=(4,), dtype="float32"),
            pytest.raises(memodb.WriterLockedError, match=str(os.getpid())),
        ):
            memodb.MemoDB.open(folder / "store", mode="r+")
        memodb.MemoDB.open(folder / "store", mode="r+").close()

    # Soundness

    def test_verify_finds_a_changed_byte(self, folder: Path) -> None:
        """One flipped bit is found, and the record is named."""
        values = random_records(4, (4, 1024), "float32")
        with self.create(folder / "store", shape=(4, 1024), dtype="float32") as db:
            db.put(values)
        if not self.damage(folder / "store", values[2], 5000):
            pytest.skip(f"backend {self.backend} does not keep records as plain bytes in files")
        with memodb.MemoDB.open(folder / "store") as db:
            assert [problem.id for problem in db.verify()] == [2]

    def test_copy_keeps_everything(self, folder: Path) -> None:
        """Ids, keys, namespaces, bytes and the gaps that deleted ids left; new ids go on where the source stopped."""
        values = random_records(6, (4, 64), "float32")
        keys = np.arange(12, dtype=np.float32).reshape(6, 2)
        names = ["a", "b", "a", "b", "a", "a"]
        with self.create(folder / "store", shape=(4, 64), dtype="float32", key_dim=2) as db:
            ids = db.put(values, keys, namespace=names)
            db.delete([1, 5])
        memodb.copy(folder / "store", folder / "copy", backend=self.backend, **self.options)
        with memodb.MemoDB.open(folder / "copy", mode="r+") as db:
            assert db.backend_name == self.backend
            assert db.ids("a").tolist() == [0, 2, 4]
            assert db.ids("b").tolist() == [3]
            assert_same_bytes(db.multiget([0, 2, 3, 4]), values[[0, 2, 3, 4]])
            assert db.search(keys[4:5], namespace="a").ids.tolist() == [[4]]
            assert db.verify() == []
            assert db.put(values[:1], keys[:1]).tolist() == [len(ids)]
