"""The two measures of the AttMemo paper: similarity of attention probabilities (Eq. 1) and memoization rate (Eq. 2)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import faiss
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .forward import present

__all__ = [
    "best_records",
    "context_matrix",
    "context_similarities",
    "memoization_rate",
    "similarity_matrix",
    "similarity_score",
    "similarity_scores",
]

Floats = NDArray[np.float32]

# Elements of one side that are float32 at a time, in a comparison of all with all: 64 MiB.
_SIDE = 1 << 24
# Features summed in one go by faiss, in float32: sums of more lose digits.
_FEATURES = 1 << 13


def similarity_scores(a: Tensor, a2: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Similarity of each pair of records of a batch: Eq. 1 of the AttMemo paper, averaged over the heads.

    Parameters
    ----------
    a, a2
        Attention probabilities ``[n, heads, L, L]``.
    lengths
        Valid lengths int ``[n]``: only the first ``lengths[i]`` rows of a record count. Default: all ``L``.

    Returns
    -------
    Tensor
        float32 ``[n]``, 1 for equal records and 0 for records that share no probability mass.
    """
    distance = 0.5 * (a.float() - a2.float()).abs().sum(dim=-1).mean(dim=1)  # total variation, [n, L]
    if lengths is None:
        return 1.0 - distance.mean(dim=-1)
    return 1.0 - _mean_of_valid(distance, lengths)


def context_similarities(a: Tensor, a2: Tensor, lengths: Tensor) -> Tensor:
    """Similarity of each pair of contexts of a batch: ``1 - mean_p ||a[p] - a2[p]|| / (||a[p]|| + ||a2[p]||)``.

    Eq. 1 of the AttMemo paper is of probabilities. This stands in its place for attention outputs: 1 for equal ones, 0
    for those that point opposite ways, whatever their scale.

    Parameters
    ----------
    a, a2
        Contexts ``[n, L, heads * head_dim]``.
    lengths
        Valid lengths int ``[n]``.
    """
    first, second = a.float(), a2.float()
    norm = torch.linalg.vector_norm
    both = norm(first, dim=-1) + norm(second, dim=-1)
    distance: Tensor = norm(first - second, dim=-1) / both.clamp(min=torch.finfo(torch.float32).tiny)
    return 1.0 - _mean_of_valid(distance, lengths)


