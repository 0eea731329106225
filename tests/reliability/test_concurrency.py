"""Many at once: every page that anybody sees is a committed record's, whoever writes, is stopped, or is killed."""

import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import effort
import numpy as np
import pytest
from conftest import SHARED, Peer
from programs import private_mount, run_program, with_helpers
from stamps import DTYPE, SHAPE, Writer, check, folder_bytes, stamped

import memodb

STORE = {"shape": SHAPE, "dtype": DTYPE, "key_dim": 2}


@pytest.fixture(scope="module")
def readers():
    """Return four other processes."""
    peers = [Peer() for _ in range(4)]
    yield peers
    for peer in peers:
        peer.close()


def test_every_page_that_readers_see_is_stamped(readers, shm, shared_backend):
    """Four processes gather, hold and search while one puts, deletes, compacts and indexes anew."""
    until = shm / "over"
    with memodb.MemoDB.create(shm / "store", **STORE, **shared_backend) as db:
        writer = Writer(db)
        writer.turn()
        for seed, reader in enumerate(readers):
            reader.tell("watch", path=str(shm / "store"), until=str(until), seed=seed)
        try:
            for _ in effort.rounds(48, 0.025):
                writer.turn()
                if any(reader.answered() for reader in readers):
                    break  # one failed; it says how
        finally:
            until.touch()
            answers = [reader.answer() for reader in readers]
        assert not [answer for answer in answers if "error" in answer]
        pages = writer.check()
    figures = {name: sum(answer[name] for answer in answers) for name in answers[0]}
    assert min(answer["gathers"] for answer in answers) > 0
    assert figures["pages"] > figures["gathers"]
    figures["pages"] += pages
    effort.report("concurrency", backend=shared_backend["backend"], turns=writer.turns, **figures)


FREED = """
import os, signal, sys, memodb
from stamps import DTYPE, SHAPE, check, stamped
import numpy as np

place, backend, settings = sys.argv[1], sys.argv[2], eval(sys.argv[3])

def used():
    found = os.statvfs(place)
    return (found.f_blocks - found.f_bfree) * found.f_frsize

with memodb.MemoDB.create(place + "/store", shape=SHAPE, dtype=DTYPE, backend=backend, **settings) as db:
    ids = np.arange(1024)
    db.put(stamped(ids, 0 * ids))
    full = used()
    ready, told = os.pipe()
    reader = os.fork()
    if reader == 0:
        mine = memodb.MemoDB.open(place + "/store")
        held = mine.multiget_mapped(ids, "map" if backend in ("arena", "files") else "copy")
        check(held.numpy(), ids, 0 * ids)
        os.write(told, b"x")
        signal.pause()
    os.read(ready, 1)
    db.delete(ids[1:])
    db.compact()
    if backend in ("arena", "files"):
        assert used() > full - (4 << 20), "held elsewhere: the memory is still there"
    os.kill(reader, signal.SIGKILL)
    os.waitpid(reader, 0)
    db.compact()  # where the catalog's pages of before are given back as well
    assert used() < full - 1000 * 16384 + (4 << 20), (full, used())
    check(db.multiget(ids[:1]), ids[:1], 0 * ids[:1])
    assert db.verify() == []
print("ok")
"""


def test_what_a_killed_reader_held_is_free_again(disk, shared_backend, monkeypatch):
    """On a file system of its own: what no process maps any more takes no memory there."""
    with_helpers(monkeypatch)
    settings = {name: value for name, value in shared_backend.items() if name != "backend"}
    if shared_backend["backend"] == "zarr":
        settings["codec"] = "none"
    wrapper = private_mount(disk / "small", "tmpfs", "size=96m")
    done = run_program(disk, FREED, disk / "small", shared_backend["backend"], settings, wrapper=wrapper)
    assert done == "ok\n"


IN_A_TRANSACTION = """
import sys, memodb
db = memodb.MemoDB.open(sys.argv[1])
with db._catalog._env.read() as txn:
    next(iter(txn.cursor()))
    print("inside", flush=True)
    sys.stdin.read()
"""


