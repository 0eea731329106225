"""Run a model over batches and put what its attention layers compute into one memo store."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

import memodb

from .capture import Visit, attention_implementation, attention_visits
from .card import ModelCard
from .embedding import Embedder, RandomProjection, make_keys, usable_keys
from .errors import InvalidBatchError, UnsupportedModelError
from .forward import Ints, Spans, find_spans, present, roll_front
from .lookup import namespace
from .sites import ModelSites
from .store import record_shape, write_store

__all__ = ["Recorder", "batch_shape", "canonical", "make_embedder", "spans_of"]

# Every tenth sequence, up to this many, is kept out of the store: thresholds calibrated on records that find
# themselves would be worthless.
_HOLD_OUT_EVERY = 10
_HOLD_OUT_MOST = 256

# All layers of a sequence go into one put, so that their ids are consecutive; a batch is cut to keep these together
# below this many bytes.
_PUT_BYTES = 512 << 20


class Recorder:
    """The build of one store. The database is opened at the first sequence that can be recorded.

    Parameters
    ----------
    model, sites, card
        The model, its attention layers, and its description.
    path
        Folder of the store.
    padded_length
        L of the records.
    target, store_dtype, backend, options
        As in :func:`memodb_transformers.build`.
    embedder
        What makes the keys.
    hold_out
        Whether to keep every tenth sequence out of the store.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sites: ModelSites,
        card: ModelCard,
        path: Path,
        padded_length: int,
        *,
        target: str,
        store_dtype: str,
        backend: str,
        options: Mapping[str, Any],
        embedder: Embedder,
        hold_out: bool,
    ) -> None:
        self.path = path
        self.card = card
        self.padded_length = padded_length
        self.shape = record_shape(self.card, padded_length, target)
        self.sequences = self.skipped = self.bytes = self.batch_size = 0
        self.held_out: list[dict[str, Any]] = []
        self._model, self._sites = model, sites
        self.target, self.store_dtype = target, store_dtype
        self._backend, self._options = backend, options
        self.embedder = embedder
        self._db: memodb.MemoDB | None = None
        self._seen = 0
        self._hold_out = hold_out
        self._received: list[int] = []
        self._spans: Spans | None = None
        self._keys = np.zeros((0, 0, 0), dtype=np.float32)  # [n, layers, key_dim]
        self._records = torch.zeros(0)  # [n, layers, *shape]

    @property
    def held(self) -> int:
        """Sequences held out so far."""
        return sum(len(next(iter(batch.values()))) for batch in self.held_out)

    def run(self, inputs: dict[str, Any]) -> None:
        """Record one batch of inputs of the model."""
        rows, _ = batch_shape(inputs)
        spans = spans_of(inputs)
        self.batch_size = max(self.batch_size, rows)
        keep = self._select(inputs, spans)
        if len(keep) and self._db is None:
            self._db = memodb.MemoDB.create(
                self.path,
                shape=self.shape,
                dtype=self.store_dtype,
                key_dim=self.embedder.key_dim,
                backend=self._backend,
                **self._options,
            )
        record_bytes = int(np.prod(self.shape)) * _dtype(self.store_dtype).itemsize
        step = max(1, _PUT_BYTES // (record_bytes * len(self._sites.layers)))
        for start in range(0, len(keep), step):
            chosen = keep[start : start + step]
            self._record(_cut(inputs, chosen, rows), spans.take(chosen))

    def finish(self) -> None:
        """Close the database and write what makes it a memo store."""
        assert self._db is not None
        self._db.close()
        self.held_out = _regroup(self.held_out, self.batch_size)
        write_store(self.path, self.card, self.padded_length, self.store_dtype, self.target, self.embedder)

    def undo(self) -> None:
        """Remove what this build wrote."""
        if self._db is not None:
            self._db.close()
            shutil.rmtree(self.path, ignore_errors=True)

    def _record(self, inputs: dict[str, Any], spans: Spans) -> None:
        """Run the model over some sequences, and put the records of all its layers."""
        assert self._db is not None
        n, layers = len(spans), len(self._sites.layers)
        self._spans = spans
        self._records = torch.empty((n, layers, *self.shape), dtype=_dtype(self.store_dtype))
        self._keys = np.empty((n, layers, self.embedder.key_dim), dtype=np.float32)
        if self._sites.family.caches:
            inputs.setdefault("use_cache", False)
        with (
            attention_implementation(self._model, "eager"),
            attention_visits(self._sites, self._receive, probabilities=self.target == "probs"),
        ):
            self._received.clear()
            self._model(**inputs)
        if sorted(self._received) != list(range(layers)):
            raise UnsupportedModelError(
                f"expected each of the {layers} attention layers to run once in a forward; found layers "
                f"{self._received} to run: nothing of the others could be recorded"
            )
        # A sequence whose hidden states are not finite cannot be found again.
        usable = usable_keys(self._keys.reshape(n * layers, -1)).reshape(n, layers).all(axis=1)
        self.skipped += int((~usable).sum())
        n, spans = int(usable.sum()), spans.take(np.flatnonzero(usable))
        if not n:
            return
        names = [namespace(layer, length) for length in spans.lengths.tolist() for layer in range(layers)]
        records = self._records if usable.all() else self._records[torch.from_numpy(usable)]
        ids = self._db.put(records.flatten(0, 1), self._keys[usable].reshape(n * layers, -1), namespace=names)
        assert np.array_equal(ids, np.arange(ids[0], ids[0] + len(ids)))
        self.sequences += n
        self.bytes += records.nbytes

    def _receive(self, visit: Visit) -> None:
        assert self._spans is not None
        layer, spans = visit.site.layer, self._spans
        self._received.append(layer)
        lengths = torch.from_numpy(spans.lengths)
        self._keys[:, layer] = make_keys(self.embedder, layer, roll_front(visit.hidden, spans.starts), lengths)
        self._records[:, layer].copy_(canonical(visit, spans, self.padded_length, self.target))

    def _select(self, inputs: dict[str, Any], spans: Spans) -> Ints:
        """Choose the rows to record; every tenth usable one goes to the held-out batches instead."""
        usable = np.flatnonzero(spans.lengths > 0)
        self.skipped += len(spans) - len(usable)
        numbers = np.arange(self._seen, self._seen + len(usable))
        self._seen += len(usable)
        if not self._hold_out:
            return usable
        candidates = usable[numbers % _HOLD_OUT_EVERY == _HOLD_OUT_EVERY - 1][: _HOLD_OUT_MOST - self.held]
        if len(candidates):
            part = _cut(inputs, candidates, len(spans))
            tensors = {name: value.cpu() for name, value in part.items() if isinstance(value, Tensor) and value.dim()}
            self.held_out.append({name: _each(value, len(candidates)) for name, value in tensors.items()})
        return np.setdiff1d(usable, candidates)


def canonical(visit: Visit, spans: Spans, padded_length: int, target: str) -> Tensor:
    """Turn what a layer computed into records: tokens from 0 on, nothing in the columns of padding.

    Rows of padding are kept as the model computed them: a model goes on with them, and so does a hit. Where they mean
    nothing (a causal model's padding on the left, and DeBERTa's) they are zero.

    Returns
    -------
    Tensor
        ``[n, heads, padded_length, padded_length]``, or ``[n, padded_length, heads * head_dim]`` for contexts.
    """
    wider = padded_length - spans.padded
    if target == "context":
        return torch.nn.functional.pad(roll_front(visit.context, spans.starts), (0, 0, 0, wider))
    probabilities = visit.probabilities
    assert probabilities is not None
    family = visit.site.family
    records = roll_front(roll_front(probabilities, spans.starts, 2), spans.starts, 3)
    tokens = present(torch.from_numpy(spans.lengths).to(records.device), spans.padded)  # [n, L]
    rows = tokens
    if not family.masks_rows:
        on_the_right = torch.from_numpy(spans.starts == 0).to(records.device)[:, None]
        rows = tokens | on_the_right if family.causal else torch.ones_like(tokens)
    records = torch.where(rows[:, None, :, None] & tokens[:, None, None, :], records, 0.0)
    if family.causal:
        records = records.tril()
    return torch.nn.functional.pad(records, (0, wider, 0, wider))


def batch_shape(inputs: Mapping[str, Any]) -> tuple[int, int]:
    """Tell ``(rows, padded length)`` of a batch.

    Raises
    ------
    InvalidBatchError
        Its ids are of another shape than ``[n, L]``.
    """
    source = inputs.get("input_ids") if inputs.get("input_ids") is not None else inputs.get("inputs_embeds")
    if not isinstance(source, Tensor) or source.dim() < 2:
        found = list(source.shape) if isinstance(source, Tensor) else type(source).__name__
        raise InvalidBatchError(f"expected input_ids of shape [n, L]; found {found}")
    return int(source.shape[0]), int(source.shape[1])


def spans_of(inputs: Mapping[str, Any]) -> Spans:
    """Tell where the sequences of a batch lie.

    Raises
    ------
    InvalidBatchError
        The attention mask or the position ids are of another shape.
    """
    rows, padded = batch_shape(inputs)
    spans = find_spans(inputs.get("attention_mask"), rows, padded, inputs.get("position_ids"))
    if spans is None:
        raise InvalidBatchError(f"expected an attention_mask of shape [{rows}, {padded}], or none")
    return spans


def make_embedder(embedder: str | Embedder, padded_length: int, sites: ModelSites, key_dim: int, seed: int) -> Embedder:
    """Make the embedder of a store, unless it is there already."""
    if isinstance(embedder, str):
        return RandomProjection.create(padded_length, sites.hidden_size, key_dim=key_dim, seed=seed)
    longest = getattr(embedder, "padded_length", padded_length)
    if longest < padded_length:
        raise ValueError(
            f"expected an embedder of sequences of {padded_length} tokens; found one of at most {longest} tokens"
        )
    return embedder


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name)
    assert isinstance(found, torch.dtype)
    return found


def _cut(inputs: Mapping[str, Any], chosen: Ints, rows: int) -> dict[str, Any]:
    """Take some rows of all inputs that have one for each sequence."""
    return {
        name: value[torch.from_numpy(chosen).to(value.device)]
        if isinstance(value, Tensor) and value.dim() > 0 and len(value) == rows
        else value
        for name, value in inputs.items()
    }


def _each(value: Tensor, rows: int) -> Tensor:
    """Give each sequence its own row of what all of them share."""
    return value.expand(rows, *value.shape[1:]) if len(value) == 1 else value


def _regroup(batches: list[dict[str, Any]], rows: int) -> list[dict[str, Any]]:
    """Join the few held-out rows of each batch into batches of the usual size: costs depend on it."""
    shapes = {tuple((name, value.shape[1:]) for name, value in sorted(batch.items())) for batch in batches}
    if len(shapes) != 1:
        return batches  # nothing held out, or inputs that differ from batch to batch
    joined = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    count = len(next(iter(joined.values())))
    return [{name: value[start : start + rows] for name, value in joined.items()} for start in range(0, count, rows)]
