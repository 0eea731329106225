"""Not in the paper: accuracy against bytes, from one mean a layer and length to all single records."""

from __future__ import annotations

import sys
from typing import Any

import memodb_transformers as mt
from benchmarks.paper.alone import alone
from benchmarks.paper.experiment import Experiment, Result, change, table
from benchmarks.paper.workbench import Workbench

MODEL = "minilm-sst2"
#: Layers that are reused: the lower half, and all.
LAYERS = {"layers 0, 1, 2": [0, 1, 2], "all layers": "all"}


def run(bench: Workbench) -> Result:
    """Reuse everything, from stores of several sizes."""
    tests = bench.sst2(MODEL)[3]
    stores: list[tuple[str, Any]] = [
        (str(means), bench.condensed(MODEL, means)) for means in bench.choose((1, 2, 4, 8, 16, 32), (1, 4))
    ]
    stores.append(("single records", bench.store(MODEL)))
    rows = []
    for name, path in stores:
        beside = sum(file.stat().st_size for file in (path / "transformers").rglob("*") if file.is_file())
        kind = "nearest" if name == "single records" else "condensed"
        for which, layers in LAYERS.items():
            report = mt.evaluate(
                bench.model(MODEL),
                tests,
                path,
                levels=[0.0],
                kinds=("plain", kind),
                layers=layers,
                repeats=1,
            )
            rows.append(
                {
                    "records": name,
                    "which": which,
                    **report.rows[1],
                    "plain_accuracy": report.rows[0]["accuracy"],
                    "embedder_bytes": beside,
                    "self_hits": report.self_hits,
                }
            )
    bench.drop(f"{bench.store(MODEL).name}-means")
    return {"rows": rows}


def text(result: Result) -> str:
    """Print a row a store."""
    lines = []
    for row in result["rows"]:
        lines.append(
            [
                row["records"],
                row["which"],
                row["bytes"] / 1e6,
                row["memoization_rate"],
                row["similarity"],
                f"{100 * row['accuracy']:.2f}",
                change(row),
            ]
        )
    header = ["means of a layer and length", "reused in", "records, MB", "memoization rate", "similarity"]
    first = result["rows"][0]
    note = f"Plain: {100 * first['plain_accuracy']:.2f} %. Each store has {first['embedder_bytes'] / 1e6:.0f} MB more, "
    note += "with the paper's embedder nearly all of it weights (the separable one: a third of a megabyte a layer)."
    return f"{note}\n\n{table([*header, 'accuracy, %', 'change (95 %)'], lines)}"


def draw(result: Result, figure: Any) -> None:
    """Draw accuracy against bytes."""
    axis = figure.subplots()
    for which, color in zip(LAYERS, ("#2563eb", "#c2410c"), strict=True):
        rows = [row for row in result["rows"] if row["which"] == which]
        megabytes = [row["bytes"] / 1e6 for row in rows]
        values = [100 * row["accuracy"] for row in rows]
        apart = [
            [value - 100 * row["accuracy_low"] for value, row in zip(values, rows, strict=True)],
            [100 * row["accuracy_high"] - value for value, row in zip(values, rows, strict=True)],
        ]
        axis.errorbar(megabytes, values, apart, fmt="o-", color=color, capsize=3, label=f"reused in {which}")
        for row, x, y in zip(rows, megabytes, values, strict=True):
            label = "all" if row["records"] == "single records" else row["records"]
            axis.annotate(label, (x, y), xytext=(5, 5), textcoords="offset points", fontsize=7)
    axis.axhline(100 * result["rows"][0]["plain_accuracy"], color="black", linewidth=0.9, label="plain model")
    axis.set_xscale("log")
    axis.set_xlabel("size of the records, MB (log scale); numbers: means of a layer and length")
    axis.set_ylabel("accuracy, % (95 %)")
    axis.grid(visible=True, which="both", alpha=0.2)
    figure.legend(fontsize=8, loc="outside lower center", ncols=3)


EXPERIMENT = Experiment(
    name="ext02_condense",
    where="not in the paper",
    title="Accuracy against bytes",
    paper="Nothing: it stores single records alone.",
    differs="Means of clusters in the place of single records; one mean of all is constant attention (Hassid et "
    "al. 2022). Nearly every sequence for which there is a record of its length is a hit: all whose keys are "
    "no farther from a stored one than any that the profile saw.",
    run=run,
    text=text,
    draw=draw,
    size=(7.5, 4.6),
)

if __name__ == "__main__":
    sys.exit(alone(EXPERIMENT))
