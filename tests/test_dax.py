"""DAX as far as it can be tried without a DAX mount; on one: ``make dax-test``."""

import os
import subprocess
import sys

import numpy as np
import pytest
from programs import private_mount, run_program

import memodb
from memodb import vm
from memodb.backends import dax
from memodb.testing import assert_same_bytes, random_records

MOUNTS = r"""
21 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw,errors=remount-ro
22 21 0:20 / /proc rw,nosuid - proc proc rw
30 21 259:0 / /pmem rw,relatime shared:5 master:2 propagate_from:1 - ext4 /dev/pmem0 rw,dax=always
31 30 8:2 / /pmem/disk rw - xfs /dev/sdb rw,attr2
32 21 259:0 /stores /srv/my\040stores rw,noatime - ext4 /dev/pmem0 rw,dax=always
33 21 259:1 / /pmem2 rw - xfs /dev/pmem1 rw,dax=never,inode64
34 21 8:3 / /under rw - xfs /dev/sdc rw
35 34 8:4 / /under/deep rw - ext4 /dev/sdd rw,dax=inode
36 34 259:2 / /under rw - ext2 /dev/pmem2 rw,dax
37 21 0:40 / /back\134slash\012line rw,dax=inode - virtiofs host rw
38 36 259:2 /a /under/bound rw - ext2 /dev/pmem2 rw,dax
""".strip()


@pytest.mark.parametrize(
    ("path", "number", "option"),
    [
        ("/", 21, ""),
        ("/home", 21, ""),
        ("/pmem", 30, "dax=always"),
        ("/pmem/store/values", 30, "dax=always"),
        ("/pmem/disk/store", 31, ""),
        ("/pmem/disks", 30, "dax=always"),
        ("/pmem2/store", 33, "dax=never"),
        ("/pmem20", 21, ""),
        ("/srv/my stores/store", 32, "dax=always"),
        (r"/srv/my\040stores", 21, ""),
        ("/under/store", 36, "dax"),
        ("/under/deep/store", 36, "dax"),  # what was mounted there before is hidden
        ("/under/bound/store", 38, "dax"),
        ("/back\\slash\nline/store", 37, "dax=inode"),
    ],
)
def test_the_mount_that_holds_a_path(tmp_path, monkeypatch, path, number, option):
    assert dax.holding(dax.parse_mounts(MOUNTS), path).number == number
    (tmp_path / "mountinfo").write_text(MOUNTS)
    monkeypatch.setattr(dax, "_MOUNTS", tmp_path / "mountinfo")
    assert dax.mount_option(path) == option


def test_a_root_that_is_no_mount_and_no_mounts_at_all(tmp_path, monkeypatch):
    """As in a chroot, whose root's mount is not in the list."""
    inside = dax.parse_mounts(r"40 21 0:30 / /mnt rw - ext4 /dev/pmem0 rw,dax=always")
    assert dax.holding(inside, "/mnt/a").number == 40
    assert dax.holding(inside, "/other") is None
    monkeypatch.setattr(dax, "_MOUNTS", tmp_path / "nothing")
    assert dax.mount_option("/") == ""


def test_a_symbolic_link_is_followed(tmp_path, monkeypatch):
    (tmp_path / "mountinfo").write_text(f"{MOUNTS}\n50 21 0:50 / {tmp_path}/real rw - ext4 /dev/pmem0 rw,dax=always")
    monkeypatch.setattr(dax, "_MOUNTS", tmp_path / "mountinfo")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert dax.mount_option(tmp_path / "link") == "dax=always"


AS_THE_KERNEL_SAYS = """
import os, subprocess, sys
from pathlib import Path
from memodb.backends import dax

def told(path):
    fd = os.open(path, os.O_PATH)
    lines = Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
    os.close(fd)
    return int(next(line.split()[1] for line in lines if line.startswith("mnt_id")))

def mount(*words):
    subprocess.run(["mount", *words], check=True)

at = Path(sys.argv[1])
for name in ("a", "a/b", "bound"):
    (at / name).mkdir()
    if name != "bound":
        mount("-t", "tmpfs", "none", str(at / name))
(at / "a/b/c").mkdir()
mount("--bind", str(at / "a/b"), str(at / "bound"))
mount("-t", "tmpfs", "none", str(at / "a"))  # hides a/b
(at / "a/b").mkdir()
mounts = dax.parse_mounts(os.fsdecode(Path("/proc/self/mountinfo").read_bytes()))
for path in ("/", "/proc/self", "/dev", "/usr/bin", at, at / "a", at / "a/b", at / "bound", at / "bound/c"):
    path = os.path.realpath(path)
    assert dax.holding(mounts, path).number == told(path), path
"""


def test_the_kernel_finds_the_same_mounts(disk):
    """Overmounts, a bind mount, a blank and a backslash in a name."""
    at = disk / "with blank\\ and more"
    run_program(disk, AS_THE_KERNEL_SAYS, at, wrapper=private_mount(at, "tmpfs", "size=1m"))


