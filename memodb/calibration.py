"""Measuring what a gather costs on this machine, for the planner of ``strategy="auto"``."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from memodb import vm
from memodb.database import MemoDB
from memodb.gather.batch import MappedBatch
from memodb.gather.costs import SIZES, Costs, calibration_file, costs_here, save_costs
from memodb.gather.gather import gather_batch
from memodb.gather.plan import Strategy
from memodb.threads import MOST

_SMALL, _MEDIUM, _LARGE = 4 << 10, 64 << 10, 2 << 20
#: Largest batch that is measured; larger ones cost as much a byte. The store behind it holds twice as much.
_MOST_BYTES = 256 << 20
#: Batch by which pages are measured.
_BATCH = 64 << 20
_STEPS = 4

Ids = np.ndarray[Any, np.dtype[np.int64]]


def calibrate(
    folder: str | os.PathLike[str] | None = None, progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Measure what mapping and copying cost here, and keep it for every later gather of this user on this machine.

    It takes about half a minute and 1 GiB of memory; nothing else should run meanwhile. The costs go to
    ``$MEMODB_CALIBRATION``, by default ``memodb/calibration.json`` in the user's cache folder.

    Parameters
    ----------
    folder
        Where the scratch stores are made and removed; by default where files are memory (/dev/shm).
    progress
        Called with (steps done, steps in all).

    Returns
    -------
    dict
        ``path``: the file; ``costs``: seconds of each part, see `memodb.gather.costs.Costs`.

    Raises
    ------
    StoreFullError
        If there is no room for the scratch stores.
    OSError
        If the file cannot be written.
    """
    where = folder or ("/dev/shm" if os.access("/dev/shm", os.W_OK) else None)
    scratch = Path(tempfile.mkdtemp(prefix=f"memodb-calibrate-{os.getpid()}-", dir=where))
    tell = progress or (lambda done, steps: None)
    found: dict[str, Any] = {}
    try:
        for step, measure in enumerate((_measure_small, _measure_loose, _measure_medium, _measure_large)):
            measure(scratch / f"{step}", found)
            tell(step + 1, _STEPS)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    costs = Costs(**found)
    path = calibration_file()
    save_costs(costs, path)
    costs_here.cache_clear()
    return {"path": os.fspath(path), "costs": asdict(costs)}


