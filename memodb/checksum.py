"""CRC-32C of records."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import google_crc32c
import numpy as np

from memodb.threads import CREW, MOST

#: Bytes handed to one call of the binding, which holds the GIL meanwhile, so that other threads go on.
_PIECE = 16 << 20
#: Below so many bytes the binding is quicker than what it takes to do without it.
_SMALL = 64 << 10
#: From so many bytes on several threads are worth waking, and one thread's share of them at a time.
_SHARED, _SHARE = 4 << 20, 1 << 20


def _without_gil() -> Callable[[int, int, int], int] | None:
    """Return crc32c_extend(crc, address, nbytes) of the library that google_crc32c brings, called without the GIL.

    The package's own binding holds the GIL, so that threads gain nothing by it.
    """
    try:
        from google_crc32c import _crc32c

        function = ctypes.CDLL(_crc32c.__file__).crc32c_extend
    except (ImportError, OSError, AttributeError):
        return None
    function.restype = ctypes.c_uint32
    function.argtypes = [ctypes.c_uint32, ctypes.c_void_p, ctypes.c_size_t]
    if function(0, b"123456789", 9) != 0xE3069283:  # the check value of RFC 3720: it is what it seems
        return None
    extend: Callable[[int, int, int], int] = function
    return extend


_EXTEND = _without_gil()


def crc32c(data: Any) -> int:
    """Return the CRC-32C (Castagnoli, RFC 3720) of a C-contiguous array or bytes."""
    if isinstance(data, bytes) and len(data) < _SMALL:
        return int(google_crc32c.value(data))
    flat = (
        np.frombuffer(data, np.uint8)
        if isinstance(data, (bytes, bytearray, memoryview))
        else data.reshape(-1).view(np.uint8)
    )
    if _EXTEND is not None:
        return int(_EXTEND(0, flat.ctypes.data, flat.size))
    value = 0
    for start in range(0, flat.size, _PIECE):
        value = google_crc32c.extend(value, flat[start : start + _PIECE])
    return int(value)


def record_checksums(
    values: np.ndarray[Any, Any], places: np.ndarray[Any, np.dtype[np.intp]] | None = None
) -> np.ndarray[Any, np.dtype[np.uint32]]:
    """Return the CRC-32C of each record of `values` [n, ...], or of those at `places` [m]: uint32 [n] or [m].

    Strided records are packed one at a time.
    """
    which = range(len(values)) if places is None else places.tolist()
    n, nbytes = len(which), values.nbytes // max(1, len(values))
    sums = np.empty(n, np.uint32)
    step = max(1, _SHARE // max(1, nbytes))

    def work(i: int) -> None:
        for j in range(i * step, min((i + 1) * step, n)):
            sums[j] = crc32c(np.ascontiguousarray(values[which[j]]))

    CREW.share(work, -(-n // step), MOST if n * nbytes >= _SHARED and _EXTEND is not None else 1)
    return sums
