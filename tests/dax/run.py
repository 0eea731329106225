"""``make dax-test``: memodb on a real DAX mount, in a virtual machine with a virtual NVDIMM.

``python tests/dax/run.py [--keep] [--timeout SECONDS]``, as root. The kernel, its NVDIMM driver, ext4 and xfs with
``dax=always`` and MAP_SYNC are the real ones; the processor is emulated, so times mean nothing. Exits nonzero where a
check failed, or the guest did not come to its end.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import image
import machine

NVDIMM_MIB = 1024 + machine.LABEL_MIB


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=machine.TREE / "build" / "dax", help="where images are kept")
    parser.add_argument("--timeout", type=float, default=900, help="seconds that the guest may take")
    parser.add_argument("--keep", action="store_true", help="keep the NVDIMM's file")
    parser.add_argument("guest", nargs="*", help="words for tests/dax/guest.py")
    arguments = parser.parse_args()
    began = time.monotonic()
    at = arguments.build
    at.mkdir(parents=True, exist_ok=True)
    try:
        image.require()
        made = image.build(at)
    except image.Missing as error:
        print(f"make dax-test cannot run here: {error}", file=sys.stderr)
        return 2
    tree = machine.pack(at / "tree.tar", "tests/dax")
    nvdimm = machine.blank(at / "nvdimm.img", NVDIMM_MIB)
    hardware = [
        *("-m", "3G,slots=2,maxmem=8G"),
        # A second node without processors, as CXL memory comes online.
        *("-object", "memory-backend-ram,id=near,size=2G", "-numa", "node,nodeid=0,cpus=0-1,memdev=near"),
        *("-object", "memory-backend-ram,id=far,size=1G", "-numa", "node,nodeid=1,memdev=far"),
        *machine.nvdimm(nvdimm, NVDIMM_MIB),
    ]
    command = machine.command(made, tree, ["tests/dax/guest.py", *arguments.guest], hardware)
    try:
        reports = boot(command, arguments.timeout)
    finally:
        tree.unlink(missing_ok=True)
        if not arguments.keep:
            nvdimm.unlink(missing_ok=True)
    return summary(reports, time.monotonic() - began)


def boot(command: list[str], timeout: float) -> list[dict[str, Any]]:
    """Run the guest to its end, show its console, and return what it reported."""
    reports: list[dict[str, Any]] = []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with machine.Machine(command) as guest:
        try:
            for report in guest.reports(timeout):
                reports.append(report)
        except TimeoutError:
            print(f"the guest did not end within {timeout:.0f} s", file=sys.stderr)
    return reports


def summary(reports: list[dict[str, Any]], seconds: float) -> int:
    """Print the table; return the exit status."""
    rows = [("file system", "check", "result", "what was seen")]
    rows += [(r["where"], r["check"], r["result"], r["seen"]) for r in reports if "check" in r]
    machine.table(rows)
    failed = [row for row in rows[1:] if row[2] == "FAILED"]
    ended = any(r.get("ended") for r in reports)
    print(f"\n{len(rows) - 1} checks, {len(failed)} failed, {seconds:.0f} s", "" if ended else "- NOT TO THE END")
    return 0 if ended and not failed and len(rows) > 1 else 1


if __name__ == "__main__":
    sys.exit(main())
