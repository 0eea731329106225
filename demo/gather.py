"""Gathering scattered records into one tensor: mapped, against the ways it is usually done.

Each way is timed as gather plus one read of every byte, because a mapped gather moves nothing until it is read.
"""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import memodb

__all__ = ["GatherTimes", "compare", "reference_size"]

_REPEATS = 9


@dataclass(frozen=True)
class GatherTimes:
    """Median seconds of gather plus read of one batch, by way.

    Attributes
    ----------
    title
        What was gathered.
    nbytes
        Bytes of the batch.
    zero_copy
        Whether memodb mapped pages; otherwise its cost model chose to copy.
    seconds
        By way; ``"already contiguous (floor)"`` is the read alone.
    """

    title: str
    nbytes: int
    zero_copy: bool
    seconds: dict[str, float]


def compare(db: memodb.MemoDB, ids: Sequence[int], batch: int, folder: Path, title: str) -> GatherTimes:
    """Time the gather of ``batch`` random records out of ``ids``.

    Parameters
    ----------
    db
        A store of records that numpy has a dtype for.
    ids
        Records to choose from. They are copied once to a file and once to memory, for the other ways.
    batch
        Records a gather.
    folder
        Where the file goes, beside the store, so that both lie in the same kind of memory.
    title
        What to call it.
    """
    records = db.multiget(ids)
    file = folder / "gather-comparison.raw"
    records.tofile(file)
    try:
        plain = np.memmap(file, dtype=records.dtype, mode="r", shape=records.shape)
        tensor = torch.from_numpy(records)
        rows = np.random.default_rng(0).permutation(len(ids))[:batch]
        chosen = np.asarray(ids, dtype=np.int64)[rows]
        index = torch.from_numpy(rows)
        warm = tensor.index_select(0, index)

        def mapped() -> Tensor:
            batch: Tensor = db.multiget_mapped(chosen).torch()
            return batch

        ways: dict[str, Callable[[], Tensor]] = {
            "already contiguous (floor)": lambda: warm,
            "memodb multiget_mapped": mapped,
            "torch.index_select(out=warm)": lambda: torch.index_select(tensor, 0, index, out=warm),
            "torch.index_select": lambda: tensor.index_select(0, index),
            "np.memmap[ids]": lambda: torch.from_numpy(_gather(plain, rows)),
        }
        seconds = _medians(ways)
        zero_copy = bool(db.multiget_mapped(chosen).zero_copy)
        nbytes = warm.numel() * warm.element_size()
    finally:
        file.unlink()
    return GatherTimes(title, nbytes, zero_copy, seconds)


def reference_size(folder: Path, *, records: int = 64) -> GatherTimes:
    """Time the gather of 64 records as large as a BERT-base layer at 512 tokens: 12x512x512 float16, 6.3 MB each."""
    path = folder / "reference-size"
    shape = (12, 512, 512)
    values: NDArray[np.float16] = np.random.default_rng(0).random((8, *shape), dtype=np.float32).astype(np.float16)
    try:
        with memodb.MemoDB.create(path, shape=shape, dtype="float16") as db:
            ids = np.concatenate([db.put(values) for _ in range(records // len(values))])
            return compare(db, ids.tolist(), records, folder, f"{records} records of 12x512x512 float16")
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _gather(plain: np.memmap[Any, Any], rows: NDArray[np.int64]) -> NDArray[Any]:
    return np.asarray(plain[rows])


def _medians(ways: dict[str, Callable[[], Tensor]]) -> dict[str, float]:
    """Time all ways in turn, so that a slow moment of the machine hits each of them."""
    times: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(_REPEATS + 1):
        for way, gather in ways.items():
            began = perf_counter()
            batch = gather()
            _read(batch)
            took = perf_counter() - began
            del batch
            if turn:
                times[way].append(took)
    return {way: statistics.median(taken) for way, taken in times.items()}


def _read(batch: Tensor) -> int:
    whole = batch.reshape(-1)
    width = 8 // whole.element_size()
    return int(whole[: len(whole) // width * width].view(torch.int64).sum())
