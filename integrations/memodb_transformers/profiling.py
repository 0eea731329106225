"""The offline profiler: what a lookup costs, what a hit saves, and how often there would be one, layer by layer.

The performance model is Eq. 3 of the AttMemo paper, ``PB = T_attention * alpha - T_overhead``, with an honest overhead:
not only embedding and search, but also what a hit still costs (gather, V projection, product) and what it costs to
split a batch into hits and misses and to put it together again. All of these are measured by themselves, so that the
benefit can be predicted for any threshold.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from .attention import MemoAttention, find_memoizable
from .capture import attention_implementation, attention_outputs, in_inference, model_inputs
from .errors import InvalidBatchError, StoreMismatchError
from .families import AttentionSite, ModelSites
from .lengths import LengthWatch, valid_lengths
from .reports import markdown_table
from .similarity import similarity_scores
from .store import MemoStore, ModelCard, open_store, write_profile
from .thresholds import LEVELS, threshold_for

__all__ = ["LayerProfile", "ProfileReport", "profile", "profile_store"]

_REPEATS = 5
_TIMED_BATCHES = 4


@dataclass(frozen=True, slots=True)
class LayerProfile:
    """One layer's profile. Seconds are per sequence, measured in batches.

    Attributes
    ----------
    layer
        Number of the layer, from 0.
    attention_seconds
        The original attention.
    lookup_seconds
        Embedding and search.
    hit_seconds
        What a hit still costs: gather, V projection, product with V.
    split_seconds
        What a batch of both hits and misses costs beyond its parts.
    distances, similarities
        For each held-out sequence the squared L2 distance of the nearest key and the similarity (Eq. 1) of its record
        to what the layer computed; None where the store has no record of that layer and length.
    """

    layer: int
    attention_seconds: float
    lookup_seconds: float
    hit_seconds: float
    split_seconds: float
    distances: tuple[float | None, ...]
    similarities: tuple[float | None, ...]

    def threshold(self, similarity: float) -> float | None:
        """Largest distance at which the predicted similarity reaches ``similarity``, or None."""
        return threshold_for(self.distances, self.similarities, similarity)

    def alpha(self, threshold: float | None) -> float:
        """Hit rate at a threshold; None: nothing is reused."""
        if threshold is None or not self.distances:
            return 0.0
        return sum(d is not None and d <= threshold for d in self.distances) / len(self.distances)

    def overhead(self, threshold: float | None) -> float:
        """T_overhead of Eq. 3, seconds a sequence: lookup, remaining cost of the hits, splitting of batches."""
        alpha = self.alpha(threshold)
        split = self.split_seconds if 0.0 < alpha < 1.0 else 0.0
        return self.lookup_seconds + alpha * self.hit_seconds + split

    def benefit(self, threshold: float | None) -> float:
        """PB of Eq. 3, seconds saved a sequence; negative where memoizing the layer loses time."""
        return self.alpha(threshold) * self.attention_seconds - self.overhead(threshold)


@dataclass(frozen=True, slots=True)
class ProfileReport:
    """The profile of a memo store on one machine; kept beside the store.

    Attributes
    ----------
    layers
        One profile a layer.
    sequences
        Held-out sequences that it rests on.
    batch_size, threads, attention
        Sequences a batch, torch threads and attention implementation it was measured with.
    """

    layers: tuple[LayerProfile, ...]
    sequences: int
    batch_size: int
    threads: int
    attention: str

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any], path: Path) -> ProfileReport:
        """Read a report back.

        Raises
        ------
        StoreMismatchError
            The profile is damaged.
        """
        try:
            layers = tuple(
                LayerProfile(
                    layer=int(row["layer"]),
                    attention_seconds=float(row["attention_seconds"]),
                    lookup_seconds=float(row["lookup_seconds"]),
                    hit_seconds=float(row["hit_seconds"]),
                    split_seconds=float(row["split_seconds"]),
                    distances=tuple(None if d is None else float(d) for d in row["distances"]),
                    similarities=tuple(None if s is None else float(s) for s in row["similarities"]),
                )
                for row in plain["layers"]
            )
            return cls(
                layers, int(plain["sequences"]), int(plain["batch_size"]), int(plain["threads"]), plain["attention"]
            )
        except (KeyError, TypeError, ValueError) as error:
            raise StoreMismatchError(
                f"the profile of {path} is damaged ({error!r}): profile the store again"
            ) from error

    def thresholds(self, level: str) -> dict[int, float]:
        """Threshold of each layer that reaches the level's similarity at all, squared L2."""
        found = {row.layer: row.threshold(LEVELS[level]) for row in self.layers}
        return {layer: threshold for layer, threshold in found.items() if threshold is not None}

    def paying(self, thresholds: Mapping[int, float]) -> list[int]:
        """Layers whose benefit (Eq. 3) is positive at the thresholds given."""
        return [row.layer for row in self.layers if row.benefit(thresholds.get(row.layer)) > 0]

    def to_markdown(self) -> str:
        """Return the report as Markdown: the costs of each layer, and hit rate and benefit of each level."""
        header = ["layer", "attention us", "lookup us", "hit us", "split us", "similarity of nearest"]
        for level in LEVELS:
            header += [f"{level} alpha", f"{level} benefit us"]
        rows = []
        for row in self.layers:
            found = [s for s in row.similarities if s is not None]
            cells: list[object] = [row.layer]
            parts = (row.attention_seconds, row.lookup_seconds, row.hit_seconds, row.split_seconds)
            cells += [1e6 * part for part in parts]
            cells.append(statistics.fmean(found) if found else None)
            for similarity in LEVELS.values():
                threshold = row.threshold(similarity)
                cells += [row.alpha(threshold), 1e6 * row.benefit(threshold)]
            rows.append(cells)
        note = (
            f"Per sequence, from {self.sequences} held-out sequences, batches of {self.batch_size}, {self.threads} "
            f"threads, {self.attention} attention. Benefit is Eq. 3 of the AttMemo paper: above 0 the layer pays.\n"
        )
        return markdown_table(header, rows) + "\n" + note


