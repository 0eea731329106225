"""The autotuner: which layers to memoize and how boldly, so that most time is saved within what accuracy may cost.

A similarity score does not guard accuracy: layers differ in how much a wrong record harms, and harms of several layers
depend on each other. So ways to reuse are tried on data, with labels or against the plain model's own predictions. It
may well find that nothing should be reused.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from .beside import write_tuned
from .calibration import find_self_hits
from .capture import in_inference, model_inputs, whole_inputs
from .card import ModelCard
from .choices import check_lookup
from .embedding import Embedder
from .errors import InvalidBatchError, StoreMismatchError, no_batch_fits
from .judge import Change, Judge, predicts_next
from .performance import ProfileReport
from .recorder import batch_shape, count_sequences, cut_rows, spans_of
from .sites import ModelSites, find_memoizable
from .store import MemoStore, open_stores, smallest_fitting
from .tune_report import TuneReport, pooled
from .ways import Numbered, Thresholds, WaysTried, confirm, find_boldest, order_ways

__all__ = ["TuneReport", "check_budget", "check_judged", "fewest_tuned", "tune", "tune_budgets", "tune_store"]

_FEWEST = 16

# How sure it must be that the budget is kept, unless told.
CONFIDENCE = 0.8


def tune(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Any]],
    path: str | os.PathLike[str],
    *,
    budget: float = 1.0,
    metric: str | None = None,
    lookup: str = "layer",
    confidence: float = CONFIDENCE,
    embedder: Embedder | None = None,
    progress: bool | None = None,
) -> TuneReport:
    """Choose layers and thresholds that save most time within an accuracy budget, for ``memoize(level="tuned")``.

    Half of the batches choose: each layer is tried by itself at several thresholds, ways that save much and harm little
    come first, and the boldest combination within the budget is taken. The other half checks it, and the choice is
    taken back step by step until it holds there too. The loss on data of the same distribution then lies within the
    interval that the report states, in 95 of 100 cases; in somewhat fewer where steps were taken back, as the second
    half then had a part in the choice.

    Parameters
    ----------
    model, path
        A model and its store, with a profile.
    batches
        Data that is not in the store, and other data than it was profiled with; with ``labels`` for a budget on
        accuracy. At least 16 sequences, and better a thousand: they are split into halves. With length buckets, one
        without so many, or without a profile, is left as it is as long as there is another.
    budget
        Points of accuracy or agreement that may be lost, or percent that perplexity may grow.
    metric
        ``"accuracy"``, ``"agreement"`` with the plain model's predictions, or ``"perplexity"``; None: accuracy where
        there are labels, perplexity for causal language models, agreement otherwise.
    lookup
        As in :func:`memoize`; the choice holds for it only.
    confidence
        How sure it must be, by each half of the data, that the loss is within the budget: between 0.5, where the
        measured loss itself decides, and 1.
    embedder, progress
        As in :func:`memoize` and :func:`build`.

    Raises
    ------
    UnsupportedModelError, StoreMismatchError
        The model is of no supported family, or not the one of the store; the store has no profile.
    InvalidBatchError
        Too few sequences that are not in the store, or outputs that cannot be judged.
    ValueError
        An argument cannot be used.
    """
    sites = find_memoizable(model)
    data = list(batches)
    with open_stores(path, ModelCard.of(sites), embedder) as stores:
        check_lookup(stores, lookup, 0)
        shares: dict[int, list[Any]] = {length: [] for length in stores}
        for batch in data:
            length = smallest_fitting(stores, batch_shape(model_inputs(batch, model.device))[1])
            if length is not None:
                shares[length].append(batch)
        if not any(shares.values()):
            raise no_batch_fits(len(data), max(stores))
        # A bucket without a profile, or with too little data, is left alone as long as there is another.
        enough = {
            length: share
            for length, share in shares.items()
            if stores[length].profile is not None and count_sequences(share) >= _FEWEST
        }
        # With none of them ready, the largest share tells what is missing.
        chosen = enough or dict([max(shares.items(), key=lambda item: count_sequences(item[1]))])
        parts = {
            length: tune_budgets(
                model,
                sites,
                stores[length],
                share,
                budgets=[budget],
                metric=metric,
                lookup=lookup,
                confidence=confidence,
                progress=progress,
            )[0]
            for length, share in chosen.items()
        }
        # Written when all are done: an error changes nothing.
        for length, report in parts.items():
            write_tuned(stores[length].path, report.to_dict())
        first = next(iter(parts.values()))
        return first if len(stores) == 1 else pooled(list(parts.values()))


def tune_store(
    model: PreTrainedModel,
    sites: ModelSites,
    store: MemoStore,
    batches: Sequence[Mapping[str, Any]],
    *,
    budget: float,
    progress: bool | None = None,
) -> TuneReport:
    """Tune an open store as :func:`tune` does by default, and keep the choice beside it."""
    report = tune_budgets(model, sites, store, batches, budgets=[budget], progress=progress)[0]
    write_tuned(store.path, report.to_dict())
    return report


def tune_budgets(
    model: PreTrainedModel,
    sites: ModelSites,
    store: MemoStore,
    batches: Sequence[Mapping[str, Any]],
    *,
    budgets: Sequence[float],
    metric: str | None = None,
    lookup: str = "layer",
    confidence: float = CONFIDENCE,
    progress: bool | None = None,
) -> list[TuneReport]:
    """Tune an open store for several budgets, which share what is tried; nothing is written."""
    for budget in budgets:
        check_budget(budget)
    if not isinstance(confidence, float) or not 0.5 <= confidence < 1.0:
        raise ValueError(f"expected confidence to be at least 0.5 and below 1; found {confidence!r}")
    if store.profile is None:
        raise StoreMismatchError(
            f"the store at {store.path} has no profile, which tuning needs: run memodb_transformers.profile first"
        )
    profile = ProfileReport.from_dict(store.profile, store.path)
    own, self_hits = _without_self_hits(model, sites, store, batches)
    halves = _halves(own)
    counts = [count_sequences([batch for _, batch in half]) for half in halves]
    if min(counts) < _FEWEST // 2:
        raise InvalidBatchError(
            f"expected {_FEWEST} sequences or more that the store does not hold: one half chooses, the other checks; "
            f"found {sum(counts)}, and {self_hits} that it holds"
        )
    z = statistics.NormalDist().inv_cdf(confidence)
    trial = WaysTried(model, sites, store, Judge(metric, causal=predicts_next(model, sites)), lookup, progress)
    with in_inference(model), trial:
        trial.remember([pair for half in halves for pair in half])
        if trial.judge.metric != "perplexity":
            _check_enough(min(budgets), confidence, sum(counts))
        path = order_ways(trial, profile, halves[0], lookup, max(budgets))
        reports = []
        for budget in budgets:
            wanted = find_boldest(trial, path, halves[0], budget, z)
            chosen, rate, change = confirm(trial, wanted, halves[0], halves[1], budget, z)
            reports.append(
                _report(trial, store, profile, chosen, rate, change, budget, confidence, lookup, counts, self_hits)
            )
    return reports


def _report(
    trial: WaysTried,
    store: MemoStore,
    profile: ProfileReport,
    chosen: Thresholds,
    rate: float,
    change: Change,
    budget: float,
    confidence: float,
    lookup: str,
    counts: Sequence[int],
    self_hits: int,
) -> TuneReport:
    return TuneReport(
        budget=float(budget),
        metric=str(trial.judge.metric),
        confidence=confidence,
        lookup=lookup,
        thresholds=chosen,
        loss=change.loss,
        low=change.loss - 1.96 * change.error if chosen else 0.0,
        high=change.loss + 1.96 * change.error if chosen else 0.0,
        sequences=counts[1],
        chosen_on=counts[0],
        tried=trial.tried,
        memoization_rate=rate,
        saved_seconds=_saved(profile, chosen, lookup),
        attention_seconds=sum(row.attention_seconds for row in profile.layers),
        padded_length=store.padded_length,
        self_hits=self_hits,
    )


def check_budget(budget: Any) -> None:
    """Refuse a budget that is no number of points."""
    if isinstance(budget, bool) or not isinstance(budget, int | float | np.number) or not 0 <= budget < float("inf"):
        raise ValueError(f"expected budget to be a number of points of at least 0; found {budget!r}")


def fewest_tuned(budget: float, confidence: float = CONFIDENCE) -> int:
    """Tell how many sequences a budget of points needs at least: with fewer, even no change at all proves nothing."""
    z = statistics.NormalDist().inv_cdf(confidence)
    return max(_FEWEST, 2 * math.ceil(100.0 * z / budget)) if budget > 0 else _FEWEST


def _check_enough(budget: float, confidence: float, found: int) -> None:
    """Refuse to try when nothing could be proved."""
    needed = fewest_tuned(budget, confidence)
    if found < needed:
        raise InvalidBatchError(
            f"expected {needed} sequences or more for a budget of {budget:g} points at a confidence of {confidence:g}: "
            f"with the {found} found even no change at all would not show that it is kept. Give more data, a larger "
            "budget, or a lower confidence"
        )


def check_judged(model: PreTrainedModel, sites: ModelSites, batches: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a model whose outputs cannot be judged, or labels that say nothing of them, before anything is built."""
    judge = Judge(None, causal=predicts_next(model, sites))
    with in_inference(model):
        logits = getattr(model(**model_inputs(batches[0], model.device)), "logits", None)
    judge.settle(logits, batches)
    judge.remember(0, logits, batches[0])
    if judge.metric != "accuracy":  # of labels, a whole batch may count for nothing
        judge.sum([judge.compare(0, logits, batches[0])])


