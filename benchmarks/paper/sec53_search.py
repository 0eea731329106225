"""Section 5.3: a search among 100,000 vectors of 128 numbers."""

from __future__ import annotations

import sys
from statistics import median
from time import perf_counter

import numpy as np

import memodb
from benchmarks.paper.alone import alone
from benchmarks.paper.experiment import Experiment, Result, table
from benchmarks.paper.workbench import Workbench

INDEXES = {"exact": "Flat", "HNSW (the paper)": "HNSW32"}


def run(bench: Workbench) -> Result:
    """Search one store of each index, with one query and with 64."""
    count, rounds = bench.choose((100_000, 31), (12_000, 5))
    rng = np.random.default_rng(0)
    # Keys of text gather in clusters; uniform ones would be all alike far.
    centres = rng.standard_normal((200, 128), dtype=np.float32)
    keys = centres[rng.integers(0, 200, count)] + 0.5 * rng.standard_normal((count, 128), dtype=np.float32)
    queries = centres[rng.integers(0, 200, 64 * rounds)] + 0.5 * rng.standard_normal(
        (64 * rounds, 128), dtype=np.float32
    )
    rows = []
    truth = None
    for name, factory in INDEXES.items():
        with (
            bench.place("sec53") as (path,),
            memodb.MemoDB.create(path, shape=(1,), dtype="float32", key_dim=128, index=factory) as db,
        ):
            db.put(np.zeros((count, 1), np.float32), keys)
            began = perf_counter()
            db.reindex()
            building = perf_counter() - began
            seconds = {}
            for n in (1, 64):
                taken = []
                for turn in range(rounds):
                    part = queries[turn * n : (turn + 1) * n]
                    began = perf_counter()
                    db.search(part, 1)
                    taken.append(perf_counter() - began)
                seconds[str(n)] = median(taken[1:])
            ids = db.search(queries[:256], 1).ids[:, 0]
        truth = ids if truth is None else truth
        rows.append(
            {"index": name, "build_seconds": building, "seconds": seconds, "recall": float((ids == truth).mean())}
        )
    return {"rows": rows, "count": count}


def text(result: Result) -> str:
    """Print times and recall."""
    lines = [
        [row["index"], 1e3 * row["seconds"]["1"], 1e3 * row["seconds"]["64"], row["recall"], row["build_seconds"]]
        for row in result["rows"]
    ]
    header = ["index", "one query, ms", "64 queries, ms", "finds the nearest", "built in, s"]
    return f"{result['count']:,} keys of 128 numbers in clusters, one namespace.\n\n" + table(header, lines)


EXPERIMENT = Experiment(
    name="sec53_search",
    where="Section 5.3",
    title="A search among 100,000 keys",
    paper="100,000 vectors of 128 numbers with HNSW: less than 0.5 ms.",
    differs="Two cores. Through MemoDB.search, with all that it checks.",
    data=False,
    run=run,
    text=text,
)

if __name__ == "__main__":
    sys.exit(alone(EXPERIMENT))
