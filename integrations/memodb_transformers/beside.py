"""What lies beside the database of a memo store: what a condensed one tells of its means, profile, tuned choice."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memodb.safe import Guard

from .errors import StoreMismatchError
from .files import read_array, read_json, write_array, write_json

__all__ = [
    "MEMO_FILES",
    "Condensed",
    "copy_beside",
    "read_condensed",
    "read_profile",
    "read_tuned",
    "write_profile",
    "write_tuned",
]

MEMO_FILES = "transformers"


@dataclass(frozen=True, slots=True, eq=False)
class Condensed:
    """What tells a store of means from one of single records.

    Attributes
    ----------
    records_per_namespace
        The most means that a layer and length has.
    by
        ``"layer"`` or ``"sequence"``: whether the records of all layers belong together.
    sizes, spreads
        float32 by id: how many records each is the mean of, and their mean squared L2 distance to it.
    """

    records_per_namespace: int
    by: str
    sizes: NDArray[np.float32]
    spreads: NDArray[np.float32]


def copy_beside(
    source: Path, destination: Path, *, store_dtype: str | None = None, condensed: Condensed | None = None
) -> None:
    """Make a database a memo store of the model of another store.

    Parameters
    ----------
    source, destination
        A memo store, and a database that was made of it.
    store_dtype
        dtype of the records of the destination, where it is another.
    condensed
        What the destination holds means of. Then it gets no profile: distances to means are others.
    """
    folder = destination / MEMO_FILES
    Guard.of(destination).make_directory(folder)
    here = Guard.of(source).directory(source / MEMO_FILES)
    there = Guard.of(destination).directory(folder)
    names = {file.name for file in (source / MEMO_FILES).iterdir() if file.suffix in (".json", ".npy")} - {"memo.json"}
    for name in sorted(names - ({"build.json", "profile.json", "tuned.json"} if condensed else set())):
        there.write(folder / name, here.read(source / MEMO_FILES / name))
    memo = read_json(source / MEMO_FILES / "memo.json")
    if condensed is not None:
        write_array(folder / "cluster-sizes.npy", condensed.sizes)
        write_array(folder / "cluster-spreads.npy", condensed.spreads)
        memo["condensed"] = {"records_per_namespace": condensed.records_per_namespace, "by": condensed.by}
    # Written last, as in a build: a copy that was cut off is no memo store.
    write_json(folder / "memo.json", {**memo, "store_dtype": store_dtype or memo["store_dtype"]})


def read_condensed(path: Path, memo: dict[str, Any] | None = None) -> Condensed | None:
    """Read what a condensed store tells of its means; None: it holds single records.

    Raises
    ------
    StoreMismatchError
        It is damaged.
    """
    file = path / MEMO_FILES / "memo.json"
    told = (read_json(file) if memo is None else memo).get("condensed")
    if told is None:
        return None
    sizes, spreads = (read_array(path / MEMO_FILES / f"cluster-{name}.npy") for name in ("sizes", "spreads"))
    try:
        each, by = int(told["records_per_namespace"]), str(told["by"])
        if sizes.ndim != 1 or sizes.shape != spreads.shape or (sizes < 1).any():
            raise ValueError(f"sizes {list(sizes.shape)} and spreads {list(spreads.shape)}")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise StoreMismatchError(f"{file} is damaged ({error!r}): condense the store again") from error
    return Condensed(each, by, sizes.astype(np.float32), spreads.astype(np.float32))


def write_profile(path: Path, profile: dict[str, Any]) -> None:
    """Write the profile of a memo store, in place of an earlier one."""
    write_json(path / MEMO_FILES / "profile.json", profile)


def read_profile(path: Path) -> dict[str, Any] | None:
    """Read the profile of a memo store, or None where there is none yet."""
    file = path / MEMO_FILES / "profile.json"
    return read_json(file) if file.exists() else None


def write_tuned(path: Path, tuned: dict[str, Any]) -> None:
    """Write what was tuned of a memo store, in place of an earlier choice."""
    write_json(path / MEMO_FILES / "tuned.json", tuned)


def read_tuned(path: Path) -> dict[str, Any] | None:
    """Read what was tuned of a memo store, or None where nothing was yet."""
    file = path / MEMO_FILES / "tuned.json"
    return read_json(file) if file.exists() else None
