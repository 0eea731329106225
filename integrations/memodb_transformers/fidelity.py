"""How similar a record that is reused is to what the layer would have computed in its place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .attention import NOTHING_LEFT, MemoAttention
from .capture import observe
from .forward import Ints, Spans, present
from .lookup import Found, gather
from .recorder import canonical
from .similarity import context_similarities, similarity_scores
from .store import MemoStore

__all__ = ["computed_records", "cut_records", "reuse_similarities"]

# Bytes of records that are float32 at a time.
_BLOCK = 64 << 20


def computed_records(attention: MemoAttention, call: Mapping[str, Any], spans: Spans, store: MemoStore) -> Tensor:
    """Let a layer compute the records of a batch from the hidden state it is called with.

    The model must run with eager attention, which alone tells its probabilities.

    Parameters
    ----------
    attention, call
        The layer, and what it is called with, by name.
    spans
        Where the sequences lie.
    store
        Tells the shape and the target of records.

    Returns
    -------
    Tensor
        ``[n, *shape of a record]``, in main memory.
    """
    visit = observe(attention.site, attention.original, call, probabilities=store.target == "probs")
    return canonical(visit, spans, store.padded_length, store.target).cpu()


def reuse_similarities(own: Tensor, spans: Spans, store: MemoStore, found: Found) -> tuple[Ints, NDArray[np.float32]]:
    """Compare what is reused with what would have been computed: Eq. 1, or the measure of contexts.

    Parameters
    ----------
    own
        What would have been computed, ``[n, *shape]``.
    spans, store, found
        Where the sequences lie, and what they reuse of which store.

    Returns
    -------
    rows, scores
        The sequences that reuse something, int64 ``[hits]``, and float32 ``[hits]``.
    """
    records, ids = gather(store.db, found)
    rows = np.flatnonzero(ids >= 0)
    scores = np.zeros(len(rows), dtype=np.float32)
    if records is None:
        return rows, scores
    step = max(1, _BLOCK // (4 * records[0].numel()))
    for start in range(0, len(rows), step):
        some = rows[start : start + step]
        mine, stored = own[torch.from_numpy(some)], records[start : start + step]
        lengths = torch.from_numpy(spans.lengths[some])
        if store.target == "context":
            score = context_similarities(mine, stored, lengths)
        else:
            score = similarity_scores(mine, cut_records(stored, spans.lengths[some], found.lengths[some]), lengths)
        scores[start : start + step] = score.numpy()
    return rows, scores


def cut_records(records: Tensor, lengths: Ints, recorded: Ints) -> Tensor:
    """Cut probabilities ``[n, heads, L, L]`` of longer sequences to shorter ones, as a hit does.

    Parameters
    ----------
    records
        The records.
    lengths, recorded
        int64 ``[n]``: valid lengths of the sequences, and of the records that they reuse.

    Returns
    -------
    Tensor
        The records themselves where none is longer; else float32, with nothing in the columns that were cut and rows
        that sum to 1 again; rows that lost all attend to all tokens alike.
    """
    longer = torch.from_numpy(recorded > lengths)
    if not bool(longer.any()):
        return records
    tokens = present(torch.from_numpy(lengths), records.shape[-1])[:, None, None, :]
    whole = records.float()
    kept = whole.masked_fill(~tokens, 0.0)
    sums = kept.sum(dim=-1, keepdim=True)
    alike = tokens / tokens.sum(dim=-1, keepdim=True).clamp(min=1)
    scaled = torch.where(sums < NOTHING_LEFT, alike, kept / sums.clamp(min=NOTHING_LEFT))
    return torch.where(longer[:, None, None, None], scaled, whole)
