"""Runs in the guest: ``guest.py cuts | record | replay WORD=VALUE ...``; what it reports is a line of JSON each.

``cuts``: check all stores of both mounts, then change them until the power goes. ``record``: change the stores of a
disk under dm-log-writes. ``replay``: see moments.py.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
from common import BEGIN, DISK, EXT4, LOG, PMEM, described, map_device, report, run, stores
from moments import replay
from script import reopened


def cuts(words: dict[str, str]) -> None:
    disk, dax = Path("/tmp/disk"), Path("/tmp/dax")
    disk.mkdir()
    dax.mkdir()
    if words["round"] == "0":
        run("ndctl", "create-namespace", "-f", "-e", "namespace0.0", "-m", "fsdax", "-a", "2M")
        run(*EXT4, DISK)
        run(*EXT4, PMEM)
        os.sync()
    report(mounting=True)
    run("mount", DISK, str(disk))
    run("mount", "-o", "dax=always", PMEM, str(dax))
    opened = []
    for store in stores(words, disk=disk, dax=dax):
        before, began = store.steps, time.monotonic()
        try:
            db = reopened(store)
        except Exception as error:
            traceback.print_exc()
            report(store=store.name, steps=before, lost=described(error))
            continue
        dax_used = (db.stats()["dax"] or {}).get("map_sync", False)
        more, seconds = store.steps - max(before, 1), time.monotonic() - began
        report(
            store=store.name,
            steps=store.steps,
            more=more,
            records=len(store.live),
            map_sync=dax_used,
            seconds=round(seconds, 2),
        )
        opened.append((store, db))
    report(writing=True)
    rng = np.random.default_rng([int(words["seed"]), int(words["round"])])
    while opened:
        store, db = opened[int(rng.integers(len(opened)))]
        # Some in a row: the flush of another store on the same file system would cover up one that is missing here.
        for _ in range(int(rng.integers(1, 6))):
            step = store.next()
            report(doing=step.kind, store=store.name)
            store.do(db, step)
            store.take(step)
            report(acknowledged=store.steps, store=store.name)


def record(words: dict[str, str]) -> None:
    run("modprobe", "dm_log_writes")
    device = map_device("logged", "log-writes", LOG)
    run(*EXT4, device)
    at = Path("/tmp/disk")
    at.mkdir()
    run("mount", device, str(at))
    os.sync()

    def mark(text: str) -> None:
        run("dmsetup", "message", "logged", "0", "mark", text)

    mark(BEGIN)
    rng = np.random.default_rng(int(words["seed"]))
    left = stores(words, disk=at)
    handles: dict[str, Any] = {}
    kinds: dict[str, int] = {}
    while left:
        store = left[int(rng.integers(len(left)))]
        for _ in range(int(rng.integers(1, 6))):
            step = store.next()
            if step.kind == "create":
                handles[store.name] = store.create()
            else:
                store.do(handles[store.name], step)
            store.take(step)
            mark(f"{store.name}={store.steps}")
            kinds[step.kind] = kinds.get(step.kind, 0) + 1
            if store.steps == int(words["steps"]):
                left.remove(store)
                break
    for db in handles.values():
        db.close()
    run("umount", str(at))
    run("dmsetup", "remove", "--noudevsync", "logged")
    os.sync()
    report(recorded=kinds)


if __name__ == "__main__":
    try:
        {"cuts": cuts, "record": record, "replay": replay}[sys.argv[1]](dict(w.split("=") for w in sys.argv[2:]))
    except BaseException as error:
        traceback.print_exc()
        report(failed=described(error))
    if sys.argv[1] == "cuts":
        report(failed="nothing is left to change")
    report(ended=True)
