"""Backend lmdb: growth, generations, what a crash or a full file system leaves, and what a plain client sees."""

import os
import pickle
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import effort
import lmdb
import numpy as np
import pytest
import test_kill
from programs import private_mount, run_program
from test_conformance import SETTINGS
from test_kill import WRITER, acknowledged_until_killed, check, matches

import memodb
from memodb.testing import BackendTests, StoreMachine, assert_same_bytes, random_records

KILLS = effort.count(2, 20)
SHAPE = (2, 1024)
NBYTES = 8192
TINY = 1 << 16


def generations(path):
    return sorted(folder.name for folder in (path / "values").iterdir())


def data_file(path):
    (name,) = generations(path)
    return path / "values" / name / "data.mdb"


def plain(path, **settings):
    """Open the only generation of a closed store as anybody would."""
    return lmdb.open(str(data_file(path).parent), map_size=1 << 26, **settings)


def key(number):
    return struct.pack(">Q", number)


class TestLmdbInMemory(BackendTests):
    backend = "lmdb"

    def raw(self, path, number):
        with (
            lmdb.open(str(path / "values" / "00000001"), readonly=True, lock=False) as environment,
            environment.begin() as transaction,
        ):
            return transaction.get(key(number))

    @pytest.fixture
    def folder(self, shm):
        return shm


class TestLmdbOnDisk(TestLmdbInMemory):
    @pytest.fixture
    def folder(self, disk):
        return disk


class LmdbInMemory(StoreMachine):
    """Records of three pages, and a map that is outgrown again and again."""

    backend = "lmdb"
    options = {"map_bytes": TINY}  # noqa: RUF012  (declared a class variable where it is defined)
    parent = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None


class LmdbOnDisk(StoreMachine):
    """Records that share pages."""

    backend = "lmdb"
    shape = (3, 5)
    parent = None


TestLmdbMachineInMemory = LmdbInMemory.TestCase
TestLmdbMachineInMemory.settings = SETTINGS
TestLmdbMachineOnDisk = LmdbOnDisk.TestCase
TestLmdbMachineOnDisk.settings = SETTINGS


@pytest.fixture
def make_lmdb(make):
    return lambda *at, **settings: make(*at, **{"backend": "lmdb", "map_bytes": TINY, **settings})


# --- options ---


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"durability": "sometimes"}, "durability"),
        ({"map_bytes": 4096}, "map_bytes"),
        ({"map_bytes": 1.5}, "map_bytes"),
        ({"segment_bytes": 4096}, "segment_bytes"),
    ],
)
def test_options_that_cannot_be_used(path, options, named):
    with pytest.raises(memodb.InvalidOptionError, match=named):
        memodb.MemoDB.create(path, shape=(4,), dtype="int8", backend="lmdb", **options)
    assert not path.exists()


def test_a_record_of_4_gib_is_refused_before_anything_is_made(path):
    with pytest.raises(memodb.InvalidOptionError, match="4 GiB"):
        memodb.MemoDB.create(path, shape=(1 << 16, 1 << 16), dtype="uint8", backend="lmdb")
    assert not path.exists()
    memodb.MemoDB.create(path, shape=((1 << 32) - 1,), dtype="uint8", backend="lmdb").close()


@pytest.mark.parametrize("durability", ["full", "relaxed", "none"])
def test_durability_is_a_choice(folder, durability):
    values = random_records(20, SHAPE, "float32")
    with memodb.MemoDB.create(
        folder / "store", shape=SHAPE, dtype="float32", backend="lmdb", durability=durability
    ) as db:
        ids = db.put(values)
    with memodb.MemoDB.open(folder / "store") as db:
        assert_same_bytes(db.multiget(ids), values)
        stats = db.stats()
        assert stats["bytes_on_store"] >= values.nbytes
        assert stats["values_path"] == str(folder / "store" / "values")
        assert stats["filesystem"]


def test_nothing_is_made_before_the_first_put(make_lmdb, path):
    """A store that was cut off right after its catalog is an empty one."""
    make_lmdb().close()
    assert generations(path) == []
    (path / "values").rmdir()
    with memodb.MemoDB.open(path) as db:
        assert len(db) == 0
        assert db.multiget([]).shape == (0, *SHAPE)
        assert db.stats()["bytes_on_store"] == 0
        with pytest.raises(memodb.RecordNotFoundError):
            db.multiget([0])
    with memodb.MemoDB.open(path, mode="r+") as db:
        assert db.compact() == 0
        assert db.put(random_records(1, SHAPE, "float32")).tolist() == [0]
        assert generations(path) == ["00000001"]


