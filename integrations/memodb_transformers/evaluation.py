"""Memoized and unmemoized model side by side, with controls: what each answers, how similar, how fast."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from transformers import PreTrainedModel

import memodb

from . import controls
from .calibration import find_self_hits
from .capture import in_inference, model_inputs
from .card import ModelCard
from .choices import Level, asked_profiles, check_lookup, resolve_thresholds
from .comparison import EvaluationReport, make_report
from .embedding import Embedder
from .errors import InvalidBatchError
from .judge import predicts_next
from .memo import Memo, Thresholds
from .plan import Stores, asked_kinds, check_lengths, check_settings, plan_trials
from .recorder import batch_shape, spans_of
from .reports import hide_bar
from .sites import ModelSites, find_memoizable
from .store import open_stores, smallest_fitting
from .trials import run_trials

__all__ = ["EvaluationReport", "evaluate"]


def evaluate(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Any]],
    path: str | os.PathLike[str],
    *,
    levels: Sequence[Level] = ("conservative", "moderate", "aggressive"),
    kinds: Sequence[str] | None = None,
    condensed: str | os.PathLike[str] | None = None,
    layers: str | Sequence[int] = "profiled",
    lookup: str = "layer",
    length_tolerance: int = 0,
    neighbours: int = 1,
    embedder: Embedder | None = None,
    similarity: bool = True,
    repeats: int = 3,
    confidence: float = 0.95,
    seed: int = 0,
    oracle_limit: int = 1_000_000,
    progress: bool | None = None,
) -> EvaluationReport:
    """Run a model with and without memoization over the same batches, and with other records than the nearest.

    A first, untimed pass takes what each run answers and warms everything up. Then each is timed ``repeats`` times in
    turn; ``seconds`` is the median of whole passes, with everything a caller pays for inside: embedding, search,
    gather, attention, the rest of the model. (For the controls that is the search for the nearest record, which decides
    who is a hit, but not the choice of another record.)

    Parameters
    ----------
    model, path
        A model and the store that was built of it.
    batches
        Dicts of ``input_ids``, ``attention_mask`` and, for accuracy, ``labels``: classes ``[n]``; of models that choose
        one for each token, ``[n, L]``, -100 for none; of causal language models ``[n, L]``, usually ``input_ids``.
    levels, layers, lookup, length_tolerance, embedder
        As in :func:`memoize`. A level may be a number, the similarity that is predicted.
    neighbours
        As in :func:`memoize`: of the kinds nearest, condensed and random.
    kinds
        Rows, out of:

        - ``"plain"``: no memoization
        - ``"nearest"``: the nearest record within the threshold (the paper)
        - ``"random"``: for the very same hits, a random record of the layer and length
        - ``"mean"``: for the same hits, the mean record of the layer and length. The means are made in a folder beside
          the store that is removed at the end; that reads the whole store once
        - ``"oracle"``: for the same hits, the record most similar to what the layer would compute
        - ``"condensed"``: the store of means at ``condensed``, with hits and thresholds of its own

        Default: plain, random, mean, nearest, and condensed if one is given. If the store at ``path`` is condensed
        itself: plain and condensed; the others need single records.
    condensed
        A store that :func:`condense` made, with its own profile.
    similarity
        Measure the similarity of what is reused: one more untimed pass of each kind, with eager attention.
    repeats
        Timed passes.
    confidence
        Of the intervals: a bootstrap over sequences with 2,000 draws, the same ones for all rows.
    seed
        Of the random records, and of the bootstrap.
    oracle_limit
        The most comparisons of two records that the oracle may need; more is refused. One takes 30 to 110 us with 12
        heads and 64 valid tokens, and 8 ms with 512, on one core: a million is a minute or two, or two hours.
    progress
        Progress bars: True, False, or None for where a terminal is.

    Returns
    -------
    EvaluationReport
        Rows with ``kind``, ``level``, ``accuracy`` (of causal language models: of next tokens), ``agreement`` (share of
        predictions equal to the plain model's, of sequences or of their tokens), ``perplexity`` (of causal language
        models, over next tokens), ``memoization_rate`` (Eq. 2), ``similarity`` (mean over the hits of Eq. 1, or the
        measure of contexts, between what was reused and what the layer would have computed from the hidden state that
        it had), ``seconds``, ``speedup_vs_plain``, ``speedup_vs_eager`` (against the model with eager attention),
        ``bytes`` (logical size of the records that the kind needs), ``pass_seconds`` (of each pass: the i-th of every
        row was taken in the same round), ``output_change`` (mean relative L2 difference of
        the logits, or of the last hidden state of a model without, from the plain model's); ``accuracy_change``,
        ``perplexity_change`` from the plain model; and ``_low`` and ``_high`` of ``accuracy``, ``accuracy_change``,
        ``agreement``, ``perplexity_change``. None where a column does not apply.

    Raises
    ------
    ValueError
        An argument cannot be used; a kind needs single records, or a condensed store; the oracle would take too long.
    InvalidBatchError
        There are no batches that fit the store.
    UnsupportedModelError, StoreMismatchError, MemoizationActiveError
        As in :func:`memoize`.
    """
    check_settings(kinds, repeats, confidence, seed, oracle_limit)
    sites = find_memoizable(model)
    data = [(model_inputs(batch, model.device), batch.get("labels")) for batch in batches]
    data = [(inputs, labels) for inputs, labels in data if batch_shape(inputs)[0]]
    if not data:
        raise InvalidBatchError("expected at least one batch; found none")
    card, levels = ModelCard.of(sites), list(dict.fromkeys(levels))

    def thresholds(stores: Stores) -> dict[Level, dict[int, Thresholds]]:
        check_lookup(stores, lookup, length_tolerance, neighbours)
        check_lengths(stores, data)
        more = {"length_tolerance": length_tolerance, "neighbours": neighbours}
        return {level: resolve_thresholds(stores, level, None, layers, lookup, **more) for level in levels}

    def memo(stores: Stores, thresholds: Mapping[int, Thresholds]) -> Memo:
        return Memo(
            sites,
            stores,
            thresholds,
            lookup=lookup,
            length_tolerance=length_tolerance,
            neighbours=neighbours,
            profiles=asked_profiles(stores, layers),
        )

    with open_stores(path, card, embedder) as stores, ExitStack() as stack, in_inference(model):
        others = None if condensed is None else stack.enter_context(open_stores(condensed, card, embedder))
        asked = asked_kinds(kinds, stores, others)
        # With the condensed store alone the first one is not looked into: it need not be tuned.
        needed = others is None or not {"plain", "condensed"}.issuperset(asked)
        found, found_there = thresholds(stores) if needed else {}, {} if others is None else thresholds(others)
        if "oracle" in asked:
            spans = [spans_of(inputs) for inputs, _ in data]
            controls.check_affordable(stores, list(found.values()), spans, length_tolerance, oracle_limit)
        means: dict[int, memodb.MemoDB] = {}
        if "mean" in asked:
            means = stack.enter_context(controls.mean_stores(path, stores, seed=seed, progress=progress))
        self_hits = sum(_count_self_hits(model, sites, stores, inputs) for inputs, _ in data)
        trials = plan_trials(asked, stores, found, others, found_there, means, memo, seed)
        run_trials(
            model,
            trials,
            data,
            next_tokens=predicts_next(model, sites),
            similarity=similarity,
            repeats=repeats,
            hide=hide_bar(progress),
        )
    return make_report(trials, asked, repeats=repeats, confidence=confidence, seed=seed, self_hits=self_hits)


def _count_self_hits(model: PreTrainedModel, sites: ModelSites, stores: Stores, inputs: dict[str, Any]) -> int:
    """Count the sequences of a batch that the store holds: on these every figure flatters."""
    spans = spans_of(inputs)
    length = smallest_fitting(stores, spans.padded)
    return 0 if length is None else int(find_self_hits(model, sites, stores[length], inputs, spans).sum())
