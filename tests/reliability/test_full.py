"""No room left: a named error, the old records readable, the space used again after delete and compact."""

import numpy as np
import pytest
from programs import private_mount, run_program

import memodb
from memodb.testing import assert_same_bytes, random_records

SHAPE = (64, 1024)  # float32: 256 KiB
NBYTES = 64 * 1024 * 4
MIB = 1 << 20


def test_max_bytes(folder):
    values = random_records(64, SHAPE, "float32")
    with memodb.MemoDB.create(folder / "store", shape=SHAPE, dtype="float32", max_bytes=8 * MIB) as db:
        ids = db.put(values[:16])
        with pytest.raises(memodb.StoreFullError, match=r"max_bytes|compact") as caught:
            db.put(values)
        assert isinstance(caught.value, OSError)
        assert db.ids().tolist() == ids.tolist(), "nothing of the refused batch is there"
        assert_same_bytes(db.multiget(ids), values[:16])
    with memodb.MemoDB.open(folder / "store", mode="r+") as db:
        with pytest.raises(memodb.StoreFullError):
            db.put(values)
        db.delete(ids)
        db.compact()
        again = db.put(values[16:32])
        assert again.tolist() == list(range(16, 32))
        assert_same_bytes(db.multiget(again), values[16:32])
        assert db.verify() == []


def test_max_bytes_is_never_passed(make, path):
    """Put by put until it is full: what the store holds stays within what was allowed."""
    db = make(shape=SHAPE, max_bytes=16 * MIB)
    value = random_records(1, SHAPE, "float32")
    with pytest.raises(memodb.StoreFullError):  # noqa: PT012
        for _ in range(1000):
            db.put(value)
    assert 8 * MIB <= len(db) * NBYTES <= 16 * MIB
    segments = [f for f in path.rglob("*") if f.is_file() and f.name not in ("data.mdb", "lock.mdb")]
    assert sum(f.stat().st_blocks * 512 for f in segments) <= 16 * MIB


FILLING = """
import os, sys, numpy as np, memodb
from memodb.testing import assert_same_bytes, random_records

path = sys.argv[1] + "/store"
shape = (64, 1024)
# Sixteen records a segment: compaction on a full file system can start with a segment that is dead as a whole.
db = memodb.MemoDB.create(path, shape=shape, dtype="float32", key_dim=2, segment_bytes=4 << 20)
model = {}
for seed in range(1000):
    values = random_records(5, shape, "float32", seed)
    try:
        ids = db.put(values, np.full((5, 2), seed, np.float32))
    except memodb.StoreFullError as error:
        assert path in str(error), error
        break
    model.update(zip(ids.tolist(), values))
else:
    raise AssertionError("the file system never got full")
assert len(model) >= 30, len(model)

def check(db):
    assert db.ids().tolist() == sorted(model)
    assert_same_bytes(db.multiget(sorted(model)), np.stack([model[i] for i in sorted(model)]))
    with db.multiget_mapped(sorted(model)[::-1]) as batch:
        assert_same_bytes(batch.numpy(), np.stack([model[i] for i in sorted(model)[::-1]]))
    assert db.verify() == []

check(db)
for _ in range(3):  # refused again and again, each time cleanly
    try:
        db.put(random_records(40, shape, "float32"), np.zeros((40, 2), np.float32))
    except memodb.StoreFullError:
        continue
    raise AssertionError("40 records found room where 5 had none")
check(db)
db.close()

with memodb.MemoDB.open(path, mode="r+") as db:
    check(db)
    gone = sorted(model)[:32] + sorted(model)[32::2]
    db.delete(gone)
    for i in gone:
        del model[i]
    db.compact()
    check(db)
    values = random_records(5, shape, "float32", 7)
    model.update(zip(db.put(values, np.zeros((5, 2), np.float32)).tolist(), values))
    check(db)
print("ok")
"""


def small_tmpfs(folder, megabytes):
    """Return the command that runs another one where `folder`/small is a tmpfs of that size, or skip."""
    return private_mount(folder / "small", "tmpfs", f"size={megabytes}m")


@pytest.mark.parametrize("megabytes", [24, 33])
def test_a_full_tmpfs(disk, megabytes):
    """In a mount namespace of its own; a signal would be a status other than 0."""
    wrapper = small_tmpfs(disk, megabytes)
    assert run_program(disk, FILLING, disk / "small", wrapper=wrapper) == "ok\n"


FULL_OF_ONE_SEGMENT = """
import os, sys, numpy as np, memodb
from memodb.testing import assert_same_bytes, random_records

value = random_records(1, (64, 1024), "float32")
with memodb.MemoDB.create(sys.argv[1] + "/store", shape=(64, 1024), dtype="float32") as db:
    n = 0
    try:
        while True:
            db.put(value)
            n += 1
    except memodb.StoreFullError:
        pass
    db.delete(range(0, n, 2))
    try:
        db.compact()  # to move what lives out of its only segment takes room that is not there
    except memodb.StoreFullError:
        print("refused")
    else:
        print("done")
    with db.multiget_mapped(range(1, n, 2)) as batch:
        assert_same_bytes(batch.numpy(), np.repeat(value, len(range(1, n, 2)), axis=0))
    assert db.verify() == []
"""


def test_compaction_without_room_is_done_or_refused_but_harmless(disk):
    wrapper = small_tmpfs(disk, 24)
    assert run_program(disk, FULL_OF_ONE_SEGMENT, disk / "small", wrapper=wrapper) in ("done\n", "refused\n")


