"""The offline profiler: what a lookup costs, what a hit saves, and how often there would be one, layer by layer.

All parts of Eq. 3 of the AttMemo paper (``performance.py``) are measured by themselves, in batches of several sizes
(``timing.py``, ``costs.py``), so that the benefit can be predicted for any threshold and batch.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from .beside import write_profile
from .calibration import Calibration
from .capture import attention_implementation, attention_visits, in_inference, whole_inputs
from .card import ModelCard
from .costs import Shape, Shapes
from .embedding import Embedder
from .errors import InvalidBatchError, no_batch_fits
from .forward import Spans
from .performance import LayerProfile, ProfileReport
from .recorder import batch_shape, spans_of
from .reports import hide_bar
from .sites import ModelSites, find_memoizable
from .store import MemoStore, open_stores, smallest_fitting
from .timing import LayerTimer, cut_batch, reference_shape

__all__ = ["profile", "profile_store"]

_TIMED_BATCHES = 4


@dataclass(frozen=True, slots=True)
class _Batch:
    """A batch that can be profiled."""

    inputs: Mapping[str, Any]
    spans: Spans

    @property
    def shape(self) -> Shape:
        return Shape(len(self.spans), self.spans.padded)


def profile(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Any]],
    path: str | os.PathLike[str],
    *,
    embedder: Embedder | None = None,
    compiled: bool = False,
    progress: bool | None = None,
) -> ProfileReport:
    """Calibrate the thresholds of a memo store and measure which layers pay, on data that is not in it.

    The result is kept beside the store, in place of an earlier one; ``memoize(layers="profiled")`` goes by it.
    Distances are calibrated with hidden states of the unmemoized model. Once several layers are memoized, those of
    later layers drift a little from these: what a level does to accuracy is for ``evaluate`` to say.

    Sequences that the store holds already find themselves, which tells nothing. They are left out of the calibration
    and counted as ``self_hits``, and with them those that repeat a stored sequence.

    Parameters
    ----------
    model, path
        A model and the store that :func:`build` made of it.
    batches
        Held-out batches, padded to the store's length at most, of the size that will be used. Costs are measured at the
        most frequent size, and in batches cut from these: a quarter and half of the sequences, half of the length. With
        length buckets, each batch goes to its own.
    embedder
        As in :func:`memoize`.
    compiled
        Compare with the original attention under ``torch.compile``, which takes a C++ compiler and minutes. A memoized
        layer cannot be compiled: its misses are expected to run as they are.
    progress
        Progress bars: True, False, or None for where a terminal is.

    Raises
    ------
    UnsupportedModelError, StoreMismatchError
        The model is of no supported family, or not the one of the store.
    InvalidBatchError
        No batch can be used, or all their sequences are in the store. Of several buckets, one without a sequence of its
        own keeps the profile that it had.
    """
    sites = find_memoizable(model)
    data = list(batches)
    with open_stores(path, ModelCard.of(sites), embedder) as stores:
        shares: dict[int, list[_Batch]] = {length: [] for length in stores}
        for batch in _usable(data, max(stores)):
            length = smallest_fitting(stores, batch.spans.padded)
            assert length is not None
            shares[length].append(batch)
        parts = {
            length: _measure(model, sites, stores[length], share, compiled, progress)
            for length, share in shares.items()
            if share
        }
        _check_left(parts.values(), path)
        parts = {length: part for length, part in parts.items() if part.sequences}
        for length, part in parts.items():
            write_profile(stores[length].path, part.to_dict())
        whole = max(stores)
    first = next(iter(parts.values()))
    if len(stores) == 1:
        return first
    return replace(
        first,
        layers=(),
        sequences=sum(part.sequences for part in parts.values()),
        self_hits=sum(part.self_hits for part in parts.values()),
        padded_length=whole,
        buckets=tuple(parts.values()),
    )


def profile_store(
    model: PreTrainedModel,
    sites: ModelSites,
    store: MemoStore,
    batches: list[Any],
    *,
    progress: bool | None = None,
) -> ProfileReport:
    """Profile an open store: see :func:`profile`."""
    report = _measure(model, sites, store, _usable(batches, store.padded_length), False, progress)
    _check_left([report], store.path)
    write_profile(store.path, report.to_dict())
    return report


def _measure(
    model: PreTrainedModel,
    sites: ModelSites,
    store: MemoStore,
    batches: list[_Batch],
    compiled: bool,
    progress: bool | None,
) -> ProfileReport:
    """Calibrate with all batches, then time some of them; without a sequence left to go by there are no layers."""
    calibration = Calibration(store, len(sites.layers))
    reference = reference_shape([batch.shape for batch in batches])
    timed = [batch for batch in batches if batch.shape == reference][:_TIMED_BATCHES]
    shapes = Shapes.of(reference).all
    timers = [LayerTimer(layer, store, compiled=compiled) for layer in range(len(sites.layers))]
    total = len(batches) + len(timed) * len(shapes)
    with in_inference(model), tqdm(total=total, desc="profiling", unit="batch", disable=hide_bar(progress)) as bar:
        for batch in batches:
            _run_to_calibrate(model, sites, store, batch, calibration)
            bar.update()
        for batch in timed if calibration.sequences else []:
            for shape in shapes:
                _run_to_time(model, sites, batch, shape, timers)
                bar.update()
    layers = [
        LayerProfile(layer=layer, **calibration.result(layer), **timer.result(reference))
        for layer, timer in enumerate(timers if calibration.sequences else [])
    ]
    return ProfileReport(
        layers=tuple(layers),
        sequences=calibration.sequences,
        batch_size=reference.rows,
        threads=torch.get_num_threads(),
        attention=str(model.config._attn_implementation) + (", compiled" if compiled else ""),
        padded_length=store.padded_length,
        self_hits=calibration.self_hits,
    )


def _run_to_calibrate(
    model: PreTrainedModel, sites: ModelSites, store: MemoStore, batch: _Batch, calibration: Calibration
) -> None:
    """Run a batch as records are made: with eager attention, asking for probabilities where the store holds them."""
    with ExitStack() as stack:
        stack.enter_context(attention_implementation(model, "eager"))
        stack.enter_context(
            attention_visits(
                sites,
                lambda visit: calibration.visit(visit, batch.spans),
                probabilities=store.target == "probs",
            )
        )
        model(**whole_inputs(batch.inputs, model.device, sites))


def _run_to_time(
    model: PreTrainedModel, sites: ModelSites, batch: _Batch, shape: Shape, timers: list[LayerTimer]
) -> None:
    """Run a batch, cut to a size, as the user does."""
    inputs = cut_batch(batch.inputs, batch.spans, shape)
    spans, lengths = spans_of(inputs), batch.spans.lengths[: shape.rows]
    with attention_visits(sites, lambda visit: timers[visit.site.layer].time(visit, spans, lengths)):
        model(**whole_inputs(inputs, model.device, sites))


def _usable(batches: Iterable[Any], longest: int) -> list[_Batch]:
    """Take the batches that fit.

    Raises
    ------
    InvalidBatchError
        There is none.
    """
    given = list(batches)
    found = [_Batch(batch, spans) for batch in given if (spans := _spans(batch, longest)) is not None]
    if not found:
        raise no_batch_fits(len(given), longest)
    return found


def _spans(batch: Mapping[str, Any], longest: int) -> Spans | None:
    """Tell where a batch's sequences lie; None where it cannot be used."""
    try:
        rows, padded = batch_shape(batch)
        return spans_of(batch) if rows and padded <= longest else None
    except InvalidBatchError:
        return None


def _check_left(parts: Collection[ProfileReport], path: str | os.PathLike[str]) -> None:
    """Refuse data of which nothing is left to calibrate with."""
    left, themselves = (sum(getattr(part, name) for part in parts) for name in ("sequences", "self_hits"))
    if left:
        return
    if themselves:
        raise InvalidBatchError(
            f"expected sequences that the store at {path} does not hold; found {themselves}, and all of them are in "
            "it or repeat one that is: they find themselves, which says nothing of others. Profile on held-out data"
        )
    raise InvalidBatchError("expected a sequence whose tokens lie together; found none")
