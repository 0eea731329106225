"""Options that several functions take, checked before anything is written."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from .embedding import Embedder, RandomProjection
from .store import TARGETS
from .training import TRAINED

__all__ = ["STORE_DTYPES", "check_build", "check_count", "check_store_dtype"]

STORE_DTYPES = ("float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")


def check_count(name: str, value: Any, least: int = 1) -> int:
    """Return an option that is a whole number, as an int; whatever else it is, is refused by its name."""
    try:
        count = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        count = -1
    if count < least:
        raise ValueError(f"expected {name} to be a whole number of at least {least}; found {value!r}")
    return count


def check_store_dtype(store_dtype: Any) -> None:
    """Refuse a dtype that records cannot have."""
    if store_dtype not in STORE_DTYPES:
        raise ValueError(f"expected store_dtype to be one of {', '.join(STORE_DTYPES)}; found {store_dtype!r}")


def check_build(
    target: str,
    store_dtype: str,
    embedder: str | Embedder,
    epochs: int | None,
    namespace_by_length: bool,
    buckets: Sequence[int] | None,
) -> list[int]:
    """Check what :func:`build` is told and needs no model; returns the buckets in rising order."""
    if target not in TARGETS:
        raise ValueError(f"expected target to be one of {', '.join(TARGETS)}; found {target!r}")
    check_store_dtype(store_dtype)
    kinds = (*TRAINED, RandomProjection.kind)
    if (isinstance(embedder, str) and embedder not in kinds) or not isinstance(embedder, str | Embedder):
        found = repr(embedder) if isinstance(embedder, str) else type(embedder).__name__
        raise ValueError(f"expected embedder to be one of {', '.join(kinds)}, or an Embedder object; found {found}")
    if epochs is not None and embedder not in TRAINED:
        raise ValueError(f"expected no epochs: this embedder is not trained; found epochs={epochs!r}")
    if epochs is not None and (isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 0):
        raise ValueError(f"expected epochs to be a number of at least 0; found {epochs!r}")
    if not namespace_by_length:
        raise ValueError("expected namespace_by_length=True: sequences of different valid length must never match")
    if buckets is None:
        return []
    try:
        lengths = [operator.index(length) for length in buckets if not isinstance(length, bool)]
    except TypeError:
        lengths = []
    if not lengths or min(lengths) < 2:
        raise ValueError(f"expected buckets to be lengths of at least 2 tokens, such as (64, 128); found {buckets!r}")
    return sorted(set(lengths))