class _Bench:
    """A scratch store, and the clock."""

    def __init__(self, path: Path, nbytes: int, total: int, **options: Any) -> None:
        self.n = total // nbytes
        self.nbytes = nbytes
        self._rng = np.random.default_rng(0)
        self._db = MemoDB.create(path, shape=(nbytes,), dtype="uint8", **options)
        block = np.ones((max(1, min(self.n, (32 << 20) // nbytes)), nbytes), np.uint8)
        for start in range(0, self.n, len(block)):
            self._db.put(block[: self.n - start])

    def __enter__(self) -> _Bench:
        return self

    def __exit__(self, *_: object) -> None:
        path = self._db.path
        self._db.close()
        shutil.rmtree(path)

    def random(self, n: int) -> Ids:
        """Return n ids, no two of them neighbours' neighbours except by chance."""
        return self._rng.choice(self.n, n, replace=False)

    def adjacent(self, n: int) -> Ids:
        """Return n ids that lie side by side."""
        return np.arange(n) + self._rng.integers(0, self.n - n + 1)

    def pieces(self, n: int) -> Ids:
        """Return n ids in runs of 1 MiB: none of them holds a huge page as a whole."""
        return self.adjacent(n).reshape(-1, (1 << 20) // self.nbytes)[::-1].reshape(-1)

    def time(self, draw: Callable[[int], Ids], n: int, strategy: Strategy, threads: int = MOST) -> tuple[float, float]:
        """Return medians of (gather and release, read beyond the read of a warm tensor) of n records, in seconds."""
        warm = np.ones(n * self.nbytes, np.uint8)
        gathers, reads, floors = [], [], []
        for turn in range(max(9, min(41, (64 << 20) // warm.nbytes)) + 2):
            ids = draw(n)
            start = time.perf_counter()
            batch = self._gather(ids, strategy, threads)
            gathered = time.perf_counter()
            _read(batch.numpy())
            read = time.perf_counter()
            del batch
            released = time.perf_counter()
            _read(warm)
            end = time.perf_counter()
            if turn >= 2:
                gathers.append(gathered - start + released - read)
                reads.append(read - gathered)
                floors.append(end - released)
        return median(gathers), median(reads) - median(floors)

    def _gather(self, ids: Ids, strategy: Strategy, threads: int) -> MappedBatch:
        spec = self._db.spec
        return self._db._gathered(ids, lambda source, _: gather_batch(source, spec, ids, strategy, threads=threads))


def _read(values: np.ndarray[Any, Any]) -> None:
    values.reshape(-1).view(np.uint64).max()


def _each(seconds: float, n: float) -> float:
    """Return the share of one in n; noise must not make a cost negative."""
    return max(seconds, 0.0) / n


def _measure_small(path: Path, found: dict[str, Any]) -> None:
    with _Bench(path, _SMALL, 64 << 20) as bench:
        found["copy_call"] = bench.time(bench.random, 1, "copy", 1)[0]
        one = bench.time(bench.random, 1, "map")[0]
        few, many = (sum(bench.time(bench.random, n, "copy", 1)) for n in (32, 1024))
        per_record = _each(many - few, 1024 - 32)
        random = bench.time(bench.random, 512, "map")[0]
        adjacent = bench.time(bench.adjacent, 512, "map")[0]
        found["vma"] = _each(random - adjacent, 511)
        found["map_call"] = max(one - found["vma"], 0.0)
        found["copied_record"] = per_record  # bytes included: taken out when the cost of those is known


def _measure_loose(path: Path, found: dict[str, Any]) -> None:
    with _Bench(path, _LARGE, 4 * _BATCH, huge_pages=False) as bench:
        n = 2 * _BATCH // _LARGE
        seconds = bench.time(bench.random, n, "map")[0] - found["map_call"] - n * found["vma"]
        found["loose_page"] = _each(seconds, 2 * _BATCH / _SMALL)
    start = time.perf_counter()
    vm.unmap(vm.allocate(2 * _BATCH), 2 * _BATCH)
    found["fresh_byte"] = _each(time.perf_counter() - start, 2 * _BATCH)


def _measure_medium(path: Path, found: dict[str, Any]) -> None:
    with _Bench(path, _MEDIUM, 2 * _MOST_BYTES) as bench:
        n = _BATCH // _MEDIUM
        entered = bench.time(bench.pieces, n, "map")[0] - found["map_call"] - 64 * found["vma"]
        found["small_page"] = _each(entered, _BATCH / _SMALL)
        mapped: list[float] = []
        copied: list[list[float]] = [[] for _ in range(MOST)]
        for size in SIZES:
            if size > _MOST_BYTES:
                mapped.append(mapped[-1])
                for curve in copied:
                    curve.append(curve[-1])
                continue
            n = size // _MEDIUM
            mapped.append(_each(bench.time(bench.random, n, "map")[1], size))
            for threads, curve in enumerate(copied, 1):
                seconds = sum(bench.time(bench.random, n, "copy", threads)) - found["copy_call"]
                curve.append(_each(seconds, size))
        found["mapped_byte"] = tuple(mapped)
        found["copied_byte"] = tuple(tuple(curve) for curve in copied)
        found["copied_record"] = max(found["copied_record"] - _SMALL * copied[0][2], 0.0)


def _measure_large(path: Path, found: dict[str, Any]) -> None:
    with _Bench(path, _LARGE, 2 * _MOST_BYTES) as bench:
        n = _MOST_BYTES // _LARGE
        found["huge_page"] = _each(bench.time(bench.adjacent, n, "map")[0] - found["map_call"] - found["vma"], n)
