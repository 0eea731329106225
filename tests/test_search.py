"""Search: exact while small, only what lives, k neighbours while there are k, any faiss index."""

import numpy as np
import pytest

import memodb

RNG = np.random.default_rng(0)


def records(n):
    return np.arange(n, dtype=np.int32).reshape(n, 1)


@pytest.fixture
def store(make):
    """Return a function that makes a store of keyed one-number records."""

    def create(keys, **settings):
        db = make(**{"shape": (1,), "dtype": "int32", "key_dim": keys.shape[1], **settings})
        db.put(records(len(keys)), keys)
        return db

    return create


def exact(keys, queries, k):
    """Return ids and squared L2 distances of the k nearest, computed the plain way in float64."""
    distances = ((queries[:, None].astype(np.float64) - keys[None]) ** 2).sum(-1)
    order = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return order, np.take_along_axis(distances, order, axis=1)


@pytest.mark.parametrize("k", [1, 5, 50])
def test_small_stores_are_searched_exactly(store, k):
    keys = RNG.standard_normal((200, 16)).astype(np.float32)
    queries = RNG.standard_normal((40, 16)).astype(np.float32)
    found = store(keys).search(queries, k)
    ids, distances = exact(keys, queries, k)
    assert found.ids.dtype == np.int64
    assert found.distances.dtype == np.float32
    assert found.ids.shape == found.distances.shape == (40, k)
    assert np.array_equal(found.ids, ids)
    np.testing.assert_allclose(found.distances, distances, rtol=1e-4, atol=1e-4)


def test_distances_are_squared_l2(store):
    found = store(np.array([[3, 4]], np.float32)).search(np.zeros((1, 2), np.float32))
    assert found.distances.tolist() == [[25.0]]


def test_fewer_records_than_k(store):
    found = store(np.array([[0, 0], [1, 0]], np.float32)).search(np.zeros((1, 2), np.float32), k=4)
    assert found.ids.tolist() == [[0, 1, -1, -1]]
    assert found.distances.tolist() == [[0.0, 1.0, np.inf, np.inf]]


def test_an_empty_store_finds_nothing(make):
    db = make(key_dim=2)
    found = db.search(np.zeros((3, 2), np.float32), k=2)
    assert found.ids.tolist() == [[-1, -1]] * 3
    assert found.distances.tolist() == [[np.inf, np.inf]] * 3


def test_no_queries(store):
    found = store(np.zeros((2, 2), np.float32)).search(np.empty((0, 2), np.float32), k=3)
    assert found.ids.shape == found.distances.shape == (0, 3)


@pytest.mark.parametrize("k", [0, -1, 1.5, True, "1", None])
def test_bad_k(store, k):
    with pytest.raises(memodb.InvalidOptionError):
        store(np.zeros((2, 2), np.float32)).search(np.zeros((1, 2), np.float32), k)


def test_max_distance_leaves_out_what_is_farther(store):
    db = store(np.array([[1, 0], [2, 0], [3, 0]], np.float32))
    origin = np.zeros((1, 2), np.float32)
    assert db.search(origin, k=3, max_distance=4.0).ids.tolist() == [[0, 1, -1]], "the bound itself is within"
    assert db.search(origin, k=3, max_distance=3.9).distances.tolist() == [[1.0, np.inf, np.inf]]
    assert db.search(origin, k=3, max_distance=0.0).ids.tolist() == [[-1, -1, -1]]
    assert db.search(origin, k=3, max_distance=np.inf).ids.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("bound", [float("nan"), -1.0, "near", "1", True])
def test_bad_max_distance(store, bound):
    with pytest.raises(memodb.InvalidOptionError):
        store(np.zeros((2, 2), np.float32)).search(np.zeros((1, 2), np.float32), max_distance=bound)


FACTORIES = ["Flat", "HNSW32", "IVF16,Flat", "IVF8,PQ4", "auto"]


