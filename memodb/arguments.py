"""Checks of what callers pass in.

They run before anything is changed, and say what was expected, what was found, what to do.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from memodb.catalog.catalog import check_name, grouped
from memodb.errors import InvalidIdError, InvalidKeyError, InvalidOptionError
from memodb.interop import to_numpy
from memodb.safe import PERMISSIONS

__all__ = ["as_count", "as_distance", "as_ids", "as_keys", "as_namespaces", "as_path", "grouped"]

Ids = np.ndarray[Any, np.dtype[np.int64]]
#: The squared distance of two keys of this squared length just fits float32.
_LARGEST_NORM = float(np.finfo(np.float32).max) / 4


def as_ids(ids: Any) -> Ids:
    """Return ids as int64 [n].

    Raises
    ------
    InvalidIdError
        For bools, floats, strings, negative or too large numbers, and anything not one-dimensional.
    """
    if type(ids) is np.ndarray and ids.dtype == np.int64 and ids.ndim == 1 and ids.size and ids.min() >= 0:
        return ids
    if isinstance(ids, np.ma.MaskedArray):
        raise InvalidIdError("ids are a masked array, whose mask would be ignored; pass ids.compressed()")
    if isinstance(ids, (str, bytes, bool, np.bool_, Mapping)):
        raise InvalidIdError(f"ids must be integers, found {type(ids).__name__} {ids!r}")
    if isinstance(ids, (int, np.integer)):
        raise InvalidIdError(f"ids must be a sequence of integers, found the single number {ids}; pass [{ids}]")
    if not hasattr(ids, "dtype"):
        try:
            items = list(ids)
        except TypeError as error:
            raise InvalidIdError(f"ids must be a sequence of integers, found {type(ids).__name__}") from error
        for item in items:
            if not hasattr(item, "__index__") or isinstance(item, bool) or _is_no_integer(item):
                raise InvalidIdError(f"ids must be integers, found {type(item).__name__} {item!r}")
        try:
            array = np.fromiter((operator.index(item) for item in items), np.int64, len(items))
        except OverflowError as error:
            raise InvalidIdError(f"ids must fit a signed 64-bit integer: {error}") from error
    else:
        array = to_numpy(ids)
        if array.ndim == 1 and array.size == 0:
            return np.zeros(0, np.int64)
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise InvalidIdError(
                f"ids must be a one-dimensional array of integers, found {array.dtype} {list(array.shape)}"
            )
        if array.dtype.kind == "u" and array.dtype.itemsize == 8 and (array > np.iinfo(np.int64).max).any():
            raise InvalidIdError(f"ids must fit a signed 64-bit integer, found {array.max()}")
        array = array.astype(np.int64, copy=False)
    if (array < 0).any():
        raise InvalidIdError(f"ids are not negative, found {int(array.min())}")
    return array


def _is_no_integer(item: Any) -> bool:
    """Tell whether an item with a dtype (numpy, torch) is no integer scalar: a bool tensor has ``__index__`` too."""
    dtype = str(getattr(item, "dtype", "int"))
    return bool(getattr(item, "ndim", 0)) or "bool" in dtype or "float" in dtype


def as_keys(keys: Any, key_dim: int, n: int | None = None) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return keys as float32 [n, key_dim], C-contiguous and finite.

    Raises
    ------
    InvalidKeyError
        If they are not.
    """
    if keys is None:
        raise InvalidKeyError(f"keys are missing: the store has key_dim={key_dim}, pass keys [n, {key_dim}]")
    try:
        given = to_numpy(keys, np.dtype(np.float32))
        if given.dtype.kind == "c":
            raise TypeError("they are complex numbers")
        with np.errstate(over="ignore"):  # what overflows float32 becomes infinite, and is refused below
            array = np.ascontiguousarray(given, np.float32)
    except (ValueError, TypeError) as error:
        raise InvalidKeyError(f"keys cannot be read as float32 [n, {key_dim}]: {error}") from error
    if array.ndim != 2 or array.shape[1] != key_dim:
        raise InvalidKeyError(f"keys have shape {list(array.shape)}, expected [n, {key_dim}]")
    if n is not None and len(array) != n:
        raise InvalidKeyError(f"{len(array)} keys for {n} records; every record needs one key")
    finite = np.isfinite(array).all(axis=1)
    if not finite.all():
        bad = np.flatnonzero(~finite)
        raise InvalidKeyError(f"keys must be finite: row {bad[0]} holds NaN or infinity ({len(bad)} such rows)")
    with np.errstate(over="ignore"):
        large = np.einsum("ij,ij->i", array, array) > _LARGEST_NORM
    if large.any():
        raise InvalidKeyError(
            f"keys are too large: row {np.flatnonzero(large)[0]} has a squared length above {_LARGEST_NORM:.1e}, so "
            f"that squared distances overflow float32 ({large.sum()} such rows); scale the keys"
        )
    return array


