"""Puts something else in the place of each file and directory of a store, one after the other, and uses the store.

Run as a program of its own, with a folder, a backend, and "every" for all records: an attempt that hangs or kills it
must not take the tests along. It prints a line of JSON before each attempt and one after it (see `test_hostile.py`).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import memodb

#: A user and a group that nobody has.
STRANGER = 54321
KEYS = np.random.default_rng(0).standard_normal((64, 8)).astype("float32")
VALUES = np.random.default_rng(1).standard_normal((64, 2, 1024)).astype("float32")


class NotHereError(Exception):
    """This machine or user cannot do it."""


def symlink(victim: Path, good: Path) -> None:
    os.rename(victim, good)
    victim.symlink_to(good)


def dangling_symlink(victim: Path, good: Path) -> None:
    os.rename(victim, good.with_suffix(".away"))
    victim.symlink_to(good)


def hard_link(victim: Path, good: Path) -> None:
    os.link(victim, good)


def fifo(victim: Path, good: Path) -> None:
    os.rename(victim, good)
    os.mkfifo(victim, 0o600)


def unix_socket(victim: Path, good: Path) -> None:
    os.rename(victim, good)
    where = os.getcwd()
    os.chdir(victim.parent)  # a socket's path is short
    try:
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(victim.name)
    finally:
        os.chdir(where)


def device(victim: Path, good: Path) -> None:
    try:
        os.mknod(good.with_suffix(".device"), stat.S_IFCHR | 0o600, os.makedev(1, 5))  # /dev/zero
    except OSError as error:
        raise NotHereError(f"no device can be made: {error}") from error
    os.rename(victim, good)
    os.rename(good.with_suffix(".device"), victim)


def directory(victim: Path, good: Path) -> None:
    os.rename(victim, good)
    victim.mkdir(0o700)


def regular_file(victim: Path, good: Path) -> None:
    os.rename(victim, good)
    victim.touch(0o600)


def foreign_owner(victim: Path, good: Path) -> None:
    try:
        os.chown(victim, STRANGER, -1)
    except OSError as error:
        raise NotHereError(f"only root gives files away: {error}") from error


def group_writable(victim: Path, good: Path) -> None:
    victim.chmod(victim.stat().st_mode | 0o020)


def world_writable(victim: Path, good: Path) -> None:
    victim.chmod(victim.stat().st_mode | 0o002)


Attack = Callable[[Path, Path], None]
ON_FILES: dict[str, Attack] = {
    "symlink": symlink,
    "dangling symlink": dangling_symlink,
    "hard link": hard_link,
    "fifo": fifo,
    "socket": unix_socket,
    "device": device,
    "directory": directory,
    "foreign owner": foreign_owner,
    "group-writable": group_writable,
    "world-writable": world_writable,
}
ON_DIRECTORIES: dict[str, Attack] = {
    "symlink": symlink,
    "fifo": fifo,
    "socket": unix_socket,
    "device": device,
    "file": regular_file,
    "foreign owner": foreign_owner,
    "group-writable": group_writable,
    "world-writable": world_writable,
}


def make(path: Path, backend: str) -> None:
    options: dict[str, Any] = {"segment_bytes": 1 << 18} if backend == "arena" else {}
    with memodb.MemoDB.create(
        path, shape=(2, 1024), dtype="float32", key_dim=8, backend=backend, index="HNSW8", **options
    ) as db:
        db.put(VALUES, KEYS)
        db.search(KEYS[:1])
    assert list((path / "index").iterdir()), "no index was saved, so none is attacked"


def victims(path: Path, *, every: bool) -> tuple[list[str], list[str]]:
    """Return the names of all files, and of all directories, in a store."""
    found = sorted(path.rglob("*"))
    # Of 64 records alike that are files of their own, two stand for all in the quick run.
    records = [f for f in found if f.parent.name == "000" or f.name.startswith("c.")]
    skipped = set() if every else set(records[1:-1])
    files = [str(f.relative_to(path)) for f in found if f.is_file() and f not in skipped]
    return files, [str(f.relative_to(path)) for f in found if f.is_dir()]


def read(path: Path) -> None:
    with memodb.MemoDB.open(path) as db:
        assert np.array_equal(db.multiget(range(64)), VALUES), "wrong bytes"
        assert np.array_equal(db.search(KEYS).ids[:, 0], np.arange(64)), "wrong neighbours"


def write(path: Path) -> None:
    with memodb.MemoDB.open(path, "r+") as db:
        db.multiget(range(64))
        db.put(VALUES[:4], KEYS[:4])
        db.search(KEYS)
        db.delete(range(8))
        db.compact()


def outcome(use: Callable[[Path], None], path: Path) -> str:
    try:
        use(path)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def digest(folder: Path) -> str:
    """Return what tells whether anything below `folder` was changed, made or removed."""
    found = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        held = file.lstat()
        found.update(f"{file} {held.st_mode} {held.st_uid} {held.st_size}\n".encode())
        if stat.S_ISREG(held.st_mode):
            found.update(file.read_bytes())
    return found.hexdigest()


def say(**what: Any) -> None:
    print(json.dumps(what), flush=True)


def attempt(folder: Path, original: Path, victim: str, name: str, attack: Attack) -> None:
    for use in (read, write):
        path, outside = folder / "store", folder / "outside"
        for left in (path, outside):
            shutil.rmtree(left, ignore_errors=True)
        shutil.copytree(original, path)
        outside.mkdir(0o700)
        say(begins=[victim, name, use.__name__])
        try:
            attack(path / victim, outside / "good")
        except NotHereError as reason:
            say(victim=victim, attack=name, use=use.__name__, skipped=str(reason))
            continue
        before = digest(outside)
        found = outcome(use, path)
        say(victim=victim, attack=name, use=use.__name__, found=found, followed=digest(outside) != before)


def main(folder: Path, backend: str, every: bool) -> None:
    original = folder / "original"
    make(original, backend)
    files, directories = victims(original, every=every)
    say(files=files, directories=directories)
    for victim in files:
        for name, attack in ON_FILES.items():
            attempt(folder, original, victim, name, attack)
    for victim in directories:
        for name, attack in ON_DIRECTORIES.items():
            attempt(folder, original, victim, name, attack)
    say(done=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:] == ["every"])
