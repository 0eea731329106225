"""The small files beside a database: JSON and ``.npy``, read without pickle, by the rules of the store's own."""

from __future__ import annotations

import io
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

import memodb
from memodb.safe import Guard

from .errors import StoreMismatchError

__all__ = ["read_array", "read_json", "write_array", "write_json"]


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object, in place of an earlier one."""
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    _write(path, text.encode())


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises
    ------
    StoreMismatchError
        It is damaged.
    memodb.UnsafePathError
        It is none of the store's files.
    """
    try:
        content = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise StoreMismatchError(f"{path} is damaged ({error}): build the store again") from error
    if not isinstance(content, dict):
        raise StoreMismatchError(f"{path} is damaged (no JSON object): build the store again")
    return content


def write_array(path: Path, array: np.ndarray[Any, Any]) -> None:
    """Write an array of numbers."""
    packed = io.BytesIO()
    np.save(packed, np.ascontiguousarray(array), allow_pickle=False)
    _write(path, packed.getbuffer())


def read_array(path: Path) -> np.ndarray[Any, Any]:
    """Read an array of finite numbers; its header is believed only as far as there are bytes.

    Raises
    ------
    StoreMismatchError
        It is missing or damaged.
    memodb.UnsafePathError
        It is none of the store's files.
    """
    try:
        data = _read(path)
        packed = io.BytesIO(data)
        if np.lib.format.read_magic(packed) != (1, 0):
            raise ValueError("another version of the .npy format")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(packed)
        rest = len(data) - packed.tell()
        if fortran or dtype.kind != "f" or math.prod(shape) * dtype.itemsize != rest:
            raise ValueError(f"{rest} bytes for {dtype} {list(shape)}")
        array = np.frombuffer(data, dtype=dtype, offset=packed.tell()).reshape(shape).copy()
        if not np.isfinite(array).all():
            raise ValueError("numbers that are not finite")
    except memodb.UnsafePathError:
        raise
    except (OSError, ValueError, EOFError, OverflowError) as error:
        raise StoreMismatchError(f"{path} is missing or damaged ({error}): build the store again") from error
    return array


def _write(path: Path, content: bytes | memoryview) -> None:
    """Put a file in place as a whole, with the permissions of the store's own."""
    draft = path.with_suffix(".tmp")
    draft.unlink(missing_ok=True)
    Guard.of(path.parent.parent).directory(path.parent).write(draft, content)
    os.replace(draft, path)


def _read(path: Path) -> bytes:
    """Return what is in a file, if it is the store's."""
    return Guard.of(path.parent.parent).directory(path.parent).read(path)
