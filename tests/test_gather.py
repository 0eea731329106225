"""multiget and multiget_mapped: order, repeats, strategies, what is mapped and what is copied."""

import numpy as np
import pytest

import memodb
from memodb.testing import assert_same_bytes, random_records

PAGES = (2, 1024)  # float32: two pages of 4 KiB
VALUES = random_records(40, PAGES, "float32")


@pytest.fixture
def db(make):
    made = make()
    for start in range(0, 40, 8):
        made.put(VALUES[start : start + 8])
    return made


ORDERS = {
    "all": list(range(40)),
    "backwards": list(range(39, -1, -1)),
    "every second": list(range(0, 40, 2)),
    "one": [17],
    "one, many times": [17] * 50,
    "runs and jumps": [3, 4, 5, 30, 31, 5, 4, 3, 3, 0, 39],
    "random": np.random.default_rng(0).integers(0, 40, 200).tolist(),
}


@pytest.mark.parametrize("ids", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("strategy", ["auto", "map", "copy"])
def test_order_and_repeats_are_kept(db, ids, strategy):
    with db.multiget_mapped(ids, strategy=strategy) as batch:
        assert batch.shape == (len(ids), *PAGES)
        assert batch.dtype == np.float32
        assert batch.nbytes == len(ids) * 8192
        assert batch.ids.tolist() == list(ids)
        assert_same_bytes(batch.numpy(), VALUES[ids])
        if strategy != "auto":
            assert batch.zero_copy == (strategy == "map")
    assert_same_bytes(db.multiget(ids), VALUES[ids])


@pytest.mark.parametrize("strategy", ["mmap", "", None, 1, "MAP"])
def test_unknown_strategy(db, strategy):
    with pytest.raises(memodb.InvalidOptionError, match="map"):
        db.multiget_mapped([0], strategy=strategy)


@pytest.mark.parametrize("shape", [(1,), (1023,), (1025,), (3, 700)], ids=str)
def test_records_of_no_whole_pages_are_copied(make, shape):
    """A mapped batch is contiguous only where a record ends at the end of a page."""
    values = random_records(20, shape, "float32")
    db = make(shape=shape)
    ids = db.put(values)[::-2]
    with pytest.raises(memodb.MappingUnsupportedError):
        db.multiget_mapped(ids, strategy="map")
    with db.multiget_mapped(ids) as batch:
        assert not batch.zero_copy
        assert_same_bytes(batch.numpy(), values[::-2])


@pytest.mark.parametrize("strategy", ["auto", "map"])
def test_huge_page_records(folder, strategy):
    """Records of 2 MiB, each of them on a huge page where the kernel gives them."""
    values = random_records(6, (2, 512, 1024), "uint16")
    with memodb.MemoDB.create(folder / "store", shape=(2, 512, 1024), dtype="uint16") as db:
        ids = db.put(values)
        wanted = [5, 0, 0, 3]
        with db.multiget_mapped(ids[wanted], strategy=strategy) as batch:
            if strategy == "map" or db.stats()["huge_page_share"] == 1:
                assert batch.zero_copy
                assert batch.numpy().ctypes.data % (2 << 20) == 0
            assert_same_bytes(batch.numpy(), values[wanted])


def test_batches_are_reusable_one_after_the_other(db):
    """Ranges and buffers are used again: nothing of an earlier batch shows in a later one."""
    rng = np.random.default_rng(1)
    for _ in range(200):
        ids = rng.integers(0, 40, rng.integers(1, 30))
        with db.multiget_mapped(ids, strategy=rng.choice(["auto", "map", "copy"])) as batch:
            assert_same_bytes(batch.numpy(), VALUES[ids])
            batch.numpy(writable=True)[:] = -1
    assert_same_bytes(db.multiget(range(40)), VALUES)


def test_many_batches_at_once(db):
    rng = np.random.default_rng(2)
    batches = []
    for _ in range(100):
        ids = rng.integers(0, 40, 16)
        batches.append((db.multiget_mapped(ids, strategy=rng.choice(["auto", "map", "copy"])), ids))
    for position in rng.permutation(100):
        batch, ids = batches[position]
        assert_same_bytes(batch.numpy(), VALUES[ids])
        batch.release()


def test_more_runs_than_the_kernel_has_mappings(make):
    """Alternating ids need one mapping each: beyond the budget "auto" copies, and "map" says so."""
    values = np.arange(40_000, dtype=np.int32).repeat(1024).reshape(-1, 1024)
    db = make(shape=(1024,), dtype="int32")
    ids = db.put(values)
    alternating = np.concatenate([ids[::2], ids[1::2]])
    with db.multiget_mapped(alternating) as batch:
        assert np.array_equal(batch.numpy()[:, 7], alternating)
    with pytest.raises(memodb.MappingUnsupportedError):
        db.multiget_mapped(alternating, strategy="map")


def test_map_keeps_its_budget_over_many_held_batches(make):
    """However many batches are held, the process never runs out of mappings: later ones are copied."""
    values = np.arange(4000, dtype=np.int32).repeat(1024).reshape(-1, 1024)
    db = make(shape=(1024,), dtype="int32")
    ids = db.put(values)
    held = [db.multiget_mapped(np.roll(ids[::2], i)) for i in range(40)]
    with open("/proc/self/maps") as maps:
        assert sum(1 for _ in maps) < 40_000
    for i, batch in enumerate(held):
        assert np.array_equal(batch.numpy()[:, 0], np.roll(ids[::2], i))


def test_multiget_is_the_caller_s_own(db):
    found = db.multiget([1, 2])
    assert found.flags.c_contiguous
    assert found.flags.writeable
    found[:] = 0
    assert_same_bytes(db.multiget([1, 2]), VALUES[[1, 2]])


def test_multiget_out(db):
    out = np.empty((3, *PAGES), np.float32)
    assert db.multiget([7, 7, 1], out=out) is out
    assert_same_bytes(out, VALUES[[7, 7, 1]])
    assert db.multiget([], out=np.empty((0, *PAGES), np.float32)).shape == (0, *PAGES)


BAD_OUT = {
    "too few records": np.zeros((1, *PAGES), np.float32),
    "too many records": np.zeros((3, *PAGES), np.float32),
    "other dtype": np.zeros((2, *PAGES), np.int32),
    "other shape": np.zeros((2, 1024, 2), np.float32),
    "strided": np.zeros((2, 2, 2048), np.float32)[:, :, ::2],
    "not an array": [[0.0]],
}


@pytest.mark.parametrize("out", BAD_OUT.values(), ids=BAD_OUT)
def test_multiget_out_that_does_not_fit(db, out):
    with pytest.raises(memodb.MemoDBError) as caught:
        db.multiget([1, 2], out=out)
    assert isinstance(caught.value, ValueError)
    assert not np.any(np.asarray(out)), "a refused out is not written to"


def test_multiget_out_that_is_read_only(db):
    out = np.zeros((2, *PAGES), np.float32)
    out.flags.writeable = False
    with pytest.raises(memodb.MemoDBError):
        db.multiget([1, 2], out=out)
    assert not out.any()


def test_a_failed_gather_leaves_nothing_mapped(db):
    with db.multiget_mapped(range(10)):
        pass
    with open("/proc/self/maps") as maps:
        before = sum(1 for _ in maps)
    for _ in range(20):
        with pytest.raises(memodb.RecordNotFoundError):
            db.multiget_mapped([0, 2, 4, 999])
    with open("/proc/self/maps") as maps:
        assert sum(1 for _ in maps) <= before + 2


def test_eight_threads_gather_at_once(db):
    """Gathering, reading, releasing from threads: every batch is right."""
    from concurrent.futures import ThreadPoolExecutor

    def work(seed):
        rng = np.random.default_rng(seed)
        for _ in range(50):
            ids = rng.integers(0, 40, rng.integers(1, 20))
            batch = db.multiget_mapped(ids, strategy=rng.choice(["auto", "map", "copy"]))
            assert_same_bytes(batch.numpy(), VALUES[ids])
            if rng.random() < 0.5:
                batch.release()
        return True

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(8))) == [True] * 8


