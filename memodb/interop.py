"""Tensors of other libraries in and out: numpy, torch (never imported unless asked for), DLPack."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import numpy as np

from memodb.errors import InvalidRecordError
from memodb.record import EXTENSION_DTYPES, RecordSpec

#: DLDataTypeCode of what numpy cannot name (dlpack.h, version 1.1).
_DLPACK_CODES = {"bfloat16": 4, "float8_e4m3fn": 10, "float8_e5m2": 12}
_DLPACK_UINT = 1
_INTEGER_OF_WIDTH = {1: np.uint8, 2: np.uint16}


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
    )


#: Bytes before the DLTensor in a DLManagedTensorVersioned: version (2 x 4), manager context, deleter, flags.
_VERSIONED_OFFSET = 8 + 8 + 8 + 8
_get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_get_pointer.restype = ctypes.c_void_p
_get_name = ctypes.pythonapi.PyCapsule_GetName
_get_name.restype = ctypes.c_char_p
_get_name.argtypes = [ctypes.py_object]
_get_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]


def to_dlpack(array: np.ndarray[Any, Any], *, stream: Any, max_version: Any, dl_device: Any, copy: bool | None) -> Any:
    """Return a DLPack capsule of `array`.

    numpy makes (and frees) the capsule; for dtypes that it cannot name, the capsule of the same-width integers gets its
    type code corrected, which keeps the deleter in C, callable from any thread at any time.
    """
    code = _DLPACK_CODES.get(array.dtype.name)
    plain = array if code is None else array.view(_INTEGER_OF_WIDTH[array.dtype.itemsize])
    capsule = plain.__dlpack__(stream=stream, max_version=max_version, dl_device=dl_device, copy=copy)
    if code is not None:
        versioned = max_version is not None and tuple(max_version) >= (1, 0)
        name = b"dltensor_versioned" if versioned else b"dltensor"
        tensor = _DLTensor.from_address(_get_pointer(capsule, name) + (_VERSIONED_OFFSET if versioned else 0))
        tensor.code = code
    return capsule


def to_torch(array: np.ndarray[Any, Any]) -> Any:
    """Return `array` as a torch tensor on the same memory.

    Raises
    ------
    InvalidRecordError
        If torch has no dtype of that name.
    """
    try:
        import torch
    except ImportError as error:
        raise ImportError('torch is not installed: pip install "memodb[torch]"; .numpy() works without') from error
    dtype = getattr(torch, array.dtype.name, None)
    if not isinstance(dtype, torch.dtype):
        raise InvalidRecordError(f"torch has no dtype {array.dtype.name}; use .numpy()")
    if array.dtype.name in EXTENSION_DTYPES:
        return torch.from_numpy(array.view(_INTEGER_OF_WIDTH[array.dtype.itemsize])).view(dtype)
    return torch.from_numpy(array)


def to_numpy(values: Any, dtype: np.dtype[Any] | None = None) -> np.ndarray[Any, Any]:
    """Return any array-like as a numpy array, without a copy where possible.

    Parameters
    ----------
    values
        numpy array, torch tensor (any device, any dtype), anything with ``__array__`` or DLPack, or nested lists.
    dtype
        dtype that nested lists get.

    Raises
    ------
    InvalidRecordError
        If nothing numeric can be made of it.
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(values, torch.Tensor):
        return _from_torch(torch, values)
    if isinstance(values, np.ma.MaskedArray):
        raise InvalidRecordError("a masked array cannot be stored: its mask would be lost; call .filled() first")
    if isinstance(values, np.ndarray):
        return values
    try:
        if hasattr(values, "__array__") or hasattr(values, "__array_interface__"):
            return np.asarray(values)
        if hasattr(values, "__dlpack__"):
            return _from_dlpack(values)
        plain = np.asarray(values)
        return plain if dtype is None else _as_written(plain, dtype)
    except (TypeError, ValueError, RuntimeError, BufferError, OverflowError, NotImplementedError) as error:
        raise InvalidRecordError(
            f"values of type {type(values).__name__} cannot be read as an array: {error}"
        ) from error


