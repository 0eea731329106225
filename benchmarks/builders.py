"""The files that contenders gather from, each filled from the plain file of `Records`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import memodb
from benchmarks.contenders import Contender
from benchmarks.records import Records


def _build_memodb(records: Records, path: Path) -> None:
    with memodb.MemoDB.create(path, shape=records.shape, dtype=records.dtype) as db:
        for _, values in records.blocks():
            db.put(values)


def _build_h5(records: Records, path: Path) -> None:
    import h5py

    with h5py.File(path, "w") as file:
        made = file.create_dataset("records", (records.stored, *records.shape), records.dtype)  # contiguous
        for start, values in records.blocks():
            made[start : start + len(values)] = values


def _build_zarr(records: Records, path: Path) -> None:
    import zarr

    shape, chunks = (records.stored, *records.shape), (1, *records.shape)
    made = zarr.create_array(path, shape=shape, chunks=chunks, dtype=records.dtype, compressors=None)
    for start, values in records.blocks():
        made[start : start + len(values)] = values


def _build_lmdb(records: Records, path: Path) -> None:
    import lmdb

    with lmdb.open(str(path), map_size=2 * records.stored * (records.nbytes + 8192) + (16 << 20)) as environment:
        for start, values in records.blocks():
            with environment.begin(write=True) as transaction:
                for i, value in enumerate(values, start):
                    transaction.put(b"%08d" % i, value.tobytes())


def _build_safetensors(records: Records, path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({str(i): value for i, value in enumerate(records.open())}, path)


BUILDERS: dict[str, Callable[[Records, Path], None]] = {
    "memodb": _build_memodb,
    "h5": _build_h5,
    "zarr": _build_zarr,
    "lmdb": _build_lmdb,
    "safetensors": _build_safetensors,
}


def build(contender: Contender) -> None:
    """Make the file that a contender needs, unless an earlier one did."""
    if not contender.path.exists():
        BUILDERS[contender.store](contender.records, contender.path)
