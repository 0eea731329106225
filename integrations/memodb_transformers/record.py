"""Build a memo store: run a model over data and record every attention layer."""

from __future__ import annotations

import operator
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from time import perf_counter
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedModel

import memodb

from .capture import in_inference, model_inputs
from .card import ModelCard
from .embedding import Embedder, RandomProjection
from .errors import InvalidBatchError
from .performance import ProfileReport
from .profiling import profile_store
from .recorder import Recorder, batch_shape, make_embedder
from .reports import hide_bar, markdown_table, readable_bytes
from .sites import ModelSites, find_memoizable
from .store import TARGETS, bucket_path, open_store, smallest_fitting

__all__ = ["BuildReport", "build"]

_STORE_DTYPES = ("float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")


@dataclass(frozen=True, slots=True)
class BuildReport:
    """What :func:`build` made.

    Attributes
    ----------
    sequences, held_out, skipped
        Sequences recorded; kept for the profile; left out because their tokens have holes, their hidden states are
        not finite, or they are longer than all buckets.
    layers, records
        Attention layers, and records: one for each layer and sequence.
    record_shape, store_dtype
        Shape and dtype of a record: ``[heads, L, L]`` for probabilities, ``[L, heads * head_dim]`` for contexts. With
        length buckets, those of the longest.
    bytes
        Logical size of the records.
    seconds
        Wall-clock time of recording, without the profile.
    profile
        The profile, or None where no sequence was held out, all of them repeat recorded ones, or none was asked for;
        with length buckets, see there.
    target
        ``"probs"`` or ``"context"``.
    buckets
        With length buckets, the report of each store; the counts above are their sums.
    """

    path: str
    sequences: int
    held_out: int
    skipped: int
    layers: int
    records: int
    record_shape: tuple[int, ...]
    store_dtype: str
    bytes: int
    seconds: float
    profile: ProfileReport | None
    target: str = "probs"
    buckets: tuple[BuildReport, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain types."""
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        plain["profile"] = self.profile.to_dict() if self.profile else None
        plain["buckets"] = [bucket.to_dict() for bucket in self.buckets]
        return plain

    def to_markdown(self) -> str:
        """Return the report as Markdown."""
        rows = [
            ("sequences", self.sequences),
            ("held out", self.held_out),
            ("skipped", self.skipped),
            ("layers", self.layers),
            ("records", self.records),
            ("target", self.target),
            ("record", f"{'x'.join(map(str, self.record_shape))} {self.store_dtype}"),
            ("size", readable_bytes(self.bytes)),
            ("seconds", self.seconds),
        ]
        table = markdown_table(("store", self.path), rows)
        parts = [bucket.to_markdown() for bucket in self.buckets]
        return "\n".join([table, *([self.profile.to_markdown()] if self.profile else []), *parts])


def build(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Any]],
    path: str | os.PathLike[str],
    *,
    target: str = "probs",
    store_dtype: str = "float32",
    backend: str = "arena",
    embedder: str | Embedder = "projection",
    key_dim: int = 128,
    seed: int = 0,
    epochs: int | None = None,
    namespace_by_length: bool = True,
    buckets: Sequence[int] | None = None,
    profile: bool = True,
    progress: bool | None = None,
    **options: Any,
) -> BuildReport:
    """Record what a model's attention layers compute over data into a new memo store.

    Every attention layer gives one record a sequence, turned so that its tokens begin at 0 and with zeros in the
    columns of padding, under a key made from the hidden state that the layer was called with. Every tenth sequence (256
    at most) is held out of the store; on these, thresholds are calibrated and costs measured
    (:func:`memodb_transformers.profile`).

    A build cannot be resumed: when it fails, what it wrote is removed.

    Parameters
    ----------
    model
        A model of a supported family (:func:`memodb_transformers.families`). It is run in evaluation mode with eager
        attention and is afterwards as it was.
    batches
        Dicts of tensors: ``input_ids`` and ``attention_mask`` ``[n, L]``, padded on either side. The first batch
        gives the L of the records, unless there are buckets; later ones may be shorter.
    path
        Folder of the new store; it must not exist.
    target
        ``"probs"``: attention probabilities, ``[heads, L, L]``. ``"context"``: the attention output before the output
        projection, ``[L, heads * head_dim]``: a far smaller record, and a hit that multiplies nothing, but V is then
        that of the recorded sequence as well.
    store_dtype
        dtype of the records: ``"float32"``, ``"float16"``, ``"bfloat16"``, ``"float8_e4m3fn"`` or ``"float8_e5m2"``.
        They are multiplied in float32, converted block by block; bfloat16 as it is where the processor does that fast.
    backend, **options
        Backend of the store and its options, such as ``max_bytes`` (for each bucket) and ``index``: see
        ``memodb.MemoDB.create``.
    embedder
        ``"projection"``, a fixed random projection, or an object that meets ``Embedder``.
    key_dim, seed
        Width of a key, and seed, of the random projection.
    epochs
        Only for embedders that are trained; none is yet.
    namespace_by_length
        Records of sequences of different valid length are told apart; this cannot be switched off. See
        ``length_tolerance`` of :func:`memoize`.
    buckets
        Lengths, such as ``(64, 128, 256, 512)``: ``path`` is then a folder of stores, one for each, and a batch goes to
        the smallest that its padded length fits into.
    profile
        Whether to hold sequences out, calibrate and profile at the end.
    progress
        Progress bars: True, False, or None for where a terminal is.

    Raises
    ------
    UnsupportedModelError
        The model is of no supported family.
    ValueError
        An argument is not one of those above.
    InvalidBatchError
        No batch, one padded to more tokens than the first, or no sequence that can be recorded.
    memodb.StoreExistsError
        Something is at ``path``.
    """
    lengths = _check_options(target, store_dtype, embedder, epochs, namespace_by_length, buckets)
    sites = find_memoizable(model)
    card = ModelCard.of(sites)
    root = Path(path)
    if lengths and root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise memodb.StoreExistsError(f"{root} exists: choose another path, or remove it first")
    recorders: dict[int, Recorder] = {}
    longer, made = 0, False
    began = perf_counter()
    try:
        with in_inference(model):
            for batch in tqdm(batches, desc="recording", unit="batch", disable=hide_bar(progress)):
                inputs = model_inputs(batch, model.device)
                rows, padded = batch_shape(inputs)
                chosen = _bucket(padded, lengths, recorders)
                if chosen is None:
                    longer += rows
                    continue
                if chosen not in recorders:
                    if lengths and not root.exists():
                        root.mkdir(mode=0o700)
                        made = True
                    recorders[chosen] = Recorder(
                        model,
                        sites,
                        card,
                        bucket_path(root, chosen) if lengths else root,
                        chosen,
                        target=target,
                        store_dtype=store_dtype,
                        backend=backend,
                        options=options,
                        embedder=make_embedder(embedder, chosen, sites, key_dim, seed),
                        hold_out=profile,
                    )
                recorders[chosen].run(inputs)
        filled = [recorders[length] for length in sorted(recorders) if recorders[length].sequences]
        if not filled:
            raise InvalidBatchError(
                "expected a batch with a sequence whose tokens lie together; found none: nothing was recorded"
            )
        for recorder in filled:
            recorder.finish()
        seconds = perf_counter() - began
        reports = [_report(model, sites, recorder, seconds, progress) for recorder in filled]
    except BaseException:
        for recorder in recorders.values():
            recorder.undo()
        if made:
            shutil.rmtree(root, ignore_errors=True)
        raise
    skipped = longer + sum(recorder.skipped for recorder in recorders.values())
    return _total(root, reports, skipped, buckets=bool(lengths))


def _report(
    model: PreTrainedModel,
    sites: ModelSites,
    recorder: Recorder,
    seconds: float,
    progress: bool | None,
) -> BuildReport:
    """Profile one store, and say what it holds."""
    measured = None
    if recorder.held_out:
        # Where all that was held out repeats what was recorded, there is nothing to calibrate with.
        with open_store(recorder.path, recorder.card, recorder.embedder) as store, suppress(InvalidBatchError):
            measured = profile_store(model, sites, store, recorder.held_out, progress=progress)
    return BuildReport(
        path=str(recorder.path),
        sequences=recorder.sequences,
        held_out=recorder.held,
        skipped=recorder.skipped,
        layers=len(sites.layers),
        records=recorder.sequences * len(sites.layers),
        record_shape=recorder.shape,
        store_dtype=recorder.store_dtype,
        bytes=recorder.bytes,
        seconds=seconds,
        profile=measured,
        target=recorder.target,
    )


def _total(root: Path, reports: list[BuildReport], skipped: int, *, buckets: bool) -> BuildReport:
    if not buckets:
        return replace(reports[0], skipped=skipped)
    sums = {
        name: sum(getattr(report, name) for report in reports) for name in ("sequences", "held_out", "records", "bytes")
    }
    return replace(reports[-1], path=str(root), skipped=skipped, profile=None, buckets=tuple(reports), **sums)


def _bucket(padded: int, lengths: Sequence[int], recorders: Mapping[int, Recorder]) -> int | None:
    """Choose the L of a batch's records; None: longer than all buckets."""
    if lengths:
        return smallest_fitting(lengths, padded)
    first = next(iter(recorders), padded)
    if padded > first:
        raise InvalidBatchError(
            f"expected every batch padded to at most {first} tokens, as the first; found {padded}: pad to one length, "
            "for instance with padding='max_length', max_length=..., or build with buckets=(64, 128, ...)"
        )
    return first


def _check_options(
    target: str,
    store_dtype: str,
    embedder: str | Embedder,
    epochs: int | None,
    namespace_by_length: bool,
    buckets: Sequence[int] | None,
) -> list[int]:
    """Check what needs no model; returns the buckets in rising order."""
    if target not in TARGETS:
        raise ValueError(f"expected target to be one of {', '.join(TARGETS)}; found {target!r}")
    if store_dtype not in _STORE_DTYPES:
        raise ValueError(f"expected store_dtype to be one of {', '.join(_STORE_DTYPES)}; found {store_dtype!r}")
    if isinstance(embedder, str) and embedder != RandomProjection.kind:
        raise ValueError(
            f"expected embedder='projection' (a fixed random projection), the only one that is supported yet, or an "
            f"Embedder object; found {embedder!r}"
        )
    if not isinstance(embedder, str | Embedder):
        raise ValueError(f"expected embedder='projection' or an Embedder object; found {type(embedder).__name__}")
    if epochs is not None:
        raise ValueError(f"expected no epochs: embedder='projection' is not trained; found epochs={epochs!r}")
    if not namespace_by_length:
        raise ValueError("expected namespace_by_length=True: sequences of different valid length must never match")
    if buckets is None:
        return []
    try:
        lengths = [operator.index(length) for length in buckets if not isinstance(length, bool)]
    except TypeError:
        lengths = []
    if not lengths or min(lengths) < 2:
        raise ValueError(f"expected buckets to be lengths of at least 2 tokens, such as (64, 128); found {buckets!r}")
    return sorted(set(lengths))
