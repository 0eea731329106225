"""Turns the results into docs/performance.md and its plots: ``make bench-report``.

Or ``python -m benchmarks.report [RESULTS] [--docs DOCS]``. Everything on that page comes from here: edit this file, or
measure again.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import report_backends, report_memo, report_quality, targets
from benchmarks.targets import Results, Row

ROOT = Path(__file__).parent.parent
NOT_MEASURED = "*not measured yet*"
_HEAD = """# Performance

<!-- Written by `make bench-report` from benchmarks/results/*.json: do not edit. -->

What memodb costs beside what else one would use. `make bench` measures all of it (half an hour and more),
`make bench-quick` a subset in three minutes, `make bench-report` writes this page.

- **Timed is gather + one full read + release.** Page faults, prefaulting and unmapping are on the clock, and every
  byte is read once: a gather that leaves the work to the reader gains nothing.
- **Contenders take turns** within a case, gather the same random records, and are checked to deliver the same bytes.
  Figures are medians of one run.
- **Times drift from run to run and differ between machines; compare ratios.** "Floor" is the same read of a tensor
  that is contiguous and warm already.
- **Peers are used in their quickest idiom**: `np.take(mode="clip")` and `torch.index_select` into warm memory, h5py's
  `read_direct`, zarr and tensorstore uncompressed with one chunk a record, LMDB's buffers; on a cold disk also with
  `MADV_RANDOM`.
"""


def table(header: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table."""
    text = [f"| {' | '.join(header)} |", "|" + " --- |" * len(header)]
    text += [f"| {' | '.join(map(str, line))} |" for line in lines]
    return "\n".join(text)


def _number(value: float | None, digits: int = 3) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


def _machine(results: Results) -> str:
    if not results:
        return ""
    content = next(iter(results.values()))
    facts = dict(content["machine"])
    versions = ", ".join(f"{name} {v}" for name, v in facts.pop("versions", {}).items() if v)
    texts = {
        "cpu": "processor",
        "cpus": "cores",
        "memory_gib": "memory, GiB",
        "user": "user",
        "thp": "transparent huge pages",
        "thp_shmem": "the same, tmpfs",
        "shm_mount": "/dev/shm",
        "costs": "cost model",
    }
    lines = [(texts.get(name, name), value) for name, value in facts.items() if value != ""]
    differ = [name for name, other in results.items() if other["machine"] != content["machine"]]
    note = f"\n\nMeasured under other facts than these: {', '.join(differ)}." if differ else ""
    return table(["machine", ""], [*lines, ("versions", versions)]) + note


def _targets(results: Results) -> str:
    met = {None: "not measured", True: "yes", False: "**no**"}
    lines = [
        (line["text"], _number(line["value"]), line["most"], met[line["met"]], line["against"])
        for line in targets.evaluate(results)
    ]
    return table(["", "found", "at most", "met", "against"], lines)


def _groups(found: list[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in found:
        groups.setdefault(row["group"], []).append(row)
    return groups


def _gathers(results: Results, where: str) -> str:
    found = [row for row in targets.rows(results, "gather") if row["where"] == where]
    if not found:
        return NOT_MEASURED
    lines = []
    for group in _groups(found).values():
        by_name = {row["contender"]: row for row in group}
        first = group[0]
        one, none = (targets.best_peer(by_name, contiguous=kind) for kind in (True, False))
        ours = by_name.get(targets.OURS)
        lines.append(
            (
                first["record"],
                first["n"],
                *(_ms(by_name.get(name)) for name in ("floor", targets.OURS, 'memodb, "map"', 'memodb, "copy"')),
                f"{_ms(one)} ({one['contender']})" if one else "",
                _ratio(ours, one),
                _ms(none),
                _ratio(ours, none),
            )
        )
    names = ["record", "n", "floor", "memodb", "map", "copy", "best peer, one tensor", "memodb / it", "list of views"]
    return table([*names, "memodb / it"], lines)


def _ms(row: Row | None) -> str:
    return "" if row is None else _number(row["total_ms"])


def _ratio(row: Row | None, other: Row | None) -> str:
    return "" if row is None or other is None else f"{row['total_ms'] / other['total_ms']:.2f}"


def _headlines(results: Results) -> str:
    parts = []
    for record in (*targets._LARGE, *targets._SMALL):
        found = sorted(targets.case(results, record).values(), key=lambda row: row["total_ms"])
        if not found:
            continue
        lines = [
            (
                row["contender"] + ("" if row["contiguous"] else " (no tensor)"),
                *(_number(row[part]) for part in ("gather_ms", "read_ms", "release_ms", "total_ms")),
                f"{row['times_floor']:.2f}",
                row["rounds"],
            )
            for row in found
        ]
        title = f"64 x {record}, {found[0]['record_bytes'] / 1e6:.2f} MB each, in ms:"
        parts.append(title + "\n\n" + table(["", "gather", "read", "release", "all", "x floor", "rounds"], lines))
    return "\n\n".join(parts) or NOT_MEASURED


def _losses(results: Results) -> str:
    """Return what memodb does not win, from the figures, after what is known without them."""
    text = [
        "- **A list of views gathers nothing.** Whoever can work on n separate arrays should take them: on small "
        "records no gather can be as quick as none.",
        "- **Small records, and records that are no multiple of 2 MiB, are copied** or mapped in 4 KiB pages: one "
        "page-table entry for each 4 KiB costs about what copying it costs. There memodb is a good copy, no more.",
        "- **A record that is no multiple of 4 KiB cannot be mapped at all.**",
        "- **A gather has a price of its own**: 64 calls of mmap(2) take 0.45 ms and entering 192 huge pages 0.29 ms "
        "(kernel, measured apart), Python about 0.25 ms when the caches are cold from the read before. Beside a read "
        "of 403 MB in 12 ms that is 8 per cent; beside a slower memory less.",
        "- **Below 0.3 ms** a call costs more than what it moves: 64 records of 4 KiB take about 45 microseconds in a "
        'tight loop, and 2 to 3 times that between other work; there "auto" costs up to 30 per cent more than '
        "naming the strategy.",
        "- **Formats that store differently shaped arrays, compress or slice** (zarr, tensorstore, h5py) do what "
        "memodb cannot; they are in the tables for the one job of memodb only.",
    ]
    lost = []
    for group, found in _groups(targets.rows(results, "gather")).items():
        by_name = {row["contender"]: row for row in found}
        ours = by_name.get(targets.OURS)
        for kind in (True, False):
            peer = targets.best_peer(by_name, contiguous=kind)
            if ours and peer and ours["total_ms"] > 1.02 * peer["total_ms"]:
                lost.append((ours["total_ms"] / peer["total_ms"], group, peer["contender"]))
    if not lost:
        return "\n".join(text)
    tensors = [line for line in lost if line[2] != "list of views"]
    lists = [line for line in lost if line[2] == "list of views"]
    parts = ["\n".join(text)]
    for title, lines in (("a peer that delivers one tensor", tensors), ("a list of views", lists)):
        if lines:
            shown = [(group, name, f"{ratio:.2f}") for ratio, group, name in sorted(lines, reverse=True)]
            parts.append(
                f"Slower than {title} by more than 2 %, in {len(lines)} cases:\n\n"
                + table(["case", "quicker", "memodb / it"], shown)
            )
    return "\n\n".join(parts)


def _auto(results: Results) -> str:
    cells = targets.rows(results, "auto")
    if not cells:
        return NOT_MEASURED
    over = [row for row in cells if row["auto_over_best"] > 1.10]
    wrong = [row for row in cells if row["choice_over_best"] > 1.10]
    text = (
        f"{len(cells)} cells (record sizes, batches, with and without huge pages). `auto` was measured more than 10 % "
        f"slower than the better of map and copy in {len(over)}; in {len(wrong)} the strategy that it chose was. "
        "The worst:"
    )
    lines = [
        (
            f"{row['group'].removeprefix('auto, ')}: {row['contender']}",
            *(_number(row[part]) for part in ("total_ms", "map_ms", "copy_ms")),
            row["chose"],
            f"{row['auto_over_best']:.2f}",
            f"{row['choice_over_best']:.2f}",
        )
        for row in targets.worst_of_auto(results)
    ]
    header = ["cell", "auto ms", "map ms", "copy ms", "chose", "auto / best", "its choice / best"]
    return f"{text}\n\n{table(header, lines)}"


def _table6(results: Results) -> str:
    groups = _groups(targets.rows(results, "table6"))
    if not groups:
        return NOT_MEASURED
    lines = []
    for found in groups.values():
        by_name = {row["contender"]: row for row in found}
        first = found[0]
        call = by_name["mmap + munmap"]["total_ms"]
        copied = by_name["np.memmap[ids]"]["gather_ms"]
        lines.append(
            (
                *(first["length"], first["n"], first["paper_copy"] or "", first["paper_mapping"] or ""),
                *(_number(v) for v in (copied, by_name["np.take(out=warm)"]["gather_ms"], call)),
                f"{copied / call:,.0f}x",
                *(_number(by_name[name]["total_ms"]) for name in ("mmap + read + munmap", targets.OURS)),
                _number(by_name["np.take(out=warm)"]["total_ms"]),
            )
        )
    header = ["L", "n", "paper: copy", "paper: mapping", "copy, fresh", "copy, warm", "mmap + munmap", "ratio"]
    return table([*header, "mmap + read", "memodb + read", "warm copy + read"], lines)


def _plain(results: Results, name: str, header: Sequence[str], keys: Sequence[str]) -> str:
    """Return the table of a file of benchmarks with one line a contender."""
    parts = []
    for group, found in _groups(targets.rows(results, name)).items():
        lines = [(row["contender"], *(_number(row.get(key)) for key in keys)) for row in found]
        parts.append(f"{group[0].upper()}{group[1:]}:\n\n{table(['', *header], lines)}")
    return "\n\n".join(parts) or NOT_MEASURED


def _memo(results: Results) -> str:
    """Return the tables of memoized models."""
    if not targets.rows(results, "memo"):
        return NOT_MEASURED
    text = [
        "`benchmarks/test_memo.py`. One forward of a model of base-sized layers with random weights (what a layer "
        "costs does not depend on them), without padding, two threads; embedding, search, gather with its page faults "
        "and unmapping, misses, and the rest of the model are on the clock. Records are probabilities, in bfloat16 "
        "where the processor multiplies that and in float16 elsewhere, where nothing else is said; contexts are "
        'float32. Ratios are medians of the ratios of single rounds. "Of plain": of the model with its default '
        "attention (SDPA for BERT, eager for DeBERTa-v2). The paper's embedder is one matrix a layer (`LinearMLP`)."
    ]
    for title, header, lines in [*report_memo.models(results), *report_memo.breakdowns(results)]:
        text.append(f"{title}:\n\n{table(header, lines)}")
    return "\n\n".join(text)


def _quality(results: Results, images: Sequence[tuple[str, str]]) -> str:
    """Return the tables and plots of reuse in real models."""
    found = report_quality.text(results, table, images)
    if not found:
        return NOT_MEASURED
    return (
        "`benchmarks/memo_quality.py`. What is recorded, calibrated with, tuned with and tried are different "
        "sequences. At a budget, what is called random, mean and most similar replaces exactly what the nearest "
        "record replaces; the condensed store is tuned for itself. Changes are against the plain model, with paired "
        f"bootstrap intervals.\n\n{found}"
    )


def page(results: Results, images: Sequence[tuple[str, str]]) -> str:
    """Return docs/performance.md."""
    drawn = "\n\n".join(f"![{title}](images/{name})" for title, name in images if name.startswith("gather"))
    time = ["ms"]
    sections: list[tuple[str, Any]] = [
        ("What has to be shown", f"{_targets(results)}\n\n{_machine(results)}"),
        ("64 records: everybody", f"`benchmarks/test_gather.py`\n\n{_headlines(results)}"),
        (
            "Sizes and batches, warm tmpfs",
            f"Medians in ms; 2 GiB a batch at most.\n\n{drawn}\n\n{_gathers(results, 'warm')}",
        ),
        (
            "Cold disk",
            "Files are dropped from the page cache (posix_fadvise) before each turn; opening is not timed. Medians in "
            "ms.\n\n" + _gathers(results, "cold"),
        ),
        ("Where memodb loses", _losses(results)),
        ('"auto"', f"`benchmarks/test_auto.py`\n\n{_auto(results)}"),
        (
            "The paper's Table 6, and what it leaves out",
            "`benchmarks/test_table6.py`. The paper compares a memory copy with mapping and unmapping. The mapping "
            "call alone moves no byte and enters no page: the faults come when the tensor is read, and are the "
            'reader\'s. So its ratio, which the column "ratio" finds here as well, says what the call saves, not what '
            "the program saves. The last three columns include one read. The paper heads its columns with (s); all "
            "measured here is ms.\n\n" + _table6(results),
        ),
        ("Search", _plain(results, "search", [*time, "build s", "recall"], ["total_ms", "build_seconds", "recall"])),
        ("Put", _plain(results, "put", [*time, "GB/s"], ["total_ms", "gb_per_second"])),
        (
            "A gather beside a writer",
            _plain(
                results,
                "writer",
                [*time, "written MB/s", "writer busy"],
                ["total_ms", "written_mb_per_second", "busy"],
            ),
        ),
        ("Memoized models", _memo(results)),
        ("What reuse does to real models", _quality(results, images)),
        ("Embedders", report_quality.embedders(results, table) or NOT_MEASURED),
        ("A build, and one that is killed", report_quality.build(results, table) or NOT_MEASURED),
        (
            "Products",
            "`benchmarks/test_product.py`. Stored probabilities times V, batch 8, 12 heads of 64: gather, product, and "
            'letting the batch go. "as they are": one matrix product in the dtype of the records; "all at once": the '
            "whole batch is turned into float32 first.\n\n" + _plain(results, "product", time, ["total_ms"]),
        ),
        (
            "Checksums on gather",
            '`benchmarks/test_verify.py`. `verify="never"` is the default where records lie on this machine: checking '
            "reads every byte once more, and enters every page that a mapping would have left alone.\n\n"
            + _plain(
                results,
                "verify",
                ["gather ms", "read ms", "all ms", "x never", "checked GB/s"],
                ["gather_ms", "read_ms", "total_ms", "times_never", "checked_gb_per_second"],
            ),
        ),
    ]
    text = "\n\n".join([_HEAD.rstrip(), *(f"## {title}\n\n{text}" for title, text in sections)])
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"  # no gaps where nothing was measured


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page and its plots, and the figures of docs/backends.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="?", type=Path, default=Path(__file__).with_name("results"))
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where it is written (default: docs)")
    given = parser.parse_args(arguments)
    results = targets.load(given.results)
    given.docs.mkdir(parents=True, exist_ok=True)
    from benchmarks.plots import draw  # matplotlib takes a while to import

    images = [*draw(results, given.docs / "images"), *report_quality.draw(results, given.docs / "images")]
    (given.docs / "performance.md").write_text(page(results, images))
    report_backends.write(results, given.docs / "backends.md")
    print(targets.as_text(results))


if __name__ == "__main__":
    main()
