"""What one record is: a shape and a dtype, and what follows from them in bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from memodb.errors import InvalidRecordError

__all__ = ["RecordSpec"]

#: dtypes that numpy itself does not know, by the names of the public contract.
EXTENSION_DTYPES: dict[str, np.dtype[Any]] = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
}


#: numpy has 64 dimensions, one of which is the batch's; a segment has at most 2**40 bytes.
_MOST_DIMENSIONS, _MOST_BYTES = 63, 1 << 40


def parse_dtype(dtype: Any) -> np.dtype[Any]:
    """Return the numpy dtype, in native byte order, that `dtype` names.

    Parameters
    ----------
    dtype
        Anything numpy takes, one of ``"bfloat16"``, ``"float8_e4m3fn"``, ``"float8_e5m2"``, or a torch dtype.

    Raises
    ------
    InvalidRecordError
        If it is not numeric or not known.
    """
    if dtype is None:
        raise InvalidRecordError("dtype is None: name one, such as 'float16'")
    name = dtype if isinstance(dtype, str) else str(dtype)
    name = name.removeprefix("torch.")
    if name in EXTENSION_DTYPES:
        return EXTENSION_DTYPES[name]
    try:
        found = np.dtype(name if str(dtype).startswith("torch.") else dtype)
    except TypeError as error:
        raise InvalidRecordError(
            f"unknown dtype {dtype!r}: expected a numeric numpy dtype or one of {', '.join(EXTENSION_DTYPES)}"
        ) from error
    if found in EXTENSION_DTYPES.values():
        return found
    if found.kind not in "biufc" or found.subdtype is not None:
        raise InvalidRecordError(
            f"dtype {found} cannot be stored: records are numeric (bool, int, uint, float, complex)"
        )
    return found.newbyteorder("=")


@dataclass(frozen=True)
class RecordSpec:
    """Shape and dtype that all records of one store share.

    Parameters
    ----------
    shape
        Shape of ONE record; every dimension at least 1; ``()`` is a scalar.
    dtype
        numpy dtype in native byte order (see `parse_dtype`).
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @classmethod
    def of(cls, shape: Any, dtype: Any) -> RecordSpec:
        """Build a spec from what a caller passes as `shape` and `dtype`.

        Raises
        ------
        InvalidRecordError
            If the shape is not a sequence of positive integers or the dtype is not numeric.
        """
        given = (shape,) if isinstance(shape, (int, np.integer)) and not isinstance(shape, bool) else shape
        try:
            dims = tuple(given)
        except TypeError as error:
            raise InvalidRecordError(f"shape {shape!r} is not a sequence of integers") from error
        if isinstance(given, (str, bytes)) or any(
            isinstance(d, bool) or not isinstance(d, (int, np.integer)) or d < 1 for d in dims
        ):
            raise InvalidRecordError(f"shape {shape!r}: every dimension of a record must be an integer of at least 1")
        if isinstance(given, (set, frozenset)):
            raise InvalidRecordError(f"shape {shape!r} is not a sequence: a set has no order")
        spec = cls(tuple(int(d) for d in dims), parse_dtype(dtype))
        if len(dims) > _MOST_DIMENSIONS or spec.nbytes > _MOST_BYTES:
            raise InvalidRecordError(
                f"shape {shape!r} of {spec.dtype_name}: a record has at most {_MOST_DIMENSIONS} dimensions and "
                f"{_MOST_BYTES} bytes"
            )
        return spec

    @property
    def nbytes(self) -> int:
        """Bytes of one record."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def dtype_name(self) -> str:
        """Name under which the dtype is stored, e.g. ``"float16"`` or ``"bfloat16"``."""
        return self.dtype.name

    def batch_shape(self, n: int) -> tuple[int, ...]:
        """Shape of a batch of `n` records."""
        return (n, *self.shape)

    def __str__(self) -> str:
        return f"{self.dtype_name}[{', '.join(map(str, self.shape))}]"
