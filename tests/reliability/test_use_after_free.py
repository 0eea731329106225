"""No use after unmap: everything that batches do, done where a range that was given back is fenced for good."""

import signal

import effort
import pytest
from programs import run_program, with_helpers

USE_AFTER_FREE = """
import ctypes, sys, guard, memodb, numpy as np

guard.install()
with memodb.MemoDB.create(sys.argv[1], shape=(1024,), dtype="float32") as db:
    ids = db.put(np.ones((8, 1024), np.float32))
    batch = db.multiget_mapped(ids, sys.argv[2])
    address = batch.numpy().ctypes.data
    assert ctypes.string_at(address, 4) == np.float32(1).tobytes()
    batch.release()
    print("released", flush=True)
    ctypes.string_at(address, 4)
"""


@pytest.mark.parametrize("strategy", ["map", "copy"])
def test_a_use_after_release_is_seen(shm, strategy, monkeypatch):
    """The fence works: without it, the tests below could not fail."""
    with_helpers(monkeypatch)
    with pytest.raises(AssertionError, match=f"status -{int(signal.SIGSEGV)}\nreleased"):
        run_program(shm, USE_AFTER_FREE, shm / "store", strategy)


FENCED = """
import gc, random, sys, threading
import guard, memodb, numpy as np
from stamps import DTYPE, SHAPE, check, memodb_maps, stamped

guard.install()
path, backend, gathers, seed = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
try:
    import torch
except ImportError:
    torch = None
ids = np.arange(64)
memodb.MemoDB.create(path, shape=SHAPE, dtype=DTYPE, backend=backend, key_dim=2).close()
writer = memodb.MemoDB.open(path, mode="r+")
writer.put(stamped(ids, ids), np.zeros((64, 2)))
handles = [writer, memodb.MemoDB.open(path)]
strategies = ["map", "copy", "auto"] if memodb_maps(writer) else ["copy", "auto"]


class Cycle:
    def __init__(self, view):
        self.view, self.me = view, self


class Error(Exception):
    pass


def in_a_traceback(batch):
    view = batch.numpy()
    try:
        raise Error(batch)
    except Error as error:
        return error  # its traceback holds this frame, and this frame the batch and its view


def from_capsule(batch):
    if torch is None:
        return np.from_dlpack(batch)
    return torch.from_dlpack(batch)


VIEWS = {
    "batch": lambda batch: (batch, lambda kept: kept.numpy()),
    "numpy": lambda batch: (batch.numpy(), lambda kept: kept),
    "writable": lambda batch: (batch.numpy(writable=True), lambda kept: kept),
    "part": lambda batch: (batch.numpy()[::-1], lambda kept: kept[::-1]),
    "reshaped": lambda batch: (batch.numpy().reshape(-1), lambda kept: kept.reshape(-1, *SHAPE)),
    "memoryview": lambda batch: (memoryview(batch.numpy()), np.asarray),
    "consumed": lambda batch: (from_capsule(batch), np.asarray),
    "not consumed": lambda batch: ((batch.__dlpack__(), batch.numpy()), lambda kept: kept[1]),
    "versioned": lambda batch: ((batch.__dlpack__(max_version=(1, 0)), batch.numpy()), lambda kept: kept[1]),
    "cycle": lambda batch: (Cycle(batch.numpy()), lambda kept: kept.view),
    "traceback": lambda batch: (
        in_a_traceback(batch), lambda kept: kept.__traceback__.tb_frame.f_locals["view"]),
}
if torch is not None:
    VIEWS["torch"] = lambda batch: (batch.torch(), lambda kept: kept.numpy())
    VIEWS["torch part"] = lambda batch: (batch.torch()[1:], lambda kept: kept.numpy())


def work(seed, gathers):
    rng, choose = np.random.default_rng(seed), random.Random(seed)
    held = []
    for turn in range(gathers):
        wanted = rng.integers(0, 64, rng.integers(2, 24))
        db = handles[turn % 2]
        if turn % 7 == 0:
            db.prefetch(wanted)
        batch = db.multiget_mapped(wanted, choose.choice(strategies))
        kind = choose.choice(list(VIEWS))
        kept, look = VIEWS[kind](batch)
        if kind == "torch part":
            wanted = wanted[1:]
        del batch
        held.append((kept, look, wanted, kind))
        del kept
        if len(held) > 12:
            kept, look, wanted, kind = held.pop(choose.randrange(len(held)))
            view = look(kept)
            pages[seed] += check(np.asarray(view), wanted, wanted)
            del view, kept
    return held


held, errors, pages = [], [], {}


def thread(seed, gathers):
    try:
        pages[seed] = 0
        held.extend(work(seed, gathers))
    except BaseException as error:
        errors.append(error)


def all_threads(gathers, first):
    threads = [threading.Thread(target=thread, args=(first + i, gathers)) for i in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert not errors, errors


all_threads(gathers // 8, seed)
for db in handles:
    db.close()  # what is held stays, and dies without a database
random.Random(seed).shuffle(held)
for kept, look, wanted, kind in held:
    check(np.asarray(look(kept)), wanted, wanted)
held.clear()
handles[:] = [memodb.MemoDB.open(path), memodb.MemoDB.open(path)]
all_threads(gathers // 8, seed + 10)
gc.collect()
assert len(guard.fenced) > gathers // 2, len(guard.fenced)
assert not guard.twice
print(sum(pages.values()))
# The interpreter ends with batches that live, some in cycles and tracebacks, and with databases that are open.
"""


@pytest.mark.parametrize("backend", ["arena", "files", "lmdb"] if effort.is_long() else ["arena"])
def test_no_view_of_any_kind_touches_what_was_given_back(shm, backend, monkeypatch):
    """Views of every kind, dropped in random order by four threads, the database closed first, alive at the exit."""
    with_helpers(monkeypatch)
    gathers = 800 if not effort.is_long() else 10_000
    for turn in effort.rounds(1, 0.02):
        folder = shm / str(turn)
        folder.mkdir()
        pages = int(run_program(folder, FENCED, folder / "store", backend, gathers, 100 * turn, timeout=1800))
        assert pages > gathers
        effort.report("guard pages", backend=backend, gathers=gathers, pages=pages)


INTERRUPTED = """
import random, signal, sys
import guard, memodb, numpy as np
from stamps import check, stamped

guard.install()
signal.signal(signal.SIGALRM, signal.default_int_handler)
sys.unraisablehook = lambda unraisable: None  # an interrupt inside of a finalizer
ids = np.arange(1024)
db = memodb.MemoDB.create(sys.argv[1], shape=(4, 512), dtype="uint64")
db.put(stamped(ids, ids))
wanted = ids[:512][::-1].copy()
interrupted, strategies = 0, ["copy", "copy", "copy", "map"]  # each range that was mapped takes one VMA for good
while interrupted < int(sys.argv[2]):
    try:
        after = random.uniform(0.003, 0.012)  # making the buffer takes a while as well
        signal.setitimer(signal.ITIMER_REAL, after, after)
        for _ in range(20):
            batch = db.multiget_mapped(wanted, strategies[interrupted % 4])
            del batch
    except KeyboardInterrupt:
        interrupted += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
batch = db.multiget_mapped(wanted)
check(batch.numpy(), wanted, wanted)
assert not guard.twice
print("ok")
"""


def test_interrupts_give_every_range_back_once(shm, monkeypatch):
    """Ctrl-C at any moment of a gather or a release, with helper threads at work."""
    with_helpers(monkeypatch)
    assert run_program(shm, INTERRUPTED, shm / "store", effort.count(40, 1000), timeout=1800) == "ok\n"
