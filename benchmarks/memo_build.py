"""A whole build on 5,000 sentences: what each stage takes, and the same build killed once in each stage.

Run: ``MEMODB_EVAL_DATA=... python -m benchmarks.memo_build`` (a quarter of an hour, on a machine that does nothing
else); ``--quick`` tries it with few sentences. Writes ``benchmarks/results/build.json``.

minilm-sst2 on SST-2, L = 64, the separable embedder, four means of a layer and length, a budget of 3 points.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

import numpy as np

import memodb
import memodb_transformers as mt
from benchmarks.machine import machine_facts
from benchmarks.memo_data import TASKS, load_batches, load_model
from benchmarks.memo_models import two_threads
from benchmarks.race import scratch

STAGES = ("sample", "train", "record", "condense", "index", "profile", "tune")
#: Seconds into a stage when it is killed, if it lasts so long.
INTO = 2.0


def build(path: Path, sentences: int) -> mt.BuildReport:
    """Build the store, or go on with it."""
    task = TASKS["sst2-minilm"]
    with two_threads():
        return mt.build(
            load_model(task),
            load_batches(task)[0][: sentences // task.batch],
            path,
            embedder="separable",
            store_dtype="bfloat16",
            records_per_namespace=4,
            budget=3.0 if sentences > 3000 else 100.0,
        )


def start(path: Path, sentences: int) -> subprocess.Popen[bytes]:
    """Start a build in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.memo_build", "--child", str(path), "--sentences", str(sentences)]
    return subprocess.Popen(command)


def kill_in(path: Path, stage: str, sentences: int) -> dict[str, Any]:
    """Go on with the build, and kill it when it is in a stage; tell what was done then."""
    journal = path.with_name(f"{path.name}.building") / "journal.json"
    before = STAGES[STAGES.index(stage) - 1] if stage != STAGES[0] else None
    child, entered = start(path, sentences), None
    while True:
        if child.poll() is not None:
            raise RuntimeError(f"the build ended before it could be killed in {stage}: {child.returncode}")
        done = _done(journal)
        if entered is None and done is not None and (before is None or f"L=64/{before}" in done):
            entered = perf_counter()
        if entered is not None and (f"L=64/{stage}" in (done or {}) or perf_counter() - entered > INTO):
            break
        sleep(0.001)
    child.send_signal(signal.SIGKILL)
    child.wait()
    done = _done(journal) or {}
    return {
        "killed_in": stage,
        "stage_was_done": f"L=64/{stage}" in done,
        "done": [s for s in STAGES if f"L=64/{s}" in done],
    }


def _done(journal: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(journal.read_text())["done"]
    except (OSError, ValueError):
        return None
    return found


def compare(whole: Path, broken: Path) -> dict[str, Any]:
    """Compare two stores that should be the same, but for the last digits of sums over several threads.

    These differ from run to run (and a batch that was cut off is gone on with in two parts), so a key may fall into
    another cluster, and the means of two clusters with it.
    """
    with memodb.MemoDB.open(whole) as one, memodb.MemoDB.open(broken) as other:
        assert one.verify() == other.verify() == []
        ids = one.ids()
        named = np.array_equal(ids, other.ids()) and one.namespace_of(ids) == other.namespace_of(ids)
        if not named:
            return {"same_names": False}
        equal, largest = 0, 0.0
        for part in np.array_split(ids, -(-len(ids) // 64)):
            first, second = (db.multiget(part).astype(np.float32) for db in (one, other))
            apart = np.abs(first - second).reshape(len(part), -1).max(axis=1)
            equal, largest = equal + int((apart == 0).sum()), max(largest, float(apart.max()))
        keys = float(np.abs(one.keys(ids) - other.keys(ids)).max())
    return {
        "same_names": True,
        "equal_records": equal / len(ids),
        "largest_difference": largest,
        "largest_difference_of_keys": keys,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Build whole, then killed in each stage; write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few sentences, nothing written")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--sentences", type=int, default=5000, help="of the training set (default 5000)")
    given = parser.parse_args(arguments)
    sentences = 640 if given.quick else given.sentences
    if given.child:
        report = build(given.child, given.sentences)
        given.child.with_suffix(".json").write_text(json.dumps(report.to_dict()))
        return 0
    with scratch() as place:
        whole, broken = place / "whole", place / "broken"
        began = perf_counter()
        if start(whole, sentences).wait():
            raise RuntimeError("the build failed")
        seconds = perf_counter() - began
        kills = [kill_in(broken, stage, sentences) for stage in STAGES]
        began = perf_counter()
        if start(broken, sentences).wait():
            raise RuntimeError("the build could not be gone on with")
        rest = perf_counter() - began
        compared = compare(whole, broken)
        reports = [json.loads(path.with_suffix(".json").read_text()) for path in (whole, broken)]
        assert not os.path.exists(place / "broken.building")
    result = {
        "seconds": seconds,
        "whole": reports[0],
        "kills": kills,
        "last_call_seconds": rest,
        "resumed": reports[1],
        "compared": compared,
    }
    text = json.dumps({"machine": machine_facts(), "profile": "full", "results": [result]}, indent=1) + "\n"
    if given.quick:
        print(json.dumps({**result, "whole": reports[0]["stages"], "resumed": reports[1]["stages"]}, indent=1))
    else:
        (Path(__file__).with_name("results") / "build.json").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
