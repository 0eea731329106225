"""Run a model over batches and put what its attention layers compute into one memo store."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

import memodb

from .capture import Visit, attention_implementation, attention_visits, whole_inputs
from .embedding import Embedder, make_keys, usable_keys
from .errors import InvalidBatchError, UnsupportedModelError
from .forward import Ints, Spans, find_spans, present, roll_front
from .lookup import namespace
from .sites import ModelSites

__all__ = ["Recorder", "batch_shape", "canonical", "count_sequences", "cut_rows", "spans_of"]

# All layers of a sequence go into one put, so that their ids are consecutive; a batch is cut to keep these together
# below this many bytes.
_PUT_BYTES = 512 << 20


class Recorder:
    """Fills the database of one store, sequence by sequence, and can go on where it was cut off.

    Parameters
    ----------
    model, sites
        The model and its attention layers.
    path
        Folder of the store; it is made with the first record.
    shape
        Shape of a record.
    padded_length
        L of the records.
    target, store_dtype, backend, options
        As in :func:`memodb_transformers.build`.
    embedder
        What makes the keys.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sites: ModelSites,
        path: Path,
        shape: tuple[int, ...],
        padded_length: int,
        *,
        target: str,
        store_dtype: str,
        backend: str,
        options: Mapping[str, Any],
        embedder: Embedder,
    ) -> None:
        self.path = path
        self.sequences = self.skipped = 0
        self._model, self._sites = model, sites
        self._shape, self._padded_length = shape, padded_length
        self._target, self._dtype = target, _dtype(store_dtype)
        self._settings = {
            "shape": shape,
            "dtype": store_dtype,
            "key_dim": embedder.key_dim,
            "backend": backend,
            **options,
        }
        self._embedder = embedder
        self._received: list[int] = []
        self._spans: Spans | None = None
        self._keys = np.zeros((0, 0, 0), dtype=np.float32)  # [n, layers, key_dim]
        self._records = torch.zeros(0)  # [n, layers, *shape]

    def run(
        self,
        parts: Sequence[tuple[dict[str, Any], Spans, Ints]],
        done: Mapping[str, int] | None,
        note: Callable[[dict[str, int]], None],
        bar: Any,
    ) -> dict[str, int]:
        """Record batches.

        Parameters
        ----------
        parts
            Inputs, where their sequences lie, and which rows are recorded.
        done
            What ``note`` was last told by a run that was cut off.
        note
            Told after each put what is done.
        bar
            Progress, in sequences.

        Returns
        -------
        dict
            ``steps``, ``next_id``, ``sequences`` recorded, ``skipped`` because their hidden states are not finite.
        """
        state = dict(done or {"steps": 0, "next_id": 0, "sequences": 0, "skipped": 0})
        self.sequences, self.skipped = state["sequences"], state["skipped"]
        step = max(1, _PUT_BYTES // (int(np.prod(self._shape)) * self._dtype.itemsize * len(self._sites.layers)))
        number = 0
        with self._database(state["next_id"]) as db:
            for inputs, spans, rows in parts:
                for start in range(0, len(rows), step):
                    chosen = rows[start : start + step]
                    number += 1
                    bar.update(len(chosen))
                    if number <= state["steps"]:
                        continue
                    self._record(db, cut_rows(inputs, chosen, len(spans)), spans.take(chosen))
                    state = {
                        "steps": number,
                        "next_id": db.stats()["next_id"],
                        "sequences": self.sequences,
                        "skipped": self.skipped,
                    }
                    note(state)
        return state

    def _database(self, next_id: int) -> memodb.MemoDB:
        """Make the database, or open that of a run that was cut off, without what it did not note."""
        if not next_id:
            shutil.rmtree(self.path, ignore_errors=True)
            return memodb.MemoDB.create(self.path, **self._settings)
        db = memodb.MemoDB.open(self.path, mode="r+")
        ids = db.ids()
        db.delete(ids[ids >= next_id])
        db.compact()
        return db

    def _record(self, db: memodb.MemoDB, inputs: dict[str, Any], spans: Spans) -> None:
        """Run the model over some sequences, and put the records of all its layers."""
        n, layers = len(spans), len(self._sites.layers)
        self._spans = spans
        self._records = torch.empty((n, layers, *self._shape), dtype=self._dtype)
        self._keys = np.empty((n, layers, self._embedder.key_dim), dtype=np.float32)
        inputs = whole_inputs(inputs, self._model.device, self._sites)
        with (
            attention_implementation(self._model, "eager"),
            attention_visits(self._sites, self._receive, probabilities=self._target == "probs"),
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
        ids = db.put(records.flatten(0, 1), self._keys[usable].reshape(n * layers, -1), namespace=names)
        assert np.array_equal(ids, np.arange(ids[0], ids[0] + len(ids)))
        self.sequences += n

    def _receive(self, visit: Visit) -> None:
        assert self._spans is not None
        layer, spans = visit.site.layer, self._spans
        self._received.append(layer)
        lengths = torch.from_numpy(spans.lengths)
        self._keys[:, layer] = make_keys(self._embedder, layer, roll_front(visit.hidden, spans.starts), lengths)
        self._records[:, layer].copy_(canonical(visit, spans, self._padded_length, self._target))


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


def count_sequences(batches: Iterable[Mapping[str, Any]]) -> int:
    """Count the sequences of batches."""
    return sum(batch_shape(batch)[0] for batch in batches)


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


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name)
    assert isinstance(found, torch.dtype)
    return found


def cut_rows(inputs: Mapping[str, Any], chosen: Ints, rows: int) -> dict[str, Any]:
    """Take some rows of all inputs that have one for each sequence."""
    return {
        name: value[torch.from_numpy(chosen).to(value.device)]
        if isinstance(value, Tensor) and value.dim() > 0 and len(value) == rows
        else value
        for name, value in inputs.items()
    }
