"""What reuse does to real models, what embedders find, what a build takes: sections of docs/performance.md, plots."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import targets
from benchmarks.memo_data import TASKS
from benchmarks.targets import Results, Row

Table = Callable[[Sequence[str], Iterable[Sequence[object]]], str]

#: Kind -> what it is called, and how it is drawn.
KINDS = {
    "random": ("a random record", {"color": "#9ca3af", "marker": "x"}),
    "mean": ("the mean record", {"color": "#2563eb", "marker": "s"}),
    "nearest": ("nearest (the paper)", {"color": "#16a34a", "marker": "^"}),
    "condensed": ("condensed", {"color": "#c2410c", "marker": "o", "linewidth": 2.2}),
    "one mean": ("condensed to one mean", {"color": "#f59e0b", "marker": "D"}),
    "oracle": ("the most similar record", {"color": "#9333ea", "marker": "*"}),
}


def measured(results: Results, kind: str) -> dict[str, Row]:
    """Return the tasks that were measured, in their order."""
    found = {name: targets.rows(results, f"{kind}-{name}") for name in TASKS}
    return {name: rows[0] for name, rows in found.items() if rows}


def text(results: Results, table: Table, images: Sequence[tuple[str, str]]) -> str:
    """Return the sections' text."""
    parts = [f"![{title}](images/{name})" for title, name in images if name.startswith("quality-")]
    for name, result in measured(results, "quality").items():
        parts.append(_quality(name, result, table))
    if times := measured(results, "times"):
        lines = []
        for name, result in times.items():
            plain = next(row for row in result["rows"] if row["kind"] == "plain")
            for row in result["rows"]:
                if row["kind"] != "plain":
                    lines.append(
                        [
                            name,
                            f"{row['budget']:g}",
                            *_cells(row, plain),
                            _ratio(row["speedup_vs_plain"]),
                            _ratio(row["speedup_vs_eager"]),
                        ]
                    )
        header = ["", "budget", "memoization rate", "quality", "change (95 %)", "time, of plain", "of eager"]
        parts.append(
            "The condensed stores, tuned, timed end to end beside the plain model with its default attention (5 passes "
            f"in turn, medians):\n\n{table(header, lines)}"
        )
    return "\n\n".join(parts)


def _quality(name: str, result: Row, table: Table) -> str:
    task = TASKS[name]
    plain = next(row for row in result["rows"] if row["kind"] == "plain")
    sizes = {store["kind"]: store["bytes"] for store in result["stores"]}
    lines = []
    for row in result["rows"]:
        if row["kind"] in KINDS:
            budget = "-" if row["budget"] is None else f"{row['budget']:g}"
            similarity = "" if row["similarity"] is None else f"{row['similarity']:.3f}"
            lines.append([KINDS[row["kind"]][0], budget, *_cells(row, plain), similarity, f"{row['bytes'] / 1e6:,.0f}"])
    measure = "perplexity" if plain["accuracy"] is None else "accuracy"
    header = ["reused", "budget", "memoization rate", measure, "change (95 %)", "similarity", "MB"]
    chosen = "; ".join(
        f"{kind}: " + ", ".join(f"{t['budget']:g} -> {_layers(t)}" for t in reports)
        for kind, reports in result["tuned"].items()
    )
    stores = ", ".join(f"{kind} {size / 1e6:,.0f} MB" for kind, size in sizes.items())
    return (
        f"**{name}** ({task.model}, L = {task.padded}): {task.recorded} sequences recorded, {task.profiled} to "
        f"calibrate, {task.tuned} to tune with, {plain['sequences']} tried; plain {measure} "
        f"{_measure(plain):.4g}. Stores: {stores}. Budget: what the tuner was given (points of accuracy on sequences "
        "of the training set, or percent of perplexity); -: everything is reused for which anything was recorded. "
        f"Layers chosen by budget: {chosen}.\n\n{table(header, lines)}"
    )


def _layers(tuned: Row) -> str:
    return " ".join(sorted(tuned["thresholds"], key=int)) or "none"


def _measure(row: Row) -> float:
    value = row["perplexity"] if row["accuracy"] is None else 100 * row["accuracy"]
    return float(value)


def _cells(row: Row, plain: Row) -> list[str]:
    change = ""
    if row["accuracy"] is not None:
        low, middle, high = (100 * row[f"accuracy_change{end}"] for end in ("_low", "", "_high"))
        change = f"{middle:+.2f} ({low:+.2f} to {high:+.2f})"
    elif row["perplexity"] is not None:
        change = f"{100 * (row['perplexity'] / plain['perplexity'] - 1):+.2f} %"
    return [f"{row['memoization_rate']:.3f}", f"{_measure(row):.4g}", change]


def _ratio(speedup: float | None) -> str:
    return "" if speedup is None else f"{1 / speedup:.3f}"


