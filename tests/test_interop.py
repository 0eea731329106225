"""A batch as numpy array, torch tensor and DLPack capsule, both ways, for every dtype."""

import numpy as np
import pytest

from memodb.testing import DTYPES, assert_same_bytes, random_records

SHAPE = (16, 256)
STRATEGIES = pytest.mark.parametrize("strategy", ["copy", "auto"])
EXTENSION = ("bfloat16", "float8_e4m3fn", "float8_e5m2")


@pytest.fixture
def batch_of(make):
    """Return a function that puts four records and gathers three of them."""

    def gather(dtype, strategy="auto"):
        values = random_records(4, SHAPE, dtype)
        db = make(shape=SHAPE, dtype=dtype)
        ids = db.put(values)
        return db.multiget_mapped(ids[[3, 0, 3]], strategy=strategy), values[[3, 0, 3]]

    return gather


def tensor_bytes(tensor):
    torch = pytest.importorskip("torch")
    return tensor.contiguous().view(torch.uint8).reshape(len(tensor), -1).numpy()


def expected_bytes(values):
    return values.reshape(len(values), -1).view(np.uint8)


@STRATEGIES
@pytest.mark.parametrize("dtype", DTYPES)
def test_numpy(batch_of, dtype, strategy):
    batch, values = batch_of(dtype, strategy)
    view = batch.numpy()
    assert_same_bytes(view, values)
    assert view.flags.c_contiguous
    assert not view.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        view[0, 0, 0] = 1
    with pytest.raises(ValueError, match="WRITEABLE"):
        view.flags.writeable = True
    assert batch.numpy().ctypes.data == view.ctypes.data, "every view is of the same memory"


@STRATEGIES
def test_numpy_writable(batch_of, strategy):
    batch, values = batch_of("float32", strategy)
    view = batch.numpy(writable=True)
    view[1] = 7
    assert np.all(batch.numpy()[1] == 7)
    assert_same_bytes(batch.numpy()[0], values[0])
    assert_same_bytes(batch.numpy()[2], values[2])


@STRATEGIES
def test_array_protocol(batch_of, strategy):
    batch, values = batch_of("int32", strategy)
    assert_same_bytes(np.asarray(batch), values)
    assert np.asarray(batch).ctypes.data == batch.numpy().ctypes.data
    assert np.asarray(batch, dtype=np.float64).dtype == np.float64
    own = np.array(batch, copy=True)
    assert own.ctypes.data != batch.numpy().ctypes.data
    assert np.add(batch, 1).shape == batch.shape
    with pytest.raises(ValueError, match="copy"):
        np.asarray(batch, dtype=np.float64, copy=False)


@STRATEGIES
@pytest.mark.parametrize("dtype", [name for name in DTYPES if name not in EXTENSION])
def test_numpy_from_dlpack(batch_of, dtype, strategy):
    batch, values = batch_of(dtype, strategy)
    view = np.from_dlpack(batch)
    assert_same_bytes(view, values)
    assert view.ctypes.data == batch.numpy().ctypes.data


@STRATEGIES
@pytest.mark.parametrize("dtype", DTYPES)
def test_torch(batch_of, dtype, strategy):
    torch = pytest.importorskip("torch")
    batch, values = batch_of(dtype, strategy)
    tensor = batch.torch()
    assert tensor.dtype == getattr(torch, dtype)
    assert tuple(tensor.shape) == batch.shape
    assert tensor.is_contiguous()
    assert tensor.data_ptr() == batch.numpy().ctypes.data
    assert_same_bytes(tensor_bytes(tensor), expected_bytes(values))


@STRATEGIES
@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_from_dlpack(batch_of, dtype, strategy):
    torch = pytest.importorskip("torch")
    batch, values = batch_of(dtype, strategy)
    tensor = torch.from_dlpack(batch)
    assert tensor.dtype == getattr(torch, dtype)
    assert tensor.data_ptr() == batch.numpy().ctypes.data
    assert_same_bytes(tensor_bytes(tensor), expected_bytes(values))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_jax_from_dlpack(batch_of, dtype):
    jax = pytest.importorskip("jax", reason="jax is not installed")
    batch, values = batch_of(dtype)
    array = jax.numpy.from_dlpack(batch)
    assert str(array.dtype) == dtype
    assert_same_bytes(np.asarray(array), values)