# --- growth ---


def test_the_map_grows_under_readers_of_every_kind(make_lmdb, path, peer):
    """Through several doublings: this handle, another one and a thread here, and a reader in another process."""
    db = make_lmdb()
    values = random_records(600, SHAPE, "float32")
    first = db.put(values[:4])
    reader, elsewhere = memodb.MemoDB.open(path), peer()
    elsewhere.ask("open", path=str(path))
    expected, wrong, over = zlib.crc32(values[:4]), [], threading.Event()

    def gather():
        try:
            while not over.is_set():
                for handle in (reader, db):
                    assert zlib.crc32(handle.multiget(first)) == expected
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=gather) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for start in range(4, 600, 4):
            ids = db.put(values[start : start + 4])
            if start % 40 == 0:
                assert elsewhere.ask("checksum", ids=ids.tolist()) == zlib.crc32(values[start : start + 4])
                assert elsewhere.ask("checksum", ids=first.tolist()) == expected
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert data_file(path).stat().st_size > 64 * TINY, "the map was outgrown six times"
    for handle in (db, reader):
        assert_same_bytes(handle.multiget(range(600)), values)
    assert elsewhere.ask("checksum", ids=list(range(600))) == zlib.crc32(values)
    reader.close()


def test_one_record_may_be_larger_than_the_map(make_lmdb):
    db = make_lmdb(shape=(5 << 20,), dtype="uint8")
    values = random_records(3, (5 << 20,), "uint8")
    ids = db.put(values)
    assert_same_bytes(db.multiget(ids[::-1]), values[::-1])
    with db.multiget_mapped(ids) as batch:
        assert not batch.zero_copy
        assert_same_bytes(batch.numpy(), values)


def test_a_writer_that_takes_over_adopts_a_larger_map(make_lmdb, path, peer):
    """The other process grew the file while this one had it open."""
    db = make_lmdb()
    values = random_records(1, SHAPE, "float32")
    db.put(values)
    with memodb.MemoDB.open(path) as reader:
        reader.multiget([0])
        db.close()
        writer = peer()
        writer.ask("open", path=str(path), mode="r+")
        assert writer.ask("put", n=100, seed=7) == list(range(1, 101))
        writer.ask("close")
        with memodb.MemoDB.open(path, mode="r+") as again:  # shares the environment that the reader opened
            assert again.put(values).tolist() == [101]
            assert_same_bytes(again.multiget(range(1, 101)), random_records(100, SHAPE, "float32", 7))
        assert_same_bytes(reader.multiget([101, 0]), np.repeat(values, 2, axis=0))


def test_no_address_space_for_a_larger_map_is_an_error_and_no_crash(shm):
    program = """
import resource, sys, numpy as np, memodb
from memodb.testing import random_records, assert_same_bytes

values = random_records(64, (1 << 20,), "uint8")
path = sys.argv[1] + "/store"
with memodb.MemoDB.create(path, shape=(1 << 20,), dtype="uint8", backend="lmdb", map_bytes=1 << 26) as db:
    ids = db.put(values[:32])
    with open("/proc/self/statm") as statm:
        now = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + (200 << 20), -1))
    puts = 0
    try:
        while True:
            db.put(values[:16])
            puts += 1
    except memodb.StoreFullError as error:
        print("refused", "ulimit -v" in str(error))
    assert len(db) == 32 + 16 * puts
    assert_same_bytes(db.multiget(ids[:2]), values[:2])
    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
    for _ in range(8):
        db.put(values[:16])
    assert_same_bytes(db.multiget(ids), values[:32])
    assert db.verify() == []
"""
    assert run_program(shm, program, shm) == "refused True\n"


# --- generations ---


def test_compaction_gives_memory_back(make_lmdb, path, peer):
    db = make_lmdb()
    values = random_records(400, SHAPE, "float32")
    ids = db.put(values)
    elsewhere = peer()
    elsewhere.ask("open", path=str(path))
    assert elsewhere.ask("checksum", ids=[399]) == zlib.crc32(values[399:])
    with memodb.MemoDB.open(path) as reader:
        reader.multiget(ids)
        db.delete(ids[20:])
        assert db.compact() > 300 * NBYTES
        assert db.compact() == 0, "there is nothing left to give"
        assert generations(path) == ["00000002"]
        assert data_file(path).stat().st_blocks * 512 < 100 * NBYTES
        for handle in (db, reader):
            assert_same_bytes(handle.multiget(ids[:20]), values[:20])
        assert elsewhere.ask("checksum", ids=list(range(20))) == zlib.crc32(values[:20])
        more = db.put(values[20:30])
        assert elsewhere.ask("checksum", ids=more.tolist()) == zlib.crc32(values[20:30])
        assert_same_bytes(reader.multiget(more), values[20:30])
        db.delete(db.ids())
        assert db.compact() > 0
        assert generations(path) == []
        assert elsewhere.ask("checksum", ids=[0])["error"] == "RecordNotFoundError"
        more = db.put(values[:2])
        assert_same_bytes(reader.multiget(more), values[:2])
        assert elsewhere.ask("checksum", ids=more.tolist()) == zlib.crc32(values[:2])


