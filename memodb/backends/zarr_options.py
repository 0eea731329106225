"""The options of the zarr backend, one by one and together. Imports no zarr."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from memodb.backends.base import take_options
from memodb.backends.zarr_codecs import PACKED, check_coding
from memodb.backends.zarr_url import CLIENTS
from memodb.errors import InvalidOptionError
from memodb.record import RecordSpec

#: codec -> default level, and the levels there are
_LEVELS: dict[str, tuple[int | None, range]] = {
    "none": (None, range(0)),
    "zstd": (1, range(-7, 23)),
    "blosc": (5, range(10)),
}
_LARGEST = sys.float_info.max
#: Bytes that blosc can compress at once.
_BLOSC_MOST = (1 << 31) - 17


def _is_count(value: Any) -> bool:
    return type(value) is int and 1 <= value <= 1 << 20


def _is_number(value: Any) -> bool:
    # Compared first: an int may be too large for a float.
    return type(value) in (int, float) and -_LARGEST < value < _LARGEST


#: name -> (default, test, what is expected), for `take_options`; some depend on each other, and are looked at after.
_KNOWN: dict[str, tuple[Any, Any, str]] = {
    "codec": ("zstd", lambda v: isinstance(v, str) and v in _LEVELS, '"zstd", "none" or "blosc"'),
    "level": (None, lambda v: v is None or type(v) is int, "an int"),
    "chunk_records": (1, _is_count, "an int, 1 to 2**20"),
    "shard_records": (None, lambda v: v is None or _is_count(v), "an int, 1 to 2**20"),
    "bitround": (None, lambda v: v is None or _is_count(v), "an int of at least 1 (mantissa bits)"),
    "packed_dtype": (None, lambda v: v is None or v in PACKED, "one of " + ", ".join(PACKED)),
    "scale_factor": (1.0, lambda v: _is_number(v) and v != 0, "a number other than 0"),
    "add_offset": (0.0, _is_number, "a number"),
    "url": (None, lambda v: v is None or isinstance(v, str), "a URL, or the path of a directory"),
    "client": ("auto", lambda v: v in CLIENTS, "one of " + ", ".join(CLIENTS)),
    "storage_options": (None, lambda v: True, "a dict"),
    "durability": ("full", lambda v: v in ("full", "relaxed"), '"full" or "relaxed"'),
}


def check(backend: str, given: Mapping[str, Any], spec: RecordSpec) -> dict[str, Any]:
    """Return the options with defaults filled in; what the `url` and its client are is not looked at.

    Raises
    ------
    InvalidOptionError
        For an option that there is not, or that does not fit the others or the records.
    """
    taken = take_options(backend, given, _KNOWN)
    default, levels = _LEVELS[taken["codec"]]
    if taken["level"] is None:
        taken["level"] = default
    elif taken["level"] not in levels:
        have = f"levels {levels.start} to {levels.stop - 1}" if levels else "no levels"
        raise InvalidOptionError(f"level={taken['level']}: codec {taken['codec']!r} has {have}")
    if taken["shard_records"] is not None and taken["shard_records"] % taken["chunk_records"]:
        raise InvalidOptionError(
            f"shard_records={taken['shard_records']} is no multiple of chunk_records={taken['chunk_records']}: a shard "
            "holds whole chunks"
        )
    if taken["codec"] == "blosc" and taken["chunk_records"] * spec.nbytes > _BLOSC_MOST:
        raise InvalidOptionError(
            f"codec 'blosc' compresses {_BLOSC_MOST} bytes at most, and a chunk has "
            f"{taken['chunk_records'] * spec.nbytes}: choose a smaller chunk_records, or codec='zstd'"
        )
    taken["scale_factor"], taken["add_offset"] = float(taken["scale_factor"]), float(taken["add_offset"])
    check_coding(spec, taken)
    return taken


def recheck(backend: str, options: Mapping[str, Any], spec: RecordSpec) -> None:
    """Check options as they come back from a store's settings, which may be damaged or made up.

    Raises
    ------
    InvalidOptionError, ValueError
        If they are not such as `check` returns, with the token of the store.
    """
    if not isinstance(options.get("token"), str) or set(options) != {*_KNOWN, "token"}:
        raise ValueError(f"they are options {', '.join(sorted(options))[:200]}")
    if not (options["storage_options"] is None or isinstance(options["storage_options"], dict)):
        raise ValueError("option storage_options is no object")
    check(backend, {name: options[name] for name in _KNOWN}, spec)
