"""What put accepts, what it refuses, and that a refusal changes nothing."""

from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest

import memodb
from memodb.testing import DTYPES, assert_same_bytes, random_records

VALUES = random_records(4, (2, 1024), "float32")


class Dlpack:
    """A tensor of a library that numpy has never heard of: DLPack and nothing else."""

    def __init__(self, array):
        self._array = array

    def __dlpack__(self, **options):
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self._array.__dlpack_device__()


class ArrayOnly:
    """An object that offers ``__array__`` and nothing else."""

    def __init__(self, array):
        self._array = array

    def __array__(self, dtype=None, copy=None):
        return self._array


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (16, 512)], ids=str)
def test_every_dtype_and_shape(make, path, dtype, shape):
    values = random_records(5, shape, dtype)
    db = make(shape=shape, dtype=dtype)
    ids = db.put(values)
    assert_same_bytes(db.multiget(ids[::-1]), values[::-1])
    db.close()
    with memodb.MemoDB.open(path) as again:
        assert again.spec.dtype == values.dtype
        assert again.spec.dtype_name == dtype
        with again.multiget_mapped(ids) as batch:
            assert_same_bytes(batch.numpy(), values)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (np.float16, "float16"),
        (np.dtype(">f4"), "float32"),
        (float, "float64"),
        (ml_dtypes.bfloat16, "bfloat16"),
        (np.dtype(ml_dtypes.float8_e5m2), "float8_e5m2"),
        ("f2", "float16"),
    ],
)
def test_dtype_may_be_given_in_any_way(make, given, name):
    assert make(dtype=given).spec.dtype_name == name


def test_nan_payloads_and_signed_zeros_survive(make):
    bits = np.array([[0x7FC00000, 0x7F800001, 0xFFC12345, 0x80000000]], np.uint32)
    db = make(shape=(4,), dtype="float32")
    ids = db.put(bits.view(np.float32))
    assert db.multiget(ids).view(np.uint32).tolist() == bits.tolist()


LAYOUTS = {
    "contiguous": VALUES,
    "fortran": np.asfortranarray(VALUES),
    "reversed": VALUES[::-1].copy()[::-1],
    "every second record": np.repeat(VALUES, 2, axis=0)[::2],
    "inner stride": np.repeat(VALUES, 2, axis=2)[:, :, ::2],
    "transposed": np.ascontiguousarray(VALUES.transpose(2, 1, 0)).transpose(2, 1, 0),
    "broadcast": np.broadcast_to(VALUES[:1], VALUES.shape),
    "big endian": VALUES.byteswap().view(">f4"),
    "read only": np.frombuffer(VALUES.tobytes(), np.float32).reshape(VALUES.shape),
    "array protocol": ArrayOnly(VALUES),
    "dlpack only": Dlpack(VALUES),
}


@pytest.mark.parametrize("values", LAYOUTS.values(), ids=LAYOUTS)
def test_any_layout_is_stored_as_it_reads(make, values):
    expected = LAYOUTS["broadcast"] if values is LAYOUTS["broadcast"] else VALUES
    db = make()
    assert_same_bytes(db.multiget(db.put(values)), np.ascontiguousarray(expected))
    assert db.verify() == []


def test_the_caller_may_reuse_the_array(make):
    values = VALUES.copy()
    db = make()
    ids = db.put(values)
    values[:] = 0
    assert_same_bytes(db.multiget(ids), VALUES)


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_tensors(make, dtype):
    torch = pytest.importorskip("torch")
    values = random_records(3, (2, 64), dtype)
    raw = torch.from_numpy(values.reshape(3, -1).view(np.uint8))
    tensor = raw.view(getattr(torch, dtype)).reshape(3, 2, 64)
    db = make(shape=(2, 64), dtype=dtype)
    assert_same_bytes(db.multiget(db.put(tensor)), values)


def test_torch_tensors_of_any_kind(make):
    """Strided, requiring a gradient, conjugated or negated lazily: what is stored is what the tensor shows."""
    torch = pytest.importorskip("torch")
    base = torch.arange(24).to(torch.complex64).reshape(2, 4, 3)
    db = make(shape=(3, 4), dtype="complex64")
    for tensor in (base.transpose(1, 2), base.transpose(1, 2).requires_grad_(), (base * 1j).conj().transpose(1, 2)):
        assert_same_bytes(db.multiget(db.put(tensor)), tensor.detach().resolve_conj().contiguous().numpy())