def test_readers_of_every_kind_read_while_records_move(folder, peer):
    """Never a wrong or missing byte, nor an error, however the compaction and a gather fall together."""
    path = folder / "store"
    kept, doomed = random_records(48, SHAPE, "float32", 1), random_records(60, SHAPE, "float32", 2)
    with memodb.MemoDB.create(
        path, shape=SHAPE, dtype="float32", backend="lmdb", map_bytes=TINY, durability="none"
    ) as db:
        ids = db.put(kept)
        expected, wrong = zlib.crc32(kept), []

        def gather(handle):
            try:
                for _ in range(300):
                    assert zlib.crc32(handle.multiget(ids)) == expected
            except BaseException as error:
                wrong.append(error)

        with memodb.MemoDB.open(path) as reader:
            elsewhere = peer()
            elsewhere.ask("open", path=str(path))
            elsewhere.tell("checksums", ids=ids.tolist(), times=300)
            threads = [threading.Thread(target=gather, args=[handle]) for handle in (db, reader)]
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads) or not elsewhere.answered():
                db.delete(db.put(doomed))
                db.compact()
            assert wrong == []
            assert elsewhere.answer() == [expected]
        assert db.verify() == []


def test_what_a_crash_left_is_erased_by_the_next_writer(make_lmdb, path):
    """Values that no commit knows, and a generation that was half made; a reader meanwhile is not led astray."""
    values = random_records(4, SHAPE, "float32")
    with make_lmdb() as db:
        db.put(values[:2])
    with plain(path) as environment, environment.begin(write=True) as transaction:
        transaction.put(key(2), b"half")
        transaction.put(key(3), values[3].tobytes())
    (path / "values" / "00000002").mkdir()
    (path / "values" / "00000002" / "data.mdb").write_bytes(b"half a page")
    with memodb.MemoDB.open(path) as reader:
        assert_same_bytes(reader.multiget([0, 1]), values[:2])
        assert len(reader) == 2
        with memodb.MemoDB.open(path, mode="r+") as db:
            assert generations(path) == ["00000001"]
            assert db.put(values[2:]).tolist() == [2, 3]
            assert db.verify() == []
        assert_same_bytes(reader.multiget(range(4)), values)


def test_a_first_put_that_was_cut_off_is_done_again(make_lmdb, path):
    """Also one that left LMDB a file that is none."""
    make_lmdb().close()
    (path / "values" / "00000001").mkdir()
    (path / "values" / "00000001" / "data.mdb").write_bytes(bytes(8192))
    values = random_records(1, SHAPE, "float32")
    with memodb.MemoDB.open(path, mode="r+") as db:
        assert_same_bytes(db.multiget(db.put(values)), values)


# --- damage ---


@pytest.fixture
def stored(make_lmdb, path):
    """Return six records that a closed store holds."""
    values = random_records(6, SHAPE, "float32")
    with make_lmdb() as db:
        db.put(values)
    return values


@pytest.mark.parametrize("harm", ["removed", "shortened"])
def test_a_record_that_is_not_as_it_was_put_is_named(stored, path, harm):
    with plain(path) as environment, environment.begin(write=True) as transaction:
        if harm == "removed":
            transaction.delete(key(3))
        else:
            transaction.put(key(3), stored[3].tobytes()[:-1])
    with memodb.MemoDB.open(path) as db:
        with pytest.raises(memodb.CorruptionError, match="record 3"):
            db.multiget([2, 3])
        assert [problem.id for problem in db.verify()] == [3]
        assert_same_bytes(db.multiget([0, 1, 2, 4, 5]), stored[[0, 1, 2, 4, 5]])
    with memodb.MemoDB.open(path, mode="r+") as db:
        db.delete([3])
        db.compact()
        assert db.verify() == []