def test_nothing_is_on_dax_here(folder, capsys):
    from memodb.cli import main

    with memodb.MemoDB.create(folder / "store", shape=(1024,), dtype="float32") as db:
        assert db.stats()["dax"] is None
        db.put(np.ones((3, 1024), np.float32))
        if "DAX" in db.stats()["filesystem"]:
            pytest.skip("the tests run on a DAX mount")
        assert db.stats()["dax"] is None
    assert main(["info", str(folder / "store")]) == 0
    assert any(line.split() == ["dax", "none"] for line in capsys.readouterr().out.splitlines())


def test_a_file_that_is_not_on_dax_refuses_map_sync(folder):
    with open(folder / "file", "w+b") as file:
        os.posix_fallocate(file.fileno(), 0, 4096)
        if vm.is_dax(file.fileno()):
            pytest.skip("the tests run on a DAX mount")
        assert not vm.can_map_synchronously(file.fileno())
        address = vm.reserve(4096)
        try:
            with pytest.raises(OSError, match="mmap"):
                vm.map_shared(address, 4096, file.fileno(), 0, synchronous=True)
        finally:
            vm.unmap(address, 4096)


def put_in_pieces(db, shape):
    """Put records in batches of many sizes, of any strides; return what was put."""
    values = random_records(41, shape, "uint16")
    db.put(values[:1])
    db.put(values[1:4])
    db.put(values[4:20][::-1])
    db.put(np.ascontiguousarray(values[20:].swapaxes(1, 2)).swapaxes(1, 2))
    return np.concatenate([values[:4], values[4:20][::-1], values[20:]])


def test_where_map_sync_is_refused_files_are_written_by_pwrite(disk, monkeypatch):
    """A file system that says DAX and has no MAP_SYNC, such as virtiofs."""
    monkeypatch.setattr("memodb.vm.is_dax", lambda fd: True)
    with memodb.MemoDB.create(disk / "store", shape=(3, 1024), dtype="uint16") as db:
        values = put_in_pieces(db, (3, 1024))
        assert_same_bytes(db.multiget(range(41)), values)
        stats = db.stats()
        assert stats["filesystem"].endswith(", DAX")
        if stats["dax"]["map_sync"]:
            pytest.skip("the tests run on a DAX mount")
        assert stats["dax"] == {"mount_option": dax.mount_option(disk), "map_sync": False, "flush": "fdatasync"}
    with memodb.MemoDB.create(disk / "relaxed", shape=(), dtype="uint8", durability="relaxed") as db:
        db.put(np.zeros(3, np.uint8))
        assert db.stats()["dax"]["flush"].startswith("none")


@pytest.fixture
def played(monkeypatch):
    """Play DAX with MAP_SYNC: the file is mapped without; return how often it was asked for."""
    asked = []
    map_shared = vm.map_shared

    def mapped(*where, writable=False, synchronous=False):
        asked.append(synchronous)
        map_shared(*where, writable=writable)

    monkeypatch.setattr("memodb.vm.is_dax", lambda fd: True)
    monkeypatch.setattr("memodb.vm.can_map_synchronously", lambda fd: True)
    monkeypatch.setattr("memodb.vm.map_shared", mapped)
    return asked


@pytest.mark.parametrize("segment_bytes", [1 << 30, 1 << 20, 5000])
def test_the_synchronous_writer_writes_the_same_bytes(disk, played, segment_bytes):
    values = None
    with memodb.MemoDB.create(disk / "store", shape=(7, 331), dtype="uint16", segment_bytes=segment_bytes) as db:
        values = put_in_pieces(db, (7, 331))
        assert any(played)
        assert db.stats()["dax"]["map_sync"]
        db.delete(range(0, 41, 2))
        db.compact()
        assert_same_bytes(db.multiget(range(1, 41, 2)), values[1::2])
        assert db.verify() == []
    with memodb.MemoDB.open(disk / "store") as db:
        assert_same_bytes(db.multiget(range(1, 41, 2)), values[1::2])


def test_a_page_that_cannot_be_had_is_an_error(disk, played, monkeypatch):
    """A broken block of persistent memory, played: no signal, what was put before is whole, nothing is half there."""
    values = random_records(8, (512, 1024), "uint16")
    with memodb.MemoDB.create(disk / "store", shape=(512, 1024), dtype="uint16") as db:
        db.put(values[:4])

        def populate(address, nbytes):
            raise OSError(133, os.strerror(133))  # EHWPOISON

        with monkeypatch.context() as broken:
            broken.setattr("memodb.vm.populate_write", populate)
            with pytest.raises((OSError, memodb.MemoDBError)):
                db.put(values[4:])
    with memodb.MemoDB.open(disk / "store", mode="r+") as db:
        assert len(db) == 4
        assert_same_bytes(db.multiget(range(4)), values[:4])
        db.put(values[4:])
        assert_same_bytes(db.multiget(range(8)), values)


def test_the_run_in_the_virtual_machine_says_what_it_lacks(tmp_path):
    from pathlib import Path

    script = Path(__file__).parent / "dax" / "run.py"
    environment = {**os.environ, "PATH": str(tmp_path)}
    command = [sys.executable, str(script), "--build", str(tmp_path / "build")]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 2
    assert "apt-get install" in ran.stderr
    assert "qemu-system-x86" in ran.stderr
