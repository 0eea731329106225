"""Several processes on one store: what they see, what they lock, what they keep when others change it."""

import os
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import SHARED
from programs import run_program

import memodb
from memodb.testing import random_records

SHAPE = (2, 1024)


def checksum(*batches):
    return zlib.crc32(np.concatenate(batches))


def values_of(n, seed):
    return random_records(n, SHAPE, "float32", seed)


def test_a_reader_elsewhere_sees_puts_without_reopening(folder, peer):
    with memodb.MemoDB.create(folder / "store", shape=SHAPE, dtype="float32", key_dim=2) as db:
        reader = peer()
        assert reader.ask("open", path=str(folder / "store")) == 0
        ids = []
        for seed in range(20):
            ids += db.put(values_of(3, seed), np.full((3, 2), seed, np.float32)).tolist()
            assert reader.ask("ids") == ids
            assert reader.ask("checksum", ids=ids[-3:]) == checksum(values_of(3, seed))
            assert reader.ask("checksum", ids=ids[-3:], mapped=True) == checksum(values_of(3, seed))
            assert reader.ask("search", keys=[[seed, seed]])[0][0] in ids[-3:]
        assert reader.ask("verify") == []


def test_a_reader_elsewhere_sees_deletions_and_compactions(folder, peer, shared_backend):
    with memodb.MemoDB.create(folder / "store", shape=SHAPE, dtype="float32", key_dim=2, **shared_backend) as db:
        keys = np.arange(800, dtype=np.float32).reshape(400, 2)
        ids = db.put(values_of(400, 0), keys).tolist()
        reader = peer()
        reader.ask("open", path=str(folder / "store"))
        assert reader.ask("search", keys=[[20, 21]]) == [[10]]
        held = reader.ask("hold", ids=ids)
        db.delete(ids[::2])
        assert reader.ask("checksum", ids=[0])["error"] == "RecordNotFoundError"
        assert reader.ask("search", keys=[[20, 21]])[0][0] in (9, 11)
        db.compact()
        db.put(values_of(200, 1), keys[:200])
        assert reader.ask("checksum", ids=ids[1::2]) == checksum(values_of(400, 0)[1::2])
        assert reader.ask("checksum", ids=ids[1::2], mapped=True) == checksum(values_of(400, 0)[1::2])
        assert reader.ask("held_checksum") == held, "a batch held elsewhere is as it was"
        reader.ask("drop")
        assert reader.ask("verify") == []


@pytest.fixture
def churned(folder, shared_backend):
    """Return a writer, 64 records to keep, and a function that puts, deletes and compacts: those may have to move."""
    with memodb.MemoDB.create(folder / "store", shape=SHAPE, dtype="float32", key_dim=2, **shared_backend) as db:
        kept, doomed = values_of(64, 99), values_of(100, 0)
        ids = []
        for i in range(0, 64, 4):
            db.delete(db.put(doomed[:12], np.zeros((12, 2), np.float32)))
            ids += db.put(kept[i : i + 4], np.ones((4, 2), np.float32)).tolist()

        def churn():
            db.delete(db.put(doomed, np.zeros((100, 2), np.float32)))
            db.compact()

        yield db, ids, kept, churn
        assert db.verify() == []


def test_readers_elsewhere_read_while_records_move(churned, folder, peer):
    """Never a wrong or missing byte, nor an error, however the compaction and a gather fall together."""
    _, ids, kept, churn = churned
    readers = [peer(), peer()]
    for reader in readers:
        reader.ask("open", path=str(folder / "store"))
        reader.tell("checksums", ids=ids, times=1200)
    while not all(reader.answered() for reader in readers):
        churn()
    for reader in readers:
        assert reader.answer() == [checksum(kept)]


