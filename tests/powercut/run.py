"""``make powercut CUTS=20``: the power goes while memodb writes, in a virtual machine; what was acknowledged is there.

``python tests/powercut/run.py [--cuts N] [--steps N] [--only cuts|replay] [--prove] [--seed N]``, as root. Two parts:

*cuts*: the guest changes stores of the backends arena, files and lmdb on ext4 on a disk and on ext4 ``dax=always`` on
an NVDIMM, and reports each acknowledged step over its serial line. The emulator is killed at a random moment (SIGKILL:
the guest's memory is gone), booted again, and every store compared with what was acknowledged: ids, bytes, keys.
This shows that nothing acknowledged was still in the guest's page cache. It cannot show a FLUSH or a write-back of the
processor's cache that is missing: what the guest wrote to its devices stays in this machine's memory (the disks are
attached with ``cache=unsafe``, as nothing here depends on it).

*replay*: the disk lies under dm-log-writes, which logs writes as they became durable, and a mark after each
acknowledged step. The disk is then put together as it was at every moment of the log (each FLUSH, each FUA write, each
mark), on this machine where it has loop devices, else in a guest. Mounting replays ext4's journal, and every store is
compared with the marks before that moment; and once more with a random part of the writes that were under way, some of
them torn. This does show missing flushes.

``--prove``: both parts with stores that were told not to flush (``durability=``), which must be found to lose records;
exits nonzero if they do not.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "dax"))

import image
import machine
from cutting import cut_often
from outcome import Outcome
from replaying import replay_log


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuts", type=int, default=20, help="how often the power goes")
    parser.add_argument("--steps", type=int, default=46, help="steps of each store to log; two of three are puts")
    where = "host" if Path("/dev/loop-control").exists() else "guest"
    parser.add_argument("--replay-in", choices=("host", "guest"), default=where, help="host: loop mounts, far quicker")
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1), help="replays side by side")
    parser.add_argument("--only", choices=("cuts", "replay"), help="one part")
    parser.add_argument("--prove", action="store_true", help="stores that do not flush: losses must be found")
    parser.add_argument("--seed", type=int, default=20250601, help="of what is written, and of the moments")
    parser.add_argument("--build", type=Path, default=machine.TREE / "build" / "dax", help="where the image is kept")
    parser.add_argument("--work", type=Path, default=machine.TREE / "build" / "powercut", help="where disks are kept")
    parser.add_argument("--keep", action="store_true", help="keep the disks; they are kept where something failed")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    began = time.monotonic()
    arguments.build.mkdir(parents=True, exist_ok=True)
    arguments.work.mkdir(parents=True, exist_ok=True)
    try:
        image.require()
        made = image.build(arguments.build)
    except image.Missing as error:
        print(f"make powercut cannot run here: {error}", file=sys.stderr)
        return 2
    for log in arguments.work.glob("console*.log"):
        log.unlink()
    tree = machine.pack(arguments.work / "tree.tar", "tests/powercut")
    print(f"seed {arguments.seed}{', stores that do not flush' if arguments.prove else ''}", flush=True)
    words = {"seed": str(arguments.seed), "relaxed": "yes" if arguments.prove else "no"}

    def command(program: str, more: dict[str, str], hardware: list[str]) -> list[str]:
        said = [f"{name}={value}" for name, value in (words | more).items()]
        guest = ["tests/powercut/guest.py", program, *said]
        return machine.command(made, tree, guest, hardware, processors=1)

    outcomes: list[Outcome] = []
    if arguments.only != "replay":
        outcomes.append(cut_often(command, arguments.work, arguments.cuts, arguments.seed))
    if arguments.only != "cuts":
        here = words if arguments.replay_in == "host" else None
        outcomes.append(replay_log(command, arguments.work, arguments.steps, arguments.jobs, here))
    status = summary(outcomes, arguments.work, arguments.prove, time.monotonic() - began)
    for disk in arguments.work.glob("*.img"):
        if not (status or arguments.keep):
            disk.unlink()
    return status


def summary(outcomes: list[Outcome], work: Path, prove: bool, seconds: float) -> int:
    """Print the table and the figures; return the exit status."""
    machine.table([("part", "check", "result", "what was seen"), *(row for o in outcomes for row in o.rows(prove))])
    figures = {name: value for outcome in outcomes for name, value in outcome.figures.items()}
    figures |= {"losses": sum(len(outcome.losses) for outcome in outcomes), "seconds": round(seconds)}
    figures |= {"prove": prove}
    (work / "summary.json").write_text(json.dumps(figures) + "\n")
    print("\n" + json.dumps(figures))
    return 0 if all(outcome.is_good(prove) for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
