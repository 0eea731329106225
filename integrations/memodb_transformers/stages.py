"""The stages of a build of one store: sample, train, record, condense, index, profile, tune."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedModel

import memodb

from .beside import read_profile
from .build_report import BuildReport
from .card import ModelCard
from .condense import CondenseReport, condense
from .embedding import Embedder, RandomProjection
from .errors import InvalidBatchError
from .performance import ProfileReport
from .profiling import profile_store
from .recorder import Recorder, count_sequences
from .reports import hide_bar
from .samples import Samples, sample_bytes
from .shares import Share
from .sites import ModelSites
from .store import open_store, record_shape, write_store
from .train_report import LayerTraining, TrainingReport
from .training import TRAINED, assemble, split_known, train_layer
from .tune_report import TuneReport
from .tuning import check_judged, fewest_tuned, tune_store
from .work import Work

__all__ = ["StoreBuild", "tunable", "untrained"]

# Sequences that an embedder is trained on, at most.
_SAMPLED = 1500


class StoreBuild:
    """The build of one store, stage by stage: what is done is not done again.

    Parameters
    ----------
    model, sites, card
        The model, its attention layers, and its description.
    work
        The folder of the build.
    share
        The sequences of this store.
    settings, embedder, options, progress
        As :func:`memodb_transformers.build` was given them.
    """

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
        self._try_out()
        self._part.mkdir(mode=0o700, exist_ok=True)
        self._place.parent.mkdir(mode=0o700, exist_ok=True)
        trained = self._train() if self._given in TRAINED else None
        embedder = trained[0] if trained else self._given
        if isinstance(embedder, str):
            embedder = untrained(self._length, self._sites, self._settings["key_dim"], self._settings["seed"])
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
            held_out=count_sequences([*share.profiled, *share.tuned]),
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

    def _try_out(self) -> None:
        """Do in small what would fail after hours: make a database of these options, judge one batch."""
        if self._work.noted(f"L={self._length}/record") is None and not self._records.exists():
            trial = self._work.folder / f"work-trial-{self._length}"
            shutil.rmtree(trial, ignore_errors=True)
            elsewhere = {"segments_path", "url", "storage_options"} & self._options.keys()
            if not elsewhere:
                memodb.MemoDB.create(
                    trial,
                    shape=self._shape,
                    dtype=self._settings["store_dtype"],
                    key_dim=self._settings["key_dim"],
                    backend=self._settings["backend"],
                    **self._options,
                ).close()
                shutil.rmtree(trial, ignore_errors=True)
        tuned = self._work.noted(f"L={self._length}/tune") is not None
        if self._settings["budget"] is not None and self._share.tuned and not tuned:
            check_judged(self._model, self._sites, self._share.tuned)

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
        if budget is None or not tunable(self._share, budget):
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

        return TuneReport.from_dict(self._stage("tune", choose), self._place)


def tunable(share: Share, budget: float) -> bool:
    """Tell whether enough sequences are kept out to tune with."""
    return count_sequences(share.tuned) >= fewest_tuned(budget)


def untrained(padded_length: int, sites: ModelSites, key_dim: int, seed: int) -> RandomProjection:
    """Draw the embedder that needs no training."""
    return RandomProjection.create(padded_length, sites.hidden_size, key_dim=key_dim, seed=seed)
