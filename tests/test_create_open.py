"""Creating and opening: what a store knows of itself, and what is refused."""

import os
import shutil

import numpy as np
import pytest

import memodb
from memodb.testing import assert_same_bytes, random_records


def test_a_store_describes_itself(folder):
    settings = {"shape": (3, 4, 5), "dtype": "float16", "key_dim": 7, "index": "HNSW32"}
    with memodb.MemoDB.create(folder / "store", **settings) as db:
        described = [(db.spec.shape, db.spec.dtype, db.spec.nbytes, db.key_dim, db.backend_name, db.index_factory)]
        assert db.mode == "r+"
    with memodb.MemoDB.open(folder / "store") as db:
        described.append((db.spec.shape, db.spec.dtype, db.spec.nbytes, db.key_dim, db.backend_name, db.index_factory))
        assert db.mode == "r"
        assert os.fspath(db.path) == os.fspath(folder / "store")
    assert described == [((3, 4, 5), np.dtype("float16"), 120, 7, "arena", "HNSW32")] * 2


def test_path_may_be_text_or_path(path):
    memodb.MemoDB.create(str(path), shape=(1,), dtype="int8").close()
    memodb.MemoDB.open(path).close()
    memodb.MemoDB.open(str(path)).close()


def test_create_on_an_existing_store_is_refused_and_harmless(make, path):
    values = random_records(2, (2, 1024), "float32")
    db = make()
    ids = db.put(values)
    with pytest.raises(FileExistsError, match="store") as caught:
        memodb.MemoDB.create(path, shape=(1,), dtype="int8")
    assert isinstance(caught.value, memodb.MemoDBError)
    assert_same_bytes(db.multiget(ids), values)


def test_create_over_other_files_is_refused_and_harmless(path):
    path.mkdir()
    (path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError):
        memodb.MemoDB.create(path, shape=(1,), dtype="int8")
    assert (path / "thesis.tex").read_text() == "years of work"


def test_open_of_nothing(path):
    with pytest.raises(FileNotFoundError, match="store") as caught:
        memodb.MemoDB.open(path)
    assert isinstance(caught.value, memodb.MemoDBError)
    assert not path.exists()


@pytest.mark.parametrize("backend", ["arena", "files", "lmdb", "zarr"])
def test_a_moved_store_is_neither_damaged_nor_without_access(path, backend):
    values = random_records(3, (2, 1024), "float32")
    with memodb.MemoDB.create(path, shape=(2, 1024), dtype="float32", backend=backend) as db:
        ids = db.put(values)
        path.rename(path.with_name("elsewhere"))
        with pytest.raises(memodb.StoreNotFoundError, match="moved or removed"):
            db.put(values)
    path.with_name("elsewhere").rename(path)
    with memodb.MemoDB.open(path) as db:
        assert_same_bytes(db.multiget(ids[:1]), values[:1])  # what the catalog says of its neighbours is known by now
        path.rename(path.with_name("elsewhere"))

        def read():
            db.multiget(ids[1:])
            return len(db)  # where the records were mapped already, the catalog is missed

        with pytest.raises(memodb.StoreNotFoundError, match="moved or removed"):
            read()


@pytest.mark.parametrize("backend", ["arena", "lmdb", "zarr"])
def test_a_store_that_is_moved_while_it_is_open_is_said_to_be(path, backend):
    values = random_records(2, (2, 1024), "float32")
    with memodb.MemoDB.create(path, shape=(2, 1024), dtype="float32", key_dim=2, backend=backend) as db:
        ids = db.put(values, np.zeros((2, 2), np.float32))
    elsewhere = path.with_name("elsewhere")
    with memodb.MemoDB.open(path) as db:
        path.rename(elsewhere)
        for verb in (
            lambda: db.multiget(ids),
            lambda: db.multiget_mapped(ids),
            lambda: db.search(np.zeros((1, 2), np.float32), 1),
            db.ids,
            db.stats,
            db.__len__,
            lambda: int(ids[0]) in db,
        ):
            with pytest.raises(memodb.StoreNotFoundError, match=r"store at .* was moved or removed"):
                verb()
    with memodb.MemoDB.open(elsewhere) as db:
        assert_same_bytes(db.multiget(ids), values)


def test_open_of_something_else(path):
    path.mkdir()
    (path / "notes.txt").write_text("not a store")
    with pytest.raises(memodb.MemoDBError):
        memodb.MemoDB.open(path)
    assert [p.name for p in path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("mode", ["w", "a", "rw", "", None, 1])
def test_unknown_mode(make, path, mode):
    make().close()
    with pytest.raises(memodb.InvalidOptionError):
        memodb.MemoDB.open(path, mode=mode)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (-1, 2), (2.5,), ("2",), (True,), "12", None])
def test_shapes_that_no_record_can_have(path, shape):
    with pytest.raises(memodb.InvalidRecordError):
        memodb.MemoDB.create(path, shape=shape, dtype="float32")
    assert not path.exists()


@pytest.mark.parametrize("dtype", ["object", "str", "U4", "S3", "datetime64[s]", "V8", "float7", [("a", "i4")]])
def test_dtypes_that_are_no_numbers(path, dtype):
    with pytest.raises(memodb.InvalidRecordError):
        memodb.MemoDB.create(path, shape=(2,), dtype=dtype)
    assert not path.exists()


