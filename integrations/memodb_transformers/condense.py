"""Condense a memo store: a few mean records for each layer and length, in the place of all single ones.

The mean of several records is closer to what the model would have computed than any one of them, even the nearest: what
is particular to one sentence falls out of it. And it is a small store. With one record a namespace it is constant
attention (Hassid et al. 2022, "How Much Does Attention Actually Attend?").
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

import memodb

from .beside import Condensed, copy_beside, read_condensed
from .clusters import Means, group_keys
from .errors import StoreMismatchError
from .lookup import namespace, parse_namespace
from .options import check_count, check_store_dtype
from .reports import hide_bar, markdown_table, readable_bytes
from .store import bucket_path, bucket_paths, making, permissions_of, stored_lengths

__all__ = ["CondenseReport", "condense"]

# What is held in memory at once, in bytes: sums of some groups in float32, of which there are three copies for a
# moment, and records on their way into them.
_SUMS = 160 << 20
_READ = 128 << 20
_WAYS = ("layer", "sequence")


@dataclass(frozen=True, slots=True)
class CondenseReport:
    """What :func:`condense` made.

    Attributes
    ----------
    source, path
        The two stores.
    source_records, records
        How many records they hold.
    source_bytes, bytes
        Logical size of these.
    records_per_namespace
        The most that a layer and length has.
    left_out
        Valid lengths that no record was kept of: the rarest, where the bytes allowed are fewer than one record each
        takes.
    by
        ``"layer"`` or ``"sequence"``.
    seconds
        Wall-clock time.
    buckets
        With length buckets, the report of each store; the counts above are their sums.
    """

    source: str
    path: str
    source_records: int
    records: int
    source_bytes: int
    bytes: int
    records_per_namespace: int
    left_out: tuple[int, ...]
    by: str
    seconds: float
    buckets: tuple[CondenseReport, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain types."""
        return asdict(self)

    def to_markdown(self) -> str:
        """Return the report as Markdown."""
        left = ", ".join(map(str, self.left_out)) or None
        rows = [
            ("records", f"{self.records} instead of {self.source_records}"),
            ("size", f"{readable_bytes(self.bytes)} instead of {readable_bytes(self.source_bytes)}"),
            ("records of a layer and length, at most", self.records_per_namespace),
            ("lengths left out", left),
            ("clustered by", self.by),
            ("seconds", self.seconds),
        ]
        return "\n".join([markdown_table(("condensed", self.path), rows), *(b.to_markdown() for b in self.buckets)])


def condense(
    path: str | os.PathLike[str],
    out_path: str | os.PathLike[str],
    *,
    records_per_namespace: int | None = None,
    max_bytes: int | None = None,
    by: str = "layer",
    store_dtype: str | None = None,
    backend: str = "arena",
    seed: int = 0,
    progress: bool | None = None,
    **options: Any,
) -> CondenseReport:
    """Make a store of cluster means from a store of single records.

    The keys of each layer and length are clustered; of each cluster the mean record is kept, under the mean key, with
    its size and spread. Records are streamed: neither store needs to fit into memory. The new store has no profile yet,
    as distances to means are others: :func:`memodb_transformers.profile` makes it. What a killed call leaves has to be
    removed: at ``out_path`` it is refused as no memo store; length buckets are made in a folder beside it,
    ``out_path.making-...``, and moved when all are whole.

    Parameters
    ----------
    path
        A memo store, or a folder of length buckets.
    out_path
        Where nothing is yet.
    records_per_namespace
        At most so many means of a layer and length; default 16, or what ``max_bytes`` allows.
    max_bytes
        Logical size of the records of the new store, at most (of each bucket). Where not even one for each length fits,
        the rarest lengths are left out.
    by
        ``"layer"``: each layer is clustered by its own keys. ``"sequence"``: sequences are clustered by their keys at
        the first layer, for all layers alike; only such a store serves ``memoize(lookup="sequence")``.
    store_dtype
        dtype of the means; default: that of the records.
    backend, **options
        As for ``memodb.MemoDB.create``.
    seed
        Of the clustering.
    progress
        Progress bars: True, False, or None for where a terminal is.

    Raises
    ------
    StoreMismatchError
        ``path`` is no memo store, or is condensed by layer already.
    ValueError
        An option cannot be used.
    memodb.StoreExistsError
        Something is at ``out_path``.
    """
    most = _check(records_per_namespace, max_bytes, by, store_dtype, seed)
    root, target = Path(path), Path(out_path)
    lengths = stored_lengths(root)
    parts = bucket_paths(root)
    began = perf_counter()
    with making(target, folder=bool(parts), permissions=permissions_of(options)) as place:
        pairs = [(part, bucket_path(place, length)) for part, length in zip(parts, lengths, strict=False)]
        reports = [
            _condense_one(source, out, most, max_bytes, by, store_dtype, backend, seed, progress, options)
            for source, out in pairs or [(root, place)]
        ]
    if not parts:
        return reports[0]
    reports = [replace(r, path=str(bucket_path(target, length))) for r, length in zip(reports, lengths, strict=True)]
    names = ("source_records", "records", "source_bytes", "bytes")
    return replace(
        reports[-1],
        source=str(root),
        path=str(target),
        seconds=perf_counter() - began,
        records_per_namespace=max(report.records_per_namespace for report in reports),
        left_out=tuple(sorted({length for report in reports for length in report.left_out})),
        buckets=tuple(reports),
        **{name: sum(getattr(report, name) for report in reports) for name in names},
    )


