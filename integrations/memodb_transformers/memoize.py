"""Attach a memo store to a model, and take it off again without a trace."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

from .attention import LayerCounters, MemoAttention, find_memoizable
from .errors import StoreMismatchError
from .families import ModelSites
from .lengths import LengthWatch
from .profiling import ProfileReport
from .similarity import memoization_rate
from .store import MemoStore, ModelCard, open_store
from .thresholds import LEVELS

__all__ = ["Memo", "memoize", "resolve_thresholds"]


class Memo:
    """A memo store attached to a model: what ``memoize`` yields.

    Parameters
    ----------
    sites
        The attention layers.
    store
        The open store.
    thresholds
        Largest squared L2 distance of keys at which a record is reused, for each layer to memoize.
    """

    def __init__(self, sites: ModelSites, store: MemoStore, thresholds: Mapping[int, float]) -> None:
        self._sites = sites
        self._thresholds = dict(thresholds)
        self._watch = LengthWatch(sites.encoder)
        self._memos = {
            layer: MemoAttention(
                sites.layers[layer], store.db, store.embedder, self._watch, store.padded_length, threshold
            )
            for layer, threshold in sorted(self._thresholds.items())
        }

    @property
    def layers(self) -> list[int]:
        """The memoized layers."""
        return list(self._memos)

    def stats(self) -> dict[str, Any]:
        """Report what was saved so far.

        Returns
        -------
        dict
            ``sequences``: sequences seen in inference; ``memoization_rate``: Eq. 2 of the AttMemo paper over all
            layers of the model; ``layers``: one dict for each layer of the model, with ``layer``, ``memoized``,
            ``threshold`` (squared L2), ``lookups``, ``hits``, ``bypassed``, and ``embed_seconds``, ``search_seconds``,
            ``fetch_seconds``, ``attention_seconds``.
        """
        layers = []
        for site in self._sites.layers:
            memo = self._memos.get(site.layer)
            row: dict[str, Any] = {
                "layer": site.layer,
                "memoized": memo is not None,
                "threshold": self._thresholds.get(site.layer),
                "lookups": 0,
                "hits": 0,
                "bypassed": 0,
                "embed_seconds": 0.0,
                "search_seconds": 0.0,
                "fetch_seconds": 0.0,
                "attention_seconds": 0.0,
            }
            if memo is not None:
                row.update({name: getattr(memo.counters, name) for name in row if hasattr(memo.counters, name)})
            layers.append(row)
        hits = [int(row["hits"]) for row in layers]
        sequences = self._watch.sequences
        return {"sequences": sequences, "memoization_rate": memoization_rate(hits, sequences), "layers": layers}

    def reset_stats(self) -> None:
        """Set all counters back to zero."""
        self._watch.sequences = 0
        for memo in self._memos.values():
            memo.counters = LayerCounters()

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Memoize the model for the length of a block."""
        try:
            for layer, memo in self._memos.items():
                site = self._sites.layers[layer]
                setattr(site.parent, site.family.attribute, memo)
            self._watch.attach()
            yield
        finally:
            self._watch.detach()
            for layer in self._memos:
                site = self._sites.layers[layer]
                setattr(site.parent, site.family.attribute, site.module)


@contextmanager
def memoize(
    model: PreTrainedModel,
    path: str | os.PathLike[str],
    *,
    level: str = "moderate",
    threshold: float | None = None,
    layers: str | Sequence[int] = "profiled",
) -> Iterator[Memo]:
    """Let a model reuse stored attention probabilities for the length of a block.

    Inside the block the model is called as always. Where a layer finds a record of the same valid length within its
    threshold, it projects V only and multiplies it with the record; all other sequences of the batch go through the
    original layer. On exit, also by an exception, the model is the very same object graph as before.

    Reuse happens in inference only: in training mode, with gradients enabled, with ``output_attentions``, and for
    sequences that are not right-padded to the store's padded length, the original layers run.

    Parameters
    ----------
    model
        The model that the store was built from.
    path
        The memo store.
    level
        ``"conservative"``, ``"moderate"`` or ``"aggressive"``: reuse where a similarity (Eq. 1) of at least 0.9, 0.8
        or 0.75 is predicted.
    threshold
        Largest squared L2 distance of keys, for all layers, instead of a level.
    layers
        ``"profiled"``: those where the profile predicts a gain of time (Eq. 3); ``"all"``; or a list of numbers.

    Yields
    ------
    Memo
        With ``stats()`` and ``layers``.

    Raises
    ------
    UnsupportedModelError, StoreMismatchError
        The model is of no supported family, or not the one of the store; the store has no profile and none can be
        done without.
    MemoizationActiveError
        The model is memoized already.
    ValueError
        ``level``, ``threshold`` or ``layers`` cannot be used.
    """
    sites = find_memoizable(model)
    with open_store(path, ModelCard.of(sites)) as store:
        memo = Memo(sites, store, resolve_thresholds(store, level, threshold, layers))
        with memo.attached():
            yield memo


def resolve_thresholds(
    store: MemoStore, level: str, threshold: float | None, layers: str | Sequence[int]
) -> dict[int, float]:
    """Find the layers to memoize and the threshold of each; see :func:`memoize`."""
    count = store.card.layers
    if level not in LEVELS:
        raise ValueError(f"expected level to be one of {', '.join(LEVELS)}; found {level!r}")
    number = isinstance(threshold, (int, float)) and not isinstance(threshold, bool)
    if threshold is not None and not (number and threshold >= 0):
        raise ValueError(f"expected threshold to be a squared distance of at least 0; found {threshold!r}")
    if isinstance(layers, str):
        if layers not in ("profiled", "all"):
            raise ValueError(f"expected layers to be 'profiled', 'all' or a list of numbers; found {layers!r}")
        wanted = list(range(count))
    else:
        try:
            wanted = list(set(layers))
        except TypeError:
            raise ValueError(
                f"expected layers to be 'profiled', 'all' or a list of numbers; found {layers!r}"
            ) from None
        if any(isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < count for layer in wanted):
            raise ValueError(f"expected layers numbered 0 to {count - 1}; found {list(layers)}")
        wanted.sort()
    report = ProfileReport.from_dict(store.profile, store.path) if store.profile is not None else None
    if report is None and (threshold is None or layers == "profiled"):
        raise StoreMismatchError(
            f"the store at {store.path} has no profile, which levels and layers='profiled' need: run "
            "memodb_transformers.profile on held-out batches, or give threshold= and layers="
        )
    if threshold is not None:
        thresholds = dict.fromkeys(wanted, float(threshold))
    else:
        assert report is not None
        found = report.thresholds(level)
        thresholds = {layer: found[layer] for layer in wanted if layer in found}
    if layers == "profiled":
        assert report is not None
        thresholds = {layer: thresholds[layer] for layer in report.paying(thresholds)}
    return thresholds
