"""The backend "files": one file a record, few descriptors, one flush a put."""

import contextlib
import os
import shutil
import threading

import numpy as np
import pytest
from conftest import open_resources
from programs import private_mount, run_program

import memodb
from memodb import vm
from memodb.testing import assert_same_bytes, random_records

SMALL = (1024,)  # float32: one page
LARGE = (2, 512, 1024)  # float32: two huge pages


def files_of(path):
    return sorted(file for file in (path / "values").rglob("*") if file.is_file())


@pytest.fixture
def make_files(make):
    return lambda **settings: make(backend="files", **settings)


def test_no_directory_is_large(make_files, path):
    values = random_records(2500, SMALL, "float32")
    with make_files(shape=SMALL) as db:
        ids = np.concatenate([db.put(values[:1000]), db.put(values[1000:])])
        assert_same_bytes(db.multiget(ids[::-1]), values[::-1])
    assert len(files_of(path)) == 2500
    assert max(len(names) + len(folders) for _, folders, names in os.walk(path)) <= 1024


FEW_DESCRIPTORS = """
import os, resource, sys, numpy as np, memodb
from memodb.testing import assert_same_bytes, random_records

values = random_records(600, (1024,), "float32")
path = sys.argv[1] + "/store"
with memodb.MemoDB.create(path, shape=(1024,), dtype="float32", backend="files") as db:
    db.multiget(db.put(values))
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    ids = db.ids()[::-1]
    for strategy in ("map", "copy", "auto"):
        with db.multiget_mapped(ids, strategy=strategy) as batch:
            assert_same_bytes(batch.numpy(), values[::-1])
            assert batch.zero_copy or strategy != "map"
    assert_same_bytes(db.multiget(ids), values[::-1])
    assert len(os.listdir("/proc/self/fd")) < 64
    assert db.verify() == []
    db.delete(ids[::2])
    db.compact()
    assert_same_bytes(db.multiget(ids[1::2]), values[::-1][1::2])
    # Others of this process take all that is left: what the store keeps open is theirs.
    taken = []
    try:
        while True:
            taken.append(os.open("/dev/null", os.O_RDONLY))
    except OSError:
        pass
    for fd in taken[:3]:
        os.close(fd)
    assert_same_bytes(db.multiget(ids[1::2]), values[::-1][1::2])
print("ok")
"""


def test_64_descriptors_are_enough(shm):
    assert run_program(shm, FEW_DESCRIPTORS, shm) == "ok\n"


def test_large_records_lie_on_huge_pages(make_files):
    values = random_records(3, LARGE, "float32")
    db = make_files(shape=LARGE)
    ids = db.put(values)
    stats = db.stats()
    assert stats["bytes_on_store"] == values.nbytes
    if not vm.can_collapse() or stats["huge_page_note"]:
        pytest.skip(f"no huge pages to be had here: {stats['huge_page_note']}")
    assert stats["huge_page_share"] == 1
    with db.multiget_mapped(ids[::-1]) as batch:
        assert batch.zero_copy
        assert vm.entered_pages(batch.numpy().ctypes.data, batch.nbytes) in ((batch.nbytes, batch.nbytes), None)


def test_one_flush_a_put(disk, monkeypatch):
    flushed = []
    sync = vm.sync_filesystem
    monkeypatch.setattr(vm, "sync_filesystem", lambda where: (flushed.append(where), sync(where)))
    for durability, flushes in (("full", 2), ("relaxed", 0)):
        path = disk / durability
        with memodb.MemoDB.create(path, shape=SMALL, dtype="float32", backend="files", durability=durability) as db:
            flushed.clear()
            db.put(random_records(100, SMALL, "float32"))
            db.put(random_records(100, SMALL, "float32"))
        assert len(flushed) == flushes


