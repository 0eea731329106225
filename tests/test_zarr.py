"""The zarr backend on this machine: conformance, and what it alone promises. (On another one: test_zarr_s3.py.)"""

import os
import secrets
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, settings
from hypothesis.stateful import precondition, rule

import memodb
from memodb.testing import BackendTests, StoreMachine

SETTINGS = settings(
    max_examples=int(os.environ.get("MEMODB_EXAMPLES", "15")),
    stateful_step_count=30,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
IN_MEMORY = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None


def flip(path, at, mask=0x10):
    """Change one byte of a file."""
    raw = bytearray(path.read_bytes())
    raw[at] ^= mask
    path.write_bytes(raw)


def in_array(place, number):
    """Return a row as zarr alone reads it."""
    return zarr.open_array(place, mode="r")[number].tobytes()


class TestZarr(BackendTests):
    backend = "zarr"

    @pytest.fixture
    def folder(self, shm):
        return shm

    def raw(self, path, number):
        return in_array(path / "values", number)

    def damage(self, path, record, at):
        found = [key for key in (path / "values").glob("c.*") if in_array_equals(path, key, record)]
        flip(found[0], found[0].stat().st_size // 2)
        return True


def in_array_equals(path, key, record):
    return in_array(path / "values", int(key.name.split(".")[1])) == record.tobytes()


class TestZarrOnDisk(TestZarr):
    @pytest.fixture
    def folder(self, disk):
        return disk


class TestZarrPlain(BackendTests):
    """Chunks are plain bytes in files, which the suite itself can damage."""

    backend = "zarr"
    options = {"codec": "none"}  # noqa: RUF012

    @pytest.fixture
    def folder(self, shm):
        return shm

    def raw(self, path, number):
        return in_array(path / "values", number)


class TestZarrShards(BackendTests):
    backend = "zarr"
    options = {"codec": "zstd", "level": 3, "chunk_records": 2, "shard_records": 4}  # noqa: RUF012

    @pytest.fixture
    def folder(self, shm):
        return shm

    def raw(self, path, number):
        # put() of two and of three: the second begins a shard
        return in_array(path / "values", number if number < 2 else number + 2)


class TestZarrPlainShards(TestZarrShards):
    options = {"codec": "none", "chunk_records": 2, "shard_records": 4}  # noqa: RUF012


class TestZarrChunks(BackendTests):
    backend = "zarr"
    options = {"codec": "blosc", "chunk_records": 3}  # noqa: RUF012

    @pytest.fixture
    def folder(self, shm):
        return shm

    def raw(self, path, number):
        return in_array(path / "values", number if number < 2 else number + 1)


class TestZarrInThisProcess(BackendTests):
    backend = "zarr"

    @pytest.fixture
    def folder(self, disk):
        self.options = {"url": f"memory://{secrets.token_hex(4)}"}
        return disk

    def test_copy_keeps_everything(self, folder):
        self.create = lambda path, **settings: memodb.MemoDB.create(
            path, backend="zarr", **{"url": f"memory://{secrets.token_hex(4)}", **settings}
        )
        super().test_copy_keeps_everything(folder)


class Zarr(StoreMachine):
    backend = "zarr"
    parent = IN_MEMORY


class ZarrOnDisk(Zarr):
    parent = None
    options = {"codec": "none"}  # noqa: RUF012


class ZarrShards(Zarr):
    options = {"chunk_records": 2, "shard_records": 4}  # noqa: RUF012
    shape = (3, 5)


class ZarrChunks(Zarr):
    options = {"codec": "blosc", "chunk_records": 3}  # noqa: RUF012


class ZarrInThisProcess(Zarr):
    """No other process can read it, and each store needs a name of its own."""

    def __init__(self):
        super().__init__()
        self.shared = False
        self.options = {"url": f"memory://{secrets.token_hex(8)}"}

    @precondition(lambda self: self.copies < 2)
    @rule()
    def copy(self):
        self.options = {"url": f"memory://{secrets.token_hex(8)}"}
        super().copy()


TestZarrMachine = Zarr.TestCase
TestZarrMachineOnDisk = ZarrOnDisk.TestCase
TestZarrMachineShards = ZarrShards.TestCase
TestZarrMachineChunks = ZarrChunks.TestCase
TestZarrMachineInThisProcess = ZarrInThisProcess.TestCase
TestZarrMachine.settings = SETTINGS
TestZarrMachineOnDisk.settings = SETTINGS
TestZarrMachineShards.settings = SETTINGS
TestZarrMachineChunks.settings = SETTINGS
TestZarrMachineInThisProcess.settings = SETTINGS
