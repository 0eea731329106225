"""The verbs of the ``memodb`` command, each a few calls of the public API."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import numpy as np

import memodb
from memodb.cli.output import plain, print_facts, print_json, print_table, progress_bar, readable_bytes


def _require_lasting(arguments: argparse.Namespace) -> None:
    for backend in memodb.available_backends():
        if backend.name == arguments.backend and not backend.abilities.get("shared", True):
            raise memodb.InvalidOptionError(
                f"backend {backend.name!r} keeps records in the memory of one process, and this one ends with the "
                "command: choose another backend"
            )


def create(arguments: argparse.Namespace) -> int:
    """Make an empty store."""
    _require_lasting(arguments)
    with memodb.MemoDB.create(
        arguments.path,
        shape=arguments.shape,
        dtype=arguments.dtype,
        key_dim=arguments.key_dim,
        backend=arguments.backend,
        index=arguments.index,
        max_bytes=arguments.max_bytes,
        permissions=arguments.permissions,
        **dict(arguments.option),
    ) as db:
        _show(describe(db), arguments)
    return 0


def info(arguments: argparse.Namespace) -> int:
    """Tell what a store is and holds."""
    with memodb.MemoDB.open(arguments.path) as db:
        _show({**describe(db), "stats": db.stats()}, arguments)
    return 0


def verify(arguments: argparse.Namespace) -> int:
    """Read everything back; status 1 when something is wrong."""
    with memodb.MemoDB.open(arguments.path) as db, progress_bar("verify") as progress:
        records = len(db)
        problems = db.verify(progress=progress)
    if arguments.json:
        found = [{"kind": p.kind, "message": p.message, "id": p.id} for p in problems]
        print_json({"records": records, "problems": found})
    else:
        for problem in problems:
            print(f"{problem.kind}: {problem.message}")
        print(f"{records:,} records, {len(problems):,} problems")
    return 1 if problems else 0


def copy(arguments: argparse.Namespace) -> int:
    """Copy a store."""
    _require_lasting(arguments)
    with progress_bar("copy") as progress:
        try:
            memodb.copy(
                arguments.source,
                arguments.destination,
                backend=arguments.backend,
                index=arguments.index,
                max_bytes=arguments.max_bytes,
                verify=not arguments.no_verify,
                permissions=arguments.permissions,
                progress=progress,
                **dict(arguments.option),
            )
        except (memodb.MemoDBError, OSError, KeyboardInterrupt) as error:
            for note in getattr(error, "__notes__", ()):
                print(f"memodb: {note}", file=sys.stderr)
            raise
    with memodb.MemoDB.open(arguments.destination) as db:
        _show(describe(db), arguments)
    return 0


def compact(arguments: argparse.Namespace) -> int:
    """Give back the bytes of deleted records."""
    with memodb.MemoDB.open(arguments.path, mode="r+") as db, progress_bar("compact") as progress:
        returned = db.compact(progress=progress)
    if arguments.json:
        print_json({"bytes_returned": returned})
    else:
        print(f"{readable_bytes(returned)} given back ({returned:,} bytes)")
    return 0


def search(arguments: argparse.Namespace) -> int:
    """Find the nearest records."""
    keys = _load_keys(arguments.keys) if arguments.keys else np.array(_rectangular(arguments.key), np.float32)
    with memodb.MemoDB.open(arguments.path) as db:
        result = db.search(keys, arguments.k, namespace=arguments.namespace, max_distance=arguments.max_distance)
    hits = [
        [{"id": int(i), "distance": float(d)} for i, d in zip(ids, distances, strict=True) if i >= 0]
        for ids, distances in zip(result.ids, result.distances, strict=True)
    ]
    if arguments.json:
        print_json({"hits": hits})
        return 0
    rows = [[row, hit["id"], f"{hit['distance']:.6g}"] for row, found in enumerate(hits) for hit in found]
    print_table(["key", "id", "squared L2"], rows)
    return 0


def get(arguments: argparse.Namespace) -> int:
    """Read records into a file, or summarise them."""
    with memodb.MemoDB.open(arguments.path) as db:
        values = db.multiget(arguments.ids)
        spec = db.spec
    if arguments.output:
        stored = _savable(values)
        np.save(arguments.output, stored, allow_pickle=False)
        facts: dict[str, Any] = {"output": arguments.output, "shape": list(values.shape), "dtype": spec.dtype_name}
        if stored.dtype != values.dtype:
            facts["stored_as"] = str(stored.dtype)
        _show(facts, arguments)
        return 0
    rows = [_summary(i, value) for i, value in zip(arguments.ids, values, strict=True)]
    if arguments.json:
        print_json({"shape": spec.shape, "dtype": spec.dtype_name, "records": rows})
    else:
        print_table(list(rows[0]), [[f"{v:.6g}" if isinstance(v, float) else v for v in row.values()] for row in rows])
    return 0


def backends(arguments: argparse.Namespace) -> int:
    """List the known backends."""
    known = memodb.available_backends()
    if arguments.json:
        print_json(
            [{"name": b.name, "installed": b.installed, "hint": b.hint, "abilities": b.abilities} for b in known]
        )
        return 0
    rows = []
    for backend in known:
        able = ", ".join(
            name if value is True else f"{name}: {value}" for name, value in backend.abilities.items() if value
        )
        rows.append([backend.name, "yes" if backend.installed else f"no: {backend.hint}", able or "-"])
    print_table(["backend", "installed", "abilities"], rows)
    return 0


def describe(db: memodb.MemoDB) -> dict[str, Any]:
    """Return what a store is, from its handle."""
    return {
        "path": str(db.path),
        "backend": db.backend_name,
        "shape": list(db.spec.shape),
        "dtype": db.spec.dtype_name,
        "record_bytes": db.spec.nbytes,
        "key_dim": db.key_dim,
        "index": db.index_factory,
        "records": len(db),
    }


def _show(facts: dict[str, Any], arguments: argparse.Namespace) -> None:
    if arguments.json:
        print_json(facts)
    else:
        print_facts(plain(facts))


def _load_keys(path: str) -> np.ndarray[Any, Any]:
    try:
        # Never unpickle what somebody else wrote.
        loaded = np.load(path, allow_pickle=False)
    except ValueError as error:
        raise memodb.InvalidKeyError(f"{path}: not a numpy file of plain numbers, as np.save writes it") from error
    if not isinstance(loaded, np.ndarray):
        raise memodb.InvalidKeyError(f"{path}: expected one array (.npy), found an archive")
    return loaded


def _rectangular(keys: list[list[float]]) -> list[list[float]]:
    widths = sorted({len(key) for key in keys})
    if len(widths) > 1:
        raise memodb.InvalidKeyError(f"keys of different widths: {widths}; expected the store's key_dim for each")
    return keys


def _savable(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    # A numpy file knows no bfloat16 or float8: they go as unsigned integers of the same width, bit for bit.
    return values if values.dtype.type.__module__ == "numpy" else values.view(f"u{values.dtype.itemsize}")


def _summary(record_id: int, value: np.ndarray[Any, Any]) -> dict[str, Any]:
    with np.errstate(all="ignore"):  # records may hold NaN and infinities: the summary shows them
        wide = np.abs(value) if value.dtype.kind == "c" else value
        wide = wide.astype(np.float64)
        return {"id": record_id, "min": float(wide.min()), "mean": float(wide.mean()), "max": float(wide.max())}
