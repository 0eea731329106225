"""Figure 1: which share of the inference time is self-attention."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any

import torch
import transformers

from benchmarks.memo_models import CONFIGS
from benchmarks.paper.alone import alone
from benchmarks.paper.experiment import Experiment, Result, table
from benchmarks.paper.workbench import Workbench, attention_as

_BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
#: Family -> configuration, class, settings of the base size, and the module that is self-attention.
SHAPES: dict[str, tuple[Any, Any, dict[str, Any], str]] = {
    "BERT": (transformers.BertConfig, transformers.BertModel, _BASE, "BertAttention"),
    "RoBERTa": (
        transformers.RobertaConfig,
        transformers.RobertaModel,
        {**_BASE, "max_position_embeddings": 514},
        "RobertaAttention",
    ),
    "ALBERT": (transformers.AlbertConfig, transformers.AlbertModel, _BASE, "AlbertAttention"),
    "DeBERTa-v2": (
        transformers.DebertaV2Config,
        transformers.DebertaV2Model,
        {**_BASE, **CONFIGS["DeBERTa-v2"][2]},
        "DebertaV2Attention",
    ),
    "GPT-2": (transformers.GPT2Config, transformers.GPT2Model, {}, "GPT2Attention"),
    "LLaMA": (transformers.LlamaConfig, transformers.LlamaModel, {**_BASE, "vocab_size": 1000}, "LlamaAttention"),
}


def run(bench: Workbench) -> Result:
    """Time whole forwards, and the self-attention inside of them; all take turns, in an order drawn anew."""
    lengths, batch, rounds, layers = bench.choose(((256, 512), 4, 5, 12), ((256, 512), 1, 2, 2))
    models, ways = {}, []
    for family, (config, kind, settings, module) in SHAPES.items():
        torch.manual_seed(0)
        sized = {"n_layer": layers} if family == "GPT-2" else {"num_hidden_layers": layers}
        model = models[family] = kind(config(**{**settings, **sized})).eval()
        kinds = ("eager", "sdpa") if model._supports_sdpa else ("eager",)
        ways += [(family, module, implementation, length) for implementation in kinds for length in lengths]
    turns: dict[Any, list[tuple[float, float]]] = {way: [] for way in ways}
    order, shuffle = list(ways), random.Random(0)
    with torch.inference_mode():
        for number in range(rounds + 1):
            shuffle.shuffle(order)
            for way in order:
                family, module, implementation, length = way
                tokens = torch.randint(3, 999, (batch, length))
                with attention_as(models[family], implementation):
                    turn = _time(models[family], tokens, module)
                if number:  # the first round warms up
                    turns[way].append(turn)
    rows = []
    for (family, _, implementation, length), found in turns.items():
        shares = sorted(part / whole for whole, part in found)
        rows.append(
            {
                "family": family,
                "attention": implementation,
                "length": length,
                "seconds": median(whole for whole, _ in found),
                "attention_seconds": median(part for _, part in found),
                "share": median(shares),
                "share_range": [shares[0], shares[-1]],
            }
        )
    return {"rows": rows, "batch": batch, "layers": layers}


def _time(model: Any, tokens: torch.Tensor, module: str) -> tuple[float, float]:
    """Return the seconds of a forward, and those inside of self-attention; its last sequence has some padding."""
    spent = began = 0.0

    def before(*_: Any) -> None:
        nonlocal began
        began = perf_counter()

    def after(*_: Any) -> None:
        nonlocal spent
        spent += perf_counter() - began

    parts = [part for part in model.modules() if type(part).__name__ == module]
    handles = [part.register_forward_pre_hook(before) for part in parts]
    handles += [part.register_forward_hook(after) for part in parts]
    mask = torch.ones_like(tokens)
    mask[-1, -8:] = 0
    start = perf_counter()
    model(input_ids=tokens, attention_mask=mask)
    whole = perf_counter() - start
    for handle in handles:
        handle.remove()
    return whole, spent


def text(result: Result) -> str:
    """Print times and shares."""
    rows = [
        [
            row["family"],
            row["attention"],
            row["length"],
            1e3 * row["seconds"],
            1e3 * row["attention_seconds"],
            f"{row['share']:.0%} ({row['share_range'][0]:.0%} to {row['share_range'][1]:.0%})",
        ]
        for row in result["rows"]
    ]
    note = f"{result['layers']} layers, batch {result['batch']}, random weights, two threads; medians.\n\n"
    return note + table(["", "attention", "L", "whole model, ms", "self-attention, ms", "share (rounds)"], rows)


def draw(result: Result, figure: Any) -> None:
    """Draw the shares as bars."""
    axis = figure.subplots()
    rows = result["rows"]
    families = list(dict.fromkeys(row["family"] for row in rows))
    kinds = [(attention, length) for attention in ("eager", "sdpa") for length in (256, 512)]
    colors = ("#fdba74", "#c2410c", "#93c5fd", "#1d4ed8")
    place: Callable[[int, int], float] = lambda family, kind: family + 0.2 * (kind - 1.5)  # noqa: E731
    for number, ((attention, length), color) in enumerate(zip(kinds, colors, strict=True)):
        found = {
            row["family"]: 100 * row["share"]
            for row in rows
            if row["attention"] == attention and row["length"] == length
        }
        places = [place(families.index(family), number) for family in found]
        axis.bar(places, list(found.values()), 0.19, color=color, label=f"{attention}, L = {length}")
    axis.set_xticks(range(len(families)), families)
    axis.set_ylabel("self-attention, % of inference time")
    axis.set_ylim(0, 100)
    axis.grid(visible=True, axis="y", alpha=0.2)
    axis.legend(fontsize=8, ncols=4, loc="upper center")


EXPERIMENT = Experiment(
    name="fig01_breakdown",
    where="Figure 1",
    title="Share of self-attention in the inference time",
    paper="BERT, RoBERTa and ALBERT, L = 256 and 512, 24 cores, PyTorch 1.11: 43 % to 80 % of the inference "
    "time (83 % in its section 4), more for the longer inputs.",
    differs="Two cores; PyTorch today, whose fused attention (SDPA) the paper could not use; base-sized shapes "
    "with random weights (what a layer costs does not depend on them). Self-attention is from the projections to the "
    "output projection, with the residual and its norm for all but GPT-2 and LLaMA, whose norm stands before it. "
    "DeBERTa-v2 has no SDPA.",
    version=2,
    data=False,
    run=run,
    text=text,
    draw=draw,
)

if __name__ == "__main__":
    sys.exit(alone(EXPERIMENT))