@pytest.mark.parametrize("key_dim", [0, -1, 1.5, True, "8"])
def test_key_widths_that_no_key_can_have(path, key_dim):
    with pytest.raises(memodb.MemoDBError) as caught:
        memodb.MemoDB.create(path, shape=(2,), dtype="int8", key_dim=key_dim)
    assert isinstance(caught.value, ValueError)
    assert not path.exists()


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"backend": "no-such-backend"}, memodb.BackendNotFoundError),
        ({"no_such_option": 1}, memodb.InvalidOptionError),
        ({"durability": "hopeful"}, memodb.InvalidOptionError),
        ({"max_bytes": -1}, memodb.InvalidOptionError),
        ({"max_bytes": "much"}, memodb.InvalidOptionError),
        ({"index": "NoSuchIndex17", "key_dim": 8}, memodb.InvalidOptionError),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else None,
)
def test_options_that_cannot_be_used(path, settings, error):
    with pytest.raises(error):
        memodb.MemoDB.create(path, shape=(2,), dtype="int8", **settings)
    assert not path.exists(), "a refused create leaves nothing behind"


@pytest.mark.parametrize("durability", ["full", "relaxed"])
def test_durability_is_a_choice(folder, durability):
    values = random_records(3, (2, 1024), "float32")
    with memodb.MemoDB.create(folder / "store", shape=(2, 1024), dtype="float32", durability=durability) as db:
        ids = db.put(values)
    with memodb.MemoDB.open(folder / "store") as db:
        assert_same_bytes(db.multiget(ids), values)


USES = {
    "put": lambda db: db.put(np.zeros((1, 2, 1024), np.float32), np.zeros((1, 2), np.float32)),
    "multiget": lambda db: db.multiget([0]),
    "multiget_mapped": lambda db: db.multiget_mapped([0]),
    "search": lambda db: db.search(np.zeros((1, 2), np.float32)),
    "delete": lambda db: db.delete([0]),
    "ids": lambda db: db.ids(),
    "len": len,
    "in": lambda db: 0 in db,
    "stats": lambda db: db.stats(),
    "verify": lambda db: db.verify(),
    "compact": lambda db: db.compact(),
    "reindex": lambda db: db.reindex(),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_use_after_close(make, use):
    db = make(key_dim=2)
    db.put(np.zeros((1, 2, 1024), np.float32), np.zeros((1, 2), np.float32))
    assert not db.closed
    db.close()
    db.close()  # closing twice is no error
    assert db.closed
    with pytest.raises(memodb.ClosedError, match="store"):
        use(db)


def test_repr_tells_what_it_is(make):
    db = make()
    assert "store" in repr(db)
    db.close()
    assert "closed" in repr(db)


def test_newer_format_is_refused_by_name(make, path, monkeypatch):
    """A store of a later format version is not opened, and not harmed."""
    import memodb.catalog.catalog as catalog

    monkeypatch.setattr(catalog, "FORMAT", 99)
    make().close()
    monkeypatch.undo()
    with pytest.raises(memodb.FormatVersionError, match="99"):
        memodb.MemoDB.open(path)


def test_a_closed_handle_is_no_context(path, make):
    db = make()
    db.close()
    with pytest.raises(memodb.ClosedError), db:
        pass


OTHERS = {
    "a folder of the same name": "values/thesis.txt",
    "records without a catalog": "values/00000001.seg",
    "an index": "index/00000001.index",
    "a file in the catalog's place": "catalog",
    "something beside the catalog": "catalog/notes.txt",
}


@pytest.mark.parametrize("name", OTHERS.values(), ids=OTHERS)
def test_create_never_removes_what_is_not_its_own(folder, name):
    path = folder / "store"
    (path / name).parent.mkdir(parents=True)
    (path / name).write_text("precious")
    with pytest.raises(memodb.StoreExistsError):
        memodb.MemoDB.create(path, shape=(2,), dtype="float32")
    assert (path / name).read_text() == "precious"


def test_a_creation_that_was_cut_off_is_done_again(folder):
    path = folder / "store"
    (path / "catalog").mkdir(parents=True)
    (path / "values").mkdir()
    (path / "writer.lock").touch()
    with memodb.MemoDB.create(path, shape=(2,), dtype="float32") as db:
        assert db.put([[1, 2]]).tolist() == [0]


@pytest.mark.parametrize("backend", ["arena", "files", "lmdb", "zarr"])
def test_another_store_at_the_same_path_is_never_taken_for_the_one_that_was_opened(folder, backend):
    """Removed and made again, or restored from a copy, under an open handle: its catalog is the old one."""
    path, kind = folder / "store", {"shape": (1024,), "dtype": "int64", "backend": backend}
    old, new = np.arange(3 * 1024).reshape(3, 1024), np.arange(3 * 1024, 6 * 1024).reshape(3, 1024)
    with memodb.MemoDB.create(path, **kind) as db:
        db.put(old)
    writer, reader, gathered = memodb.MemoDB.open(path, "r+"), memodb.MemoDB.open(path), memodb.MemoDB.open(path)
    batch = gathered.multiget_mapped([0, 2])
    shutil.rmtree(path)
    with memodb.MemoDB.create(path, **kind) as db:
        db.put(new)
    for handle in (reader, gathered, writer):
        with pytest.raises(memodb.StoreNotFoundError, match="holds another store"):
            handle.multiget([0, 2])
    with pytest.raises(memodb.StoreNotFoundError, match="holds another store"):
        writer.put(old)
    with pytest.raises(memodb.StoreNotFoundError, match="holds another store"):
        writer.compact()
    assert (batch.numpy() == old[[0, 2]]).all()
    for handle in (reader, gathered, writer):
        handle.close()
    with memodb.MemoDB.open(path, "r+", verify="always") as db:
        assert (db.multiget([0, 1, 2]) == new).all()
        assert db.verify() == []
