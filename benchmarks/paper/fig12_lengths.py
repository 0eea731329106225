"""Figure 12: how similarity depends on the length that inputs are padded to."""

from __future__ import annotations

import sys
from statistics import fmean
from typing import Any

from benchmarks.paper.alone import alone
from benchmarks.paper.experiment import Experiment, Result, table
from benchmarks.paper.probabilities import VARIANTS, best_similarities, capture, histogram, same_length
from benchmarks.paper.workbench import Workbench

MODEL = "minilm-sst2"


def run(bench: Workbench) -> Result:
    """Do as Figure 3 does, for inputs cut and padded to several lengths."""
    recorded, tried = bench.choose((1504, 96), (160, 32))
    lengths: Result = {}
    for padded in bench.choose((16, 32, 64, 128), (16, 64)):
        batches, _, _, tests = bench.batches(MODEL, padded=padded, recorded=recorded, tried=tried)
        stored, own = (capture(bench.another(MODEL), part) for part in (batches, tests))
        lengths[str(padded)] = {
            "tokens": float(own.lengths.mean()),
            "same_length": same_length(own, stored),
            "variants": {
                variant: [histogram(best_similarities(own, stored, layer, variant)) for layer in range(len(own.layers))]
                for variant in VARIANTS
            },
        }
    return {"recorded": recorded, "tried": tried, "lengths": lengths}


def _means(found: Result, variant: str) -> float:
    return fmean(layer["mean"] for layer in found["variants"][variant] if layer["mean"] is not None)


def text(result: Result) -> str:
    """Print means over all layers."""
    rows = [
        [padded, found["tokens"], found["same_length"], *(_means(found, variant) for variant in VARIANTS)]
        for padded, found in result["lengths"].items()
    ]
    note = f"Means over all layers; {result['tried']} sentences, {result['recorded']} stored ones.\n\n"
    return note + table(["padded to", "tokens, mean", "stored of a length, mean", *VARIANTS], rows)


def draw(result: Result, figure: Any) -> None:
    """Draw the means against the length."""
    axis = figure.subplots()
    lengths = [int(padded) for padded in result["lengths"]]
    for variant in VARIANTS:
        style = "o" if "first" in variant else "s"
        style += "-" if variant.endswith("with padding") else ":" if "with" in variant else "--"
        color = "#c2410c" if "with" in variant else "#2563eb"
        axis.plot(lengths, [_means(f, variant) for f in result["lengths"].values()], style, color=color, label=variant)
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [str(length) for length in lengths])
    axis.set_xlabel("length that inputs are padded to, tokens")
    axis.set_ylabel("mean best similarity (Eq. 1)")
    axis.grid(visible=True, alpha=0.2)
    figure.legend(fontsize=8, loc="outside lower center", ncols=3)


EXPERIMENT = Experiment(
    name="fig12_lengths",
    where="Figure 12",
    title="Similarity by the length that inputs are padded to",
    paper="BERT on SST-2, 10,000 sequences: the mean best similarity is 0.79 at length 16 and 0.87 at length "
    "128; longer inputs are said to bring more similarity.",
    differs="A model of six layers and about 1,500 stored sentences. SST-2 has some 25 tokens a sentence, so that "
    "inputs of 128 are mostly padding, and those cut at 16 nearly all have one length: then all stored ones are looked "
    "at. Probabilities are float16.",
    run=run,
    text=text,
    draw=draw,
    size=(7.0, 4.2),
    version=2,
)

if __name__ == "__main__":
    sys.exit(alone(EXPERIMENT))
