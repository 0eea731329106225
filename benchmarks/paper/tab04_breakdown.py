"""Table 4: one attention layer with and without memoization, part by part."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from time import perf_counter
from typing import Any

import torch

import memodb_transformers as mt
from benchmarks.paper.alone import alone
from benchmarks.paper.experiment import Experiment, Result, table
from benchmarks.paper.fig01_breakdown import SHAPES
from benchmarks.paper.workbench import Workbench, attention_as, calls

#: Names of the projections, and of the module around them.
PROJECTIONS = {"BERT": ("query", "key", "value"), "DeBERTa-v2": ("query_proj", "key_proj", "value_proj")}
MODULES = {"BERT": "BertSelfAttention", "DeBERTa-v2": "DisentangledSelfAttention"}
_NEAR = 1e-3
#: Batches that are stored.
STORED = 4
#: What a memo tells the seconds of.
_TOLD = ("embed", "search", "fetch", "value", "product")


def run(bench: Workbench) -> Result:
    """Time a layer of each shape: computed, with eager attention and the default one, and all of it reused."""
    batch, length, rounds = bench.choose((64, 512, 5), (8, 128, 2))
    families: Result = {}
    for family in ("BERT", "DeBERTa-v2"):
        config, kind, settings, _ = SHAPES[family]
        torch.manual_seed(0)
        shape = {"hidden_size": 768, "num_hidden_layers": 1, "num_attention_heads": 12, "intermediate_size": 3072}
        model = kind(config(**{**settings, **shape, "vocab_size": 1000, "max_position_embeddings": 512})).eval()
        # More than a batch is stored, and each round draws one of them: its records lie scattered.
        stored = [_batch(torch.randint(3, 999, (batch, length))) for _ in range(STORED)]
        computed = {}
        for implementation in dict.fromkeys(("eager", model.config._attn_implementation)):
            with attention_as(model, implementation):
                computed[implementation] = _computed(model, stored, family, rounds)
        families[family] = {"computed": computed, "reused": _reused(bench, model, stored, family, rounds)}
    return {"families": families, "batch": batch, "length": length, "stored": STORED * batch}


def _batch(tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def _drawn(stored: list[dict[str, torch.Tensor]], rounds: int) -> Iterator[list[dict[str, torch.Tensor]]]:
    """Draw a batch of the stored sequences for each round, and one before that warms up."""
    tokens = torch.cat([batch["input_ids"] for batch in stored])
    random = torch.Generator().manual_seed(0)
    for _ in range(rounds + 1):
        yield [_batch(tokens[torch.randperm(len(tokens), generator=random)[: len(stored[0]["input_ids"])]])]


@contextmanager
def _hooked(named: dict[str, Any]) -> Iterator[dict[str, float]]:
    """Count the seconds that modules take, by hooks; those of a memoized one run around its memo as well."""
    spent: dict[str, float] = {}
    began: dict[str, float] = {}
    handles = []
    for name, module in named.items():
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: began.update({name: perf_counter()})))

        def note(*_: Any, name: str = name) -> None:
            spent[name] = spent.get(name, 0.0) + perf_counter() - began[name]

        handles.append(module.register_forward_hook(note))
    try:
        yield spent
    finally:
        for handle in handles:
            handle.remove()


def _attention(model: Any, family: str) -> Any:
    return next(part for part in model.modules() if type(part).__name__ == MODULES[family])


def _computed(model: Any, stored: Any, family: str, rounds: int) -> dict[str, float]:
    """Time the projections and the whole of a layer."""
    module = _attention(model, family)
    named = {"whole": module, **{name[0]: getattr(module, name) for name in PROJECTIONS[family]}}
    found: list[dict[str, float]] = []
    with _hooked(named) as spent:
        for data in _drawn(stored, rounds):
            spent.clear()
            for _output in calls(model, data):
                pass
            found.append(dict(spent))
    parts = {name: median(turn[name] for turn in found[1:]) for name in named}
    return {**parts, "rest": parts["whole"] - sum(parts[name[0]] for name in PROJECTIONS[family])}


def _reused(bench: Workbench, model: Any, stored: Any, family: str, rounds: int) -> dict[str, Any]:
    """Time a layer that finds every sequence of its batch, from what a memo says of itself."""
    length, hidden = stored[0]["input_ids"].shape[1], model.config.hidden_size
    embedders = {"projection": "projection", "mlp": mt.LinearMLP.create(length, hidden, 1)}
    found = {}
    for name, embedder in embedders.items():
        with bench.place("tab04") as (path,):
            mt.build(model, stored, path, embedder=embedder, profile=False)
            turns = []
            with (
                mt.memoize(model, path, threshold=_NEAR, layers="all") as memo,
                _hooked({"whole": _attention(model, family)}) as spent,
            ):
                for data in _drawn(stored, rounds):
                    memo.reset_stats()
                    spent.clear()
                    for _output in calls(model, data):
                        pass
                    row = memo.stats()["layers"][0]
                    assert row["hits"] == len(data[0]["input_ids"]), row
                    turns.append({**row, "whole_seconds": spent["whole"]})
        parts = ("embed", "search", "fetch", "value", "product", "whole")
        found[name] = {part: median(turn[f"{part}_seconds"] for turn in turns[1:]) for part in parts}
    return found


def text(result: Result) -> str:
    """Print the parts as the paper does."""
    parts = []
    for family, found in result["families"].items():
        kinds = list(found["computed"])
        reused = found["reused"]
        header = ["ms", *(f"memoized, {name}" for name in reused), *(f"computed, {name}" for name in kinds)]
        blank = [None] * len(kinds)
        lines: list[list[Any]] = [
            ["embedding", *(1e3 * r["embed"] for r in reused.values()), *blank],
            ["searching", *(1e3 * r["search"] for r in reused.values()), *blank],
            ["fetch", *(1e3 * r["fetch"] for r in reused.values()), *blank],
            ["Q", *([None] * len(reused)), *(1e3 * found["computed"][k]["q"] for k in kinds)],
            ["K", *([None] * len(reused)), *(1e3 * found["computed"][k]["k"] for k in kinds)],
            ["V", *(1e3 * r["value"] for r in reused.values()), *(1e3 * found["computed"][k]["v"] for k in kinds)],
            ["probabilities times V", *(1e3 * r["product"] for r in reused.values()), *blank],
            [
                "other: of the computed layer scores, softmax and weighted values",
                *(1e3 * (r["whole"] - sum(r[part] for part in _TOLD)) for r in reused.values()),
                *(1e3 * found["computed"][k]["rest"] for k in kinds),
            ],
            [
                "total",
                *(1e3 * r["whole"] for r in reused.values()),
                *(1e3 * found["computed"][k]["whole"] for k in kinds),
            ],
        ]
        note = (
            f"{family}-base shape, batch {result['batch']}, L = {result['length']}, {result['stored']} sequences stored"
        )
        parts.append(f"{note}:\n\n{table(header, lines)}")
    return "\n\n".join(parts)


EXPERIMENT = Experiment(
    name="tab04_breakdown",
    where="Table 4",
    title="One attention layer, part by part",
    paper="BERT, batch 64, L = 512, 48 cores: 250.3 ms instead of 567.2; embedding 38.4, search 1.0, fetch "
    "15.1, V 32.2, the rest (probabilities times V) 163.6; without memoization Q, K and V 32.2 each, "
    "scores and softmax 423.3, the rest 47.3.",
    differs="Two cores; random weights; all sequences are found. The records are float32, as the paper's seem "
    "to be. Embedders: a random projection, and the form of the paper's (three linear layers folded into one "
    'matrix). "Other" of the computed layer is to be set beside the paper\'s 470.6 (423.3 and 47.3): scores, softmax '
    "and the weighted values.",
    version=2,
    data=False,
    run=run,
    text=text,
)

if __name__ == "__main__":
    sys.exit(alone(EXPERIMENT))
