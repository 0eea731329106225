"""What of a saved index is believed: faiss' reader trusts its files, and so does its search.

A checksum tells damage. It does not tell a file that somebody made up; so sizes are bounded before faiss allocates, and
what it read is compared with what the store's factory makes, and looked through for positions that point nowhere.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import faiss as _faiss
import numpy as np

from memodb.index.factory import parts

# Its stubs know a part of its names only.
faiss: Any = _faiss

#: Whatever an index takes beside what grows with its keys.
_FIXED = 16 << 20
#: Numbers that two indexes of one kind share: of an index, of a quantizer inside, of a transformation.
_SAME = ("d", "metric_type", "metric_arg", "code_size", "nlist", "by_residual", "is_trained", "d_in", "d_out")
_SAME_PQ = ("d", "M", "nbits", "ksub", "dsub", "code_size")
_SAME_SQ = ("d", "qtype", "bits", "code_size")


def most_bytes(n: int, key_dim: int, factory: str) -> int:
    """Return more bytes than an index of `n` keys takes when it is saved."""
    links = max([32, *(min(int(found), 1 << 16) for found in re.findall(r"HNSW(\d{1,9})", factory))])
    # Ids, the keys in two copies (a refined index), codes and what a trained one has of centroids; links of a graph.
    return _FIXED + (n + 1) * (64 + 16 * key_dim + 24 * links) + 64 * key_dim * (key_dim + 1024)


def read_index(data: np.ndarray[Any, np.dtype[np.uint8]]) -> Any:
    """Return what faiss reads from `data`, none of its vectors larger than that.

    Raises
    ------
    RuntimeError
        If faiss cannot read it.
    """
    with _bounded(len(data)):
        try:
            return faiss.deserialize_index(data)
        except MemoryError as error:
            raise RuntimeError("it claims more memory than there is") from error


@contextmanager
def _bounded(nbytes: int) -> Iterator[None]:
    if not hasattr(faiss, "set_deserialization_vector_byte_limit"):  # an older faiss
        yield
        return
    global _usual
    with _limits:  # they are the process's
        _usual = faiss.get_deserialization_vector_byte_limit(), faiss.get_deserialization_loop_limit()
        try:
            faiss.set_deserialization_vector_byte_limit(nbytes)
            faiss.set_deserialization_loop_limit(nbytes)
            yield
        finally:
            _lift()


def _lift() -> None:
    global _usual
    if _usual is not None:
        faiss.set_deserialization_vector_byte_limit(_usual[0])
        faiss.set_deserialization_loop_limit(_usual[1])
        _usual = None


def _after_fork_in_child() -> None:
    global _limits
    _limits = threading.Lock()
    _lift()  # another thread was reading one when the process forked


_limits = threading.Lock()
#: faiss's limits while others are in force.
_usual: tuple[int, int] | None = None
os.register_at_fork(after_in_child=_after_fork_in_child)


def can_be_read(index: Any) -> bool:
    """Tell whether an index of this kind can be looked through: faiss' packed ones (fast scan) end the process."""
    return not any("FastScan" in type(part).__name__ for part in parts(index))


def require_kind(found: Any, target: Any, n: int) -> None:
    """Make sure that an index is one of `n` keys, of the kind that `target` is, and points nowhere outside.

    Raises
    ------
    ValueError
        If it is not.
    """
    if found.ntotal != n or found.d != target.d:
        raise ValueError(f"an index of {found.ntotal} keys of width {found.d}, expected {n} of width {target.d}")
    if not can_be_read(found):
        raise ValueError("its kind is not read back")
    here, there = list(parts(found)), list(parts(target))
    if [type(part) for part in here] != [type(part) for part in there]:
        names = [" of ".join(type(part).__name__ for part in found_parts) for found_parts in (here, there)]
        raise ValueError(f"it is a {names[0]}, expected a {names[1]}")
    for part, wanted in zip(here, there, strict=True):
        for path, shared in (("", _SAME), ("pq", _SAME_PQ), ("sq", _SAME_SQ)):
            mine, its = (getattr(part, path, None), getattr(wanted, path, None)) if path else (part, wanted)
            for name in shared if its is not None else ():
                value, expected = getattr(mine, name, None), getattr(its, name, None)
                if value != expected and not (name == "is_trained" and value):
                    raise ValueError(f"{name} of its {type(part).__name__} is {value}, expected {expected}")
        _require_inside(part, n)


