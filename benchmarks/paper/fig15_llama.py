"""Figure 15: similarity in the layers of a LLaMA."""

from __future__ import annotations

import sys
from typing import Any

import torch

from benchmarks.paper.alone import alone
from benchmarks.paper.experiment import Experiment, Result, table
from benchmarks.paper.probabilities import best_similarities, capture, histogram
from benchmarks.paper.workbench import Workbench

MODEL = "stories260k-llama"
SHOWN = ("first head, tokens alone", "all heads, tokens alone")
#: The same stories cut to as many tokens as a sentence of SST-2 has, and filled up with padding again.
CUT = 28
PADDED = ("first head, with padding", "all heads, with padding")


def run(bench: Workbench) -> Result:
    """Compare stories with stories: whole, without padding, and cut short and padded."""
    recorded, tried, padded = bench.choose((320, 96, 256), (64, 16, 128))
    batches, _, _, tests = bench.batches(MODEL, padded=padded, batch=16, recorded=recorded, tried=tried)
    stored, own = (capture(bench.another(MODEL), part) for part in (batches, tests))
    layers = [
        {variant: histogram(best_similarities(own, stored, layer, variant)) for variant in SHOWN}
        for layer in range(len(own.layers))
    ]
    stored, own = (capture(bench.another(MODEL), [_cut(batch) for batch in part]) for part in (batches, tests))
    for layer, found in enumerate(layers):
        found.update({variant: histogram(best_similarities(own, stored, layer, variant)) for variant in PADDED})
    return {"recorded": recorded, "tried": tried, "padded": padded, "layers": layers}


def _cut(batch: dict[str, Any]) -> dict[str, Any]:
    """Cut stories, and fill them up with what counts as padding."""
    mask = torch.zeros_like(batch["input_ids"])
    mask[:, :CUT] = 1
    return {"input_ids": batch["input_ids"] * mask, "attention_mask": mask}


def text(result: Result) -> str:
    """Print means and the share above a half."""
    rows = []
    for layer, variants in enumerate(result["layers"]):
        cells: list[object] = [layer]
        for variant in (*SHOWN, *PADDED):
            shares = variants[variant]["shares"]
            cells += [variants[variant]["mean"], sum(shares[len(shares) // 2 :])]
        rows.append(cells)
    names = [*SHOWN, *(f"cut to {CUT} tokens, {variant}" for variant in PADDED)]
    header = ["layer", *(f"{name}: {what}" for name in names for what in ("mean", "from 0.5"))]
    note = f"{result['tried']} stories of {result['padded']} tokens, {result['recorded']} stored ones.\n\n"
    return note + table(header, rows)


def draw(result: Result, figure: Any) -> None:
    """Draw the first layer and the one in the middle."""
    layers = result["layers"]
    chosen = (0, len(layers) // 2)
    axes = figure.subplots(1, len(chosen), sharey=True)
    for axis, layer in zip(axes, chosen, strict=True):
        for variant, color in zip((*SHOWN, PADDED[0]), ("#c2410c", "#2563eb", "#6b7280"), strict=True):
            shares = layers[layer][variant]["shares"]
            edges = [place / len(shares) for place in range(len(shares) + 1)]
            label = f"cut to {CUT} tokens, {variant}" if variant in PADDED else variant
            axis.stairs([100 * share for share in shares], edges, color=color, label=label, linewidth=1.8)
        axis.set_title(f"layer {layer}", fontsize=10)
        axis.set_xlabel("similarity (Eq. 1) of the most similar record")
        axis.grid(visible=True, alpha=0.2)
    axes[0].set_ylabel("sequences, %")
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=3)


EXPERIMENT = Experiment(
    name="fig15_llama",
    where="Figure 15",
    title="Similarity in the layers of a LLaMA",
    paper="LLaMA-7B, L = 2,048, 2,778 stored records: all above 0.6 in layer 0; 24 % above 0.5 in layer 15.",
    differs="stories260k, a LLaMA of five layers and 260 thousand parameters, on stories that were drawn from it; 320 "
    "stored ones of 256 tokens, and no padding at all. The paper's inputs are 2,048 places long, and of SST-2 by its "
    "section 6: were they sentences, nearly all of it would be padding. So the same stories are cut to the tokens of a "
    "sentence and padded again. Probabilities are float16.",
    version=2,
    run=run,
    text=text,
    draw=draw,
)

if __name__ == "__main__":
    sys.exit(alone(EXPERIMENT))
