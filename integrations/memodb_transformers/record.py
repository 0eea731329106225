"""Build a memo store: run a model over data and record every attention layer."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

import memodb

from .attention import find_memoizable, namespace
from .capture import attention_implementation, attention_outputs, in_inference, model_inputs
from .embedding import Embedder, RandomProjection
from .errors import InvalidBatchError
from .families import AttentionSite, ModelSites
from .lengths import valid_lengths
from .profiling import ProfileReport, profile_store
from .reports import markdown_table, readable_bytes
from .store import ModelCard, open_store, write_store

__all__ = ["BuildReport", "build"]

# Every tenth sequence, up to this many, is kept out of the store: thresholds calibrated on records that find
# themselves would be worthless.
_HOLD_OUT_EVERY = 10
_HOLD_OUT_MOST = 256

_STORE_DTYPES = ("float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")


@dataclass(frozen=True, slots=True)
class BuildReport:
    """What :func:`build` made.

    Attributes
    ----------
    sequences, held_out, skipped
        Sequences recorded; kept for the profile; left out because they are not right-padded.
    layers, records
        Attention layers, and records: one for each layer and sequence.
    record_shape, store_dtype
        Shape ``[heads, L, L]`` and dtype of a record.
    bytes
        Logical size of the records.
    seconds
        Wall-clock time of recording, without the profile.
    profile
        The profile, or None where no sequence was held out or none was asked for.
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

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain types."""
        plain = {name: getattr(self, name) for name in self.__slots__ if name != "profile"}
        return {**plain, "profile": self.profile.to_dict() if self.profile else None}

    def to_markdown(self) -> str:
        """Return the report as Markdown."""
        rows = [
            ("sequences", self.sequences),
            ("held out", self.held_out),
            ("skipped", self.skipped),
            ("layers", self.layers),
            ("records", self.records),
            ("record", f"{'x'.join(map(str, self.record_shape))} {self.store_dtype}"),
            ("size", readable_bytes(self.bytes)),
            ("seconds", self.seconds),
        ]
        table = markdown_table(("store", self.path), rows)
        return table + ("\n" + self.profile.to_markdown() if self.profile else "")


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
    profile: bool = True,
    progress: bool | None = None,
    **options: Any,
) -> BuildReport:
    """Record a model's attention probabilities over data into a new memo store.

    Every attention layer gives one record ``[heads, L, L]`` a sequence, with rows and columns of padding set to zero,
    under a key made from the hidden state that the layer was called with. Every tenth sequence (256 at most) is held
    out of the store; on these, thresholds are calibrated and costs measured (:func:`memodb_transformers.profile`).

    A build cannot be resumed: when it fails, what it wrote is removed.

    Parameters
    ----------
    model
        An encoder of a supported family (:func:`memodb_transformers.families`). It is run in evaluation mode with
        eager attention and is afterwards as it was.
    batches
        Dicts of tensors: ``input_ids`` and ``attention_mask`` ``[n, L]``, all padded on the right to one L.
    path
        Folder of the new store; it must not exist.
    target
        ``"probs"``: attention probabilities.
    store_dtype
        dtype of the records: ``"float32"``, ``"float16"``, ``"bfloat16"``, ``"float8_e4m3fn"`` or ``"float8_e5m2"``.
        The product with V is always in float32.
    backend, **options
        Backend of the store and its options, such as ``max_bytes`` and ``index``: see ``memodb.MemoDB.create``.
    embedder
        ``"projection"``, a fixed random projection, or an object that meets ``Embedder``.
    key_dim, seed
        Width of a key, and seed, of the random projection.
    epochs
        Only for embedders that are trained; none is yet.
    namespace_by_length
        Records of sequences of different valid length never match; this cannot be switched off.
    profile
        Whether to calibrate and profile at the end.
    progress
        Progress bars: True, False, or None for where a terminal is.

    Raises
    ------
    UnsupportedModelError
        The model is of no supported family.
    ValueError
        An argument is not one of those above.
    InvalidBatchError
        No batch, batches of differing L, or no right-padded sequence.
    memodb.StoreExistsError
        Something is at ``path``.
    """
    _check_options(target, store_dtype, embedder, epochs, namespace_by_length)
    sites = find_memoizable(model)
    recorder = _Recorder(model, sites, Path(path), store_dtype, embedder, key_dim, seed)
    began = perf_counter()
    try:
        with in_inference(model), attention_implementation(model, "eager"), attention_outputs(sites, recorder.receive):
            for batch in tqdm(batches, desc="recording", unit="batch", disable=_disable(progress)):
                recorder.run(batch, backend, options)
        recorder.finish(target)
        seconds = perf_counter() - began
        measured = None
        if profile and recorder.held_out:
            with open_store(path, ModelCard.of(sites)) as store:
                measured = profile_store(model, sites, store, recorder.held_out, progress=progress)
    except BaseException:
        recorder.undo()
        raise
    return BuildReport(
        path=str(path),
        sequences=recorder.sequences,
        held_out=sum(len(next(iter(batch.values()))) for batch in recorder.held_out),
        skipped=recorder.skipped,
        layers=len(sites.layers),
        records=recorder.sequences * len(sites.layers),
        record_shape=recorder.shape,
        store_dtype=store_dtype,
        bytes=recorder.bytes,
        seconds=seconds,
        profile=measured,
    )


class _Recorder:
    """One build: opens the database at the first batch, whose shape it takes, and puts layer after layer."""

    def __init__(
        self,
        model: PreTrainedModel,
        sites: ModelSites,
        path: Path,
        store_dtype: str,
        embedder: str | Embedder,
        key_dim: int,
        seed: int,
    ) -> None:
        self.sequences = self.skipped = self.bytes = 0
        self.shape: tuple[int, ...] = ()
        self.held_out: list[dict[str, Any]] = []
        self._model, self._sites, self._path = model, sites, path
        self._store_dtype, self._key_dim, self._seed = store_dtype, key_dim, seed
        self._embedder = None if isinstance(embedder, str) else embedder
        self._db: memodb.MemoDB | None = None
        self._created = False
        self._seen = self._batch_size = 0
        self._lengths = torch.zeros(0, dtype=torch.int64)
        self._rows = torch.zeros(0, dtype=torch.int64)

    def run(self, batch: Mapping[str, Any], backend: str, options: dict[str, Any]) -> None:
        """Record one batch."""
        inputs = model_inputs(batch, self._model.device)
        ids = inputs.get("input_ids", inputs.get("inputs_embeds"))
        assert isinstance(ids, Tensor)
        if ids.dim() < 2:
            raise InvalidBatchError(f"expected input_ids of shape [n, L]; found {list(ids.shape)}")
        rows, padded_length = ids.shape[:2]
        if self._db is None:
            self._create(padded_length, backend, options)
            self._batch_size = rows
        if padded_length != self.shape[-1]:
            raise InvalidBatchError(
                f"expected every batch padded to {self.shape[-1]} tokens, as the first; found {padded_length}: pad to "
                "one length, for instance with padding='max_length', max_length=..."
            )
        lengths = valid_lengths(inputs.get("attention_mask"), rows, padded_length)
        if lengths is None:
            raise InvalidBatchError(f"expected an attention_mask of shape [{rows}, {padded_length}], or none")
        keep = self._select(inputs, lengths)
        self._rows = torch.from_numpy(keep)
        self._lengths = lengths[self._rows]
        if len(self._rows):
            self._model(**inputs)
            self.sequences += len(self._rows)

    def receive(self, site: AttentionSite, hidden: Tensor, _args: Any, _kwargs: Any, output: Any) -> None:
        """Put the records of one layer: called by the hook on it."""
        assert self._db is not None
        assert self._embedder is not None
        rows, lengths = self._rows.to(hidden.device), self._lengths
        keys = self._embedder.embed(site.layer, hidden[rows], lengths)
        present = (torch.arange(self.shape[-1]) < lengths[:, None]).to(hidden.device)
        square = present[:, None, :, None] & present[:, None, None, :]
        records = torch.where(square, output[1][rows], 0.0).to(getattr(torch, self._store_dtype)).cpu()
        names = [namespace(site.layer, length) for length in lengths.tolist()]
        self._db.put(records, keys, namespace=names)
        self.bytes += records.nbytes

    def finish(self, target: str) -> None:
        """Close the database and write what makes it a memo store."""
        if self._db is None or self._embedder is None or not self.sequences:
            raise InvalidBatchError(
                "expected at least one batch with a right-padded sequence; found none: nothing was recorded"
            )
        self._db.close()
        self.held_out = _regroup(self.held_out, self._batch_size)
        card = ModelCard.of(self._sites)
        write_store(self._path, card, self.shape[-1], self._store_dtype, target, self._embedder)

    def undo(self) -> None:
        """Remove what this build wrote."""
        if self._db is not None:
            self._db.close()
        if self._created:
            shutil.rmtree(self._path, ignore_errors=True)

    def _create(self, padded_length: int, backend: str, options: dict[str, Any]) -> None:
        if self._embedder is None:
            self._embedder = RandomProjection.create(
                padded_length, self._sites.hidden_size, key_dim=self._key_dim, seed=self._seed
            )
        self.shape = (self._sites.layers[0].heads, padded_length, padded_length)
        self._db = memodb.MemoDB.create(
            self._path,
            shape=self.shape,
            dtype=self._store_dtype,
            key_dim=self._embedder.key_dim,
            backend=backend,
            **options,
        )
        self._created = True

    def _select(self, inputs: dict[str, Any], lengths: Tensor) -> Any:
        """Choose the rows to record; every tenth usable one goes to the held-out batches instead."""
        usable = torch.nonzero(lengths > 0).flatten()
        self.skipped += len(lengths) - len(usable)
        numbers = torch.arange(self._seen, self._seen + len(usable))
        self._seen += len(usable)
        held_before = sum(len(next(iter(batch.values()))) for batch in self.held_out)
        candidates = usable[numbers % _HOLD_OUT_EVERY == _HOLD_OUT_EVERY - 1][: _HOLD_OUT_MOST - held_before]
        if len(candidates):
            self.held_out.append(
                {
                    name: value[candidates.to(value.device)].cpu()
                    for name, value in inputs.items()
                    if isinstance(value, Tensor) and value.dim() > 0 and len(value) == len(lengths)
                }
            )
        return usable[~torch.isin(usable, candidates)].numpy()


def _regroup(batches: list[dict[str, Any]], rows: int) -> list[dict[str, Any]]:
    """Join the few held-out rows of each batch into batches of the usual size: costs depend on it."""
    if len({frozenset(batch) for batch in batches}) != 1:
        return batches  # nothing held out, or inputs that differ from batch to batch
    joined = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    count = len(next(iter(joined.values())))
    return [{name: value[start : start + rows] for name, value in joined.items()} for start in range(0, count, rows)]


def _check_options(
    target: str, store_dtype: str, embedder: str | Embedder, epochs: int | None, namespace_by_length: bool
) -> None:
    if target != "probs":
        raise ValueError(f"expected target='probs', the only one that is supported yet; found {target!r}")
    if store_dtype not in _STORE_DTYPES:
        raise ValueError(f"expected store_dtype to be one of {', '.join(_STORE_DTYPES)}; found {store_dtype!r}")
    if isinstance(embedder, str) and embedder != RandomProjection.kind:
        raise ValueError(
            f"expected embedder='projection' (a fixed random projection), the only one that is supported yet, or an "
            f"Embedder object; found {embedder!r}"
        )
    if epochs is not None:
        raise ValueError(f"expected no epochs: embedder='projection' is not trained; found epochs={epochs!r}")
    if not namespace_by_length:
        raise ValueError("expected namespace_by_length=True: sequences of different valid length must never match")


def _disable(progress: bool | None) -> bool | None:
    # tqdm takes None for "only where a terminal is".
    return None if progress is None else not progress
