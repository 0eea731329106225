"""Which faiss factory strings can serve: checked before a store is made with one, because some kill the process."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import faiss as _faiss
import numpy as np

from memodb.errors import InvalidOptionError

# Its stubs know a part of its names only.
faiss: Any = _faiss

#: Parts of an index by the beginning of their class's name, and why memodb cannot use them.
_UNFIT = {
    "IndexIDMap": "memodb numbers the keys itself: leave IDMap out",
    "IndexNSG": "it cannot be added to once it is built",
    "IndexNNDescent": "it cannot be added to once it is built",
    "IndexLSH": "it measures Hamming distance, memodb's distances are squared L2",
    "NormalizationTransform": "it measures distances of normalised keys; normalise them yourself before put and search",
    "ITQ": "it measures Hamming distance, memodb's distances are squared L2",
}
#: faiss' level generator divides by log(M).
_FEWEST_LINKS = 2
#: Numbers of lists, links, bits: beyond, faiss takes gigabytes before it says anything.
_LARGEST = 1 << 24


def check_factory(factory: str, key_dim: int) -> str:
    """Return `factory` if faiss can build it for keys of that width, and memodb can use what it builds.

    Raises
    ------
    InvalidOptionError
        With the reason if not.
    """
    if not isinstance(factory, str) or not factory.isascii():
        raise InvalidOptionError(f"index must be a faiss factory string or 'auto', found {factory!r}")
    if factory == "auto":
        return factory
    shown = factory if len(factory) <= 60 else f"{factory[:60]}..."
    links = [int(found) for found in re.findall(r"HNSW(\d+)", factory)]
    if any(m < _FEWEST_LINKS for m in links):
        raise InvalidOptionError(f"index {shown!r}: HNSW needs at least {_FEWEST_LINKS} links a key, such as HNSW32")
    if any(len(found) > 8 or int(found) > _LARGEST for found in re.findall(r"\d+", factory)):
        raise InvalidOptionError(f"index {shown!r}: no number in it can be larger than {_LARGEST}")
    try:
        index = faiss.index_factory(key_dim, factory)
    except MemoryError as error:
        raise InvalidOptionError(
            f"index {shown!r} for keys of width {key_dim} takes more memory than there is"
        ) from error
    except RuntimeError as error:
        raise InvalidOptionError(
            f"faiss cannot build index {shown!r} for keys of width {key_dim}: {reason(error)}"
        ) from error
    if index.metric_type != faiss.METRIC_L2:
        raise InvalidOptionError(f"index {shown!r} does not measure squared L2, which memodb's distances are")
    for part in parts(index):
        name = type(part).__name__
        for unfit, why in _UNFIT.items():
            if name.startswith(unfit):
                raise InvalidOptionError(f"index {shown!r} cannot be used: {why}")
        if getattr(part, "nlist", 1) < 1:
            raise InvalidOptionError(f"index {shown!r} has no inverted lists; at least one is needed, such as IVF64")
    if index.is_trained:
        _try_out(index, key_dim, shown)
    return factory


#: The same, remembered: for what a store's settings name.
checked_factory = lru_cache(maxsize=64)(check_factory)


def reason(error: RuntimeError) -> str:
    """Return what faiss complains of, without its C++ signature and source file."""
    text = str(error).strip().splitlines()[-1]
    return (text.rsplit(": ", 1)[-1] if "Error in " in text else text)[:100]


def parts(index: Any) -> Iterator[Any]:
    """Yield an index and all that it is made of."""
    found = faiss.downcast_index(index)
    yield found
    if isinstance(found, faiss.IndexPreTransform):
        for i in range(found.chain.size()):
            yield faiss.downcast_VectorTransform(found.chain.at(i))
    for name in ("index", "base_index", "refine_index", "quantizer", "storage"):
        inner = getattr(found, name, None)
        if inner is not None:
            yield from parts(inner)


def _try_out(index: Any, key_dim: int, shown: str) -> None:
    """Add twice and search, as a store does; what needs training first has to wait for its keys."""
    keys = np.random.default_rng(0).standard_normal((4, key_dim), dtype=np.float32)
    try:
        index.add(keys)
        index.add(keys)
        index.search(keys, 2)
    except RuntimeError as error:
        raise InvalidOptionError(f"index {shown!r} cannot be used: {reason(error)}") from error
