"""Table 6: copying records together against mapping them, with the read inside and outside of the timer."""

from __future__ import annotations

import sys
from itertools import product
from typing import Any

import numpy as np
import torch

import memodb
from benchmarks.clock import take_turns, timed_gather
from benchmarks.paper.alone import alone
from benchmarks.paper.experiment import Experiment, Result, table
from benchmarks.paper.workbench import Workbench

PAPER = {
    **{(256, 1): (52, 0.12), (256, 32): (104, 0.19), (256, 64): (106, 0.33)},
    **{(512, 1): (111, 0.25), (512, 32): (548, 0.19), (512, 64): (731, 0.33)},
}

#: Ways to gather: three copies, and memodb's.
_WAYS = ("copy", "numpy", "warm", "mapped")


def run(bench: Workbench) -> Result:
    """Gather the same records in every way, in turn."""
    rounds, stored = bench.choose((15, 96), (3, 64))
    rows = []
    for length, huge in product(bench.choose((256, 512), (128,)), (True, False)):
        shape = (12, length, length)
        with bench.place("tab06") as (path,):
            with memodb.MemoDB.create(path, shape=shape, dtype="float32", huge_pages=huge) as db:
                for start in range(0, stored, 16):
                    part = min(16, stored - start)
                    db.put(np.random.default_rng(start).random((part, *shape), dtype=np.float32))
            with memodb.MemoDB.open(path) as db:
                share = db.stats()["huge_page_share"]
                for n in (1, 32, 64):
                    times = _times(db, stored, n, rounds)
                    rows.append({"length": length, "n": n, "huge_pages": huge, "huge_page_share": share, **times})
    return {"rows": rows}


def _times(db: Any, stored: int, n: int, rounds: int) -> dict[str, Any]:
    everything = db.multiget(np.arange(stored))
    tensors = torch.from_numpy(everything)
    warm = torch.empty((n, *everything.shape[1:]), dtype=tensors.dtype)
    rng = np.random.default_rng(n)
    ways = {
        "copy": timed_gather(lambda ids: tensors[torch.from_numpy(ids)].numpy()),
        "numpy": timed_gather(lambda ids: everything[ids]),
        "warm": timed_gather(lambda ids: torch.index_select(tensors, 0, torch.from_numpy(ids), out=warm).numpy()),
        "mapped": timed_gather(db.multiget_mapped),
    }
    samples = take_turns(
        ways, lambda: rng.choice(stored, n, replace=False), rounds=rounds, seconds=60.0, least=min(rounds, 5)
    )
    found: dict[str, Any] = {name: took.call() for name, took in samples.items()}
    found |= {f"{name}_read": took.median() for name, took in samples.items()}
    return {**found, "zero_copy": db.multiget_mapped(rng.choice(stored, n, replace=False)).zero_copy}


def text(result: Result) -> str:
    """Print the calls alone beside the paper's, and with a read of every byte."""
    calls, reads = [], []
    for row in result["rows"]:
        case = [row["length"], row["n"], f"{row['huge_page_share']:.0%}", "mapped" if row["zero_copy"] else "copied"]
        ms = {name: 1e3 * row[name] for way in _WAYS for name in (way, f"{way}_read")}
        quickest = min(ms[f"{way}_read"] for way in _WAYS if way != "mapped")
        told = PAPER.get((row["length"], row["n"]), (None, None))
        calls.append([*case, *told, *(ms[way] for way in _WAYS), ms["copy"] / ms["mapped"]])
        ratios = [ms["copy_read"] / ms["mapped_read"], quickest / ms["mapped_read"]]
        reads.append([*case, *(ms[f"{way}_read"] for way in _WAYS), *ratios])
    names = ("tensors[ids]", "array[ids]", "index_select(out=)", "memodb")
    case = ["L", "n", "in 2 MiB pages", "memodb has"]
    note = (
        "Milliseconds, medians. Copies: by PyTorch's indexing, by numpy's, and one into memory that was written "
        "before. The calls alone, letting go included:\n\n"
    )
    first = table([*case, "paper: copy", "paper: mapping", *names, "tensors[ids] / memodb"], calls)
    second = table([*case, *names, "tensors[ids] / memodb", "quickest copy / memodb"], reads)
    return f"{note}{first}\nWith one read of every byte:\n\n{second}"


EXPERIMENT = Experiment(
    name="tab06_fetch",
    where="Table 6",
    title="Copying records together, and mapping them",
    paper='A copy takes 52 to 731 "s", mapping and unmapping 0.12 to 0.33, 321 to 2,884 times less.',
    differs="DRAM (tmpfs) instead of Optane, with three ways to copy. The paper heads its columns "
    "with (s); from its text they are ms; 12 heads and float32 are inferred from its sizes. By its times its "
    "mapping enters no page, so that the faults come when the tensor is read, it seems. memodb enters all pages at "
    "once, on the clock, and where pages are small it may find a copy cheaper. So each way is given with a read of "
    "every byte as "
    "well. More ways are in docs/performance.md.",
    data=False,
    run=run,
    text=text,
    version=2,
)

if __name__ == "__main__":
    sys.exit(alone(EXPERIMENT))