@pytest.mark.parametrize("dtype", EXTENSION)
def test_numpy_refuses_what_it_does_not_know(batch_of, dtype):
    """numpy's DLPack has no bfloat16 and no float8: an error, never wrong numbers."""
    batch, values = batch_of(dtype)
    with pytest.raises((BufferError, RuntimeError, TypeError, ValueError)):
        np.from_dlpack(batch)
    assert_same_bytes(batch.numpy(), values)


def test_there_and_back(batch_of, make, shm):
    """A batch is put into another store through DLPack alone, and is the same there."""
    torch = pytest.importorskip("torch")
    batch, values = batch_of("bfloat16")
    other = make(shm / "other", shape=SHAPE, dtype="bfloat16")
    ids = np.concatenate([other.put(batch), other.put(torch.from_dlpack(batch)), other.put(batch.numpy())])
    assert_same_bytes(other.multiget(ids), np.concatenate([values] * 3))


def test_torch_back_through_dlpack(batch_of):
    torch = pytest.importorskip("torch")
    batch, values = batch_of("float32")
    assert_same_bytes(np.from_dlpack(torch.from_dlpack(batch)), values)


@STRATEGIES
def test_in_place_torch_op_leaves_the_store_unchanged(make, strategy):
    torch = pytest.importorskip("torch")
    values = np.ones((8, *SHAPE), np.float32)
    db = make(shape=SHAPE, dtype="float32")
    ids = db.put(values)
    tensor = db.multiget_mapped(ids, strategy=strategy).torch()
    tensor.mul_(3)
    torch.relu_(tensor.sub_(5))
    assert torch.all(tensor == 0)
    assert_same_bytes(db.multiget(ids), values)
    with db.multiget_mapped(ids) as other:
        assert_same_bytes(other.numpy(), values)
    assert db.verify() == []


def test_dlpack_device_is_cpu(batch_of):
    batch, _ = batch_of("float32")
    assert tuple(batch.__dlpack_device__()) == (1, 0)


def test_dlpack_options(batch_of):
    """The arguments of the array API: a stream or another device makes no sense here; a copy is a copy."""
    batch, values = batch_of("float32")
    assert batch.__dlpack__(stream=None) is not None
    assert batch.__dlpack__(max_version=(1, 0)) is not None
    with pytest.raises((BufferError, ValueError)):
        batch.__dlpack__(dl_device=(2, 0))
    own = np.from_dlpack(batch, copy=True)
    assert_same_bytes(own, values)
    assert own.ctypes.data != batch.numpy().ctypes.data


def test_empty_batches_everywhere(make):
    torch = pytest.importorskip("torch")
    db = make(shape=SHAPE, dtype="float32")
    batch = db.multiget_mapped([])
    assert batch.nbytes == 0
    assert np.from_dlpack(batch).shape == (0, *SHAPE)
    assert tuple(batch.torch().shape) == tuple(torch.from_dlpack(batch).shape) == (0, *SHAPE)


def test_without_torch_a_batch_is_still_numpy(path):
    """memodb never needs torch: with its import blocked, everything but `.torch()` works."""
    import subprocess
    import sys

    program = """
import sys
sys.modules["torch"] = None
import numpy as np, memodb
with memodb.MemoDB.create(sys.argv[1], shape=(1024,), dtype="float32") as db:
    batch = db.multiget_mapped(db.put(np.ones((3, 1024), np.float32)))
    assert np.from_dlpack(batch).sum() == 3072
    try:
        batch.torch()
    except ImportError:
        print("refused")
"""
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, timeout=120)
    assert (done.stdout.strip(), done.returncode) == ("refused", 0), done.stderr
