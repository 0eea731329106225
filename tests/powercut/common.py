"""What the programs of the guest share: their reports, their devices, their stores."""

from __future__ import annotations

import json
import os
import subprocess
import termios
from pathlib import Path
from typing import Any

from script import Store, advanced

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