def embedders(results: Results, table: Table) -> str | None:
    """Return the section on embedders; None: not measured."""
    rows = targets.rows(results, "embedders")
    if not rows:
        return None
    found = rows[0]["retrieval"]
    lines = []
    for kind in ("mlp", "separable", "projection"):
        mine = [row for row in rows[0]["times"] if row["kind"] == kind]
        parameters = {row["padded"]: row["parameters_of_a_layer"] for row in mine}
        ms = {(row["padded"], row["batch"]): row["ms"] for row in mine}
        cells = [f"{ms[padded, batch]:.2f}" for padded in (64, 128, 512) for batch in (8, 32)]
        lines.append([kind, f"{found['found'][kind]:.4f}", f"{parameters[64]:,}", f"{parameters[512]:,}", *cells])
    header = ["", "similarity found", "parameters, L=64", "L=512"]
    header += [f"ms, L={padded}, batch {batch}" for padded in (64, 128, 512) for batch in (8, 32)]
    return (
        "`benchmarks/memo_embedders.py`. Similarity (Eq. 1) of the record whose key is nearest, mean over the layers "
        "of minilm-sst2, for SST-2 sentences that were not trained on; the most similar record there is would have "
        f"{found['oracle']:.4f}, the mean of all records of the length {found['mean_record']:.4f}. Times of one layer, "
        f"hidden size 384.\n\n{table(header, lines)}"
    )


def build(results: Results, table: Table) -> str | None:
    """Return the section on builds; None: not measured."""
    rows = targets.rows(results, "build")
    if not rows:
        return None
    whole, resumed = rows[0]["whole"], rows[0]["resumed"]
    kills = {kill["killed_in"]: kill for kill in rows[0]["kills"]}
    lines = []
    for stage, again in zip(whole["stages"], resumed["stages"], strict=True):
        kill = kills[stage["name"]]
        lines.append(
            [
                stage["name"],
                f"{stage['seconds']:.1f}",
                f"{stage['peak_memory'] / 2**30:.2f}",
                f"{stage['bytes'] / 2**20:,.0f}",
                "when it was done" if kill["stage_was_done"] else "in the middle",
                f"{again['seconds']:.1f}",
            ]
        )
    header = ["stage", "seconds", "peak memory, GiB", "on disk, MiB", "killed", "seconds, when gone on with"]
    compared = rows[0]["compared"]
    same = "**other records**"
    if compared["same_names"]:
        equal = compared["equal_records"]
        same = f"as many records under the same names, {equal:.1%} of them equal to the last bit"
        if equal < 1:
            same += (
                f"; the others differ by {compared['largest_difference']:.2g} at most, keys by "
                f"{compared['largest_difference_of_keys']:.2g} (training on two threads adds up in another order each "
                "time, and a mean is another one where a sequence falls into another cluster; the tests compare "
                "builds on one thread, which are equal)"
            )
    return (
        f"`benchmarks/memo_build.py`. {whole['sequences']} SST-2 sentences recorded in minilm-sst2 (L = 64, separable "
        f"embedder, four means a layer and length, budget 3 points): {rows[0]['seconds']:.0f} s in all, "
        f"{whole['bytes'] / 1e6:.0f} MB. The same build was killed once in each stage; the last call took "
        f"{rows[0]['last_call_seconds']:.0f} s, and the store holds {same}.\n\n{table(header, lines)}"
    )


def draw(results: Results, folder: Path) -> list[tuple[str, str]]:
    """Draw quality against memoization rate of each task; return (title, file name)."""
    import matplotlib

    matplotlib.rcParams["svg.hashsalt"] = "memodb"
    from matplotlib.figure import Figure

    made = []
    for name, result in measured(results, "quality").items():
        rows: list[Row] = result["rows"]
        plain = next(row for row in rows if row["kind"] == "plain")
        figure = Figure(figsize=(8, 4.6), layout="constrained")
        axes: Any = figure.add_subplot()
        for kind, (label, style) in KINDS.items():
            points = sorted((row["memoization_rate"], _measure(row)) for row in rows if row["kind"] == kind)
            if points:
                axes.plot(*zip(*points, strict=True), label=label, **style)
        axes.axhline(_measure(plain), color="black", linewidth=0.9, label="plain model")
        axes.set_xlabel("memoization rate (Eq. 2)")
        axes.set_ylabel("perplexity" if plain["accuracy"] is None else "accuracy, %")
        if plain["accuracy"] is None:
            axes.set_yscale("log")
        title = f"{name}: what is reused, and what it costs"
        axes.set_title(title, fontsize=10)
        axes.grid(visible=True, which="both", alpha=0.2)
        axes.legend(fontsize=8)
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / f"quality-{name}.svg", metadata={"Date": None})
        made.append((title, f"quality-{name}.svg"))
    return made
