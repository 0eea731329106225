"""What an embedder is trained on: hidden states of some sequences, and how similar their records are to each other."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from .capture import Visit, attention_implementation, attention_visits, whole_inputs
from .forward import Ints, Spans, present, roll_front
from .recorder import canonical, spans_of
from .similarity import Floats, context_matrix, similarity_matrix
from .sites import ModelSites

__all__ = ["LayerSample", "Samples", "sample_bytes"]

# Rows of a record that similarities are estimated from, evenly spaced: all rows of long records would take more time
# and space than they tell.
_ROWS = 32
_FILES = ("hidden", "records", "lengths")


def sample_bytes(sites: ModelSites, padded_length: int, target: str) -> int:
    """Tell the bytes that one sequence takes in a sample."""
    rows = min(_ROWS, padded_length)
    wide = sites.heads * padded_length if target == "probs" else sites.heads * sites.layers[0].head_dim
    return len(sites.layers) * (4 * padded_length * sites.hidden_size + 2 * rows * wide)


@dataclass(frozen=True, slots=True, eq=False)
class LayerSample:
    """The sample of one layer.

    Attributes
    ----------
    hidden
        float32 ``[n, L, H]``, tokens from 0 on.
    lengths
        int64 ``[n]``.
    similarities
        float32 ``[n, n]``: Eq. 1 of each record with each; NaN between sequences of different length, which are never
        compared.
    to_mean
        float32 ``[n]``: similarity of each record to the mean of the ``known`` ones of its length; NaN where there are
        none.
    known
        bool ``[n]``: those that are trained on. The others test what was learnt.
    """

    hidden: torch.Tensor
    lengths: Ints
    similarities: Floats
    to_mean: Floats
    known: NDArray[np.bool_]


class Samples:
    """Hidden states and parts of the records of some sequences, in files that memory need not hold.

    Parameters
    ----------
    folder
        Where the files are.
    """

    def __init__(self, folder: Path) -> None:
        self._hidden, self._records, self._lengths = (
            np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in _FILES
        )

    @classmethod
    def collect(
        cls,
        model: PreTrainedModel,
        sites: ModelSites,
        batches: Sequence[dict[str, Any]],
        folder: Path,
        padded_length: int,
        target: str,
        bar: Any = None,
    ) -> Samples:
        """Run the model over batches of sequences, all of which can be recorded, and keep what training needs."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        spans = [spans_of(batch) for batch in batches]
        count, layers = sum(map(len, spans)), len(sites.layers)
        rows = min(_ROWS, padded_length)
        record = (
            (sites.heads, rows, padded_length)
            if target == "probs"
            else (1, rows, sites.heads * sites.layers[0].head_dim)
        )
        hidden = _make(folder, "hidden", (layers, count, padded_length, sites.hidden_size), np.float32)
        records = _make(folder, "records", (layers, count, *record), np.float16)
        lengths = _make(folder, "lengths", (count,), np.int64)
        place = 0
        for batch, where in zip(batches, spans, strict=True):
            now = slice(place, place + len(where))
            lengths[now] = where.lengths

            def receive(visit: Visit, where: Spans = where, now: slice = now) -> None:
                layer = visit.site.layer
                state = roll_front(visit.hidden, where.starts).float().cpu()
                tokens = present(torch.from_numpy(where.lengths), state.shape[1])
                # An embedder sees nothing of padding.
                valid = torch.where(tokens[:, :, None], state, 0.0)
                hidden[layer, now, : state.shape[1]] = valid.numpy()
                whole = canonical(visit, where, padded_length, target)
                whole = whole if target == "probs" else whole[:, None]
                for row, length in enumerate(where.lengths.tolist()):
                    chosen = torch.from_numpy(_spaced(length, rows))
                    part = whole[row][:, chosen.to(whole.device)].to(torch.float16).cpu().numpy()
                    records[layer, now.start + row, :, : len(chosen)] = part

            with (
                attention_implementation(model, "eager"),
                attention_visits(sites, receive, probabilities=target == "probs"),
            ):
                model(**whole_inputs(batch, model.device, sites))
            place = now.stop
            if bar is not None:
                bar.update()
        return cls(folder)

    def __len__(self) -> int:
        return len(self._lengths)

    def layer(self, number: int, known: NDArray[np.bool_]) -> LayerSample:
        """Compare the records of one layer; ``known`` tells which sequences are trained on."""
        lengths = np.array(self._lengths, dtype=np.int64)
        records = self._records[number]
        with torch.inference_mode(mode=False):  # it is trained on
            hidden = torch.from_numpy(np.array(self._hidden[number]))
        finite = torch.isfinite(hidden).flatten(1).all(dim=1)
        hidden[~finite] = 0.0
        similar = np.full((len(lengths), len(lengths)), np.nan, dtype=np.float32)
        to_mean = np.full(len(lengths), np.nan, dtype=np.float32)
        contexts = records.shape[1] == 1
        for length in np.unique(lengths).tolist():
            members = np.flatnonzero((lengths == length) & finite.numpy())
            if not len(members):
                continue
            kept = len(_spaced(length, records.shape[2]))
            part = torch.from_numpy(records[members, :, :kept]).float()
            sound = torch.isfinite(part).flatten(1).all(dim=1)
            members, part = members[sound.numpy()], part[sound]
            compare = context_matrix if contexts else similarity_matrix
            valid = part if contexts else part[..., :length]
            similar[np.ix_(members, members)] = compare(valid, valid)
            inside = known[members]
            if inside.any():
                mean = valid[torch.from_numpy(inside)].mean(dim=0, keepdim=True)
                to_mean[members] = compare(valid, mean)[:, 0]
        return LayerSample(hidden, lengths, similar, to_mean, known)


def _spaced(length: int, rows: int) -> Ints:
    """Choose at most ``rows`` of ``length`` rows, evenly spaced."""
    return np.unique(np.linspace(0, length - 1, min(rows, length)).round().astype(np.int64))


def _make(folder: Path, name: str, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    made: NDArray[Any] = np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=dtype, shape=shape)
    # Memory or disk that is not there shall be an error here, not a signal at the first write: posix_fallocate(3).
    with (folder / f"{name}.npy").open("rb+") as file:
        os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
    return made
