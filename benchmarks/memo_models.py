"""Memoized models, end to end: base-sized layers with random weights, stores of all kinds, batches with so many hits.

What a layer costs does not depend on its weights. How often there is a hit does, and is given here: a batch is put
together from sequences that the store knows and others that it does not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import transformers

import memodb_transformers as mt
from benchmarks.clock import Turn
from benchmarks.profiles import MemoSize
from memodb_transformers.capture import attention_implementation
from memodb_transformers.card import ModelCard
from memodb_transformers.memo import Memo
from memodb_transformers.product import multiplies_bfloat16
from memodb_transformers.sites import find_sites
from memodb_transformers.store import open_stores

HEADS, HIDDEN, BATCH, THREADS = 12, 768, 8, 2
VOCABULARY = 1000
#: Squared L2 distance of keys: that of a sequence to itself is far below, that of any two far above.
NEAR = 1e-3
PARTS = ("embed", "search", "fetch", "value", "product", "miss", "other")

CONFIGS = {
    "BERT": (transformers.BertConfig, transformers.BertModel, {}),
    "DeBERTa-v2": (
        transformers.DebertaV2Config,
        transformers.DebertaV2Model,
        # As in microsoft/deberta-v3-base.
        {
            "relative_attention": True,
            "position_buckets": 256,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_biased_input": False,
        },
    ),
}


@dataclass(frozen=True)
class Way:
    """One contender: the plain model, or a memoized one.

    Parameters
    ----------
    name
        What it is called.
    store
        Which store it uses, none for the plain model.
    hits
        Share of each batch that the store knows.
    lookup
        As in ``memoize``.
    attention
        Attention implementation, None: the model's default.
    """

    name: str
    store: str | None = None
    hits: float = 0.0
    lookup: str = "layer"
    attention: str | None = None


#: Stores: what they hold, in which dtype, found by which embedder. Halves are those that docs/memoization.md advises.
HALF = "bfloat16" if multiplies_bfloat16() else "float16"
STORES = {
    "probs": ("probs", HALF, "projection"),
    "probs float16": ("probs", "float16", "projection"),
    "probs float32": ("probs", "float32", "projection"),
    "context": ("context", "float32", "projection"),
    "paper": ("probs", HALF, "mlp"),
}
WAYS = (
    Way("plain"),
    Way("plain, eager", attention="eager"),
    *(Way(f"{share:.0%} hits", "probs", share) for share in (1.0, 0.5, 0.0)),
    *(Way(f"{share:.0%} hits, one lookup", "probs", share, "sequence") for share in (1.0, 0.0)),
    Way("100% hits, float16 store", "probs float16", 1.0),
    Way("100% hits, float32 store", "probs float32", 1.0),
    Way("100% hits, contexts", "context", 1.0),
    Way("100% hits, contexts, one lookup", "context", 1.0, "sequence"),
    *(Way(f"{share:.0%} hits, the paper's embedder", "paper", share) for share in (1.0, 0.0)),
)


class Bench:
    """One model, its stores, and the ways to run it."""

    def __init__(self, family: str, length: int, size: MemoSize, folder: Path, stack: ExitStack) -> None:
        config, kind, settings = CONFIGS[family]
        torch.manual_seed(0)
        self.model = kind(
            config(
                **settings,
                vocab_size=VOCABULARY,
                hidden_size=HIDDEN,
                num_hidden_layers=size.layers,
                num_attention_heads=HEADS,
                intermediate_size=4 * HIDDEN,
                max_position_embeddings=512,
            )
        ).eval()
        self.length = length
        self.parts: dict[str, list[dict[str, float]]] = {}
        self._sites = find_sites(self.model)
        self._random = np.random.default_rng(0)
        self._known = torch.from_numpy(self._tokens(size.known))
        self._memos: dict[str, Memo] = {}
        eager_is_default = self.model.config._attn_implementation == "eager"
        self.ways = [way for way in WAYS if not (way.attention and eager_is_default)]
        for name, (target, store_dtype, embedder) in STORES.items():
            self._build(folder / f"{family}-{length}-{name}", name, target, store_dtype, embedder, stack)

    def _build(self, path: Path, name: str, target: str, store_dtype: str, embedder: str, stack: ExitStack) -> None:
        layers = len(self._sites.layers)
        chosen = mt.LinearMLP.create(self.length, HIDDEN, layers) if embedder == "mlp" else embedder
        report = mt.build(
            self.model,
            [{"input_ids": part} for part in self._known.split(BATCH)],
            path,
            target=target,
            store_dtype=store_dtype,
            embedder=chosen,
            profile=False,
            progress=False,
        )
        self.stored = report.sequences
        stores = stack.enter_context(open_stores(path, ModelCard.of(self._sites)))
        thresholds = {self.length: dict.fromkeys(range(layers), NEAR)}
        for way in self.ways:
            if way.store == name:
                self._memos[way.name] = Memo(self._sites, stores, thresholds, lookup=way.lookup)

    def draw(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw eight sequences that the stores know, and eight that they do not."""
        rows = self._random.permutation(self.stored)[:BATCH]
        return self._known[torch.from_numpy(rows)], torch.from_numpy(self._tokens(BATCH))

    def turn(self, way: Way) -> Callable[[Any], Turn]:
        """Return a function that runs one forward and tells how long it took."""
        memo = self._memos.get(way.name)
        hits = round(BATCH * way.hits)

        def run(drawn: tuple[torch.Tensor, torch.Tensor]) -> Turn:
            known, new = drawn
            batch = torch.cat([known[:hits], new[hits:]])[torch.randperm(BATCH)]
            with ExitStack() as stack:
                stack.enter_context(torch.no_grad())
                if way.attention is not None:
                    stack.enter_context(attention_implementation(self.model, way.attention))
                if memo is not None:
                    memo.reset_stats()
                    stack.enter_context(memo.attached())
                start = time.perf_counter()
                self.model(input_ids=batch)
                seconds = time.perf_counter() - start
            if memo is not None:
                self._note(way, memo.stats(), hits)
            return Turn(seconds)

        return run

    def breakdown(self, way: Way) -> dict[str, float]:
        """Return the medians of the parts of one layer, in ms."""
        return {
            f"layer_{part}_ms": median(found[part] for found in self.parts[way.name]) * 1e3
            for part in (PARTS if way.name in self.parts else ())
        }

    def _note(self, way: Way, stats: dict[str, Any], hits: int) -> None:
        layers = stats["layers"]
        assert [row["hits"] for row in layers] == [hits] * len(layers), (way.name, stats)
        known = ("embed", "search", "fetch", "value", "product", "miss")
        found = {part: sum(row[f"{part}_seconds"] for row in layers) / len(layers) for part in known}
        attention = sum(row["attention_seconds"] for row in layers) / len(layers)
        found["other"] = attention - found["value"] - found["product"] - found["miss"]
        self.parts.setdefault(way.name, []).append(found)

    def _tokens(self, n: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        return self._random.integers(3, VOCABULARY, (n, self.length), dtype=np.int64)


@contextmanager
def two_threads() -> Iterator[None]:
    """Let torch use two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        yield
    finally:
        torch.set_num_threads(before)
