"""What reuse changes in a model's outputs, sequence by sequence, beside the plain model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from .errors import InvalidBatchError
from .outcomes import usable_labels
from .recorder import batch_shape
from .sites import ModelSites

__all__ = ["METRICS", "Change", "Judge", "predicts_next"]

METRICS = ("accuracy", "agreement", "perplexity")

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """What a way to reuse costs.

    Attributes
    ----------
    loss
        Points of accuracy or agreement lost, or percent of perplexity gained.
    error
        Standard error of that.
    damage
        Mean absolute change of the log-probability of what the plain model says, or of the next token: it tells ways
        apart that change no prediction yet.
    sequences
        Sequences it rests on.
    """

    loss: float
    error: float
    damage: float
    sequences: int

    def upper(self, z: float) -> float:
        """Bound the loss from above, ``z`` standard errors away."""
        return self.loss + z * self.error


def predicts_next(model: PreTrainedModel, sites: ModelSites) -> bool:
    """Tell whether a model's scores ``[n, L, V]`` are of the next token: classifiers have causal attention, too."""
    return bool(sites.family.causal and model.can_generate())


class Judge:
    """Keeps what the plain model says of each batch, and compares with it.

    Parameters
    ----------
    metric
        ``"accuracy"``, ``"agreement"`` or ``"perplexity"``; None: accuracy where there are labels, perplexity for
        causal language models, agreement otherwise.
    causal
        Whether scores of ``[n, L, V]`` are of the next token.
    """

    def __init__(self, metric: str | None, *, causal: bool) -> None:
        if metric is not None and metric not in METRICS:
            raise ValueError(f"expected metric to be one of {', '.join(METRICS)}; found {metric!r}")
        self.metric = metric
        self._causal = causal
        self._settled = False
        self._plain: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def settle(self, logits: Any, batches: Sequence[Mapping[str, Any]]) -> None:
        """Choose the metric, from what a model says of the first batch and from the labels of all.

        Parameters
        ----------
        logits
            Of the first batch.
        batches
            All that will be judged.

        Raises
        ------
        InvalidBatchError
            The outputs, or the labels of some batch, cannot be judged.
        """
        scores = _scores(logits)
        following = self._causal and scores.dim() == 3
        if self.metric == "perplexity" and not following:
            raise InvalidBatchError("expected a causal language model for a budget on perplexity; found another model")
        if self.metric is None and following:
            self.metric = "perplexity"
        if self.metric in (None, "accuracy"):
            given = [_labels_of(batch, scores) for batch in batches if batch.get("labels") is not None]
            if self.metric is None:
                self.metric = "accuracy" if any(bool((labels >= 0).any()) for labels in given) else "agreement"
            if self.metric == "accuracy" and len(given) < len(batches):
                raise InvalidBatchError(
                    f"expected labels in every batch for a budget on accuracy; found {len(batches) - len(given)} of "
                    f"{len(batches)} batches without: give them all, or none for a budget on agreement "
                    "(metric='agreement')"
                )
        self._settled = True

    def remember(self, number: int, logits: Any, batch: Mapping[str, Any]) -> None:
        """Keep what the plain model says of a batch; the first one settles the metric if nothing did."""
        if not self._settled:
            self.settle(logits, [batch])
        scores, _, labels, following = self._read(logits, batch)
        said = scores.argmax(dim=-1)
        reference = self._next(batch, labels) if following else said
        self._plain[number] = (said, _log_probability(scores, reference), reference)

    def compare(self, number: int, logits: Any, batch: Mapping[str, Any]) -> Floats:
        """Compare a batch: ``[n, 3]`` of what is lost, what is damaged, and how many tokens that is summed over."""
        scores, valid, labels, _ = self._read(logits, batch)
        said, confidence, reference = self._plain[number]
        now = _log_probability(scores, reference)
        if labels is not None and self.metric != "agreement":
            valid = valid & (labels >= 0)
        if self.metric == "perplexity":
            lost = confidence - now
        else:
            right = said if self.metric == "agreement" else labels
            assert right is not None
            lost = (said == right).double() - (scores.argmax(dim=-1) == right).double()
        parts = [lost, (now - confidence).abs(), torch.ones_like(now)]
        found: Floats = torch.stack(
            [torch.where(valid, part.double(), 0.0).sum(dim=1) for part in parts], dim=1
        ).numpy()
        return found

    def sum(self, parts: list[Floats]) -> Change:
        """Sum up all batches: a ratio of sums over sequences, its error by linearisation."""
        lost, damaged, counts = np.concatenate(parts).T
        n, total = len(lost), float(counts.sum())
        if not total:
            raise InvalidBatchError("expected sequences with tokens that can be judged; found none")
        rate = float(lost.sum()) / total
        # One change more than was seen: none among few sequences does not say that there are none.
        residual = float(((lost - rate * counts) ** 2).sum()) + float((counts**2).mean()) * (
            self.metric != "perplexity"
        )
        error = math.sqrt(residual) / total
        if self.metric == "perplexity":
            factor = math.exp(min(rate, 50.0))
            return Change(100.0 * (factor - 1.0), 100.0 * factor * error, float(damaged.sum()) / total, n)
        return Change(100.0 * rate, 100.0 * error, float(damaged.sum()) / total, n)

    def _read(self, logits: Any, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor | None, bool]:
        """Return scores ``[n, tokens, classes]``, which tokens count, labels if any is one, and whether they follow."""
        scores = _scores(logits)
        following = self._causal and scores.dim() == 3
        whole = scores[:, None] if scores.dim() == 2 else scores
        valid = torch.ones(whole.shape[:2], dtype=torch.bool)
        mask = batch.get("attention_mask")
        if scores.dim() == 3 and mask is not None:
            valid = mask.cpu().ne(0)
        labels = None
        if self.metric == "accuracy":
            labels = _labels_of(batch, scores)
        elif self.metric == "perplexity":
            labels = usable_labels(batch.get("labels"), scores.shape[:-1])  # otherwise the input is followed
            if labels is not None:
                _check_classes(labels, scores)
        if labels is not None:
            labels = labels.cpu()[:, None] if scores.dim() == 2 else labels.cpu()
        if following:
            # Negative labels are none: -100 is left out by custom.
            if labels is not None and self.metric == "perplexity" and not bool((labels >= 0).any()):
                labels = None
            return whole[:, :-1], valid[:, :-1] & valid[:, 1:], None if labels is None else labels[:, 1:], True
        return whole, valid, labels, False

    @staticmethod
    def _next(batch: Mapping[str, Any], labels: Tensor | None) -> Tensor:
        """Tell the tokens that follow: as evaluation does, those of the labels where they are given."""
        ids: Tensor = batch["input_ids"].cpu()[:, 1:]
        return ids if labels is None else torch.where(labels >= 0, labels, ids)


