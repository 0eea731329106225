"""What a model answered, sequence by sequence, beside what the unmemoized model answers; and how sure that is.

Of each sequence only sums are kept, as the outputs of a whole pass may not fit into memory. Every figure of an
evaluation is a ratio of two such sums, so that resampling the sequences (the bootstrap of Efron 1979) gives its
interval. Two runs are resampled together: their difference is far surer than either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["SUMS", "compare_outputs", "interval", "perplexity", "ratio", "resample", "usable_labels"]

Doubles = NDArray[np.float64]

# What is summed up of each sequence; NaN where it does not apply to the model or its data.
#   right / labelled: predictions that are right, of those with a label
#   same / predicted: predictions equal to the plain model's, of all
#   surprise / followed: negative log-likelihoods of next tokens, and how many
#   change / positions: relative L2 differences of the output from the plain model's, and how many
SUMS = ("right", "labelled", "same", "predicted", "surprise", "followed", "change", "positions")
# Numbers of a block of resampling weights: 64 MiB.
_WEIGHTS = 1 << 23


def compare_outputs(
    output: Any, plain: Any, inputs: Mapping[str, Any], labels: Any = None, *, next_tokens: bool = False
) -> Doubles:
    """Sum up what a model answers to each sequence of a batch.

    Parameters
    ----------
    output, plain
        What the model returned, and what it returns without memoization: objects with ``logits`` ``[n, classes]`` or
        ``[n, L, classes]``, or else the hidden state ``[n, L, H]`` first.
    inputs
        What it was called with: positions that ``attention_mask`` leaves out do not count.
    labels
        Classes, int ``[n]``, or ``[n, L]`` for models that choose one for each token or the next; a negative
        one is no label.
    next_tokens
        Whether the model predicts next tokens. Those of ``labels`` if given, else of ``input_ids``, are followed; only
        with labels is there a share of right ones.

    Returns
    -------
    ndarray
        float64 ``[n, 8]``, see ``SUMS``.
    """
    shown, base = _shown(output), _shown(plain)
    classes = getattr(output, "logits", None) is not None and shown.shape[-1] > 1
    labels = _usable(labels, shown) if classes else None
    whole = shown.dim() == 2
    if whole:
        shown, base = shown[:, None], base[:, None]
        labels = None if labels is None else labels[:, None]
    count, length = shown.shape[:2]
    mask = inputs.get("attention_mask")
    valid = torch.ones(count, length, dtype=torch.bool, device=shown.device)
    if not whole and isinstance(mask, Tensor) and mask.shape == valid.shape:
        valid = mask.ne(0).to(shown.device)
    tokens = labels if labels is not None else _usable(inputs.get("input_ids"), shown)
    sums = np.full((count, len(SUMS)), np.nan)
    for row in range(count):  # one at a time: logits of a vocabulary are large
        found = dict(zip(SUMS, sums[row], strict=True))
        here = valid[row]
        mine, theirs = shown[row][here].float(), base[row][here].float()
        scale = torch.linalg.vector_norm(theirs, dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
        found["change"] = float((torch.linalg.vector_norm(mine - theirs, dim=-1) / scale).sum())
        found["positions"] = len(mine)
        if classes:
            chosen = mine.argmax(dim=-1)
            found["same"], found["predicted"] = int((chosen == theirs.argmax(dim=-1)).sum()), len(mine)
            if next_tokens and tokens is not None:
                # A prediction counts where its own position and the next one hold tokens of the sequence.
                follows = here[:-1] & here[1:] & (tokens[row, 1:] >= 0)
                logits, targets = shown[row, :-1][follows].float(), tokens[row, 1:][follows]
                found["surprise"] = float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
                found["followed"] = len(targets)
                chosen, wanted = logits.argmax(dim=-1), targets
            elif labels is not None:
                wanted = labels[row][here]
                chosen, wanted = chosen[wanted >= 0], wanted[wanted >= 0]
            if labels is not None:
                found["right"], found["labelled"] = int((chosen == wanted).sum()), len(wanted)
        sums[row] = list(found.values())
    return sums


def ratio(sums: Doubles, over: str, under: str) -> Any:
    """Divide two sums ``[..., 8]`` by name; NaN where there is nothing to divide by."""
    above, below = sums[..., SUMS.index(over)], sums[..., SUMS.index(under)]
    return np.divide(above, below, out=np.full_like(below, np.nan), where=below > 0)


def perplexity(sums: Doubles) -> Any:
    """Perplexity of next tokens: the exponential of their mean negative log-likelihood."""
    with np.errstate(over="ignore"):
        return np.exp(ratio(sums, "surprise", "followed"))


def resample(runs: Sequence[Doubles], *, seed: int, resamples: int = 2000) -> list[Doubles]:
    """Sum up the sequences of each run again and again, drawn with replacement, the same ones for all runs.

    Parameters
    ----------
    runs
        Sums by sequence, float64 ``[n, 8]`` each.
    seed, resamples
        Of the draws, and how many.

    Returns
    -------
    list
        Sums of each draw, float64 ``[resamples, 8]``, one array a run; of equal runs equal to the last bit.
    """
    n = len(runs[0])
    rng = np.random.default_rng(seed)
    parts: list[list[Doubles]] = [[] for _ in runs]
    step = max(1, _WEIGHTS // n)
    with np.errstate(invalid="ignore"):
        for start in range(0, resamples, step):
            weights = rng.multinomial(n, np.full(n, 1 / n), size=min(step, resamples - start)).astype(np.float64)
            for part, sums in zip(parts, runs, strict=True):
                part.append(weights @ np.ascontiguousarray(sums))
    return [np.concatenate(part) for part in parts]


def interval(values: Doubles, confidence: float) -> tuple[float | None, float | None]:
    """Take the middle of resampled values (the percentile interval); None: there are none."""
    known = values[~np.isnan(values)]
    if not len(known):
        return None, None
    tail = (1 - confidence) / 2
    low, high = np.quantile(known, [tail, 1 - tail])
    return float(low), float(high)


def _shown(output: Any) -> Tensor:
    """Take what is compared: logits ``[n, C]`` or ``[n, L, C]``, or else the hidden state ``[n, L, H]``."""
    logits = getattr(output, "logits", None)
    found: Tensor = logits if isinstance(logits, Tensor) else output[0]
    return found


def usable_labels(labels: Any, shape: Sequence[int]) -> Tensor | None:
    """Take labels that are numbers of classes, one for each prediction; None: they are something else."""
    whole = isinstance(labels, Tensor) and not labels.is_floating_point() and labels.dtype != torch.bool
    return labels.detach().long() if whole and list(labels.shape) == list(shape) else None


def _usable(labels: Any, shown: Tensor) -> Tensor | None:
    found = usable_labels(labels, shown.shape[:-1])
    return None if found is None else found.to(shown.device)
