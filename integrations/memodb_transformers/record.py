"""Build a memo store: record what a model computes, train, condense, index, profile and tune, stage by stage."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

from transformers import PreTrainedModel

import memodb

from .beside import MEMO_FILES
from .build_report import BuildReport
from .capture import in_inference
from .card import ModelCard
from .embedding import Embedder, RandomProjection
from .errors import InvalidBatchError
from .files import write_json
from .options import check_build, check_count
from .shares import Share, share_out
from .sites import ModelSites, find_memoizable
from .stages import StoreBuild, tunable, untrained
from .store import permissions_of, record_shape
from .tuning import check_budget, fewest_tuned
from .work import Work, fingerprint

__all__ = ["BuildReport", "build"]

_SCRATCH = 2 << 30


def build(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Any]],
    path: str | os.PathLike[str],
    *,
    target: str = "probs",
    store_dtype: str = "float32",
    backend: str = "arena",
    embedder: str | Embedder = "mlp",
    key_dim: int = 128,
    seed: int = 0,
    epochs: int | None = None,
    namespace_by_length: bool = True,
    buckets: Sequence[int] | None = None,
    profile: bool = True,
    records_per_namespace: int | None = None,
    condensed_bytes: int | None = None,
    budget: float | None = None,
    scratch_bytes: int = _SCRATCH,
    progress: bool | None = None,
    **options: Any,
) -> BuildReport:
    """Make a memo store of what a model's attention layers compute over data.

    The stages: an embedder is trained on a sample of the sequences; every attention layer gives one record a sequence,
    turned so that its tokens begin at 0 and with zeros in the columns of padding, under a key that the embedder makes
    of the hidden state that the layer was called with; the records may be condensed into means; the keys are indexed;
    on sequences that were kept out of the store (every tenth, 256 at most) thresholds are calibrated and costs measured
    (:func:`memodb_transformers.profile`), and on others (every tenth again, 2,048 at most, with a ``budget`` only)
    layers and thresholds are chosen (:func:`memodb_transformers.tune`).

    A build that was cut off, by a kill, an interrupt or a full disk, goes on when it is called again with the same
    arguments: it works in ``path.building`` and moves the store to ``path`` when all is done. Called with other data or
    settings it refuses, and says which. Where the arguments are at fault, nothing is left.

    Parameters
    ----------
    model
        A model of a supported family (:func:`memodb_transformers.families`). It is run in evaluation mode with eager
        attention and is afterwards as it was.
    batches
        Dicts of tensors: ``input_ids`` and ``attention_mask`` ``[n, L]``, padded on either side, and for a budget on
        accuracy ``labels``. The first batch gives the L of the records, unless there are buckets; later ones may be
        shorter. They are gone through first and kept in memory.
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
        ``"mlp"``, the paper's; ``"separable"``, ten times cheaper; ``"projection"``, a fixed random projection that
        needs no training; or an object that meets ``Embedder``.
    key_dim, seed
        Width of a key, and seed of all that is drawn.
    epochs
        Most passes of training over the sample, for embedders that are trained; default 30.
    namespace_by_length
        Records of sequences of different valid length are told apart; this cannot be switched off. See
        ``length_tolerance`` of :func:`memoize`.
    buckets
        Lengths, such as ``(64, 128, 256, 512)``: ``path`` is then a folder of stores, one for each, and a batch goes to
        the smallest that its padded length fits into.
    profile
        Whether to keep sequences out of the store, calibrate and profile.
    records_per_namespace, condensed_bytes
        Condense the store (:func:`memodb_transformers.condense`): so many means of a layer and length, or of so many
        bytes in all. The single records are removed when that is done.
    budget
        What reuse may cost, in points of accuracy, or of agreement where there are no labels: see
        :func:`memodb_transformers.tune`. None: nothing is tuned.
    scratch_bytes
        Most bytes of hidden states and records that the sample to train on (1,500 sequences at most) may take.
    progress
        Progress bars, one a stage: True, False, or None for where a terminal is.

    Raises
    ------
    UnsupportedModelError
        The model is of no supported family.
    ValueError
        An argument is not one of those above.
    InvalidBatchError
        No batch, one padded to more tokens than the first, or no sequence that can be recorded.
    UnfinishedBuildError
        At ``path.building`` lies an unfinished build of other data or settings.
    memodb.StoreExistsError
        Something is at ``path``.
    """
    if wrong := sorted({"dtype", "shape"}.intersection(options)):
        raise ValueError(f"expected no {wrong[0]}: the model tells it; what records are kept in is store_dtype=")
    lengths = check_build(target, store_dtype, embedder, epochs, namespace_by_length, buckets)
    key_dim, seed = check_count("key_dim", key_dim), check_count("seed", seed, 0)
    scratch_bytes = check_count("scratch_bytes", scratch_bytes)
    if records_per_namespace is not None:
        records_per_namespace = check_count("records_per_namespace", records_per_namespace)
    if condensed_bytes is not None:
        condensed_bytes = check_count("condensed_bytes", condensed_bytes)
    if budget is not None and not profile:
        raise ValueError("expected profile=True with a budget: thresholds are tuned by the profile")
    if budget is not None:
        check_budget(budget)
    sites = find_memoizable(model)
    root = Path(path)
    if root.is_symlink() or (root.exists() and (not root.is_dir() or any(root.iterdir()))):
        raise memodb.StoreExistsError(f"{root} exists: choose another path, or remove it first")
    shares, longer = share_out(batches, lengths, profile=profile, tune=budget is not None)
    if budget is not None and not any(tunable(share, budget) for share in shares.values()):
        raise InvalidBatchError(
            f"expected so many sequences ({10 * fewest_tuned(budget)} and more) that a tenth of them, "
            f"{fewest_tuned(budget)} or more, can be kept out to tune with for a budget of {budget:g}; found "
            f"{max(share.seen for share in shares.values())} in all: give more, a larger budget, or build without "
            "one and tune afterwards"
        )
    card = ModelCard.of(sites)
    if root.exists() and root.stat().st_dev != root.absolute().parent.stat().st_dev:
        raise memodb.StoreExistsError(
            f"{root} is where a file system is mounted: a store is built beside its place and moved; choose a path "
            "inside of it"
        )
    for share in shares.values():
        if condensed_bytes is not None:
            shape = record_shape(card, share.padded_length, target)
            least = len(sites.layers) * memodb.RecordSpec.of(shape, store_dtype).nbytes
            if condensed_bytes < least:
                raise ValueError(
                    f"expected condensed_bytes to hold a record for each layer, {least} bytes; found {condensed_bytes}"
                )
        _check_embedder(embedder, share.padded_length, sites, key_dim, seed)
    settings = {
        "target": target,
        "store_dtype": store_dtype,
        "backend": backend,
        "embedder": embedder if isinstance(embedder, str) else fingerprint([embedder.config(), *_arrays(embedder)]),
        "key_dim": key_dim,
        "seed": seed,
        "epochs": epochs,
        "buckets": lengths,
        "profile": profile,
        "records_per_namespace": records_per_namespace,
        "condensed_bytes": condensed_bytes,
        "budget": budget,
        "scratch_bytes": scratch_bytes,
        "options": repr(sorted(options.items())),
        "model": fingerprint([card.to_dict(), *_parameters(model)]),
        "batches": fingerprint(_data(shares)),
    }
    work = Work(root, settings)
    began = perf_counter()
    with work.entered(), in_inference(model):
        made = [
            StoreBuild(
                model,
                sites,
                card,
                work,
                share,
                settings=settings,
                embedder=embedder,
                options=options,
                progress=progress,
            ).run()
            for share in shares.values()
        ]
        if not any(report.sequences for report in made):
            raise InvalidBatchError("expected a sequence whose hidden states are finite; found none")
        skipped = longer + sum(report.skipped for report in made)
        report = _total(root, made, skipped, perf_counter() - began, buckets=bool(lengths))
        for length, part in zip(shares, report.buckets or [report], strict=True):
            write_json(work.store(length) / MEMO_FILES / "build.json", part.to_dict())
        work.finish(shares, buckets=bool(lengths), permissions=permissions_of(options))
    return report


def _total(root: Path, reports: list[BuildReport], skipped: int, seconds: float, *, buckets: bool) -> BuildReport:
    reports = [_moved(report, root / Path(report.path).name if buckets else root) for report in reports]
    if not buckets:
        return replace(reports[0], skipped=skipped, seconds=seconds)
    sums = {
        name: sum(getattr(report, name) for report in reports) for name in ("sequences", "held_out", "records", "bytes")
    }
    return replace(
        reports[-1],
        path=str(root),
        skipped=skipped,
        seconds=seconds,
        profile=None,
        training=None,
        condensed=None,
        tuned=None,
        stages=(),
        buckets=tuple(reports),
        **sums,
    )


def _moved(report: BuildReport, path: Path) -> BuildReport:
    """Tell of a store where it will be, not where it was built."""
    condensed = report.condensed and replace(report.condensed, source="", path=str(path))
    return replace(report, path=str(path), condensed=condensed)


def _data(shares: Mapping[int, Share]) -> Iterable[Any]:
    """Give all that the records depend on."""
    for share in shares.values():
        for inputs, _, rows in share.recorded:
            yield rows
            yield from (inputs[name] for name in sorted(inputs))
        for batch in (*share.profiled, *share.tuned):
            yield from (batch[name] for name in sorted(batch))


def _parameters(model: PreTrainedModel) -> Iterable[Any]:
    for name, value in sorted(model.state_dict().items()):
        yield name
        yield value


def _arrays(embedder: Embedder) -> list[Any]:
    arrays = embedder.arrays()
    return [arrays[name] for name in sorted(arrays)]


def _check_embedder(embedder: str | Embedder, padded_length: int, sites: ModelSites, key_dim: int, seed: int) -> None:
    """Refuse an embedder that cannot embed sequences of the length of the records."""
    if embedder == RandomProjection.kind:
        untrained(padded_length, sites, key_dim, seed)
    longest = getattr(embedder, "padded_length", padded_length)
    if longest < padded_length:
        raise ValueError(
            f"expected an embedder of sequences of {padded_length} tokens; found one of at most {longest} tokens"
        )
