"""Puts the figures of `test_backends` and `million` into docs/backends.md, between its marks."""

from __future__ import annotations

from pathlib import Path

from benchmarks.targets import Results, Row, rows

_MARKS = "<!-- {0}: written by make bench-report -->", "<!-- end of {0} -->"
NOT_MEASURED = "*not measured yet*"


def table(header: list[str], lines: list[list[str]]) -> str:
    """Return a Markdown table."""
    text = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in text)


def _number(value: float | None, digits: int = 3) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


def compared(results: Results) -> str:
    """Return one table a group of `benchmarks.test_backends`."""
    groups: dict[str, list[Row]] = {}
    for row in rows(results, "backends"):
        groups.setdefault(row["group"], []).append(row)
    parts = []
    for group, found in groups.items():
        lines = [
            [
                row["contender"],
                *(_number(row.get(key)) for key in ("gather_ms", "total_ms", "times_floor")),
                *(_number(row.get(key)) for key in ("put_gb_per_second", "bytes_per_byte", "open_ms")),
            ]
            for row in found
        ]
        header = ["", "gather, ms", "gather + read + release, ms", "x floor", "put, GB/s", "bytes on store / byte"]
        parts.append(f"{group}:\n\n{table([*header, 'open + close, ms'], lines)}")
    return "\n\n".join(parts) or NOT_MEASURED


_FACTS = {
    "create_s": "create, s",
    "put_s": "put of all, 10,000 at a time, s",
    "flushes": "flush calls of one such put",
    "open_ms": "open, ms",
    "first_gather_ms": "first gather of 64, ms",
    "gather_auto_ms": "gather of 64, ms",
    "gather_map_ms": "the same, mapped, ms",
    "descriptors": "descriptors in use after 400 gathers",
    "descriptors_limit_64": "the same, of 64 allowed",
    "gather_auto_ms_limit_64": "gather of 64 then, ms",
    "own_memory_mib": "anonymous memory that opening and gathering took, MiB",
    "bytes_on_store": "bytes on the store",
    "bytes_catalog": "bytes of the catalog",
}


def million(results: Results) -> str:
    """Return the table of `benchmarks.million`."""
    found = rows(results, "million")
    if not found:
        return NOT_MEASURED

    def cell(value: object) -> str:
        if isinstance(value, dict):
            return ", ".join(f"{n} {call}" for call, n in value.items()) or "none"
        return _number(value) if isinstance(value, (int, float)) else "not counted"

    lines = [[text, *(cell(row.get(key)) for row in found)] for key, text in _FACTS.items()]
    return table(["", *(row["contender"] for row in found)], lines)


def fill(page: str, results: Results) -> str:
    """Return the page with the figures between its marks."""
    for name, text in (("backends", compared(results)), ("million", million(results))):
        begin, end = (mark.format(name) for mark in _MARKS)
        if begin in page:
            before, _, rest = page.partition(begin)
            page = f"{before}{begin}\n\n{text}\n\n{end}{rest.partition(end)[2]}"
    return page


def write(results: Results, path: Path) -> None:
    """Fill the figures in, where the page is."""
    if path.exists():
        path.write_text(fill(path.read_text(), results))
