"""The runs of an evaluation: what each answers, how faithful what it reuses is, and how long it takes."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from .capture import attention_implementation
from .controls import Fidelity, Reuse
from .memo import Memo
from .outcomes import Doubles, compare_outputs
from .similarity import Floats

__all__ = ["Trial", "run_trials"]

Batches = Sequence[tuple[dict[str, Any], Any]]


@dataclass
class Trial:
    """One run of an evaluation: a kind of reuse at a level, or the model without any.

    Attributes
    ----------
    kind, level
        ``"plain"``, ``"eager"`` (plain, with eager attention) or a kind of reuse, and its level.
    memo, reuse
        The memo, and what it reuses; None: nothing.
    bytes
        Logical size of the records that the kind needs.
    timed
        Whether it is a row of the report; if not, others need its decisions.
    outcomes, scores, seconds, stats
        Sums by sequence, batch by batch; similarities of hits; times of whole passes; counts of the last one.
    """

    kind: str
    level: str | float | None = None
    memo: Memo | None = None
    reuse: Reuse | None = None
    bytes: int | None = None
    timed: bool = True
    outcomes: list[Doubles] = field(default_factory=list)
    scores: list[Floats] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    stats: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.memo is not None:
            self.memo.replace = self.reuse

    @property
    def sums(self) -> Doubles:
        """Sums of each sequence, ``[n, 8]``."""
        return np.concatenate(self.outcomes)

    @property
    def similarity(self) -> float | None:
        """Mean similarity of the hits; None: not measured, or there were none."""
        return float(np.concatenate(self.scores).mean()) if self.scores else None

    @property
    def median(self) -> float:
        """Median seconds of a pass."""
        return statistics.median(self.seconds)

    def start(self, batch: int) -> None:
        """Tell what is reused which batch comes next."""
        if self.reuse is not None:
            self.reuse.batch = batch

    @contextmanager
    def running(self, model: PreTrainedModel) -> Iterator[None]:
        """Let the model run so for the length of a block."""
        with ExitStack() as stack:
            if self.memo is not None:
                stack.enter_context(self.memo.attached())
            if self.kind == "eager":
                stack.enter_context(attention_implementation(model, "eager"))
            yield


def run_trials(
    model: PreTrainedModel,
    trials: Sequence[Trial],
    data: Batches,
    *,
    next_tokens: bool,
    similarity: bool,
    repeats: int,
    hide: bool | None,
) -> None:
    """Let each trial answer and be timed.

    The first pass goes batch by batch through all trials, so that only the outputs of one batch are held at a time;
    it warms everything up as well. Then whole passes are timed: each trial once a round, in an order drawn anew.

    Parameters
    ----------
    model
        In inference.
    trials
        The first is the plain model; those whose hits others take come before them.
    data
        Inputs and labels of each batch.
    next_tokens
        As for :func:`compare_outputs`.
    similarity
        Whether to measure how similar what is reused is; the model then runs once more, with eager attention.
    repeats
        Timed passes of each.
    hide
        As tqdm is told.
    """
    timed = [trial for trial in trials if trial.timed]
    with tqdm(
        total=(len(trials) + repeats * len(timed)) * len(data), desc="evaluating", unit="batch", disable=hide
    ) as bar:
        for number, (inputs, labels) in enumerate(data):
            plain: Any = None
            for trial in trials:
                trial.start(number)
                if trial.kind == "oracle":
                    _look(model, trial, inputs, similarity)  # chooses, for which it needs an eager model
                with trial.running(model):
                    output = model(**inputs)
                plain = output if plain is None else plain
                trial.outcomes.append(compare_outputs(output, plain, inputs, labels, next_tokens=next_tokens))
                del output  # before the next one is made: logits of a vocabulary are large
                if similarity and trial.memo is not None and trial.timed and trial.kind != "oracle":
                    _look(model, trial, inputs, similarity)
                bar.update()
        draw = np.random.default_rng(0)
        for _ in range(repeats):
            # In another order each time: what ran before, an eager pass above all, leaves its marks on the next.
            for place in draw.permutation(len(timed)):
                _time(model, timed[place], data, bar)


def _look(model: PreTrainedModel, trial: Trial, inputs: dict[str, Any], similarity: bool) -> None:
    """Run once with eager attention, and see what is reused beside what would have been computed."""
    assert trial.memo is not None
    assert trial.reuse is not None
    fidelity = Fidelity(trial.reuse)
    trial.memo.replace = fidelity if similarity else trial.reuse
    try:
        with trial.running(model), attention_implementation(model, "eager"):
            model(**inputs)
    finally:
        trial.memo.replace = trial.reuse
    trial.scores += fidelity.scores


def _time(model: PreTrainedModel, trial: Trial, data: Batches, bar: Any) -> None:
    if trial.memo is not None:
        trial.memo.reset_stats()
    with trial.running(model):
        began = perf_counter()
        for number, (inputs, _) in enumerate(data):
            trial.start(number)
            model(**inputs)
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        trial.seconds.append(perf_counter() - began)
    bar.update(len(data))
    if trial.memo is not None:
        trial.stats = trial.memo.stats()
        del trial.stats["reuse"]  # of the store's handle, which all trials share
