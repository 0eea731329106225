"""Figure 3: how similar the most similar stored record is, layer by layer."""

from __future__ import annotations

import sys
from typing import Any

from benchmarks.paper.alone import alone
from benchmarks.paper.experiment import Experiment, Result, table
from benchmarks.paper.probabilities import VARIANTS, best_similarities, capture, histogram, same_length
from benchmarks.paper.workbench import SST2, Workbench


def run(bench: Workbench) -> Result:
    """Compare sequences of the development set with those of the training set."""
    recorded, tried = bench.choose((3008, 192), (320, 32))
    models: Result = {}
    for name in SST2:
        batches, _, _, tests = bench.batches(name, recorded=recorded, tried=tried)
        stored, own = (capture(bench.another(name), part) for part in (batches, tests))
        models[name] = {
            "same_length": same_length(own, stored),
            "variants": {
                variant: [histogram(best_similarities(own, stored, layer, variant)) for layer in range(len(own.layers))]
                for variant in VARIANTS
            },
        }
    return {"recorded": recorded, "tried": tried, "models": models}


def text(result: Result) -> str:
    """Print mean similarities, and how many are between 0.7 and 0.9, a model and variant a row."""
    parts = [f"{result['tried']} sentences of the development set, {result['recorded']} stored ones, L = 64."]
    for name, found in result["models"].items():
        layers = range(len(next(iter(found["variants"].values()))))
        for what, said in (("mean", "mean"), ("from_0.7_to_0.9", "share from 0.7 to 0.9")):
            rows = [[variant, *(layer[what] for layer in of)] for variant, of in found["variants"].items()]
            parts.append(f"{name}, {said}:\n\n{table(['', *(f'layer {layer}' for layer in layers)], rows)}")
        parts[-1] += f"\nOf the stored sentences, {found['same_length']:.0f} have the length of one, on average.\n"
    return "\n\n".join(parts)


#: From early layers to late ones.
_COLORS = ("#eab308", "#f97316", "#dc2626", "#a21caf", "#4f46e5", "#1e293b")


def draw(result: Result, figure: Any) -> None:
    """Draw a distribution for each layer: as the paper counts, and of tokens alone."""
    shown = ("first head, with padding", "all heads, tokens alone")
    axes = figure.subplots(len(result["models"]), len(shown), sharex=True, sharey=True, squeeze=False)
    for row, (name, model) in zip(axes, result["models"].items(), strict=True):
        for axis, variant in zip(row, shown, strict=True):
            layers = model["variants"][variant]
            for layer, found in enumerate(layers):
                bins = len(found["shares"])
                middles = [(place + 0.5) / bins for place in range(bins)]
                heights = [100 * share for share in found["shares"]]
                axis.plot(middles, heights, label=f"layer {layer}", color=_COLORS[layer])
            axis.set_title(f"{name}: {variant}", fontsize=9)
            axis.grid(visible=True, alpha=0.2)
        row[0].set_ylabel("sequences, %")
    for axis in axes[-1]:
        axis.set_xlabel("similarity (Eq. 1) of the most similar record")
    axes[0][-1].legend(fontsize=7)


EXPERIMENT = Experiment(
    name="fig03_similarity",
    where="Figure 3",
    title="How similar the most similar stored record is, by layer",
    paper="BERT on SST-2, 60,000 stored sequences, first head: in layer 0, 49.2 % of the sequences find a "
    "record of a similarity between 0.7 and 0.9; the distribution differs from layer to layer.",
    differs="Models of six layers, about 3,000 stored sentences instead of 60,000, L = 64. Eq. 1 of the paper "
    "knows no mask, so it seems to count rows of padding and to compare sequences of any length. Shown are that way; "
    "rows of padding counted, but only records of the same length looked at (what many records bring); and tokens "
    "alone of the same length (what padding brings beyond that). DeBERTa-v2 masks rows of padding as a whole, so any "
    "two "
    "of them are equal, uniform ones. The first 192 sentences of the development set are looked up, probabilities in "
    "float16.",
    run=run,
    text=text,
    draw=draw,
    size=(9.0, 6.0),
    version=2,
)

if __name__ == "__main__":
    sys.exit(alone(EXPERIMENT))
