"""Runs in the guest: ``guest.py cuts | record | replay WORD=VALUE ...``; what it reports is a line of JSON each.

``cuts``: check all stores of both mounts, then change them until the power goes. ``record``: change the stores of a
disk under dm-log-writes. ``replay``: put the disk together as it was at each moment of that log, and check the stores.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import termios
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import writelog
from script import Store, advanced, reopened

MARK = "@@ "
BACKENDS = ("arena", "files", "lmdb")
DISK, LOG, SPARE, PMEM = "/dev/vdc", "/dev/vdd", "/dev/vde", "/dev/pmem0"
#: What --prove asks for: no flush. Each is documented to lose records on a power cut.
RELAXED = {"arena": "relaxed", "files": "relaxed", "lmdb": "none"}
EXT4 = ("mkfs.ext4", "-q", "-F", "-b", "4096", "-m", "0", "-E", "nodiscard,lazy_itable_init=0,lazy_journal_init=0")
BEGIN = "begin"


def report(**what: Any) -> None:
    """Tell the host, and wait until the line has left the machine: nothing runs ahead of what was reported."""
    print(MARK + json.dumps(what), flush=True)
    if os.isatty(1):
        termios.tcdrain(1)


def run(*command: str) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def map_device(name: str, kind: str, *arguments: str) -> str:
    """Lay a device mapper target over the disk and return its node (no udev runs here: /dev/mapper stays empty)."""
    sectors = int(Path("/sys/block", Path(DISK).name, "size").read_text())
    table = " ".join(["0", str(sectors), kind, DISK, *arguments])
    run("dmsetup", "create", name, "--noudevsync", "--table", table)
    return next(
        f"/dev/{at.parts[3]}" for at in Path("/sys/block").glob("dm-*/dm/name") if at.read_text().strip() == name
    )


def stores(words: dict[str, str], **places: Path) -> list[Store]:
    """Return the stores of each place, as many steps on as the host says were acknowledged."""
    made = []
    for where, at in places.items():
        for backend in BACKENDS:
            options = {"backend": backend}
            if words.get("relaxed") == "yes":
                options["durability"] = RELAXED[backend]
            store = Store(f"{backend}-{where}", at, options, int(words["seed"]))
            made.append(advanced(store, int(words.get(store.name, "0"))))
    return made


def described(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"


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


def replay(words: dict[str, str]) -> None:
    """Check part `part` of `parts` of the moments; every one of the parts replays all of the log."""
    run("modprobe", "dm_snapshot")
    part, parts = int(words["part"]), int(words["parts"])
    log, disk = os.open(LOG, os.O_RDONLY), os.open(DISK, os.O_RDWR)
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
        words.update(mark.split("=") for mark in point.marks if mark.count("=") == 1)
        rng = np.random.default_rng([int(words["seed"]), number])
        checked(words, number, "flushed", log, [])
        if point.unflushed:
            checked(words, number, "torn", log, torn(found, point, rng))
    report(replayed=True)


def torn(found: list[writelog.Entry], point: writelog.Point, rng: np.random.Generator) -> list[Any]:
    """Choose what of the writes under way arrived: each whole, not at all, or some of its sectors."""
    chosen = []
    for i in point.unflushed:
        entry, fate = found[i], rng.random()
        n = entry.nbytes // 512
        if fate < 0.4:
            chosen.append((entry, None))
        elif fate < 0.6:
            chosen.append((entry, rng.random(n) < 0.5))
    return chosen


def checked(words: dict[str, str], number: int, kind: str, log: int, more: list[Any]) -> None:
    """Check the stores on a copy of the disk as it is, with `more` written to it, in a process of its own."""
    device = map_device("copy", "snapshot", SPARE, "N", "8")
    try:
        if child := os.fork():
            _, status = os.waitpid(child, 0)
            if status:
                report(moment=number, kind=kind, store="all", lost=f"the checking process ended with status {status}")
            return
        try:
            check_copy(words, number, kind, log, more, device)
        except BaseException as error:
            report(moment=number, kind=kind, store="all", lost=described(error))
        os._exit(0)
    finally:
        subprocess.run(["umount", "/tmp/copy"], check=False, stderr=subprocess.DEVNULL)
        run("dmsetup", "remove", "--noudevsync", "--retry", "copy")


def check_copy(words: dict[str, str], number: int, kind: str, log: int, more: list[Any], device: str) -> None:
    began = time.monotonic()
    if more:
        to = os.open(device, os.O_RDWR)
        for entry, sectors in more:
            writelog.apply(log, entry, to, sectors)
        os.fsync(to)
        os.close(to)
    at = Path("/tmp/copy")
    at.mkdir(exist_ok=True)
    run("mount", "-t", "ext4", device, str(at))
    further = 0
    for store in stores(words, disk=at):
        before = store.steps
        try:
            reopened(store).close()
        except Exception as error:
            report(moment=number, kind=kind, store=store.name, steps=before, lost=described(error))
        further += store.steps - max(before, 1)
    report(moment=number, kind=kind, further=further, writes=len(more), seconds=round(time.monotonic() - began, 2))


if __name__ == "__main__":
    try:
        {"cuts": cuts, "record": record, "replay": replay}[sys.argv[1]](dict(w.split("=") for w in sys.argv[2:]))
    except BaseException as error:
        traceback.print_exc()
        report(failed=described(error))
    if sys.argv[1] == "cuts":
        report(failed="nothing is left to change")
    report(ended=True)
