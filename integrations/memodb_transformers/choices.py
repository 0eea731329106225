"""What ``memoize`` and ``evaluate`` are asked for, checked: layers, levels, thresholds, ways to look up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from .beside import read_tuned
from .errors import StoreMismatchError
from .lookup import LOOKUPS
from .performance import ProfileReport
from .store import MemoStore
from .thresholds import LEVELS, TUNED
from .tune_report import TuneReport

__all__ = ["Level", "asked_profiles", "check_lookup", "resolve_thresholds"]

# A name out of LEVELS, "tuned", or the similarity itself.
Level = str | float


def check_lookup(stores: Mapping[int, MemoStore], lookup: str, length_tolerance: int, neighbours: int = 1) -> None:
    """Refuse a way to look up that there is not, or that the stores cannot serve; see :func:`memoize`."""
    if lookup not in LOOKUPS:
        raise ValueError(f"expected lookup to be one of {', '.join(LOOKUPS)}; found {lookup!r}")
    if not _is_whole(length_tolerance) or length_tolerance < 0:
        raise ValueError(f"expected length_tolerance to be a number of tokens, at least 0; found {length_tolerance!r}")
    contexts = [store.path for store in stores.values() if store.target == "context"]
    if length_tolerance and contexts:
        raise StoreMismatchError(
            f"the store at {contexts[0]} holds contexts, which cannot be cut to another length: expected "
            f"length_tolerance=0, found {length_tolerance}"
        )
    if not _is_whole(neighbours) or neighbours < 1:
        raise ValueError(f"expected neighbours to be a number of records, at least 1; found {neighbours!r}")
    if neighbours > 1 and length_tolerance:
        raise ValueError(
            f"expected neighbours=1 with length_tolerance={length_tolerance}; found {neighbours}: records of different "
            "lengths are cut and scaled each by itself, so there is no one mean of them. Choose one of the two"
        )
    by_layer = [store.path for store in stores.values() if store.condensed and store.condensed.by == "layer"]
    if lookup == "sequence" and by_layer:
        raise StoreMismatchError(
            f"the store at {by_layer[0]} was condensed by layer: what is found at the first layer tells nothing of "
            "the others. Use lookup='layer', or condense again with by='sequence'"
        )


def resolve_thresholds(
    stores: Mapping[int, MemoStore],
    level: Level,
    threshold: float | None,
    layers: str | Sequence[int],
    lookup: str = "layer",
    *,
    length_tolerance: int = 0,
    neighbours: int = 1,
) -> dict[int, dict[int, float]]:
    """Find the layers to memoize and the threshold of each, for each store; see :func:`memoize`.

    With ``layers="profiled"`` these are the layers that pay in a batch of some size: which of them do in the batch at
    hand is decided when it comes, by :func:`asked_profiles`.
    """
    names = (*LEVELS, TUNED)
    if not (level in names if isinstance(level, str) else _is_number(level) and 0 <= level <= 1):
        raise ValueError(
            f"expected level to be one of {', '.join(names)}, or a similarity from 0 to 1; found {level!r}"
        )
    if threshold is not None and not (_is_number(threshold) and threshold >= 0):
        raise ValueError(f"expected threshold to be a squared distance of at least 0; found {threshold!r}")
    first = next(iter(stores.values()))
    wanted = _wanted(layers, first.card.layers)
    if level == TUNED and threshold is None:
        # The tuner tried neither to reuse more, nor anything else.
        if length_tolerance or neighbours != 1:
            raise ValueError(
                "expected length_tolerance=0 and neighbours=1 with level='tuned', as thresholds were tuned; found "
                f"length_tolerance={length_tolerance}, neighbours={neighbours}"
            )
        return _tuned(stores, wanted, lookup)
    reports = _profiles(stores)
    if not reports and (threshold is None or (isinstance(layers, str) and layers == "profiled")):
        raise StoreMismatchError(
            f"the store at {first.path} has no profile, which levels and layers='profiled' need: run "
            "memodb_transformers.profile on held-out batches, or give threshold= and layers="
        )
    # A bucket too small for sequences to be held out of it has no profile: nothing is known to pay there.
    return {length: _thresholds(reports.get(length), level, threshold, layers, wanted, lookup) for length in stores}


def _tuned(stores: Mapping[int, MemoStore], wanted: list[int], lookup: str) -> dict[int, dict[int, float]]:
    """Take what the tuner chose; a bucket that was not tuned is not memoized."""
    found = {length: plain for length, store in stores.items() if (plain := read_tuned(store.path)) is not None}
    if not found:
        raise StoreMismatchError(
            f"the store at {next(iter(stores.values())).path} was not tuned: run memodb_transformers.tune"
        )
    chosen: dict[int, dict[int, float]] = {length: {} for length in stores}
    for length, plain in found.items():
        report = TuneReport.from_dict(plain, stores[length].path)
        if report.lookup != lookup:
            raise StoreMismatchError(
                f"the store at {stores[length].path} was tuned for lookup={report.lookup!r}; found lookup={lookup!r}"
            )
        chosen[length] = {layer: value for layer, value in report.thresholds.items() if layer in wanted}
    return chosen


def asked_profiles(stores: Mapping[int, MemoStore], layers: str | Sequence[int]) -> dict[int, ProfileReport]:
    """Read what decides, batch by batch, which layers pay: nothing unless ``layers="profiled"`` is asked for.

    Raises
    ------
    StoreMismatchError
        A profile is damaged.
    """
    return _profiles(stores) if isinstance(layers, str) and layers == "profiled" else {}


def _profiles(stores: Mapping[int, MemoStore]) -> dict[int, ProfileReport]:
    return {
        length: ProfileReport.from_dict(store.profile, store.path)
        for length, store in stores.items()
        if store.profile is not None
    }


def _thresholds(
    report: ProfileReport | None,
    level: Level,
    threshold: float | None,
    layers: str | Sequence[int],
    wanted: list[int],
    lookup: str,
) -> dict[int, float]:
    found = dict.fromkeys(wanted, float(threshold)) if threshold is not None else {}
    if threshold is None and report is not None:
        found = dict(report.thresholds(level, lookup))
    thresholds = {layer: float(found[layer]) for layer in wanted if layer in found}
    if not isinstance(layers, str) or layers != "profiled":
        return thresholds
    return {layer: thresholds[layer] for layer in report.may_pay(thresholds, lookup)} if report else {}


def _wanted(layers: str | Sequence[int], count: int) -> list[int]:
    said = f"expected layers to be 'profiled', 'all' or a list of numbers; found {layers!r}"
    if isinstance(layers, str):
        if layers not in ("profiled", "all"):
            raise ValueError(said)
        return list(range(count))
    try:
        wanted = list(set(layers))
    except TypeError:
        raise ValueError(said) from None
    if not all(_is_whole(layer) and 0 <= layer < count for layer in wanted):
        raise ValueError(f"expected layers numbered 0 to {count - 1}; found {list(layers)}")
    return sorted(map(int, wanted))


def _is_number(value: object) -> bool:
    return isinstance(value, float | np.floating) or _is_whole(value)


def _is_whole(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