class _Recoded:
    """A DLPack producer whose bfloat16 or float8, which numpy cannot take, goes as integers of the same width."""

    def __init__(self, values: Any) -> None:
        self._values = values
        self.name = ""

    def __dlpack_device__(self) -> Any:
        return self._values.__dlpack_device__()

    def __dlpack__(self, **options: Any) -> Any:
        try:
            capsule = self._values.__dlpack__(**options)
        except TypeError:  # a producer of before DLPack 1.0
            capsule = self._values.__dlpack__()
        versioned = _get_name(capsule) == b"dltensor_versioned"
        name = b"dltensor_versioned" if versioned else b"dltensor"
        tensor = _DLTensor.from_address(_get_pointer(capsule, name) + (_VERSIONED_OFFSET if versioned else 0))
        found = [name for name, code in _DLPACK_CODES.items() if code == tensor.code]
        if found and tensor.bits == 8 * EXTENSION_DTYPES[found[0]].itemsize and tensor.lanes == 1:
            self.name, tensor.code = found[0], _DLPACK_UINT
        return capsule


def _from_dlpack(values: Any) -> np.ndarray[Any, Any]:
    try:
        return np.from_dlpack(values)
    except (BufferError, RuntimeError):
        recoded = _Recoded(values)
        array: np.ndarray[Any, Any] = np.from_dlpack(recoded)
        return array.view(EXTENSION_DTYPES[recoded.name]) if recoded.name else array


def _as_written(plain: np.ndarray[Any, Any], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """Give numbers written as Python lists the dtype that is wanted, where none changes its kind by it."""
    if plain.size == 0:
        return plain.astype(dtype)
    wanted = "f" if dtype.name in EXTENSION_DTYPES else dtype.kind
    if plain.dtype.kind not in {"f": "biuf", "c": "biufc"}.get(wanted, "biu"):
        raise TypeError(f"they are {plain.dtype.name}, the store holds {dtype.name}")
    with np.errstate(over="ignore"):
        cast = plain.astype(dtype)
    if wanted in "iub" and not np.array_equal(cast, plain):
        raise ValueError(f"some do not fit {dtype.name}")
    if wanted in "fc" and not np.array_equal(np.isfinite(cast.astype(np.complex128)), np.isfinite(plain)):
        raise ValueError(f"some overflow {dtype.name}")
    return cast


def _from_torch(torch: Any, tensor: Any) -> np.ndarray[Any, Any]:
    name = str(tensor.dtype).removeprefix("torch.")
    if tensor.device.type == "meta":
        raise InvalidRecordError("a meta tensor has no values")
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
    if tensor.layout != torch.strided:
        raise InvalidRecordError(f"a {tensor.layout} tensor cannot be stored; call .to_dense() first")
    if name in EXTENSION_DTYPES:
        width = EXTENSION_DTYPES[name].itemsize
        raw: np.ndarray[Any, Any] = tensor.view(torch.uint8 if width == 1 else torch.int16).numpy()
        return raw.view(EXTENSION_DTYPES[name])
    try:
        array: np.ndarray[Any, Any] = tensor.numpy()
    except TypeError as error:
        raise InvalidRecordError(f"a torch tensor of {tensor.dtype} cannot be stored: {error}") from error
    return array


def as_records(spec: RecordSpec, values: Any) -> np.ndarray[Any, Any]:
    """Return `values` as an array [n, *shape] of the store's dtype, without a copy where possible.

    Raises
    ------
    InvalidRecordError
        If shape or dtype differ: nothing is cast, cut or broadcast silently.
    """
    array = to_numpy(values, spec.dtype)
    if array.shape[1:] != spec.shape or array.ndim == 0:
        remedy = "; one record is put as values[None]" if array.shape == spec.shape else ""
        raise InvalidRecordError(
            f"values have shape {list(array.shape)}, expected [n, {', '.join(map(str, spec.shape))}]{remedy}"
        )
    if array.dtype.newbyteorder("=") != spec.dtype:
        raise InvalidRecordError(
            f"values have dtype {array.dtype.name}, the store holds {spec.dtype_name}; convert them yourself, e.g. "
            f"values.astype({spec.dtype_name!r}), so that no precision is lost unseen"
        )
    return array.astype(spec.dtype, copy=False)
