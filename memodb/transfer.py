"""Copying a store into another: the way between backends, and how a store in memory survives a reboot.

A copy is a store of its own that bears, until it is whole, the setting ``copy_of``. Ids are copied in ascending order
and committed batch by batch, so a copy that was cut off knows by its own next id where to go on.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from memodb import arguments, layout
from memodb.catalog import DELETED, LIVE, Catalog
from memodb.checksum import record_checksums
from memodb.database import MemoDB
from memodb.errors import CorruptionError, InvalidOptionError, MemoDBError, RecordNotFoundError, StoreExistsError

#: Bytes of records read, written and read back at a time; rows of the catalog looked at together.
_CHUNK_BYTES, _CHUNK_ROWS = 64 << 20, 1 << 17
Ids = np.ndarray[Any, np.dtype[np.int64]]
Progress = Callable[[int, int], None]


class _NotKeptError(CorruptionError):
    """The copy does not hold what was written to it."""


def copy(
    src_path: str | os.PathLike[str],
    dst_path: str | os.PathLike[str],
    *,
    backend: str = "arena",
    index: str | None = None,
    max_bytes: int | None = None,
    progress: Progress | None = None,
    verify: bool = True,
    permissions: int = 0o700,
    **options: Any,
) -> None:
    """Copy a store, record by record, into a new one; ids, keys, namespaces and tombstones are kept.

    Called again with the same arguments after it was cut off (killed, interrupted, out of room), it goes on where it
    stopped. Until it is done, the copy cannot be opened.

    Parameters
    ----------
    src_path, dst_path
        Directories; the destination must not exist, or be an unfinished copy of the same store. What is copied are the
        records that live when the copy begins, or goes on.
    backend
        Backend of the copy.
    index
        Index factory of the copy; None keeps the source's.
    max_bytes
        Limit of the copy.
    progress
        Called with (records done, records to do).
    verify
        Read each batch back from the copy and compare it with its checksums. (The source's are compared in any case.)
    permissions
        Of the copy, as for `MemoDB.create`.
    **options
        Options of the copy's backend.

    Raises
    ------
    StoreNotFoundError
        If there is no source.
    StoreExistsError
        If there is something at the destination, other than a copy to go on with.
    CorruptionError
        If a record of the source does not match its checksum, or does not come back from the copy.
    MemoDBError
        If a record cannot be read or written. What was copied stays, to go on with.
    """
    source, target = arguments.as_path(src_path), arguments.as_path(dst_path)
    if source.resolve() in target.resolve().parents:
        raise InvalidOptionError(f"a store cannot be copied into itself: {target} lies in {source}")
    if layout.is_memory(src_path) or layout.is_memory(dst_path):
        raise InvalidOptionError(f"{layout.MEMORY!r} is a new store each time: it cannot be copied, nor kept a copy in")
    with MemoDB.open(source) as src, _destination(src, target, backend, index, max_bytes, options, permissions) as dst:
        try:
            _copy_records(src, dst, progress, verify)
        except _NotKeptError:
            raise
        except BaseException as error:
            if dst._catalog.counters()[0]:
                error.add_note(f"what was copied stays in {target}: asking for the same again goes on from there")
            else:  # nothing to go on with
                dst._backend.remove()
                shutil.rmtree(target, ignore_errors=True)
            raise
        dst._catalog.change_settings(copy_of=None, copied_from=dst._catalog.settings["copy_of"])


def _destination(
    src: MemoDB,
    target: Path,
    backend: str,
    index: str | None,
    max_bytes: int | None,
    options: dict[str, Any],
    permissions: int,
) -> MemoDB:
    """Return the new store, or the unfinished copy of the same source."""
    asked = {
        "uid": src._catalog.settings["uid"],
        "path": os.fspath(src.path),
        "asked": json.dumps([backend, index, max_bytes, options], sort_keys=True, default=str),
    }
    try:
        return MemoDB._create(
            target,
            src.spec.shape,
            src.spec.dtype,
            src.key_dim,
            backend,
            src.index_factory if index is None else index,
            max_bytes,
            options,
            permissions,
            copy_of=asked,
        )
    except StoreExistsError as error:
        begun, done = _begun(target)
        if done is not None and done["uid"] == asked["uid"]:
            raise StoreExistsError(f"{target} is a finished copy of {done['path']}: nothing is left to do") from error
        if begun is None:
            raise
    if begun["uid"] != asked["uid"] or begun["asked"] != asked["asked"]:
        raise StoreExistsError(
            f"{target} holds an unfinished copy of {begun['path']} that was begun with other arguments "
            f"([backend, index, max_bytes, options]: {begun['asked']}): go on with those, or remove the directory"
        )
    return MemoDB._open(target, "r+", unfinished=True)


def _begun(target: Path) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Return what a copy at `target` was begun with, and what it was when it was finished; None each if it was not."""
    try:
        catalog = Catalog(target / layout.CATALOG)
    except MemoDBError:
        return None, None
    settings = catalog.settings
    catalog.close()
    return settings.get("copy_of"), settings.get("copied_from")


def _copy_records(src: MemoDB, dst: MemoDB, progress: Progress | None, verify: bool) -> None:
    end = src._catalog.counters()[0]
    start = dst._catalog.counters()[0]
    step = max(1, _CHUNK_BYTES // src.spec.nbytes)
    unit = dst._backend.unit  # whole objects, where records share one
    step = max(unit, step // unit * unit)
    if start:
        copied = dst.ids()
        gone = ~src._catalog.is_live(copied)
        dst.delete(copied[gone])  # deleted over there since
        # A kill may have come between a part's commit and its reading back, and a part that did not come back stays.
        for first in range(0, len(copied) if verify else 0, step):
            _read_back(dst, copied[~gone][first : first + step])
    total = len(src)
    while start < end:
        ids = np.arange(start, min(end, start + _CHUNK_ROWS))
        states = src._catalog.rows(ids)["state"]
        enough = np.searchsorted(np.cumsum(states == LIVE), step)
        ids = ids[: enough + 1]
        while not _copy_part(src, dst, ids, verify):
            pass
        start = int(ids[-1]) + 1
        if progress is not None:
            progress(min(len(dst), total), total)
    # Tombstones behind the last live record: what they took is not given out again.
    dst._catalog.bury(np.zeros(0, np.int64), [], np.zeros(0, np.intp), end)


def _copy_part(src: MemoDB, dst: MemoDB, ids: Ids, verify: bool) -> bool:
    """Copy what there is of `ids`; False if a writer elsewhere deleted some of that meanwhile, and nothing was copied.

    Tombstones first: whoever goes on after a crash begins behind the last id that is committed.
    """
    rows = src._catalog.rows(ids)
    live, dead = rows["state"] == LIVE, rows["state"] == DELETED
    part, expected = ids[live], rows["checksum"][live]
    try:
        names, row_names = arguments.as_namespaces(src._catalog.names_of(rows["namespace"][live]), len(part))
        keys = None if src.key_dim is None else src.keys(part)
        batch = src.multiget_mapped(part)
    except RecordNotFoundError:
        if src._catalog.is_live(part).all():
            raise
        return False
    dead_names, dead_rows = arguments.as_namespaces(src._catalog.names_of(rows["namespace"][dead]), int(dead.sum()))
    dst._catalog.bury(ids[dead], dead_names, dead_rows, 0 if len(part) else int(ids[-1]) + 1)
    with batch:
        records = batch.numpy()
        changed = part[record_checksums(records) != expected]
        if len(changed):  # a copy gives new checksums: it must not give them to bytes that nobody put
            raise CorruptionError(
                f"record {changed[0]} of {src.path} does not match its checksum ({len(changed)} such records); "
                "delete what verify() names, then copy"
            )
        dst._store(records, keys, names, row_names, part)
        del records
    if verify and len(part):
        _read_back(dst, part)
    return True


def _read_back(dst: MemoDB, ids: Ids) -> None:
    with dst.multiget_mapped(ids) as batch:
        wrong = ids[record_checksums(batch.numpy()) != dst._catalog.rows(ids)["checksum"]]
    if len(wrong):
        raise _NotKeptError(
            f"record {wrong[0]} does not come back from {dst.path} as it was written ({len(wrong)} such records): what "
            "holds that store fails; remove the copy, and make it elsewhere"
        )
