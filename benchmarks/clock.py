"""The clock: contenders take turns, so that a machine whose speed drifts treats all of them alike.

pytest-benchmark times one contender to its end before the next begins; so its table and statistics are used, and
the samples are handed to it.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any, NamedTuple

import numpy as np

import memodb


class Turn(NamedTuple):
    """Seconds of one turn: the call, one read of every byte, and giving the memory back."""

    gather: float
    read: float = 0.0
    release: float = 0.0

    @property
    def total(self) -> float:
        """All of it: what a gather costs whoever needs its bytes."""
        return sum(self)


@dataclass
class Samples:
    """The turns of one contender."""

    turns: list[Turn] = field(default_factory=list)

    def median(self, part: str = "total") -> float:
        """Return the median of one part, in seconds."""
        return median(getattr(turn, part) for turn in self.turns)

    def call(self) -> float:
        """Return the median of everything but the read, in seconds."""
        return median(turn.gather + turn.release for turn in self.turns)


def read(values: np.ndarray) -> None:
    """Read every byte once, at the speed of memory."""
    flat = values.reshape(-1).view(np.uint8)
    flat.view(np.uint64 if flat.size % 8 == 0 else np.uint8).max()


def arrays_of(found: Any) -> list[np.ndarray]:
    """Return what a contender delivered as arrays; one, but for a list of views."""
    if isinstance(found, memodb.MappedBatch):
        return [found.numpy()]
    return found if isinstance(found, list) else [found]


def timed_gather(gather: Callable[[Any], Any]) -> Callable[[Any], Turn]:
    """Return a function that gathers, reads every byte once and lets go: faults and unmapping are on the clock."""

    def turn(ids: Any) -> Turn:
        start = time.perf_counter()
        found = gather(ids)
        arrays = arrays_of(found)
        gathered = time.perf_counter()
        for i in range(len(arrays)):
            read(arrays[i])
        done = time.perf_counter()
        del found, arrays
        return Turn(gathered - start, done - gathered, time.perf_counter() - done)

    return turn


def timed(work: Callable[[Any], object]) -> Callable[[Any], Turn]:
    """Return a function that times a call which is all there is to time."""

    def turn(argument: Any) -> Turn:
        start = time.perf_counter()
        work(argument)
        return Turn(time.perf_counter() - start)

    return turn


def take_turns(
    ways: Mapping[str, Callable[[Any], Turn]],
    draw: Callable[[], Any],
    *,
    rounds: int,
    seconds: float,
    least: int,
    before: Callable[[str], None] | None = None,
) -> dict[str, Samples]:
    """Let every way take its turn in every round, with the same argument and in an order drawn anew.

    Parameters
    ----------
    ways
        Name -> a function that does the work and tells how long it took.
    draw
        Returns the argument of a round (the ids).
    rounds, seconds, least
        Rounds, after one or two that do not count; a way that has used its seconds sits out after `least` rounds.
    before
        Called, outside the clock, before each turn.
    """
    samples = {name: Samples() for name in ways}
    used = dict.fromkeys(ways, 0.0)
    slow: set[str] = set()
    order = list(ways)
    shuffle = random.Random(0)
    gc.collect()
    gc.disable()
    try:
        for number in range(-2, rounds):
            argument = draw()
            shuffle.shuffle(order)
            for name in order:
                if name in slow if number == -1 else number >= least and used[name] >= seconds:
                    continue
                if before is not None:
                    before(name)
                turn = ways[name](argument)
                if number >= 0:
                    samples[name].turns.append(turn)
                    used[name] += turn.total
                elif turn.total > seconds:
                    slow.add(name)  # warm enough after one
    finally:
        gc.enable()
    return samples


def hand_over(benchmark: Any, samples: Samples, **facts: Any) -> None:
    """Give the samples to pytest-benchmark, for its table, its statistics and our JSON."""
    benchmark.pedantic(lambda: None, rounds=len(samples.turns))
    benchmark.extra_info.update(facts)
    if benchmark.stats is not None:  # --benchmark-disable
        benchmark.stats.stats.data[:] = [turn.total for turn in samples.turns]
    for part in ("gather", "read", "release"):
        benchmark.extra_info[f"{part}_ms"] = samples.median(part) * 1e3
    benchmark.extra_info["call_ms"] = samples.call() * 1e3
