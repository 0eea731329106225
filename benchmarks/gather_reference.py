"""Gather 64 random records of 12x512x512 float16 and read every byte once: memodb beside its peers, taking turns.

Run, as any user, from the repository: ``.venv/bin/python benchmarks/gather_reference.py``

The contenders of a round gather the same records one after the other, so that a machine whose speed drifts treats all
alike. Printed are medians in milliseconds and ratios to the floor, which is the same read of a tensor that is
contiguous already. Memory in use stays below 4 GiB; whatever is written is removed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import memodb

SHAPE = (12, 512, 512)
NBYTES = 2 * 12 * 512 * 512


def read(values: np.ndarray[Any, Any]) -> None:
    """Read every byte once, at the speed of memory."""
    values.reshape(-1).view(np.uint64).max()


def build(folder: Path, stored: int) -> tuple[memodb.MemoDB, np.ndarray[Any, Any]]:
    """Put `stored` records into a store and into one plain file beside it."""
    db = memodb.MemoDB.create(folder / "store", shape=SHAPE, dtype="float16")
    plain = np.lib.format.open_memmap(folder / "plain.npy", mode="w+", dtype=np.float16, shape=(stored, *SHAPE))
    rng = np.random.default_rng(0)
    for i in range(stored):
        plain[i] = rng.integers(0, 1000, SHAPE, dtype=np.int16)
        db.put(plain[i : i + 1])
    return db, np.load(folder / "plain.npy", mmap_mode="r")


def contenders(db: memodb.MemoDB, plain: np.ndarray[Any, Any], n: int) -> dict[str, Callable[[Any], Any]]:
    """Return the ways to gather, by name; each takes ids and returns the batch."""
    warm = np.ones((n, *SHAPE), np.float16)
    ways: dict[str, Callable[[Any], Any]] = {
        "floor: contiguous already": lambda ids: warm,
        "memodb multiget_mapped": db.multiget_mapped,
        'memodb multiget_mapped("copy")': lambda ids: db.multiget_mapped(ids, strategy="copy"),
        "np.take(out=warm)": lambda ids: np.take(plain, ids, 0, out=warm, mode="clip"),
        "np.memmap[ids]": lambda ids: plain[ids],
    }
    try:
        import torch
    except ImportError:
        return ways
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that the file is read-only; nothing writes to it
        source = torch.from_numpy(plain)
    target = torch.from_numpy(warm)
    ways["torch.index_select(out=warm)"] = lambda ids: torch.index_select(
        source, 0, torch.from_numpy(ids), out=target
    ).numpy()
    return ways


def measure(ways: dict[str, Callable[[Any], Any]], stored: int, n: int, rounds: int) -> dict[str, tuple[float, float]]:
    """Return (gather, gather + read) of each way in seconds, medians of `rounds` rounds after two that do not count."""
    rng = np.random.default_rng(1)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for round_number in range(rounds + 2):
        ids = rng.choice(stored, n, replace=False)
        for name, gather in ways.items():
            start = time.perf_counter()
            found = gather(ids)
            gathered = time.perf_counter()
            read(found.numpy() if isinstance(found, memodb.MappedBatch) else found)
            end = time.perf_counter()
            del found
            if round_number >= 2:
                times[name].append((gathered - start, end - start))
    return {name: (median(g for g, _ in pairs), median(r for _, r in pairs)) for name, pairs in times.items()}


def main() -> None:
    """Build, measure, print, clean up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=64, help="records a gather (default: %(default)s)")
    parser.add_argument("--stored", type=int, default=160, help="records in the store (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=31, help="rounds (default: %(default)s)")
    parser.add_argument(
        "--folder", type=Path, default=Path("/dev/shm"), help="where to build it (default: %(default)s)"
    )
    arguments = parser.parse_args()
    if not 1 <= arguments.records <= arguments.stored:
        parser.error("--records must be at least 1 and at most --stored")
    # The store, the plain file, a warm batch, a copy buffer of memodb and a fresh batch.
    needed = (2 * arguments.stored + 3 * arguments.records) * NBYTES
    if needed > 4 << 30:
        parser.error(f"this would take {needed / 2**30:.1f} GiB of memory; at most 4 are allowed")

    folder = Path(tempfile.mkdtemp(prefix=f"memodb-bench-{os.getpid()}-", dir=arguments.folder))
    try:
        db, plain = build(folder, arguments.stored)
        with db:
            stats = db.stats()
            results = measure(
                contenders(db, plain, arguments.records), arguments.stored, arguments.records, arguments.rounds
            )
        floor = results["floor: contiguous already"][1]
        user = "root" if os.geteuid() == 0 else f"uid {os.geteuid()}"
        print(f"{arguments.records} of {arguments.stored} records of 12x512x512 float16 ({NBYTES / 1e6:.2f} MB each)")
        print(
            f"{user}, {len(os.sched_getaffinity(0))} cores, {stats['huge_page_share']:.0%} of the store on huge pages"
        )
        print(f"{'':32}{'gather ms':>12}{'+ read ms':>12}{'x floor':>10}")
        for name, (gathered, done) in results.items():
            print(f"{name:32}{gathered * 1e3:12.2f}{done * 1e3:12.2f}{done / floor:10.2f}")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