TRUNCATED = """
import os, sys, memodb
path, data, length = sys.argv[1], sys.argv[2], int(sys.argv[3])
os.truncate(data, length)
with memodb.MemoDB.open(path) as db:
    try:
        db.multiget([0])
    except memodb.CorruptionError as error:
        assert data.removesuffix("/data.mdb") in str(error), error
    else:
        raise AssertionError("read from a truncated file")
    assert [problem.id for problem in db.verify()] == list(range(6))
try:
    memodb.MemoDB.open(path, mode="r+")
except memodb.CorruptionError as error:
    print("refused")
"""


@pytest.mark.parametrize("length", [100, 8192, 40_000])
def test_a_truncated_file_is_an_error_and_no_signal(stored, path, shm, length):
    assert run_program(shm, TRUNCATED, path, data_file(path), length) == "refused\n"


def test_records_that_are_gone_are_an_error(stored, path):
    data_file(path).unlink()
    with memodb.MemoDB.open(path) as db:
        with pytest.raises(memodb.CorruptionError, match="missing"):
            db.multiget([0])
        assert [problem.id for problem in db.verify()] == list(range(6))


# --- processes ---


def test_a_pickled_handle_reads(stored, path):
    with memodb.MemoDB.open(path) as db, pickle.loads(pickle.dumps(db)) as other:
        assert_same_bytes(other.multiget([5, 0]), stored[[5, 0]])
        assert_same_bytes(db.multiget([5, 0]), stored[[5, 0]])


FORKED = """
import os, sys, threading, numpy as np, memodb
from memodb.testing import assert_same_bytes, random_records

path = sys.argv[1] + "/store"
values = random_records(64, (64, 1024), "float32")
db = memodb.MemoDB.create(path, shape=(64, 1024), dtype="float32", backend="lmdb", map_bytes=1 << 16)
ids = db.put(values[:32])
reader = memodb.MemoDB.open(path)
over = threading.Event()

def gather():
    while not over.is_set():
        for handle in (db, reader):
            assert_same_bytes(handle.multiget(ids), values[:32])

threads = [threading.Thread(target=gather) for _ in range(2)]
for thread in threads:
    thread.start()
children = []
for turn in range(6):
    go, told = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            assert_same_bytes(reader.multiget(ids), values[:32])
            os.close(told)
            kept = np.frombuffer(os.read(go, 32), np.int64)  # the parent has put, deleted and compacted, and goes on
            for handle in (db, reader):
                found = handle.ids()
                assert np.isin(kept, found).all() and 0 in found
                assert_same_bytes(handle.multiget(found[:32]), values[:32])
                assert_same_bytes(handle.multiget(kept), values[32:36])
            try:
                db.put(values[:1])
            except memodb.ReadOnlyError:
                status = 0
        finally:
            os._exit(status)
    os.close(go)
    db.delete(db.put(values[36:]))
    kept = db.put(values[32:36])
    db.compact()
    os.write(told, kept.tobytes())
    os.close(told)
    children.append(child)
assert [os.waitpid(child, 0)[1] for child in children] == [0] * 6
over.set()
for thread in threads:
    thread.join()
assert db.verify() == reader.verify() == []
print("ok")
"""


def test_forked_children_read_while_threads_gather_and_records_move(shm):
    assert run_program(shm, FORKED, shm) == "ok\n"


def test_killed_writer(folder):
    """What was acknowledged is there, through growth and compactions (the operations of test_kill.py)."""
    rng = np.random.default_rng(7)
    path = folder / "store"
    memodb.MemoDB.create(path, shape=SHAPE, dtype="int32", key_dim=2, backend="lmdb", map_bytes=TINY).close()
    done = -1
    for _ in range(KILLS):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), str(done + 1), os.path.dirname(test_kill.__file__)],
            stdout=subprocess.PIPE,
            bufsize=0,
        ) as process:
            first = process.stdout.readline()
            assert first, f"the writer failed with status {process.wait()}"
            acknowledged = acknowledged_until_killed(process, time.monotonic() + rng.exponential(0.1), int(first))
        with memodb.MemoDB.open(path) as db:
            reached = check(db, acknowledged)
        with memodb.MemoDB.open(path, mode="r+") as db:
            assert matches(db, reached)
            assert db.verify() == []
        assert len(generations(path)) <= 1
        done = reached
    assert done >= KILLS


# --- a full file system ---

