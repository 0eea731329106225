"""How hard the reliability tests try, and what they count: one place for both.

``make test`` runs each of them once, quickly. ``make torture MINUTES=30`` gives them so many minutes together; each
takes its share, and reports what it did (kills, faults, flips, inputs), which is summed up at the end.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

#: Minutes for all of the reliability tests together; 0: the quick run.
MINUTES = float(os.environ.get("MEMODB_TORTURE_MINUTES", "0"))
_REPORT = os.environ.get("MEMODB_TORTURE_REPORT", "")


def is_long() -> bool:
    """Tell whether this is the long run."""
    return MINUTES > 0


def count(quick: int, long: int) -> int:
    """Return how often to do something: `quick`, or in the long run `long` (as of 30 minutes), in proportion."""
    return max(quick, round(long * MINUTES / 30)) if is_long() else quick


def rounds(quick: int, share: float) -> Iterator[int]:
    """Count up: `quick` times, and in the long run until `share` of its minutes are over (never fewer times)."""
    end = time.monotonic() + 60 * MINUTES * share
    number = 0
    while number < quick or time.monotonic() < end:
        yield number
        number += 1


def report(what: str, **figures: Any) -> None:
    """Add figures of the long run to its report: numbers of the same name are summed up."""
    if _REPORT:
        with Path(_REPORT).open("a") as file:
            file.write(json.dumps({"what": what, **figures}) + "\n")