def test_threads_read_while_records_move(churned):
    db, ids, kept, churn = churned
    expected = kept.tobytes()

    def work(mapped):
        for _ in range(300):
            if mapped:
                with db.multiget_mapped(ids) as batch:
                    assert batch.numpy().tobytes() == expected
            else:
                assert db.multiget(ids).tobytes() == expected
        return True

    with ThreadPoolExecutor(3) as pool:
        jobs = [pool.submit(work, mapped) for mapped in (True, False, True)]
        while not all(job.done() for job in jobs):
            churn()
        assert [job.result() for job in jobs] == [True] * 3


def test_search_while_records_are_deleted(churned):
    """Records that are nearer come and go; there are always 64 to find, so there are always five."""
    db, ids, _, churn = churned
    query = np.zeros((8, 2), np.float32)

    def work():
        for _ in range(300):
            assert (db.search(query, k=5).ids >= 0).all(), "fewer than k found while there are k"
        return True

    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(work) for _ in range(2)]
        while not all(job.done() for job in jobs):
            churn()
        assert [job.result() for job in jobs] == [True] * 2
    assert set(db.search(query, k=64).ids.ravel().tolist()) == set(ids)


def test_a_second_writer_elsewhere_is_refused_and_told_who_writes(path, peer, make):
    make()
    other = peer()
    refused = other.ask("open", path=str(path), mode="r+")
    assert refused["error"] == "WriterLockedError"
    assert str(os.getpid()) in refused["message"]
    assert other.ask("open", path=str(path)) == 0, "reading is not locked"


def test_the_writer_s_lock_names_another_process(path, peer, make):
    make().close()
    writer = peer()
    writer.ask("open", path=str(path), mode="r+")
    with pytest.raises(memodb.WriterLockedError, match=str(writer.pid)):
        memodb.MemoDB.open(path, mode="r+")
    writer.ask("close")
    memodb.MemoDB.open(path, mode="r+").close()


def test_a_killed_writer_s_lock_frees_itself(folder, peer):
    memodb.MemoDB.create(folder / "store", shape=SHAPE, dtype="float32").close()
    writer = peer()
    writer.ask("open", path=str(folder / "store"), mode="r+")
    ids = writer.ask("put", n=4, seed=1)
    writer.kill()
    with memodb.MemoDB.open(folder / "store", mode="r+") as db:
        assert checksum(db.multiget(ids)) == checksum(values_of(4, 1))
        assert db.put(values_of(1, 2)).tolist() == [4]


def test_a_killed_reader_holds_nothing_back(folder, peer):
    """Killed while it holds a batch: writing, compacting and reopening go on."""
    with memodb.MemoDB.create(folder / "store", shape=SHAPE, dtype="float32") as db:
        ids = db.put(values_of(50, 0))
        for _ in range(5):
            reader = peer()
            reader.ask("open", path=str(folder / "store"))
            reader.ask("hold", ids=ids.tolist())
            reader.kill()
        db.delete(ids[:25])
        db.compact()
        db.put(values_of(5, 1))
        assert checksum(db.multiget(ids[25:])) == checksum(values_of(50, 0)[25:])
    with memodb.MemoDB.open(folder / "store", mode="r+") as db:
        assert db.verify() == []


def test_a_stopped_writer_is_not_robbed_of_its_lock(path, peer, make):
    import signal

    make().close()
    writer = peer()
    writer.ask("open", path=str(path), mode="r+")
    os.kill(writer.pid, signal.SIGSTOP)
    try:
        with pytest.raises(memodb.WriterLockedError, match=str(writer.pid)):
            memodb.MemoDB.open(path, mode="r+")
    finally:
        os.kill(writer.pid, signal.SIGCONT)
    assert writer.ask("put", n=1, seed=0) == [0]


def test_many_readers_in_one_process_and_elsewhere(path, peer, make):
    """Several handles of one process share the catalog; closing one does not harm the others."""
    db = make()
    handles = [memodb.MemoDB.open(path) for _ in range(5)]
    ids = db.put(values_of(3, 0))
    for position, handle in enumerate(handles):
        assert checksum(handle.multiget(ids)) == checksum(values_of(3, 0))
        handle.close()
        for other in handles[position + 1 :]:
            assert len(other) == 3
    assert db.put(values_of(1, 1)).tolist() == [3]


