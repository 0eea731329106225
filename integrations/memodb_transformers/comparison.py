"""The report of an evaluation: rows with intervals, and what each layer did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .outcomes import Doubles, interval, perplexity, ratio, resample
from .reports import markdown_table
from .trials import Trial

__all__ = ["EvaluationReport", "make_report"]

_COLUMNS = (
    "kind", "level", "accuracy", "agreement", "perplexity", "memoization_rate", "similarity", "seconds",
    "speedup_vs_plain", "speedup_vs_eager", "bytes",
)  # fmt: skip
# Shown after these where they apply: some with an interval, in "..._low" and "..._high".
_MORE = ("output_change", "accuracy", "accuracy_change", "agreement", "perplexity_change")
# The kinds whose counts by layer are shown: the first that is there.
_MAIN = ("nearest", "condensed", "mean", "random", "oracle")
_PARTS = ("embed", "search", "fetch", "attention")


@dataclass(frozen=True, slots=True)
class EvaluationReport:
    """What :func:`evaluate` found.

    Attributes
    ----------
    rows
        One dict for each kind and level, with the columns of :func:`evaluate`.
    stats
        ``Memo.stats()`` of the last pass over the data, by level, of the kind ``main``.
    sequences, repeats
        Sequences in a pass, and timed passes of each row.
    main
        ``"nearest"``, or the kind that stands for it where that was not asked for; None: nothing was memoized.
    stats_by_kind
        ``stats`` of all kinds.
    confidence
        Of the intervals.
    self_hits
        Sequences that the store holds: on these, everything but the plain model flatters.
    """

    rows: tuple[dict[str, Any], ...]
    stats: dict[str, dict[str, Any]]
    sequences: int
    repeats: int
    main: str | None
    stats_by_kind: dict[str, dict[str, dict[str, Any]]]
    confidence: float
    self_hits: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain types."""
        plain = asdict(self)
        plain["rows"] = list(plain["rows"])
        return plain

    def to_markdown(self) -> str:
        """Return the report as Markdown: the rows, with intervals, and what each layer of the main kind did."""
        header = list(_COLUMNS)
        lines = [[row[name] for name in _COLUMNS] for row in self.rows]
        for name in _MORE:
            cells = [_with_interval(row, name) for row in self.rows]
            if any(cell is not None for cell in cells):
                header.append(f"{name} interval" if name in _COLUMNS else name)
                for line, cell in zip(lines, cells, strict=True):
                    line.append(cell)
        note = (
            f"{self.sequences} sequences, {self.repeats} timed passes. Changes are from the plain model. Intervals: "
            f"{100 * self.confidence:g} %, bootstrap over sequences, the same ones drawn for all rows.\n"
        )
        if self.self_hits:
            note += (
                f"\n**{self.self_hits} of these sequences are in the store**: they find themselves, and the figures "
                "flatter. Evaluate on other data.\n"
            )
        return "\n".join([markdown_table(header, lines), note, *self._by_layer()])

    def _by_layer(self) -> list[str]:
        header = [f"{self.main}: level", "layer", "hits", "rate", *(f"{part} ms" for part in _PARTS)]
        lines = [
            [
                level,
                row["layer"],
                row["hits"],
                row["hits"] / max(1, found["sequences"]),
                *(1e3 * row[f"{part}_seconds"] for part in _PARTS),
            ]
            for level, found in self.stats.items()
            for row in found["layers"]
        ]
        return [markdown_table(header, lines)] if lines else []


def make_report(
    trials: Sequence[Trial], asked: Sequence[str], *, repeats: int, confidence: float, seed: int, self_hits: int = 0
) -> EvaluationReport:
    """Make the report of what was tried.

    Parameters
    ----------
    trials
        The runs; the plain model's and the eager one's are the first two.
    asked
        The kinds of rows, in their order.
    repeats, confidence, seed
        As in :func:`evaluate`.
    self_hits
        Sequences that the store holds.
    """
    plain, eager = trials[:2]
    shown = [trial for kind in asked for trial in trials if trial.kind == kind]
    sums, *others = (trial.sums for trial in (plain, *shown))
    drawn, *redrawn = resample([sums, *others], seed=seed)
    rows = []
    for trial, mine, again in zip(shown, others, redrawn, strict=True):
        answers = _answers(mine, sums, again, drawn, confidence)
        found: dict[str, Any] = {
            "kind": trial.kind,
            "level": trial.level,
            "memoization_rate": trial.stats["memoization_rate"] if trial.memo else None,
            "similarity": trial.similarity,
            "seconds": trial.median,
            "speedup_vs_plain": plain.median / trial.median,
            "speedup_vs_eager": eager.median / trial.median,
            "bytes": trial.bytes,
            "pass_seconds": list(trial.seconds),
            **answers,
        }
        rows.append({name: found[name] for name in (*_COLUMNS, "pass_seconds", *answers)})
    stats: dict[str, dict[str, dict[str, Any]]] = {}
    for trial in shown:
        if trial.memo is not None:
            stats.setdefault(trial.kind, {})[str(trial.level)] = trial.stats
    main = next((kind for kind in _MAIN if kind in stats), None)
    return EvaluationReport(
        tuple(rows), stats[main] if main else {}, len(sums), repeats, main, stats, confidence, self_hits
    )


def _answers(
    mine: Doubles, plain: Doubles, drawn: Doubles, plain_drawn: Doubles, confidence: float
) -> dict[str, float | None]:
    """Turn the sums of a run, ``[n, 8]`` and redrawn ``[resamples, 8]``, into the columns that tell of its answers."""
    total, reference = mine.sum(axis=0), plain.sum(axis=0)

    def accuracy(sums: Doubles) -> Any:
        return ratio(sums, "right", "labelled")

    def agreement(sums: Doubles) -> Any:
        return ratio(sums, "same", "predicted")

    # A difference of what is infinite on both sides is nothing that can be told.
    with np.errstate(invalid="ignore"):
        values: dict[str, tuple[Any, Any]] = {
            "accuracy": (accuracy(total), accuracy(drawn)),
            "agreement": (agreement(total), agreement(drawn)),
            "accuracy_change": (
                accuracy(total) - accuracy(reference),
                accuracy(drawn) - accuracy(plain_drawn),
            ),
            "perplexity_change": (
                perplexity(total) - perplexity(reference),
                perplexity(drawn) - perplexity(plain_drawn),
            ),
        }
    found = {
        "accuracy": _known(values["accuracy"][0]),
        "agreement": _known(values["agreement"][0]),
        "perplexity": _known(perplexity(total)),
        "output_change": _known(ratio(total, "change", "positions")),
        "accuracy_change": _known(values["accuracy_change"][0]),
        "perplexity_change": _known(values["perplexity_change"][0]),
    }
    for name, (_, samples) in values.items():
        found[f"{name}_low"], found[f"{name}_high"] = interval(samples, confidence)
    return found


def _known(value: Any) -> float | None:
    return None if np.isnan(value) else float(value)


def _with_interval(row: dict[str, Any], name: str) -> object:
    """Say a value with its interval; a column of its own shows the value already."""
    low, high = row.get(f"{name}_low"), row.get(f"{name}_high")
    if low is None or row[name] is None:
        return row[name] if name not in _COLUMNS else None
    between = f"{low:.4g} to {high:.4g}"
    return between if name in _COLUMNS else f"{row[name]:.4g} ({between})"