def test_what_a_crash_left_is_erased(make_files, path):
    values = random_records(4, SMALL, "float32")
    with make_files(shape=SMALL) as db:
        db.put(values[:2])
        # As if a put had been cut off: files beyond the last commit, in the same folder and in one of later numbers.
        later = path / "values" / "000001" / "000" / "007"
        later.parent.mkdir(parents=True)
        for left in (path / "values" / "000000" / "000" / "002", later):
            left.write_bytes(b"half")
    with memodb.MemoDB.open(path) as reader:
        assert_same_bytes(reader.multiget([0, 1]), values[:2])
    with memodb.MemoDB.open(path, mode="r+") as db:
        assert len(files_of(path)) == 2
        assert db.put(values[2:]).tolist() == [2, 3]
        assert_same_bytes(db.multiget([0, 1, 2, 3]), values)


def test_readers_let_go_of_what_compaction_removed(make_files, path):
    """Neither descriptors nor idle windows keep the memory of an unlinked file."""
    values = random_records(8, (16, 512, 1024), "float32")
    db = make_files(shape=values.shape[1:])
    ids = db.put(values)
    with memodb.MemoDB.open(path) as reader:
        with reader.multiget_mapped(ids, strategy="map") as batch:
            assert_same_bytes(batch.numpy(), values)
        del batch
        db.delete(ids[:7])
        assert db.compact() == 7 * values[0].nbytes
        assert_same_bytes(reader.multiget(ids[7:]), values[7:])
        assert [line for line in open_resources(path) if "(deleted)" in line] == []


@pytest.mark.parametrize("strategy", ["map", "copy"])
def test_a_reader_that_looked_before_the_compaction(make_files, path, monkeypatch, strategy):
    """The files of a batch are removed between the lookup and the gather: the reader looks again."""
    db = make_files(shape=SMALL)
    ids = db.put(random_records(3, SMALL, "float32"))
    with memodb.MemoDB.open(path) as reader:
        extents = type(reader._backend).extents

        def delete_first(backend, locators):
            monkeypatch.undo()
            found = extents(backend, locators)
            db.delete(ids[:1])
            db.compact()
            return found

        monkeypatch.setattr(reader, "_extents", lambda locators: delete_first(reader._backend, locators))
        with pytest.raises(memodb.RecordNotFoundError, match=r"0 \(deleted\)"):
            reader.multiget_mapped(ids, strategy=strategy)


@pytest.mark.parametrize("strategy", ["map", "copy"])
@pytest.mark.parametrize("harm", ["missing", "truncated", "a link"])
def test_damaged_files(make_files, path, harm, strategy):
    values = random_records(3, SMALL, "float32")
    with make_files(shape=SMALL) as db:
        db.put(values)
    victim = path / "values" / "000000" / "000" / "001"
    if harm == "missing":
        victim.unlink()
    elif harm == "a link":
        victim.unlink()
        victim.symlink_to("000")
    else:
        os.truncate(victim, 100)
    with memodb.MemoDB.open(path) as db:
        error = memodb.UnsafePathError if harm == "a link" else memodb.CorruptionError
        with pytest.raises(error, match=r"verify\(\)|restore"):
            db.multiget_mapped([0, 1, 2], strategy=strategy)
        assert [problem.id for problem in db.verify()] == [1]
        with db.multiget_mapped([2, 0], strategy=strategy) as batch:
            assert_same_bytes(batch.numpy(), values[[2, 0]])


FULL = """
import sys, memodb
from memodb.testing import assert_same_bytes, random_records

with memodb.MemoDB.create(sys.argv[1] + "/store", shape=(1024,), dtype="float32", backend="files") as db:
    n = 0
    while True:
        values = random_records(64, (1024,), "float32", n)
        try:
            db.put(values)
        except memodb.StoreFullError as error:
            assert "inodes" in str(error) or "catalog" in str(error), error
            break
        n += 1
    assert n > 2
    for again in range(n):
        found = db.multiget(range(64 * again, 64 * again + 64))
        assert_same_bytes(found, random_records(64, (1024,), "float32", again))
    db.delete(range(64 * (n - 2), 64 * n))
    db.compact()
    ids = db.put(random_records(64, (1024,), "float32", n))
    assert_same_bytes(db.multiget(ids), random_records(64, (1024,), "float32", n))
    assert db.verify() == []
print("ok")
"""