def test_a_file_size_limit(disk):
    """RLIMIT_FSIZE: the kernel would send SIGXFSZ, which Python ignores; the put is refused by name."""
    (disk / "stores").mkdir()
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (24 << 20, 24 << 20))\n"
    assert run_program(disk, limit + FULL_OF_ONE_SEGMENT, disk / "stores") in ("done\n", "refused\n")


def test_little_address_space_is_an_error_and_no_crash(disk):
    """Under RLIMIT_AS a gather that finds no room is a MemoDBError or MemoryError, and the next smaller one works."""
    program = """
import resource, sys, numpy as np, memodb
from memodb.testing import random_records, assert_same_bytes

values = random_records(64, (256, 1024), "float32")
with memodb.MemoDB.create(sys.argv[1] + "/store", shape=(256, 1024), dtype="float32") as db:
    ids = db.put(values)
    with open("/proc/self/statm") as statm:
        now = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + (96 << 20),) * 2)
    for strategy in ("map", "copy", "auto"):
        try:
            db.multiget_mapped(np.tile(ids, 8), strategy=strategy)
        except (memodb.MemoDBError, MemoryError) as error:
            print("refused")
        with db.multiget_mapped(ids[:4], strategy=strategy) as batch:
            assert_same_bytes(batch.numpy(), values[:4])
"""
    assert run_program(disk, program, disk) == "refused\n" * 3


def test_a_put_after_a_refused_one_uses_the_room_that_is_left(make):
    """The refused batch leaves no bytes behind that count."""
    db = make(shape=SHAPE, max_bytes=12 * MIB)
    for _ in range(5):
        with pytest.raises(memodb.StoreFullError):
            db.put(np.zeros((100, *SHAPE), np.float32))
    assert db.put(np.zeros((32, *SHAPE), np.float32)).tolist() == list(range(32))


DELETING_WHEN_FULL = """
import sys, numpy as np, memodb

path = sys.argv[1] + "/store"
db = memodb.MemoDB.create(path, shape=(16, 16), dtype="float32", key_dim=16)
values = np.ones((64, 16, 16), np.float32)
try:
    while True:
        db.put(values, np.zeros((64, 16), np.float32))
except memodb.StoreFullError:
    pass
n = len(db)
assert n > 10_000, n
ids = db.ids()
try:
    db.delete(ids[::2])
except memodb.StoreFullError as error:  # all or none: then fewer at once, whose memory makes room for the rest
    assert "fewer" in str(error), error
    assert len(db) == n
    db.delete(ids[: n // 16])
    assert db.compact() > 0
    db.delete(ids[n // 16 :])
else:
    db.delete(ids[1::2])
assert len(db) == 0
db.compact()
assert len(db.put(values, np.zeros((64, 16), np.float32))) == 64
assert db.verify() == []
print("ok")
"""


def test_deleting_on_a_full_file_system(disk):
    """Small records, a large catalog: LMDB calls its short write an I/O error."""
    wrapper = small_tmpfs(disk, 48)
    assert run_program(disk, DELETING_WHEN_FULL, disk / "small", wrapper=wrapper) == "ok\n"


def test_every_other_record_of_a_full_store_can_be_given_back(disk):
    """Segments are small where the room is, so compaction finds the room for one of them."""
    program = """
import os, sys, numpy as np, memodb
value = np.ones((1, 64, 1024), np.float32)
path = sys.argv[1]
with open(path + "/other", "wb") as other:
    os.posix_fallocate(other.fileno(), 0, 2 << 20)
with memodb.MemoDB.create(path + "/store", shape=(64, 1024), dtype="float32") as db:
    try:
        while True:
            db.put(value)
    except memodb.StoreFullError:
        pass
    n = len(db)
    db.delete(range(0, n, 2))
    os.unlink(path + "/other")
    assert db.compact() > n * value.nbytes // 3
    for _ in range(n // 3):
        db.put(value)
    assert db.verify() == []
print("ok")
"""
    wrapper = small_tmpfs(disk, 64)
    assert run_program(disk, program, disk / "small", wrapper=wrapper) == "ok\n"


def test_small_segments_take_no_more_than_their_records(make, path):
    """A page a segment, on any file system: not a huge page each."""
    db = make(shape=(1024,), dtype="float32", segment_bytes=4096)
    values = np.arange(300 * 1024, dtype=np.float32).reshape(300, 1024)
    db.put(values)
    assert db.stats()["bytes_on_store"] == 300 * 4096
    assert sum(f.stat().st_blocks * 512 for f in path.rglob("*.seg")) == 300 * 4096
    assert_same_bytes(db.multiget(range(299, -1, -1)), values[::-1])


def test_a_small_limit_holds_small_records(make):
    db = make(shape=(16,), dtype="float32", max_bytes=2 * MIB)
    db.put(np.zeros((100, 16), np.float32))
    assert len(db) == 100


def test_too_few_descriptors_are_an_error_with_a_remedy(disk):
    """One descriptor a segment: RLIMIT_NOFILE refuses by name, and the handle writes on when it may again."""
    program = """
import resource, sys, numpy as np, memodb
values = np.arange(200 * 1024, dtype=np.float32).reshape(200, 1024)
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
with memodb.MemoDB.create(sys.argv[1] + "/store", shape=(1024,), dtype="float32", segment_bytes=4096) as db:
    ids = db.put(values[:20])
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
    try:
        db.put(values)
    except memodb.MemoDBError as error:
        assert "ulimit" in str(error), error
    else:
        raise AssertionError("200 segments in 64 descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    more = db.put(values)
    assert np.array_equal(db.multiget(more), values) and db.verify() == []
print("ok")
"""
    assert run_program(disk, program, disk) == "ok\n"
