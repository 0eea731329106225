"""Table 7: selective memoization (Eq. 3) beside memoization of all layers, out of what Figure 10 measured."""

from __future__ import annotations

import sys
from statistics import median

from benchmarks.paper import fig10_speedup
from benchmarks.paper.alone import alone
from benchmarks.paper.experiment import Experiment, Result, level_name, read_result, table
from benchmarks.paper.fig10_speedup import ratios, spread
from benchmarks.paper.workbench import Workbench


def run(bench: Workbench) -> Result:
    """Set the rounds of both beside each other, each as a share of the plain model's in the same round."""
    measured = read_result(bench.results, fig10_speedup.EXPERIMENT, here=True)
    if measured is None:
        raise ValueError("Table 7 is made of what fig10_speedup measures: run that first")
    found = measured["result"]
    rows = []
    for row in found["rows"]:
        if row["layers"] != "all" or row["kind"] == "plain":
            continue
        chosen = (row["family"], row["batch"], row["level"])
        selective = next(
            other
            for other in found["rows"]
            if other["layers"] == "profiled" and (other["family"], other["batch"], other["level"]) == chosen
        )
        rows.append(
            {
                **dict(zip(("family", "batch", "level"), chosen, strict=True)),
                "time_all": ratios(found, *chosen, "all"),
                "time_selective": ratios(found, *chosen, "profiled"),
                "rate_all": row["memoization_rate"],
                "rate_selective": selective["memoization_rate"],
            }
        )
    return {"rows": rows}


def text(result: Result) -> str:
    """Print both times, what the one saves over the other, and the rates."""
    lines = [
        [
            row["family"],
            row["batch"],
            level_name(row["level"]),
            spread(row["time_all"]),
            spread(row["time_selective"]),
            f"{100 * (1 - median(row['time_selective']) / median(row['time_all'])):+.0f}",
            row["rate_all"],
            row["rate_selective"],
        ]
        for row in result["rows"]
    ]
    header = ["", "batch", "level", "all layers, time of plain", "selective, time of plain"]
    header += ["selective takes less, %", "rate, all", "rate, selective"]
    note = (
        "Medians over rounds, and their range. Both were timed one after the other: rows whose rates are the same show "
        "how much of a difference is noise.\n\n"
    )
    return note + table(header, lines)


EXPERIMENT = Experiment(
    name="tab07_selective",
    where="Table 7",
    title="What selective memoization brings",
    paper="L = 512, batches of 1, 32 and 64: 3.0 % to 12.3 % less time than with all layers memoized; the memoization "
    "rate changes by -11.4 to +6.3 points.",
    differs="Models and data of Figure 10, and its figures. Eq. 3 is evaluated for each batch by its size and length. "
    "At the last level everything that is found is reused, so that there is more to select from.",
    data=False,
    run=run,
    text=text,
    source="fig10_speedup",
)

if __name__ == "__main__":
    sys.exit(alone(EXPERIMENT))
