"""Keys and namespaces: what is refused by name, and how rows find their namespace."""

import numpy as np
import pytest

import memodb
from memodb.testing import assert_same_bytes, random_records

VALUES = random_records(3, (2, 1024), "float32")
KEYS = np.eye(3, 4, dtype=np.float32)

BAD_KEYS = {
    "NaN": np.where(KEYS == 1, np.nan, KEYS).astype(np.float32),
    "infinite": np.where(KEYS == 1, np.inf, KEYS).astype(np.float32),
    "minus infinite": np.where(KEYS == 1, -np.inf, KEYS).astype(np.float32),
    "becomes infinite as float32": np.full((3, 4), 1e300),
    "too narrow": KEYS[:, :3],
    "too wide": np.zeros((3, 5), np.float32),
    "one row short": KEYS[:2],
    "one row more": np.zeros((4, 4), np.float32),
    "flat": KEYS.reshape(-1),
    "text": np.full((3, 4), "a"),
    "complex": KEYS.astype(np.complex64),
    "missing": None,
    "ragged": [[1.0], [1.0, 2.0], [1.0]],
}


@pytest.mark.parametrize("keys", BAD_KEYS.values(), ids=BAD_KEYS)
def test_put_refuses_bad_keys_and_changes_nothing(make, keys):
    db = make(key_dim=4)
    with pytest.raises(memodb.InvalidKeyError) as caught:
        db.put(VALUES, keys)
    assert isinstance(caught.value, ValueError)
    assert len(db) == 0
    assert db.put(VALUES, KEYS).tolist() == [0, 1, 2]


SEARCHABLE_ROWS = ("one row short", "one row more")  # any number of rows may be searched


@pytest.mark.parametrize("name", [name for name in BAD_KEYS if name not in SEARCHABLE_ROWS])
def test_search_refuses_bad_keys(make, name):
    db = make(key_dim=4)
    db.put(VALUES, KEYS)
    with pytest.raises(memodb.InvalidKeyError):
        db.search(BAD_KEYS[name])


def test_the_message_names_the_row_and_the_widths(make):
    db = make(key_dim=4)
    bad = KEYS.copy()
    bad[1, 2] = np.nan
    with pytest.raises(memodb.InvalidKeyError, match="1"):
        db.put(VALUES, bad)
    with pytest.raises(memodb.InvalidKeyError, match=r"4.*5|5.*4"):
        db.put(VALUES, np.zeros((3, 5), np.float32))


@pytest.mark.parametrize(
    "convert",
    [
        lambda keys: keys,
        lambda keys: keys.astype(np.float64),
        lambda keys: keys.astype(np.float16),
        lambda keys: keys.astype(np.int32),
        lambda keys: keys.tolist(),
        np.asfortranarray,
        lambda keys: np.repeat(keys, 2, axis=1)[:, ::2],
        lambda keys: pytest.importorskip("torch").from_numpy(keys.copy()),
    ],
    ids=["float32", "float64", "float16", "integers", "lists", "fortran", "strided", "torch"],
)
def test_keys_may_be_given_in_any_way(make, convert):
    db = make(key_dim=4)
    ids = db.put(VALUES, convert(KEYS))
    found = db.search(convert(KEYS), k=1)
    assert found.ids[:, 0].tolist() == ids.tolist()
    assert found.distances.tolist() == [[0.0], [0.0], [0.0]]


def test_keys_in_a_store_without_keys(make):
    """Keys that nothing could ever find are a mistake, and so is searching for them."""
    db = make()
    with pytest.raises(memodb.InvalidKeyError):
        db.put(VALUES, KEYS)
    with pytest.raises(memodb.InvalidKeyError):
        db.search(KEYS)
    assert db.put(VALUES).tolist() == [0, 1, 2]


def test_one_namespace_for_all_rows_or_one_a_row(make):
    db = make(key_dim=4)
    db.put(VALUES, KEYS, namespace="layer=0/len=8")
    db.put(VALUES, KEYS, namespace=["layer=0/len=9", "layer=0/len=8", ""])
    assert db.ids("layer=0/len=8").tolist() == [0, 1, 2, 4]
    assert db.ids("layer=0/len=9").tolist() == [3]
    assert db.ids("").tolist() == [5]
    found = db.search(KEYS, k=1, namespace=["layer=0/len=9", "", "layer=0/len=8"])
    assert found.ids[:, 0].tolist() == [3, 5, 2]
    assert found.distances[:, 0].tolist() == [0.0, 2.0, 0.0]


