"""Deleting, compacting and what they give back."""

import os

import numpy as np
import pytest

import memodb
from memodb.testing import assert_same_bytes, random_records

SHAPE = (4, 1024)
NBYTES = 16384
VALUES = random_records(512, SHAPE, "float32")
#: Small segments, so that there are several to compact.
SMALL = {"shape": SHAPE, "segment_bytes": 2 << 20}


def bytes_on_store(path):
    return sum(os.stat(file).st_blocks * 512 for file in path.rglob("*") if file.is_file())


def test_compaction_gives_bytes_back(folder):
    path = folder / "store"
    with memodb.MemoDB.create(path, dtype="float32", **SMALL) as db:
        ids = db.put(VALUES)
        before = bytes_on_store(path)
        assert before >= VALUES.nbytes
        db.delete(ids[np.arange(512) % 8 != 0])
        returned = db.compact()
        after = bytes_on_store(path)
        assert returned >= VALUES.nbytes // 2
        assert before - after >= VALUES.nbytes // 2
        assert after < VALUES.nbytes // 4 + (6 << 20)
        assert_same_bytes(db.multiget(ids[::8]), VALUES[::8])
        assert db.verify() == []
        assert db.compact() == 0, "nothing is left to give back"
    with memodb.MemoDB.open(path) as db:
        assert db.ids().tolist() == ids[::8].tolist()
        assert_same_bytes(db.multiget(ids[::8]), VALUES[::8])


def test_everything_deleted(make, path):
    db = make(**SMALL)
    db.delete(db.put(VALUES))
    db.compact()
    assert len(db) == 0
    assert bytes_on_store(path) < 6 << 20
    assert db.put(VALUES[:4]).tolist() == [512, 513, 514, 515]


def test_nothing_deleted(make):
    db = make(**SMALL)
    ids = db.put(VALUES)
    assert db.compact() == 0
    assert_same_bytes(db.multiget(ids), VALUES)


@pytest.mark.parametrize("strategy", ["map", "copy"])
def test_held_batches_stay_intact(make, strategy):
    """Rounds of delete, compact and put, with a batch of every round held until the end."""
    rng = np.random.default_rng(0)
    db = make(**SMALL)
    model = dict(zip(db.put(VALUES).tolist(), VALUES, strict=True))
    held = []
    for round_number in range(6):
        ids = rng.choice(sorted(model), 40, replace=False)
        held.append((db.multiget_mapped(ids, strategy=strategy), np.stack([model[i] for i in ids.tolist()])))
        for i in rng.choice(sorted(model), len(model) // 2, replace=False).tolist():
            db.delete([i])
            del model[i]
        db.compact()
        fresh = random_records(100, SHAPE, "float32", seed=round_number + 1)
        model.update(zip(db.put(fresh).tolist(), fresh, strict=True))
        for batch, expected in held:
            assert_same_bytes(batch.numpy(), expected)
    assert db.ids().tolist() == sorted(model)
    assert_same_bytes(db.multiget(sorted(model)), np.stack([model[i] for i in sorted(model)]))
    assert db.verify() == []


def test_keys_and_namespaces_survive(make, path):
    keys = np.random.default_rng(0).standard_normal((512, 4)).astype(np.float32)
    names = [f"n{i % 5}" for i in range(512)]
    db = make(key_dim=4, **SMALL)
    ids = db.put(VALUES, keys, namespace=names)
    db.delete(ids[100:400])
    db.compact()
    db.close()
    left = np.concatenate([ids[:100], ids[400:]])
    with memodb.MemoDB.open(path) as again:
        found = again.search(keys[left], namespace=[names[i] for i in left])
        assert found.ids[:, 0].tolist() == left.tolist()


def test_space_is_used_again(make, path):
    """Put, delete, compact, a hundred times: the store does not grow."""
    db = make(**SMALL)
    for _ in range(30):
        db.delete(db.put(VALUES[:128]))
        db.compact()
    assert bytes_on_store(path) < 128 * NBYTES * 3 + (8 << 20)


def test_progress_is_told(make):
    calls = []
    db = make(**SMALL)
    db.delete(db.put(VALUES)[::2])
    db.compact(progress=lambda done, total: calls.append((done, total)))
    assert calls
    assert calls[-1][0] == calls[-1][1]
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


def test_compacting_with_a_segment_missing_is_corruption(make, path):
    db = make(**SMALL)
    ids = db.put(VALUES)
    db.delete(ids[::2])
    db.close()
    sorted((path / "values").iterdir())[0].unlink()
    with memodb.MemoDB.open(path, mode="r+") as again:
        with pytest.raises(memodb.CorruptionError, match="missing"):
            again.compact()
        assert len(again.put(random_records(1, SHAPE, "float32"))) == 1