def test_torch_dtype_at_creation(make):
    torch = pytest.importorskip("torch")
    assert make(dtype=torch.bfloat16).spec.dtype_name == "bfloat16"


WRONG = {
    "other dtype": np.zeros((1, 2, 1024), np.float64),
    "same width": VALUES.view(np.int32),
    "integers": np.zeros((1, 2, 1024), np.int64),
    "one record, no batch": VALUES[0],
    "too few columns": VALUES[:, :, :-1],
    "transposed shape": np.zeros((2, 1024, 2), np.float32),
    "one dimension more": VALUES[None],
    "flat": VALUES.reshape(-1),
    "objects": np.full((1, 2, 1024), None),
    "text": "records",
    "none": None,
    "number": 3.5,
    "ragged": [[1.0], [1.0, 2.0]],
    "dict": {"a": 1},
}


@pytest.mark.parametrize("values", WRONG.values(), ids=WRONG)
def test_wrong_values_are_refused_and_change_nothing(make, values):
    db = make()
    ids = db.put(VALUES)
    with pytest.raises(memodb.InvalidRecordError) as caught:
        db.put(values)
    assert isinstance(caught.value, ValueError)
    assert db.ids().tolist() == ids.tolist()
    assert_same_bytes(db.multiget(ids), VALUES)
    assert db.put(VALUES[:1]).tolist() == [4]


def test_the_message_names_both_shapes_and_dtypes(make):
    db = make()
    with pytest.raises(memodb.InvalidRecordError, match=r"2, 1024.*3, 1024|3, 1024.*2, 1024"):
        db.put(np.zeros((1, 3, 1024), np.float32))
    with pytest.raises(memodb.InvalidRecordError, match=r"float32.*float64|float64.*float32"):
        db.put(np.zeros((1, 2, 1024), np.float64))


def test_many_batches_of_many_sizes(make):
    """Records that share segments and pages in every way are kept apart."""
    values = random_records(300, (7, 331), "uint8")
    db = make(shape=(7, 331), dtype="uint8", segment_bytes=100_000)
    rng = np.random.default_rng(0)
    cuts = [0, *sorted(rng.choice(np.arange(1, 300), 40, replace=False)), 300]
    ids = np.concatenate([db.put(values[a:b]) for a, b in pairwise(cuts)])
    wanted = rng.permutation(300)
    assert_same_bytes(db.multiget(ids[wanted]), values[wanted])
    with db.multiget_mapped(ids[wanted]) as batch:
        assert_same_bytes(batch.numpy(), values[wanted])
    assert db.verify() == []


WRITTEN_AS_LISTS = {
    "int32": ([[1.7, 2.0]], [[2**31, 0]], [[None, 1]], [["1", "2"]], [[1j, 0]]),
    "uint8": ([[-1, 0]], [[256, 0]]),
    "bool": ([[2, 0]], [[0.5, 1]]),
    "float16": ([[1e6, 0]], [["1", "nan"]], [[1j, 0]]),
    "float32": ([[1e300, 0]], [[None, 1]]),
    "bfloat16": ([[1e300, 0]],),
}


@pytest.mark.parametrize(
    ("dtype", "values"), [(dtype, values) for dtype, cases in WRITTEN_AS_LISTS.items() for values in cases], ids=str
)
def test_numbers_written_as_lists_do_not_change(make, dtype, values):
    db = make(shape=(2,), dtype=dtype)
    with pytest.raises(memodb.InvalidRecordError):
        db.put(values)
    assert len(db) == 0


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint64", "float16", "bfloat16", "complex64"])
def test_numbers_written_as_lists_are_stored(make, dtype):
    db = make(shape=(2,), dtype=dtype)
    ids = db.put([[1, 0], [True, False]])
    assert db.multiget(ids).astype(np.complex64).tolist() == [[1, 0], [1, 0]]


def test_a_masked_array_is_refused(make):
    db = make()
    with pytest.raises(memodb.InvalidRecordError, match="mask"):
        db.put(np.ma.masked_array(VALUES, VALUES > 0))
    assert len(db) == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_values_that_offer_dlpack_and_numpy_has_no_dtype_for(make, dtype):
    torch = pytest.importorskip("torch")
    values = random_records(4, (2, 8), dtype)
    integers = torch.from_numpy(values.view(f"u{values.dtype.itemsize}").copy())
    db = make(shape=(2, 8), dtype=dtype)
    ids = db.put(Dlpack(integers.view(getattr(torch, dtype))))
    assert_same_bytes(db.multiget(ids), values)
