"""What the scripts share: models, data that is split once for all, and stores that are built when first asked for."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch

import memodb_transformers as mt
from benchmarks.memo_data import Batches, Task, load_batches, load_model

__all__ = ["SST2", "Workbench", "attention_as", "calls"]

#: The two classifiers of SST-2 that the paper's BERT and DeBERTa stand for here.
SST2 = ("minilm-sst2", "debertav2-sst2")

_KINDS = {"sst2": 64, "stories": 256, "movie_reviews": 512}


class Workbench:
    """Where scripts get their models, data and stores from.

    Parameters
    ----------
    folder
        Where stores are kept from script to script, in memory or on a disk; those of quick runs apart.
    results
        Where results of other scripts lie.
    quick
        Whether to measure a little of everything, in minutes, instead of enough of it.
    """

    def __init__(self, folder: Path, results: Path, *, quick: bool) -> None:
        self.folder = folder / ("quick" if quick else "full")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.results, self.quick = results, quick

    def choose(self, full: Any, quick: Any) -> Any:
        """Choose by how much is measured."""
        return quick if self.quick else full

    @staticmethod
    @cache
    def model(name: str) -> Any:
        """Load a model, once, in float32, with its default attention."""
        return load_model(_task(name, _data_of(name), 64, 32, (0, 0, 0, 0)))

    @staticmethod
    def another(name: str) -> Any:
        """Load the model once more, for what leaves its marks: transformers hooks into models that tell attention."""
        return load_model(_task(name, _data_of(name), 64, 32, (0, 0, 0, 0)))

    @contextmanager
    def place(self, *names: str) -> Iterator[tuple[Path, ...]]:
        """Give places for stores of one script: nothing is there before, and nothing is left, whatever happens."""
        paths = tuple(self.folder / name for name in names)
        try:
            for path in paths:
                _remove(path)
            yield paths
        finally:
            for path in paths:
                _remove(path)

    def made(self, name: str, make: Callable[[Path], object]) -> Path:
        """Return what is kept under a name, and make it first where it is missing: beside its place, then renamed.

        What was cut off half-made is made anew.
        """
        path = self.folder / name
        if not path.exists():
            draft = self.folder / f"{path.stem}.making{path.suffix}"
            _remove(draft)
            make(draft)
            draft.rename(path)
        return path

    def drop(self, *prefixes: str) -> None:
        """Let go of stores that no later script needs; should one ask all the same, they are built again."""
        for path in self.folder.iterdir():
            if path.name.startswith(prefixes):
                _remove(path)

    def batches(
        self,
        name: str,
        *,
        padded: int | None = None,
        batch: int = 32,
        recorded: int = 0,
        profiled: int = 0,
        tuned: int = 0,
        tried: int = 0,
        data: str | None = None,
    ) -> tuple[Batches, Batches, Batches, Batches]:
        """Return what is recorded, profiled, tuned and tried: different sequences, the same ones for the same counts.

        For SST-2 the last are of the development set, all of it if ``tried`` is 0.
        """
        kind = data or _data_of(name)
        return load_batches(_task(name, kind, padded or _KINDS[kind], batch, (recorded, profiled, tuned, tried)))

    @cached_property
    def sizes(self) -> dict[str, int]:
        """How many sequences of SST-2 are recorded, profiled and tuned with."""
        return self.choose(
            {"recorded": 5000, "profiled": 256, "tuned": 1024}, {"recorded": 320, "profiled": 64, "tuned": 192}
        )

    def sst2(
        self, name: str, *, batch: int = 32, tried: int | None = None
    ) -> tuple[Batches, Batches, Batches, Batches]:
        """Return the batches of SST-2 that belong to :meth:`store`."""
        count = self.choose(0, 64) if tried is None else tried
        return self.batches(name, batch=batch, tried=count, **self.sizes)

    def store(self, name: str) -> Path:
        """Return a store of single records of SST-2 in a model, with a profile and the paper's embedder.

        A quick one has an embedder that needs no training.

        It is built when it is first asked for; a build that was cut off is gone on with.
        """
        embedder = self.choose("mlp", "projection")
        recorded, profiled, _, _ = self.sst2(name)
        return self.ready(name, self.model(name), recorded, profiled, embedder=embedder)

    def ready(self, name: str, model: Any, recorded: Batches, profiled: Batches, *, embedder: str) -> Path:
        """Build a store of single records and profile it, as far as that was not done before."""
        path = self.folder / f"{name}-{embedder}-{sum(len(batch['input_ids']) for batch in recorded)}"
        if not path.exists():
            mt.build(model, recorded, path, embedder=embedder, store_dtype="bfloat16", profile=False)
        self._profiled(path, model, profiled)
        return path

    def _profiled(self, path: Path, model: Any, profiled: Batches) -> None:
        """Profile a store once."""
        self.made(f"{path.name}.profiled", lambda mark: (mt.profile(model, profiled, path), mark.touch()))

    def condensed(self, name: str, means: int) -> Path:
        """Return the store condensed to so many means of a layer and length, with a profile."""
        source = self.store(name)
        path = self.made(
            f"{source.name}-means-{means}", lambda draft: mt.condense(source, draft, records_per_namespace=means)
        )
        self._profiled(path, self.model(name), self.sst2(name)[1])
        return path


def _remove(path: Path) -> None:
    for left in (path, path.with_name(f"{path.name}.building")):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def _data_of(name: str) -> str:
    return "stories" if "llama" in name else "sst2"


def _task(name: str, data: str, padded: int, batch: int, sizes: tuple[int, int, int, int]) -> Task:
    return Task(name, data, padded, batch, *sizes, (), ())


@contextmanager
def attention_as(model: Any, implementation: str) -> Iterator[None]:
    """Let a model attend in another way for the length of a block."""
    before = model.config._attn_implementation
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def calls(model: Any, batches: Batches) -> Iterator[Any]:
    """Run a model over batches, without labels and without gradients."""
    with torch.inference_mode():
        for batch in batches:
            yield model(**{name: value for name, value in batch.items() if name != "labels"})
