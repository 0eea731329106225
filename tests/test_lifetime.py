"""Who keeps what alive: the last view keeps the batch, nothing keeps it after that."""

import gc
import threading
import weakref

import numpy as np
import pytest

import memodb
from memodb.testing import assert_same_bytes, random_records

SHAPE = (2, 1024)
VALUES = random_records(64, SHAPE, "float32")
STRATEGIES = pytest.mark.parametrize("strategy", ["map", "copy"])


def maps():
    gc.collect()
    with open("/proc/self/maps") as lines:
        return sum(1 for _ in lines)


@pytest.fixture
def db(make):
    made = make()
    made.put(VALUES)
    return made


def torch_view(batch):
    pytest.importorskip("torch")
    return batch.torch()


def torch_dlpack(batch):
    return pytest.importorskip("torch").from_dlpack(batch)


VIEWS = {
    "numpy": lambda batch: batch.numpy(),
    "numpy, writable": lambda batch: batch.numpy(writable=True),
    "asarray": np.asarray,
    "numpy from dlpack": np.from_dlpack,
    "torch": torch_view,
    "torch from dlpack": torch_dlpack,
    "capsule": lambda batch: batch.__dlpack__(),
    "memoryview": lambda batch: memoryview(batch.numpy()),
}


@STRATEGIES
@pytest.mark.parametrize("view_of", VIEWS.values(), ids=VIEWS)
def test_release_with_a_live_view_is_refused(db, view_of, strategy):
    batch = db.multiget_mapped([5, 3, 9], strategy=strategy)
    view = view_of(batch)
    with pytest.raises(BufferError):
        batch.release()
    assert_same_bytes(batch.numpy(), VALUES[[5, 3, 9]])
    del view
    gc.collect()
    batch.release()


@STRATEGIES
@pytest.mark.parametrize(
    "view_of", [VIEWS["numpy"], VIEWS["torch"], VIEWS["numpy from dlpack"]], ids=["numpy", "torch", "dlpack"]
)
def test_a_slice_keeps_the_batch_when_its_parent_is_gone(db, view_of, strategy):
    """The trap of reference counting by view: slice a view, drop the first."""
    batch = db.multiget_mapped([5, 3, 9], strategy=strategy)
    view = view_of(batch)
    piece = view[1:, :, 10:20]
    del view
    gc.collect()
    with pytest.raises(BufferError):
        batch.release()
    assert_same_bytes(np.ascontiguousarray(np.asarray(piece)), np.ascontiguousarray(VALUES[[3, 9], :, 10:20]))
    del piece
    gc.collect()
    batch.release()


@STRATEGIES
def test_use_after_release(db, strategy):
    batch = db.multiget_mapped([1, 2], strategy=strategy)
    batch.release()
    batch.release()  # twice is no error
    for use in (batch.numpy, lambda: np.asarray(batch), lambda: np.from_dlpack(batch), batch.__dlpack__):
        with pytest.raises(memodb.ClosedError):
            use()
    assert batch.ids.tolist() == [1, 2]


@STRATEGIES
def test_leaving_the_context_releases(db, strategy):
    with db.multiget_mapped([1, 2], strategy=strategy) as batch:
        assert_same_bytes(batch.numpy(), VALUES[[1, 2]])
    with pytest.raises(memodb.ClosedError):
        batch.numpy()


@STRATEGIES
def test_a_view_may_outlive_the_context(db, strategy):
    with db.multiget_mapped([1, 2], strategy=strategy) as batch:
        view = batch.numpy()
    del batch
    gc.collect()
    with db.multiget_mapped([3, 4], strategy=strategy) as other:
        other.numpy(writable=True)[:] = 0
        assert_same_bytes(view, VALUES[[1, 2]])


def test_an_error_inside_the_context_is_the_one_that_is_seen(db):
    """The BufferError of a view that the traceback keeps alive must not hide what went wrong."""

    class WrongError(Exception):
        pass

    with pytest.raises(WrongError), db.multiget_mapped([1, 2]) as batch:  # noqa: PT012
        view = batch.numpy()
        raise WrongError
    assert_same_bytes(view, VALUES[[1, 2]])


@STRATEGIES
@pytest.mark.parametrize("view_of", VIEWS.values(), ids=VIEWS)
def test_views_outlive_everything(path, view_of, strategy):
    """Database closed, dropped, its folder removed; a later store made and gathered from: a view stays as it was."""
    import shutil

    db = memodb.MemoDB.create(path, shape=SHAPE, dtype="float32")
    batch = db.multiget_mapped(db.put(VALUES)[::-1], strategy=strategy)
    view = view_of(batch)
    is_capsule = type(view).__name__ == "PyCapsule"
    db.close()
    del db
    gc.collect()
    shutil.rmtree(path)
    with memodb.MemoDB.create(path, shape=SHAPE, dtype="float32") as later:
        other = later.multiget_mapped(later.put(np.zeros((64, *SHAPE), np.float32)), strategy=strategy)
        assert not other.numpy().any()
        if not is_capsule:
            del batch
            gc.collect()
            assert_same_bytes(np.asarray(view), VALUES[::-1])
        else:
            assert_same_bytes(batch.numpy(), VALUES[::-1])


