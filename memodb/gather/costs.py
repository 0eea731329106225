"""What the parts of a gather cost on this machine: measured once, kept in a file, guessed until then.

The planner compares two sums (`map_seconds`, `copy_seconds`); what both pay alike, the read of a warm contiguous
tensor, is left out of both. So ``mapped_byte`` holds what reading the records where they lie costs more than reading
them warm, and ``copied_byte`` what copying costs before they are warm.
"""

from __future__ import annotations

import json
import logging
import math
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from memodb import safe, vm
from memodb.errors import UnsafePathError
from memodb.threads import MOST

log = logging.getLogger(__name__)
#: Batch sizes, in bytes, at which the costs of a byte are known; between them they are interpolated.
SIZES = (1 << 18, 1 << 20, 1 << 22, 1 << 24, 1 << 26, 1 << 28, 1 << 30)
_FORMAT = 1


@dataclass(frozen=True)
class Costs:
    """Seconds, as medians of a 2-core server with Linux 6.18 where nothing was measured.

    Parameters
    ----------
    map_call, copy_call
        Of one batch, whatever it holds.
    vma
        Of one run of adjacent records: mmap(2) and its undoing.
    huge_page, small_page, loose_page
        Of one entry of the page table, made and taken out again: a 2 MiB page, 4 KiB of a 2 MiB page, a page of 4 KiB.
    fresh_byte
        Of a byte of memory that is not warm: a copy larger than what may wait warm is made into such.
    copied_record
        Of one record of a copy, beside its bytes.
    mapped_byte
        Of reading a byte where it lies, beyond reading it warm, for batches of `SIZES` bytes.
    copied_byte
        Of copying a byte, for batches of `SIZES` bytes, by threads: ``copied_byte[t - 1]`` with t threads.
    """

    map_call: float = 85e-6
    copy_call: float = 50e-6
    vma: float = 5.8e-6
    huge_page: float = 4.2e-6
    small_page: float = 0.15e-6
    loose_page: float = 0.18e-6
    fresh_byte: float = 120e-12
    copied_record: float = 0.17e-6
    mapped_byte: tuple[float, ...] = (44e-12, 24e-12, 20e-12, 9e-12, 4e-12, 4e-12, 4e-12)
    copied_byte: tuple[tuple[float, ...], ...] = (
        (80e-12, 57e-12, 48e-12, 47e-12, 74e-12, 70e-12, 70e-12),
        (90e-12, 75e-12, 52e-12, 45e-12, 62e-12, 57e-12, 57e-12),
    )

    def map_seconds(self, total: int, runs: int, *, huge: float, small: float, loose: float) -> float:
        """Return what mapping a batch of `total` bytes costs, in so many runs and entries of each kind of page."""
        return (
            self.map_call
            + runs * self.vma
            + huge * self.huge_page
            + small * self.small_page
            + loose * self.loose_page
            + total * _between(self.mapped_byte, total)
        )

    @lru_cache(maxsize=64)  # noqa: B019 - one object a process, the same sizes again and again
    def copy_seconds(self, total: int, records: int, *, warm: bool = True) -> tuple[float, int]:
        """Return what copying a batch costs, into warm memory or not, and with how many threads it costs least."""
        by_threads = [total * _between(curve, total) for curve in self.copied_byte[:MOST]]
        best = min(range(len(by_threads)), key=by_threads.__getitem__)
        fresh = 0.0 if warm else total * self.fresh_byte
        return self.copy_call + records * self.copied_record + by_threads[best] + fresh, best + 1


def _between(curve: tuple[float, ...], total: int) -> float:
    """Interpolate a curve over `SIZES`, linearly in the logarithm of the size."""
    place = min(max((math.log2(total) - 18) / 2, 0.0), len(SIZES) - 1.0) if total > 1 else 0.0
    low = min(int(place), len(curve) - 2)
    return curve[low] + (place - low) * (curve[low + 1] - curve[low])


def calibration_file() -> Path:
    """Return where the costs of this machine are kept: ``$MEMODB_CALIBRATION``, or in the user's cache folder."""
    given = os.environ.get("MEMODB_CALIBRATION")
    if given:
        return Path(given)
    cache_home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(cache_home) / "memodb" / "calibration.json"


def machine() -> dict[str, Any]:
    """Return the facts that costs depend on; a file that was measured under others is not used."""
    model = ""
    try:
        with open("/proc/cpuinfo") as lines:
            model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    except OSError:
        pass
    return {"cpu": model, "threads": MOST, "kernel": platform.release(), "huge_page": vm.HUGE}


def save_costs(costs: Costs, path: Path) -> None:
    """Keep measured costs.

    Raises
    ------
    OSError
        If the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"format": _FORMAT, "machine": machine(), "costs": asdict(costs)}, indent=1) + "\n"
    safe.write_own(path, text.encode())


def load_costs(path: Path) -> Costs | None:
    """Return the costs kept at `path`; None where there are none, none of this machine, or none that can be used."""
    try:
        kept = json.loads(safe.read_own(path))
        if kept["format"] != _FORMAT or kept["machine"] != machine():
            return None
        return _parse(kept["costs"])
    except UnsafePathError as error:
        log.warning("measured costs are not used: %s", error)
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _parse(plain: Mapping[str, Any]) -> Costs:
    found: dict[str, Any] = {}
    for field in fields(Costs):
        value = plain[field.name]
        if field.name == "mapped_byte":
            found[field.name] = _curve(value)
        elif field.name == "copied_byte":
            if not value:
                raise ValueError("no thread counts")
            found[field.name] = tuple(_curve(curve) for curve in value)
        else:
            found[field.name] = _seconds(value)
    return Costs(**found)


def _curve(values: Any) -> tuple[float, ...]:
    curve = tuple(_seconds(value) for value in values)
    if len(curve) != len(SIZES):
        raise ValueError(f"{len(curve)} points, expected {len(SIZES)}")
    return curve


def _seconds(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ValueError(f"{value!r} is no cost")
    return float(value)


@cache
def costs_here() -> Costs:
    """Return the costs of this machine: those kept, or the defaults, read once a process."""
    return load_costs(calibration_file()) or Costs()