def test_stats_count_what_was_done(make):
    db = make(key_dim=2)
    keys = np.zeros((40, 2), np.float32)
    keys[:, 0] = np.arange(40)
    db.put(VALUES, keys)
    before = db.stats()
    assert before["records"] == 40
    assert before["bytes_logical"] == 40 * 8192
    assert before["bytes_on_store"] >= 40 * 8192
    db.multiget_mapped([1, 2, 3], strategy="map").release()
    db.multiget_mapped([1, 2], strategy="copy").release()
    db.search(keys[:3], 1)
    after = db.stats()
    grown = {name: after[name] - before[name] for name in ("gathers", "bytes_mapped", "bytes_copied", "searches")}
    assert grown["gathers"] == 2
    assert grown["bytes_mapped"] == 3 * 8192
    assert grown["bytes_copied"] == 2 * 8192
    assert grown["searches"] >= 1


@pytest.mark.parametrize("shape", [(1, 1_769_472), (3, 196_608)], ids=["3.4 MiB", "1.1 MiB"])
def test_adjacent_records_keep_their_huge_pages(make, shape):
    """Records of no whole number of huge pages: a batch of neighbours begins where huge pages can stay whole."""
    from memodb import vm

    values = random_records(20, shape, "uint16")
    db = make(shape=shape, dtype="uint16")
    ids = db.put(values)
    huge = db.stats()["huge_page_share"] == 1
    for wanted in (ids[1:19], ids[[7, 8, 9, 10, 11, 12, 2]], ids[3:4], ids[[12, 4, 5, 6, 7, 8, 9, 10]], ids[::-1]):
        with db.multiget_mapped(wanted, strategy="map") as batch:
            assert_same_bytes(batch.numpy(), values[wanted])
            first = batch.numpy().ctypes.data
            assert first % vm.PAGE == 0
            start = vm.round_up(first, vm.HUGE)
            entered = vm.entered_pages(start, (first + batch.nbytes - start) // vm.HUGE * vm.HUGE)
            if huge and entered is not None and np.array_equal(wanted, ids[1:19]):
                assert entered[1] == entered[0] > 0
            batch.numpy(writable=True)[:] = 0
    assert_same_bytes(db.multiget(ids), values)
