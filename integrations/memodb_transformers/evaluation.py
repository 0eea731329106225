"""Memoized and unmemoized model side by side: accuracy, agreement, memoization rate, time."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from .capture import attention_implementation, in_inference, model_inputs
from .card import ModelCard
from .choices import asked_profiles, check_lookup, resolve_thresholds
from .embedding import Embedder
from .errors import InvalidBatchError
from .memoize import Memo
from .recorder import batch_shape
from .reports import hide_bar, markdown_table
from .sites import find_memoizable
from .store import open_stores

__all__ = ["EvaluationReport", "evaluate"]

_KINDS = ("plain", "nearest")
_COLUMNS = (
    "kind", "level", "accuracy", "agreement", "perplexity", "memoization_rate", "similarity", "seconds",
    "speedup_vs_plain", "speedup_vs_eager", "bytes",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class EvaluationReport:
    """What :func:`evaluate` found.

    Attributes
    ----------
    rows
        One dict for each kind and level, with the columns of :func:`evaluate`.
    stats
        ``Memo.stats()`` of the last pass over the data, by level.
    sequences, repeats
        Sequences in a pass, and timed passes of each row.
    """

    rows: tuple[dict[str, Any], ...]
    stats: dict[str, dict[str, Any]]
    sequences: int
    repeats: int

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain types."""
        return {
            "rows": [dict(row) for row in self.rows],
            "stats": self.stats,
            "sequences": self.sequences,
            "repeats": self.repeats,
        }

    def to_markdown(self) -> str:
        """Return the report as Markdown."""
        return markdown_table(_COLUMNS, [[row[column] for column in _COLUMNS] for row in self.rows])