FULL = """
import os, sys, numpy as np, memodb
from memodb.testing import assert_same_bytes, random_records

path, shape, batch = sys.argv[1] + "/store", tuple(map(int, sys.argv[2].split(","))), int(sys.argv[3])
nbytes = int(np.prod(shape)) * 4
db = memodb.MemoDB.create(path, shape=shape, dtype="float32", backend="lmdb", map_bytes=1 << 16)
model = {}

def fill(seed):
    while True:
        values = random_records(batch, shape, "float32", seed)
        try:
            ids = db.put(values)
        except memodb.StoreFullError as error:
            assert path in str(error), error
            return seed
        model.update(zip(ids.tolist(), values))
        seed += 1

def check():
    ids = sorted(model)
    assert db.ids().tolist() == ids
    assert_same_bytes(db.multiget(ids), np.stack([model[i] for i in ids]))
    assert db.verify() == []

seed = fill(0)
full = len(model)
assert full * nbytes > 12 << 20, full
check()
for _ in range(3):  # refused again and again, each time cleanly
    try:
        db.put(random_records(64 << 20 >> nbytes.bit_length() - 1, shape, "float32"))
    except memodb.StoreFullError:
        continue
    raise AssertionError("64 MiB found room")
check()
for turn in range(6):  # never a dead end: a tenth is deleted, compacted, and put again
    gone = sorted(model)[turn % 3 :: 10]  # here and there, so of small records no page comes free
    for part in np.array_split(gone, 30):  # as many at once as the catalog has room for
        db.delete(part)
    for i in gone:
        del model[i]
    assert db.compact() >= 0
    assert len([f for f in os.listdir(path + "/values")]) == 1, "no generation is left half made"
    check()
    before = len(model)
    seed = fill(seed)
    if nbytes > 4096:
        assert len(model) - before >= len(gone) // 2, (turn, len(model) - before, len(gone))
    check()
    if turn == 3:
        db.close()
        db = memodb.MemoDB.open(path, mode="r+")
        check()
for part in np.array_split(db.ids(), 30):
    db.delete(part)
assert db.compact() > full * nbytes // 2
assert os.listdir(path + "/values") == []
model.clear()
fill(seed)
assert len(model) > full // 2, (len(model), full)
check()
db.close()
print("ok")
"""


@pytest.mark.parametrize(
    ("shape", "batch"), [("64,1024", 5), ("12,16", 500), ("2,1024", 1)], ids=["256 KiB", "768 bytes", "8 KiB"]
)
def test_a_full_tmpfs(disk, shape, batch):
    """In a mount namespace of its own; a signal would be a status other than 0."""
    wrapper = private_mount(disk / "small", "tmpfs", "size=40m")
    assert run_program(disk, FULL, disk / "small", shape, batch, wrapper=wrapper) == "ok\n"


def test_compaction_without_room_leaves_other_files_their_room(disk):
    """It does not even try to fill the file system."""
    program = """
import os, sys, numpy as np, memodb
db = memodb.MemoDB.create(sys.argv[1] + "/store", shape=(64, 1024), dtype="float32", backend="lmdb")
values = np.ones((96, 64, 1024), np.float32)
ids = db.put(values)
with open(sys.argv[1] + "/other", "wb") as other:
    os.posix_fallocate(other.fileno(), 0, 8 << 20)
db.delete(ids[::8])
assert db.compact() < 1 << 20, "no more than what it had to spare"
assert os.listdir(sys.argv[1] + "/store/values") == ["00000001"]
before = db.stats()["bytes_on_store"]
db.put(values[:12])
assert db.stats()["bytes_on_store"] <= before + (512 << 10), "pages of the dead are used again"
os.unlink(sys.argv[1] + "/other")
db.delete(ids[1::2])
assert db.compact() > 40 * values[0].nbytes
assert os.listdir(sys.argv[1] + "/store/values") == ["00000002"]
assert db.verify() == []
db.close()
print("ok")
"""
    wrapper = private_mount(disk / "small", "tmpfs", "size=48m")
    assert run_program(disk, program, disk / "small", wrapper=wrapper) == "ok\n"


def test_max_bytes(make_lmdb):
    db = make_lmdb(max_bytes=8 << 20)
    with pytest.raises(memodb.StoreFullError, match="max_bytes"):  # noqa: PT012
        for seed in range(10_000):
            db.put(random_records(1, SHAPE, "float32", seed))
    stats = db.stats()
    assert 5 << 20 <= stats["bytes_on_store"] + stats["bytes_catalog"] <= 8 << 20
    db.delete(db.ids()[::2])
    assert db.compact() > 1 << 20
    db.put(random_records(100, SHAPE, "float32"))
    assert db.verify() == []
