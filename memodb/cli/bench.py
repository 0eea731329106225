"""``memodb bench``: how fast a store hands over random records, on this machine."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np

import memodb
from memodb.cli.output import print_json, print_table, progress_bar, readable_bytes

_Gather = Callable[[Any], Any]


def run(arguments: argparse.Namespace) -> int:
    """Time gathers of one store, contenders taking turns, and print medians."""
    if arguments.calibrate:
        _calibrate(arguments)
    if arguments.path is None:
        if not arguments.calibrate:
            raise memodb.InvalidOptionError("which store? memodb bench PATH; or memodb bench --calibrate")
        return 0
    with memodb.MemoDB.open(arguments.path) as db:
        live = db.ids()
        if len(live) == 0:
            raise memodb.InvalidOptionError(f"{arguments.path}: the store is empty, there is nothing to gather")
        rng = np.random.default_rng(arguments.seed)
        rounds = [
            rng.choice(live, arguments.records, replace=len(live) < arguments.records) for _ in range(arguments.rounds)
        ]
        with progress_bar("bench") as progress:
            timings = measure(db, rounds, progress)
        nbytes = arguments.records * db.spec.nbytes
    if arguments.json:
        print_json({"records": arguments.records, "bytes": nbytes, "rounds": arguments.rounds, "median_ms": timings})
        return 0
    floor = timings["read alone"]["gather+read"]
    print(f"{arguments.records:,} random records, {readable_bytes(nbytes)}, medians of {arguments.rounds:,} rounds")
    print_table(
        ["", "gather ms", "gather + one read ms", "times the read alone"],
        [
            [name, f"{row['gather']:.3f}", f"{row['gather+read']:.3f}", f"{row['gather+read'] / floor:.2f}"]
            for name, row in timings.items()
        ],
    )
    return 0


def _calibrate(arguments: argparse.Namespace) -> None:
    with progress_bar("calibrate") as progress:
        found = memodb.calibrate(progress=progress)
    if arguments.json:
        if arguments.path is None:
            print_json(found)
        return
    costs = found["costs"]
    names = {"map_call": "a mapped batch", "copy_call": "a copied batch", "vma": "a run of adjacent records"}
    names |= {"huge_page": "a page of 2 MiB", "small_page": "4 KiB of a page of 2 MiB", "loose_page": "a page of 4 KiB"}
    names |= {"copied_record": "a copied record, beside its bytes"}
    print_table(["cost of", "microseconds"], [[text, f"{costs[name] * 1e6:.3f}"] for name, text in names.items()])
    for threads, curve in enumerate(costs["copied_byte"], 1):
        rates = ", ".join(f"{1e-9 / cost:.1f}" if cost else "-" for cost in curve)
        print(f"copying with {threads} threads, GB/s, for batches of 256 KiB, 1, 4, 16, 64, 256 MiB, 1 GiB: {rates}")
    print(f"kept in {found['path']}")


def measure(db: memodb.MemoDB, rounds: list[Any], progress: Callable[[int, int], None]) -> dict[str, dict[str, float]]:
    """Time every way to gather, one after the other in each round, so that drift of the machine meets all alike.

    Parameters
    ----------
    db
        An open store.
    rounds
        The ids of each round, int64 [n] each.
    progress
        Told (rounds done, rounds in all).

    Returns
    -------
    dict
        Contender -> ``{"gather": ms, "gather+read": ms}``, medians in milliseconds. A contender that the store does
        not support is left out.
    """
    warm = db.multiget(rounds[0])
    contenders: dict[str, _Gather] = {
        "read alone": lambda ids: None,
        "multiget_mapped (map)": lambda ids: db.multiget_mapped(ids, strategy="map"),
        "multiget_mapped (copy)": lambda ids: db.multiget_mapped(ids, strategy="copy"),
        "multiget into out": lambda ids: db.multiget(ids, out=warm),
        "multiget": db.multiget,
    }
    try:
        db.multiget_mapped(rounds[0], strategy="map").release()
    except memodb.MappingUnsupportedError:
        del contenders["multiget_mapped (map)"]
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for done, ids in enumerate(rounds, 1):
        for name, gather in contenders.items():
            times[name].append(_time(gather, ids, warm))
        progress(done, len(rounds))
    return {
        name: {"gather": median(g for g, _ in pairs) * 1e3, "gather+read": median(r for _, r in pairs) * 1e3}
        for name, pairs in times.items()
    }


def _time(gather: _Gather, ids: Any, warm: np.ndarray[Any, Any]) -> tuple[float, float]:
    start = time.perf_counter()
    found = gather(ids)
    gathered = time.perf_counter()
    values = warm if found is None else found.numpy() if isinstance(found, memodb.MappedBatch) else found
    _read(values)
    end = time.perf_counter()
    del values
    if isinstance(found, memodb.MappedBatch):
        found.release()
    return gathered - start, end - start


def _read(values: np.ndarray[Any, Any]) -> None:
    """Read every byte once, at the speed of memory."""
    flat = values.reshape(-1).view(np.uint8)
    flat.view(np.uint64 if flat.size % 8 == 0 else np.uint8).max()
