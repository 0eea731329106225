"""A small store whose every byte is known, what is done with it, and how it is looked through afterwards."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import memodb

SHAPE = (2, 1024)
NBYTES = 2 * 1024 * 4
#: Arguments of ``MemoDB.create``: small segments, so that a put takes two; one that asks for huge pages; and others.
KINDS: dict[str, dict[str, Any]] = {
    "arena": {"backend": "arena", "segment_bytes": 8 * NBYTES},
    "huge": {"backend": "arena", "segment_bytes": 4 << 20},
    "files": {"backend": "files"},
    "lmdb": {"backend": "lmdb", "map_bytes": 1 << 20},
    "zarr": {"backend": "zarr", "shard_records": 2},
}
#: A graph from the first key on, so it is saved.
INDEX = "HNSW8"
#: Namespace of a record, by its id; what the next put stores.
BATCH = range(15, 21)
DELETED = (0, 11)


def namespace(number: int) -> str:
    return "b" if 5 <= number < 10 else "a"


def value(number: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(number).standard_normal(SHAPE).astype(np.float32)


def key(number: int) -> np.ndarray[Any, Any]:
    return np.array([number, number % 3], np.float32)


def put(db: memodb.MemoDB, numbers: range) -> list[int]:
    """Put the records of consecutive ids, in one batch."""
    ids = db.put(
        np.stack([value(i) for i in numbers]),
        np.stack([key(i) for i in numbers]),
        namespace=[namespace(i) for i in numbers],
    )
    return [int(i) for i in ids]


def make(path: Path, kind: str) -> set[int]:
    """Make the store; return the ids that live."""
    with memodb.MemoDB.create(path, shape=SHAPE, dtype="float32", key_dim=2, index=INDEX, **KINDS[kind]) as db:
        for start in (0, 5, 10):
            assert put(db, range(start, start + 5)) == list(range(start, start + 5))
            db.search(key(start)[None], namespace=namespace(start))
        db.delete([3, 6, 7, 8, 9])
        return set(db.ids().tolist())


def compact(db: memodb.MemoDB) -> None:
    db.compact()


#: What is done with an open writer: (verb, what it does, ids it adds, ids it takes away).
WRITES: dict[str, tuple[Callable[[memodb.MemoDB], Any], set[int], set[int]]] = {
    "put": (lambda db: put(db, BATCH), set(BATCH), set()),
    "delete": (lambda db: db.delete(DELETED), set(), set(DELETED)),
    "compact": (compact, set(), set()),
    "reindex": (lambda db: db.reindex("HNSW16"), set(), set()),
    "close": (lambda db: db.close(), set(), set()),
}


def look_through(db: memodb.MemoDB, *allowed: set[int]) -> set[int]:
    """Find which of the allowed sets of ids the store holds; every byte, key and namespace of it must be right."""
    live = set(db.ids().tolist())
    assert live in allowed, f"ids {sorted(live)}, expected one of {[sorted(ids) for ids in allowed]}"
    ids = sorted(live)
    if ids:
        expected = np.stack([value(i) for i in ids])
        assert np.array_equal(db.multiget(ids), expected), "wrong bytes, copied"
        with db.multiget_mapped(ids[::-1]) as batch:
            assert np.array_equal(batch.numpy(), expected[::-1]), "wrong bytes, mapped"
        assert np.array_equal(db.keys(ids), np.stack([key(i) for i in ids])), "wrong keys"
    for name in ("a", "b"):
        mine = [i for i in ids if namespace(i) == name]
        assert db.ids(name).tolist() == mine
        everything = db.search(np.zeros((1, 2), np.float32), k=64, namespace=name).ids[0]
        assert sorted(i for i in everything.tolist() if i >= 0) == mine, "index and catalog do not know the same"
        if mine:
            found = db.search(np.stack([key(i) for i in mine]), namespace=name)
            assert found.ids[:, 0].tolist() == mine, "the index does not find what the catalog knows"
            assert not found.distances[:, 0].any()
    assert db.verify() == []
    return live


def leftovers(db: memodb.MemoDB) -> list[str]:
    """Return what lies in a store that nobody needs: files of no record, and room beyond what the store tells of."""
    path, found = Path(db.path), []
    files = [file for file in (path / "values").rglob("*") if file.is_file()]
    match db.backend_name:
        case "arena":
            held = sum(file.stat().st_size for file in files)
            if held != db.stats()["bytes_on_store"]:
                found.append(f"segments of {held} bytes, {db.stats()['bytes_on_store']} are told of")
        case "files":
            if NBYTES * len(files) != db.stats()["bytes_on_store"]:
                found.append(f"{len(files)} files, {db.stats()['bytes_on_store']} bytes are told of")
        case "lmdb":
            found += [str(folder) for folder in sorted((path / "values").iterdir())[1:]]
        case "zarr":
            found += [str(file) for file in files if ".partial" in file.name]
            objects = [file for file in files if file.name.startswith("c.")]
            if sum(file.stat().st_size for file in objects) != db.stats()["bytes_on_store"]:
                found.append(f"{objects}, {db.stats()['bytes_on_store']} bytes are told of")
    return found + [str(file) for file in path.glob("index/*") if file.suffix != ".index"]


def open_below(folder: Path) -> list[str]:
    """Return what this process has open or mapped below a folder."""
    maps = [line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]
    for fd in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            continue
        if str(folder) in target:
            maps.append(target)
    return maps
