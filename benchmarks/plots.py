"""The plots of docs/performance.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import targets
from benchmarks.targets import Results, Row

#: Who is drawn, and how: memodb stands out, peers keep their colours in every plot.
STYLES = {
    "memodb": {"color": "#c2410c", "linewidth": 2.4, "marker": "o"},
    "list of views": {"color": "#6b7280", "linestyle": ":", "marker": "."},
    "np.memmap[ids]": {"color": "#2563eb", "marker": "."},
    "np.take(out=warm)": {"color": "#0891b2", "marker": "."},
    "torch.index_select(out=warm)": {"color": "#16a34a", "marker": "."},
    "LMDB get, copied (out=warm)": {"color": "#9333ea", "marker": "."},
    "h5py read_direct(out=warm)": {"color": "#a16207", "marker": "."},
    "zarr oindex[ids]": {"color": "#db2777", "marker": "."},
}


def draw(results: Results, folder: Path) -> list[tuple[str, str]]:
    """Draw what there are results for; return (title, file name) of each plot."""
    warm = [row for row in targets.rows(results, "gather") if row["where"] == "warm" and "times_floor" in row]
    made = []
    if any(row["n"] == 64 for row in warm):
        title = "64 random records: gather + one full read + release, as multiples of the read alone"
        _lines(folder, "gather-sizes.svg", title, [row for row in warm if row["n"] == 64], "record_bytes")
        made.append((title, "gather-sizes.svg"))
    record = "12x512x512 float16"
    batches = [row for row in warm if row["record"] == record]
    if len({row["n"] for row in batches}) > 1:
        title = f"Records of {record}, by size of the batch: multiples of the read alone"
        _lines(folder, "gather-batches.svg", title, batches, "n")
        made.append((title, "gather-batches.svg"))
    return made


def _lines(folder: Path, name: str, title: str, found: list[Row], along: str) -> None:
    import matplotlib

    # The same results give the same file: neither its date nor random ids.
    matplotlib.rcParams["svg.hashsalt"] = "memodb"
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.8), layout="constrained")
    axes: Any = figure.add_subplot()
    for contender, style in STYLES.items():
        points = sorted((row[along], row["times_floor"]) for row in found if row["contender"] == contender)
        if points:
            axes.plot(*zip(*points, strict=True), label=contender, **style)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xscale("log", base=2 if along == "n" else 10)
    axes.set_yscale("log")
    axes.set_xlabel("records a batch" if along == "n" else "bytes of a record")
    axes.set_ylabel("times the read of a warm tensor")
    axes.set_title(title, fontsize=10)
    axes.grid(visible=True, which="both", alpha=0.2)
    axes.legend(fontsize=8)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / name, metadata={"Date": None})
