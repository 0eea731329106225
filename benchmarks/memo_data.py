"""Real models and data for the evaluations, out of the folder that MEMODB_EVAL_DATA names, split once for all.

What a store records, what its profile is calibrated with, what it is tuned with and what it is evaluated on are
different sequences; the last are SST-2's development set as a whole, or sequences that no other part has.
"""

from __future__ import annotations

import os
import random
import sys
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from memodb_transformers.data import read_text, to_batches

Batches = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Task:
    """A model, its data, and how much of it is used for what.

    Attributes
    ----------
    model, data
        Names in the folder.
    padded, batch
        L, and sequences a batch.
    recorded, profiled, tuned, tried
        Sequences for the store, its profile, the tuner and the evaluation (0: all there are).
    budgets
        Of the tuner: points of accuracy, or percent of perplexity.
    means
        Records of a layer and length of the condensed stores; the first is tuned.
    controls
        Whether every kind is evaluated; otherwise the condensed store alone, beside the plain model.
    oracle
        Whether the most similar record of all is looked for, once.
    """

    model: str
    data: str
    padded: int
    batch: int
    recorded: int
    profiled: int
    tuned: int
    tried: int
    budgets: tuple[float, ...]
    means: tuple[int, ...]
    controls: bool = True
    oracle: bool = False
    quick: tuple[int, int, int, int] = field(default=(128, 32, 192, 64))


TASKS = {
    "sst2-minilm": Task("minilm-sst2", "sst2", 64, 32, 5000, 256, 1024, 0, (1.0, 2.0, 4.0, 7.0), (4, 1), oracle=True),
    "sst2-debertav2": Task("debertav2-sst2", "sst2", 64, 32, 4000, 256, 1024, 0, (1.0, 2.0, 4.0, 7.0), (4,)),
    "stories-256": Task("stories260k-llama", "stories", 256, 16, 300, 48, 64, 100, (1.0, 5.0, 20.0), (8, 1)),
    "stories-512": Task("stories260k-llama", "stories", 512, 16, 300, 48, 64, 100, (1.0, 5.0, 20.0), (8, 1)),
    "reviews-512": Task("minilm-sst2", "movie_reviews", 512, 16, 200, 64, 192, 200, (1.0,), (4,), controls=False),
}


def root() -> Path:
    """Return the folder of models and data; ends the program where there is none."""
    data = os.environ.get("MEMODB_EVAL_DATA")
    if not data or not all((Path(data) / part).is_dir() for part in ("models", "data")):
        found = f"is {data}, which lacks" if data else "is not set; it names a folder with"
        print(f"MEMODB_EVAL_DATA {found} models/ and data/: see benchmarks/README.md", file=sys.stderr)
        raise SystemExit(1)
    return Path(data)


def load_model(task: Task) -> Any:
    """Load the model in float32: CPUs multiply half precision far more slowly."""
    kind = (
        transformers.AutoModelForCausalLM if task.data == "stories" else transformers.AutoModelForSequenceClassification
    )
    transformers.utils.logging.disable_progress_bar()
    return kind.from_pretrained(root() / "models" / task.model, dtype=torch.float32).eval()


def load_batches(task: Task, *, quick: bool = False) -> tuple[Batches, Batches, Batches, Batches]:
    """Return what is recorded, profiled, tuned and tried."""
    sizes = task.quick if quick else (task.recorded, task.profiled, task.tuned, task.tried)
    recorded, profiled, tuned, tried = sizes
    ends = np.cumsum([0, recorded, profiled, tuned]).tolist()
    if task.data == "stories":
        tokens = torch.from_numpy(np.load(root() / "data" / "stories" / "tokens.npy").astype(np.int64))
        tokens = tokens[:, : task.padded]
        parts = [tokens[a:b] for a, b in zip(ends, [*ends[1:], ends[-1] + tried], strict=True)]
        return tuple(_of_tokens(part, task.batch) for part in parts)  # type: ignore[return-value]
    tokenizer = transformers.AutoTokenizer.from_pretrained(root() / "models" / task.model)
    if task.data == "sst2":
        # Whole sentences, as the development set has them; most of the training set are phrases out of them.
        pairs = [pair for pair in _pairs(root() / "data" / "sst2" / "train.tsv") if pair[0].endswith(".")]
        random.Random(0).shuffle(pairs)
        test = _pairs(root() / "data" / "sst2" / "dev.tsv")
    else:
        pairs = _pairs(root() / "data" / "movie_reviews" / "reviews.tsv")
        random.Random(0).shuffle(pairs)
        test = pairs[ends[-1] :]
    groups = [pairs[a:b] for a, b in pairwise(ends)] + [test[: tried or None]]
    return tuple(  # type: ignore[return-value]
        to_batches(
            tokenizer,
            [text for text, _ in group],
            [label for _, label in group],
            padded_length=task.padded,
            batch_size=task.batch,
        )
        for group in groups
    )


def _pairs(file: Path) -> list[tuple[str, int]]:
    texts, labels = read_text(file)
    assert labels is not None
    return list(zip(texts, labels, strict=True))


def _of_tokens(tokens: torch.Tensor, batch: int) -> Batches:
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in tokens.split(batch) if len(part)]