@pytest.mark.parametrize("rows", [["a", "b"], ["a", "b", "c", "d"], []])
def test_a_wrong_number_of_namespaces_is_refused(make, rows):
    db = make(key_dim=4)
    with pytest.raises(memodb.InvalidOptionError):
        db.put(VALUES, KEYS, namespace=rows)
    assert len(db) == 0
    db.put(VALUES, KEYS)
    with pytest.raises(memodb.InvalidOptionError):
        db.search(KEYS, namespace=rows)


@pytest.mark.parametrize("name", [None, 3, b"bytes", ["a", None, "b"], ["a", 2, "b"]], ids=repr)
def test_what_is_no_namespace_is_refused(make, name):
    db = make(key_dim=4)
    with pytest.raises(memodb.InvalidOptionError):
        db.put(VALUES, KEYS, namespace=name)
    assert len(db) == 0


@pytest.mark.parametrize(
    "name", ["", " ", "layer=3/len=27", "../../etc/passwd", "ünïcødé 🗝", "a" * 300, "nul\0inside", "new\nline"]
)
def test_any_text_is_a_namespace(make, path, name):
    """A namespace is a name, never a path: whatever it says, nothing appears outside the store."""
    db = make(key_dim=4)
    outside = sorted(path.parent.iterdir())
    db.put(VALUES, KEYS, namespace=name)
    assert db.ids(name).tolist() == [0, 1, 2]
    assert db.search(KEYS[1:2], namespace=name).ids.tolist() == [[1]]
    db.close()
    with memodb.MemoDB.open(path) as again:
        assert again.ids(name).tolist() == [0, 1, 2]
        assert again.search(KEYS[2:], namespace=name).ids.tolist() == [[2]]
    assert sorted(path.parent.iterdir()) == outside


def test_an_unknown_namespace_finds_nothing(make):
    db = make(key_dim=4)
    db.put(VALUES, KEYS)
    found = db.search(KEYS, k=2, namespace="never used")
    assert found.ids.tolist() == [[-1, -1]] * 3
    assert found.distances.tolist() == [[np.inf, np.inf]] * 3


def test_ten_thousand_namespaces(make, path):
    """One record each, put in one call and found in one call, also after reopening; no file or table for each."""
    n = 10_000
    names = [f"layer={i % 12}/len={i}" for i in range(n)]
    values = np.arange(n, dtype=np.int32).reshape(n, 1)
    keys = np.random.default_rng(0).standard_normal((n, 4)).astype(np.float32)
    db = make(shape=(1,), dtype="int32", key_dim=4)
    ids = db.put(values, keys, namespace=names)
    db.close()
    with memodb.MemoDB.open(path) as again:
        found = again.search(keys, k=2, namespace=names)
        assert np.array_equal(found.ids[:, 0], ids)
        assert np.all(found.ids[:, 1] == -1)
        assert np.all(found.distances[:, 0] < 1e-5)
        assert_same_bytes(again.multiget(found.ids[:, 0]), values)
        assert again.ids(names[777]).tolist() == [777]
    assert sum(1 for _ in path.rglob("*")) < 1000


def test_keys_of_records_that_are_deleted_meanwhile(make, path, monkeypatch):
    """Compaction takes keys of the deleted away: between two looks of a reader that is no damage."""
    db = make(key_dim=4)
    db.put(VALUES, KEYS)
    with memodb.MemoDB.open(path) as reader:
        committed = reader._catalog.committed

        def delete_then(ids, transaction=None):
            monkeypatch.undo()
            rows = committed(ids, transaction)
            db.delete([1])
            db.compact()
            return rows

        monkeypatch.setattr(reader._catalog, "committed", delete_then)
        with pytest.raises(memodb.RecordNotFoundError, match=r"1 \(deleted\)"):
            reader.keys([0, 1, 2])
        assert np.array_equal(reader.keys([2, 0]), KEYS[[2, 0]])
