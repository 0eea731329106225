"""Gather + one full read + release: memodb beside its peers, over sizes, batches, warm tmpfs and cold disk.

Run: ``make bench BENCH_ARGS=benchmarks/test_gather.py``; one case alone: ``python -m benchmarks.race --help``.

The contenders of a case take turns (`benchmarks.clock`); the first test of a case lets them, each test hands over the
samples of one of them. Slow contenders are left out of batches beyond 768 MiB (`Profile.slow_bytes`).
"""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from benchmarks.clock import hand_over
from benchmarks.contenders import CONTENDERS
from benchmarks.profiles import HEADLINES, Case, Profile, chosen
from benchmarks.race import Field, NoRoomError, Race, scratch
from benchmarks.records import how_many


class Grounds:
    """Keeps the files of one size: cases of the same records, where as many are stored, share them."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._key = self._field = self._race = None

    def race(self, case: Case, profile: Profile) -> Race:
        """Return what came of a case; its first test lets the contenders run."""
        # Not a fixture of the module: pytest would reorder the tests, and make every file again for each of them.
        if self._race is None or self._race.case != case:
            self._race = None
            important = (case.shape[-1], case.dtype) in HEADLINES and case.n == 64 and case.where == "warm"
            seconds = profile.seconds * (4 if important else 1)
            field = self.field(case)
            self._race = Race(case, field, rounds=profile.rounds, seconds=seconds, least=profile.least)
        return self._race

    def field(self, case: Case) -> Field:
        """Return the contenders of a case, their files made."""
        slow_bytes = chosen().slow_bytes
        slow = case.total <= slow_bytes
        largest = [c for c in chosen().cases if self._same(c, case) and (c.total <= slow_bytes) == slow]
        stored = max(how_many(c, chosen()) for c in largest)
        key = case.shape, case.dtype, case.where, slow
        if key != self._key:
            self.clear()
            folder = self._stack.enter_context(scratch(case.where))
            self._field = Field(folder, case, slow=slow, stored=stored)
            self._key = key
        return self._field

    @staticmethod
    def _same(one: Case, other: Case) -> bool:
        return (one.shape, one.dtype, one.where) == (other.shape, other.dtype, other.where)

    def clear(self) -> None:
        """Remove the files."""
        self._key = self._field = self._race = None
        self._stack.close()


@pytest.fixture(scope="module")
def grounds():
    made = Grounds()
    yield made
    made.clear()


@pytest.fixture
def race(grounds, request, profile):
    try:
        return grounds.race(request.param, profile)
    except NoRoomError as error:
        pytest.skip(str(error))


def _takes_part(contender, case: Case) -> bool:
    return (case.where == "cold" or not contender.cold_only) and (
        case.total <= chosen().slow_bytes or not contender.slow
    )


PAIRS = [(case, contender) for case in chosen().cases for contender in CONTENDERS if _takes_part(contender, case)]


@pytest.mark.parametrize(
    ("race", "name"),
    [(case, contender.name) for case, contender in PAIRS],
    ids=[f"{case.group}-{contender.name}" for case, contender in PAIRS],
    indirect=["race"],
)
def test_gather(benchmark, race, name):
    if name in race.absent:
        pytest.skip(race.absent[name])
    case = race.case
    benchmark.group = case.group
    contender = next(c for c in CONTENDERS if c.name == name)
    hand_over(
        benchmark,
        race.samples[name],
        contender=name,
        contiguous=contender.contiguous,
        where=case.where,
        n=case.n,
        record=case.label,
        record_bytes=case.nbytes,
        cached_before=race.cached[name],
    )
