"""What reuse does to real models: tuned for several budgets, every kind beside its controls, on data of its own.

Run: ``MEMODB_EVAL_DATA=... python -m benchmarks.memo_quality TASK ...`` (10 to 25 minutes a task; without a name,
all of them); ``--quick`` tries one with few sequences and writes nothing.

The folder holds ``models/`` and ``data/`` as ``memo_data.py`` names them. Writes ``benchmarks/results/quality-TASK.json``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import memodb_transformers as mt
from benchmarks.machine import machine_facts
from benchmarks.memo_data import TASKS, Batches, Task, load_batches, load_model
from benchmarks.memo_models import two_threads
from benchmarks.race import scratch
from memodb_transformers.card import ModelCard
from memodb_transformers.sites import find_memoizable
from memodb_transformers.store import open_store, write_tuned
from memodb_transformers.tuning import tune_budgets

#: Everything but the oracle, which compares with every record and is asked for once.
KINDS = ("plain", "random", "mean", "nearest", "condensed")


def measure(task: Task, *, quick: bool) -> dict[str, Any]:
    """Build a store and its condensed ones, tune both for all budgets, evaluate every kind at each."""
    model = load_model(task)
    recorded, profiled, tuned, tried = load_batches(task, quick=quick)
    results: dict[str, Any] = {"rows": [], "times": [], "tuned": [], "stores": []}
    with scratch() as place:
        began = perf_counter()
        built = mt.build(model, recorded, place / "single", embedder="separable", store_dtype="bfloat16", profile=False)
        results["stores"].append({"kind": "nearest", "bytes": built.bytes, "seconds": perf_counter() - began})
        assert built.training is not None
        results["training"] = built.training.to_dict()
        for means in task.means:
            made = mt.condense(place / "single", place / f"means-{means}", records_per_namespace=means)
            results["stores"].append({"kind": f"{means} means", "bytes": made.bytes, "seconds": made.seconds})
        paths = [place / "single", *(place / f"means-{means}" for means in task.means)]
        choices = [_tune(model, path, profiled, tuned, task) for path in paths[:2]]
        mt.profile(model, profiled, paths[-1])
        for number, budget in enumerate(task.budgets):
            for path, reports in zip(paths, choices, strict=False):
                write_tuned(path, reports[number].to_dict())
            results["tuned"].append(
                {
                    "budget": budget,
                    **{path.name: reports[number].to_dict() for path, reports in zip(paths, choices, strict=False)},
                }
            )
            _evaluate(model, tried, paths[0], results["rows"], budget, condensed=paths[1], kinds=KINDS, repeats=1)
            repeats = 1 if quick else 5
            _evaluate(
                model, tried, paths[1], results["times"], budget,
                kinds=("plain", "condensed"), repeats=repeats, similarity=False,
            )  # fmt: skip
        # Without a guard: every layer and every sequence for which anything was recorded.
        for kinds, path in ((KINDS, paths[0]), (("condensed",), paths[-1])):
            other = paths[1] if path is paths[0] else None
            _evaluate(
                model, tried, path, results["rows"], None,
                condensed=other, kinds=kinds, repeats=1, level=0.0, layers="all",
            )  # fmt: skip
        if task.data == "sst2":
            write_tuned(paths[0], choices[0][len(task.budgets) // 2].to_dict())
            budget = task.budgets[len(task.budgets) // 2]
            _evaluate(model, tried, paths[0], results["rows"], budget, kinds=("oracle",), repeats=1)
    return results


def _tune(model: Any, path: Path, profiled: Batches, tuned: Batches, task: Task) -> list[mt.TuneReport]:
    mt.profile(model, profiled, path)
    sites = find_memoizable(model)
    with open_store(path, ModelCard.of(sites)) as store:
        return tune_budgets(model, sites, store, tuned, budgets=task.budgets)


def _evaluate(
    model: Any,
    tried: Batches,
    path: Path,
    rows: list[dict[str, Any]],
    budget: float | None,
    *,
    level: str | float = "tuned",
    **settings: Any,
) -> None:
    report = mt.evaluate(model, tried, path, levels=[level], **settings)
    seen = {row["kind"] for row in rows if row["kind"] == "plain"}
    for row in report.to_dict()["rows"]:
        if row["kind"] not in seen or "similarity" in settings:
            told = "condensed 1" if row["kind"] == "condensed" and path.name == "means-1" else row["kind"]
            rows.append({**row, "kind": told, "budget": budget, "sequences": report.sequences})


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure tasks and write their results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", choices=[*TASKS, []], help="default: all")
    parser.add_argument("--quick", action="store_true", help="few sequences, nothing written")
    given = parser.parse_args(arguments)
    for name in given.tasks or TASKS:
        began = perf_counter()
        with two_threads():
            results = measure(TASKS[name], quick=given.quick)
        written = {"machine": machine_facts(), "profile": "full", "task": name, "results": results}
        text = json.dumps(written, indent=1) + "\n"
        if given.quick:
            print(text)
        else:
            (Path(__file__).with_name("results") / f"quality-{name}.json").write_text(text)
        print(f"{name}: {perf_counter() - began:.0f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
