"""A memoized model: the stores, what is reused of them in each forward, and what that saved."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

import memodb

from .attention import MemoAttention
from .forward import Forward, ForwardWatch, Spans
from .lookup import Found, LayerCounters, Seconds, find, prefetch
from .performance import ProfileReport
from .similarity import memoization_rate
from .sites import ModelSites, patched
from .store import MemoStore, smallest_fitting

__all__ = ["Memo", "Replace", "Thresholds"]

Thresholds = dict[int, float]
# Exchanges what was found for what shall be reused: (attention, call, spans, store, found) -> (store, found).
Replace = Callable[[MemoAttention, Mapping[str, Any], Spans, MemoStore, Found], tuple[MemoStore, Found]]


class Memo:
    """A memo store attached to a model: what ``memoize`` yields.

    Parameters
    ----------
    sites
        The attention layers.
    stores
        The open stores, by the length L of their records; a batch goes to the smallest that it fits into.
    thresholds
        For each store, the largest squared L2 distance of keys at which a record is reused, by layer.
    lookup
        ``"layer"`` or ``"sequence"``.
    length_tolerance
        Reuse records of up to so many more tokens.
    profiles
        For stores whose layers are to run only where they pay, their profiles: Eq. 3 is evaluated for the size of each
        batch.
    neighbours
        Average so many of the nearest records.
    replace
        Called after each search of a layer; what it returns is reused instead of what was found. Evaluation compares
        with other records so; it may be set and changed later.
    """

    def __init__(
        self,
        sites: ModelSites,
        stores: Mapping[int, MemoStore],
        thresholds: Mapping[int, Thresholds],
        *,
        lookup: str = "layer",
        length_tolerance: int = 0,
        profiles: Mapping[int, ProfileReport] | None = None,
        neighbours: int = 1,
        replace: Replace | None = None,
    ) -> None:
        self.replace = replace
        self._sites = sites
        self._stores = dict(sorted(stores.items()))
        self._thresholds = {length: dict(found) for length, found in thresholds.items()}
        self._memoized = {layer for found in self._thresholds.values() for layer in found}
        self._lookup = lookup
        self._length_tolerance = int(length_tolerance)
        self._profiles = dict(profiles or {})
        self._paying: dict[tuple[int, int, int], Thresholds] = {}
        self._neighbours = int(neighbours)
        self._watch = ForwardWatch(sites.encoder)
        self._memos: dict[int, MemoAttention] = {}
        self._attached = False
        self._counters = [LayerCounters() for _ in sites.layers]

    @property
    def layers(self) -> list[int]:
        """The memoized layers; with ``layers="profiled"`` those that pay in a batch of some size."""
        return sorted(self._memoized)

    def stats(self) -> dict[str, Any]:
        """Report what was saved so far.

        Returns
        -------
        dict
            ``sequences``: sequences seen in inference, without decoding steps; ``memoization_rate``: Eq. 2 of the
            AttMemo paper over all layers of the model; ``target`` and ``lookup``; ``layers``: one dict for each layer
            of the model, with ``layer``, ``memoized``, ``threshold`` (squared L2; a dict by L with length buckets), and
            all of :class:`LayerCounters`: ``lookups``, ``hits``, ``bypassed``, ``unprofitable``, ``embed_seconds``,
            ``search_seconds``, ``fetch_seconds``, ``attention_seconds`` and its parts; ``reuse``: how often records
            were gathered since :func:`memoize` opened the stores, whatever :meth:`reset_stats` did, as
            ``MemoDB.hits_per_record`` tells (a dict by L with length buckets).
        """
        layers = []
        for site, counters in zip(self._sites.layers, self._counters, strict=True):
            found = {
                length: thresholds[site.layer]
                for length, thresholds in self._thresholds.items()
                if site.layer in thresholds
            }
            row: dict[str, Any] = {
                "layer": site.layer,
                "memoized": bool(found),
                "threshold": (found or None) if len(self._stores) > 1 else next(iter(found.values()), None),
            }
            row.update(counters.as_dict())
            layers.append(row)
        reuse: dict[Any, Any] = {length: store.db.hits_per_record() for length, store in self._stores.items()}
        hits = [int(row["hits"]) for row in layers]
        # Counters may have been set back in the middle of a forward.
        sequences = max(self._watch.sequences, *hits)
        return {
            "sequences": sequences,
            "memoization_rate": memoization_rate(hits, sequences),
            "target": next(iter(self._stores.values())).target,
            "lookup": self._lookup,
            "layers": layers,
            "reuse": reuse if len(reuse) > 1 else next(iter(reuse.values())),
        }

    def reset_stats(self) -> None:
        """Set all counters back to zero."""
        self._watch.reset()
        for counters in self._counters:
            counters.reset()

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Memoize the model for the length of a block."""
        with patched(self._sites, self._stand_in):
            self._attached = True
            try:
                yield
            finally:
                self._attached = False

    def _stand_in(self, module: nn.Module, original: Callable[..., Any]) -> Callable[..., Any]:
        """Make what runs in the place of a forward: the encoder's, or that of an attention module."""
        if module is self._sites.encoder:
            return self._watch.around(original)
        mine = [site.layer for site in self._sites.layers if site.module is module]
        for layer in mine:
            self._memos[layer] = MemoAttention(self._sites.layers[layer], original, self._counters[layer])
        shared = self._sites.family.shared

        def run(*args: Any, **kwargs: Any) -> Any:
            forward = self._watch.current
            if forward is None or not self._attached:
                return original(*args, **kwargs)
            layer = forward.next_call() if shared else mine[0]
            return self._run(layer, forward, args, kwargs)

        return run

    def _run(self, layer: int, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one attention layer."""
        memo = self._memos[layer]
        spans = forward.spans
        store = None if spans is None else self._store_for(spans.padded)
        thresholds: Thresholds = {}
        losing = False
        if store is not None and spans is not None:
            thresholds = self._thresholds_for(store, spans)
            losing = layer not in thresholds and layer in self._thresholds[store.padded_length]
            if losing:
                memo.counters.count(bypassed=len(spans), unprofitable=len(spans))
        first = self._lookup == "sequence" and layer == 0 and bool(thresholds)
        if store is not None and layer not in thresholds and not first:
            return memo.original(*args, **kwargs)
        call = memo.site.arguments(args, kwargs)
        # The normalised input of the first layer does not tell the scale of embeddings, which later layers depend on.
        unscaled = forward.embedded and self._lookup == "sequence" and self._sites.family.normed
        if store is None or spans is None or unscaled or not memo.can_reuse(call, spans):
            if layer in self._memoized and not losing:
                memo.counters.count(bypassed=_rows(call))
            return memo.original(*args, **kwargs)
        seconds = Seconds()
        try:
            found = self._find(layer, forward, spans, store, call["hidden_states"], thresholds, seconds)
        except memodb.ClosedError:
            return memo.original(*args, **kwargs)  # another thread has left the block
        if found is None:
            memo.counters.count(seconds=seconds, bypassed=len(spans) if layer in thresholds else 0)
            return memo.original(*args, **kwargs)
        memo.counters.count(lookups=found.searched, bypassed=len(spans) - found.searched)
        if self.replace is not None:
            store, found = self.replace(memo, call, spans, store, found)
        return memo.attend(args, kwargs, call, spans, store, found, seconds=seconds)

    def _find(
        self,
        layer: int,
        forward: Forward,
        spans: Spans,
        store: MemoStore,
        hidden: torch.Tensor,
        thresholds: Thresholds,
        seconds: Seconds,
    ) -> Found | None:
        """Find a layer's records within its threshold; None: it has nothing to look for."""

        def search(within: float) -> Found:
            return find(
                store,
                layer,
                hidden,
                spans,
                max_distance=within,
                length_tolerance=self._length_tolerance,
                neighbours=self._neighbours,
                seconds=seconds,
            )

        if self._lookup == "layer":
            return search(thresholds[layer])
        if layer == 0:
            # The widest threshold decides what is looked for; each layer's own, what is used.
            forward.found = search(max(thresholds.values()))
        if forward.found is None:
            return None
        later = [other for other in thresholds if other > layer]
        if later:
            after = min(later)
            prefetch(store.db, forward.found.within(thresholds[after], after).candidates)
        return forward.found.within(thresholds[layer], layer) if layer in thresholds else None

    def _thresholds_for(self, store: MemoStore, spans: Spans) -> Thresholds:
        """Choose the layers of a batch: all, or those that pay at its size, which are worked out once."""
        thresholds = self._thresholds[store.padded_length]
        report = self._profiles.get(store.padded_length)
        if report is None or not len(spans):
            return thresholds
        size = (store.padded_length, len(spans), spans.padded)
        if size not in self._paying:
            paying = report.paying(thresholds, self._lookup, len(spans), spans.padded)
            self._paying[size] = {layer: thresholds[layer] for layer in paying}
        return self._paying[size]

    def _store_for(self, padded: int) -> MemoStore | None:
        """Choose the smallest bucket that a batch fits into."""
        length = smallest_fitting(self._stores, padded)
        return None if length is None else self._stores[length]


def _rows(call: Mapping[str, Any]) -> int:
    hidden = call.get("hidden_states")
    return len(hidden) if isinstance(hidden, torch.Tensor) and hidden.dim() else 0
