"""Odd but lawful input comes back bit for bit from every backend; what is unlawful changes nothing."""

import ml_dtypes
import numpy as np
import pytest
from conftest import SHARED

import memodb
from memodb.testing import assert_same_bytes

BACKENDS = [*SHARED, "memory"]
FLOATS = ["float16", "float32", "float64", "bfloat16", "float8_e4m3fn", "float8_e5m2", "complex64"]
WIDTH = 2048


@pytest.fixture
def create(path):
    """Return a function that makes a store on a backend."""

    def made(backend, **settings):
        return memodb.MemoDB.create(path, backend=backend, **{**SHARED.get(backend, {}), **settings})

    return made


def patterns(dtype):
    """Return records [n, WIDTH] of bit patterns that arithmetic, comparison or compression might change."""
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    item = 4 if kind.kind == "c" else kind.itemsize
    one = np.dtype(f"u{item}").type(1)
    ones = (1 << 8 * item) - 1
    sign = 1 << 8 * item - 1
    exponent = {1: 0x78 if "e4m3" in dtype else 0x7C, 2: 0x7F80 if dtype == "bfloat16" else 0x7C00}
    infinite = {**exponent, 4: 0x7F800000, 8: 0x7FF0000000000000}[item]
    words = [
        0,
        sign,  # -0.0: equal to 0, and not the same
        1,  # the smallest subnormal
        sign | 1,
        infinite,
        sign | infinite,
        infinite | 1,  # a signalling NaN
        sign | infinite | 1,
        infinite - 1,
        ones,  # a NaN with every bit set
        ones ^ sign,
    ]
    units = WIDTH * kind.itemsize // item
    whole = [np.full(units, word, one.dtype) for word in words]
    mixed = np.resize(np.array(words, one.dtype), units)
    return np.stack([*whole, mixed]).view(kind)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_bit_pattern_comes_back(create, backend, dtype):
    values = patterns(dtype)
    with create(backend, shape=WIDTH, dtype=dtype) as db:
        ids = db.put(values)
        assert_same_bytes(db.multiget(ids), values)
        with db.multiget_mapped(ids[::-1]) as batch:
            assert_same_bytes(batch.numpy(), values[::-1])
        assert db.verify() == []


def layouts():
    base = np.arange(6 * 3 * 700, dtype="float32").reshape(6, 3, 700)
    wide = np.repeat(np.repeat(base, 2, axis=2), 2, axis=1)
    return {
        "every other element": wide[:, ::2, ::2],
        "backwards": base[::-1, ::-1, ::-1],
        "Fortran order": np.asfortranarray(base),
        "axes exchanged": np.ascontiguousarray(base.transpose(2, 1, 0)).transpose(2, 1, 0),
        "one record for all": np.broadcast_to(base[0], base.shape),
        "one element for all": np.broadcast_to(np.float32(3.5), base.shape),
        "read-only": np.frombuffer(base.tobytes(), "float32").reshape(base.shape),
        "not aligned": np.frombuffer(b"x" + base.tobytes(), "u1")[1:].view("float32").reshape(base.shape),
        "other byte order": base.astype(">f4"),
    }


@pytest.mark.parametrize("name", layouts())
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_layout_is_stored_as_it_reads(create, backend, name):
    values = layouts()[name]
    with create(backend, shape=(3, 700), dtype="float32") as db:
        ids = db.put(values)
        assert np.array_equal(db.multiget(ids), values)
        assert db.verify() == []


def test_keys_of_all_sizes_are_searched(create):
    """-0.0 is where 0 is; keys whose distances a float32 cannot hold are refused, the largest others are found."""
    most = np.float32(6e18)
    keys = np.array([[0, 0], [-0.0, 5], [most, most], [-most, most], [1e-45, 9]], np.float32)
    with create("arena", shape=4, dtype="int8", key_dim=2) as db:
        ids = db.put(np.zeros((5, 4), "int8"), keys=keys)
        found = db.search([[-0.0, 0.0], [0.0, 5.0], [1e-45, 9.0]], k=1)
        assert found.ids[:, 0].tolist() == [ids[0], ids[1], ids[4]]
        assert found.distances[:, 0].tolist() == [0, 0, 0]
        assert_same_bytes(db.keys(ids), keys)
        far = db.search([[most, -most]], k=9)
        assert set(far.ids[0].tolist()) == {*ids.tolist(), -1}
        assert np.isfinite(far.distances[0, :5]).all()
        for use in (db.search, lambda keys: db.put(np.zeros((1, 4), "int8"), keys=keys)):
            with pytest.raises(memodb.InvalidKeyError, match="overflow"):
                use(np.full((1, 2), np.finfo(np.float32).max))


@pytest.mark.parametrize("k", [6, 100, 5000])
def test_more_neighbours_than_records(create, k):
    with create("arena", shape=4, dtype="int8", key_dim=2) as db:
        ids = db.put(np.zeros((5, 4), "int8"), keys=np.arange(10, dtype="float32").reshape(5, 2))
        found = db.search([[0, 1]], k=k)
        assert found.ids.shape == found.distances.shape == (1, k)
        assert found.ids[0, :5].tolist() == ids.tolist()
        assert (found.ids[0, 5:] == -1).all()
        assert np.isinf(found.distances[0, 5:]).all()


BAD_IDS = [
    [-1],
    [2**63],
    [2**64],
    [10**30],
    [True],
    [False, 1],
    np.array([True]),
    [1.0],
    [np.float64(1)],
    np.array([1.0]),
    ["1"],
    "1",
    b"1",
    [None],
    None,
    [[1], [2, 3]],
    [object()],
    np.array([1], object) + 0.5,
    np.array([2**63], np.uint64),
    np.array(["1"]),
    np.array([1], "datetime64[s]"),
    [1 + 0j],
    {1: 2},
]


@pytest.mark.parametrize("ids", BAD_IDS, ids=repr)
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_no_id_is_refused_by_every_verb(create, backend, ids):
    with create(backend, shape=4, dtype="int8", key_dim=2) as db:
        db.put(np.zeros((3, 4), "int8"), keys=np.zeros((3, 2)))
        for verb in (db.multiget, db.multiget_mapped, db.delete, db.keys, db.namespace_of, db.prefetch):
            with pytest.raises(memodb.InvalidIdError):
                verb(ids)
        assert db.ids().tolist() == [0, 1, 2]


@pytest.mark.parametrize("dtype", ["i1", "u1", "i2", ">i4", "u4", "<i8", "u8"])
def test_ids_of_every_integer_type(create, dtype):
    with create("arena", shape=4, dtype="int8") as db:
        db.put(np.arange(12, dtype="int8").reshape(3, 4))
        assert db.multiget(np.array([2, 0], dtype))[:, 0].tolist() == [8, 0]


@pytest.mark.parametrize(
    "shape",
    [(0,), (4, 0), (-1,), (2**40, 2**40), (2**63,), (10**30,), (1,) * 65, (True,), (1.5,), "4", (None,), ((1,),)],
    ids=lambda shape: repr(shape)[:30],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_shape_that_no_record_can_have_makes_nothing(create, path, backend, shape):
    with pytest.raises(memodb.MemoDBError) as caught:
        create(backend, shape=shape, dtype="float32")
    assert isinstance(caught.value, ValueError)
    assert not path.exists()


@pytest.mark.parametrize("backend", BACKENDS)
def test_records_of_33_dimensions(create, backend):
    shape = (1,) * 31 + (2, 3)
    values = np.arange(12, dtype="int16").reshape(2, *shape)
    with create(backend, shape=shape, dtype="int16") as db:
        assert np.array_equal(db.multiget(db.put(values)), values)
