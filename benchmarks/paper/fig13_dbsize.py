"""Figure 13: memoization rate, time and search time against the size of the database."""

from __future__ import annotations

import sys
from statistics import fmean
from typing import Any

import memodb_transformers as mt
from benchmarks.paper.alone import alone
from benchmarks.paper.experiment import Experiment, Result, level_name, table
from benchmarks.paper.workbench import Workbench

MODEL = "minilm-sst2"
#: 0.8 is "moderate", which reuses little here; 0.7 shows the growth as well; at 0 every layer is searched in.
LEVELS = ("moderate", 0.7, 0.0)


def run(bench: Workbench) -> Result:
    """Build stores of several sizes with the same embedder, and evaluate the same sentences with each."""
    rows = []
    # The smaller databases are parts of the larger ones, and distances are those of one embedder.
    sizes = bench.choose((512, 2048, 6144, 12288), (96, 320))
    tested = bench.choose(0, 64)
    for sentences in sizes:
        with bench.place("fig13") as (path,):
            recorded = bench.batches(MODEL, recorded=sentences, tried=32)[0]
            built = mt.build(
                bench.model(MODEL), recorded, path, embedder="projection", store_dtype="bfloat16", profile=False
            )
            # The same sentences calibrate and test every size: they come after those of the largest one.
            _, profiled, _, tests = bench.batches(
                MODEL, recorded=sizes[-1], profiled=bench.choose(256, 32), tuned=0, tried=tested
            )
            profile = mt.profile(bench.model(MODEL), profiled, path)
            report = mt.evaluate(
                bench.model(MODEL),
                tests,
                path,
                levels=LEVELS,
                kinds=("plain", "nearest"),
                layers="all",
                similarity=False,
                repeats=bench.choose(3, 1),
            )
        stats = report.stats[str(LEVELS[-1])]["layers"]
        searched = sum(row["lookups"] for row in stats)
        rows.append(
            {
                "sentences": built.sequences,
                "bytes": built.bytes,
                "nearest": [_mean(row.similarities) for row in profile.layers],
                "found": fmean(value is not None for row in profile.layers for value in row.similarities),
                "self_hits": report.self_hits,
                "search_us": 1e6 * sum(row["search_seconds"] for row in stats) / searched if searched else None,
                "levels": [row for row in report.rows if row["kind"] == "nearest"],
            }
        )
    return {"rows": rows}


def _mean(values: Any) -> float | None:
    found = [value for value in values if value is not None]
    return fmean(found) if found else None


def text(result: Result) -> str:
    """Print a row a size and level."""
    lines = [
        [
            row["sentences"],
            row["bytes"] / 1e9,
            row["found"],
            _mean(row["nearest"]),
            row["search_us"],
            level_name(level["level"]),
            level["memoization_rate"],
            f"{100 * level['accuracy']:.1f}",
            1 / level["speedup_vs_plain"],
        ]
        for row in result["rows"]
        for level in row["levels"]
    ]
    header = [
        "sentences",
        "GB",
        "sentences with a record of their length",
        "similarity found, of these",
        "search, us",
        "level",
        "memoization rate",
        "accuracy, %",
        "time, of plain",
    ]
    return table(header, lines)


def draw(result: Result, figure: Any) -> None:
    """Draw similarity, rate and search time against the number of sentences."""
    rows = result["rows"]
    sizes = [row["sentences"] for row in rows]
    first, second = figure.subplots(1, 2)
    first.plot(sizes, [_mean(row["nearest"]) for row in rows], "s-", color="#9333ea", label="similarity found (Eq. 1)")
    for number, (level, color) in enumerate(zip(LEVELS[:2], ("#2563eb", "#c2410c"), strict=True)):
        rates = [row["levels"][number]["memoization_rate"] for row in rows]
        first.plot(sizes, rates, "o-", color=color, label=f"memoization rate, level {level}")
    first.set_ylim(0, 1)
    first.set_ylabel("similarity; share of attention that is memoized")
    first.legend(fontsize=8)
    second.plot(sizes, [row["search_us"] for row in rows], "o-", color="#16a34a")
    second.set_ylabel("search, microseconds a sequence and layer")
    second.set_ylim(0, 1.15 * max(row["search_us"] or 0.0 for row in rows))
    for axis in (first, second):
        axis.set_xscale("log")
        axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axis.minorticks_off()
        axis.set_xlabel("stored sentences (log scale)")
        axis.grid(visible=True, alpha=0.2)


EXPERIMENT = Experiment(
    name="fig13_dbsize",
    where="Figure 13",
    title="Memoization against the size of the database",
    paper="Twice the database (575 GB to 1.13 TB; GPT-2: 630 GB to 1.25 TB): memoization rate +2.3, +11.5, +6.5 and "
    "+5 % (points, it seems) for BERT, RoBERTa, DeBERTa and GPT-2, inference time -1.8, -14, -18 and -5.6 %, search "
    "time within 1 %.",
    differs="minilm-sst2, L = 64, at most about 12,000 sentences (what ends with a full stop in the training set; some "
    "are ends of others); bfloat16; a random projection as the embedder, so that only the size differs (what better "
    "keys "
    "would make of more records is not told). Levels are calibrated anew for each store. Searched are sentences of the "
    "same length only, one by one, as they are few; the paper searches all, in a graph (HNSW). All layers are "
    "memoized, "
    "batches of 32. Not measured: RoBERTa, DeBERTa, GPT-2.",
    run=run,
    text=text,
    draw=draw,
    size=(9.5, 4.0),
)

if __name__ == "__main__":
    sys.exit(alone(EXPERIMENT))
