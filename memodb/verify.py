"""Reading a whole store back against what the catalog says."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from memodb.catalog import Catalog
from memodb.catalog.catalog import grouped
from memodb.checksum import crc32c
from memodb.errors import CorruptionError, RecordNotFoundError, UnsafePathError
from memodb.problem import Problem

if TYPE_CHECKING:
    from memodb.database import MemoDB

_CHUNK_BYTES = 64 << 20


def verify(db: MemoDB, catalog: Catalog, progress: Callable[[int, int], None] | None) -> list[Problem]:
    """Return everything that is wrong with the store (see `MemoDB.verify`)."""
    ids, rows = catalog.live()
    problems: list[Problem] = []
    step = max(1, _CHUNK_BYTES // db.spec.nbytes)
    for start in range(0, len(ids), step):
        part = slice(start, start + step)
        problems += _check_records(db, ids[part], rows["checksum"][part])
        if progress is not None:
            progress(min(start + step, len(ids)), len(ids))
    problems += _check_counts(catalog)
    problems += _check_names(catalog, rows)
    if db.key_dim:
        problems += _check_keys(catalog, ids, rows)
    return problems


def _check_records(db: MemoDB, ids: np.ndarray[Any, Any], sums: np.ndarray[Any, Any]) -> list[Problem]:
    try:
        batch = db._read_back(ids)
    except RecordNotFoundError:
        # Another process deleted some of them since the list was made.
        still = np.array([id in db for id in ids.tolist()])
        return _check_records(db, ids[still], sums[still])
    except (CorruptionError, UnsafePathError) as error:
        if len(ids) == 1:
            return [Problem("segment", str(error), int(ids[0]))]
        half = len(ids) // 2
        return _check_records(db, ids[:half], sums[:half]) + _check_records(db, ids[half:], sums[half:])
    problems = []
    for id, record, expected in zip(ids.tolist(), batch, sums.tolist(), strict=True):
        found = crc32c(np.ascontiguousarray(record))
        if found != expected:
            problems.append(
                Problem(
                    "checksum",
                    f"record {id} of {db.path}: CRC-32C {found:#010x}, expected {expected:#010x}; its bytes were "
                    "changed on the store: delete it and put it again, or restore it from a copy",
                    id,
                )
            )
    return problems


def _check_counts(catalog: Catalog) -> list[Problem]:
    counted, in_namespaces, rows = catalog.count()
    if counted == in_namespaces == rows:
        return []
    return [
        Problem(
            "counts",
            f"{catalog.path} counts {counted} records, {in_namespaces} in its namespaces, and has rows of {rows}: "
            "records were lost; restore the store from a copy",
        )
    ]


def _check_names(catalog: Catalog, rows: np.ndarray[Any, Any]) -> list[Problem]:
    try:
        lost = catalog.nameless(rows)
    except CorruptionError as error:
        return [Problem("names", str(error))]
    return [
        Problem("names", f"namespace {number} of {catalog.path} has no name, or two; restore the store from a copy")
        for number in lost
    ]


def _check_keys(catalog: Catalog, ids: np.ndarray[Any, Any], rows: np.ndarray[Any, Any]) -> list[Problem]:
    problems = []
    numbers, places = np.unique(rows["namespace"], return_inverse=True)
    for number, members in zip(numbers.tolist(), grouped(places, len(numbers)) if len(numbers) else [], strict=True):
        mine = ids[members]
        try:
            added = [entry.ids for entry in catalog.journal(number, 0) if entry.keys is not None]
        except CorruptionError as error:
            problems.append(Problem("keys", str(error)))
            continue
        lost = np.setdiff1d(mine, np.concatenate([np.zeros(0, np.int64), *added]))
        if len(lost):
            lost = lost[catalog.is_live(lost)]
        problems += [
            Problem("keys", f"record {id} of {catalog.path.parent} has no key: put it again", id)
            for id in lost.tolist()
        ]
    return problems
