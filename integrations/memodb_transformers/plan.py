"""Which runs an evaluation makes: the kinds asked for, checked, each at each level."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

import memodb

from . import controls
from .choices import Level
from .controls import Pick, Reuse
from .errors import InvalidBatchError, StoreMismatchError
from .memo import Memo, Thresholds
from .recorder import batch_shape
from .store import MemoStore
from .trials import Batches, Trial

__all__ = ["KINDS", "asked_kinds", "check_lengths", "check_settings", "plan_trials"]

# In the order of the rows.
KINDS = ("plain", "random", "mean", "nearest", "condensed", "oracle")
_USUAL = ("plain", "random", "mean", "nearest", "condensed")

Stores = Mapping[int, MemoStore]
Found = Mapping[Level, Mapping[int, Thresholds]]


def check_settings(kinds: Sequence[str] | None, repeats: Any, confidence: Any, seed: Any, oracle_limit: Any) -> None:
    """Refuse what can be refused before anything is opened; see :func:`evaluate`."""
    unknown = [kind for kind in kinds or () if kind not in KINDS]
    if unknown or isinstance(kinds, str):
        found = repr(kinds) if isinstance(kinds, str) else ", ".join(map(repr, unknown))
        raise ValueError(f"expected a list of kinds out of {', '.join(KINDS)}; found {found}")
    if kinds is not None and not len(kinds):
        raise ValueError(f"expected kinds out of {', '.join(KINDS)}, or None for all that there can be; found none")
    for name, value, least in (("repeats", repeats, 1), ("seed", seed, 0), ("oracle_limit", oracle_limit, 0)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
            raise ValueError(f"expected {name} to be a number of at least {least}; found {value!r}")
    if isinstance(confidence, bool) or not isinstance(confidence, float | np.floating) or not 0 < confidence < 1:
        raise ValueError(f"expected confidence to be between 0 and 1, such as 0.95; found {confidence!r}")


def asked_kinds(kinds: Sequence[str] | None, stores: Stores, others: Stores | None) -> tuple[str, ...]:
    """Tell the kinds of rows, in their order.

    Parameters
    ----------
    kinds
        What was asked for; None: all usual ones that there can be.
    stores, others
        The store, and the condensed one beside it.

    Raises
    ------
    ValueError
        A kind needs single records, or a condensed store.
    StoreMismatchError
        ``others`` holds single records.
    """
    first = next(iter(stores.values()))
    single = first.condensed is None
    if others is not None:
        second = next(iter(others.values()))
        if not single:
            raise ValueError(
                f"expected a store of single records beside condensed=; found one that is condensed itself at "
                f"{first.path}: leave condensed= out, or name the store that it was made of"
            )
        if second.condensed is None:
            raise StoreMismatchError(
                "expected condensed= to name a store that memodb_transformers.condense made; found single records at "
                f"{second.path}"
            )
    possible = {"plain", "random", "mean", "nearest", "oracle"} if single else {"plain"}
    if others is not None or not single:
        possible.add("condensed")
    wanted = possible.intersection(_USUAL) if kinds is None else set(kinds)
    missing = [kind for kind in KINDS if kind in wanted - possible]
    if missing and single:
        raise ValueError(
            "expected condensed= with the kind 'condensed': the path of a store that memodb_transformers.condense "
            "made; found none"
        )
    if missing:
        raise ValueError(
            f"expected kinds out of plain, condensed for the store of means at {first.path}; found "
            f"{', '.join(map(repr, missing))}, which need single records: evaluate the store that it was made of, with "
            "this one as condensed="
        )
    return tuple(kind for kind in KINDS if kind in wanted)


def check_lengths(stores: Stores, data: Batches) -> None:
    """Refuse batches all of which are longer than all records."""
    shortest = min(batch_shape(inputs)[1] for inputs, _ in data)
    if shortest > max(stores):
        raise InvalidBatchError(
            f"expected batches padded to at most {max(stores)} tokens, as the store's; found none below {shortest}"
        )


def plan_trials(
    asked: Sequence[str],
    stores: Stores,
    found: Found,
    others: Stores | None,
    found_there: Found,
    means: Mapping[int, memodb.MemoDB],
    memoize: Callable[[Stores, Mapping[int, Thresholds]], Memo],
    seed: int,
) -> list[Trial]:
    """Make the runs: the plain model and the eager one, then each kind at each level.

    Parameters
    ----------
    asked
        The kinds of rows. Where only controls are, the nearest records are looked for all the same.
    stores, found
        The store, and its thresholds at each level.
    others, found_there
        The condensed store beside it, and its thresholds.
    means
        The mean records, for the kind mean.
    memoize
        Makes the memo of a store with some thresholds.
    seed
        Of the random records.
    """
    trials, following = [Trial("plain"), Trial("eager")], []
    picks: dict[str, Pick] = {"random": controls.random(seed), "mean": controls.mean(means), "oracle": controls.best}
    wanted = [kind for kind in picks if kind in asked]
    if wanted or "nearest" in asked:
        for level, thresholds in found.items():
            hits = Reuse()
            trials.append(
                Trial("nearest", level, memoize(stores, thresholds), hits, _bytes(stores), timed="nearest" in asked)
            )
            for kind in wanted:
                size = sum(map(_size, means.values())) if kind == "mean" else _bytes(stores)
                following.append(Trial(kind, level, memoize(stores, thresholds), Reuse(picks[kind], hits), size))
    if "condensed" in asked:
        source, there = (stores, found) if others is None else (others, found_there)
        for level, thresholds in there.items():
            following.append(Trial("condensed", level, memoize(source, thresholds), Reuse(), _bytes(source)))
    return trials + following


def _bytes(stores: Stores) -> int:
    return sum(_size(store.db) for store in stores.values())


def _size(db: memodb.MemoDB) -> int:
    return len(db) * db.spec.nbytes