def profile(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Any]],
    path: str | os.PathLike[str],
    *,
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
        Held-out batches, padded as the store's, of the size that will be used: costs depend on it.
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
    with open_store(path, ModelCard.of(sites)) as store:
        return profile_store(model, sites, store, list(batches), progress=progress)


def profile_store(
    model: PreTrainedModel,
    sites: ModelSites,
    store: MemoStore,
    batches: list[Any],
    *,
    progress: bool | None = None,
) -> ProfileReport:
    """Profile an open store: see :func:`profile`."""
    usable = [batch for batch in batches if _lengths(batch, store.padded_length) is not None]
    if not usable:
        raise InvalidBatchError(
            f"expected batches padded on the right to {store.padded_length} tokens, as the store's; found none"
        )
    implementation = str(model.config._attn_implementation)
    watch = LengthWatch(sites.encoder)  # never attached: lengths are handed over
    trials = [
        _Trial(MemoAttention(site, store.db, store.embedder, watch, store.padded_length)) for site in sites.layers
    ]
    plan = [("eager", batch) for batch in usable] + [(None, batch) for batch in usable[:_TIMED_BATCHES]]
    disable = None if progress is None else not progress
    with in_inference(model):
        for calibrating, batch in tqdm(plan, desc="profiling", unit="batch", disable=disable):
            lengths = _lengths(batch, store.padded_length)
            assert lengths is not None
            visit = _calibrator(trials, lengths, store) if calibrating else _timer(trials, lengths)
            with attention_implementation(model, calibrating or implementation), attention_outputs(sites, visit):
                model(**model_inputs(batch, model.device))
    first = _lengths(usable[0], store.padded_length)
    assert first is not None
    report = ProfileReport(
        layers=tuple(trial.result() for trial in trials),
        sequences=len(trials[0].distances),
        batch_size=len(first),
        threads=torch.get_num_threads(),
        attention=implementation,
    )
    write_profile(store.path, report.to_dict())
    return report


