"""Figure 11: how often each record is reused."""

from __future__ import annotations

import sys
from typing import Any

import memodb_transformers as mt
from benchmarks.paper.alone import alone
from benchmarks.paper.experiment import Experiment, Result, table
from benchmarks.paper.workbench import Workbench, calls

MODEL = "minilm-sst2"


def run(bench: Workbench) -> Result:
    """Count reuse in the first layer, every search a hit."""
    tests = bench.sst2(MODEL, tried=bench.choose(640, 96))[3]
    with mt.memoize(bench.model(MODEL), bench.store(MODEL), threshold=1e30, layers=[0]) as memo:
        for _ in calls(bench.model(MODEL), tests):
            pass
        stats = memo.stats()
    reuse = stats["reuse"]
    return {
        "sequences": stats["sequences"],
        "hits": stats["layers"][0]["hits"],
        "stored": bench.sizes["recorded"],
        **{name: reuse[name] for name in ("records_hit", "max", "mean", "times")},
    }


def text(result: Result) -> str:
    """Print how many records were reused so many times."""
    rows = [[int(times), count] for times, count in result["times"].items()]
    note = (
        f"{result['hits']} hits of {result['sequences']} sentences in layer 0; {result['records_hit']} of about "
        f"{result['stored']} records were reused at all, at most {result['max']} times.\n\n"
    )
    return note + table(["times reused", "records"], rows)


def draw(result: Result, figure: Any) -> None:
    """Draw the counts."""
    axis = figure.subplots()
    times = {int(number): count for number, count in result["times"].items()}
    axis.bar(list(times), list(times.values()), color="#2563eb")
    axis.set_xlabel("times that a record was reused")
    axis.set_ylabel("records (log scale)")
    axis.set_yscale("log")
    axis.set_xticks(range(1, max(times) + 1))
    axis.grid(visible=True, axis="y", alpha=0.2)


EXPERIMENT = Experiment(
    name="fig11_reuse",
    where="Figure 11",
    title="How often each record is reused",
    paper="BERT, 10,000 stored sequences, 640 searched, first layer: most records that are reused are so once "
    "or twice, none more than six times; there is no hot record.",
    differs="About 5,000 stored sentences; searched among those of the same length; 640 sentences are few to find a "
    "hot record with.",
    run=run,
    text=text,
    draw=draw,
    size=(6.5, 3.8),
)

if __name__ == "__main__":
    sys.exit(alone(EXPERIMENT))
