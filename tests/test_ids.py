"""Ids: dense, ascending, never used again; and what is no id."""

import contextlib

import numpy as np
import pytest

import memodb
from memodb.testing import assert_same_bytes, random_records

VALUES = random_records(6, (2, 1024), "float32")


@pytest.fixture
def db(make):
    made = make()
    made.put(VALUES)
    return made


READS = {
    "multiget": lambda db, ids: db.multiget(ids),
    "multiget_mapped": lambda db, ids: db.multiget_mapped(ids),
    "delete": lambda db, ids: db.delete(ids),
}

NO_IDS = {
    "bool": [True],
    "bool array": np.array([True, False]),
    "float": [1.0],
    "float array": np.array([1.0, 2.0]),
    "NaN": [float("nan")],
    "string": ["1"],
    "text": "1",
    "bytes": b"\x01",
    "none": [None],
    "negative": [-1],
    "negative array": np.array([0, -3]),
    "mixed with bool": [0, True],
    "mixed with float": [0, 1.5],
    "too large": [2**63],
    "uint64 too large": np.array([2**64 - 1], np.uint64),
    "two dimensions": [[0, 1], [2, 3]],
    "object": [object()],
    "one bare number": 3,
    "complex": [1j],
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
@pytest.mark.parametrize("ids", NO_IDS.values(), ids=NO_IDS)
def test_what_is_no_id_is_refused(db, read, ids):
    with pytest.raises(memodb.InvalidIdError):
        read(db, ids)
    assert len(db) == 6


@pytest.mark.parametrize("read", READS.values(), ids=READS)
@pytest.mark.parametrize("unknown", [6, 7, 10**6, 2**63 - 1])
def test_an_id_never_given_is_not_found_by_name(db, read, unknown):
    with pytest.raises(memodb.RecordNotFoundError, match=str(unknown)) as caught:
        read(db, [0, unknown])
    assert isinstance(caught.value, KeyError)
    assert len(db) == 6, "a delete that fails deletes nothing"


GIVEN = {
    "list": [4, 1],
    "tuple": (4, 1),
    "range": range(4, 0, -3),
    "int64": np.array([4, 1]),
    "int8": np.array([4, 1], np.int8),
    "uint64": np.array([4, 1], np.uint64),
    "big endian": np.array([4, 1], ">i4"),
    "numpy scalars": [np.int64(4), np.uint8(1)],
    "strided": np.array([4, 9, 1, 9])[::2],
    "array in a list subclass": type("Ids", (list,), {})([4, 1]),
}


@pytest.mark.parametrize("ids", GIVEN.values(), ids=GIVEN)
def test_any_sequence_of_integers_will_do(db, ids):
    assert_same_bytes(db.multiget(ids), VALUES[[4, 1]])
    with db.multiget_mapped(ids) as batch:
        assert_same_bytes(batch.numpy(), VALUES[[4, 1]])
        assert batch.ids.tolist() == [4, 1]


def test_torch_ids(db):
    torch = pytest.importorskip("torch")
    assert_same_bytes(db.multiget(torch.tensor([4, 1])), VALUES[[4, 1]])


@pytest.mark.parametrize("empty", [[], (), range(0), np.array([], np.int64), np.array([])], ids=repr)
def test_no_ids_at_all(db, empty):
    """Also an empty float array, which is what numpy makes of an empty list."""
    assert db.multiget(empty).shape == (0, 2, 1024)
    with db.multiget_mapped(empty) as batch:
        assert batch.shape == (0, 2, 1024)
        assert batch.numpy().dtype == np.float32
    db.delete(empty)
    assert len(db) == 6


def test_put_gives_int64_arrays(make):
    db = make()
    first, second, third = db.put(VALUES[:2]), db.put(VALUES[:0]), db.put(VALUES[2:])
    for ids in (first, second, third):
        assert isinstance(ids, np.ndarray)
        assert ids.dtype == np.int64
    assert first.tolist() + second.tolist() + third.tolist() == [0, 1, 2, 3, 4, 5]


def test_ids_are_never_used_again(make, path):
    """Not after deleting, compacting, or reopening, even when the last ids are the deleted ones."""
    db = make()
    db.put(VALUES)
    db.delete([4, 5])
    db.compact()
    db.close()
    with memodb.MemoDB.open(path, mode="r+") as again:
        again.delete(again.ids())
        again.compact()
        assert len(again) == 0
        assert again.put(VALUES[:1]).tolist() == [6]


def test_a_refused_put_uses_no_id(db):
    with pytest.raises(memodb.InvalidRecordError):
        db.put(VALUES[:, :1])
    assert db.put(VALUES[:1]).tolist() == [6]


def test_in_and_len(db):
    db.delete([2])
    assert len(db) == 5
    assert [i in db for i in range(7)] == [True, True, False, True, True, True, False]
    assert np.int64(3) in db


@pytest.mark.parametrize("odd", [-1, True, 1.0, "1", None, 2**70])
def test_odd_things_are_not_in(db, odd):
    """`in` answers, or refuses by name; it never says yes to what is no id."""
    with contextlib.suppress(memodb.InvalidIdError):
        assert odd not in db


def test_ids_of_namespaces(make):
    db = make()
    db.put(VALUES, namespace=["a", "b", "a", "", "b", "a"])
    assert db.ids().tolist() == [0, 1, 2, 3, 4, 5]
    assert db.ids("a").tolist() == [0, 2, 5]
    assert db.ids("").tolist() == [3]
    assert db.ids("never used").tolist() == []
    assert db.ids("never used").dtype == np.int64
    db.delete([2, 3])
    assert db.ids("a").tolist() == [0, 5]
    assert db.ids("").tolist() == []


def test_delete_twice_in_one_call_and_in_two(db):
    db.delete([1, 1])
    assert len(db) == 5
    with pytest.raises(memodb.RecordNotFoundError, match="1"):
        db.delete([0, 1])
    assert 0 in db