@STRATEGIES
def test_mappings_are_given_back(path, strategy):
    """Database and views dropped: the process has as many mappings as before."""

    def use():
        db = memodb.MemoDB.create(path, shape=SHAPE, dtype="float32")
        ids = db.put(VALUES)
        views = [db.multiget_mapped(np.roll(ids, i)[::2], strategy=strategy).numpy() for i in range(20)]
        db.close()
        del db
        gc.collect()
        for i, view in enumerate(views):
            assert_same_bytes(view, np.roll(VALUES, i, axis=0)[::2])
        return views

    import shutil

    use()  # what is made once a process (thread pools, libraries) is made now
    shutil.rmtree(path)
    before = maps()
    views = use()
    held = maps()
    if strategy == "map":
        assert held > before + 100, "twenty batches of scattered records should show in the maps"
    del views
    assert maps() <= before + 3  # the interpreter's own arenas come and go


def test_ten_thousand_gathers_leak_nothing(db):
    """In random order of dropping: mappings and memory in use stay where they were."""
    rng = np.random.default_rng(0)

    def gathers(n):
        held = []
        for _ in range(n):
            batch = db.multiget_mapped(rng.integers(0, 64, 4), strategy=rng.choice(["map", "copy", "auto"]))
            held.append(batch.numpy() if rng.random() < 0.5 else batch)
            del batch
            if len(held) > 20:
                held.pop(rng.integers(0, 20))

    gathers(500)
    before = maps()
    gathers(5000)
    assert maps() <= before + 10


def test_a_dropped_batch_is_freed_without_release(db):
    """No cycle keeps it: reference counting alone ends it."""
    gc.collect()
    gc.disable()
    try:
        batch = db.multiget_mapped([1, 2, 3])
        view = batch.numpy()
        dead = weakref.ref(batch)
        del batch, view
        assert dead() is None
    finally:
        gc.enable()


def test_an_unused_capsule_frees_what_it_holds(db):
    """A capsule that nobody consumed is destroyed with the batch's memory."""
    batch = db.multiget_mapped([1, 2], strategy="map")
    capsules = [batch.__dlpack__() for _ in range(10)]
    with pytest.raises(BufferError):
        batch.release()
    del capsules
    gc.collect()
    batch.release()


def test_dropping_a_store_without_closing_it(path):
    """The lock and the mappings go with the last reference."""
    db = memodb.MemoDB.create(path, shape=SHAPE, dtype="float32")
    ids = db.put(VALUES)
    del db
    gc.collect()
    with memodb.MemoDB.open(path, mode="r+") as again:
        assert_same_bytes(again.multiget(ids), VALUES)


def test_an_interrupt_in_a_gather_leaks_nothing(db, monkeypatch):
    """Ctrl-C between two mappings: the range and its share of the budget come back."""
    from memodb import vm

    calls = 0

    def interrupted(address, runs):
        nonlocal calls
        calls += 1
        mapped(address, list(runs)[: calls % 7])
        raise KeyboardInterrupt

    mapped = vm.map_runs
    db.multiget_mapped(range(0, 64, 2), strategy="map").release()
    before, in_use = maps(), memodb.gather_limits()["mappings_in_use"]
    monkeypatch.setattr(vm, "map_runs", interrupted)
    for _ in range(50):
        with pytest.raises(KeyboardInterrupt):
            db.multiget_mapped(range(0, 64, 2), strategy="map")
    monkeypatch.undo()
    assert maps() <= before + 3
    assert memodb.gather_limits()["mappings_in_use"] == in_use


@STRATEGIES
def test_an_interrupt_when_the_batch_is_just_made_gives_its_range_back_once(db, monkeypatch, strategy):
    """Its traceback keeps what would give the range back a second time, when the next batch stands there."""
    from memodb import vm

    def interrupted(span):
        monkeypatch.undo()
        raise KeyboardInterrupt

    db.multiget_mapped([1, 2, 3], strategy=strategy).release()
    in_use = memodb.gather_limits()["mappings_in_use"]
    monkeypatch.setattr(vm.Span, "array", interrupted)
    with pytest.raises(KeyboardInterrupt) as caught:
        db.multiget_mapped([1, 2, 3], strategy=strategy)
    assert memodb.gather_limits()["mappings_in_use"] == in_use
    first = db.multiget_mapped([4, 5, 6], strategy=strategy)
    del caught
    gc.collect()
    second = db.multiget_mapped([7, 8, 9], strategy=strategy)
    assert_same_bytes(first.numpy(), VALUES[[4, 5, 6]])
    assert_same_bytes(second.numpy(), VALUES[[7, 8, 9]])