def _check(
    records_per_namespace: int | None, max_bytes: int | None, by: str, store_dtype: str | None, seed: int
) -> int | None:
    for name, value in (("records_per_namespace", records_per_namespace), ("max_bytes", max_bytes)):
        if value is not None:
            check_count(name, value)
    check_count("seed", seed, 0)
    if by not in _WAYS:
        raise ValueError(f"expected by to be one of {', '.join(_WAYS)}; found {by!r}")
    if store_dtype is not None:
        check_store_dtype(store_dtype)
    return 16 if records_per_namespace is None and max_bytes is None else records_per_namespace


def _condense_one(
    source_path: Path,
    path: Path,
    most: int | None,
    max_bytes: int | None,
    by: str,
    store_dtype: str | None,
    backend: str,
    seed: int,
    progress: bool | None,
    options: dict[str, Any],
) -> CondenseReport:
    began = perf_counter()
    earlier = read_condensed(source_path)
    if earlier is not None:
        raise StoreMismatchError(
            f"the store at {source_path} holds means already: condense the store of single records that it was made of"
        )
    with memodb.MemoDB.open(source_path) as source:
        members = _by_length(source)
        spec = source.spec
        dtype = store_dtype or spec.dtype_name
        nbytes = memodb.RecordSpec.of(spec.shape, dtype).nbytes
        kept, each = _allot(members, most, max_bytes, nbytes)
        sizes, spreads = [], []
        with (
            memodb.MemoDB.create(
                path, shape=spec.shape, dtype=dtype, key_dim=source.key_dim, backend=backend, **options
            ) as db,
            tqdm(
                total=sum(len(ids) for length in kept for ids in members[length].values()),
                desc="condensing",
                unit="record",
                disable=hide_bar(progress),
            ) as bar,
        ):
            for length in kept:
                for layers, keys, means, counts, spread in _means(source, members[length], each, by, seed, bar):
                    names = [namespace(layer, length) for layer in layers]
                    db.put(means.to(getattr(torch, dtype)), keys, namespace=names)
                    sizes.append(counts)
                    spreads.append(spread)
            records = len(db)
        condensed = Condensed(each, by, np.concatenate(sizes), np.concatenate(spreads))
        copy_beside(source_path, path, store_dtype=dtype, condensed=condensed)
        return CondenseReport(
            source=str(source_path),
            path=str(path),
            source_records=len(source),
            records=records,
            source_bytes=len(source) * spec.nbytes,
            bytes=records * nbytes,
            records_per_namespace=each,
            left_out=tuple(sorted(members.keys() - set(kept))),
            by=by,
            seconds=perf_counter() - began,
        )