FORKED = """
import os, subprocess, sys, traceback
import numpy as np
import memodb
from memodb.testing import random_records

path, mode, backend = sys.argv[1:]
settings = {"dtype": "float32", "key_dim": 16, "index": "HNSW16", "backend": backend}
rng = np.random.default_rng(0)
values = random_records(64, (2, 1024), "float32")
keys = rng.standard_normal((20_000, 16)).astype(np.float32)
with memodb.MemoDB.create(path + "/store", shape=(2, 1024), **settings) as db:
    ids = db.put(values, keys[:64])
    db.reindex()
with memodb.MemoDB.create(path + "/keys", shape=(1,), dtype="int8", key_dim=16, index="HNSW16") as many:
    many.put(np.zeros((20_000, 1), np.int8), keys)
    many.search(keys[:64])  # the index is there, and its threads have run

db = memodb.MemoDB.open(path + "/store", mode=mode)
many = memodb.MemoDB.open(path + "/keys", mode=mode)
held = db.multiget_mapped(ids)
expected = many.search(keys[:512], 4).ids
before = held.numpy().copy()

def work():
    assert held.numpy().tobytes() == before.tobytes(), "a batch of before the fork"
    for handle in (db, memodb.MemoDB.open(path + "/store")):
        assert handle.multiget(ids).tobytes() == values.tobytes()
        with handle.multiget_mapped(ids[::-1]) as batch:
            assert batch.numpy().tobytes() == values[::-1].tobytes()
        with handle.multiget_mapped(ids[::-1], strategy="copy") as batch:
            assert batch.numpy().tobytes() == values[::-1].tobytes()
    found = many.search(keys[:512], 4)  # a batched HNSW search: hangs if OpenMP's threads are expected to be there
    assert np.mean(found.ids == expected) > 0.95
    try:
        db.put(values, keys[:64])
    except memodb.ReadOnlyError:
        pass
    else:
        raise AssertionError("a forked child wrote")

children = []
for _ in range(3):
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    children.append(pid)
for pid in children:
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
assert held.numpy().tobytes() == before.tobytes()
if mode == "r+":  # the children's end took neither the lock nor the handle from the parent
    assert db.put(values[:1], keys[:1]).tolist() == [64]
    second = "import memodb, sys; memodb.MemoDB.open(sys.argv[1], mode='r+')"
    refused = subprocess.run([sys.executable, "-c", second, path + "/store"], capture_output=True, text=True)
    assert refused.returncode == 1, refused
    assert "WriterLockedError" in refused.stderr, refused.stderr
del held, before
db.close()
many.close()
print("ok")
"""


@pytest.mark.parametrize(("mode", "backend"), [("r", "arena"), *(("r+", name) for name in SHARED)])
def test_forked_children_read(shm, mode, backend):
    assert run_program(shm, FORKED, shm, mode, backend) == "ok\n"


