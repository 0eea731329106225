"""Records to test with, and how to tell that they came back bit for bit."""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

__all__ = ["DTYPES", "assert_same_bytes", "flip_stored_byte", "random_records"]

#: Every dtype of the public contract, by name.
DTYPES: tuple[str, ...] = (
    "bool",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "float16",
    "float32",
    "float64",
    "complex64",
    "complex128",
    "bfloat16",
    "float8_e4m3fn",
    "float8_e5m2",
)


def random_records(n: int, shape: tuple[int, ...], dtype: Any, seed: int = 0) -> np.ndarray[Any, Any]:
    """Return `n` records of random bits: every NaN payload, infinity and subnormal may occur.

    Parameters
    ----------
    n
        Number of records.
    shape
        Shape of one record.
    dtype
        A numpy dtype or a name of `DTYPES`.
    seed
        Records of one seed are always the same.

    Returns
    -------
    numpy.ndarray
        [n, *shape], C-contiguous.
    """
    extension = isinstance(dtype, str) and hasattr(ml_dtypes, dtype)
    found: np.dtype[Any] = np.dtype(getattr(ml_dtypes, dtype) if extension else dtype)
    rng = np.random.default_rng(seed)
    count = n * int(np.prod(shape, dtype=np.int64))
    if found.kind == "b":
        return rng.integers(0, 2, count).astype(bool).reshape(n, *shape)
    bits = rng.integers(0, 256, count * found.itemsize, dtype=np.uint8)
    return bits.view(found).reshape(n, *shape)


def assert_same_bytes(found: Any, expected: Any) -> None:
    """Assert that two arrays agree in shape, dtype and every bit (NaN payloads and signed zeros included).

    Raises
    ------
    AssertionError
        If they do not; the message names the first record that differs.
    """
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.dtype == expected.dtype, f"dtype {found.dtype}, expected {expected.dtype}"
    assert found.shape == expected.shape, f"shape {found.shape}, expected {expected.shape}"
    if found.size == 0:
        return
    left, right = (
        np.ascontiguousarray(a).reshape(len(a) if a.ndim else 1, -1).view(np.uint8) for a in (found, expected)
    )
    if not np.array_equal(left, right):
        differing = np.flatnonzero((left != right).any(axis=1))
        raise AssertionError(f"{len(differing)} of {len(left)} records differ, the first at position {differing[0]}")


def flip_stored_byte(folder: Path, record: np.ndarray[Any, Any], at: int) -> bool:
    """Flip one bit of a record where it lies in the files below `folder`.

    Parameters
    ----------
    folder
        The store.
    record
        The record as it was put; at least 64 bytes long, so that it is found by its bytes.
    at
        Which byte of it.

    Returns
    -------
    bool
        False if no file holds the record as plain bytes (it is compressed, or not in files).
    """
    wanted = np.ascontiguousarray(record).tobytes()
    assert len(wanted) >= 64, "a shorter record may be found where it is not"
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.stat().st_size < len(wanted):
            continue
        with path.open("r+b") as file:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
                start = view.find(wanted)
            if start >= 0:
                byte = wanted[at] ^ 0x10
                os.pwrite(file.fileno(), bytes([byte]), start + at)
                return True
    return False