Ids = NDArray[np.int64]


def _by_length(db: memodb.MemoDB) -> dict[int, dict[int, Ids]]:
    """List the records of each valid length and layer, in the order of their sequences."""
    found: dict[int, dict[int, Ids]] = {}
    for name, count in db.namespaces().items():
        place = parse_namespace(name)
        if place is not None and count:
            layer, length = place
            ids = db.ids(name)
            if len(ids):
                found.setdefault(length, {})[layer] = ids
    return {length: dict(sorted(found[length].items())) for length in sorted(found)}


def _allot(
    members: dict[int, dict[int, Ids]], most: int | None, max_bytes: int | None, nbytes: int
) -> tuple[list[int], int]:
    """Choose the lengths that are kept and how many means each layer of one has, so that all fit."""
    largest = max((len(ids) for layers in members.values() for ids in layers.values()), default=1)
    each = min(largest, most or largest)

    def total(lengths: list[int], each: int) -> int:
        return nbytes * sum(min(each, len(ids)) for length in lengths for ids in members[length].values())

    kept = list(members)
    if max_bytes is None:
        return kept, each
    often = sorted(members, key=lambda length: (-max(map(len, members[length].values())), length))
    while often and total(often, 1) > max_bytes:
        often.pop()
    if not often:
        raise ValueError(
            f"expected max_bytes to hold a record for each layer, {total(kept[:1], 1)} bytes; found {max_bytes}"
        )
    low, high = 1, each
    while low < high:  # the largest number that fits
        middle = (low + high + 1) // 2
        low, high = (middle, high) if total(often, middle) <= max_bytes else (low, middle - 1)
    return sorted(often), low


def _means(
    source: memodb.MemoDB, layers: dict[int, Ids], each: int, by: str, seed: int, bar: Any
) -> Iterator[tuple[list[int], NDArray[np.float32], torch.Tensor, NDArray[np.float32], NDArray[np.float32]]]:
    """Make the means of one length: layer numbers, keys, records, sizes and spreads, in parts that fit into memory."""
    keys = {layer: source.keys(ids) for layer, ids in layers.items()}
    if by == "sequence":
        first = next(iter(layers))
        if any(not np.array_equal(ids, layers[first] + (layer - first)) for layer, ids in layers.items()):
            raise StoreMismatchError(
                f"the store at {source.path} lacks records of some layers of a sequence: expected by='layer'"
            )
        groups = dict.fromkeys(layers, group_keys(keys[first], each, seed))
    else:
        groups = {layer: group_keys(keys[layer], each, seed) for layer in layers}
    together = [list(layers)] if by == "sequence" else [[layer] for layer in layers]
    for chosen in together:
        count = int(groups[chosen[0]].max()) + 1
        step = max(1, _SUMS // (4 * len(chosen) * int(np.prod(source.spec.shape))))
        for low in range(0, count, step):
            size = min(step, count - low)
            parts = [_stream(source, layers[layer], groups[layer], keys[layer], low, size, bar) for layer in chosen]
            records, centres, counts, spreads = (torch.stack([part[i] for part in parts], dim=1) for i in range(4))
            yield (
                chosen * size,
                centres.flatten(0, 1).numpy(),
                records.flatten(0, 1),
                counts.flatten().numpy(),
                spreads.flatten().numpy(),
            )


def _stream(
    source: memodb.MemoDB, ids: Ids, groups: Ids, keys: NDArray[np.float32], low: int, size: int, bar: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Average the records of groups ``low`` to ``low + size``: means, keys, sizes, spreads."""
    rows = np.flatnonzero((groups >= low) & (groups < low + size))
    records, centres = Means(size, source.spec.shape), Means(size, keys.shape[1:])
    centres.add(groups[rows] - low, torch.from_numpy(keys[rows]))
    step = max(1, _READ // source.spec.nbytes)
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        with source.multiget_mapped(ids[part]) as batch:
            records.add(groups[part] - low, batch.torch())
        bar.update(len(part))
    means, counts, spreads = records.result()
    return means, centres.result()[0], torch.from_numpy(counts), torch.from_numpy(spreads)
