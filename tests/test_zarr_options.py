"""Options of the zarr backend: those that lose bits, and those that are refused."""

import numpy as np
import pytest
import zarr

import memodb
from memodb.backends.zarr_codecs import round_mantissa
from memodb.testing import assert_same_bytes, random_records

# Losing bits


@pytest.mark.parametrize("bits", [1, 7, 10])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_bitround_keeps_so_many_bits(make, path, dtype, bits):
    values = random_records(4, (2, 1024), dtype)
    values[0] = np.linspace(-2, 2, 2048).reshape(2, 1024)
    with make(backend="zarr", dtype=dtype, bitround=bits) as db:
        ids = db.put(values)
        kept = db.multiget(ids)
        assert db.verify() == []
        again = db.put(kept)
        assert_same_bytes(db.multiget(again), kept)
    good = np.isfinite(values) & np.isfinite(kept)
    error = np.abs(kept[good].astype(np.longdouble) - values[good])
    step = np.maximum(np.abs(values[good].astype(np.longdouble)), np.finfo(dtype).tiny) * np.longdouble(2.0) ** -(
        bits + 1
    )
    assert (error <= step).all()
    odd = ~np.isfinite(values)
    assert kept[odd].tobytes() == values[odd].tobytes(), "infinities and NaNs stay bit for bit"
    stored = np.finfo(dtype).nmant
    finite = kept[np.isfinite(kept)].view(f"u{kept.itemsize}")
    assert not (finite & ((1 << (stored - bits)) - 1)).any()
    assert zarr.open_array(path / "values", mode="r")[: len(kept)].tobytes() == kept.tobytes()


def test_ties_round_to_even():
    found = round_mantissa(np.array([1 + 1 / 4, 1 + 3 / 4, 1 + 1 / 2], np.float32), 1)
    assert found.tolist() == [1.0, 2.0, 1.5]


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("packed", ["uint8", "int16", "int32"])
def test_packed_floats(make, path, dtype, packed):
    """What is read back is what the attributes of the array say, bit for bit."""
    values = np.random.default_rng(0).random((4, 2, 1024)).astype(dtype)
    scale = 1 / 255 if packed == "uint8" else 1 / 32767
    with make(backend="zarr", dtype=dtype, packed_dtype=packed, scale_factor=scale, add_offset=0.25 * 0) as db:
        ids = db.put(values)
        kept = db.multiget(ids[[2, 0, 2]])
        assert db.verify() == []
    array = zarr.open_array(path / "values", mode="r")
    assert array.dtype == packed
    plain = array[:] * array.attrs["scale_factor"] + array.attrs["add_offset"]
    assert_same_bytes(kept, plain.astype(dtype)[[2, 0, 2]])
    tolerance = scale / 2 + np.finfo(dtype).eps
    assert np.abs(kept.astype(np.float64) - values[[2, 0, 2]]).max() <= tolerance


@pytest.mark.parametrize("bad", [np.nan, np.inf, -0.1, 1.1])
def test_what_cannot_be_packed_is_refused_and_changes_nothing(make, bad):
    values = np.full((2, 2, 1024), 0.5, np.float32)
    db = make(backend="zarr", packed_dtype="uint8", scale_factor=1 / 255)
    ids = db.put(values)
    values[1, 1, 7] = bad
    with pytest.raises(memodb.InvalidRecordError, match="uint8"):
        db.put(values)
    assert db.ids().tolist() == ids.tolist()
    assert db.put(values[:1]).tolist() == [2]
    assert db.verify() == []


@pytest.mark.parametrize("option", [{"bitround": 3}, {"packed_dtype": "uint8"}], ids=str)
@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64", "bfloat16", "float8_e5m2"])
def test_only_floats_lose_bits(path, dtype, option):
    with pytest.raises(memodb.InvalidOptionError, match=dtype):
        memodb.MemoDB.create(path, shape=(2,), dtype=dtype, backend="zarr", **option)
    assert not path.exists()


@pytest.mark.parametrize(
    "options",
    [
        {"codec": "lzma"},
        {"codec": ["zstd"]},
        {"codec": "none", "level": 1},
        {"level": 23},
        {"codec": "blosc", "level": 10},
        {"codec": "blosc", "chunk_records": 1 << 20, "shape": (512,)},
        {"chunk_records": 0},
        {"chunk_records": 3, "shard_records": 4},
        {"bitround": 24},
        {"bitround": 0},
        {"bitround": 3, "packed_dtype": "uint8"},
        {"packed_dtype": "uint64"},
        {"scale_factor": 2.0},
        {"packed_dtype": "int8", "scale_factor": 0},
        {"packed_dtype": "int8", "add_offset": float("nan")},
        {"url": ""},
        {"url": "ftp://host/path"},
        {"url": "s3://"},
        {"url": "memory://"},
        {"url": "file://host/path"},
        {"url": "s3://user:word@bucket/prefix"},
        {"url": "az://container/prefix?sig=abc"},
        {"client": "obstore"},
        {"storage_options": {"anon": True}},
        {"url": "s3://bucket/x", "storage_options": "{"},
        {"url": "s3://bucket/x", "storage_options": "[1]"},
        {"url": "s3://bucket/x", "storage_options": {"a": {1, 2}}},
        {"url": "s3://bucket/x", "client": "boto"},
        {"durability": "none"},
        {"token": "abc"},
    ],
    ids=str,
)
def test_options_that_cannot_be_used(path, options):
    with pytest.raises(memodb.InvalidOptionError):
        memodb.MemoDB.create(path, **{"shape": (2,), "dtype": "float32", "backend": "zarr", **options})
    assert not path.exists()


@pytest.mark.parametrize(
    "secret",
    [
        {"key": "abc"},
        {"secret": "abc"},
        {"client_kwargs": {"aws_secret_access_key": "abc"}},
        {"config": [{"session_token": "abc"}]},
        {"password": "abc"},
        {"account_key": "abc"},
        {"connection_string": "abc"},
        {"sas_token": "abc"},
    ],
    ids=str,
)
def test_secrets_are_not_written_down(path, secret):
    with pytest.raises(memodb.InvalidOptionError, match="environment") as refused:
        memodb.MemoDB.create(
            path, shape=(2,), dtype="float32", backend="zarr", url="s3://bucket/x", storage_options=secret
        )
    assert "abc" not in str(refused.value)
    assert not path.exists()
