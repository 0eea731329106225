"""Ways to reuse, tried one after the other: from timid to bold, and as far as a budget bears."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedModel

from .capture import model_inputs
from .judge import Change, Judge
from .memo import Memo
from .performance import ProfileReport
from .recorder import count_sequences
from .reports import hide_bar
from .sites import ModelSites
from .store import MemoStore

__all__ = ["Numbered", "Thresholds", "WaysTried", "confirm", "find_boldest", "order_ways"]

# Hit rates that a layer's threshold is tried at.
_RATES = (0.25, 0.5, 0.75, 1.0)
# Sequences that each layer is tried with by itself; the choice is then made with all.
_ALONE = 256
# Harm below this is none: it would make a gain look endless.
_LEAST_HARM = 1e-9
# A way is not measured again when it would have to be so many times better than before to come first.
_HOPE = 4.0
# Standard errors that a loss lies above the budget beyond doubt.
_DOUBT = 3.0
# Further ways tried after the first that is over the budget.
_MORE = 6

Thresholds = dict[int, float]
Numbered = list[tuple[int, Mapping[str, Any]]]


class WaysTried:
    """Runs the model with one way to reuse after another."""

    def __init__(
        self,
        model: PreTrainedModel,
        sites: ModelSites,
        store: MemoStore,
        judge: Judge,
        lookup: str,
        progress: bool | None,
    ) -> None:
        self.judge = judge
        self.tried = 0
        self._known: dict[Any, tuple[Change, float]] = {}
        self._model, self._sites, self._store, self._lookup = model, sites, store, lookup
        self._bar: Any = tqdm(desc="tuning", unit="pass", disable=hide_bar(progress))

    def __enter__(self) -> WaysTried:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def remember(self, batches: Numbered) -> None:
        """Run the plain model."""
        for number, batch in batches:
            logits = self._logits(batch)
            if number == batches[0][0]:
                self.judge.settle(logits, [every for _, every in batches])
            self.judge.remember(number, logits, batch)

    def run(self, thresholds: Thresholds, batches: Numbered) -> tuple[Change, float]:
        """Reuse with these thresholds: what it costs, and the memoization rate; the same is not tried twice."""
        key = (tuple(sorted(thresholds.items())), tuple(number for number, _ in batches))
        if key not in self._known:
            self._known[key] = self._try(thresholds, batches)
        return self._known[key]

    def _try(self, thresholds: Thresholds, batches: Numbered) -> tuple[Change, float]:
        length = self._store.padded_length
        memo = Memo(self._sites, {length: self._store}, {length: thresholds}, lookup=self._lookup)
        with memo.attached():
            parts = [self.judge.compare(number, self._logits(batch), batch) for number, batch in batches]
        self.tried += 1
        self._bar.update()
        return self.judge.sum(parts), float(memo.stats()["memoization_rate"])

    def _logits(self, batch: Mapping[str, Any]) -> Any:
        return getattr(self._model(**model_inputs(batch, self._model.device)), "logits", None)


def order_ways(
    trial: WaysTried, profile: ProfileReport, batches: Numbered, lookup: str, budget: float = math.inf
) -> list[Thresholds]:
    """Order ways to reuse from timid to bold, up to the first that is over the budget beyond doubt."""
    few: Numbered = []
    for pair in batches:
        if count_sequences([batch for _, batch in few]) < _ALONE:
            few.append(pair)
    options: dict[int, list[tuple[float, float, float]]] = {}  # layer: threshold, saved, damage
    for row in profile.layers:
        distances = sorted(d for d in row.scores(lookup)[0] if d is not None)
        if not distances:
            continue
        steps = sorted({distances[max(0, int(np.ceil(rate * len(distances))) - 1)] for rate in _RATES})
        for threshold in steps:
            saved = row.benefit(threshold, lookup)
            if saved > 0:
                change, _ = trial.run({row.layer: threshold}, few)
                options.setdefault(row.layer, []).append((threshold, saved, change.damage))
    return _by_gain(trial, options, few, budget)


def _by_gain(
    trial: WaysTried,
    options: Mapping[int, list[tuple[float, float, float]]],
    batches: Numbered,
    budget: float,
) -> list[Thresholds]:
    """Go from timid to bold, at each step by what saves most for the harm that it adds to what is reused already.

    Harms of layers do not just add up: a layer that is fed by one that reuses may be harmed less by reuse of its own,
    or more. So whatever would come first is measured on top of the last step before it is taken, and so is the best
    way of every layer that may have become better. It ends where the loss is over the budget beyond doubt.
    """
    path: list[Thresholds] = [{}]
    now = dict.fromkeys(options, -1)
    harm = 0.0
    # What each way adds to the harm of the last step, as far as that is known.
    adds = {(layer, place): damage for layer, ways in options.items() for place, (*_, damage) in enumerate(ways)}
    fresh = set(adds)  # by itself, each was measured already

    def ratio(way: tuple[int, int]) -> float:
        return _gain(options[way[0]], now[way[0]], way[1]) / max(adds[way], _LEAST_HARM)

    while True:
        left = [way for way in adds if way[1] > now[way[0]] and _gain(options[way[0]], now[way[0]], way[1]) > 0]
        if not left:
            return path
        while True:
            first = max(left, key=ratio)
            known = {layer for layer, _ in fresh}
            hopeful = [way for way in left if way[0] not in known and ratio(way) * _HOPE >= ratio(first)]
            asked = first if first not in fresh else max(hopeful, key=ratio, default=None)
            if asked is None:
                break
            bolder = {**path[-1], asked[0]: options[asked[0]][asked[1]][0]}
            adds[asked] = trial.run(bolder, batches)[0].damage - harm
            fresh.add(asked)
        layer, place = first
        taken = adds[first]
        # Bolder ways of the same layer add what they add beyond this one.
        adds.update({way: adds[way] - taken for way in adds if way[0] == layer and way[1] > place})
        now[layer], fresh = place, set()
        path.append({**path[-1], layer: options[layer][place][0]})
        change = trial.run(path[-1], batches)[0]
        harm = change.damage
        if change.loss - _DOUBT * change.error > budget:
            return path


def _gain(ways: list[tuple[float, float, float]], now: int, place: int) -> float:
    """Seconds that one of a layer's ways saves beyond what it saves now."""
    return ways[place][1] - (ways[now][1] if now >= 0 else 0.0)


