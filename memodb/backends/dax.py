"""What can be told of files on DAX: how their file system is mounted, how they are written, how they are flushed."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_MOUNTS = Path("/proc/self/mountinfo")


@dataclass(frozen=True)
class Mount:
    """One line of /proc/self/mountinfo (proc(5)).

    Parameters
    ----------
    number, parent
        Ids of this mount and of the one it is mounted on.
    point
        Where it is mounted.
    options
        Of the mount and of the file system, such as ("rw", "relatime", "dax=always").
    """

    number: int
    parent: int
    point: str
    options: tuple[str, ...]


def parse_mounts(text: str) -> list[Mount]:
    """Return the mounts that the text of /proc/self/mountinfo tells of."""
    mounts = []
    for line in text.splitlines():
        # Any number of optional fields, then a dash: "36 35 98:0 /root /at rw,noatime shared:1 - ext4 /dev/sda rw".
        before, _, after = line.partition(" - ")
        fields, system = before.split(" "), after.split(" ")
        options = ",".join([fields[5], *system[2:]]).split(",")
        mounts.append(Mount(int(fields[0]), int(fields[1]), _unescaped(fields[4]), tuple(options)))
    return mounts


def _unescaped(field: str) -> str:
    """Undo what the kernel writes for blanks and backslashes, which is octal, byte by byte."""
    raw = re.sub(rb"\\([0-7]{3})", lambda found: bytes([int(found[1], 8)]), os.fsencode(field))
    return os.fsdecode(raw)


def holding(mounts: list[Mount], path: str) -> Mount | None:
    """Return the mount that holds `path`, absolute and without symbolic links; None where none of them does.

    It is found as the kernel finds it: from the root on, at each mount into the first one that is mounted on it along
    the way. The longest mount point that begins the path may be hidden under a later mount.
    """
    numbers = {mount.number for mount in mounts}
    current: Mount | None = None
    left = [mount for mount in mounts if _is_below(path, mount.point)]
    while True:
        children = [
            mount
            for mount in left
            if (mount.parent == current.number if current else mount.parent not in numbers - {mount.number})
        ]
        if not children:
            return current
        current = min(children, key=lambda mount: len(mount.point))
        left.remove(current)


def _is_below(path: str, point: str) -> bool:
    return path == point or path.startswith(point.rstrip("/") + "/")


def mount_option(path: str | os.PathLike[str]) -> str:
    """Return how the file system that holds `path` was mounted.

    "dax", "dax=always", "dax=inode" or "dax=never"; empty where nothing was said, which for ext4 and xfs means
    dax=inode: files with the attribute x (chattr +x, inherited from their directory) are on DAX.
    """
    try:
        mount = holding(parse_mounts(os.fsdecode(_MOUNTS.read_bytes())), os.path.realpath(path))
    except OSError:  # no /proc
        return ""
    options = () if mount is None else mount.options
    return next((option for option in options if option == "dax" or option.startswith("dax=")), "")


def report(directory: str | os.PathLike[str], *, synchronous: bool, flush: str) -> Mapping[str, Any]:
    """Return what ``stats()["dax"]`` says of files on DAX.

    Parameters
    ----------
    directory
        Where they lie.
    synchronous
        Whether they are written through mappings with MAP_SYNC.
    flush
        The call that a put flushes them by; empty if it does not.
    """
    return {
        "mount_option": mount_option(directory),
        "map_sync": synchronous,
        "flush": flush or "none, durability is relaxed",
    }
