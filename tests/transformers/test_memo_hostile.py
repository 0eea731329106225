"""What lies beside the database of a memo store is held to the rules of the database (docs/security.md)."""

from __future__ import annotations

import os
import stat

import pytest

import memodb
from memodb.safe import Guard
from memodb_transformers.beside import read_profile, write_profile


@pytest.mark.parametrize("harm", ["fifo", "link", "hard link", "writable by all", "folder is a link"])
def test_a_profile_is_read_from_nothing_but_a_file_of_ours(shm, harm):
    folder = shm / "store" / "transformers"
    folder.parent.mkdir(0o700)
    Guard.of(folder.parent).make_directory(folder)
    file = folder / "profile.json"
    write_profile(folder.parent, {"layers": 1})
    assert read_profile(folder.parent) == {"layers": 1}
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    if harm == "writable by all":
        file.chmod(0o606)
    elif harm == "folder is a link":
        folder.rename(shm / "good")
        folder.symlink_to(shm / "good")
    elif harm == "hard link":
        os.link(file, shm / "good")
    else:
        file.rename(shm / "good")
        os.mkfifo(file) if harm == "fifo" else file.symlink_to(shm / "good")
    with pytest.raises(memodb.UnsafePathError):
        read_profile(folder.parent)
