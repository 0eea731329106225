"""Figure 4: accuracy and memoization rate against the threshold of similarity."""

from __future__ import annotations

import sys
from typing import Any

import memodb_transformers as mt
from benchmarks.paper.alone import alone
from benchmarks.paper.experiment import Experiment, Result, change, level_name, table
from benchmarks.paper.workbench import Workbench

MODEL = "minilm-sst2"
KINDS = ("plain", "nearest", "random", "mean")


def run(bench: Workbench) -> Result:
    """Evaluate at one threshold after the other, all layers, with controls."""
    levels = bench.choose((0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.5, 0.0), (0.8, 0.6, 0.0))
    tests = bench.sst2(MODEL)[3]
    report = mt.evaluate(
        bench.model(MODEL),
        tests,
        bench.store(MODEL),
        levels=levels,
        kinds=KINDS,
        layers="all",
        similarity=False,
        repeats=1,
    )
    return {"rows": report.rows, "sequences": report.sequences, "self_hits": report.self_hits}


def _accuracy(row: Result) -> str:
    return f"{100 * row['accuracy']:.1f}"


def text(result: Result) -> str:
    """Print a row a threshold."""
    rows = result["rows"]
    plain = next(row for row in rows if row["kind"] == "plain")
    lines = []
    for level in dict.fromkeys(row["level"] for row in rows if row["kind"] != "plain"):
        found = {row["kind"]: row for row in rows if row["level"] == level}
        near = found["nearest"]
        lines.append(
            [
                level_name(level),
                near["memoization_rate"],
                _accuracy(near),
                change(near),
                _accuracy(found["random"]),
                _accuracy(found["mean"]),
            ]
        )
    header = [
        "threshold",
        "memoization rate",
        "nearest, %",
        "change (95 %)",
        "a random record, %",
        "the mean record, %",
    ]
    note = f"{result['sequences']} sentences, {result['self_hits']} of them in the store; plain model "
    return f"{note}{_accuracy(plain)} %; all layers.\n\n" + table(header, lines)


def draw(result: Result, figure: Any) -> None:
    """Draw accuracy and memoization rate against the threshold."""
    axis = figure.subplots()
    rows = result["rows"]
    plain = next(row for row in rows if row["kind"] == "plain")
    styles = {"nearest": ("#16a34a", "o-"), "random": ("#6b7280", "x-"), "mean": ("#2563eb", "s-")}
    for kind, (color, style) in styles.items():
        found = sorted((row["level"], 100 * row["accuracy"]) for row in rows if row["kind"] == kind)
        axis.plot(*zip(*found, strict=True), style, color=color, label=f"accuracy, {kind} record")
    axis.axhline(100 * plain["accuracy"], color="black", linewidth=0.9, label="accuracy, plain model")
    axis.invert_xaxis()
    axis.set_xlabel("threshold: similarity that is predicted")
    axis.set_ylabel("accuracy, %")
    rate = axis.twinx()
    found = sorted((row["level"], 100 * row["memoization_rate"]) for row in rows if row["kind"] == "nearest")
    rate.plot(*zip(*found, strict=True), ":", color="#c2410c", linewidth=2, label="memoization rate")
    rate.set_ylabel("memoization rate, %")
    rate.set_ylim(0, 105)
    lines = [*axis.get_legend_handles_labels()[0], *rate.get_legend_handles_labels()[0]]
    figure.legend(handles=lines, fontsize=8, loc="outside lower center", ncols=3)
    axis.grid(visible=True, alpha=0.2)


EXPERIMENT = Experiment(
    name="fig04_threshold",
    where="Figure 4",
    title="Accuracy and memoization rate against the threshold",
    paper="BERT on SST-2: at a threshold of 0.8 the memoization rate is 42 % and the loss of accuracy below 1.5 "
    "points.",
    differs="The paper looks for the most similar of all records, by the probabilities themselves, which a system "
    "that shall not compute them cannot do; here the threshold is on the similarity that the distance of "
    "keys predicts. Rows of padding do not count as similar. In the same hits a random and the mean "
    "record are tried as well.",
    run=run,
    text=text,
    draw=draw,
    size=(8.0, 4.6),
)

if __name__ == "__main__":
    sys.exit(alone(EXPERIMENT))