def test_a_database_that_dies_inside_a_gather(path):
    """A garbage collection may run anywhere, and close a database there."""
    from memodb.gather.window import POOL

    db = memodb.MemoDB.create(path, shape=SHAPE, dtype="float32")
    ids = db.put(VALUES)
    cycle = [memodb.MemoDB.open(path)]
    cycle.append(cycle)
    del cycle
    with POOL._lock:
        gc.collect()
    assert_same_bytes(db.multiget_mapped(ids).numpy(), VALUES)
    db.close()


def test_a_batch_is_not_pickled_and_says_what_to_do(db):
    import pickle

    with pytest.raises(TypeError, match="ids"):
        pickle.dumps(db.multiget_mapped([1]))


def test_a_batch_released_after_a_compaction_pins_nothing(shm):
    """A large window may keep its pages for the next batch, but not those of a segment that is gone."""
    with memodb.MemoDB.create(shm / "store", shape=(1024, 1024), dtype="uint16", segment_bytes=64 << 20) as db:
        ids = db.put(np.ones((32, 1024, 1024), np.uint16))
        batch = db.multiget_mapped(ids, "map")
        db.delete(ids)
        db.compact()
        batch.release()
        with open("/proc/self/maps") as lines:
            assert not [line for line in lines if "(deleted)" in line and str(shm) in line]


def test_interrupts_while_batches_come_and_go(path):
    """Ctrl-C at any moment, also while a batch is released: the process never hangs, and gathers on."""
    from programs import run_program

    program = """
import random, signal, sys, time
import numpy as np, memodb

signal.signal(signal.SIGALRM, signal.default_int_handler)
sys.unraisablehook = lambda unraisable: None  # an interrupt inside of a finalizer
values = np.arange(64, dtype=np.uint8).repeat(1 << 20).reshape(64, 1 << 20)
db = memodb.MemoDB.create(sys.argv[1], shape=(1 << 20,), dtype="uint8")
db.put(values)
ids = np.arange(64)[::-1][:40].copy()
for turn in range(60):
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.0005 + random.random() * 0.006)
        end = time.monotonic() + 0.015
        while time.monotonic() < end:
            batch = db.multiget_mapped(ids, strategy=("map", "copy")[turn % 2])
            batch = None
    except KeyboardInterrupt:
        pass
    signal.setitimer(signal.ITIMER_REAL, 0)
for strategy in ("map", "copy"):
    assert np.array_equal(db.multiget_mapped(ids, strategy=strategy).numpy(), values[ids])
db.close()
memodb.gather_limits()
print("ok")
"""
    assert run_program(path.parent, program, path) == "ok\n"


@pytest.mark.parametrize("where", ["_prefetched", "_backend", "_catalog"])
def test_an_interrupted_close_keeps_no_lock(db, path, monkeypatch, where):
    part = getattr(db, where)

    def interrupted():
        closed()
        raise KeyboardInterrupt

    closed = part.close
    monkeypatch.setattr(part, "close", interrupted)
    with pytest.raises(KeyboardInterrupt):
        db.close()
    monkeypatch.undo()
    with memodb.MemoDB.open(path, mode="r+") as again:
        assert_same_bytes(again.multiget(again.put(VALUES)), VALUES)


def test_an_interrupted_open_keeps_no_lock(db, path, monkeypatch):
    from memodb import lock

    def interrupted(*arguments, **options):
        locked(*arguments, **options)
        raise KeyboardInterrupt

    db.close()
    locked = lock.lock_bytes
    monkeypatch.setattr(lock, "lock_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        memodb.MemoDB.open(path, mode="r+")
    monkeypatch.undo()
    gc.collect()
    memodb.MemoDB.open(path, mode="r+").close()


def test_a_close_that_is_interrupted_while_it_waits_for_another_thread_keeps_no_lock(db, path, monkeypatch):
    class Interrupting:
        @staticmethod
        def sleep(seconds):
            raise KeyboardInterrupt

    def hold():
        with db._catalog._env._read_gate:
            held.set()
            let_go.wait(60)

    held, let_go = threading.Event(), threading.Event()
    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(60)
    monkeypatch.setattr("memodb.environment.time", Interrupting)
    try:
        with pytest.raises(KeyboardInterrupt):
            db.close()
    finally:
        let_go.set()
        holder.join()
        monkeypatch.undo()
    with memodb.MemoDB.open(path, mode="r+") as again:
        assert_same_bytes(again.multiget(again.put(VALUES)), VALUES)
