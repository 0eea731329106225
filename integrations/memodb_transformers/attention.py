"""One memoized attention layer: hits multiply stored probabilities with V, misses go through the original module."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

import memodb

from .embedding import Embedder
from .errors import MemoizationActiveError
from .families import AttentionSite, ModelSites, find_sites
from .lengths import LengthWatch

__all__ = ["LayerCounters", "Lookup", "MemoAttention", "find_memoizable", "namespace"]

# Keyword arguments of an attention layer that can be cut along the batch; any other tensor sends the batch the
# original way, because nothing here could know what its axes mean.
_SLICEABLE = frozenset({"position_ids"})


def namespace(layer: int, length: int) -> str:
    """Name the namespace of one layer's records of one valid length: only equal lengths may ever match."""
    return f"layer={layer}/len={length}"


@dataclass
class LayerCounters:
    """What one layer did so far. Times are wall-clock seconds.

    Attributes
    ----------
    lookups
        Sequences that were searched for.
    hits
        Sequences whose attention probabilities came from the store.
    bypassed
        Sequences that took the original path without a search: not right-padded, of another padded length, in
        training, with attention weights asked for, and so on.
    embed_seconds, search_seconds, fetch_seconds
        Time to make keys, to search them, and to gather records into one tensor.
    attention_seconds
        Everything else: V projection and product of the hits, the original module for the misses.
    """

    lookups: int = 0
    hits: int = 0
    bypassed: int = 0
    embed_seconds: float = 0.0
    search_seconds: float = 0.0
    fetch_seconds: float = 0.0
    attention_seconds: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, **amounts: float) -> None:
        """Add to several counters at once; safe from several threads."""
        with self._lock:
            for name, amount in amounts.items():
                setattr(self, name, getattr(self, name) + amount)


@dataclass(frozen=True, slots=True)
class Lookup:
    """What a search found: ``ids`` int64 [n] (-1: nothing near enough) and squared L2 ``distances`` float32 [n]."""

    ids: NDArray[np.int64]
    distances: NDArray[np.float32]


