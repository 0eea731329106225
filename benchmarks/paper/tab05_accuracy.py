"""Table 5: accuracy at three levels, with the controls that the paper lacks."""

from __future__ import annotations

import sys
from typing import Any

import memodb_transformers as mt
from benchmarks.paper.alone import alone
from benchmarks.paper.experiment import Experiment, Result, change, level_name, table
from benchmarks.paper.workbench import SST2, Workbench

#: The presets, and two bolder ones: on this data the presets reuse little.
LEVELS = (*mt.LEVELS, 0.7, 0.6)
KINDS = ("plain", "nearest", "random", "mean", "condensed")


def run(bench: Workbench) -> Result:
    """Evaluate on the development set."""
    models: Result = {}
    for name in SST2:
        report = mt.evaluate(
            bench.model(name),
            bench.sst2(name)[3],
            bench.store(name),
            levels=bench.choose(LEVELS, LEVELS[2:4]),
            kinds=KINDS,
            condensed=bench.condensed(name, 4),
            layers="all",
            similarity=False,
            repeats=1,
        )
        models[name] = {"rows": list(report.rows), "sequences": report.sequences, "self_hits": report.self_hits}
    return {"models": models}


def text(result: Result) -> str:
    """Print a table a model."""
    parts = []
    for name, found in result["models"].items():
        plain = next(row for row in found["rows"] if row["kind"] == "plain")
        lines: list[list[Any]] = []
        for row in found["rows"]:
            if row["kind"] != "plain":
                lines.append(
                    [
                        level_name(row["level"]),
                        row["kind"],
                        row["memoization_rate"],
                        f"{100 * row['accuracy']:.2f}",
                        change(row),
                    ]
                )
        header = ["level", "reused", "memoization rate", "accuracy, %", "change (95 %)"]
        note = f"{name}, {found['sequences']} sentences, plain {100 * plain['accuracy']:.2f} %:\n\n"
        parts.append(note + table(header, lines))
    return "\n\n".join(parts)


EXPERIMENT = Experiment(
    name="tab05_accuracy",
    where="Table 5",
    title="Accuracy at three levels",
    paper="BERT 93.1 %: -1.1, -1.1 and -1.3 points; RoBERTa 94.8 %: -1.6, -2.2 and -4.4; DeBERTa 95.0 %: +0.5, "
    "+0.2 and -4.5.",
    differs="minilm-sst2 and debertav2-sst2, the whole development set, with intervals. At each level a random "
    "record and the mean record of the length are reused in the very same hits; the condensed store has "
    "hits of its own.",
    run=run,
    text=text,
)

if __name__ == "__main__":
    sys.exit(alone(EXPERIMENT))
