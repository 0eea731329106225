"""Starting the process that suffers faults, and asking it for campaigns (see fault.c and fault_template.py)."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
#: What is done under a fault, and to which stores.
OPERATIONS = (
    "create", "open", "open r+", "put", "delete", "compact", "reindex", "close", "copy", "gather", "map", "search",
    "verify",
)  # fmt: skip
KINDS = ("arena", "huge", "files", "lmdb", "zarr")
#: Which errors a call gives, the likeliest first. "half": it does half of what it was asked for.
ERRORS: dict[str, tuple[str, ...]] = {
    "write": ("EIO", "ENOSPC", "half", "EDQUOT", "EINTR"),
    "read": ("EIO", "half", "EINTR"),
    "fsync": ("EIO", "ENOSPC", "EDQUOT", "EINTR"),
    "fdatasync": ("EIO", "ENOSPC", "EDQUOT", "EINTR"),
    "syncfs": ("EIO", "ENOSPC", "EDQUOT", "EINTR"),
    "msync": ("EIO",),
    "mmap": ("ENOMEM", "EAGAIN", "EIO"),
    "collapse": ("EAGAIN", "ENOMEM", "EINTR"),
    "populate": ("ENOMEM", "EIO", "EAGAIN", "EINTR"),
    "advise": ("ENOMEM", "EAGAIN"),
    "fallocate": ("ENOSPC", "EIO", "EDQUOT", "EINTR", "half"),
    "truncate": ("EIO", "ENOSPC", "EINTR"),
    "open": ("EMFILE", "EIO", "ENOMEM", "EINTR", "ENOSPC"),
    "rename": ("EIO", "ENOSPC"),
    "unlink": ("EIO", "EDQUOT"),
    "mkdir": ("ENOSPC", "EIO", "EDQUOT"),
}


def shim(folder: Path) -> Path:
    """Compile the shim, or skip."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler (cc, gcc): it makes the library that lets system calls fail")
    library = folder / "fault.so"
    command = [compiler, "-O2", "-shared", "-fPIC", "-o", str(library), str(HERE / "fault.c"), "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"the shim cannot be compiled here: {done.stderr.strip()[:500]}")
    return library


class Template:
    """The process that was started with the shim."""

    def __init__(self, library: Path) -> None:
        environment = {**os.environ, "LD_PRELOAD": str(library)}
        paths = [str(HERE), str(HERE.parent.parent), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "fault_template.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def ask(self, **campaign: Any) -> dict[str, Any]:
        """Let one operation suffer a fault at the N-th call, for each N of a campaign; return what came of it."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(campaign) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, f"the template ended with status {self.process.wait()} at {campaign}"
        return dict(json.loads(line))

    def close(self) -> None:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(60)


def campaign(
    where: Path, kind: str, operation: str, call: str, error: str, mode: str = "once", most: int | None = None
) -> dict[str, Any]:
    """Return what `Template.ask` is to be asked; `most`: at so many of the calls, spread evenly (None: at each)."""
    code = errno.EIO if error == "half" else getattr(errno, error) if error else 0
    return {
        "where": str(where),
        "kind": kind,
        "operation": operation,
        "call": call,
        "errno": code,
        "mode": "half" if error == "half" else mode,
        "most": most,
    }