def as_namespaces(namespace: str | Sequence[str], n: int) -> tuple[list[str], np.ndarray[Any, np.dtype[np.intp]]]:
    """Return (distinct namespaces, index of each row's namespace among them [n]).

    Raises
    ------
    InvalidOptionError
        If a name is no string, too long, or there is not one per row.
    """
    if isinstance(namespace, str):
        return [check_name(namespace)], np.zeros(n, np.intp)
    try:
        if isinstance(namespace, (set, frozenset, Mapping)):
            raise TypeError("a set has no order")
        names = list(namespace)
    except TypeError as error:
        raise InvalidOptionError(f"namespace must be a string or one string per row, found {namespace!r}") from error
    if len(names) != n:
        raise InvalidOptionError(f"{len(names)} namespaces for {n} rows; pass one string, or one per row")
    places: dict[str, int] = {}
    rows = np.fromiter((places.setdefault(check_name(name), len(places)) for name in names), np.intp, n)
    return list(places), rows


def as_path(path: Any) -> Path:
    """Return where a store is, absolute.

    Raises
    ------
    InvalidOptionError
        If it is no path, or an empty one.
    """
    try:
        text = os.fspath(path)
    except TypeError as error:
        raise InvalidOptionError(f"path must be a string or a path, found {type(path).__name__}") from error
    if not isinstance(text, str) or not text or "\0" in text:
        raise InvalidOptionError(f"path {path!r} names no folder")
    try:
        os.fsencode(text)
    except UnicodeEncodeError as error:
        raise InvalidOptionError(f"path {path!r} names no folder: {error}") from error
    return Path(text).absolute()


def as_permissions(value: Any) -> int:
    """Return the permissions of a store's directories.

    Raises
    ------
    InvalidOptionError
        If they are not among those that a store can have.
    """
    if isinstance(value, bool) or value not in PERMISSIONS:
        found = f"{value:#o}" if isinstance(value, int) else repr(value)
        raise InvalidOptionError(
            f"permissions={found}: expected 0o700 (the owner alone), 0o750 (a group reads) or 0o770 (a group writes as "
            "well)"
        )
    return int(value)


def as_count(name: str, value: Any, *, least: int = 1, most: int = 1 << 62) -> int:
    """Return `value` if it is an integer of at least `least` and at most `most`.

    Raises
    ------
    InvalidOptionError
        If it is not.
    """
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)) or value < least:
        raise InvalidOptionError(f"{name} must be an integer of at least {least}, found {value!r}")
    if value > most:
        raise InvalidOptionError(f"{name} must be at most {most}, found {value}")
    return int(value)


def as_distance(value: Any) -> float:
    """Return a maximal squared distance, inf for None.

    Raises
    ------
    InvalidOptionError
        If it is not a number of at least 0.
    """
    if value is None:
        return float("inf")
    number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if not number or not value >= 0:
        raise InvalidOptionError(f"max_distance must be a number of at least 0 (squared L2), found {value!r}")
    return float(value)
