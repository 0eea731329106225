"""prefetch: the next batch, gathered in the background."""

import gc
import os
import threading

import numpy as np
import pytest

import memodb
from memodb.testing import assert_same_bytes, random_records

VALUES = random_records(64, (2, 1024), "float32")


@pytest.fixture
def db(make):
    made = make()
    made.put(VALUES)
    return made


@pytest.mark.parametrize("strategy", ["auto", "map", "copy"])
def test_what_was_prefetched_is_handed_over(db, strategy):
    for i in range(30):
        ids = np.roll(np.arange(64), i)[::2]
        db.prefetch(ids, strategy)
        with db.multiget_mapped(ids, strategy) as batch:
            assert_same_bytes(batch.numpy(), VALUES[ids])
            assert batch.ids.tolist() == ids.tolist()
            if strategy != "auto":
                assert batch.zero_copy == (strategy == "map")


def test_the_batch_is_made_once_and_given_once(db):
    """The prepared batch goes to one caller only: what it writes there, the next does not see."""
    db.prefetch([3, 1])
    first = db.multiget_mapped([3, 1])
    first.numpy(writable=True)[:] = 0
    assert_same_bytes(db.multiget_mapped([3, 1]).numpy(), VALUES[[3, 1]])


def test_other_ids_and_other_strategies_are_gathered_as_ever(db):
    db.prefetch([1, 2], "copy")
    assert_same_bytes(db.multiget_mapped([2, 1]).numpy(), VALUES[[2, 1]])
    assert db.multiget_mapped([1, 2], "map").zero_copy
    assert not db.multiget_mapped([1, 2], "copy").zero_copy


def test_ids_changed_after_the_call_do_not_matter(db):
    ids = np.array([5, 6])
    db.prefetch(ids)
    ids[:] = 9
    assert_same_bytes(db.multiget_mapped([5, 6]).numpy(), VALUES[[5, 6]])


def test_bad_ids_are_refused_at_once(db):
    with pytest.raises(memodb.RecordNotFoundError):
        db.prefetch([1, 999])
    with pytest.raises(memodb.InvalidIdError):
        db.prefetch([-1])
    with pytest.raises(memodb.InvalidOptionError):
        db.prefetch([1], "mmap")


def test_what_was_deleted_meanwhile_is_not_handed_over(db):
    db.prefetch([1, 2])
    db.delete([2])
    with pytest.raises(memodb.RecordNotFoundError):
        db.multiget_mapped([1, 2])


def test_what_cannot_be_prepared_is_told_where_it_is_asked_for(make):
    db = make(shape=(5,))
    db.put(np.zeros((3, 5), np.float32))
    db.prefetch([0, 1], "map")
    with pytest.raises(memodb.MappingUnsupportedError):
        db.multiget_mapped([0, 1], "map")


def test_forgotten_batches_give_their_memory_back(db):
    for i in range(100):
        db.prefetch(np.roll(np.arange(64), i)[::2], "map")
    db.multiget_mapped([0]).release()
    db.close()
    gc.collect()
    assert memodb.gather_limits()["mappings_in_use"] == 0


def test_a_prepared_batch_outlives_the_database(db):
    db.prefetch([7, 8])
    batch = db.multiget_mapped([7, 8])
    db.close()
    assert_same_bytes(batch.numpy(), VALUES[[7, 8]])
    with pytest.raises(memodb.ClosedError):
        db.prefetch([7, 8])


def test_many_threads_prefetch(db):
    wrong = []

    def work(seed):
        rng = np.random.default_rng(seed)
        for _ in range(50):
            ids = rng.integers(0, 64, 8)
            db.prefetch(ids)
            if db.multiget_mapped(ids).numpy().tobytes() != VALUES[ids].tobytes():
                wrong.append(ids)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_forked_child_does_not_wait_for_the_parent_s_background(db):
    db.prefetch([1, 2])
    child = os.fork()
    if child == 0:
        good = db.multiget_mapped([1, 2]).numpy().tobytes() == VALUES[[1, 2]].tobytes()
        db.prefetch([3])
        good = good and db.multiget_mapped([3]).numpy().tobytes() == VALUES[[3]].tobytes()
        os._exit(0 if good else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert_same_bytes(db.multiget_mapped([1, 2]).numpy(), VALUES[[1, 2]])


def test_a_reader_that_looked_before_the_compaction(make, path, monkeypatch):
    """Records move between the lookup and the look at where they lie: the reader looks again."""
    db = make()
    with memodb.MemoDB.open(path) as reader:
        ids = db.put(VALUES)
        locators = type(reader._catalog).locators

        def compact_first(catalog, *arguments):
            monkeypatch.undo()
            found = locators(catalog, *arguments)
            db.delete(ids[::2])
            db.compact()
            return found

        monkeypatch.setattr(reader._catalog, "locators", lambda *arguments: compact_first(reader._catalog, *arguments))
        reader.prefetch(ids[1::2])
        assert_same_bytes(reader.multiget_mapped(ids[1::2]).numpy(), VALUES[1::2])
