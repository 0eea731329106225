"""Puts the logged disk together as it was at each moment at which the power may have gone, and checks its stores.

Runs in the guest, on its devices; or on the host, on files that are mounted by loop devices: the words ``disk``,
``log`` and ``spare`` name them.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import writelog
from common import BEGIN, DISK, LOG, SPARE, described, map_device, report, run, stores
from script import reopened

#: What a device writes whole or not at all. ext4 needs it: it does not mount with a torn superblock (1 KiB).
BLOCK = 4096
#: A write under way and what arrived of it: all, or those of its blocks.
Torn = tuple[writelog.Entry, np.ndarray | None]


def replay(words: dict[str, str]) -> None:
    """Check part `part` of `parts` of the moments; every one of the parts replays all of the log."""
    part, parts = int(words["part"]), int(words["parts"])
    disk_path, spare_path = words.pop("disk", DISK), words.pop("spare", SPARE)
    log, disk = os.open(words.pop("log", LOG), os.O_RDONLY), os.open(disk_path, os.O_RDWR)
    if disk_path == DISK:
        run("modprobe", "dm_snapshot")
    found = writelog.entries(log)
    moments = list(writelog.points(found, BEGIN))
    report(moments=len(moments), entries=len(found), flushes=sum(bool(e.flags & 3) for e in found))
    at = 0
    for number, point in enumerate(moments):
        while at <= point.last:
            writelog.apply(log, found[at], disk)
            at += 1
        if number % parts != part:
            continue
        os.fsync(disk)
        known = words | dict(mark.split("=") for mark in point.marks if "=" in mark)
        torn = _torn(found, point, np.random.default_rng([int(words["seed"]), number]))
        for kind, more in (("flushed", []), ("torn", torn)) if point.unflushed else (("flushed", []),):
            with _copy(disk_path, spare_path) as device:
                _checked(known, number, kind, log, more, device)
    report(replayed=True)


def _torn(found: list[writelog.Entry], point: writelog.Point, rng: np.random.Generator) -> list[Torn]:
    """Choose what of the writes under way arrived: each whole, not at all, or some of its blocks."""
    chosen: list[Torn] = []
    for i in point.unflushed:
        entry, fate = found[i], rng.random()
        if fate < 0.4:
            chosen.append((entry, None))
        elif fate < 0.6 and entry.nbytes > BLOCK:
            chosen.append((entry, rng.random(entry.nbytes // BLOCK) < 0.5))
    return chosen


@contextmanager
def _copy(disk: str, spare: str) -> Iterator[str]:
    """Yield a device, or a file, with the contents of the disk, which may be changed."""
    if disk != DISK:
        run("cp", "--sparse=always", disk, spare)
        yield spare
        return
    try:
        yield map_device("copy", "snapshot", spare, "N", "8")
    finally:
        run("dmsetup", "remove", "--noudevsync", "--retry", "copy")


def _checked(known: dict[str, str], number: int, kind: str, log: int, more: list[Torn], device: str) -> None:
    """Check the stores on a device after `more` was written to it; in a process of its own, as a signal ends it."""
    at = Path(tempfile.mkdtemp())
    try:
        if child := os.fork():
            _, status = os.waitpid(child, 0)
            if status:
                report(moment=number, kind=kind, store="all", lost=f"the checking process ended with status {status}")
            return
        try:
            _check(known, number, kind, log, more, device, at)
        except BaseException as error:
            report(moment=number, kind=kind, store="all", lost=described(error))
        os._exit(0)
    finally:
        subprocess.run(["umount", at], check=False, stderr=subprocess.DEVNULL)
        at.rmdir()


def _check(known: dict[str, str], number: int, kind: str, log: int, more: list[Torn], device: str, at: Path) -> None:
    began = time.monotonic()
    to = os.open(device, os.O_RDWR)
    for entry, arrived in more:
        writelog.apply(log, entry, to, arrived)
    os.fsync(to)
    os.close(to)
    run("mount", "-t", "ext4", *(() if Path(device).is_block_device() else ("-o", "loop")), device, str(at))
    further = 0
    for store in stores(known, disk=at):
        before = store.steps
        try:
            reopened(store).close()
        except Exception as error:
            report(moment=number, kind=kind, store=store.name, steps=before, lost=described(error))
        further += store.steps - max(before, 1)
    report(moment=number, kind=kind, further=further, writes=len(more), seconds=round(time.monotonic() - began, 2))
