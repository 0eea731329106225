"""The facts of the machine without which the figures mean nothing."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from memodb.gather.costs import calibration_file, load_costs

_PACKAGES = (
    *("memodb", "numpy", "torch", "transformers", "faiss-cpu", "lmdb", "zarr", "h5py", "tensorstore", "safetensors"),
    "pytest-benchmark",
)


def machine_facts() -> dict[str, Any]:
    """Return what the figures depend on: processor, memory, kernel, huge-page settings, versions."""
    cpu = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "")
    total = next((line.split()[1] for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), "0")
    return {
        "cpu": cpu,
        "cpus": len(os.sched_getaffinity(0)),
        "memory_gib": round(int(total) / 2**20, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "user": "root" if os.geteuid() == 0 else "unprivileged",
        "thp": _setting("enabled"),
        "thp_shmem": _setting("shmem_enabled"),
        "shm_mount": next((line.split()[3] for line in _lines("/proc/mounts") if line.split()[1] == "/dev/shm"), ""),
        "costs": "calibrated" if load_costs(calibration_file()) else "defaults",
        "versions": {name: _version(name) for name in _PACKAGES},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _setting(name: str) -> str:
    """Return the chosen one of ``always [madvise] never``."""
    text = " ".join(_lines(f"/sys/kernel/mm/transparent_hugepage/{name}"))
    return text.partition("[")[2].partition("]")[0]
