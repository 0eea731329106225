"""memodb.copy: the same records, ids, keys and namespaces in another store."""

import numpy as np
import pytest

import memodb
from memodb.testing import assert_same_bytes, random_records

VALUES = random_records(60, (2, 1024), "float32")
KEYS = np.random.default_rng(0).standard_normal((60, 4)).astype(np.float32)
NAMES = [f"n{i % 3}" for i in range(60)]


@pytest.fixture
def source(make, path):
    db = make(key_dim=4, index="HNSW32")
    db.put(VALUES, KEYS, namespace=NAMES)
    db.delete([0, 7, 58, 59])
    db.close()
    return path


LEFT = [i for i in range(60) if i not in (0, 7, 58, 59)]


def test_a_copy_is_the_same_store(source, disk):
    memodb.copy(source, disk / "copy")
    with memodb.MemoDB.open(disk / "copy", mode="r+") as db:
        assert db.ids().tolist() == LEFT
        assert (db.spec.shape, db.spec.dtype, db.key_dim, db.index_factory) == ((2, 1024), np.float32, 4, "HNSW32")
        assert_same_bytes(db.multiget(LEFT), VALUES[LEFT])
        for name in ("n0", "n1", "n2"):
            assert db.ids(name).tolist() == [i for i in LEFT if NAMES[i] == name]
        assert db.search(KEYS[LEFT], namespace=[NAMES[i] for i in LEFT]).ids[:, 0].tolist() == LEFT
        assert db.verify() == []
        assert db.put(VALUES[:1], KEYS[:1]).tolist() == [60], "ids of deleted records are not used again"
    with memodb.MemoDB.open(source) as db:
        assert db.ids().tolist() == LEFT, "the source is as it was"


def test_copy_of_a_damaged_record_is_refused(source, disk):
    """A copy never launders damage into records with good checksums."""
    from memodb.testing import flip_stored_byte

    assert flip_stored_byte(source, VALUES[30], 4000)
    with pytest.raises(memodb.CorruptionError, match="30"):
        memodb.copy(source, disk / "copy")


def test_copy_onto_something_is_refused(source, disk):
    (disk / "copy").mkdir()
    (disk / "copy" / "precious").write_text("data")
    with pytest.raises(FileExistsError):
        memodb.copy(source, disk / "copy")
    assert [file.name for file in (disk / "copy").iterdir()] == ["precious"]


def test_copy_of_nothing(disk):
    with pytest.raises(FileNotFoundError):
        memodb.copy(disk / "nothing", disk / "copy")
    assert not (disk / "copy").exists()


def test_copy_with_options_and_progress(source, disk):
    calls = []
    memodb.copy(
        source,
        disk / "copy",
        backend="arena",
        durability="relaxed",
        progress=lambda done, total: calls.append((done, total)),
    )
    assert calls[-1][0] == calls[-1][1] > 0
    with memodb.MemoDB.open(disk / "copy") as db:
        assert len(db) == len(LEFT)
    with pytest.raises(memodb.InvalidOptionError):
        memodb.copy(source, disk / "other", no_such_option=1)
    assert not (disk / "other").exists()


def test_copy_of_an_empty_store(make, path, disk):
    make(key_dim=3).close()
    memodb.copy(path, disk / "copy")
    with memodb.MemoDB.open(disk / "copy", mode="r+") as db:
        assert len(db) == 0
        assert db.put(VALUES[:1], np.zeros((1, 3), np.float32)).tolist() == [0]


def test_a_store_with_an_open_writer_can_be_copied(make, path, disk):
    db = make()
    ids = db.put(VALUES)
    memodb.copy(path, disk / "copy")
    with memodb.MemoDB.open(disk / "copy") as copied:
        assert_same_bytes(copied.multiget(ids), VALUES)
    assert db.put(VALUES[:1]).tolist() == [60]
