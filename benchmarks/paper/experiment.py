"""What a script of this folder is: what the paper reports, how it is measured here, how it is printed and drawn."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import machine_facts

__all__ = ["FULL", "QUICK", "Experiment", "Result", "change", "level_name", "read_result", "table", "write_result"]

FULL, QUICK = "full", "quick"

Result = dict[str, Any]


@dataclass(frozen=True)
class Experiment:
    """One table or figure.

    Parameters
    ----------
    name
        Of the script, and of its result.
    where
        What it is in the paper, such as "Figure 3"; or that it is not in it.
    title
        What is measured, in a few words.
    paper
        What the paper reports, with its figures.
    differs
        What is different here, and what that means for a comparison.
    run
        Measures, with a :class:`Workbench`; returns JSON types.
    text
        Prints a result as Markdown.
    draw
        Draws a result into a figure of matplotlib; None: a table says it better.
    size
        Width and height of the figure, in inches.
    version
        Of what is measured: a result of another version is measured again.
    calculated
        It follows from its inputs alone: nothing is measured.
    source
        Of which other script's result it is made, nothing being measured: it is made anew with that one.
    data
        It needs models or data of the folder that MEMODB_EVAL_DATA names.
    """

    name: str
    where: str
    title: str
    paper: str
    differs: str
    run: Callable[[Any], Result]
    text: Callable[[Result], str]
    draw: Callable[[Result, Any], None] | None = None
    size: tuple[float, float] = (8.0, 4.0)
    version: int = 1
    calculated: bool = False
    source: str | None = None
    data: bool = True


def table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table; numbers with the digits that they deserve."""
    lines = [[str(cell) for cell in header], ["---"] * len(header)]
    lines += [[_cell(cell) for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def level_name(level: object) -> str:
    """Name a level: a preset, a similarity that is predicted, or everything that is found."""
    return "all found" if level == 0 else f"{level:g}" if isinstance(level, float) else str(level or "-")


def change(row: Result, name: str = "accuracy_change", unit: float = 100.0) -> str:
    """Print a change with its interval; accuracies in points."""
    if row[name] is None:
        return "-"
    low, middle, high = (unit * row[f"{name}{end}"] for end in ("_low", "", "_high"))
    return f"{middle:+.2f} ({low:+.2f} to {high:+.2f})"


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    if value != 0 and abs(value) < 0.001:
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) >= 1 else f"{value:.3f}"


def write_result(folder: Path, experiment: Experiment, profile: str, seconds: float | None, result: Result) -> None:
    """Keep what was measured; how long that took is None where it was done in parts."""
    content = {
        "name": experiment.name,
        "version": experiment.version,
        "profile": profile,
        "seconds": None if seconds is None else round(seconds, 1),
        "machine": {**machine_facts(), "threads": torch.get_num_threads()},
        "result": result,
    }
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / f"{experiment.name}.tmp"
    draft.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    draft.replace(folder / f"{experiment.name}.json")


def read_result(
    folder: Path, experiment: Experiment, profile: str | None = None, *, here: bool = False
) -> Result | None:
    """Return what was measured by this version of a script, with this profile; None: nothing yet.

    With ``here``, what another machine measured, or other versions of what the times depend on, does not count.
    """
    try:
        content: Result = json.loads((folder / f"{experiment.name}.json").read_text())
    except (OSError, ValueError):
        return None
    if content.get("version") != experiment.version or (profile is not None and content.get("profile") != profile):
        return None
    return None if here and not _alike(content.get("machine", {}), machine_facts()) else content


def _alike(then: dict[str, Any], now: dict[str, Any]) -> bool:
    """Tell whether times of one machine hold for another; of versions those that were noted."""
    versions = ("torch", "transformers", "faiss-cpu", "numpy")
    noted = [name for name in versions if name in then.get("versions", {})]
    return all(then.get(fact) == now[fact] for fact in ("cpu", "cpus")) and all(
        then["versions"][name] == now["versions"][name] for name in noted
    )
