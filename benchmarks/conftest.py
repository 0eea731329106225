"""Fixtures of the benchmarks, and where their results go.

Every run of ``make bench`` writes ``benchmarks/results/<file of benchmarks>.json``: medians, their ratio to the floor
of their group, and the facts of the machine without which the figures mean nothing.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest

RESULTS = Path(__file__).with_name("results")
#: The benchmark of each group that the others are compared with.
FLOOR = "floor"


def machine_facts() -> dict[str, Any]:
    """Return what the figures depend on: processor, memory, kernel, huge-page settings, versions."""
    cpu = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "")
    total = next((line.split()[1] for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), "0")
    packages = {}
    for name in ("memodb", "numpy", "torch", "faiss-cpu", "lmdb", "zarr"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    return {
        "cpu": cpu,
        "cpus": len(os.sched_getaffinity(0)),
        "memory_gib": round(int(total) / 2**20, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "user": "root" if os.geteuid() == 0 else "unprivileged",
        "thp": _setting("enabled"),
        "thp_shmem": _setting("shmem_enabled"),
        "versions": packages,
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _setting(name: str) -> str:
    """Return the chosen one of ``always [madvise] never``."""
    text = " ".join(_lines(f"/sys/kernel/mm/transparent_hugepage/{name}"))
    return text.partition("[")[2].partition("]")[0]


@pytest.fixture(scope="module")
def shm() -> Iterator[Path]:
    """Return a private folder where files are memory; it is removed afterwards."""
    parent = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix=f"memodb-bench-{os.getpid()}-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the results, one file for each file of benchmarks."""
    plugin = getattr(session.config, "_benchmarksession", None)
    by_file: dict[str, list[Any]] = defaultdict(list)
    for result in getattr(plugin, "benchmarks", []):
        if result.stats.rounds:
            by_file[Path(result.fullname.partition("::")[0]).stem.removeprefix("test_")].append(result)
    for name, results in by_file.items():
        floors = {r.group: r.stats.median for r in results if r.extra_info.get("contender") == FLOOR}
        rows = [
            {
                "group": r.group,
                "contender": r.extra_info.get("contender", r.name),
                "median_ms": r.stats.median * 1e3,
                "min_ms": r.stats.min * 1e3,
                "iqr_ms": r.stats.iqr * 1e3,
                "rounds": r.stats.rounds,
                "times_floor": r.stats.median / floors[r.group] if r.group in floors else None,
                **{k: v for k, v in r.extra_info.items() if k != "contender"},
            }
            for r in results
        ]
        RESULTS.mkdir(exist_ok=True)
        RESULTS.joinpath(f"{name}.json").write_text(json.dumps({"machine": machine_facts(), "results": rows}, indent=2))
