"""One memoized attention layer: hits multiply stored probabilities with V, misses go through the original module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .caches import ScratchCache, is_empty
from .errors import GradientUnavailableError
from .forward import Ints, Spans, present, roll_back, roll_front
from .lookup import Found, LayerCounters, Seconds, gather
from .product import weighted_values
from .sites import AttentionSite
from .store import MemoStore

__all__ = ["NOTHING_LEFT", "MemoAttention"]

_CACHE = "past_key_values"
# Arguments that change nothing of what attention computes. Any other that is given and is no tensor might: a layer may
# hand it on to its attention function (``is_causal``, ``sliding_window``).
_HARMLESS = frozenset({"use_cache", "output_attentions", "output_hidden_states", "return_dict", "layer_idx"})
# A row of probabilities whose sum is below this has lost all it attended to by being cut.
NOTHING_LEFT = 1e-6


class MemoAttention:
    """What an attention layer does with the records that were found for it.

    Parameters
    ----------
    site
        The layer.
    original
        The module's own forward.
    counters
        Told what was done.
    """

    def __init__(
        self, site: AttentionSite, original: Callable[..., Any], counters: LayerCounters | None = None
    ) -> None:
        self.site = site
        self.original = original
        self.counters = counters or LayerCounters()

    def can_reuse(self, call: Mapping[str, Any], spans: Spans) -> bool:
        """Tell whether all that the layer was called with is understood, so that it can be cut along the batch."""
        hidden, cache, rows = call.get("hidden_states"), call.get(_CACHE), len(spans)
        if not isinstance(hidden, Tensor) or hidden.dim() != 3 or hidden.shape[:2] != (rows, spans.padded) or not rows:
            return False
        if self.site.family.projection.problem(self.site.module):
            return False  # a hook that came later
        if call.get("output_attentions") or not isinstance(call.get("attention_mask"), Tensor | None):
            return False  # probabilities are to be returned; a mask of blocks
        if cache is not None and not (self.site.family.caches and is_empty(cache, self._cache_index)):
            return False
        if not self.site.computes_as_recorded or any(part.training for part in self.site.module.modules()):
            return False  # dropout may be active in parts of a model
        known = self.site.family.batch_arguments
        for name, value in call.items():
            if name in ("hidden_states", _CACHE) or name in self.site.family.common_arguments:
                continue
            tensors = _tensors(value)
            if not tensors and value is not None and name not in _HARMLESS:
                return False
            if any(name not in known or part.dim() == 0 or part.shape[0] not in (1, rows) for part in tensors):
                return False
        return True

    def attend(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        call: Mapping[str, Any],
        spans: Spans,
        store: MemoStore,
        found: Found,
        *,
        seconds: Seconds | None = None,
    ) -> Any:
        """Attend with the records found; rows without one are computed by the original module.

        Parameters
        ----------
        args, kwargs
            The call, as it was made.
        call
            The same, by name.
        spans
            Where the sequences lie.
        store
            The store that ``found`` was found in.
        found
            Ids of this layer's records.
        seconds
            What the call has taken so far.

        Returns
        -------
        tuple
            What the module returns: the output ``[n, L, H]``, and None for the probabilities.
        """
        seconds = seconds or Seconds()
        began = perf_counter()
        records, ids = gather(store.db, found)
        seconds.fetch += perf_counter() - began
        hits = np.flatnonzero(ids >= 0)
        if records is None:
            began = perf_counter()
            output = self.original(*args, **kwargs)
            seconds.misses += perf_counter() - began
        else:
            output = self._merge(call, spans, store, records, found, hits, seconds), None
        self.counters.count(hits=len(hits), seconds=seconds)
        return output

    @property
    def _cache_index(self) -> int:
        return int(getattr(self.site.module, "layer_idx", self.site.layer) or 0)

    def _merge(
        self,
        call: Mapping[str, Any],
        spans: Spans,
        store: MemoStore,
        records: Tensor,
        found: Found,
        hits: Ints,
        seconds: Seconds,
    ) -> Tensor:
        """Put the rows of hits and misses together, and fill the cache once."""
        cache = call.get(_CACHE)
        began, spent = perf_counter(), seconds.accounted
        if len(hits) == len(spans):
            output, keys, values = self._reuse(call, spans, store, records, found.lengths, seconds)
        else:
            hidden: Tensor = call["hidden_states"]
            n = len(spans)
            misses = np.setdiff1d(np.arange(n), hits)
            scratch = ScratchCache() if cache is not None else None
            sub = self._take(call, misses, n)
            if scratch is not None:
                sub[_CACHE] = scratch
            started = perf_counter()
            missed = self.original(**sub)[0]
            seconds.misses += perf_counter() - started
            part = self._take(call, hits, n)
            reused, keys, values = self._reuse(part, spans.take(hits), store, records, found.lengths[hits], seconds)
            rows = torch.from_numpy(np.concatenate([misses, hits]).argsort()).to(hidden.device)
            output = torch.cat([missed, reused.to(missed.dtype)])[rows]
            if scratch is not None:
                assert scratch.keys is not None
                assert scratch.values is not None
                assert keys is not None
                assert values is not None
                keys, values = torch.cat([scratch.keys, keys])[rows], torch.cat([scratch.values, values])[rows]
        if cache is not None:
            cache.update(keys, values, self._cache_index)
        seconds.rest += perf_counter() - began - (seconds.accounted - spent)
        return output

    def _reuse(
        self,
        call: Mapping[str, Any],
        spans: Spans,
        store: MemoStore,
        records: Tensor,
        lengths: Ints,
        seconds: Seconds,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Compute rows that all have a record: no Q, no scores, and K for a cache only."""
        hidden: Tensor = call["hidden_states"]
        caching = call.get(_CACHE) is not None
        with torch.no_grad():
            began = perf_counter()
            keys = self.site.keys(hidden, call) if caching else None
            value = self.site.values(hidden) if caching or store.target == "probs" else None
            projected = perf_counter()
            records = records.to(hidden.device)
            if store.target == "context":
                context = records[:, : spans.padded].to(hidden.dtype).contiguous()
            else:
                assert value is not None
                with torch.autocast(hidden.device.type, enabled=False):
                    context = self._context(records, value, spans, lengths)
            product = perf_counter()
            context = roll_back(context, spans.starts)
            output = self.site.finish(context, hidden)
            if store.target == "context" and output is context:
                output = output.clone()  # what leaves the layer may be written to; the pages of the store may not
            seconds.value += projected - began
            seconds.product += product - projected
            seconds.rest += perf_counter() - product
        values = value.transpose(1, 2) if caching and value is not None else None
        if torch.is_grad_enabled() and self._learns(hidden):
            output = _marked(output)
            keys, values = (None if part is None else _marked(part) for part in (keys, values))
        return output, keys, values

    def _learns(self, hidden: Tensor) -> bool:
        """Tell whether the original would have a gradient."""
        return hidden.requires_grad or any(part.requires_grad for part in self.site.module.parameters())

    def _take(self, call: Mapping[str, Any], rows: Ints, n: int) -> dict[str, Any]:
        """Cut the rows out of all arguments that have one for each; what is broadcast over the batch stays whole."""
        cut = self.site.family.batch_arguments | {"hidden_states"}
        return {name: _rows(value, rows, n) if name in cut else value for name, value in call.items()}

    def _context(self, records: Tensor, value: Tensor, spans: Spans, lengths: Ints) -> Tensor:
        """Multiply records with V, both turned so that the tokens begin at 0: ``[n, L, heads * head_dim]``."""
        probabilities = records[:, :, : spans.padded, : spans.padded]
        value = roll_front(value, spans.starts)
        padding = ~present(torch.from_numpy(spans.lengths).to(value.device), spans.padded)  # [n, L]
        padded = bool((spans.lengths < spans.padded).any())
        whole = value
        if padded:
            # Records are zero in the columns of padding. V is blanked there as well, so that whatever a store holds,
            # and even if padding holds NaN, no token can attend to it.
            value = value.masked_fill(padding[:, :, None, None], 0.0)
        context = weighted_values(probabilities, value)
        cut = lengths > spans.lengths
        if cut.any():
            context = self._renormalised(context, probabilities, value, padding, torch.from_numpy(cut))
        if padded and self.site.family.masks_rows:
            # These rows are masked as a whole: a softmax of equal scores, over all positions.
            groups = context.shape[-1] // (whole.shape[2] * whole.shape[3])
            mean = whole.float().mean(dim=1).repeat_interleave(groups, dim=1).flatten(1).to(context.dtype)
            context = torch.where(padding[:, :, None], mean[:, None], context)
        return context

    def _renormalised(
        self, context: Tensor, probabilities: Tensor, value: Tensor, padding: Tensor, cut: Tensor
    ) -> Tensor:
        """Let the rows of records that were cut sum to 1 again; rows that lost all attend to all tokens alike."""
        tokens = (~padding).float()[:, :, None, None]
        sums = weighted_values(probabilities, tokens)  # [n, L, heads]
        counts = tokens.sum(dim=(1, 2, 3)).clamp(min=1)
        mean = value.float().sum(dim=1) / counts[:, None, None]
        mean = mean.repeat_interleave(sums.shape[-1] // mean.shape[1], dim=1)  # [n, heads, head_dim]
        by_head = context.unflatten(-1, (sums.shape[-1], -1)).float()
        scaled = torch.where(
            sums[..., None] < NOTHING_LEFT, mean[:, None], by_head / sums[..., None].clamp(min=NOTHING_LEFT)
        )
        return torch.where(cut.to(context.device)[:, None, None], scaled.flatten(2).to(context.dtype), context)


class _Reused(torch.autograd.Function):
    """Marks what came from a store: there is no way back through it."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, output: Tensor) -> Tensor:
        return output.clone()

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise GradientUnavailableError(
            "expected no gradient through reused attention: the layer was not computed but looked up. Run the model "
            "outside of the memoize block, or in training mode, where nothing is reused"
        )


def _marked(reused: Tensor) -> Tensor:
    marked: Tensor = _Reused.apply(torch.zeros((), requires_grad=True), reused)  # type: ignore[no-untyped-call]
    return marked


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [part for item in value for part in _tensors(item)] if isinstance(value, tuple | list) else []


def _rows(value: Any, rows: Ints, n: int) -> Any:
    if isinstance(value, Tensor):
        whole = value.dim() == 0 or value.shape[0] != n
        return value if whole else value[torch.from_numpy(rows).to(value.device)]
    if isinstance(value, tuple | list):
        return type(value)(_rows(item, rows, n) for item in value)
    return value
