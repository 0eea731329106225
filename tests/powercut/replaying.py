"""The replay: one guest writes under dm-log-writes, others go through every moment of its log."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

import machine
from cutting import Command
from outcome import Outcome

DISK_MIB, LOG_MIB = 256, 2048
#: Of each replay: the disk as it was, and what the changes of checking it are written to.
_DISKS = (("disk", DISK_MIB), ("spare", 2 * DISK_MIB))
_KINDS = ("flushed", "torn")
#: Seconds that recording, and going through the log, may take.
RECORDING, REPLAYING = 600.0, 7200.0


def _drive(path: Path, more: str = "") -> list[str]:
    return ["-drive", f"file={path},if=virtio,format=raw,cache=unsafe{more}"]


def replay_log(command: Command, work: Path, steps: int, jobs: int, words: dict[str, str] | None) -> Outcome:
    """Log so many steps of each store, and check every moment of the log in `jobs` machines side by side.

    With `words`: in so many processes of this machine.
    """
    outcome = Outcome("replay")
    disk, log = machine.blank(work / "logged.img", DISK_MIB), machine.blank(work / "log.img", LOG_MIB)
    hardware = ["-m", "2G", *_drive(disk), *_drive(log)]
    recorded: dict[str, int] = {}
    with machine.Machine(command("record", {"steps": str(steps)}, hardware), work / "console.log") as guest:
        for said in _reports(guest, RECORDING, outcome):
            recorded = said.get("recorded", recorded)
    if not recorded:
        outcome.failures.append("nothing was recorded")
        return outcome
    print(f"recorded {recorded}", flush=True)
    told: list[list[dict[str, Any]]] = [[] for _ in range(jobs)]

    def go_through(part: int) -> None:
        disk, spare = (machine.blank(work / f"{name}-{part}.img", mib) for name, mib in _DISKS)
        more = {"part": str(part), "parts": str(jobs)}
        if words is None:
            hardware = ["-m", "1G", *_drive(disk), *_drive(log, ",readonly=on"), *_drive(spare)]
            process = command("replay", more, hardware)
        else:
            # Mounts of a namespace of its own are gone when it ends, however it ends.
            more |= words | {"disk": str(disk), "log": str(log), "spare": str(spare)}
            guest_program = str(Path(__file__).with_name("guest.py"))
            said = [f"{name}={value}" for name, value in more.items()]
            process = ["unshare", "--mount", sys.executable, guest_program, "replay", *said]
        with machine.Machine(process, work / f"console-{part}.log") as guest:
            for said in _reports(guest, REPLAYING, outcome):
                told[part].append(said)
                if "lost" in said:
                    outcome.lose(said["store"], f"moment {said['moment']}, {said['kind']}: {said['lost']}")
                elif "moments" in said and not part:
                    print(f"{said['moments']} moments in {said['entries']} entries", flush=True)
                elif said.get("kind") == "flushed" and said["moment"] % 50 < jobs:
                    print(f"moment {said['moment']}", flush=True)
        if not any("replayed" in said for said in told[part]):
            outcome.failures.append(f"part {part} did not come to the end of the log")

    threads = [threading.Thread(target=go_through, args=(part,), daemon=True) for part in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    _add_up(outcome, recorded, [said for part in told for said in part])
    return outcome


def _reports(guest: machine.Machine, seconds: float, outcome: Outcome) -> Any:
    try:
        for said in guest.reports(seconds):
            if "failed" in said:
                outcome.failures.append(said["failed"])
            yield said
    except TimeoutError as error:
        outcome.failures.append(str(error))


def _add_up(outcome: Outcome, recorded: dict[str, int], told: list[dict[str, Any]]) -> None:
    checks = {kind: [said for said in told if said.get("kind") == kind and "further" in said] for kind in _KINDS}
    moments = next((said for said in told if "moments" in said), {"moments": 0, "entries": 0, "flushes": 0})
    outcome.figures = {
        "logged batches": recorded.get("put", 0),
        "logged deletes": recorded.get("delete", 0),
        "logged compactions": recorded.get("compact", 0),
        "log entries": moments["entries"],
        "flushes and FUA writes": moments["flushes"],
        "moments": moments["moments"],
        "moments replayed": len(checks["flushed"]),
        "torn moments replayed": len(checks["torn"]),
        "writes kept of torn": sum(said["writes"] for said in checks["torn"]),
    }
    if len(checks["flushed"]) != moments["moments"]:
        outcome.failures.append(f"{len(checks['flushed'])} of {moments['moments']} moments were checked")
    for store in ("arena-disk", "files-disk", "lmdb-disk"):
        outcome.stores[store] = f"{len(checks['flushed'])} + {len(checks['torn'])} moments"