@pytest.mark.parametrize("limit", ["size=24m", "size=24m,nr_inodes=600"])
def test_no_room_or_no_inodes(disk, limit):
    wrapper = private_mount(disk / "small", "tmpfs", limit)
    assert run_program(disk, FULL, disk / "small", wrapper=wrapper) == "ok\n"


def test_records_can_be_copied_but_not_linked(make_files, path, shm):
    """A file is a file, whoever copied it; one that another store holds as well (``cp -l``) is refused."""
    values = random_records(2, SMALL, "float32")
    with make_files(shape=SMALL) as db:
        db.put(values)
    shutil.copytree(path, shm / "other")
    with memodb.MemoDB.open(shm / "other") as db:
        assert_same_bytes(db.multiget([1, 0]), values[::-1])
    record = "values/000000/000/001"
    (shm / "other" / record).unlink()
    os.link(path / record, shm / "other" / record)
    for store in (path, shm / "other"):
        with memodb.MemoDB.open(store) as db:
            assert_same_bytes(db.multiget([0]), values[:1])
            with pytest.raises(memodb.UnsafePathError, match="hard links"):
                db.multiget([1])


def test_no_room_at_the_flush_ends_the_writer(disk, monkeypatch):
    """As NFS and quotas have it: the put is undone; a failed flush is not asked for again, whatever its reason."""
    import errno

    values = random_records(2, SMALL, "float32")
    with memodb.MemoDB.create(disk / "store", shape=SMALL, dtype="float32", backend="files") as db:
        monkeypatch.setattr(vm, "sync_filesystem", lambda fd: (_ for _ in ()).throw(OSError(errno.EDQUOT, "quota")))
        with pytest.raises(memodb.StoreFullError, match="quota"):
            db.put(values)
        monkeypatch.undo()
        assert files_of(disk / "store") == []
        with pytest.raises(memodb.ReadOnlyError, match="quota"):
            db.put(values)
    with memodb.MemoDB.open(disk / "store", mode="r+") as db:
        assert_same_bytes(db.multiget(db.put(values)), values)


def test_the_flush_comes_before_the_commit(disk, monkeypatch):
    """When records are flushed, nobody knows of them yet."""
    with memodb.MemoDB.create(disk / "store", shape=SMALL, dtype="float32", backend="files") as db:
        seen, sync = [], vm.sync_filesystem
        monkeypatch.setattr(
            vm, "sync_filesystem", lambda fd: (seen.append((len(db), len(files_of(disk / "store")))), sync(fd))
        )
        db.put(random_records(3, SMALL, "float32"))
        assert seen == [(0, 3)]


def test_a_put_under_the_descriptor_limit(shm):
    assert run_program(shm, PUT_AT_THE_LIMIT, shm) == "ok\n"


PUT_AT_THE_LIMIT = """
import os, resource, sys, memodb
from memodb.testing import assert_same_bytes, random_records

values = random_records(200, (1024,), "float32")
with memodb.MemoDB.create(sys.argv[1] + "/store", shape=(1024,), dtype="float32", backend="files") as db:
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    db.multiget(db.put(values))
    taken = []
    try:
        while True:
            taken.append(os.open("/dev/null", os.O_RDONLY))
    except OSError:
        pass
    ids = db.put(values)  # what the store keeps open is let go of
    for fd in taken:
        os.close(fd)
    assert_same_bytes(db.multiget(ids), values)
print("ok")
"""


def test_closing_while_others_gather_leaves_nothing_open(shm):
    """Threads that come too late open for themselves alone."""
    values = random_records(64, SMALL, "float32")
    path = shm / "store"
    with memodb.MemoDB.create(path, shape=SMALL, dtype="float32", backend="files") as db:
        ids = db.put(values)
    for _ in range(10):
        db = memodb.MemoDB.open(path)
        started = threading.Barrier(5)

        def work(db=db, started=started):
            started.wait()
            with contextlib.suppress(memodb.ClosedError):
                while True:
                    db.multiget(ids)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        started.wait()
        db.close()
        for thread in threads:
            thread.join()
    assert open_resources(path) == []
