"""memodb.copy: the same records, ids, keys and namespaces in another store."""

import shutil
import subprocess
import sys

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


def assert_equal_stores(one, other):
    """Ids, tombstones, bytes, keys and namespaces agree, and both are sound."""
    with memodb.MemoDB.open(one) as a, memodb.MemoDB.open(other) as b:
        ids = a.ids()
        assert b.ids().tolist() == ids.tolist()
        assert a.stats()["next_id"] == b.stats()["next_id"]
        assert a.namespaces() == b.namespaces()
        assert a.namespace_of(ids) == b.namespace_of(ids)
        assert_same_bytes(b.multiget(ids), a.multiget(ids))
        if a.key_dim:
            assert_same_bytes(b.keys(ids), a.keys(ids))
        for gone in np.setdiff1d(np.arange(a.stats()["next_id"]), ids):
            for db in (a, b):
                with pytest.raises(memodb.RecordNotFoundError, match="deleted"):
                    db.multiget([gone])
        assert a.verify() == b.verify() == []


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


def test_tombstones_are_kept(source, disk):
    with memodb.MemoDB.open(source, mode="r+") as db:
        db.put(VALUES[:2], KEYS[:2], namespace="gone")
        db.delete([60, 61])
    memodb.copy(source, disk / "copy", backend="files")
    assert_equal_stores(source, disk / "copy")
    with memodb.MemoDB.open(disk / "copy", mode="r+") as db:
        assert db.namespaces()["gone"] == 0
        assert db.search(KEYS[:2], k=60, namespace="n0").ids.max() < 58
        db.compact()
        db.reindex()
        assert db.put(VALUES[:1], KEYS[:1]).tolist() == [62]
    with memodb.MemoDB.open(disk / "copy") as db, pytest.raises(memodb.RecordNotFoundError, match="deleted"):
        db.multiget([58])


def test_copy_of_a_damaged_record_is_refused(source, disk):
    """A copy never launders damage into records with good checksums."""
    from memodb.testing import flip_stored_byte

    assert flip_stored_byte(source, VALUES[30], 4000)
    with pytest.raises(memodb.CorruptionError, match="30"):
        memodb.copy(source, disk / "copy")
    assert not (disk / "copy").exists(), "there is nothing to go on with"


COPYING = """
import sys, memodb
from memodb import transfer

source, copy, backend, chunk, stop = sys.argv[1:]
transfer._CHUNK_BYTES = int(chunk)

def progress(done, total):
    print(done, flush=True)
    if done >= int(stop):
        sys.stdin.read()  # until killed

memodb.copy(source, copy, backend=backend, progress=progress)
"""


