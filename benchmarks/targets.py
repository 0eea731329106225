"""What memodb has to show, from the results of one run: ``python -m benchmarks.targets [FOLDER]`` prints it.

Each target is a ratio of two medians of the same run (or a time), found in the JSON files of a results folder.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Results = dict[str, dict[str, Any]]
#: How memodb is asked when nothing is said.
OURS = "memodb"
_LARGE = ("12x512x512 float16", "12x512x512 float32")
_LONG = 512
_ALL, _PAPER = "100% hits", "0% hits, the paper's embedder"
_SMALL = ("12x64x64 float16", "12x128x128 float16")


def load(folder: Path) -> Results:
    """Read every result file of a folder: name -> its content."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def rows(results: Results, name: str) -> list[Row]:
    """Return the results of one file of benchmarks, none if it was not run."""
    return list(results.get(name, {}).get("results", []))


def case(results: Results, record: str, n: int = 64, where: str = "warm") -> dict[str, Row]:
    """Return the contenders of one gather by name."""
    group = f"{where} {n} x {record}"
    return {row["contender"]: row for row in rows(results, "gather") if row["group"] == group}


def is_peer(row: Row) -> bool:
    """Tell whether a contender is neither memodb nor the floor."""
    return not row["contender"].startswith(OURS) and row["contender"] != "floor"


def best_peer(found: dict[str, Row], *, contiguous: bool) -> Row | None:
    """Return the quickest peer: of those that deliver one tensor, or of those that gather nothing."""
    peers = [row for row in found.values() if is_peer(row) and row["contiguous"] == contiguous]
    return min(peers, key=lambda row: row["total_ms"], default=None)


@dataclass(frozen=True)
class Found:
    """A figure: its value (None: not measured) and what it was compared with."""

    value: float | None
    against: str = ""


@dataclass(frozen=True)
class Target:
    """One line of the table."""

    key: str
    text: str
    most: float
    find: Callable[[Results], Found]
    unit: str = ""


def _gather(record: str, other: str) -> Callable[[Results], Found]:
    def find(results: Results) -> Found:
        found = case(results, record)
        if OURS not in found or other not in found:
            return Found(None)
        return Found(found[OURS]["total_ms"] / found[other]["total_ms"], other)

    return find


def _peer(record: str, *, contiguous: bool) -> Callable[[Results], Found]:
    def find(results: Results) -> Found:
        found = case(results, record)
        peer = best_peer(found, contiguous=contiguous)
        if OURS not in found or peer is None:
            return Found(None)
        return Found(found[OURS]["total_ms"] / peer["total_ms"], peer["contender"])

    return find


def _pair(name: str, ours: str, other: str) -> Callable[[Results], Found]:
    def find(results: Results) -> Found:
        found = {row["contender"]: row for row in rows(results, name)}
        if ours not in found or other not in found:
            return Found(None)
        return Found(found[ours]["total_ms"] / found[other]["total_ms"], other)

    return find


def _overhead(results: Results) -> Found:
    row = case(results, "1024 float32").get(OURS)
    return Found(None) if row is None else Found(row["call_ms"] * 1e3, "gather + release, without the read")


def _auto(results: Results) -> Found:
    worst = max(rows(results, "auto"), key=lambda row: row["auto_over_best"], default=None)
    return Found(None) if worst is None else Found(worst["auto_over_best"], f"{worst['group']}: {worst['contender']}")


def _memo(family: str, way: str, ratio: str) -> Callable[[Results], Found]:
    """Compare a memoized model with the plain one at L = 512."""

    def find(results: Results) -> Found:
        found = {
            row["contender"]: row for row in rows(results, "memo") if row["family"] == family and row["length"] == _LONG
        }
        if way not in found or found[way].get(ratio) is None:
            return Found(None)
        return Found(found[way][ratio], f"{way}, L = {_LONG}")

    return find


def _without_hits(way: str) -> Callable[[Results], Found]:
    """Find the model and length at which trying in vain costs most."""

    def find(results: Results) -> Found:
        found = [row for row in rows(results, "memo") if row["contender"] == way]
        worst = max(found, key=lambda row: row["times_plain"], default=None)
        if worst is None:
            return Found(None)
        return Found(worst["times_plain"], f"{worst['family']}, L = {worst['length']}")

    return find


