"""How much is measured: ``MEMODB_BENCH=full`` (the default), ``quick`` (3 minutes) or ``tiny`` (does it work?)."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import numpy as np

MIB, GIB = 1 << 20, 1 << 30
#: No batch is larger.
MOST_BATCH = 2 * GIB


@dataclass(frozen=True)
class Case:
    """n random records of one shape, gathered from warm tmpfs or from a cold disk."""

    shape: tuple[int, ...]
    dtype: str
    n: int
    where: str = "warm"

    @property
    def nbytes(self) -> int:
        """Bytes of one record."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    @property
    def total(self) -> int:
        """Bytes of the batch."""
        return self.n * self.nbytes

    @property
    def label(self) -> str:
        """The record, in words."""
        return f"{'x'.join(map(str, self.shape))} {self.dtype}"

    @property
    def group(self) -> str:
        """The case, in words: contenders of one group took turns with each other."""
        return f"{self.where} {self.n} x {self.label}"


@dataclass(frozen=True)
class MemoSize:
    """Memoized models: lengths L of their inputs, layers, sequences to be recorded, turns of each way."""

    lengths: tuple[int, ...]
    layers: int
    known: int
    turns: int


@dataclass(frozen=True)
class Profile:
    """One profile.

    Parameters
    ----------
    cases
        Gathers.
    rounds, seconds
        Of a case: so many rounds, and a contender that has used its seconds sits out (after `least` rounds).
    least
        Rounds that every contender takes part in.
    slow_bytes
        Contenders marked slow (zarr, h5py, ...) are left out of larger batches: they would take hours.
    store_bytes
        Least size of what is gathered from: far more than a cache holds.
    grid_sizes, grid_batches, grid_pages
        Records, batches and ``huge_pages`` over which "auto" is compared with "map" and "copy".
    keys
        Keys that are searched.
    put_bytes
        Bytes of a put.
    writer_turns
        Turns of each writer that a gather is measured beside.
    table6
        Lengths L of the comparison with the paper's Table 6.
    backend_lengths, puts
        Lengths L that all backends are compared at, and how often each writes its store.
    memo
        Memoized models.
    """

    name: str
    cases: tuple[Case, ...]
    rounds: int
    seconds: float
    least: int
    slow_bytes: int
    store_bytes: int
    grid_sizes: tuple[int, ...]
    grid_batches: tuple[int, ...]
    grid_pages: tuple[bool, ...]
    keys: int
    put_bytes: int
    writer_turns: int
    table6: tuple[int, ...]
    backend_lengths: tuple[int, ...]
    puts: int
    memo: MemoSize


#: What the targets are about: 64 records each. They get more time than the others.
HEADLINES = ((64, "float16"), (128, "float16"), (512, "float16"), (512, "float32"))
SMALL = Case((1024,), "float32", 64)


def _square(length: int, dtype: str, n: int, where: str = "warm") -> Case:
    return Case((12, length, length), dtype, n, where)


def _matrix() -> tuple[Case, ...]:
    cases: dict[Case, None] = {SMALL: None}
    for length in (64, 96, 128, 200, 256, 384, 512, 1024):
        for dtype in ("float16", "float32"):
            for n in (1, 8, 32, 64, 256):
                most = MOST_BATCH // _square(length, dtype, 1).nbytes
                cases[_square(length, dtype, min(n, most))] = None
    return tuple(cases)


_COLD = ((64, 64), (128, 64), (512, 8), (512, 64), (1024, 8))
#: 4 KiB to 50 MB; among them records that are no multiple of a page (960,000 bytes) and of a huge page.
_GRID = (
    *(4096, 16384, 65536, 98304, 262144, 393216, 960000, 1572864, 2097152, 3538944, 4194304, 6291456, 12582912),
    *(16777216, 25165824, 50331648),
)

_PROFILES = (
    Profile(
        name="full",
        cases=(*_matrix(), *(_square(length, "float16", n, "cold") for length, n in _COLD)),
        rounds=31,
        seconds=0.7,
        least=5,
        slow_bytes=768 * MIB,
        store_bytes=256 * MIB,
        grid_sizes=_GRID,
        grid_batches=(1, 4, 16, 64, 256, 1024),
        grid_pages=(True, False),
        keys=100_000,
        put_bytes=GIB,
        writer_turns=6,
        table6=(256, 512),
        backend_lengths=(128, 512),
        puts=3,
        memo=MemoSize((128, 512), layers=6, known=24, turns=7),
    ),
    Profile(
        name="quick",
        cases=(SMALL, *(_square(length, dtype, 64) for length, dtype in HEADLINES), _square(512, "float16", 8, "cold")),
        rounds=9,
        seconds=0.25,
        least=3,
        slow_bytes=64 * MIB,
        store_bytes=128 * MIB,
        grid_sizes=(4096, 98304, 393216, 2097152, 6291456, 25165824),
        grid_batches=(1, 16, 64),
        grid_pages=(True,),
        keys=20_000,
        put_bytes=GIB // 4,
        writer_turns=2,
        table6=(256,),
        backend_lengths=(128,),
        puts=1,
        memo=MemoSize((128,), layers=2, known=20, turns=3),
    ),
    Profile(
        name="tiny",
        cases=(
            _square(64, "float16", 4),
            _square(64, "float16", 8),
            *(_square(64, "float16", n, "cold") for n in (2, 4)),
        ),
        rounds=3,
        seconds=0.05,
        least=1,
        slow_bytes=MIB // 2,
        store_bytes=MIB,
        grid_sizes=(4096, 2097152),
        grid_batches=(1, 4),
        grid_pages=(True,),
        keys=500,
        put_bytes=8 * MIB,
        writer_turns=1,
        table6=(64,),
        backend_lengths=(64,),
        puts=1,
        memo=MemoSize((16,), layers=1, known=12, turns=1),
    ),
)
BY_NAME = {profile.name: profile for profile in _PROFILES}


def chosen() -> Profile:
    """Return the profile that the environment names."""
    name = os.environ.get("MEMODB_BENCH", "full")
    if name not in BY_NAME:
        raise ValueError(f"MEMODB_BENCH={name}: expected one of {', '.join(BY_NAME)}")
    return BY_NAME[name]
