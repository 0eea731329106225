"""A million records of 4 KiB: what a store of them costs to make, open, gather from, and hold.

``python -m benchmarks.million [--backends arena,files] [--records 1000000] [--folder DIR]`` prints a table.

Each step runs in a process of its own, so that descriptors and memory are its own ("own memory" is anonymous memory:
pages of the store are everybody's); "descriptors" are those that the
gathers left open, under a limit of 64 as well as under the usual one; "flushes" are the fsync, fdatasync and syncfs
calls of one put of 10,000 records, the catalog's included (strace, where it is installed).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from memodb import vm

STEP = 10_000

_MAKE = """
import sys, time, numpy as np, memodb
path, backend, n, step = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
start = time.perf_counter()
with memodb.MemoDB.create(path, shape=(1024,), dtype="float32", backend=backend) as db:
    made = time.perf_counter() - start
    for first in range(0, n, step):
        stamps = np.arange(first, min(n, first + step), dtype=np.float32)
        db.put(np.repeat(stamps, 1024).reshape(-1, 1024))
print(__import__("json").dumps({"create_s": made, "put_s": time.perf_counter() - start - made}))
"""

_USE = """
import json, os, resource, sys, time
from statistics import median
import numpy as np, memodb

path, n, limit = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
if limit:
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
def memory(key):
    return int(next(l for l in open("/proc/self/status") if l.startswith(key)).split()[1]) / 1024
before = memory("RssAnon")
start = time.perf_counter()
db = memodb.MemoDB.open(path)
opened = time.perf_counter() - start
rng = np.random.default_rng(0)
first = None
times = {"auto": [], "map": []}
for turn in range(200):
    for strategy in times:
        ids = rng.choice(n, 64, replace=False)  # others each time: a descriptor that is open helps whoever comes next
        start = time.perf_counter()
        with db.multiget_mapped(ids, strategy=strategy) as batch:
            assert (batch.numpy()[:, 5] == ids).all()
        times[strategy].append(time.perf_counter() - start)
        first = first or times[strategy][0]
fds = len(os.listdir("/proc/self/fd")) - 1
stats = db.stats()
print(json.dumps({
    "open_ms": opened * 1e3, "first_gather_ms": first * 1e3,
    **{f"gather_{name}_ms": median(t) * 1e3 for name, t in times.items()},
    "descriptors": fds, "own_memory_mib": memory("RssAnon") - before,
    "bytes_on_store": stats["bytes_on_store"], "bytes_catalog": stats["bytes_catalog"],
}))
"""

_FLUSH = """
import sys, numpy as np, memodb
with memodb.MemoDB.create(sys.argv[1], shape=(1024,), dtype="float32", backend=sys.argv[2]) as db:
    os_write = __import__("os").write
    os_write(2, b"")  # a mark for the trace
    db.put(np.zeros((int(sys.argv[3]), 1024), np.float32))
    os_write(2, b"")
"""


def _run(program: str, *arguments: object) -> dict:
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)], check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(done.stdout)


def flushes(folder: Path, backend: str) -> dict[str, int] | None:
    """Count the flush calls of one put, catalog included; None without strace."""
    if shutil.which("strace") is None:
        return None
    trace, calls = folder / "trace", "trace=fsync,fdatasync,syncfs,msync,write"
    store = folder / f"flush-{backend}"
    command = ["strace", "-f", "-e", calls, "-o", str(trace), sys.executable, "-c", _FLUSH, store, backend, STEP]
    subprocess.run([str(part) for part in command], check=True)
    marked = trace.read_text().split('write(2, "", 0)')[1]
    shutil.rmtree(store)
    return {
        call: marked.count(f" {call}(") for call in ("fsync", "fdatasync", "syncfs", "msync") if f" {call}(" in marked
    }


def measure(folder: Path, backend: str, n: int) -> dict:
    """Make a store, use it with few and with many descriptors, remove it."""
    path = folder / backend
    try:
        facts = _run(_MAKE, path, backend, n, STEP)
        facts |= _run(_USE, path, n, 0)
        few = _run(_USE, path, n, 64)
        facts |= {f"{key}_limit_64": few[key] for key in ("gather_auto_ms", "descriptors")}
        return {**facts, "flushes": flushes(folder, backend)}
    finally:
        shutil.rmtree(path, ignore_errors=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, clean up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", default="arena,files", help="which (default: %(default)s)")
    parser.add_argument("--records", type=int, default=1_000_000, help="how many (default: %(default)s)")
    parser.add_argument("--folder", help="where (default: /dev/shm and the temporary folder, one after the other)")
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    given = parser.parse_args(arguments)
    found = {}
    for parent in [given.folder] if given.folder else ["/dev/shm", tempfile.gettempdir()]:
        for backend in given.backends.split(","):
            folder = Path(tempfile.mkdtemp(prefix=f"memodb-bench-{os.getpid()}-", dir=parent))
            try:
                where = "tmpfs" if vm.filesystem(folder).in_memory else "disk"
                found[f"{backend}, {where}"] = measure(folder, backend, given.records)
            finally:
                shutil.rmtree(folder)
    keys = list(dict.fromkeys(key for facts in found.values() for key in facts))
    print(f"{given.records:,} records of 4 KiB")
    for key in keys:
        values = [facts.get(key) for facts in found.values()]
        print(f"{key:24}", *(f"{v:>24,.4g}" if isinstance(v, float) else f"{v!s:>24}" for v in values))
    print(f"{'':24}", *(f"{name:>24}" for name in found))
    if given.json:
        from benchmarks.machine import machine_facts

        given.json.write_text(
            json.dumps(
                {
                    "machine": machine_facts(),
                    "profile": "full",
                    "results": [
                        {"group": f"{given.records} records of 4 KiB", "contender": name, **facts}
                        for name, facts in found.items()
                    ],
                },
                indent=1,
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
