"""GPT-2 at L = 1,024: a small one, trained here on WikiText-2, perplexity against the memoization rate."""

from __future__ import annotations

import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
import transformers

import memodb_transformers as mt
from benchmarks.memo_data import Batches, root
from benchmarks.paper.alone import alone
from benchmarks.paper.experiment import Experiment, Result, level_name, table
from benchmarks.paper.workbench import Workbench

NAME = "GPT-2, trained here"
#: Small, so that words are made of several pieces and a model needs its attention soon.
_VOCABULARY = 1000
LEVELS = (0.8, 0.7, 0.6, 0.5, 0.0)


def tokens(bench: Workbench) -> tuple[torch.Tensor, torch.Tensor]:
    """Return WikiText-2's validation and test parts as rows of L tokens, by a byte-pair vocabulary of the former."""
    length = bench.choose(1024, 128)

    def make(draft: Path) -> None:
        from tokenizers import ByteLevelBPETokenizer

        folder = root() / "data" / "wikitext2"
        tokenizer = ByteLevelBPETokenizer()
        tokenizer.train([str(folder / "valid.txt")], vocab_size=_VOCABULARY, show_progress=False)
        rows = {}
        for part in ("valid", "test"):
            ids = np.array(tokenizer.encode((folder / f"{part}.txt").read_text()).ids, dtype=np.int64)
            rows[part] = ids[: len(ids) // length * length].reshape(-1, length)
        np.savez(draft, **rows)

    with np.load(bench.made(f"gpt2-tokens-{_VOCABULARY}-{length}.npz", make), allow_pickle=False) as kept:
        return torch.from_numpy(kept["valid"]), torch.from_numpy(kept["test"])


def model(bench: Workbench) -> Any:
    """Train the model on the validation part; it is kept beside the stores."""
    layers, width, epochs = bench.choose((4, 128, 12), (2, 64, 1))

    def make(draft: Path) -> None:
        rows, _ = tokens(bench)
        torch.manual_seed(0)
        config = transformers.GPT2Config(
            vocab_size=_VOCABULARY,
            n_positions=rows.shape[1],
            n_layer=layers,
            n_embd=width,
            n_head=4,
            bos_token_id=0,
            eos_token_id=0,
        )
        made = transformers.GPT2LMHeadModel(config)
        optimizer = torch.optim.AdamW(made.parameters(), lr=2e-3, weight_decay=0.1)
        steps = epochs * -(-len(rows) // 2)
        schedule = transformers.get_linear_schedule_with_warmup(optimizer, min(100, steps // 10), steps)
        random = np.random.default_rng(0)
        for _ in range(epochs):
            for start in np.array_split(random.permutation(len(rows)), -(-len(rows) // 2)):
                part = rows[torch.from_numpy(start)]
                loss = made(input_ids=part, labels=part).loss
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(made.parameters(), 1.0)
                optimizer.step()
                schedule.step()
        made.eval().save_pretrained(draft)

    path = bench.made(f"gpt2-{_VOCABULARY}-{layers}-{width}-{epochs}", make)
    return transformers.GPT2LMHeadModel.from_pretrained(path).eval()


def batches(bench: Workbench) -> tuple[Batches, Batches, Batches]:
    """Return what is recorded, profiled and tried."""
    valid, test = tokens(bench)
    profiled, tried, size = bench.choose((24, 64, 8), (8, 8, 4))
    parts = (valid[: bench.choose(128, 64)], test[:profiled], test[profiled : profiled + tried])
    made = [
        [{"input_ids": rows, "attention_mask": torch.ones_like(rows)} for rows in part.split(size)] for part in parts
    ]
    return made[0], made[1], made[2]


def store(bench: Workbench, made: Any) -> Path:
    """Build the store."""
    recorded, profiled, _ = batches(bench)
    return bench.ready(f"gpt2-store-{_VOCABULARY}-{made.config.n_embd}", made, recorded, profiled, embedder="separable")


def run(bench: Workbench) -> Result:
    """Evaluate at several levels."""
    began = perf_counter()
    made = model(bench)
    trained = perf_counter() - began
    report = mt.evaluate(
        made,
        batches(bench)[2],
        store(bench, made),
        levels=LEVELS,
        kinds=("plain", "nearest", "random", "mean"),
        layers="all",
        repeats=1,
    )
    return {
        "rows": list(report.rows),
        "sequences": report.sequences,
        "self_hits": report.self_hits,
        "training_seconds": trained,
    }


def text(result: Result) -> str:
    """Print perplexity by level."""
    lines = [
        [
            level_name(row["level"]),
            row["kind"],
            row["memoization_rate"],
            row["perplexity"],
            row["similarity"],
            row["agreement"],
        ]
        for row in result["rows"]
    ]
    header = ["level", "reused", "memoization rate", "perplexity", "similarity", "same next token"]
    note = f"{result['sequences']} pieces of the test part, {result['self_hits']} of them in the store; all layers.\n\n"
    return note + table(header, lines)


def draw(result: Result, figure: Any) -> None:
    """Draw perplexity against the memoization rate."""
    axis = figure.subplots()
    styles = {"nearest": ("#16a34a", "o-"), "random": ("#6b7280", "x-"), "mean": ("#2563eb", "s-")}
    for kind, (color, style) in styles.items():
        found = sorted((100 * r["memoization_rate"], r["perplexity"]) for r in result["rows"] if r["kind"] == kind)
        axis.plot(*zip(*found, strict=True), style, color=color, label=f"{kind} record")
    plain = next(row["perplexity"] for row in result["rows"] if row["kind"] == "plain")
    axis.axhline(plain, color="black", linewidth=0.9, label="plain model")
    axis.set_xlabel("memoization rate, %")
    axis.set_ylabel("perplexity")
    axis.grid(visible=True, alpha=0.2)
    axis.legend(fontsize=8)


EXPERIMENT = Experiment(
    name="gpt2_wikitext",
    where="GPT-2 of Tables 2 and 7",
    title="Perplexity of GPT-2 against the memoization rate",
    paper="GPT-2 on WikiText-2, L = 1,024: speedups and rates only; the paper gives no perplexity for it.",
    differs="A GPT-2 of four layers and width 128, trained here on the validation part alone (the training part could "
    "not be had), with 1,000 pieces of words, so its perplexity cannot be compared with that of the real one; 128 of "
    "its sequences are stored, in bfloat16. No padding: every place holds a token. The separable embedder, as an "
    "MLP would have 17 million weights a layer. The model was trained on the recorded sequences. Keys "
    "are made of the whole input, so what is reused for a token was chosen by looking at those after it: no "
    "decoder could do so while it writes, here as in the paper, and perplexities flatter the more for it.",
    run=run,
    text=text,
    draw=draw,
    version=2,
    size=(7.0, 4.2),
)

if __name__ == "__main__":
    sys.exit(alone(EXPERIMENT))