class MemoAttention(nn.Module):
    """Stands in for one self-attention module; the original stays inside, unchanged.

    Parameters
    ----------
    site
        The attention layer.
    db
        The memo store, records ``[heads, padded_length, padded_length]``.
    embedder
        Makes the keys.
    watch
        Knows the valid lengths of the forward that runs.
    padded_length
        Padded length L of the store's records; batches padded to another length take the original path.
    threshold
        Largest squared L2 distance of keys at which a record is reused; None: any distance.
    """

    def __init__(
        self,
        site: AttentionSite,
        db: memodb.MemoDB,
        embedder: Embedder,
        watch: LengthWatch,
        padded_length: int,
        threshold: float | None = None,
    ) -> None:
        super().__init__()
        self.original = site.module
        self.training = site.module.training
        self.layer = site.layer
        self.padded_length = padded_length
        self.threshold = threshold
        self.counters = LayerCounters()
        self._site = site
        self._db = db
        self._embedder = embedder
        self._watch = watch

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the original's state under the original's names: a checkpoint saved meanwhile stays loadable."""
        return self.original.state_dict(*args, **kwargs)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend: ``[n, L, H]`` in, ``(context [n, L, heads * head_dim], None)`` out, rows in the order given."""
        lengths = self._watch.lengths
        if lengths is None or not self._fits(hidden_states, lengths, attention_mask, past_key_values, kwargs):
            self.counters.add(bypassed=hidden_states.shape[0])
            output: tuple[Tensor, Tensor | None] = self.original(
                hidden_states, attention_mask, past_key_values, **kwargs
            )
            return output
        found = self.lookup(hidden_states, lengths)
        return self.attend(hidden_states, lengths, found.ids, attention_mask, kwargs)

    def lookup(self, hidden: Tensor, lengths: Tensor) -> Lookup:
        """Search the store for each row of ``[n, L, H]``; rows of length 0 are left out."""
        began = perf_counter()
        ids = np.full(len(hidden), -1, dtype=np.int64)
        distances = np.full(len(hidden), np.inf, dtype=np.float32)
        keys = self._embedder.embed(self.layer, hidden, lengths)
        # A hidden state that is NaN or infinite is the model's affair: it passes through as without memoization.
        rows = np.flatnonzero((lengths.numpy() > 0) & np.isfinite(keys).all(axis=1))
        embedded = perf_counter()
        if len(rows):
            names = [namespace(self.layer, length) for length in lengths.numpy()[rows].tolist()]
            result = self._db.search(keys[rows], 1, namespace=names, max_distance=self.threshold)
            ids[rows], distances[rows] = result.ids[:, 0], result.distances[:, 0]
        self.counters.add(
            lookups=len(rows),
            bypassed=len(hidden) - len(rows),
            embed_seconds=embedded - began,
            search_seconds=perf_counter() - embedded,
        )
        return Lookup(ids, distances)

    def attend(
        self,
        hidden: Tensor,
        lengths: Tensor,
        ids: NDArray[np.int64],
        attention_mask: Tensor | None = None,
        kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend with the records ``ids`` int64 [n]; rows whose id is -1 are computed by the original module."""
        began = perf_counter()
        kwargs = kwargs or {}
        batch, ids = self._fetch(ids)
        fetch_seconds = perf_counter() - began if batch is not None else 0.0
        hits = np.flatnonzero(ids >= 0)
        if batch is None:
            context = self.original(hidden, attention_mask, None, **kwargs)[0]
        elif len(hits) == len(hidden):
            context = self._reuse(hidden, lengths, batch)
        else:
            hit_rows = torch.from_numpy(hits)
            miss_rows = torch.from_numpy(np.flatnonzero(ids < 0))
            here = miss_rows.to(hidden.device)
            part = {name: _rows(value, here, len(hidden)) for name, value in kwargs.items()}
            missed = self.original(hidden[here], _rows(attention_mask, here, len(hidden)), None, **part)[0]
            reused = self._reuse(hidden[hit_rows.to(hidden.device)], lengths[hit_rows], batch)
            context = missed.new_empty((len(hidden), *missed.shape[1:]))
            context[here] = missed
            context[hit_rows.to(hidden.device)] = reused.to(missed.dtype)
        del batch  # the window of this gather is free for the next one
        self.counters.add(
            hits=len(hits),
            fetch_seconds=fetch_seconds,
            attention_seconds=perf_counter() - began - fetch_seconds,
        )
        return context, None

    def _fetch(self, ids: NDArray[np.int64]) -> tuple[memodb.MappedBatch | None, NDArray[np.int64]]:
        """Gather the records of the hits; what was deleted since the search is a miss. None: no hit is left."""
        while (ids >= 0).any():
            try:
                return self._db.multiget_mapped(ids[ids >= 0]), ids
            except memodb.RecordNotFoundError:
                ids = np.where([i >= 0 and i in self._db for i in ids.tolist()], ids, -1)
        return None, ids

    def _reuse(self, hidden: Tensor, lengths: Tensor, batch: memodb.MappedBatch) -> Tensor:
        """Multiply the records of ``batch`` with V of ``hidden``; no Q, no K, no scores."""
        probabilities = batch.torch()
        rows, padded_length = hidden.shape[:2]
        value = self._site.projection("value")(hidden)
        split = value.view(rows, padded_length, self._site.heads, self._site.head_dim).transpose(1, 2).float()
        # Records are zero in the columns of padding. V is blanked there as well, so that whatever a store holds,
        # and even if padding holds NaN, no token can attend to it.
        padding = torch.arange(padded_length) >= lengths[:, None]
        if bool(padding.any()):
            split = split.masked_fill(padding[:, None, :, None].to(hidden.device), 0.0)
        # Stores may hold halves; the product is in float32, which CPUs multiply far faster.
        context = torch.matmul(probabilities.to(hidden.device).float(), split)
        return context.transpose(1, 2).reshape(rows, padded_length, -1).to(value.dtype)

    def _fits(
        self, hidden: Tensor, lengths: Tensor, attention_mask: Any, past_key_values: Any, kwargs: dict[str, Any]
    ) -> bool:
        return (
            hidden.dim() == 3
            and hidden.shape[0] == len(lengths) > 0
            and hidden.shape[1] == self.padded_length
            and past_key_values is None
            and not self.original.training
            and (attention_mask is None or isinstance(attention_mask, Tensor))
            and not any(isinstance(value, Tensor) for name, value in kwargs.items() if name not in _SLICEABLE)
        )


def find_memoizable(model: PreTrainedModel) -> ModelSites:
    """Find the attention layers of a model that is not memoized at present."""
    if isinstance(model, PreTrainedModel) and any(isinstance(module, MemoAttention) for module in model.modules()):
        raise MemoizationActiveError(
            "the model is inside a memoize block already: leave that first, or use another instance of the model"
        )
    return find_sites(model)


def _rows(value: Any, rows: Tensor, batch: int) -> Any:
    """Cut the rows of a batch out of a mask; what is broadcast over the batch, or is no tensor, stays whole."""
    if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == batch and batch > 1:
        return value[rows]
    return value
