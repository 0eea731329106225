"""Which sequences of the data go where, before a model has run: into the store, or kept out to profile and to tune."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .capture import model_inputs
from .errors import InvalidBatchError
from .forward import Ints, Spans
from .recorder import batch_shape, count_sequences, cut_rows, spans_of
from .store import smallest_fitting

__all__ = ["Share", "share_out"]

# Of ten sequences one is kept out to profile with and, where thresholds are tuned, another one to tune with: what is
# calibrated on records that find themselves would be worthless.
_EVERY = 10
_PROFILED, _PROFILED_MOST = 9, 256
_TUNED, _TUNED_MOST = 4, 2048


@dataclass
class Share:
    """The sequences of one store.

    Attributes
    ----------
    padded_length
        L of its records.
    recorded
        Batches of inputs, and which rows of each are recorded.
    profiled, tuned
        Batches that are kept out; those to tune with have their labels.
    batch_size
        Rows of the largest batch.
    skipped
        Sequences whose tokens have holes.
    """

    padded_length: int
    recorded: list[tuple[dict[str, Any], Spans, Ints]] = field(default_factory=list)
    profiled: list[dict[str, Any]] = field(default_factory=list)
    tuned: list[dict[str, Any]] = field(default_factory=list)
    batch_size: int = 0
    skipped: int = 0
    seen: int = 0

    @property
    def sequences(self) -> int:
        """Sequences to record."""
        return sum(len(rows) for _, _, rows in self.recorded)

    def sample(self, most: int, seed: int) -> list[dict[str, Any]]:
        """Draw some of the sequences to record, as batches of the usual size."""
        random = np.random.default_rng(seed)
        chosen = np.sort(random.permutation(self.sequences)[:most])
        parts, before = [], 0
        for inputs, spans, rows in self.recorded:
            here = rows[chosen[(chosen >= before) & (chosen < before + len(rows))] - before]
            before += len(rows)
            if len(here):
                parts.append(_tensors(inputs, here, len(spans)))
        return _regroup(parts, self.batch_size)


def share_out(
    batches: Iterable[Mapping[str, Any]], lengths: Sequence[int], *, profile: bool, tune: bool
) -> tuple[dict[int, Share], int]:
    """Share out the sequences of all batches.

    Parameters
    ----------
    batches
        Dicts of tensors. They are all kept, so that they can be gone through more than once.
    lengths
        Length buckets; none: one store, of the padded length of the first batch.
    profile, tune
        Whether sequences are kept out for these.

    Returns
    -------
    dict, int
        A share for each length of records that has sequences, and the number of sequences that are longer than all.
    """
    shares: dict[int, Share] = {}
    longer = 0
    for batch in batches:
        inputs = model_inputs(batch, torch.device("cpu"))
        rows, padded = batch_shape(inputs)
        length = _bucket(padded, lengths, shares)
        if length is None:
            longer += rows
            continue
        share = shares.setdefault(length, Share(length))
        spans = spans_of(inputs)
        usable = np.flatnonzero(spans.lengths > 0)
        share.skipped += len(spans) - len(usable)
        share.batch_size = max(share.batch_size, rows)
        turns = np.arange(share.seen, share.seen + len(usable)) % _EVERY
        share.seen += len(usable)
        kept_out: list[Ints] = []
        for wanted, turn, most, parts, extra in (
            (profile, _PROFILED, _PROFILED_MOST, share.profiled, {}),
            (tune, _TUNED, _TUNED_MOST, share.tuned, _labels(batch, rows) if tune else {}),
        ):
            held = count_sequences(parts)
            chosen = usable[turns == turn][: most - held] if wanted else usable[:0]
            if len(chosen):
                parts.append(_tensors({**inputs, **extra}, chosen, rows))
            kept_out.append(chosen)
        keep = np.setdiff1d(usable, np.concatenate(kept_out))
        if len(keep):
            share.recorded.append((inputs, spans, keep))
    filled = {length: shares[length] for length in sorted(shares) if shares[length].recorded}
    if not filled:
        raise InvalidBatchError(
            "expected a batch with a sequence whose tokens lie together; found none: nothing was recorded"
        )
    for share in filled.values():
        share.profiled = _regroup(share.profiled, share.batch_size)
        share.tuned = _regroup(share.tuned, share.batch_size)
    return filled, longer


def _regroup(batches: list[dict[str, Any]], rows: int) -> list[dict[str, Any]]:
    """Join the few rows taken from each batch into batches of the usual size: costs depend on it."""
    alike: dict[Any, list[dict[str, Any]]] = {}
    for batch in batches:
        shape = tuple((name, value.shape[1:], value.dtype) for name, value in sorted(batch.items()))
        alike.setdefault(shape, []).append(batch)
    made = []
    for parts in alike.values():
        joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        count = len(next(iter(joined.values())))
        made += [
            {name: value[start : start + rows] for name, value in joined.items()} for start in range(0, count, rows)
        ]
    return made


def _bucket(padded: int, lengths: Sequence[int], shares: Mapping[int, Share]) -> int | None:
    """Choose the L of a batch's records; None: longer than all buckets."""
    if lengths:
        return smallest_fitting(lengths, padded)
    first = next(iter(shares), padded)
    if padded > first:
        raise InvalidBatchError(
            f"expected every batch padded to at most {first} tokens, as the first; found {padded}: pad to one length, "
            "for instance with padding='max_length', max_length=..., or build with buckets=(64, 128, ...)"
        )
    return first


def _labels(batch: Mapping[str, Any], rows: int) -> dict[str, Any]:
    labels = batch.get("labels")
    if labels is None:
        return {}
    if not isinstance(labels, Tensor) or not labels.dim() or len(labels) != rows:
        found = f"shape {list(labels.shape)}" if isinstance(labels, Tensor) else f"a {type(labels).__name__}"
        raise InvalidBatchError(
            f"expected labels to be a tensor with a row for each of the {rows} sequences of its batch; found {found}. "
            "Without labels it is agreement with the plain model that is kept"
        )
    return {"labels": labels.cpu()}


def _tensors(inputs: Mapping[str, Any], chosen: Ints, rows: int) -> dict[str, Any]:
    """Take some rows of all tensors; each sequence gets its own row of what all of them share."""
    part = cut_rows(inputs, chosen, rows)
    tensors = {name: value for name, value in part.items() if isinstance(value, Tensor) and value.dim()}
    return {
        name: value.expand(len(chosen), *value.shape[1:]) if len(value) == 1 else value
        for name, value in tensors.items()
    }
