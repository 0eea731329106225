"""How a record becomes what the zarr array holds: the same bits, rounded bits, or small integers.

None of it needs a codec of its own in the array's metadata. Extension dtypes are unsigned integers of the same width
with their name as an attribute. Rounded floats are floats. Packed floats are integers with the attributes
``scale_factor`` and ``add_offset`` of the CF conventions, by which xarray and others decode them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np

from memodb.backends.base import Values
from memodb.errors import InvalidOptionError, InvalidRecordError
from memodb.record import EXTENSION_DTYPES, RecordSpec

#: Mantissa bits that are stored, of the floats that lossy options can be used with.
_MANTISSA = {"float16": 10, "float32": 23, "float64": 52}
#: What floats can be packed into: those of one and two bytes are unpacked by a table.
PACKED = ("int8", "uint8", "int16", "uint16", "int32", "uint32")
_TABLE_BYTES = 2


class Coding:
    """Between records and rows of the array.

    Parameters
    ----------
    spec
        Shape and dtype of the records.
    options
        Checked options of the store: ``bitround``, ``packed_dtype``, ``scale_factor``, ``add_offset``.
    """

    def __init__(self, spec: RecordSpec, options: Mapping[str, Any]) -> None:
        self._spec = spec
        self._bits: int | None = options["bitround"]
        packed: str | None = options["packed_dtype"]
        self._packed = None if packed is None else np.dtype(packed)
        self._scale, self._offset = options["scale_factor"], options["add_offset"]
        #: What the array holds.
        self.dtype: np.dtype[Any] = spec.dtype
        self.attributes: dict[str, Any] = {}
        if spec.dtype_name in EXTENSION_DTYPES:
            self.dtype = np.dtype(f"uint{8 * spec.dtype.itemsize}")
            self.attributes = {"dtype": spec.dtype_name}
        if self._packed is not None:
            self.dtype = self._packed
            self.attributes = {
                "scale_factor": self._scale,
                "add_offset": self._offset,
                "dtype": spec.dtype_name,
            }
        elif self._bits is not None:
            self.attributes = {"mantissa_bits": self._bits}

    @property
    def plain(self) -> bool:
        """Whether a row of the array is a record, byte for byte."""
        return self._packed is None

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, uncompressed."""
        return self._spec.nbytes // self._spec.dtype.itemsize * self.dtype.itemsize

    def encode(self, values: Values) -> Values:
        """Return what the array shall hold for `values` [n, *shape].

        Raises
        ------
        InvalidRecordError
            If a value cannot be packed: it is NaN, or outside of what the integers reach.
        """
        if self._packed is not None:
            return self._pack(values)
        if self._bits is not None:
            return round_mantissa(values, self._bits)
        return values if values.dtype == self.dtype else values.view(self.dtype)

    def kept(self, values: Values) -> Values:
        """Return `values` [n, *shape] as they will be read back."""
        if self._packed is not None:
            return self._unpack(self._pack(values))
        return values if self._bits is None else round_mantissa(values, self._bits)

    def decode(self, rows: np.ndarray[Any, Any], out: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        """Write the record of one row of the array into `out`, uint8 [nbytes]."""
        if self._packed is None:
            out[:] = np.ascontiguousarray(rows).reshape(-1).view(np.uint8)
        else:
            out[:] = self._unpack(np.ascontiguousarray(rows)).reshape(-1).view(np.uint8)

    def _pack(self, values: Values) -> Values:
        assert self._packed is not None
        with np.errstate(all="ignore"):  # what becomes NaN or infinite is refused below
            wanted = np.rint((values.astype(np.float64) - self._offset) / self._scale)
        info = np.iinfo(self._packed)
        if not bool(np.all((wanted >= info.min) & (wanted <= info.max))):  # NaN compares false
            low, high = sorted((info.min * self._scale + self._offset, info.max * self._scale + self._offset))
            with np.errstate(all="ignore"):
                least, most = float(values.min()), float(values.max())
            raise InvalidRecordError(
                f"values cannot be packed into {self._packed.name}: those of this store are numbers from {low:g} to "
                f"{high:g} (scale_factor={self._scale:g}, add_offset={self._offset:g}), found {least:g} "
                f"to {most:g}; nothing was stored"
            )
        packed: Values = wanted.astype(self._packed)
        return packed

    def _unpack(self, packed: Values) -> Values:
        if packed.dtype.itemsize <= _TABLE_BYTES:
            # By its bits as an unsigned number: a table look-up is several times as quick as the arithmetic.
            found: Values = self._table[packed.view(f"uint{8 * packed.dtype.itemsize}")]
            return found
        return self._unpacked(packed)

    def _unpacked(self, packed: Values) -> Values:
        with np.errstate(over="ignore"):
            found: Values = (packed.astype(np.float64) * self._scale + self._offset).astype(self._spec.dtype)
        return found

    @cached_property
    def _table(self) -> Values:
        assert self._packed is not None
        bits = np.arange(1 << (8 * self._packed.itemsize), dtype=f"uint{8 * self._packed.itemsize}")
        return self._unpacked(bits.view(self._packed))


def round_mantissa(values: Values, bits: int) -> Values:
    """Round finite floats to `bits` mantissa bits, ties to even; infinities and NaNs stay bit for bit.

    A number that rounds beyond the largest one becomes infinite, as it would in a cast to a smaller float.
    """
    stored = _MANTISSA[values.dtype.name]
    drop = stored - bits
    if drop == 0:
        return values
    integer = np.dtype(f"uint{8 * values.dtype.itemsize}")
    found = np.ascontiguousarray(values).view(integer)
    one = integer.type(1)
    half = integer.type((1 << (drop - 1)) - 1)
    mask = integer.type((1 << (8 * values.dtype.itemsize)) - (1 << drop))
    rounded = (found + half + ((found >> integer.type(drop)) & one)) & mask
    kept: Values = np.where(np.isfinite(values), rounded, found).view(values.dtype).reshape(values.shape)
    return kept


def check_coding(spec: RecordSpec, options: Mapping[str, Any]) -> None:
    """Check that the lossy options fit the records and each other.

    Raises
    ------
    InvalidOptionError
        If they do not.
    """
    bits, packed = options["bitround"], options["packed_dtype"]
    if packed is None and (options["scale_factor"] != 1.0 or options["add_offset"] != 0.0):
        raise InvalidOptionError(
            "scale_factor and add_offset tell how floats are packed into integers: give packed_dtype as well, one of "
            + ", ".join(PACKED)
        )
    if bits is None and packed is None:
        return
    given = "bitround" if packed is None else "packed_dtype"
    if spec.dtype_name not in _MANTISSA:
        raise InvalidOptionError(
            f"option {given} loses bits of float16, float32 or float64 records; these are {spec.dtype_name}: leave it "
            "out, and use codec and level to make them smaller without loss"
        )
    if bits is not None and packed is not None:
        raise InvalidOptionError("bitround and packed_dtype are two ways to lose bits: choose one")
    if bits is not None and bits > _MANTISSA[spec.dtype_name]:
        raise InvalidOptionError(
            f"bitround={bits}: {spec.dtype_name} has {_MANTISSA[spec.dtype_name]} mantissa bits, so keep 1 to "
            f"{_MANTISSA[spec.dtype_name]} of them"
        )
