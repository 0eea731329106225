"""What all benchmarks share: the profile, scratch folders, the results as JSON, a summary at the end.

Every file of benchmarks writes ``benchmarks/results/<name>.json`` (``results/<profile>/<name>.json`` for other
profiles than the full one): the facts of the machine, and for each contender of each group medians of gather, read,
release and all of it.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks import profiles, report_memo, targets
from benchmarks.machine import machine_facts
from benchmarks.race import scratch

RESULTS = Path(__file__).with_name("results")


def results_folder() -> Path:
    """Return where this profile's results go: those of the full profile are committed."""
    name = profiles.chosen().name
    return RESULTS if name == "full" else RESULTS / name


@pytest.fixture(scope="session")
def profile() -> profiles.Profile:
    """Return how much is measured."""
    return profiles.chosen()


@pytest.fixture(scope="module")
def shm():
    """Return a private folder where files are memory; it is removed afterwards."""
    with scratch() as folder:
        yield folder


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the results, one file for each file of benchmarks."""
    plugin = getattr(session.config, "_benchmarksession", None)
    by_file: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for result in getattr(plugin, "benchmarks", []):
        if not result.stats.rounds:
            continue
        name = Path(result.fullname.partition("::")[0]).stem.removeprefix("test_")
        by_file[name].append(
            {
                "group": result.group,
                "contender": result.extra_info.get("contender", result.name),
                "total_ms": result.stats.median * 1e3,
                "min_ms": result.stats.min * 1e3,
                "iqr_ms": result.stats.iqr * 1e3,
                "rounds": result.stats.rounds,
                **{k: v for k, v in result.extra_info.items() if k != "contender"},
            }
        )
    facts = machine_facts() if by_file else {}
    for name, rows in by_file.items():
        floors = {row["group"]: row["total_ms"] for row in rows if row["contender"] == "floor"}
        for row in rows:
            if row["group"] in floors:
                row["times_floor"] = row["total_ms"] / floors[row["group"]]
        folder = results_folder()
        folder.mkdir(parents=True, exist_ok=True)
        written = {"machine": facts, "profile": profiles.chosen().name, "results": rows}
        (folder / f"{name}.json").write_text(json.dumps(written, indent=1) + "\n")


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the targets and the worst cases of "auto" from all results of this profile."""
    results = targets.load(results_folder())
    if not results:
        return
    terminalreporter.section(f"targets, from the results of profile {profiles.chosen().name}")
    terminalreporter.write_line(targets.as_text(results))
    if memo := report_memo.as_text(results):
        terminalreporter.section("memoized models")
        terminalreporter.write_line(memo)