def evaluate(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Any]],
    path: str | os.PathLike[str],
    *,
    levels: Sequence[str] = ("conservative", "moderate", "aggressive"),
    kinds: Sequence[str] = _KINDS,
    layers: str | Sequence[int] = "profiled",
    lookup: str = "layer",
    length_tolerance: int = 0,
    embedder: Embedder | None = None,
    repeats: int = 3,
    progress: bool | None = None,
) -> EvaluationReport:
    """Run a model with and without memoization over the same batches.

    A first, untimed pass of each kind takes the predictions and warms everything up. Then each kind is timed
    ``repeats`` times in turn; ``seconds`` is the median of whole passes, with everything a caller pays for inside:
    embedding, search, gather, attention, the rest of the model.

    Parameters
    ----------
    model, path
        A model and the store that was built of it.
    batches
        Dicts of ``input_ids``, ``attention_mask`` and, for accuracy, ``labels`` [n].
    levels, layers, lookup, length_tolerance, embedder
        As in :func:`memoize`.
    kinds
        ``"plain"`` (no memoization) and ``"nearest"`` (the nearest record within the threshold).
    repeats
        Timed passes.
    progress
        Progress bars: True, False, or None for where a terminal is.

    Returns
    -------
    EvaluationReport
        Rows with ``kind``, ``level``, ``accuracy``, ``agreement`` (share of predictions equal to the plain model's),
        ``perplexity`` (None yet), ``memoization_rate`` (Eq. 2), ``similarity`` (None yet), ``seconds``,
        ``speedup_vs_plain``, ``speedup_vs_eager`` (against the model with eager attention), ``bytes`` (logical size of
        the store). None where a column does not apply.

    Raises
    ------
    ValueError
        A kind or level is unknown, or ``repeats`` is below 1.
    InvalidBatchError
        There are no batches.
    UnsupportedModelError, StoreMismatchError, MemoizationActiveError
        As in :func:`memoize`.
    """
    unknown = [kind for kind in kinds if kind not in _KINDS]
    if unknown:
        raise ValueError(f"expected kinds out of {', '.join(_KINDS)}; found {', '.join(map(repr, unknown))}")
    if repeats < 1:
        raise ValueError(f"expected repeats of at least 1; found {repeats}")
    sites = find_memoizable(model)
    data = [(model_inputs(batch, model.device), batch.get("labels")) for batch in batches]
    if not data:
        raise InvalidBatchError("expected at least one batch; found none")
    with open_stores(path, ModelCard.of(sites), embedder) as stores, in_inference(model):
        check_lookup(stores, lookup, length_tolerance)
        shortest = min(batch_shape(inputs)[1] for inputs, _ in data)
        if shortest > max(stores):
            raise InvalidBatchError(
                f"expected batches padded to at most {max(stores)} tokens, as the store's; found none below {shortest}"
            )
        memos = {
            level: Memo(
                sites,
                stores,
                resolve_thresholds(stores, level, None, layers, lookup),
                lookup=lookup,
                length_tolerance=length_tolerance,
                profiles=asked_profiles(stores, layers),
            )
            for level in (levels if "nearest" in kinds else ())
        }
        runs: dict[tuple[str, str | None], Any] = {("plain", None): None, ("eager", None): None}
        runs |= {("nearest", level): memo for level, memo in memos.items()}
        predictions: dict[tuple[str, str | None], list[Tensor]] = {}
        seconds: dict[tuple[str, str | None], list[float]] = {run: [] for run in runs}
        stats: dict[str, dict[str, Any]] = {}
        with tqdm(total=len(runs) * (repeats + 1), desc="evaluating", unit="pass", disable=hide_bar(progress)) as bar:
            for turn in range(repeats + 1):
                for run, memo in runs.items():
                    with ExitStack() as stack:
                        if memo is not None:
                            memo.reset_stats()
                            stack.enter_context(memo.attached())
                        if run[0] == "eager":
                            stack.enter_context(attention_implementation(model, "eager"))
                        began = perf_counter()
                        # Logits only: whole outputs of a pass (hidden states, caches) may not fit into memory.
                        outputs = [getattr(model(**inputs), "logits", None) for inputs, _ in data]
                        if model.device.type == "cuda":
                            torch.cuda.synchronize(model.device)
                        if turn:
                            seconds[run].append(perf_counter() - began)
                    if not turn:
                        predictions[run] = _predictions(outputs)
                    if memo is not None:
                        stats[str(run[1])] = memo.stats()
                    bar.update()
        record_bytes = sum(len(store.db) * store.db.spec.nbytes for store in stores.values())
    medians = {run: statistics.median(times) for run, times in seconds.items()}
    plain, eager = ("plain", None), ("eager", None)
    rows = []
    for run in runs:
        kind, level = run
        if kind not in kinds:
            continue
        rows.append(
            {
                "kind": kind,
                "level": level,
                "accuracy": _accuracy(predictions[run], [labels for _, labels in data]),
                "agreement": _agreement(predictions[run], predictions[plain]),
                "perplexity": None,
                "memoization_rate": stats[level]["memoization_rate"] if level else None,
                "similarity": None,
                "seconds": medians[run],
                "speedup_vs_plain": medians[plain] / medians[run],
                "speedup_vs_eager": medians[eager] / medians[run],
                "bytes": record_bytes if level else None,
            }
        )
    sequences = sum(batch_shape(inputs)[0] for inputs, _ in data)
    return EvaluationReport(tuple(rows), stats, sequences, repeats)


def _predictions(logits: list[Any]) -> list[Tensor]:
    """Most likely class of each sequence, batch by batch; empty for models that do not choose between classes."""
    return [
        scores.argmax(dim=-1).cpu()
        for scores in logits
        if isinstance(scores, Tensor) and scores.dim() == 2 and scores.shape[-1] > 1
    ]


def _accuracy(predicted: list[Tensor], labels: list[Any]) -> float | None:
    if len(predicted) != len(labels) or not all(map(_is_class, predicted, labels)):
        return None
    right = sum(int((p == label.cpu()).sum()) for p, label in zip(predicted, labels, strict=True))
    return right / sum(len(p) for p in predicted)


def _is_class(predicted: Tensor, label: Any) -> bool:
    return isinstance(label, Tensor) and label.shape == predicted.shape and not label.is_floating_point()


def _agreement(predicted: list[Tensor], plain: list[Tensor]) -> float | None:
    if not plain:
        return None
    same = sum(int((p == q).sum()) for p, q in zip(predicted, plain, strict=True))
    return same / sum(len(q) for q in plain)
