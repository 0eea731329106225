"""The suites of `memodb.testing`, run for every backend of ours."""

import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

import memodb
from memodb.testing import BackendTests, StoreMachine, flip_stored_byte

#: Examples of each state machine; more of them: MEMODB_EXAMPLES=300.
EXAMPLES = int(os.environ.get("MEMODB_EXAMPLES", "15"))
#: No example database: the tests run from a tree that they may not write to as well.
SETTINGS = settings(
    max_examples=EXAMPLES,
    stateful_step_count=30,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)


def in_segment(segments, number, nbytes):
    """Return a record's bytes as they lie in the first segment file."""
    return (segments / "00000001.seg").read_bytes()[number * nbytes : (number + 1) * nbytes]


class TestArenaInMemory(BackendTests):
    backend = "arena"

    def raw(self, path, number):
        return in_segment(path / "values", number, 16384)

    @pytest.fixture
    def folder(self, shm):
        return shm


class TestArenaOnDisk(TestArenaInMemory):
    @pytest.fixture
    def folder(self, disk):
        return disk


class TestArenaElsewhere(BackendTests):
    """Catalog in memory, segments on a disk."""

    backend = "arena"

    @pytest.fixture
    def folder(self, shm, disk):
        self.segments = disk
        return shm

    def create(self, path, **settings):
        return memodb.MemoDB.create(path, segments_path=str(self.segments), **settings)

    def raw(self, path, number):
        return in_segment(next(self.segments.glob("memodb-*")), number, 16384)

    def damage(self, path, record, at):
        return flip_stored_byte(self.segments, record, at)


class ArenaInMemory(StoreMachine):
    options = {"segment_bytes": 1 << 20}  # noqa: RUF012  (declared a class variable where it is defined)
    parent = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None


class ArenaOnDisk(StoreMachine):
    parent = None
    shape = (3, 5)


class TestFilesInMemory(BackendTests):
    backend = "files"

    @pytest.fixture
    def folder(self, shm):
        return shm

    def raw(self, path, number):
        return subprocess.run(["cat", path / f"values/000000/000/{number:03x}"], capture_output=True, check=True).stdout


class TestFilesOnDisk(TestFilesInMemory):
    @pytest.fixture
    def folder(self, disk):
        return disk


class FilesInMemory(StoreMachine):
    backend = "files"
    parent = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None


class FilesOnDisk(StoreMachine):
    backend = "files"
    shape = (3, 5)


TestFilesMachineInMemory = FilesInMemory.TestCase
TestFilesMachineInMemory.settings = SETTINGS
TestFilesMachineOnDisk = FilesOnDisk.TestCase
TestFilesMachineOnDisk.settings = SETTINGS


class TestMemory(BackendTests):
    backend = "memory"

    @pytest.fixture
    def folder(self, disk):
        return disk


class Memory(StoreMachine):
    backend = "memory"


TestMemoryMachine = Memory.TestCase
TestMemoryMachine.settings = SETTINGS
TestArenaMachineInMemory = ArenaInMemory.TestCase
TestArenaMachineInMemory.settings = SETTINGS
TestArenaMachineOnDisk = ArenaOnDisk.TestCase
TestArenaMachineOnDisk.settings = SETTINGS
