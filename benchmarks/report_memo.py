"""Memoized models: the figures of ``test_memo.py`` and ``test_product.py`` as Markdown, and as text after a run.

The breakdown is laid out like Table 4 of the AttMemo paper: the parts of one self-attention, with and without a memo.
"""

from __future__ import annotations

from benchmarks import targets
from benchmarks.targets import Results, Row

#: Part of a layer -> what the paper calls it.
PARTS = {
    "embed": "Embedding",
    "search": "Searching",
    "fetch": "APM fetch",
    "value": "V (and K for a cache)",
    "product": "APM times V",
    "miss": "Original attention, misses",
    "other": "Splitting, merging, output projection",
}


def groups(results: Results) -> dict[str, dict[str, Row]]:
    """Return the ways of each case by name."""
    found: dict[str, dict[str, Row]] = {}
    for row in targets.rows(results, "memo"):
        found.setdefault(row["group"], {})[row["contender"]] = row
    return found


def models(results: Results) -> list[tuple[str, list[str], list[list[str]]]]:
    """Return title, header and lines of each case: ms of a forward, and ratios to the plain model."""
    tables = []
    for group, ways in groups(results).items():
        lines = []
        for name, row in ways.items():
            eager = row.get("times_eager")
            against = "" if eager is None else f"{eager:.3f}"
            lines.append([name, f"{row['total_ms']:.1f}", f"{row['times_plain']:.3f}", against])
        tables.append((group, ["", "ms", "of plain", "of eager"], lines))
    return tables


def breakdowns(results: Results) -> list[tuple[str, list[str], list[list[str]]]]:
    """Return title, header and lines of the parts of one layer, in ms, for each case."""
    tables = []
    for group, ways in groups(results).items():
        lines = []
        for name, row in ways.items():
            if "layer_embed_ms" in row:
                found = [row[f"layer_{part}_ms"] for part in PARTS]
                lines.append([name, *(f"{value:.2f}" for value in [*found, sum(found)])])
        tables.append((f"One self-attention, ms: {group}", ["", *PARTS.values(), "Total"], lines))
    return tables


def as_text(results: Results) -> str:
    """Return all tables as text, for the end of a run."""
    parts = []
    for title, header, lines in [*models(results), *breakdowns(results)]:
        rows = [header, *lines]
        widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
        text = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
        parts.append("\n".join([title, "", *text]))
    return "\n\n".join(parts)