def _require_inside(part: Any, n: int) -> None:
    """Look through one part: it must have its keys, and point to no others."""
    if isinstance(part, faiss.IndexFlatCodes):
        if part.codes.size() != part.ntotal * part.code_size:
            raise ValueError(f"{part.codes.size()} bytes of codes, expected {part.ntotal * part.code_size}")
    elif isinstance(part, faiss.IndexHNSW):
        if part.storage is None or part.storage.ntotal != part.ntotal:
            raise ValueError("its graph and its keys do not belong together")
        _require_graph(part.hnsw, part.ntotal)
    elif isinstance(part, faiss.IndexIVF):
        if part.quantizer is None or part.quantizer.ntotal not in (0, part.nlist):
            raise ValueError("its lists and their centroids do not belong together")
        if part.quantizer.ntotal == 0 and part.ntotal:
            raise ValueError("its lists have no centroids")
        _require_lists(part, n)
    elif getattr(part, "ntotal", None) is not None and part.ntotal > n:
        raise ValueError(f"a part of it has {part.ntotal} keys of {n}")
    pq = getattr(part, "pq", None)
    if pq is not None and part.is_trained and pq.centroids.size() != pq.M * pq.ksub * pq.dsub:
        raise ValueError("its centroids are too few")


def _require_graph(graph: Any, n: int) -> None:
    levels, offsets = faiss.vector_to_array(graph.levels), faiss.vector_to_array(graph.offsets).astype(np.int64)
    links, per_level = faiss.vector_to_array(graph.neighbors), faiss.vector_to_array(graph.cum_nneighbor_per_level)
    if len(levels) != n or len(offsets) != n + 1 or not -1 <= graph.entry_point < n:
        raise ValueError(f"a graph of {len(levels)} nodes that begins at {graph.entry_point}, expected {n} nodes")
    if n == 0:
        return
    if graph.entry_point < 0 or levels.min() < 1 or levels.max() >= len(per_level):
        raise ValueError("levels of its graph that it does not have")
    if graph.max_level != levels[graph.entry_point] - 1 or (np.diff(per_level) < 0).any() or per_level[0] != 0:
        raise ValueError("its graph does not begin at the top")
    if offsets[0] != 0 or (np.diff(offsets) != per_level[levels]).any() or offsets[-1] != len(links):
        raise ValueError("nodes of its graph overlap")
    if links.min(initial=0) < -1 or links.max(initial=-1) >= n:
        raise ValueError(f"links of its graph to {links.max()}, of {n} nodes")
    # A link on a level that the other node does not reach would be followed there, beyond its own links.
    for level in range(1, int(levels.max())):
        nodes = np.flatnonzero(levels > level)
        starts = offsets[nodes] + per_level[level]
        width = int(per_level[level + 1] - per_level[level])
        above = links[(starts[:, None] + np.arange(width)).reshape(-1)]
        if (levels[above[above >= 0]] <= level).any():
            raise ValueError("links of its graph lead off their level")


def _require_lists(part: Any, n: int) -> None:
    lists, total = part.invlists, 0
    if lists is None or lists.nlist != part.nlist or lists.code_size != part.code_size:
        raise ValueError("its lists are not those of its kind")
    for i in range(part.nlist):
        size = lists.list_size(i)
        if size == 0:
            continue
        total += size
        ids = faiss.rev_swig_ptr(lists.get_ids(i), size)
        if total > n or ids.min() < 0 or ids.max() >= n:
            raise ValueError(f"list {i} of it points beyond its {n} keys")
    if total != n:
        raise ValueError(f"{total} keys in its lists, expected {n}")


def as_hnsw(index: Any) -> Any:
    """Return the index as a graph, None if it is none."""
    found = faiss.downcast_index(index)
    return found if isinstance(found, faiss.IndexHNSW) else None


def as_ivf(index: Any) -> Any:
    """Return the inverted file in an index, None if there is none."""
    try:
        return faiss.extract_index_ivf(index)
    except RuntimeError:
        return None
