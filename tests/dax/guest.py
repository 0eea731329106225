"""Runs in the guest: makes the file systems, mounts them, runs the checks, and reports to the host line by line.

``python tests/dax/guest.py [WORD ...]``: without words all of it; "conformance" and "layouts" a part.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import xml.etree.ElementTree
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
DEVICE, AT = "/dev/pmem0", Path("/tmp/pmem")
MARK = "@@ "


@dataclass(frozen=True)
class Layout:
    """A file system to try.

    Parameters
    ----------
    name
        For the table.
    make
        The command that makes it; the device is added.
    mount
        Options of the mount.
    whole
        Whether all of a store has to lie on extents of 2 MiB; otherwise that is only told.
    conformance
        Whether the backends' suites run on it.
    """

    name: str
    make: tuple[str, ...]
    mount: str = "dax=always"
    whole: bool = False
    conformance: bool = False


EXT4, XFS = ("mkfs.ext4", "-q", "-F", "-b", "4096", "-m", "0"), ("mkfs.xfs", "-q", "-f")
LAYOUTS = (
    Layout("ext4", EXT4, conformance=True),
    Layout("ext4, stripe_width=512", (*EXT4, "-E", "stride=512,stripe_width=512"), whole=True),
    Layout("xfs, su=2m,sw=1", (*XFS, "-d", "su=2m,sw=1"), whole=True, conformance=True),
    Layout("xfs as it comes", XFS),
    Layout("ext4, dax=inode", EXT4, mount="dax=inode"),
)


def report(**what: object) -> None:
    print(MARK + json.dumps(what), flush=True)


def run(*command: str) -> None:
    subprocess.run(command, check=True)


@contextmanager
def mounted(layout: Layout) -> Iterator[None]:
    """Make the file system anew and mount it at `AT`."""
    run(*layout.make, DEVICE)
    AT.mkdir(exist_ok=True)
    run("mount", "-o", layout.mount, DEVICE, str(AT))
    try:
        yield
    finally:
        run("umount", str(AT))


def conformance(layout: Layout) -> None:
    """Run the suites of `memodb.testing` with stores on the mount; report by backend."""
    results = Path("/tmp/results.xml")
    results.unlink(missing_ok=True)
    began = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-q", "--color=no", "-p", "no:cacheprovider", f"--junitxml={results}"]
    status = subprocess.run(
        [*command, str(HERE / "conformance.py")], env={**os.environ, "MEMODB_DAX": str(AT)}
    ).returncode
    counts: dict[str, dict[str, int]] = {}
    for case in xml.etree.ElementTree.parse(results).iter("testcase") if results.exists() else ():
        # Classes are called TestSuite_arena, TestMachine_arena: see conformance.py.
        suite, _, backend = case.get("classname", "").rpartition(".")[2].partition("_")
        what = f"{'conformance' if suite == 'TestSuite' else 'state machine'}, {backend}"
        outcome = next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed")
        counts.setdefault(what, {}).setdefault(outcome, 0)
        counts[what][outcome] += 1
    for what, count in counts.items():
        bad = count.keys() & {"failure", "error"} or not count.get("passed")
        seen = ", ".join(f"{n} {outcome}" for outcome, n in count.items())
        report(where=layout.name, check=what, result="FAILED" if bad else "ok", seen=seen)
    if status or not counts:
        seen = f"status {status}, {time.monotonic() - began:.0f} s"
        report(where=layout.name, check="conformance, pytest itself", result="FAILED", seen=seen)


def checks(layout: Layout, part: str) -> None:
    """Run a part of checks.py in a process of its own, which a signal would end."""
    command = [sys.executable, str(HERE / "checks.py"), part, layout.name, str(AT), "whole" if layout.whole else "any"]
    if status := subprocess.run(command).returncode:
        report(where=layout.name, check=f"checks: {part}", result="FAILED", seen=f"status {status}")


def main() -> None:
    words = sys.argv[1:]
    if not words:
        report(where="guest", check="kernel", result="ok", seen=os.uname().release)
    if not words or "node" in words:
        checks(Layout("tmpfs", (), "mpol=bind:1"), "node")
    run("ndctl", "create-namespace", "-f", "-e", "namespace0.0", "-m", "fsdax", "-a", "2M")
    for layout in LAYOUTS:
        print(f"--- {layout.name}", flush=True)
        with mounted(layout):
            if layout.mount == "dax=inode":
                checks(layout, "inode")
                continue
            if layout.conformance and (not words or "conformance" in words):
                conformance(layout)
            if not words or "layouts" in words:
                if layout.conformance:
                    checks(layout, "writer")
                checks(layout, "pages")
    report(ended=True)


if __name__ == "__main__":
    try:
        main()
    except Exception as error:
        report(where="guest", check="set up", result="FAILED", seen=f"{type(error).__name__}: {error}")
        raise
