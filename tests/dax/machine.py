"""The virtual machine: the command that boots it, what the guest reports line by line, and pulling its plug."""

from __future__ import annotations

import atexit
import contextlib
import json
import re
import selectors
import subprocess
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

TREE = Path(__file__).resolve().parents[2]
#: What the guest reports begins its lines with this; all else is the console's.
MARK = "@@ "
#: What a firmware and a terminal say to each other.
ESCAPE = re.compile(r"\x1b[\[(]?[0-9;?=]*[A-Za-z]|[\x00-\x08\x0b-\x1f]")
#: The label area of the NVDIMM: a region has to be a multiple of 16 MiB, so its file has this much more.
LABEL_MIB = 2


def pack(at: Path, *names: str) -> Path:
    """Pack the package under test and its checks for the guest's second disk; a tar archive needs no file system."""

    def wanted(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
        return None if "__pycache__" in entry.name else entry

    with tarfile.open(at, "w") as archive:
        for name in ("memodb", "pyproject.toml", *names):
            archive.add(TREE / name, name, filter=wanted)
    with at.open("ab") as file:  # a disk has whole sectors
        file.truncate(-(-at.stat().st_size // (1 << 20)) << 20)
    return at


def blank(at: Path, mib: int) -> Path:
    """Make an empty disk, sparse, in place of what was there."""
    at.unlink(missing_ok=True)
    with at.open("wb") as file:
        file.truncate(mib << 20)
    return at


def command(
    made: tuple[Path, Path, Path], tree: Path, words: list[str], hardware: list[str], *, processors: int = 2
) -> list[str]:
    """Return the command that boots a guest of `image.build`, which runs the Python program `words`.

    The root image is never written (snapshot=on). `hardware`: memory, and disks beyond the root and the tree.
    """
    kernel, ramdisk, root = made
    append = "root=/dev/vda rw console=ttyS0 quiet panic=-1 init=/init.sh " + " ".join(f"guest.{w}" for w in words)
    return [
        *("qemu-system-x86_64", "-machine", "q35,nvdimm=on,accel=tcg", "-cpu", "max", "-smp", str(processors)),
        *("-kernel", str(kernel), "-initrd", str(ramdisk)),
        *("-drive", f"file={root},if=virtio,format=raw,snapshot=on"),
        *("-drive", f"file={tree},if=virtio,format=raw,readonly=on"),
        *hardware,
        *("-append", append, "-nographic", "-no-reboot", "-nic", "none"),
    ]


def nvdimm(at: Path, mib: int) -> list[str]:
    """Return the hardware of an NVDIMM whose contents are the file `at`."""
    return [
        *("-object", f"memory-backend-file,id=mem1,share=on,mem-path={at},size={mib}M"),
        *("-device", f"nvdimm,id=nv1,memdev=mem1,label-size={LABEL_MIB}M"),
    ]


_running: set[subprocess.Popen[bytes]] = set()


@atexit.register
def _cut_all() -> None:
    """End guests that threads were still reading from: nobody else would."""
    for guest in list(_running):
        guest.kill()


class Machine:
    """A guest that runs from entering the block to its end, or to `cut`.

    Parameters
    ----------
    command
        See `command`.
    log
        A file that its console is added to, which is printed otherwise.
    """

    def __init__(self, command: list[str], log: Path | None = None) -> None:
        self._command, self._log = command, log
        self._began = time.monotonic()
        self._rest = b""

    def __enter__(self) -> Self:
        # A session of its own: an interrupt is for us, who then end the guest.
        self._guest = subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        _running.add(self._guest)
        assert self._guest.stdout is not None
        self._out = self._guest.stdout
        self._ready = selectors.DefaultSelector()
        self._ready.register(self._out, selectors.EVENT_READ)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cut()
        self._ready.close()
        self._out.close()

    def cut(self) -> None:
        """Pull the plug: SIGKILL, so nothing of the guest's memory is written anywhere."""
        self._guest.kill()
        self._guest.wait()
        _running.discard(self._guest)

    def reports(self, seconds: float) -> Iterator[dict[str, Any]]:
        """Yield what the guest reports, until it has ended and all was read; a line that is not whole is none.

        Raises
        ------
        TimeoutError
            After so many seconds.
        """
        end = time.monotonic() + seconds
        while True:
            left = end - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"the guest was not there within {seconds:.0f} s")
            if not self._ready.select(left):
                continue
            read = self._out.read1(1 << 16)  # type: ignore[attr-defined]
            if not read:
                return
            *lines, self._rest = (self._rest + read).split(b"\n")
            for line in lines:
                yield from self._said(ESCAPE.sub("", line.decode(errors="replace")).rstrip())

    def _said(self, text: str) -> Iterator[dict[str, Any]]:
        if (start := text.find(MARK)) >= 0:
            with contextlib.suppress(ValueError):
                yield json.loads(text[start + len(MARK) :])
                return
        said = f"[{time.monotonic() - self._began:5.0f} s] {text}"
        if text and self._log is None:
            print(said, flush=True)
        elif text and self._log is not None:
            with self._log.open("a") as file:
                file.write(said + "\n")


def table(rows: list[tuple[str, ...]]) -> None:
    """Print rows, the first of which is the head; the last column is as long as it is."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    print()
    for row in rows:
        print("  ".join([*(f"{row[i]:{width}}" for i, width in enumerate(widths)), row[-1]]).rstrip())
