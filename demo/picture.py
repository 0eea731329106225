"""The result as a picture of four panels."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .report import Result, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw"]

# Okabe and Ito's colours, which colour-blind readers can tell apart.
_BLUE, _ORANGE, _GREEN, _PURPLE, _GREY = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#999999"
_LEVEL_COLOURS = {"moderate": _ORANGE, "aggressive": _GREEN, "tuned": _PURPLE}
_PART_COLOURS = {"embed": _ORANGE, "search": _PURPLE, "fetch": _GREEN, "attention": _BLUE}


def draw(result: Result, path: Path) -> None:
    """Draw the result into a PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(13, 8.5), layout="constrained")
    figure.suptitle(f"memodb demo: {result.title}", fontsize=13)
    _end_to_end(axes[0, 0], result)
    _rates(axes[0, 1], result)
    _parts(axes[1, 0], result)
    _gathers(axes[1, 1], result)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _style(run: Run) -> dict[str, Any]:
    """A colour a level; means are hatched."""
    hatch = "//" if run.row["kind"] == "condensed" else None
    return {"color": _LEVEL_COLOURS.get(run.row["level"], _BLUE), "hatch": hatch, "edgecolor": "white"}


def _end_to_end(axis: Axes, result: Result) -> None:
    runs = result.runs()
    bars: list[tuple[str, dict[str, Any], dict[str, Any]]] = [("no reuse", result.plain, {"color": _GREY})]
    bars += [(run.name.replace(", ", ",\n").replace(" for ", "\nfor "), run.row, _style(run)) for run in runs]
    for label, row, style in bars:
        patch = axis.bar(label, row["seconds"], **style).patches[0]
        said = f"{row['seconds']:.2f} s"
        if row["accuracy"] is not None:
            said += f"\nacc. {100 * row['accuracy']:.1f} %"
        axis.annotate(
            said, (patch.get_x() + patch.get_width() / 2, patch.get_height()), ha="center", va="bottom", fontsize=8
        )
    axis.margins(y=0.18)
    axis.tick_params(axis="x", labelsize=7)
    axis.set_ylabel(f"time for {result.evaluation.sequences:,} sequences [s]")
    axis.set_title("End to end, with accuracy")


def _rates(axis: Axes, result: Result) -> None:
    runs = result.runs()
    width = 0.86 / max(1, len(runs))
    for number, run in enumerate(runs):
        rates = [100 * row["hits"] / max(1, run.stats["sequences"]) for row in run.stats["layers"]]
        places = [layer + (number - (len(runs) - 1) / 2) * width for layer in range(len(rates))]
        axis.bar(places, rates, width, label=run.name, **_style(run))
    axis.set_xticks(range(result.built.layers))
    axis.set_ylim(0, 138)  # room for the legend above full bars
    axis.set_yticks(range(0, 101, 20))
    axis.set_xlabel("layer")
    axis.set_ylabel("sequences with a hit [%]")
    axis.set_title("Memoization rate by layer")
    axis.legend(frameon=False, ncols=2, fontsize=8, loc="upper left")


def _parts(axis: Axes, result: Result) -> None:
    run = (result.detailed() or result.runs())[-1]
    layers = range(len(run.stats["layers"]))
    plain = [1e3 * row.attention_seconds * run.stats["sequences"] for row in run.profile.layers]
    axis.bar([layer - 0.2 for layer in layers], plain, 0.38, label="original attention", color=_GREY)
    bottom = [0.0] * len(run.stats["layers"])
    for part, colour in _PART_COLOURS.items():
        taken = [1e3 * row[f"{part}_seconds"] for row in run.stats["layers"]]
        axis.bar([layer + 0.2 for layer in layers], taken, 0.38, bottom=bottom, label=part, color=colour)
        bottom = [low + high for low, high in zip(bottom, taken, strict=True)]
    axis.set_xticks(list(layers))
    axis.margins(y=0.35)
    axis.set_xlabel("layer (without a right bar: not memoized)")
    axis.set_ylabel("time of one pass [ms]")
    axis.set_title(f"Time by layer, {run.name}: original (left), memoized (right)", fontsize=10)
    axis.legend(frameon=False, ncols=3, fontsize=8, loc="upper left")


def _gathers(axis: Axes, result: Result) -> None:
    ways = list(result.gathers[0].seconds)
    height = 0.8 / len(result.gathers)
    for number, times in enumerate(result.gathers):
        places = [way + (number - (len(result.gathers) - 1) / 2) * height for way in range(len(ways))]
        values = [1e3 * times.seconds[way] for way in ways]
        how = "mapped" if times.zero_copy else "copied"
        colour = (_BLUE, _ORANGE)[number % 2]
        axis.barh(places, values, height, label=f"{times.title} (memodb: {how})", color=colour)
        for place, value in zip(places, values, strict=True):
            axis.annotate(f" {value:.3g} ms", (value, place), va="center", fontsize=8)
    axis.set_yticks(range(len(ways)), ways)
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.margins(x=0.2)
    axis.set_xlabel("gather + one read of everything [ms], logarithmic")
    axis.set_title("64 scattered records into one tensor")
    axis.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.4, -0.14), ncols=1)
