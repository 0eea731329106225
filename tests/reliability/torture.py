"""``make torture MINUTES=30``: all of the reliability tests, for so long, and what they did, summed up.

As many files of tests as there are processors run side by side. Prints what pytest says of each, and then a table:
kills, faults by kind, flips, inputs, gathers. The figures are also written as JSON (``--json FILE``).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
#: Begun first, so that nobody waits for them alone at the end.
LONGEST = ("test_concurrency", "test_corruption_catalog", "test_faults", "test_kill")


def summed(lines: list[str]) -> dict[str, dict[str, Any]]:
    """Return what tests reported, by subject: numbers of the same name are added, other values kept once."""
    found: dict[str, dict[str, Any]] = {}
    for line in lines:
        figures = json.loads(line)
        subject = found.setdefault(figures.pop("what"), {})
        for name, value in figures.items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            subject[name] = subject.get(name, 0) + value if number else value
    return found


def main() -> int:
    """Run the tests and return pytest's status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0, help="for all tests together (default: 30)")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("pytest", nargs="*", help="more arguments for pytest, after --")
    given = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="memodb-torture-") as folder:
        report = Path(folder) / "report.jsonl"
        report.touch()
        environment = {
            **os.environ,
            "MEMODB_TORTURE_MINUTES": str(given.minutes),
            "MEMODB_TORTURE_REPORT": str(report),
        }
        command = [sys.executable, "-m", "pytest", "-q", "--durations=5", "-p", "no:cacheprovider", *given.pytest]
        command += ["-o", "faulthandler_timeout=3600"]

        def run(file: Path) -> int:
            started = time.monotonic()
            done = subprocess.run(
                [*command, str(file)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            print(f"== {file.name}: {time.monotonic() - started:.0f} s\n{done.stdout}", flush=True)
            return done.returncode

        files = sorted(HERE.glob("test_*.py"), key=lambda file: (file.stem not in LONGEST, file.stem))
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            status = max(pool.map(run, files))
        figures = summed(report.read_text().splitlines())
    minutes = (time.monotonic() - began) / 60
    print(f"\n{'what':24} {'figure':36} {'':>12}")
    for what, counts in sorted(figures.items()):
        for name, value in sorted(counts.items()):
            text = f"{value:,}" if isinstance(value, int) else f"{value:,.1f}" if isinstance(value, float) else value
            print(f"{what:24} {name.replace('_', ' '):36} {text:>12}")
    print(f"\n{minutes:.1f} minutes, pytest's status {status}")
    if given.json:
        given.json.write_text(json.dumps({"minutes": round(minutes, 1), "status": status, **figures}, indent=1) + "\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
