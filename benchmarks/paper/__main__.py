"""Run the scripts, one after the other: those that have no result yet.

``make paper`` measures all (some hours on two cores; what was measured before on this machine, by these versions, is
not measured again, so it can be interrupted), ``make paper-quick`` a little of everything in a quarter of an hour, into
``.benchmarks/paper-quick``. ``python -m benchmarks.paper --again fig04_threshold`` measures one anew. Results lie in
``benchmarks/results/paper``; docs/paper.md and its plots are made of them at the end.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import transformers

from benchmarks.memo_data import root
from benchmarks.paper import report
from benchmarks.paper.all import EXPERIMENTS
from benchmarks.paper.experiment import FULL, QUICK, read_result, write_result
from benchmarks.paper.workbench import Workbench

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "paper"
QUICK_RESULTS = ROOT / ".benchmarks" / "paper-quick"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for, or what is missing."""
    names = [experiment.name for experiment in EXPERIMENTS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names)}; default: all")
    parser.add_argument("--quick", action="store_true", help="a little of everything")
    parser.add_argument("--again", action="store_true", help="measure anew what was measured before")
    parser.add_argument("--work", type=Path, help="where stores are built and kept (default: removed at the end)")
    parser.add_argument("--report", action="store_true", help="measure nothing, write the page")
    given = parser.parse_args(arguments)
    if unknown := sorted(set(given.names) - set(names)):
        parser.error(f"no script is called {', '.join(unknown)}; there are {', '.join(names)}")
    results, docs = (QUICK_RESULTS, QUICK_RESULTS) if given.quick else (RESULTS, ROOT / "docs")
    if not given.report and any(entry.data for entry in EXPERIMENTS if entry.name in (given.names or names)):
        root()  # ends here where there are no data
    failed = (
        [] if given.report else _run(given.names or names, results, given.work, quick=given.quick, again=given.again)
    )
    print(f"written: {report.write(results, docs)}")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _run(names: Sequence[str], results: Path, work: Path | None, *, quick: bool, again: bool) -> list[str]:
    """Run scripts; one that fails does not keep the others from being run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    profile = QUICK if quick else FULL
    failed: list[str] = []
    measured: set[str] = set()
    with _folder(work) as folder:
        bench = Workbench(folder, results, quick=quick)
        for experiment in EXPERIMENTS:
            if experiment.name not in names and experiment.source not in measured:
                continue
            made_of_others = experiment.calculated or experiment.source is not None  # and quickly made anew
            if not (again or made_of_others) and read_result(results, experiment, profile, here=True) is not None:
                print(f"{experiment.name}: measured before", flush=True)
                continue
            print(f"{experiment.name}: {experiment.title} ...", flush=True)
            began = perf_counter()
            try:
                result = experiment.run(bench)
                seconds = perf_counter() - began
                write_result(results, experiment, profile, result.pop("seconds", seconds), result)
            except Exception as error:  # the others are worth having all the same
                traceback.print_exc()
                print(f"{experiment.name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                failed.append(experiment.name)
                continue
            measured.add(experiment.name)
            print(f"{experiment.name}: {seconds:.0f} s", flush=True)
    torch.set_num_threads(threads)
    return failed


@contextmanager
def _folder(work: Path | None) -> Any:
    """Give a folder for stores: the one that was named, or one that is removed at the end."""
    if work is not None:
        work.mkdir(parents=True, exist_ok=True)
        yield work
        return
    # Ends as Ctrl-C does: gigabytes of memory are given back.
    before = {end: signal.signal(end, lambda *_: sys.exit(1)) for end in (signal.SIGTERM, signal.SIGHUP)}
    made = Path(tempfile.mkdtemp(prefix="memodb-paper-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)
        for end, handler in before.items():
            signal.signal(end, handler)


if __name__ == "__main__":
    sys.exit(main())