WORKERS = """
import sys
import numpy as np
import torch
import memodb
from memodb.testing import random_records


class Records(torch.utils.data.Dataset):
    def __init__(self, db):
        self.db = db

    def __len__(self):
        return 64

    def __getitem__(self, i):
        return self.db.multiget_mapped([i, 63 - i]).torch().clone()

    def __getitems__(self, indices):
        return [self[i] for i in indices]


def main():
    path, context, mode, backend = sys.argv[1:]
    values = random_records(64, (2, 1024), "int32")
    with memodb.MemoDB.create(path + "/store", shape=(2, 1024), dtype="int32", backend=backend) as db:
        db.put(values)
    with memodb.MemoDB.open(path + "/store", mode=mode) as db:
        loader = torch.utils.data.DataLoader(Records(db), batch_size=8, num_workers=4, multiprocessing_context=context)
        found = torch.cat(list(loader)).numpy()
        assert np.array_equal(found, np.stack([values, values[::-1]], axis=1))
    print("ok")


if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize(
    ("context", "mode", "backend"),
    [("fork", "r", "arena"), ("spawn", "r+", "arena"), *(("fork", "r+", name) for name in SHARED)],
)
def test_data_loader_workers_read(shm, context, mode, backend):
    pytest.importorskip("torch")
    assert run_program(shm, WORKERS, shm, context, mode, backend) == "ok\n"


def test_a_pickled_store_opens_for_reading(make):
    import pickle

    db = make(key_dim=2)
    ids = db.put(values_of(3, 0), np.eye(3, 2, dtype=np.float32))
    with pickle.loads(pickle.dumps(db)) as other:
        assert other.mode == "r"
        assert checksum(other.multiget(ids)) == checksum(values_of(3, 0))
        assert other.search(np.eye(3, 2, dtype=np.float32)[:1]).ids.tolist() == [[0]]
        with pytest.raises(memodb.ReadOnlyError):
            other.put(values_of(1, 1), np.zeros((1, 2), np.float32))


def test_a_pickled_store_refuses_what_is_gone(make, path, shm):
    import pickle

    db = make()
    data = pickle.dumps(db)
    db.close()
    path.rename(shm / "elsewhere")
    with pytest.raises(memodb.StoreNotFoundError):
        pickle.loads(data)


def test_a_backup_made_by_the_writer_loses_it_nothing(path, peer, make, folder):
    """Any descriptor of the lock file that the writer's process closes would drop a POSIX record lock."""
    import shutil

    db = make()
    ids = db.put(values_of(2, 0))
    shutil.copytree(path, folder / "backup")
    refused = peer().ask("open", path=str(path), mode="r+")
    assert refused["error"] == "WriterLockedError"
    assert db.put(values_of(1, 1)).tolist() == [2]
    with memodb.MemoDB.open(folder / "backup") as backup:
        assert checksum(backup.multiget(ids)) == checksum(values_of(2, 0))


def test_a_forked_child_does_not_hold_the_lock_of_a_killed_writer(folder):
    program = """
import os, signal, sys, memodb
path = sys.argv[1] + "/store"
memodb.MemoDB.create(path, shape=(4,), dtype="float32").close()
ready, told = os.pipe()
over, end = os.pipe()
writer = os.fork()
if writer == 0:
    db = memodb.MemoDB.open(path, mode="r+")
    if os.fork() == 0:  # this one outlives the writer
        os.close(end)
        os.write(told, b"x")
        os.read(over, 1)
        os._exit(0)
    signal.pause()
os.read(ready, 1)
try:
    memodb.MemoDB.open(path, mode="r+")
except memodb.WriterLockedError as error:
    assert str(writer) in str(error), error
else:
    raise AssertionError("two writers")
os.kill(writer, signal.SIGKILL)
os.waitpid(writer, 0)
memodb.MemoDB.open(path, mode="r+").close()
os.close(end)
print("ok")
"""
    assert run_program(folder, program, folder) == "ok\n"


def test_closing_while_others_read_is_a_closed_error(make):
    """Threads under way get the contract's error, whatever they were in the middle of."""
    import threading

    db = make(key_dim=2)
    ids = db.put(values_of(8, 0), np.zeros((8, 2), np.float32))
    started, wrong = threading.Barrier(5), []

    def read():
        started.wait()
        try:
            while True:
                db.multiget(ids)
                db.search(np.zeros((1, 2), np.float32))
        except memodb.ClosedError:
            return
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    started.wait()
    db.close()
    for thread in threads:
        thread.join()
    assert wrong == []


def locks_on(file):
    """Return the kinds of locks held on a file."""
    number = os.stat(file).st_ino
    with open("/proc/locks") as locks:
        return {line.split()[1] + " " + line.split()[3] for line in locks if f":{number} " in line}


