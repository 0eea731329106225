"""The cuts: boot, check, write, kill; and again."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import machine
from outcome import Outcome

DISK_MIB, PMEM_MIB = 512, 512 + machine.LABEL_MIB
#: Seconds that a guest writes at most, and within which it is cut while it still opens its stores.
WRITING, OPENING = 15.0, 12.0
#: Every so many rounds the cut comes while stores are opened after the one before.
EARLY = 5
#: A guest that says nothing for so long is not coming any more.
PATIENCE = 600.0

Command = Callable[[str, dict[str, str], list[str]], list[str]]


@dataclass
class _Told:
    """What the guests of all rounds have reported."""

    acknowledged: dict[str, int] = field(default_factory=dict)
    steps: Counter[str] = field(default_factory=Counter)
    #: What was under way when the power went.
    cut_in: Counter[str] = field(default_factory=Counter)
    seen: dict[str, dict[str, Any]] = field(default_factory=dict)
    further: int = 0


def cut_often(command: Command, work: Path, cuts: int, seed: int) -> Outcome:
    """Cut the power so often, checking all stores after each; the last boot only checks."""
    outcome, told = Outcome("cuts"), _Told()
    disk, pmem = machine.blank(work / "disk.img", DISK_MIB), machine.blank(work / "pmem.img", PMEM_MIB)
    hardware = [
        *("-m", "2G,slots=2,maxmem=6G"),
        *("-drive", f"file={disk},if=virtio,format=raw,cache=unsafe"),
        *machine.nvdimm(pmem, PMEM_MIB),
    ]
    chance = random.Random(seed)
    for number in range(cuts + 1):
        began = time.monotonic()
        early = number % EARLY == EARLY - 1
        delay = chance.uniform(0, OPENING if early else WRITING)
        after = None if number == cuts else ("mounting" if early else "acknowledged")
        words = {"round": str(number)} | {name: str(n) for name, n in told.acknowledged.items()}
        with machine.Machine(command("cuts", words, hardware), work / "console.log") as guest:
            where = _until_cut(guest, after, delay, told, outcome)
        if after is not None:
            told.cut_in[where] += 1
        print(
            f"{'cut' if after else 'boot'} {number + 1}: after {time.monotonic() - began:.0f} s, in {where}; "
            f"acknowledged so far {sum(told.acknowledged.values())} steps",
            flush=True,
        )
        if outcome.failures:
            break
    outcome.figures = {
        "cuts": sum(told.cut_in.values()),
        "cut in": dict(told.cut_in),
        "acknowledged": sum(told.steps.values()),
        "batches": told.steps["put"],
        "deletes": told.steps["delete"],
        "compactions": told.steps["compact"],
        "done but not acknowledged": told.further,
    }
    for name, seen in told.seen.items():
        mapped = ", MAP_SYNC" if seen["map_sync"] else ""
        outcome.stores[name] = f"{seen['steps']} steps, {seen['records']} records live at the end{mapped}"
    return outcome


def _until_cut(guest: machine.Machine, after: str | None, delay: float, told: _Told, outcome: Outcome) -> str:
    """Read what a guest reports until its power went, `delay` seconds `after` a report; return what it was doing then.

    Without `after`: until its stores are checked.
    """
    where, doing, plug = "boot", "", threading.Timer(delay, guest.cut)
    try:
        for said in guest.reports(PATIENCE):
            if "mounting" in said:
                where = "opening"
            elif "lost" in said:
                outcome.lose(said["store"], said["lost"])
            elif "map_sync" in said:
                told.seen[said["store"]] = said
                told.further += said["more"]
                told.acknowledged[said["store"]] = said["steps"]
            elif "writing" in said:
                where = "writing"
                if after is None:
                    return "the end"
            elif "doing" in said:
                doing = where = said["doing"]
            elif "acknowledged" in said:
                told.acknowledged[said["store"]] = said["acknowledged"]
                told.steps[doing] += 1
                where = "between steps"
            elif "failed" in said:
                outcome.failures.append(said["failed"])
            if after is not None and after in said and not plug.is_alive() and not plug.finished.is_set():
                plug.start()
    except TimeoutError as error:
        outcome.failures.append(str(error))
    finally:
        plug.cancel()
    if where == "boot" or (after == "acknowledged" and where in ("opening", "writing")):
        outcome.failures.append(f"the guest ended in {where}, before its power was cut")
    return where