def find_boldest(
    trial: WaysTried,
    path: list[Thresholds],
    batches: Numbered,
    budget: float,
    z: float,
) -> list[Thresholds]:
    """Find the boldest way on the path that is within the budget, and add what else is; returns the steps to it."""
    low, high = 0, len(path) - 1
    while low < high:
        middle = (low + high + 1) // 2
        if trial.run(path[middle], batches)[0].upper(z) <= budget:
            low = middle
        else:
            high = middle - 1
    steps = path[: low + 1]
    for earlier, later in list(zip(path[low:], path[low + 1 :], strict=False))[1 : 1 + _MORE]:
        # The next step is too much; a later one, of another layer, may not be.
        added = {layer: value for layer, value in later.items() if earlier.get(layer) != value}
        bolder = {**steps[-1], **added}
        if trial.run(bolder, batches)[0].upper(z) <= budget:
            steps.append(bolder)
    return steps


def confirm(
    trial: WaysTried,
    steps: list[Thresholds],
    first: Numbered,
    batches: Numbered,
    budget: float,
    z: float,
) -> tuple[Thresholds, float, Change]:
    """Take the choice back, step by step, until other data confirms it as well as those it was made with."""
    for thresholds in reversed(steps[1:]):
        if trial.run(thresholds, first)[0].upper(z) > budget:
            continue  # bisection has passed over it
        change, rate = trial.run(thresholds, batches)
        if change.upper(z) <= budget:
            return thresholds, rate, change
    return {}, 0.0, Change(0.0, 0.0, 0.0, 0)
