"""Attention probabilities of a model, taken from transformers itself, and the most similar ones by Eq. 1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import memodb_transformers as mt
from benchmarks.memo_data import Batches
from benchmarks.paper.workbench import attention_as

__all__ = ["VARIANTS", "Captured", "best_similarities", "capture", "histogram", "same_length"]

#: How the similarity of two sequences is counted: the first head alone, rows of padding too, sequences of any length.
VARIANTS = {
    "first head, with padding": (True, True, True),
    "all heads, with padding": (False, True, True),
    "first head, with padding, same length": (True, True, False),
    "all heads, with padding, same length": (False, True, False),
    "first head, tokens alone": (True, False, False),
    "all heads, tokens alone": (False, False, False),
}
_BLOCK = 256


@dataclass(frozen=True)
class Captured:
    """Probabilities float16 ``[n, heads, L, L]`` of each layer, and the valid lengths ``[n]`` of the sequences."""

    layers: list[Tensor]
    lengths: NDArray[np.int64]


def capture(model: Any, batches: Batches, layers: Sequence[int] | None = None) -> Captured:
    """Run a model with eager attention and keep what its layers say; sequences are padded on the right."""
    parts: list[list[Tensor]] = []
    lengths, joined = [], []
    with attention_as(model, "eager"), torch.inference_mode():
        for batch in batches:
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            said = model(**inputs, output_attentions=True).attentions
            chosen = range(len(said)) if layers is None else layers
            parts = parts or [[] for _ in chosen]
            for found, layer in zip(parts, chosen, strict=True):
                found.append(said[layer].half())
            lengths.append(batch["attention_mask"].sum(dim=1).numpy())
    while parts:  # layer by layer: all of them twice would be gigabytes
        joined.append(torch.cat(parts.pop(0)))
    return Captured(joined, np.concatenate(lengths))


def best_similarities(own: Captured, stored: Captured, layer: int, variant: str) -> NDArray[np.float64]:
    """Return the similarity of the most similar stored record, for each sequence that has one to compare with.

    With padding all rows count, as Eq. 1 of the paper reads, and any two sequences are compared unless their lengths
    are to be the same. With tokens alone only rows and columns of tokens count, and only sequences of the same length
    are compared, as a store of memodb does.
    """
    first_head, padding, any_length = VARIANTS[variant]
    mine, theirs = (found.layers[layer][:, :1] if first_head else found.layers[layer] for found in (own, stored))
    if any_length:
        return _best(mine, theirs, None)
    found = []
    for length in np.unique(own.lengths):
        rows, others = (torch.from_numpy(np.flatnonzero(part.lengths == length)) for part in (own, stored))
        if len(others):
            found.append(_best(mine[rows], theirs[others], None if padding else int(length)))
    return np.concatenate(found) if found else np.zeros(0)


def same_length(own: Captured, stored: Captured) -> float:
    """Return how many stored sequences have the length of a sequence, on average."""
    return float((own.lengths[:, None] == stored.lengths).sum(axis=1).mean())


def _best(mine: Tensor, theirs: Tensor, length: int | None) -> NDArray[np.float64]:
    blocks = [mt.similarity_matrix(mine, part, length).max(axis=1) for part in theirs.split(_BLOCK)]
    found: NDArray[np.float64] = np.max(blocks, axis=0).astype(np.float64)
    return found


def histogram(values: NDArray[np.float64], bins: int = 20) -> dict[str, Any]:
    """Sum up similarities: shares of equal intervals from 0 to 1, the mean, how many there are."""
    counts, _ = np.histogram(np.clip(values, 0.0, 1.0), bins=bins, range=(0.0, 1.0))
    total = max(1, len(values))
    return {
        "shares": (counts / total).round(5).tolist(),
        "mean": float(values.mean()) if len(values) else None,
        "from_0.7_to_0.9": float(((values >= 0.7) & (values <= 0.9)).mean()) if len(values) else None,
        "count": len(values),
    }
