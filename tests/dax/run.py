"""``make dax-test``: memodb on a real DAX mount, in a virtual machine with a virtual NVDIMM.

``python tests/dax/run.py [--keep] [--timeout SECONDS]``, as root. The kernel, its NVDIMM driver, ext4 and xfs with
``dax=always`` and MAP_SYNC are the real ones; the processor is emulated, so times mean nothing. Exits nonzero where a
check failed, or the guest did not come to its end.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import selectors
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import image

TREE = Path(__file__).resolve().parents[2]
#: What the guest reports begins its lines with this; all else is the console's.
MARK = "@@ "
#: What a firmware and a terminal say to each other.
ESCAPE = re.compile(r"\x1b[\[(]?[0-9;?=]*[A-Za-z]|[\x00-\x08\x0b-\x1f]")
#: 1 GiB and the label area: a region has to be a multiple of 16 MiB.
NVDIMM_MIB, LABEL_MIB = 1026, 2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=TREE / "build" / "dax", help="where images are kept")
    parser.add_argument("--timeout", type=float, default=900, help="seconds that the guest may take")
    parser.add_argument("--keep", action="store_true", help="keep the NVDIMM's file")
    parser.add_argument("guest", nargs="*", help="words for tests/dax/guest.py")
    arguments = parser.parse_args()
    began = time.monotonic()
    at = arguments.build
    at.mkdir(parents=True, exist_ok=True)
    try:
        image.require()
        kernel, ramdisk, root = image.build(at)
    except image.Missing as error:
        print(f"make dax-test cannot run here: {error}", file=sys.stderr)
        return 2
    tree = pack(at / "tree.tar")
    nvdimm = at / "nvdimm.img"
    nvdimm.unlink(missing_ok=True)
    with nvdimm.open("wb") as file:
        file.truncate(NVDIMM_MIB << 20)
    command = qemu(kernel, ramdisk, root, tree, nvdimm, arguments.guest)
    try:
        reports = boot(command, arguments.timeout)
    finally:
        tree.unlink(missing_ok=True)
        if not arguments.keep:
            nvdimm.unlink(missing_ok=True)
    return summary(reports, time.monotonic() - began)


def pack(at: Path) -> Path:
    """Pack the package under test and these checks, for the guest's second disk; a tar archive needs no file system."""

    def wanted(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
        return None if "__pycache__" in entry.name else entry

    with tarfile.open(at, "w") as archive:
        for name in ("memodb", "tests/dax", "pyproject.toml"):
            archive.add(TREE / name, name, filter=wanted)
    with at.open("ab") as file:  # a disk has whole sectors
        file.truncate(-(-at.stat().st_size // (1 << 20)) << 20)
    return at


def qemu(kernel: Path, ramdisk: Path, root: Path, tree: Path, nvdimm: Path, words: list[str]) -> list[str]:
    """Return the command that boots the guest. The root image is never written: snapshot=on."""
    append = "root=/dev/vda rw console=ttyS0 quiet panic=-1 init=/init.sh " + " ".join(f"guest.{w}" for w in words)
    return [
        "qemu-system-x86_64",
        *("-machine", "q35,nvdimm=on,accel=tcg", "-cpu", "max", "-smp", "2", "-m", "3G,slots=2,maxmem=8G"),
        # A second node without processors, as CXL memory comes online.
        *("-object", "memory-backend-ram,id=near,size=2G", "-numa", "node,nodeid=0,cpus=0-1,memdev=near"),
        *("-object", "memory-backend-ram,id=far,size=1G", "-numa", "node,nodeid=1,memdev=far"),
        *("-object", f"memory-backend-file,id=mem1,share=on,mem-path={nvdimm},size={NVDIMM_MIB}M"),
        *("-device", f"nvdimm,id=nv1,memdev=mem1,label-size={LABEL_MIB}M"),
        *("-kernel", str(kernel), "-initrd", str(ramdisk)),
        *("-drive", f"file={root},if=virtio,format=raw,snapshot=on"),
        *("-drive", f"file={tree},if=virtio,format=raw,readonly=on"),
        *("-append", append, "-nographic", "-no-reboot", "-nic", "none"),
    ]


def boot(command: list[str], timeout: float) -> list[dict[str, Any]]:
    """Run the guest to its end, show its console, and return what it reported."""
    reports: list[dict[str, Any]] = []
    # A session of its own: an interrupt is for us, who then end the guest.
    guest = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    began = time.monotonic()
    try:
        assert guest.stdout is not None
        with selectors.DefaultSelector() as ready:
            ready.register(guest.stdout, selectors.EVENT_READ)
            rest = b""
            while (left := began + timeout - time.monotonic()) > 0:
                if not ready.select(min(left, 5)):
                    continue
                read = guest.stdout.read1(1 << 16)  # type: ignore[attr-defined]
                if not read:
                    break
                *lines, rest = (rest + read).split(b"\n")
                for line in lines:
                    text = ESCAPE.sub("", line.decode(errors="replace")).rstrip()
                    if (start := text.find(MARK)) >= 0:
                        with contextlib.suppress(ValueError):
                            reports.append(json.loads(text[start + len(MARK) :]))
                            continue
                    if text:
                        print(f"[{time.monotonic() - began:5.0f} s] {text}", flush=True)
            else:
                print(f"the guest did not end within {timeout:.0f} s", file=sys.stderr)
    finally:
        guest.kill()
        guest.wait()
    return reports


def summary(reports: list[dict[str, Any]], seconds: float) -> int:
    """Print the table; return the exit status."""
    rows = [("file system", "check", "result", "what was seen")]
    rows += [(r["where"], r["check"], r["result"], r["seen"]) for r in reports if "check" in r]
    widths = [max(len(str(row[i])) for row in rows) for i in range(3)]
    print()
    for row in rows:
        print("  ".join([*(f"{row[i]:{widths[i]}}" for i in range(3)), row[3]]).rstrip())
    failed = [row for row in rows[1:] if row[2] == "FAILED"]
    ended = any(r.get("ended") for r in reports)
    print(f"\n{len(rows) - 1} checks, {len(failed)} failed, {seconds:.0f} s", "" if ended else "- NOT TO THE END")
    return 0 if ended and not failed and len(rows) > 1 else 1


if __name__ == "__main__":
    sys.exit(main())