@pytest.mark.parametrize("made", ["created", "opened", "backed up"])
def test_the_catalog_s_presence_is_locked_as_long_as_it_is_open(path, made, make, folder):
    """Without LMDB's locks the next process to open it starts the lock table over under a live writer."""
    import shutil

    db = make()
    if made == "opened":
        db.close()
        db = memodb.MemoDB.open(path, mode="r+")
    if made == "backed up":
        shutil.copytree(path, folder / "backup")
    assert db.put(values_of(1, 0)).tolist() == db.ids().tolist()
    held = locks_on(path / "catalog" / "lock.mdb")
    assert "POSIX WRITE" in held, "the reader's lock"
    assert held & {"POSIX READ", "OFDLCK READ"}, "the presence lock"
    db.close()
    assert locks_on(path / "catalog" / "lock.mdb") == set()


OPENING = """
import sys, memodb
n = 0
while not sys.argv[2:] or n < int(sys.argv[2]):
    with memodb.MemoDB.open(sys.argv[1]) as db:
        assert len(db.ids()) <= len(db)
    n += 1
print(n)
"""


@pytest.mark.parametrize("backup", [False, True])
def test_readers_that_come_and_go_harm_nobody(path, make, folder, backup):
    """One process opens and closes the store in a loop, while its maker puts, searches and reads."""
    import shutil
    import subprocess
    import sys

    db = make(shape=(4,), dtype="float32", key_dim=2)
    db.put(np.zeros((1, 4), np.float32), np.zeros((1, 2)))
    if backup:
        shutil.copytree(path, folder / "backup")
    program = folder / "opening.py"
    program.write_text(OPENING)
    acknowledged = 1
    with subprocess.Popen([sys.executable, str(program), str(path), "300"], stdout=subprocess.PIPE) as reader:
        while reader.poll() is None:
            acknowledged += len(db.put(np.ones((50, 4), np.float32), np.ones((50, 2))))
            assert len(db.ids()) == acknowledged
        assert reader.stdout.read() == b"300\n"
    assert reader.returncode == 0
    assert len(db) == acknowledged
    assert db.verify() == []


def test_opening_does_not_wait_for_the_writer(path, make):
    """A long commit of the writer keeps nobody from opening the store, nor a forked child from reading."""
    program = """
import os, sys, threading, memodb
db = memodb.MemoDB.open(sys.argv[1], mode="r+")
inside, over = threading.Event(), threading.Event()

def write():
    with db._catalog._env.write():
        inside.set()
        over.wait()

thread = threading.Thread(target=write)
thread.start()
inside.wait()
import subprocess
subprocess.run([sys.executable, "-c", "import memodb, sys; len(memodb.MemoDB.open(sys.argv[1]))", sys.argv[1]],
               check=True, timeout=60)
over.set()
thread.join()
print("ok")
"""
    make().close()
    assert run_program(path.parent, program, path) == "ok\n"


def test_copying_a_store_that_somebody_deletes_from(make, path, shm):
    """What is deleted while the copy is under way is left out of it, or in it: never the end of it."""
    import threading

    db = make(shape=(1024,), dtype="float32", key_dim=2)
    ids = np.concatenate([db.put(np.full((500, 1024), i, np.float32), np.ones((500, 2))) for i in range(60)])
    over = threading.Event()

    def delete():
        for i in range(0, len(ids), 25):
            if over.is_set():
                return
            db.delete(ids[i : i + 10])

    thread = threading.Thread(target=delete)
    thread.start()
    memodb.copy(path, shm / "copied")
    over.set()
    thread.join()
    with memodb.MemoDB.open(shm / "copied") as copied:
        kept = copied.ids()
        assert set(db.ids().tolist()) <= set(kept.tolist()) <= set(ids.tolist())
        assert copied.verify() == []
