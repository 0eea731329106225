"""What reuse does to real models: tuned for several budgets, every kind beside its controls, on data of its own.

Run: ``MEMODB_EVAL_DATA=... python -m benchmarks.memo_quality --keep FOLDER TASK ...`` (10 to 20 minutes a task;
without a name, all of them), then, on a machine that does nothing else, ``... --keep FOLDER --times TASK ...`` (a few
minutes each); ``--quick`` tries one with few sequences and writes nothing.

The data are as ``memo_data.py`` names them. Writes ``benchmarks/results/quality-TASK.json`` and ``times-TASK.json``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

import memodb_transformers as mt
from benchmarks.machine import machine_facts
from benchmarks.memo_data import TASKS, Batches, Task, load_batches, load_model
from benchmarks.memo_models import two_threads
from benchmarks.race import scratch
from memodb_transformers.beside import write_tuned
from memodb_transformers.card import ModelCard
from memodb_transformers.sites import find_memoizable
from memodb_transformers.store import open_store
from memodb_transformers.tuning import tune_budgets

#: Everything but the oracle, which compares with every record and is asked for once.
KINDS = ("plain", "random", "mean", "nearest", "condensed")


def measure(task: Task, keep: Path | None, *, quick: bool) -> dict[str, Any]:
    """Build a store and its condensed ones, tune both for all budgets, evaluate every kind at each."""
    model = load_model(task)
    recorded, profiled, tuned, tried = load_batches(task, quick=quick)
    budgets = task.budgets[:1] if quick else task.budgets
    rows: list[dict[str, Any]] = []
    stores: list[dict[str, Any]] = []
    choices: dict[str, list[dict[str, Any]]] = {}
    with scratch() as place:
        built = mt.build(
            model, recorded, place / "nearest", embedder="separable", store_dtype="bfloat16", profile=False
        )
        stores.append({"kind": "nearest", "records": built.records, "bytes": built.bytes, "seconds": built.seconds})
        for means in task.means:
            made = mt.condense(place / "nearest", place / f"means-{means}", records_per_namespace=means)
            stores.append(
                {"kind": f"means-{means}", "records": made.records, "bytes": made.bytes, "seconds": made.seconds}
            )
        several, fewest = place / f"means-{task.means[0]}", place / f"means-{task.means[-1]}"
        tuned_stores = (place / "nearest", several) if task.controls else (several,)
        for path in tuned_stores:
            choices[path.name] = _tune(model, path, profiled, tuned, budgets)
        first = (place / "nearest") if task.controls else several
        settings: dict[str, Any] = {"kinds": ["plain", "condensed"]}
        if task.controls:
            settings = {"kinds": KINDS, "condensed": several}
        for number, budget in enumerate(budgets):
            for path in tuned_stores:
                write_tuned(path, choices[path.name][number])
            found = mt.evaluate(model, tried, first, levels=["tuned"], repeats=1, similarity=False, **settings)
            rows += _told(found, budget)
        if keep is not None:
            shutil.rmtree(keep, ignore_errors=True)
            keep.mkdir(parents=True)
            for number, budget in enumerate(budgets):
                mt.copy(several, keep / f"budget-{budget:g}")
                write_tuned(keep / f"budget-{budget:g}", choices[several.name][number])
        # Without a guard: every layer, and every sequence for which anything was recorded.
        found = mt.evaluate(model, tried, first, levels=[0.0], layers="all", repeats=1, **settings)
        rows += _told(found, None)
        if fewest != several:
            mt.profile(model, profiled, fewest)
            found = mt.evaluate(model, tried, fewest, levels=[0.0], kinds=["condensed"], layers="all", repeats=1)
            rows += _told(found, None, "one mean")
        if task.oracle:
            middle = len(budgets) // 2
            write_tuned(place / "nearest", choices["nearest"][middle])
            found = mt.evaluate(model, tried, place / "nearest", levels=["tuned"], kinds=["oracle"], repeats=1)
            rows += _told(found, budgets[middle])
    assert built.training is not None
    return {"rows": rows, "stores": stores, "tuned": choices, "training": built.training.to_dict()}


def _tune(model: Any, path: Path, profiled: Batches, tuned: Batches, budgets: Sequence[float]) -> list[dict[str, Any]]:
    mt.profile(model, profiled, path)
    sites = find_memoizable(model)
    with open_store(path, ModelCard.of(sites)) as store:
        return [report.to_dict() for report in tune_budgets(model, sites, store, tuned, budgets=budgets)]


def _told(report: mt.EvaluationReport, budget: float | None, name: str | None = None) -> list[dict[str, Any]]:
    rows = report.to_dict()["rows"]
    return [{**row, "kind": name or row["kind"], "budget": budget, "sequences": report.sequences} for row in rows]


def measure_times(task: Task, keep: Path) -> dict[str, Any]:
    """Time the tuned condensed stores, end to end beside the plain model."""
    model = load_model(task)
    _, profiled, _, tried = load_batches(task)
    rows: list[dict[str, Any]] = []
    stats = {}
    for budget in task.budgets:
        path = keep / f"budget-{budget:g}"
        chosen = json.loads((path / "transformers" / "tuned.json").read_text())
        mt.profile(model, profiled, path)
        write_tuned(path, chosen)
        found = mt.evaluate(
            model, tried, path, levels=["tuned"], kinds=["plain", "condensed"], repeats=5, similarity=False
        )
        rows += _told(found, budget)
        stats[f"{budget:g}"] = found.stats
    return {"rows": rows, "stats": stats}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure tasks and write their results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", help=f"of {', '.join(TASKS)}; default: all")
    parser.add_argument("--keep", type=Path, help="where the tuned stores are kept, to be timed")
    parser.add_argument("--times", action="store_true", help="time the stores that were kept")
    parser.add_argument("--threads", type=int, default=2, help="of torch, where nothing is timed (default 2)")
    parser.add_argument("--quick", action="store_true", help="few sequences, nothing written")
    given = parser.parse_args(arguments)
    if given.times and not given.keep:
        parser.error("--times needs --keep")
    for name in given.tasks or TASKS:
        began = perf_counter()
        keep = given.keep / name if given.keep else None
        with two_threads():
            if given.times:
                results = measure_times(TASKS[name], keep)
            else:
                torch.set_num_threads(given.threads)
                results = measure(TASKS[name], keep, quick=given.quick)
        kind = "times" if given.times else "quality"
        written = {"machine": machine_facts(), "profile": "full", "task": name, "results": [results]}
        text = json.dumps(written, indent=1) + "\n"
        if given.quick:
            print(text)
        else:
            (Path(__file__).with_name("results") / f"{kind}-{name}.json").write_text(text)
        print(f"{kind} {name}: {perf_counter() - began:.0f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
