"""CRC-32C of records."""

from __future__ import annotations

from typing import Any

import google_crc32c
import numpy as np

#: Bytes handed to one call; keeps the GIL-holding C call short, so that other threads go on.
_PIECE = 16 << 20


def crc32c(data: Any) -> int:
    """Return the CRC-32C (Castagnoli, RFC 3720) of a C-contiguous array or bytes."""
    flat = (
        np.frombuffer(data, np.uint8)
        if isinstance(data, (bytes, bytearray, memoryview))
        else data.reshape(-1).view(np.uint8)
    )
    value = 0
    for start in range(0, flat.size, _PIECE):
        value = google_crc32c.extend(value, flat[start : start + _PIECE])
    return int(value)


def record_checksums(values: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.uint32]]:
    """Return the CRC-32C of each record of `values` [n, ...], uint32 [n]; strided records are packed one at a time."""
    sums = np.empty(len(values), np.uint32)
    for i, record in enumerate(values):
        sums[i] = crc32c(np.ascontiguousarray(record))
    return sums