def _scores(logits: Any) -> Tensor:
    """Take logits ``[n, classes]`` or ``[n, tokens, classes]``."""
    if not isinstance(logits, Tensor) or logits.dim() not in (2, 3) or logits.shape[-1] < 2:
        raise InvalidBatchError(
            "expected a model whose output has logits of classes or tokens, so that a change can be judged; found "
            f"{list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__}"
        )
    return logits.detach().float().cpu()


def _labels_of(batch: Mapping[str, Any], scores: Tensor) -> Tensor:
    """Take the labels of a batch of a model with such scores; what is no class number is refused."""
    told = any(batch.get(name) is not None for name in ("input_ids", "inputs_embeds"))
    rows, padded = batch_shape(batch) if told else scores.shape[:2]
    wanted = [rows] if scores.dim() == 2 else [rows, padded]
    labels = batch.get("labels")
    found = usable_labels(labels, wanted)
    if found is None:
        kind = f"{labels.dtype} {list(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        raise InvalidBatchError(
            f"expected labels to be a tensor of class numbers of shape {wanted}; found {kind}: give such labels, or "
            "leave them out, and the budget is one of agreement with the plain model's predictions"
        )
    _check_classes(found, scores)
    return found


def _check_classes(labels: Tensor, scores: Tensor) -> None:
    """Refuse labels of classes that the model does not tell apart."""
    classes = scores.shape[-1]
    if labels.numel() and int(labels.max()) >= classes:
        raise InvalidBatchError(
            f"expected labels below {classes}, as the model tells so many classes apart; found {int(labels.max())}"
        )


def _log_probability(scores: Tensor, chosen: Tensor) -> Tensor:
    """Log-probability of one class or token of each row, without keeping those of all."""
    picked: Tensor = scores.gather(-1, chosen[..., None])[..., 0] - scores.logsumexp(dim=-1)
    return picked
