"""Copying a store into another: the way between backends, and from one machine's layout to another's."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np

from memodb import arguments
from memodb.catalog import LIVE
from memodb.checksum import record_checksums
from memodb.database import MemoDB
from memodb.errors import CorruptionError, InvalidOptionError, RecordNotFoundError

_CHUNK_BYTES = 64 << 20


def copy(
    src_path: str | os.PathLike[str],
    dst_path: str | os.PathLike[str],
    *,
    backend: str = "arena",
    index: str | None = None,
    max_bytes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> None:
    """Copy a store, record by record, into a new one; ids, keys and namespaces are kept.

    Parameters
    ----------
    src_path, dst_path
        Directories; the destination must not exist. What is copied are the records that live when the copy begins.
    backend
        Backend of the copy.
    index
        Index factory of the copy; None keeps the source's.
    max_bytes
        Limit of the copy.
    progress
        Called with (records done, records to do).
    **options
        Options of the copy's backend.

    Raises
    ------
    StoreNotFoundError, StoreExistsError
        If there is no source, or something at the destination.
    MemoDBError
        If a record cannot be read or written; the unfinished copy is removed then.
    """
    source, target = arguments.as_path(src_path), arguments.as_path(dst_path)
    if source in target.parents:
        raise InvalidOptionError(f"a store cannot be copied into itself: {target} lies in {source}")
    with MemoDB.open(src_path) as src:
        dst = MemoDB.create(
            dst_path,
            shape=src.spec.shape,
            dtype=src.spec.dtype,
            key_dim=src.key_dim,
            backend=backend,
            index=src.index_factory if index is None else index,
            max_bytes=max_bytes,
            **options,
        )
        try:
            with dst:
                _copy_records(src, dst, progress)
        except BaseException:
            dst._backend.remove()
            shutil.rmtree(dst.path, ignore_errors=True)
            raise


def _copy_records(src: MemoDB, dst: MemoDB, progress: Callable[[int, int], None] | None) -> None:
    next_id = src.stats()["next_id"]
    ids = src.ids()
    step = max(1, _CHUNK_BYTES // src.spec.nbytes)
    for start in range(0, len(ids), step):
        part = ids[start : start + step]
        while not _copy_part(src, dst, part):
            pass
        if progress is not None:
            progress(min(start + step, len(ids)), len(ids))
    dst._catalog.advance(max(next_id, int(np.max(ids, initial=-1)) + 1))


def _copy_part(src: MemoDB, dst: MemoDB, ids: np.ndarray[Any, np.dtype[np.int64]]) -> bool:
    """Copy what lives of `ids`; False if a writer elsewhere deleted some of that meanwhile, and nothing was copied."""
    rows = src._catalog.rows(ids)
    live = rows["state"] == LIVE
    part, expected = ids[live], rows["checksum"][live]
    try:
        names, row_names = arguments.as_namespaces(src.namespace_of(part), len(part))
        keys = None if src.key_dim is None else src.keys(part)
        batch = src.multiget_mapped(part)
    except (RecordNotFoundError, CorruptionError):
        # Compaction takes the keys of the deleted away, which looks like a damaged key.
        if src._catalog.is_live(part).all():
            raise
        return False
    with batch:
        records = batch.numpy()
        changed = part[record_checksums(records) != expected]
        if len(changed):  # a copy gives new checksums: it must not give them to bytes that nobody put
            raise CorruptionError(
                f"record {changed[0]} of {src.path} does not match its checksum ({len(changed)} such records); "
                "delete what verify() names, then copy"
            )
        dst._store(records, keys, names, row_names, part)
    return True
