"""The offline profiler: what a lookup costs, what a hit saves, and how often there would be one, layer by layer.

All parts of Eq. 3 of the AttMemo paper (``performance.py``) are measured by themselves, so that the benefit can be
predicted for any threshold.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from .attention import MemoAttention
from .capture import Visit, attention_implementation, attention_visits, in_inference, model_inputs
from .card import ModelCard
from .embedding import Embedder
from .errors import InvalidBatchError
from .forward import Ints, Spans
from .lookup import Found, find
from .performance import LayerProfile, ProfileReport, Scores
from .recorder import batch_shape, canonical, spans_of
from .reports import hide_bar
from .similarity import context_similarities, similarity_scores
from .sites import ModelSites, find_memoizable
from .store import MemoStore, open_stores, smallest_fitting, write_profile

__all__ = ["profile", "profile_store"]

_REPEATS = 5
_TIMED_BATCHES = 4


def profile(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Any]],
    path: str | os.PathLike[str],
    *,
    embedder: Embedder | None = None,
    progress: bool | None = None,
) -> ProfileReport:
    """Calibrate the thresholds of a memo store and measure which layers pay, on data that is not in it.

    The result is kept beside the store, in place of an earlier one; ``memoize(layers="profiled")`` goes by it.
    Distances are calibrated with hidden states of the unmemoized model. Once several layers are memoized, those of
    later layers drift a little from these: what a level does to accuracy is for ``evaluate`` to say.

    Parameters
    ----------
    model, path
        A model and the store that :func:`build` made of it.
    batches
        Held-out batches, padded to the store's length at most, of the size that will be used: costs depend on it. With
        length buckets, each goes to its own.
    embedder
        As in :func:`memoize`.
    progress
        Progress bars: True, False, or None for where a terminal is.

    Raises
    ------
    UnsupportedModelError, StoreMismatchError
        The model is of no supported family, or not the one of the store.
    InvalidBatchError
        No batch can be used.
    """
    sites = find_memoizable(model)
    data = list(batches)
    with open_stores(path, ModelCard.of(sites), embedder) as stores:
        if len(stores) == 1:
            return profile_store(model, sites, next(iter(stores.values())), data, progress=progress)
        shares: dict[int, list[Any]] = {length: [] for length in stores}
        for batch in data:
            spans = _spans(batch, max(stores))
            length = None if spans is None else smallest_fitting(stores, spans.padded)
            if length is not None:
                shares[length].append(batch)
        if not any(shares.values()):
            raise InvalidBatchError(
                f"expected batches padded to at most {max(stores)} tokens, as the store's; found none"
            )
        parts = [
            profile_store(model, sites, stores[length], share, progress=progress)
            for length, share in shares.items()
            if share
        ]
    return replace(
        parts[0],
        layers=(),
        sequences=sum(part.sequences for part in parts),
        padded_length=max(stores),
        buckets=tuple(parts),
    )


def profile_store(
    model: PreTrainedModel,
    sites: ModelSites,
    store: MemoStore,
    batches: list[Any],
    *,
    progress: bool | None = None,
) -> ProfileReport:
    """Profile an open store: see :func:`profile`."""
    usable = [(batch, spans) for batch in batches if (spans := _spans(batch, store.padded_length)) is not None]
    if not usable:
        raise InvalidBatchError(
            f"expected batches padded to at most {store.padded_length} tokens, as the store's; found none"
        )
    trials = [_Trial(layer, store) for layer in range(len(sites.layers))]
    plan = [(True, *pair) for pair in usable] + [(False, *pair) for pair in usable[:_TIMED_BATCHES]]
    with in_inference(model):
        for calibrating, batch, spans in tqdm(plan, desc="profiling", unit="batch", disable=hide_bar(progress)):
            visit = _calibrator(trials, spans) if calibrating else _timer(trials, spans)
            inputs = model_inputs(batch, model.device)
            if sites.family.caches:
                inputs.setdefault("use_cache", False)
            with ExitStack() as stack:
                if calibrating:
                    stack.enter_context(attention_implementation(model, "eager"))
                asked = calibrating and store.target == "probs"
                stack.enter_context(attention_visits(sites, visit, probabilities=asked))
                model(**inputs)
    report = ProfileReport(
        layers=tuple(trial.result() for trial in trials),
        sequences=len(trials[0].layer.distances),
        batch_size=len(usable[0][1]),
        threads=torch.get_num_threads(),
        attention=str(model.config._attn_implementation),
        padded_length=store.padded_length,
    )
    write_profile(store.path, report.to_dict())
    return report


def _calibrator(trials: list[_Trial], spans: Spans) -> Callable[[Visit], None]:
    first: list[Found] = []

    def visit(visit: Visit) -> None:
        trial = trials[visit.site.layer]
        found = find(trial.store, visit.site.layer, visit.hidden, spans)
        if visit.site.layer == 0:
            first.append(found)
        trial.calibrate(visit, spans, found, first[0])

    return visit


def _timer(trials: list[_Trial], spans: Spans) -> Callable[[Visit], None]:
    def visit(visit: Visit) -> None:
        trials[visit.site.layer].time(visit, spans)

    return visit


class _Pairs:
    """Distances of keys and the similarities of what they found."""

    def __init__(self) -> None:
        self.distances: list[float | None] = []
        self.similarities: list[float | None] = []

    def add(self, own: Tensor, spans: Spans, found: Found, ids: Ints, store: MemoStore) -> None:
        """Compare what the layer computed with the record that would be reused, whatever its distance."""
        rows = np.flatnonzero(ids >= 0)
        score_of: dict[int, float] = {}
        if len(rows):
            records = store.db.multiget_mapped(ids[rows]).torch()
            lengths = torch.from_numpy(spans.lengths[rows])
            compare = context_similarities if store.target == "context" else similarity_scores
            scores = compare(own[torch.from_numpy(rows)], records, lengths)
            score_of = dict(zip(rows.tolist(), scores.tolist(), strict=True))
        for row in np.flatnonzero(spans.lengths > 0).tolist():
            self.distances.append(float(found.distances[row]) if row in score_of else None)
            self.similarities.append(score_of.get(row))

    def both(self) -> tuple[Scores, Scores]:
        """Return distances and similarities."""
        return tuple(self.distances), tuple(self.similarities)


class _Trial:
    """What is measured of one layer."""

    def __init__(self, number: int, store: MemoStore) -> None:
        self.store = store
        self.layer, self.sequence = _Pairs(), _Pairs()
        self._number = number
        self._times: dict[str, list[float]] = {"attention": [], "lookup": [], "hit": [], "mixed": []}

    def calibrate(self, visit: Visit, spans: Spans, found: Found, first: Found) -> None:
        """Compare with the record found by the layer itself, and with that of the sequence found at layer 0."""
        own = canonical(visit, spans, self.store.padded_length, self.store.target).cpu()
        self.layer.add(own, spans, found, found.ids, self.store)
        shifted = np.where(first.ids >= 0, first.ids + self._number, -1)
        self.sequence.add(own, spans, first, shifted, self.store)

    def time(self, visit: Visit, spans: Spans) -> None:
        """Time the parts of one call, each by itself; called from within the call's own forward."""
        memo = MemoAttention(visit.site, visit.original)
        hidden, store = visit.hidden, self.store
        found = find(store, self._number, hidden, spans)
        # A row with no neighbour borrows one: only time is measured here.
        ids = np.where(found.ids >= 0, found.ids, found.ids.max())

        def attend(ids: Ints) -> Callable[[], Any]:
            chosen = Found(ids, found.distances, spans.lengths, found.searched)
            return lambda: memo.attend(visit.args, visit.kwargs, visit.call, spans, store, chosen)

        def measure(part: str, call: Callable[[], Any]) -> None:
            self._times[part].append(_per_row(call, hidden))

        measure("attention", lambda: visit.original(*visit.args, **visit.kwargs))
        measure("lookup", lambda: find(store, self._number, hidden, spans))
        if ids.max() >= 0:
            measure("hit", attend(ids))
        if ids.max() >= 0 and len(ids) > 1:
            measure("mixed", attend(np.where(np.arange(len(ids)) % 2 == 0, ids, -1)))

    def result(self) -> LayerProfile:
        """Return the layer's profile."""
        median = {part: statistics.median(times) if times else None for part, times in self._times.items()}
        attention, lookup = median["attention"] or 0.0, median["lookup"] or 0.0
        # Nothing in the store fits any row: a hit cannot be timed and will not happen.
        hit = attention if median["hit"] is None else median["hit"]
        mixed = (attention + hit) / 2 if median["mixed"] is None else median["mixed"]
        return LayerProfile(
            self._number,
            attention,
            lookup,
            hit,
            max(0.0, mixed - (attention + hit) / 2),
            *self.layer.both(),
            *self.sequence.both(),
        )


def _per_row(call: Callable[[], Any], hidden: Tensor) -> float:
    """Least seconds of a call, per row of the batch: whatever else the machine does can only add."""
    times = []
    for _ in range(_REPEATS):
        began = perf_counter()
        call()
        if hidden.is_cuda:
            torch.cuda.synchronize(hidden.device)
        times.append(perf_counter() - began)
    return min(times) / len(hidden)


def _spans(batch: Mapping[str, Any], longest: int) -> Spans | None:
    """Tell where a batch's sequences lie; None where it cannot be used."""
    try:
        rows, padded = batch_shape(batch)
        return spans_of(batch) if rows and padded <= longest else None
    except InvalidBatchError:
        return None
