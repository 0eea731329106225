"""How often records were gathered: counted by a handle, for whoever wants to know which ones are worth their memory."""

from __future__ import annotations

import threading

import numpy as np

import memodb


def test_each_gather_of_a_record_counts(make):
    db = make()
    ids = db.put(np.zeros((5, 2, 1024), np.float32))
    assert db.hits_per_record() == {"times": {}, "records_hit": 0, "max": 0, "mean": 0.0}
    db.multiget_mapped(ids[[0, 1, 1, 3]])
    db.multiget(ids[[1]])
    expected = {"times": {"1": 2, "3": 1}, "records_hit": 3, "max": 3, "mean": 5 / 3}
    assert db.hits_per_record() == expected
    assert db.stats()["hits_per_record"] == expected
    db.put(np.zeros((1, 2, 1024), np.float32))
    db.ids()
    assert db.hits_per_record() == expected


def test_counts_outlive_the_handle_and_belong_to_it(make, path):
    db = make()
    ids = db.put(np.zeros((2, 2, 1024), np.float32))
    db.multiget(ids)
    with memodb.MemoDB.open(path) as other:
        assert other.hits_per_record()["records_hit"] == 0
    db.close()
    assert db.hits_per_record()["times"] == {"1": 2}


def test_no_gather_of_a_thread_is_lost(make):
    db = make()
    ids = db.put(np.zeros((4, 2, 1024), np.float32))
    asked = []

    def gather():
        for _ in range(300):  # more than are counted at once
            db.multiget(ids)
            asked.append(db.hits_per_record()["max"])

    threads = [threading.Thread(target=gather) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert db.hits_per_record()["times"] == {str(4 * 300): 4}
    assert max(asked) <= 4 * 300