TARGETS: tuple[Target, ...] = (
    *(Target(f"floor:{r}", f"64 x {r}: times the read alone", 1.08, _gather(r, "floor")) for r in _LARGE),
    *(
        Target(f"index_select:{r}", f"64 x {r}: of index_select(out=warm)", 0.55, _gather(r, n))
        for r in _LARGE
        for n in ("torch.index_select(out=warm)",)
    ),
    *(
        Target(f"memmap:{r}", f"64 x {r}: of np.memmap[ids]", 0.30, _gather(r, n))
        for r in _LARGE
        for n in ("np.memmap[ids]",)
    ),
    *(
        Target(f"peer:{r}", f"64 x {r}: of the best peer that delivers one tensor", 1.0, _peer(r, contiguous=True))
        for r in _SMALL
    ),
    *(
        Target(f"views:{r}", f"64 x {r}: of a list of views, which gathers nothing", 1.0, _peer(r, contiguous=False))
        for r in _SMALL
    ),
    Target(
        "search", "search of 64 keys: of faiss called directly", 1.10, _pair("search", OURS, "faiss, same parameters")
    ),
    Target(
        "put", "put, with checksums: of writing through np.memmap", 0.25, _pair("put", "memodb, one put", "np.memmap")
    ),
    Target(
        "writer",
        "gather beside a writer that puts: of one beside np.memmap",
        1.10,
        _pair("writer", "memodb puts", "np.memmap writes"),
    ),
    Target("overhead", "call of 64 x 4 KiB, in microseconds", 150.0, _overhead, unit="us"),
    Target("memo:deberta", "memoized DeBERTa-v2, all hits: of plain", 0.50, _memo("DeBERTa-v2", _ALL, "times_plain")),
    Target("memo:bert", "memoized BERT, all hits: of the plain model (SDPA)", 0.80, _memo("BERT", _ALL, "times_plain")),
    Target("memo:eager", "memoized BERT, all hits: of eager attention", 0.65, _memo("BERT", _ALL, "times_eager")),
    Target("memo:paper", "no hit, the paper's embedder: of the plain model", 1.05, _without_hits(_PAPER)),
    Target("memo:cheapest", "no hit, random projection: of the plain model", 1.02, _without_hits("0% hits")),
    Target("memo:one", "no hit, one lookup: of the plain model", 1.02, _without_hits("0% hits, one lookup")),
    Target("auto", 'worst case of "auto": of the better of map and copy', 1.10, _auto),
)


def evaluate(results: Results) -> list[dict[str, Any]]:
    """Return the targets with what was found: key, text, most, value, met (None where not measured), against."""
    lines = []
    for target in TARGETS:
        found = target.find(results)
        met = None if found.value is None else found.value <= target.most
        lines.append({**{k: getattr(target, k) for k in ("key", "text", "most", "unit")}, "met": met, **vars(found)})
    return lines


def worst_of_auto(results: Results, most: int = 10) -> list[Row]:
    """Return the cells of the grid where "auto" lost most."""
    return sorted(rows(results, "auto"), key=lambda row: -row["auto_over_best"])[:most]


def as_text(results: Results) -> str:
    """Return targets and worst cases as text."""
    lines = [f"{'':64}{'found':>9}{'at most':>9}"]
    for line in evaluate(results):
        value = "-" if line["value"] is None else f"{line['value']:.3g}"
        note = {None: "not measured", True: "met", False: "MISSED"}[line["met"]]
        lines.append(f"{line['text']:64}{value:>9}{line['most']:>9.4g}  {note:12}  {line['against']}")
    worst = worst_of_auto(results)
    if worst:
        lines.append("")
        lines.append('worst cases of "auto": measured, and what its choice cost')
    for row in worst:
        ratios = f"{row['auto_over_best']:9.2f}{row['choice_over_best']:9.2f}"
        lines.append(f"{row['group'] + ': ' + row['contender']:64}{ratios}  chose {row['chose']}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(as_text(load(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("results"))))
