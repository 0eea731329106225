"""Build a memo store: record what a model computes, train, condense, index, profile and tune, stage by stage."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedModel

import memodb

from .build_report import BuildReport
from .capture import in_inference
from .card import ModelCard
from .condense import CondenseReport, condense
from .embedding import Embedder, RandomProjection
from .errors import InvalidBatchError
from .files import write_json
from .options import check_build, check_count
from .performance import ProfileReport
from .profiling import profile_store
from .recorder import Recorder, batch_shape
from .reports import hide_bar
from .samples import Samples, sample_bytes
from .shares import Share, share_out
from .sites import ModelSites, find_memoizable
from .store import MEMO_FILES, open_store, read_profile, record_shape, write_store
from .training import TRAINED, LayerTraining, TrainingReport, assemble, split_known, train_layer
from .tune_report import TuneReport
from .tuning import check_budget, fewest_tuned, tune_store
from .work import Work, fingerprint

__all__ = ["BuildReport", "build"]

_SAMPLED = 1500
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
    if budget is not None and not any(_tunable(share, budget) for share in shares.values()):
        raise InvalidBatchError(
            f"expected so many sequences that a tenth of them, {fewest_tuned(budget)} or more, can be kept out to tune "
            f"with for a budget of {budget:g}; found {max(share.seen for share in shares.values())} in all: give more, "
            "a larger budget, or build without one and tune afterwards"
        )
    for share in shares.values():
        _check_embedder(embedder, share.padded_length, sites, key_dim, seed)
    card = ModelCard.of(sites)
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
        "model": fingerprint([card.to_dict(), np.round(card.probe, 2)]),
        "batches": fingerprint(_data(shares)),
    }
    work = Work(root, settings)
    began = perf_counter()
    with work.entered(), in_inference(model):
        made = [
            _Build(
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
        work.finish(shares, buckets=bool(lengths))
    return report


class _Build:
    """The build of one store, stage by stage."""

    def __init__(
        self,
        model: PreTrainedModel,
        sites: ModelSites,
        card: ModelCard,
        work: Work,
        share: Share,
        *,
        settings: Mapping[str, Any],
        embedder: str | Embedder,
        options: Mapping[str, Any],
        progress: bool | None,
    ) -> None:
        self._model, self._sites, self._card, self._work, self._share = model, sites, card, work, share
        self._settings, self._options, self._progress = settings, options, progress
        self._given = embedder
        self._length = share.padded_length
        self._shape = record_shape(card, self._length, settings["target"])
        self._place = work.store(self._length)
        self._part = work.part(self._length)
        self._condenses = settings["records_per_namespace"] is not None or settings["condensed_bytes"] is not None
        self._records = self._part / "records" if self._condenses else self._place

    def run(self) -> BuildReport:
        """Run all stages that are not done yet."""
        first = len(self._work.stages)
        began = perf_counter()
        self._part.mkdir(mode=0o700, exist_ok=True)
        self._place.parent.mkdir(mode=0o700, exist_ok=True)
        trained = self._train() if self._given in TRAINED else None
        embedder = trained[0] if trained else self._given
        if isinstance(embedder, str):
            embedder = _untrained(self._length, self._sites, self._settings["key_dim"], self._settings["seed"])
        recorded = self._stage("record", lambda: self._record(embedder))
        condensed = None
        if self._condenses:
            condensed = CondenseReport(**self._stage("condense", self._condense))
            shutil.rmtree(self._records, ignore_errors=True)
        self._stage("index", self._index)
        profile = self._profile(embedder)
        tuned = self._tune(embedder) if profile is not None else None
        share, layers = self._share, len(self._sites.layers)
        records = condensed.records if condensed else recorded["sequences"] * layers
        nbytes = memodb.RecordSpec.of(self._shape, self._settings["store_dtype"]).nbytes
        return BuildReport(
            path=str(self._place),
            sequences=recorded["sequences"],
            held_out=sum(batch_shape(batch)[0] for batch in share.profiled),
            skipped=share.skipped + recorded["skipped"],
            layers=layers,
            records=records,
            record_shape=self._shape,
            store_dtype=self._settings["store_dtype"],
            bytes=records * nbytes,
            seconds=perf_counter() - began,
            profile=profile,
            target=self._settings["target"],
            embedder=embedder.kind,
            training=trained[1] if trained else None,
            condensed=condensed,
            tuned=tuned,
            stages=tuple(self._work.stages[first:]),
        )

    def _stage(self, name: str, do: Callable[[], Any]) -> Any:
        return self._work.run(name, self._length, do)

    def _bar(self, name: str, total: int, unit: str) -> Any:
        return tqdm(total=total, desc=name, unit=unit, disable=hide_bar(self._progress))

    def _train(self) -> tuple[Embedder, TrainingReport]:
        """Run the model over a sample, and train an embedder for each layer on it."""
        kind, seed = str(self._given), int(self._settings["seed"])
        folder = self._part / "sample"
        each = sample_bytes(self._sites, self._length, self._settings["target"])
        most = max(2, min(_SAMPLED, self._settings["scratch_bytes"] // each))

        def collect() -> int:
            chosen = self._share.sample(most, seed)
            with self._bar("sampling", len(chosen), "batch") as bar:
                samples = Samples.collect(
                    self._model, self._sites, chosen, folder, self._length, self._settings["target"], bar
                )
            return len(samples)

        self._stage("sample", collect)
        report = self._stage("train", lambda: self._train_layers(kind, folder, seed))
        shutil.rmtree(folder, ignore_errors=True)
        layers = tuple(LayerTraining(**row) for row in report["layers"])
        arrays = [dict(np.load(self._part / f"layer-{row.layer}.npz", allow_pickle=False)) for row in layers]
        return assemble(kind, arrays), TrainingReport(**{**report, "layers": layers})

    def _train_layers(self, kind: str, folder: Path, seed: int) -> dict[str, Any]:
        """Train layer by layer; each is kept when it is done."""
        samples = Samples(folder)
        known = split_known(len(samples))
        rows, parameters = [], 0
        with self._bar("training", len(self._sites.layers), "layer") as bar:
            for layer in range(len(self._sites.layers)):
                key, file = f"L={self._length}/layer={layer}", self._part / f"layer-{layer}.npz"
                row = self._work.noted(key)
                if row is None:
                    arrays, trained = train_layer(
                        kind,
                        layer,
                        samples.layer(layer, known),
                        key_dim=self._settings["key_dim"],
                        epochs=self._settings["epochs"],
                        seed=seed,
                    )
                    np.savez(file, **arrays)  # type: ignore[arg-type]
                    row = trained.to_dict()
                    self._work.note(key, row)
                with np.load(file, allow_pickle=False) as kept:
                    parameters += sum(int(kept[name].size) for name in kept.files)
                rows.append(row)
                bar.update()
        return {"kind": kind, "sequences": len(samples), "parameters": parameters, "layers": rows}

    def _record(self, embedder: Embedder) -> dict[str, int]:
        """Run the model over all data, and put what its layers compute."""
        recorder = Recorder(
            self._model,
            self._sites,
            self._records,
            self._shape,
            self._length,
            target=self._settings["target"],
            store_dtype=self._settings["store_dtype"],
            backend=self._settings["backend"],
            options=self._options,
            embedder=embedder,
        )
        key = f"L={self._length}/recorded"
        with self._bar("recording", self._share.sequences, "sequence") as bar:
            state = recorder.run(
                self._share.recorded, self._work.noted(key), lambda state: self._work.note(key, state), bar
            )
        if not state["sequences"]:
            raise InvalidBatchError("expected a sequence whose hidden states are finite; found none")
        write_store(
            self._records,
            self._card,
            self._length,
            self._settings["store_dtype"],
            self._settings["target"],
            embedder,
        )
        return state

    def _condense(self) -> dict[str, Any]:
        shutil.rmtree(self._place, ignore_errors=True)  # of a run that was cut off
        # The limit of the single records holds for fewer means all the more, and is no limit of condensing.
        options = {name: value for name, value in self._options.items() if name != "max_bytes"}
        return condense(
            self._records,
            self._place,
            records_per_namespace=self._settings["records_per_namespace"],
            max_bytes=self._settings["condensed_bytes"],
            backend=self._settings["backend"],
            seed=self._settings["seed"],
            progress=self._progress,
            **options,
        ).to_dict()

    def _index(self) -> dict[str, Any]:
        """Build all indexes now, so that the first search does not have to."""
        with memodb.MemoDB.open(self._place, mode="r+") as db:
            db.reindex()
            return {"namespaces": len(db.namespaces())}

    def _profile(self, embedder: Embedder) -> ProfileReport | None:
        if not self._share.profiled:
            return None

        def measure() -> None:
            # All that were kept out may repeat recorded ones: then there is nothing to calibrate with.
            with open_store(self._place, self._card, embedder) as store, suppress(InvalidBatchError):
                profile_store(self._model, self._sites, store, self._share.profiled, progress=self._progress)

        self._stage("profile", measure)
        found = read_profile(self._place)
        return ProfileReport.from_dict(found, self._place) if found is not None else None

    def _tune(self, embedder: Embedder) -> TuneReport | None:
        budget = self._settings["budget"]
        if budget is None or not _tunable(self._share, budget):
            return None

        def choose() -> dict[str, Any]:
            with open_store(self._place, self._card, embedder) as store:
                report = tune_store(
                    self._model,
                    self._sites,
                    store,
                    self._share.tuned,
                    budget=budget,
                    progress=self._progress,
                )
            return report.to_dict()

        return TuneReport.from_dict(self._stage("tune", choose))


def _tunable(share: Share, budget: float) -> bool:
    return sum(batch_shape(batch)[0] for batch in share.tuned) >= fewest_tuned(budget)


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


def _arrays(embedder: Embedder) -> list[Any]:
    arrays = embedder.arrays()
    return [arrays[name] for name in sorted(arrays)]


def _untrained(padded_length: int, sites: ModelSites, key_dim: int, seed: int) -> RandomProjection:
    return RandomProjection.create(padded_length, sites.hidden_size, key_dim=key_dim, seed=seed)


def _check_embedder(embedder: str | Embedder, padded_length: int, sites: ModelSites, key_dim: int, seed: int) -> None:
    """Refuse an embedder that cannot embed sequences of the length of the records."""
    if embedder == RandomProjection.kind:
        _untrained(padded_length, sites, key_dim, seed)
    longest = getattr(embedder, "padded_length", padded_length)
    if longest < padded_length:
        raise ValueError(
            f"expected an embedder of sequences of {padded_length} tokens; found one of at most {longest} tokens"
        )