def _calibrator(trials: list[_Trial], lengths: Tensor, store: MemoStore) -> Callable[..., None]:
    def visit(site: AttentionSite, hidden: Tensor, args: Any, kwargs: Any, output: Any) -> None:
        trials[site.layer].calibrate(hidden, lengths, output[1], store)

    return visit


def _timer(trials: list[_Trial], lengths: Tensor) -> Callable[..., None]:
    def visit(site: AttentionSite, hidden: Tensor, args: Any, kwargs: Any, output: Any) -> None:
        trials[site.layer].time(hidden, lengths, args, kwargs)

    return visit


class _Trial:
    """What is measured of one layer."""

    def __init__(self, memo: MemoAttention) -> None:
        self.distances: list[float | None] = []
        self.similarities: list[float | None] = []
        self._memo = memo
        self._times: dict[str, list[float]] = {"attention": [], "lookup": [], "hit": [], "mixed": []}
        self._busy = False

    def calibrate(self, hidden: Tensor, lengths: Tensor, probabilities: Tensor, store: MemoStore) -> None:
        """Compare what the layer computed with the record that would be reused, whatever its distance."""
        found = self._memo.lookup(hidden, lengths)
        rows = np.flatnonzero(found.ids >= 0)
        scores: NDArray[np.float32] = np.zeros(0, dtype=np.float32)
        if len(rows):
            records = store.db.multiget_mapped(found.ids[rows]).torch()
            own = probabilities[torch.from_numpy(rows).to(probabilities.device)]
            scores = similarity_scores(own.cpu(), records, lengths[torch.from_numpy(rows)]).numpy()
        score_of = dict(zip(rows.tolist(), scores.tolist(), strict=True))
        for row in np.flatnonzero(lengths.numpy() > 0).tolist():
            self.distances.append(float(found.distances[row]) if row in score_of else None)
            self.similarities.append(score_of.get(row))

    def time(self, hidden: Tensor, lengths: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Time the parts of one call, each by itself; called from within the call's own forward."""
        if self._busy:
            return
        self._busy = True
        try:
            original = self._memo.original.forward
            call = {
                name: value
                for name, value in kwargs.items()
                if name not in ("hidden_states", "attention_mask", "past_key_values")
            }
            mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
            ids = self._memo.lookup(hidden, lengths).ids
            # A row with no neighbour borrows one: only time is measured here.
            ids = np.where(ids >= 0, ids, ids.max())
            self._times["attention"].append(_per_row(lambda: original(*args, **kwargs), hidden))
            self._times["lookup"].append(_per_row(lambda: self._memo.lookup(hidden, lengths), hidden))
            if ids.max() >= 0:
                self._times["hit"].append(_per_row(lambda: self._memo.attend(hidden, lengths, ids, mask, call), hidden))
            if ids.max() >= 0 and len(ids) > 1:
                half = np.where(np.arange(len(ids)) % 2 == 0, ids, -1)
                self._times["mixed"].append(
                    _per_row(lambda: self._memo.attend(hidden, lengths, half, mask, call), hidden)
                )
        finally:
            self._busy = False

    def result(self) -> LayerProfile:
        """Return the layer's profile."""
        median = {part: statistics.median(times) if times else None for part, times in self._times.items()}
        attention, lookup = median["attention"] or 0.0, median["lookup"] or 0.0
        # Nothing in the store fits any row: a hit cannot be timed and will not happen.
        hit = attention if median["hit"] is None else median["hit"]
        mixed = (attention + hit) / 2 if median["mixed"] is None else median["mixed"]
        return LayerProfile(
            layer=self._memo.layer,
            attention_seconds=attention,
            lookup_seconds=lookup,
            hit_seconds=hit,
            split_seconds=max(0.0, mixed - (attention + hit) / 2),
            distances=tuple(self.distances),
            similarities=tuple(self.similarities),
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


def _lengths(batch: Mapping[str, Any], padded_length: int) -> Tensor | None:
    ids = batch.get("input_ids", batch.get("inputs_embeds"))
    if not isinstance(ids, Tensor) or ids.dim() < 2 or ids.shape[1] != padded_length or not len(ids):
        return None
    return valid_lengths(batch.get("attention_mask"), ids.shape[0], padded_length)
