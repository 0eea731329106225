"""``MemoDB.open(path, verify=...)``: what gathers compare with the checksums that were committed."""

import multiprocessing
import pickle

import numpy as np
import pytest
from conftest import SHARED
from programs import gather_and_tell

import memodb
from memodb.testing import random_records

SHAPE = (2, 1024)


@pytest.fixture
def store(path):
    """Return a store of ten records of which number 4 is damaged, and the records."""
    values = random_records(10, SHAPE, "float32", 1)
    with memodb.MemoDB.create(path, shape=SHAPE, dtype="float32", segment_bytes=1 << 20) as db:
        db.put(values)
    segment = next((path / "values").glob("*.seg*"))
    whole = segment.read_bytes()
    at = whole.index(values[4].tobytes()) + 5000
    with segment.open("r+b") as file:
        file.seek(at)
        file.write(bytes([whole[at] ^ 0x10]))
    return path, values


def same(found, expected):
    return np.array_equal(np.ascontiguousarray(found).view(np.uint8), np.ascontiguousarray(expected).view(np.uint8))


GATHERS = {
    "multiget": lambda db, ids: db.multiget(ids),
    "multiget into": lambda db, ids: db.multiget(ids, out=np.empty((len(ids), *SHAPE), "float32")),
    "map": lambda db, ids: db.multiget_mapped(ids, strategy="map").numpy(),
    "copy": lambda db, ids: db.multiget_mapped(ids, strategy="copy").numpy(),
}


@pytest.mark.parametrize("gather", GATHERS)
@pytest.mark.parametrize("mode", ["first", "always"])
def test_a_damaged_record_is_an_error_that_names_it(store, mode, gather):
    path, values = store
    with memodb.MemoDB.open(path, verify=mode) as db:
        for _ in range(2):  # one that did not match is not taken for known
            with pytest.raises(memodb.CorruptionError, match=r"record 4 of .*store: CRC-32C 0x\w{8}, expected 0x\w{8}"):
                GATHERS[gather](db, [9, 4, 4, 0])
        assert same(GATHERS[gather](db, [9, 9, 0]), values[[9, 9, 0]])


@pytest.mark.parametrize("gather", GATHERS)
def test_never_checks_nothing(store, gather):
    path, values = store
    with memodb.MemoDB.open(path) as db:
        assert not same(GATHERS[gather](db, [4]), values[[4]])
        assert db.stats()["verify"] == "never"
        assert db.stats()["records_checked"] == 0
        assert [(p.kind, p.id) for p in db.verify()] == [("checksum", 4)]


@pytest.mark.parametrize("mode", ["first", "always"])
def test_verify_tells_of_a_damaged_record_whatever_gathers_check(store, mode):
    with memodb.MemoDB.open(store[0], verify=mode) as db:
        assert [(p.kind, p.id) for p in db.verify()] == [("checksum", 4)]


def test_first_checks_each_record_once_and_always_each_time(store):
    path, _ = store
    with memodb.MemoDB.open(path, verify="first") as first, memodb.MemoDB.open(path, verify="always") as always:
        for ids in ([0, 1, 1, 2], [2, 3], [3, 2, 1, 0]):
            first.multiget(ids)
            always.multiget_mapped(ids)
        assert first.stats()["records_checked"] == 4
        assert always.stats()["records_checked"] == 3 + 2 + 4


def test_first_knows_records_by_id_through_deleting_compacting_and_putting(make):
    with make(segment_bytes=1 << 20) as writer:
        writer.put(random_records(200, SHAPE, "float32", 2))
        with memodb.MemoDB.open(writer.path, verify="first") as db:
            db.multiget(range(200))
            writer.delete(range(0, 200, 2))
            writer.compact()
            new = writer.put(random_records(50, SHAPE, "float32", 3))
            assert same(db.multiget(new), random_records(50, SHAPE, "float32", 3))
            assert same(db.multiget([1, 3]), random_records(200, SHAPE, "float32", 2)[[1, 3]])
            assert db.stats()["records_checked"] == 250


def test_what_is_prefetched_is_checked(store):
    path, values = store
    with memodb.MemoDB.open(path, verify="always") as db:
        db.prefetch([1, 2])
        assert same(db.multiget_mapped([1, 2]).numpy(), values[[1, 2]])
        assert db.stats()["records_checked"] == 2
        db.prefetch([3, 4])
        with pytest.raises(memodb.CorruptionError, match="record 4"):
            db.multiget_mapped([3, 4])


def test_a_damaged_record_is_told_beside_a_writer_that_commits_all_the_time(store, monkeypatch):
    """A commit between the look and the check is a reason to look again once, not for ever."""
    path = store[0]
    with memodb.MemoDB.open(path, mode="r+") as writer, memodb.MemoDB.open(path, verify="always") as reader:
        check, looks = reader._check, []

        def checked(*arguments):
            looks.append(writer.put(random_records(1, SHAPE, "float32", 1)))
            assert len(looks) < 10
            check(*arguments)

        monkeypatch.setattr(reader, "_check", checked)
        with pytest.raises(memodb.CorruptionError, match="record 4"):
            reader.multiget([4])
        assert len(looks) == 2


@pytest.mark.parametrize("backend", [*SHARED, "memory"])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "complex128"])
def test_sound_records_pass_on_every_backend(path, backend, dtype):
    values = random_records(12, (3, 50), dtype, 5)
    with memodb.MemoDB.create(path, shape=(3, 50), dtype=dtype, backend=backend, **SHARED.get(backend, {})) as db:
        db.put(values)
        with memodb.MemoDB.open(path, verify="always") as reader:
            assert same(reader.multiget([5, 0, 5]), values[[5, 0, 5]])
            assert same(reader.multiget_mapped([11, 1]).numpy(), values[[11, 1]])
            assert reader.multiget([]).shape == (0, 3, 50)
            assert reader.stats()["records_checked"] == 4


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_the_choice_goes_along_into_another_process(store, method):
    with memodb.MemoDB.open(store[0], verify="always") as db:
        assert pickle.loads(pickle.dumps(db)).stats()["verify"] == "always"
        context = multiprocessing.get_context(method)
        answers = context.Queue()
        child = context.Process(target=gather_and_tell, args=(db, answers))
        child.start()
        assert "record 4" in answers.get(timeout=120)
        child.join()


def test_an_unknown_choice_is_told(store):
    with pytest.raises(memodb.InvalidOptionError, match="verify must be 'never', 'first' or 'always', found 'often'"):
        memodb.MemoDB.open(store[0], verify="often")
    memodb.MemoDB.open(store[0], mode="r+").close()  # and no lock was kept


def test_bytes_that_travelled_are_checked_by_default(path, monkeypatch):
    from memodb.backends.files import FilesBackend

    with memodb.MemoDB.create(path, shape=SHAPE, dtype="float32", backend="files") as db:
        db.put(random_records(2, SHAPE, "float32", 1))
    monkeypatch.setattr(FilesBackend, "travels", property(lambda self: True))
    with memodb.MemoDB.open(path) as db:
        assert db.stats()["verify"] == "always"
    with memodb.MemoDB.open(path, verify="never") as db:
        assert db.stats()["verify"] == "never"