def test_a_reader_killed_in_a_transaction_does_not_make_the_catalog_grow_for_ever(shm):
    """LMDB keeps all pages that a reader may see; of one that is dead it has to be told."""
    with memodb.MemoDB.create(shm / "store", **STORE, **SHARED["arena"]) as db:
        writer = Writer(db)
        for _ in range(40):
            writer.turn(keep=48)
        with subprocess.Popen(
            [sys.executable, "-c", IN_A_TRANSACTION, str(shm / "store")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as reader:
            assert reader.stdout.readline() == b"inside\n"
            reader.kill()
        writer.turn(keep=48)
        before = folder_bytes(shm / "store" / "catalog")
        for _ in range(effort.count(300, 1500)):
            writer.turn(keep=48)
        after = folder_bytes(shm / "store" / "catalog")
        assert after < 2 * before + (4 << 20), f"from {before} to {after} bytes"
        writer.check()


def state_of(pid):
    """Return the state of a process as the kernel sees it, e.g. "T" for stopped."""
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0]


def test_a_writer_stopped_anywhere_is_not_robbed(readers, shm, shared_backend):
    """Stopped in the middle of whatever it does: nobody else writes, everybody reads, and then it goes on."""
    random = np.random.default_rng(0)
    store, until = shm / "store", shm / "over"
    memodb.MemoDB.create(store, **STORE, **shared_backend).close()
    writer, reader = readers[:2]
    writer.tell("write", path=str(store), until=str(until))
    with ExitStack() as stack:
        db = stack.enter_context(memodb.MemoDB.open(store))
        answers = []
        stack.callback(lambda: (until.touch(), answers.append(writer.answer())))
        while not len(db) and not writer.answered():
            pass
        for _ in effort.rounds(6, 0.01):
            for _ in range(random.integers(0, 20)):  # reads on, so that it stops somewhere else each time
                len(db)
            os.kill(writer.pid, signal.SIGSTOP)
            try:
                while state_of(writer.pid) != "T":
                    pass
                with pytest.raises(memodb.WriterLockedError, match=str(writer.pid)):
                    memodb.MemoDB.open(store, mode="r+")
                ids = db.ids()
                check(db.multiget(ids), ids, db.keys(ids)[:, 1].astype(np.int64))
                assert reader.ask("open", path=str(store)) == len(ids)
                assert reader.ask("ids") == ids.tolist()
                reader.ask("close")
            finally:
                os.kill(writer.pid, signal.SIGCONT)
    assert isinstance(answers[0], int), answers
    with memodb.MemoDB.open(store, mode="r+") as db:
        assert db.verify() == []


FORK_AND_COLLECTION = """
import gc, os, sys, threading, time
import memodb
from memodb import lock
from memodb.environment import Environment

path, other = sys.argv[1:]
for at in (path, other):
    memodb.MemoDB.create(at, shape=(1,), dtype="int8").close()
gc.disable()
entered = threading.Event()
lock_bytes, main = lock.lock_bytes, threading.get_ident()

def inside(*arguments, **options):
    # Here a thread has begun to take a writer's lock. A garbage collection comes along, and closes a database.
    lock_bytes(*arguments, **options)
    entered.set()
    for _ in range(200):
        if not Environment._registry_lock.acquire(blocking=False):
            break  # the fork holds it
        Environment._registry_lock.release()
        time.sleep(0.001)
    gc.collect()

def write():
    lock.lock_bytes = inside
    memodb.MemoDB.open(path, mode="r+").close()

cycle = [memodb.MemoDB.open(other)]
cycle.append(cycle)
del cycle
thread = threading.Thread(target=write)
thread.start()
entered.wait()
child = os.fork()
if child == 0:
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
thread.join()
print("ok")
"""


def test_a_fork_does_not_wait_for_what_waits_for_it(shm):
    """A thread that takes a writer's lock is interrupted by a garbage collection, while another one forks."""
    assert run_program(shm, FORK_AND_COLLECTION, shm / "one", shm / "two", timeout=60) == "ok\n"


@pytest.mark.parametrize("backend", ["arena", "files", "lmdb", "zarr", "memory"])
def test_eight_threads_gather_release_and_close_under_each_other(shm, backend):
    """Each opens, gathers, keeps, releases and closes; whoever is late gets ClosedError, and no batch changes."""
    figures = {"gathers": 0, "pages": 0, "closed": 0}
    counting = threading.Lock()
    path, ids = shm / "store", np.arange(64)
    with memodb.MemoDB.create(path, **STORE, backend=backend, **SHARED.get(backend, {})) as db:
        db.put(stamped(ids, ids), np.zeros((64, 2)))
        shared = [memodb.MemoDB.open(path) for _ in range(3)]

        def work(seed):
            random = np.random.default_rng(seed)
            held, mine = [], dict.fromkeys(figures, 0)
            for _ in range(effort.count(40, 600)):
                place = random.integers(0, 3)
                wanted = random.integers(0, 64, random.integers(1, 32))
                try:
                    batch = shared[place].multiget_mapped(wanted)
                    shared[place].search(np.zeros((1, 2)))
                    shared[place].prefetch(wanted[::-1])
                except memodb.ClosedError:
                    mine["closed"] += 1
                    shared[place] = memodb.MemoDB.open(path)
                    continue
                mine["gathers"] += 1
                held.append((batch, batch.numpy(), wanted))
                del batch
                if len(held) > 4:
                    batch, view, wanted = held.pop(random.integers(0, 4))
                    mine["pages"] += check(view, wanted, wanted)
                    with pytest.raises(BufferError):
                        batch.release()
                    del view
                    batch.release()
                if random.random() < 0.1:
                    shared[place].close()
            for _, view, wanted in held:
                mine["pages"] += check(view, wanted, wanted)
            with counting:
                for name, count in mine.items():
                    figures[name] += count

        with ThreadPoolExecutor(8) as pool:
            for job in [pool.submit(work, seed) for seed in range(8)]:
                job.result()
        for handle in shared:
            handle.close()
        assert db.verify() == []
    assert figures["closed"] > 0
    assert figures["gathers"] > figures["closed"]
    effort.report("threads", backend=backend, **figures)


CHILDREN = """
import multiprocessing, os, sys
import numpy as np
import memodb
from stamps import DTYPE, SHAPE, check, stamped

def child(db, wanted, pipe):
    try:
        with db.multiget_mapped(wanted) as batch:
            check(batch.numpy(), wanted, wanted)
        pipe.send("right")
    except BaseException as error:
        pipe.send(repr(error))

def main():
    path, backend, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3])
    ids = np.arange(64)
    with memodb.MemoDB.create(path, shape=SHAPE, dtype=DTYPE, backend=backend) as db:
        db.put(stamped(ids, ids))
        for turn in range(rounds):
            held = [(db.multiget_mapped(wanted), wanted) for wanted in (ids[::-1], ids[::3], ids[turn % 64 :])]
            before = [batch.numpy() for batch, _ in held]
            processes = []
            for method in ("fork", "spawn"):
                context = multiprocessing.get_context(method)
                for wanted in (ids[1::2], ids[::-2]):
                    here, there = context.Pipe()
                    process = context.Process(target=child, args=(db, wanted, there))
                    process.start()
                    processes.append((process, here))
            batch = db.multiget_mapped(ids)  # and meanwhile the parent goes on
            for process, pipe in processes:
                assert pipe.recv() == "right"
                process.join()
                assert process.exitcode == 0, process.exitcode
            check(batch.numpy(), ids, ids)
            for view, (_, wanted) in zip(before, held, strict=True):
                check(view, wanted, wanted)
            del view, before, batch, held
    print("ok")

if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize("backend", SHARED if effort.is_long() else ["arena"])
def test_fork_and_spawn_while_batches_are_held(shm, backend, monkeypatch):
    """Children by both ways gather what they are told to; what the parent holds stays as it was."""
    with_helpers(monkeypatch)
    done = run_program(shm, CHILDREN, shm / "store", backend, effort.count(1, 20), timeout=1800)
    assert done == "ok\n"


@pytest.mark.skipif(not effort.is_long(), reason="tests/test_processes.py has the quick ones; make torture has all")
@pytest.mark.parametrize("backend", SHARED if effort.is_long() else ["arena"])
@pytest.mark.parametrize("context", ["fork", "spawn"] if effort.is_long() else ["fork"])
def test_data_loaders_of_four_workers(shm, context, backend):
    from test_processes import WORKERS

    pytest.importorskip("torch")
    assert run_program(shm, WORKERS, shm, context, "r+", backend) == "ok\n"