@pytest.mark.parametrize("index", FACTORIES)
def test_any_factory_finds_what_was_put(store, path, index):
    """Recall against the exact answer, before and after reopening; quantized indexes only come near."""
    centres = RNG.standard_normal((32, 8)).astype(np.float32) * 8
    keys = (centres[RNG.integers(0, 32, 3000)] + RNG.standard_normal((3000, 8))).astype(np.float32)
    queries = keys[:100]
    ids, distances = exact(keys, queries, 10)
    db = store(keys, index=index)
    found = [db.search(queries, 10)]
    db.close()
    with memodb.MemoDB.open(path) as again:
        found.append(again.search(queries, 10))
    for result in found:
        recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(result.ids.tolist(), ids.tolist(), strict=True)])
        assert recall > (0.2 if "PQ" in index else 0.6 if "IVF" in index else 0.9)
        assert np.all(np.diff(result.distances, axis=1) >= 0), "nearest first"
    if index == "Flat":
        assert np.array_equal(found[0].ids, ids)
        np.testing.assert_allclose(found[0].distances, distances, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("index", ["IVF1024,PQ32", "IVF64,Flat", "PQ8", "auto", "HNSW32"])
def test_exact_until_it_can_be_trained(store, index):
    """A factory that needs thousands of keys to train answers exactly before it has them."""
    keys = RNG.standard_normal((20, 64)).astype(np.float32)
    db = store(keys, index=index)
    found = db.search(keys + 0.01, k=3)
    assert np.array_equal(found.ids, exact(keys, keys + 0.01, 3)[0])


@pytest.mark.parametrize("index", FACTORIES)
def test_deleted_records_never_come_back(store, path, index):
    """And the k nearest live ones are found behind them, however many of the nearest are deleted."""
    keys = RNG.standard_normal((2000, 8)).astype(np.float32)
    db = store(keys, index=index)
    query = keys[:1]
    nearest = exact(keys, query, 2000)[0][0]
    db.search(query, 5)  # the index is built before the deletion
    gone = np.sort(nearest[:1500])
    db.delete(gone)
    alive = set(range(2000)) - set(gone.tolist())

    def check(handle):
        ids = handle.search(query, 20).ids[0].tolist()
        assert set(ids) <= alive
        if "IVF" not in index:  # an inverted file looks into a few of its lists only
            assert len(set(ids)) == 20, "k neighbours while there are k"
        everything = handle.search(query, 600).ids[0]
        assert set(everything[everything >= 0].tolist()) <= alive
        return ids

    first = check(db)
    if index in ("Flat",):
        assert first == nearest[1500:1520].tolist()
    db.compact()
    check(db)
    db.close()
    with memodb.MemoDB.open(path) as again:
        check(again)


def test_all_live_neighbours_are_found_while_there_are_k(store):
    """HNSW reaches its neighbours through others: even when nearly all of those are deleted, the live ones are
    found."""
    keys = RNG.standard_normal((3000, 8)).astype(np.float32)
    db = store(keys, index="HNSW32")
    db.search(keys[:1], 1)
    live = [5, 17, 1000, 2999]
    db.delete([i for i in range(3000) if i not in live])
    found = db.search(RNG.standard_normal((50, 8)).astype(np.float32), k=4)
    assert [sorted(row) for row in found.ids.tolist()] == [live] * 50


def test_put_after_search_is_found(store):
    db = store(RNG.standard_normal((100, 4)).astype(np.float32))
    db.search(np.zeros((1, 4), np.float32))
    late = np.full((1, 4), 50, np.float32)
    (new,) = db.put(records(1), late).tolist()
    assert db.search(late).ids.tolist() == [[new]]


def test_reindex_changes_the_factory_and_keeps_the_answers(store, path):
    keys = RNG.standard_normal((500, 8)).astype(np.float32)
    db = store(keys, index="Flat")
    before = db.search(keys[:50], 5)
    db.reindex("HNSW32")
    assert db.index_factory == "HNSW32"
    after = db.search(keys[:50], 5)
    assert np.mean(before.ids == after.ids) > 0.95
    db.reindex()
    assert db.index_factory == "HNSW32"
    db.close()
    with memodb.MemoDB.open(path) as again:
        assert again.index_factory == "HNSW32"
        assert np.mean(again.search(keys[:50], 5).ids == before.ids) > 0.95


def test_reindex_with_nonsense_is_refused_and_harmless(store):
    keys = RNG.standard_normal((50, 8)).astype(np.float32)
    db = store(keys, index="Flat")
    with pytest.raises(memodb.InvalidOptionError):
        db.reindex("NoSuchIndex17")
    assert db.index_factory == "Flat"
    assert db.search(keys[3:4]).ids.tolist() == [[3]]


def test_auto_stays_near_exact_when_it_grows(store):
    """Beyond what is searched exactly, put after put."""
    keys = RNG.standard_normal((20_000, 8)).astype(np.float32)
    db = store(keys[:10])
    for start in range(10, 20_000, 4_998):
        stop = min(start + 4_998, 20_000)
        db.put(np.zeros((stop - start, 1), np.int32), keys[start:stop])
        queries = keys[RNG.integers(0, stop, 50)]
        found = db.search(queries, 1)
        assert np.mean(found.ids == exact(keys[:stop], queries, 1)[0]) > 0.9


#: So many keys that an index is worth a file.
PERSISTED = 12_000


@pytest.mark.parametrize("harm", ["remove", "truncate", "flip", "empty", "garbage"])
def test_a_damaged_index_is_rebuilt(store, path, harm):
    """The index is derived data: whatever happens to its files, the answers are those of the catalog's keys."""
    keys = RNG.standard_normal((PERSISTED, 8)).astype(np.float32)
    db = store(keys, index="HNSW8")
    expected = db.search(keys[:20], 3)
    db.close()
    files = [file for file in path.rglob("*") if file.is_file() and "index" in file.relative_to(path).as_posix()]
    assert files, "closing wrote no index file: there is nothing to damage"
    for file in files:
        data = bytearray(file.read_bytes())
        if harm == "remove":
            file.unlink()
        elif harm == "truncate":
            file.write_bytes(data[: len(data) // 2])
        elif harm == "empty":
            file.write_bytes(b"")
        elif harm == "garbage":
            file.write_bytes(bytes(len(data)))
        else:
            for at in (8, len(data) // 3, len(data) // 2, len(data) - 1):
                data[at] ^= 0xFF
            file.write_bytes(data)
    for mode in ("r", "r+"):
        with memodb.MemoDB.open(path, mode=mode) as again:
            found = again.search(keys[:20], 3)
            assert np.mean(found.ids == expected.ids) > 0.9
            assert found.ids[:, 0].tolist() == list(range(20))
            assert again.verify() == []


def test_a_stale_index_is_brought_up_to_date(store, path):
    """Index files of an earlier state, put back under a later catalog: new records are found, deleted ones are not."""
    keys = RNG.standard_normal((PERSISTED, 8)).astype(np.float32)
    db = store(keys, index="HNSW8")
    db.search(keys[:1])
    db.close()
    old = {f: f.read_bytes() for f in path.rglob("*") if f.is_file() and "index" in f.relative_to(path).as_posix()}
    assert old
    late = keys[:100] + 100
    with memodb.MemoDB.open(path, mode="r+") as again:
        new = again.put(records(100), late)
        again.delete([1, 2])
        again.search(keys[:1])
    for file, data in old.items():
        file.write_bytes(data)
    with memodb.MemoDB.open(path) as again:
        assert again.search(late).ids[:, 0].tolist() == new.tolist()
        assert not {1, 2} & set(again.search(keys[:10], 10).ids.ravel().tolist())


def test_another_store_s_index_is_not_believed(store, path, make, shm):
    """Two stores of the same shape: the index files of one, put into the other, do not change what it answers."""
    keys = RNG.standard_normal((PERSISTED, 8)).astype(np.float32)
    db = store(keys, index="HNSW8")
    db.search(keys[:1])
    db.close()
    other = make(shm / "other", shape=(1,), dtype="int32", key_dim=8, index="HNSW8")
    other.put(records(PERSISTED), keys[::-1].copy())
    other.search(keys[:1])
    other.close()
    for file in (shm / "other").rglob("*"):
        if file.is_file() and "index" in file.relative_to(shm / "other").as_posix():
            (path / file.relative_to(shm / "other")).write_bytes(file.read_bytes())
    with memodb.MemoDB.open(path) as again:
        assert again.search(keys[:20]).ids[:, 0].tolist() == list(range(20))


def test_a_saved_index_that_knows_too_much_is_built_again(store, path):
    """The catalog was put back to an earlier day, and went on differently: the saved index holds ids it never gave."""
    keys = RNG.standard_normal((PERSISTED + 20, 8)).astype(np.float32)
    db = store(keys[:PERSISTED], index="HNSW8")
    db.close()
    (catalog,) = path.rglob("data.mdb")
    earlier = catalog.read_bytes()
    with memodb.MemoDB.open(path, mode="r+") as db:
        db.put(records(10), keys[PERSISTED : PERSISTED + 10])
        db.reindex()
        db.search(keys[:1])
    catalog.write_bytes(earlier)
    with memodb.MemoDB.open(path, mode="r+") as db:
        for i in range(10, 14):  # as many entries as the index has seen, but other ones
            db.put(records(1), keys[PERSISTED + i][None])
        found = db.search(keys[PERSISTED : PERSISTED + 14], k=3)
        assert (found.ids >= 0).all()
        assert (found.ids < PERSISTED + 4).all()
        assert (found.distances[:10, 0] > 0).all(), "keys of the other history are not in this store"
        exact = db.search(keys[PERSISTED + 10 : PERSISTED + 14])
        assert exact.ids[:, 0].tolist() == list(range(PERSISTED, PERSISTED + 4))
        assert (exact.distances == 0).all()


@pytest.mark.parametrize(
    "factory",
    ["HNSW0", "HNSW1", "IVF0,Flat", "IDMap,Flat", "NSG32", "L2norm,Flat", "LSH", "ITQ4,LSH", "Flat," * 500, "nothing"],
    ids=lambda factory: factory[:20],
)
def test_a_factory_that_cannot_serve_is_refused_by_name(path, make, factory):
    """Some of these kill the process at their first search, some measure another distance."""
    with pytest.raises(memodb.InvalidOptionError) as caught:
        memodb.MemoDB.create(path, shape=(2, 1024), dtype="float32", key_dim=8, index=factory)
    assert len(str(caught.value)) < 400
    assert not path.exists()
    db = make(key_dim=8)
    with pytest.raises(memodb.InvalidOptionError):
        db.reindex(factory)
    assert db.index_factory == "auto"


def test_keys_whose_distances_would_overflow_are_refused(make):
    db = make(key_dim=4)
    with pytest.raises(memodb.InvalidKeyError, match="too large: row 1"):
        db.put(np.zeros((2, 2, 1024), np.float32), np.array([[0] * 4, [1e20] * 4]))
    assert len(db) == 0
    far = np.float32(9e18)
    ids = db.put(np.zeros((2, 2, 1024), np.float32), np.diag([far] * 4)[:2])
    found = db.search(-np.diag([far] * 4)[:2], 2)
    assert sorted(found.ids[0].tolist()) == ids.tolist()
    assert np.isfinite(found.distances).all()


def test_an_index_of_another_history_with_as_many_entries(store, path, shm):
    """A copy of the catalog goes its own way; the original's saved index lies beside it: same number, other keys."""
    import shutil

    keys = RNG.standard_normal((PERSISTED + 40, 8)).astype(np.float32)
    db = store(keys[:PERSISTED], index="HNSW8")
    db.close()
    shutil.copytree(path, shm / "copy")
    with memodb.MemoDB.open(path, mode="r+") as db:
        db.put(records(20), keys[PERSISTED : PERSISTED + 20])
        db.reindex()
        db.search(keys[:1])
    with memodb.MemoDB.open(shm / "copy", mode="r+") as db:
        db.put(records(20), keys[PERSISTED + 20 :])
        db.search(keys[:1])
    shutil.rmtree(shm / "copy" / "index", ignore_errors=True)
    shutil.copytree(path / "index", shm / "copy" / "index")
    with memodb.MemoDB.open(shm / "copy") as db:
        found = db.search(keys[PERSISTED + 20 :])
        assert found.ids[:, 0].tolist() == list(range(PERSISTED, PERSISTED + 20))
        assert (found.distances == 0).all()


def test_a_reader_follows_a_new_factory(store, path):
    db = store(RNG.standard_normal((50, 8)).astype(np.float32), index="Flat")
    with memodb.MemoDB.open(path) as reader:
        reader.search(np.zeros((1, 8)))
        db.reindex("HNSW8")
        assert reader.index_factory == reader.stats()["index"] == "HNSW8"
        assert (reader.search(np.zeros((1, 8)), 5).ids >= 0).all()


def test_no_keys_at_all(store):
    db = store(RNG.standard_normal((5, 8)).astype(np.float32))
    for namespace in ("", []):
        assert db.search(np.zeros((0, 8)), 3, namespace=namespace).ids.shape == (0, 3)