def _without_self_hits(
    model: PreTrainedModel, sites: ModelSites, store: MemoStore, batches: Sequence[Mapping[str, Any]]
) -> tuple[list[Mapping[str, Any]], int]:
    """Leave out what the store holds: that reuse is right there says nothing of sequences to come."""
    kept: list[Mapping[str, Any]] = []
    count = 0
    with in_inference(model):
        for batch in batches:
            inputs = whole_inputs(batch, model.device, sites)
            spans = spans_of(inputs)
            themselves = find_self_hits(model, sites, store, inputs, spans)
            count += int(themselves.sum())
            if not themselves.all():
                kept.append(cut_rows(batch, np.flatnonzero(~themselves), len(spans)) if themselves.any() else batch)
    return kept, count


def _halves(batches: Sequence[Mapping[str, Any]]) -> tuple[Numbered, Numbered]:
    """Split batches into those that choose and those that check; few, or uneven ones, are cut in two each."""
    parts = list(batches)
    fewer = min(count_sequences(parts[::2]), count_sequences(parts[1::2]))
    if len(parts) < 4 or 3 * fewer < count_sequences(parts):
        parts = []
        for batch in batches:
            rows = batch_shape(batch)[0]
            for chosen in np.array_split(np.arange(rows), 2):
                if len(chosen):
                    parts.append(cut_rows(batch, chosen, rows))
    numbered = list(enumerate(parts))
    return numbered[::2], numbered[1::2]


def _saved(profile: ProfileReport, thresholds: Thresholds, lookup: str) -> float:
    """Eq. 3 of all layers chosen, seconds a sequence."""
    saved = sum(row.benefit(thresholds[row.layer], lookup) for row in profile.layers if row.layer in thresholds)
    return saved - (profile.layers[0].lookup_seconds if lookup == "sequence" and thresholds else 0.0)
