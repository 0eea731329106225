"""Peak memory of `open` plus one gather, in a fresh process, beside the size of the store.

Run, as any user, from the repository: ``.venv/bin/python benchmarks/peak_memory.py``

A store of 4 GiB (``--gib``) is built in one process and read in another. Printed of the reading one, from
/proc/self/status: VmHWM (the peak of everything resident), RssAnon (memory of its own) and RssShmem (pages of the
store that it has mapped and that are shared, not its own), before the open, after it, after the gather and after
reading the batch.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

import memodb

SHAPE = (12, 512, 512)
NBYTES = 2 * 12 * 512 * 512
FIELDS = ("VmHWM", "RssAnon", "RssFile", "RssShmem")


def show(when: str) -> None:
    """Print one line of memory figures, in MiB."""
    status = Path("/proc/self/status").read_text()
    values = [int(found[1]) / 1024 for name in FIELDS if (found := re.search(rf"{name}:\s+(\d+) kB", status))]
    print(f"{when:34}" + "".join(f"{value:12,.1f}" for value in values), flush=True)


def build(path: Path, gib: float) -> None:
    """Fill a store, one record a put."""
    record = np.random.default_rng(0).integers(0, 1000, SHAPE).astype(np.float16)[None]
    with memodb.MemoDB.create(path, shape=SHAPE, dtype="float16") as db:
        for _ in range(int(gib * 2**30) // NBYTES):
            db.put(record)
        stats = db.stats()
    print(f"store: {stats['records']:,} records, {stats['bytes_logical'] / 2**20:,.1f} MiB, ", end="")
    print(f"{stats['huge_page_share']:.0%} on huge pages")


def gather(path: Path, n: int) -> None:
    """Open the store and gather `n` random records, telling the memory in use at each step."""
    print(f"{'MiB':34}" + "".join(f"{name:>12}" for name in FIELDS))
    show("memodb imported")
    with memodb.MemoDB.open(path) as db:
        show("opened")
        ids = np.random.default_rng(0).choice(db.ids(), min(n, len(db)), replace=False)
        with db.multiget_mapped(ids) as batch:
            show(f"gathered {len(ids)}{', mapped' if batch.zero_copy else ', copied'}")
            batch.numpy().reshape(-1).view(np.uint64).max()
            show("read")
        show("released")


def main() -> None:
    """Build in this process, gather in a fresh one, clean up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=4.0, help="size of the store (default: %(default)s)")
    parser.add_argument("--records", type=int, default=64, help="records of the gather (default: %(default)s)")
    parser.add_argument(
        "--folder", type=Path, default=Path("/dev/shm"), help="where to build it (default: %(default)s)"
    )
    parser.add_argument("--gather", type=Path, help=argparse.SUPPRESS)  # what the fresh process is started with
    arguments = parser.parse_args()
    if arguments.gather:
        gather(arguments.gather, arguments.records)
        return
    folder = Path(tempfile.mkdtemp(prefix=f"memodb-bench-{os.getpid()}-", dir=arguments.folder))
    try:
        build(folder / "store", arguments.gib)
        fresh = [sys.executable, __file__, "--gather", str(folder / "store"), "--records", str(arguments.records)]
        subprocess.run(fresh, check=True)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