def similarity_matrix(
    a: Tensor, b: Tensor, length: int | None = None, *, by_head: bool = False, first_row: bool = False
) -> Floats:
    """Similarity of each record with each other one: Eq. 1 of the AttMemo paper, all against all.

    Only the valid block of the records is looked at, and little of it at a time is held in float32: what is needed
    beside ``a`` and ``b`` is less than 256 MiB, whatever their number.

    Parameters
    ----------
    a, b
        Attention probabilities ``[m, heads, L, L]`` and ``[n, heads, L, L]`` of sequences of one valid length, of any
        floating dtype; or the same some of the rows of each, ``[m, heads, rows, L]``.
    length
        That length: rows and columns beyond it are padding. Default: all are valid.
    by_head
        Return a similarity for each head instead of their mean.
    first_row
        Compare the first row alone: what [CLS] attends to.

    Returns
    -------
    ndarray
        float32 ``[m, n]``, or ``[heads, m, n]`` by head.

    Raises
    ------
    ValueError
        The shapes do not fit together, or the length lies outside 1..L.
    """
    if a.dim() != 4 or b.dim() != 4 or a.shape[1:] != b.shape[1:]:
        raise ValueError(
            f"expected records [m, heads, L, L] and [n, heads, L, L]; found {list(a.shape)} and {list(b.shape)}"
        )
    heads, padded, width = a.shape[1:]
    if length is not None and not 1 <= length <= min(padded, width):
        raise ValueError(f"expected a length of 1 to {min(padded, width)}; found {length}")
    rows = 1 if first_row else padded if length is None else length
    columns = width if length is None else length
    apart = np.zeros((heads, len(a), len(b)), dtype=np.float32)
    step = max(1, _SIDE // (heads * rows * columns))
    for low in range(0, len(a), step):
        left = _valid_part(a[low : low + step], rows, columns)
        for start in range(0, len(b), step):
            right = _valid_part(b[start : start + step], rows, columns)
            for head in range(heads):
                apart[head, low : low + step, start : start + step] = _l1(left[head], right[head])
    similar: Floats = 1.0 - np.float32(0.5 / rows) * apart
    found: Floats = similar if by_head else similar.mean(axis=0, dtype=np.float32)
    return found


def context_matrix(a: Tensor, b: Tensor) -> Floats:
    """Similarity of each context with each other one, as :func:`context_similarities`, all against all.

    Parameters
    ----------
    a, b
        Contexts ``[m, ..., rows, width]`` and ``[n, ..., rows, width]``, without padding.

    Returns
    -------
    ndarray
        float32 ``[m, n]``.
    """
    left, right = (part.detach().float().cpu().reshape(len(part), -1, part.shape[-1]) for part in (a, b))
    apart = torch.zeros(len(left), len(right))
    for row in range(left.shape[1]):
        x, y = left[:, row], right[:, row]
        scale = torch.linalg.vector_norm(x, dim=-1)[:, None] + torch.linalg.vector_norm(y, dim=-1)
        apart += torch.cdist(x, y) / scale.clamp(min=torch.finfo(torch.float32).tiny)
    found: Floats = (1.0 - apart / left.shape[1]).numpy()
    return found


def best_records(
    own: Tensor,
    blocks: Iterable[tuple[NDArray[np.int64], Tensor]],
    length: int | None = None,
    *,
    contexts: bool = False,
) -> tuple[NDArray[np.int64], Floats]:
    """Find the most similar of all stored records by comparing with each: the oracle that no search can beat.

    Parameters
    ----------
    own
        What was computed, ``[m, heads, L, L]``, or contexts ``[m, L, heads * head_dim]``.
    blocks
        Ids int64 ``[b]`` and records of the same shape, block by block.
    length
        Valid length of all of them.
    contexts
        Whether they are contexts, which have a measure of their own.

    Returns
    -------
    ids, similarities
        int64 and float32 ``[m]``; -1 and 0 where there are no records.
    """
    ids, best = np.full(len(own), -1, dtype=np.int64), np.zeros(len(own), dtype=np.float32)
    for numbers, records in blocks:
        if contexts:
            found = context_matrix(own[:, :length], records[:, :length])
        else:
            found = similarity_matrix(own, records, length)
        column = found.argmax(axis=1)
        score = found[np.arange(len(own)), column]
        better = (score > best) | (ids < 0)
        ids, best = np.where(better, numbers[column], ids), np.where(better, score, best)
    return ids, best


def _valid_part(records: Tensor, rows: int, columns: int) -> Floats:
    """Take the valid block in float32, by head: ``[heads, m, rows * columns]``."""
    part = records[:, :, :rows, :columns].detach().float().cpu()
    flat: Floats = part.transpose(0, 1).flatten(2).contiguous().numpy()
    return flat


def _l1(left: Floats, right: Floats) -> Floats:
    """L1 distances of all rows with all rows."""
    total = np.zeros((len(left), len(right)), dtype=np.float32)
    for start in range(0, left.shape[1], _FEATURES):
        some = slice(start, start + _FEATURES)
        total += faiss.pairwise_distances(
            np.ascontiguousarray(left[:, some]), np.ascontiguousarray(right[:, some]), metric=faiss.METRIC_L1
        )
    return total


def similarity_score(a: Any, a2: Any, lengths: Any = None) -> float:
    """Similarity score of two attention probability matrices: Eq. 1 of the AttMemo paper.

    One minus the mean total-variation distance of the rows, ``1 - mean_p 0.5 * ||a[p] - a2[p]||_1``.

    Parameters
    ----------
    a, a2
        Probabilities of equal shape ``[..., L, L]`` (numpy, torch or nested lists); leading axes, such as heads and
        batch, are averaged over.
    lengths
        Number of valid rows: one int, or one per record when the shape is ``[n, heads, L, L]``. Rows beyond it are
        padding and do not count. Default: all rows.

    Returns
    -------
    float
        In [0, 1] for probabilities.

    Raises
    ------
    ValueError
        The shapes differ, are no ``[..., L, L]``, or a length lies outside 1..L.
    """
    first, second = _as_float(a), _as_float(a2)
    if first.shape != second.shape or first.ndim < 2:
        raise ValueError(
            f"expected two arrays of one shape [..., L, L]; found {list(first.shape)} and {list(second.shape)}"
        )
    distance = 0.5 * np.abs(first - second).sum(axis=-1)  # [..., L]
    if distance.size == 0:
        raise ValueError(f"expected at least one row of probabilities; found shape {list(first.shape)}")
    if lengths is None:
        return float(1.0 - distance.mean())
    counts = np.asarray(lengths.cpu() if isinstance(lengths, Tensor) else lengths)
    if not np.issubdtype(counts.dtype, np.integer) or counts.min() < 1 or counts.max() > distance.shape[-1]:
        raise ValueError(f"expected lengths of 1 to {distance.shape[-1]}; found {counts.tolist()}")
    if counts.ndim not in (0, 1) or (counts.ndim == 1 and (first.ndim != 4 or len(counts) != len(first))):
        raise ValueError(
            f"expected one length, or one for each record of [n, heads, L, L]; found {counts.size} "
            f"for shape {list(first.shape)}"
        )
    counts = counts if counts.ndim == 0 else counts[:, None]
    per_row = distance.reshape(-1, distance.shape[-1]) if counts.ndim == 0 else distance.mean(axis=1)
    counted = np.arange(distance.shape[-1]) < counts
    means = np.where(counted, per_row, 0.0).sum(axis=-1) / counted.sum(axis=-1)
    return float(1.0 - means.mean())


def memoization_rate(hits: int | Sequence[int], sequences: int, layers: int | None = None) -> float:
    """Share of attention computations that were replaced: Eq. 2 of the AttMemo paper, ``M / (N * L)``.

    Parameters
    ----------
    hits
        M, the number of successful reuses: in total, or one count for each layer.
    sequences
        N, the number of sequences that went through the model.
    layers
        L, the number of self-attention layers of the model; taken from ``hits`` when that has one count each.

    Raises
    ------
    ValueError
        ``layers`` is missing, or a count is negative or more than N * L.
    """
    total = int(hits) if isinstance(hits, int | np.integer) else int(sum(hits))
    if layers is None:
        if isinstance(hits, int | np.integer):
            raise ValueError("expected layers= with a total count of hits; found none")
        layers = len(hits)
    if sequences < 0 or layers < 0 or not 0 <= total <= sequences * layers:
        raise ValueError(f"expected between 0 and sequences * layers = {sequences} * {layers} hits; found {total}")
    return total / (sequences * layers) if sequences and layers else 0.0


def _mean_of_valid(values: Tensor, lengths: Tensor) -> Tensor:
    """Average the first ``lengths[i]`` of each row of ``[n, L]``."""
    counted = present(lengths.to(values.device), values.shape[1]).float()
    mean: Tensor = (values * counted).sum(dim=1) / counted.sum(dim=1).clamp(min=1.0)
    return mean


def _as_float(values: Any) -> NDArray[np.float64]:
    if isinstance(values, Tensor):
        return values.detach().cpu().double().numpy()
    return np.asarray(values, dtype=np.float64)