@pytest.mark.parametrize("backend", ["arena", "files", "lmdb", "zarr"])
@pytest.mark.parametrize("stop", [8, 31])
def test_a_killed_copy_goes_on_where_it_stopped(source, disk, monkeypatch, backend, stop):
    """SIGKILL in the middle; then records of the source are deleted and put; the same call makes them equal."""
    copied, chunk = disk / "copy", 8 * VALUES[0].nbytes
    arguments = [str(source), str(copied), backend, str(chunk), str(stop)]
    command = [sys.executable, "-c", COPYING, *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        for line in child.stdout:
            if int(line) >= stop:
                break
        child.kill()
    with pytest.raises(memodb.StoreNotFoundError, match="unfinished copy"):
        memodb.MemoDB.open(copied)
    for other in ({"backend": backend, "durability": "relaxed"}, {"backend": "memory"}):
        with pytest.raises(memodb.StoreExistsError, match="other arguments"):
            memodb.copy(source, copied, **other)
    with memodb.MemoDB.open(source, mode="r+") as db:
        db.delete([3, 45])
        db.put(VALUES[:3], KEYS[:3], namespace="later")
    calls = []
    monkeypatch.setattr("memodb.transfer._CHUNK_BYTES", chunk)
    memodb.copy(source, copied, backend=backend, progress=lambda done, total: calls.append((done, total)))
    assert stop <= calls[0][0] < calls[-1][0] == calls[-1][1], "it went on, and did not begin again"
    assert_equal_stores(source, copied)
    with pytest.raises(memodb.StoreExistsError):
        memodb.copy(source, copied, backend=backend)


def test_a_copy_that_failed_goes_on_once_it_can(source, disk, monkeypatch):
    from memodb.testing import flip_stored_byte

    monkeypatch.setattr("memodb.transfer._CHUNK_BYTES", 8 * VALUES[0].nbytes)
    assert flip_stored_byte(source, VALUES[30], 4000)
    with pytest.raises(memodb.CorruptionError, match="30") as caught:
        memodb.copy(source, disk / "copy")
    assert any("goes on" in text for text in caught.value.__notes__)
    with memodb.MemoDB.open(source, mode="r+") as db:
        db.delete([30])
    memodb.copy(source, disk / "copy")
    assert_equal_stores(source, disk / "copy")


def test_what_does_not_come_back_is_noticed(source, disk, monkeypatch):
    """A device that loses what was written: the copy says so, and is not a store."""
    from memodb.backends.files import FilesBackend

    write = FilesBackend._write_file
    monkeypatch.setattr(FilesBackend, "_write_file", lambda self, file, data: write(self, file, data ^ (data == 7)))
    with pytest.raises(memodb.CorruptionError, match="does not come back"):
        memodb.copy(source, disk / "copy", backend="files")
    with pytest.raises(memodb.StoreNotFoundError, match="unfinished"):
        memodb.MemoDB.open(disk / "copy")
    monkeypatch.undo()
    with pytest.raises(memodb.CorruptionError, match="does not come back"):
        memodb.copy(source, disk / "copy", backend="files")
    with pytest.raises(memodb.StoreNotFoundError, match="unfinished"):
        memodb.MemoDB.open(disk / "copy")


def test_a_finished_copy_says_so(source, disk):
    memodb.copy(source, disk / "copy")
    with pytest.raises(memodb.StoreExistsError, match="finished copy"):
        memodb.copy(source, disk / "copy")


def test_a_store_is_not_copied_into_itself_through_a_link(source, disk):
    (disk / "link").symlink_to(source)
    (disk / "values").symlink_to(source / "values")
    for target in (disk / "link" / "copy", disk / "values" / "copy"):
        with pytest.raises(memodb.InvalidOptionError, match="into itself"):
            memodb.copy(source, target)
        assert not target.exists()
    for options in ({"backend": "zarr", "url": str(disk / "link" / "deep")}, {"segments_path": str(disk / "values")}):
        with pytest.raises(memodb.InvalidOptionError, match="lies in the store"):
            memodb.copy(source, disk / "copy", **options)
        assert not (disk / "copy").exists()


def test_a_copy_fills_whole_shards(source, disk, monkeypatch):
    monkeypatch.setattr("memodb.transfer._CHUNK_BYTES", 10 * VALUES[0].nbytes)
    memodb.copy(source, disk / "copy", backend="zarr", shard_records=8)
    assert_equal_stores(source, disk / "copy")
    import zarr

    assert zarr.open_array(disk / "copy" / "values", mode="r").shape[0] == len(LEFT)


def test_throwaway_stores_are_not_copied(source):
    for arguments in ((source, ":memory:"), (":memory:", source)):
        with pytest.raises(memodb.InvalidOptionError, match="new store each time"):
            memodb.copy(*arguments)


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


@pytest.mark.parametrize(
    ("backend", "options"),
    [("zarr", {}), ("zarr", {"codec": "zstd", "shard_records": 4}), ("arena", {}), ("files", {}), ("lmdb", {})],
)
def test_a_store_in_memory_is_kept_over_a_reboot(source, disk, backend, options):
    """Tmpfs to disk, the tmpfs is gone, disk to tmpfs: the way that docs/backends.md describes."""
    kept, before = disk / "kept", disk / "before"
    memodb.copy(source, before, backend="arena")
    memodb.copy(source, kept, backend=backend, **options)
    shutil.rmtree(source)  # the reboot
    memodb.copy(kept, source)
    assert_equal_stores(before, source)
    assert_equal_stores(kept, source)
    with memodb.MemoDB.open(source, mode="r+") as db:
        assert db.search(KEYS[LEFT], namespace=[NAMES[i] for i in LEFT]).ids[:, 0].tolist() == LEFT
        with db.multiget_mapped(LEFT[::-1], strategy="map") as batch:
            assert_same_bytes(batch.numpy(), VALUES[LEFT[::-1]])
        assert db.put(VALUES[:1], KEYS[:1]).tolist() == [60]
