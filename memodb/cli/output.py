"""How the ``memodb`` command writes: JSON for programs, aligned text for people, progress bars on a terminal only."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from tqdm import tqdm

#: Takes (done, total); what the long-running verbs of memodb report to.
Progress = Callable[[int, int], None]


@contextmanager
def progress_bar(label: str) -> Iterator[Progress]:
    """Show a bar on stderr while the block runs; nothing where stderr is not a terminal.

    Yields
    ------
    Progress
        To be called with the work done so far and the work in all.
    """
    # disable=None: tqdm itself looks whether the file is a terminal.
    with tqdm(desc=label, disable=None, file=sys.stderr, leave=False) as bar:

        def report(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield report


def plain(value: Any) -> Any:
    """Turn numpy scalars, arrays and mappings into what JSON knows; NaN and infinities become None."""
    if isinstance(value, Mapping):
        return {str(name): plain(part) for name, part in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(part) for part in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)


def print_json(value: Any) -> None:
    """Print `value` as one JSON document (strict: no NaN, no Infinity)."""
    print(json.dumps(plain(value), indent=2, allow_nan=False))


def print_facts(facts: Mapping[str, Any], *, indent: int = 0) -> None:
    """Print names and values in two columns; nested mappings are indented."""
    width = max((len(str(name)) for name in facts), default=0)
    for name, value in facts.items():
        if isinstance(value, Mapping):
            print(f"{'':{indent}}{name}")
            print_facts(value, indent=indent + 2)
        else:
            print(f"{'':{indent}}{name:{width}}  {readable(value)}")


def print_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print rows under a header, columns aligned."""
    cells = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        print("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


def readable(value: Any) -> str:
    """Return a value as people read it; integers with thousands separators."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, (int, np.integer)):
        return f"{int(value):,}"
    if isinstance(value, (float, np.floating)):
        return f"{float(value):.4g}"
    return str(value)


def readable_bytes(nbytes: int) -> str:
    """Return a number of bytes in the largest binary unit that leaves at least 1 of it."""
    amount = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(amount) < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"
