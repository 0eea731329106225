"""Fixtures: private folders that leave nothing behind, stores, and peers (other processes behind a pipe)."""

from __future__ import annotations

import gc
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

pytest.register_assert_rewrite("memodb.testing")

import memodb  # noqa: E402  (after the rewrite of its testing package is asked for)

#: Packages of their own: test_third_party.py installs and runs them.
collect_ignore = ["third_party"]

SHM = Path("/dev/shm")
PEER = Path(__file__).with_name("peer.py")
#: No answer within this time is a hang, on any machine.
ANSWER_SECONDS = 120


def open_resources(folder: Path) -> list[str]:
    """Return the mappings and descriptors of this process that lie below `folder`."""
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]
    descriptors = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:  # the descriptor of the listing itself
            continue
        if str(folder) in target:
            descriptors.append(f"fd {fd} -> {target}")
    return maps + descriptors


def private_folder(parent: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """Make a folder nobody else uses; afterwards nothing of it may be mapped, open or left."""
    folder = Path(tempfile.mkdtemp(prefix=f"memodb-test-{os.getpid()}-", dir=parent))
    failed_before = request.session.testsfailed
    try:
        yield folder
        if leaked := open_resources(folder):
            gc.collect()
            leaked = open_resources(folder)
        # A failed test's traceback keeps its handles alive: that is no leak of ours.
        assert not leaked or request.session.testsfailed > failed_before, f"still open or mapped: {leaked}"
    finally:
        shutil.rmtree(folder)


def memory_folder() -> Path:
    """Return where files are memory, or else the temporary folder."""
    return SHM if os.access(SHM, os.W_OK) else Path(tempfile.gettempdir())


@pytest.fixture
def shm(request: pytest.FixtureRequest) -> Iterator[Path]:
    """Return a private folder on tmpfs (on disk where /dev/shm cannot be written)."""
    yield from private_folder(memory_folder(), request)


@pytest.fixture
def disk(request: pytest.FixtureRequest) -> Iterator[Path]:
    """Return a private folder where temporary files go, which is usually a disk."""
    yield from private_folder(Path(tempfile.gettempdir()), request)


@pytest.fixture(params=["shm", "disk"])
def folder(request: pytest.FixtureRequest) -> Path:
    """Return a private folder, once on tmpfs and once on disk."""
    found: Path = request.getfixturevalue(request.param)
    return found


#: Backends that other processes can read, with options that let much happen: small segments, quick puts.
SHARED: dict[str, dict[str, Any]] = {
    "arena": {"segment_bytes": 1 << 20, "durability": "relaxed"},
    "files": {"durability": "relaxed"},
    "lmdb": {"durability": "none", "map_bytes": 1 << 20},
    "zarr": {"durability": "relaxed"},
}


@pytest.fixture(params=SHARED)
def shared_backend(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Return the arguments of ``MemoDB.create`` that choose a backend."""
    return {"backend": request.param, **SHARED[request.param]}


@pytest.fixture
def path(shm: Path) -> Path:
    """Return where a test's store shall be."""
    return shm / "store"


@pytest.fixture
def make(path: Path) -> Iterator[Callable[..., memodb.MemoDB]]:
    """Return a function that makes the test's store (records of two pages by default); all are closed afterwards."""
    with ExitStack() as stack:

        def create(at: Path = path, **settings: Any) -> memodb.MemoDB:
            return stack.enter_context(memodb.MemoDB.create(at, **{"shape": (2, 1024), "dtype": "float32", **settings}))

        yield create


class Peer:
    """Another process that holds handles on stores and does what it is told (see peer.py)."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, str(PEER), *arguments]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdin
        assert self.process.stdout
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        self.buffer = b""

    @property
    def pid(self) -> int:
        return self.process.pid

    def tell(self, verb: str, **arguments: Any) -> None:
        """Send a command without waiting for its answer."""
        self.stdin.write(json.dumps({"verb": verb, **arguments}).encode() + b"\n")
        self.stdin.flush()

    def answer(self) -> Any:
        """Wait for the answer to the oldest command not yet answered."""
        while b"\n" not in self.buffer:
            ready, _, _ = select.select([self.stdout], [], [], ANSWER_SECONDS)
            assert ready, f"the peer did not answer within {ANSWER_SECONDS} s"
            read = os.read(self.stdout.fileno(), 1 << 16)
            assert read, f"the peer ended with status {self.process.wait()}"
            self.buffer += read
        line, _, self.buffer = self.buffer.partition(b"\n")
        return json.loads(line)

    def answered(self) -> bool:
        """Tell whether an answer is there already."""
        return b"\n" in self.buffer or bool(select.select([self.stdout], [], [], 0)[0])

    def ask(self, verb: str, **arguments: Any) -> Any:
        """Send a command and return its answer; an exception over there is ``{"error": name, "message": text}``."""
        self.tell(verb, **arguments)
        return self.answer()

    def kill(self) -> None:
        """End the process as a crash would."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def close(self) -> None:
        if self.process.poll() is None:
            self.stdin.close()
            try:
                self.process.wait(ANSWER_SECONDS)
            except subprocess.TimeoutExpired:
                self.kill()
                raise
        for pipe in (self.stdin, self.stdout):
            pipe.close()


@pytest.fixture
def peer() -> Iterator[Callable[..., Peer]]:
    """Return a function that starts peers; they end with the test."""
    with ExitStack() as stack:

        def start(*arguments: str) -> Peer:
            started = Peer(*arguments)
            stack.callback(started.close)
            return started

        yield start


@pytest.fixture(scope="session")
def fault_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the library that lets calls fail (tests/reliability/fault.c), compiled; skip where it cannot be."""
    from faults import shim

    return shim(tmp_path_factory.mktemp("shim"))


@pytest.fixture
def template(fault_library: Path) -> Iterator[Any]:
    """Return a process that forks a child for each fault; it ends with the test."""
    from faults import Template

    started = Template(fault_library)
    yield started
    started.close()


@pytest.fixture(scope="session", autouse=True)
def nothing_left_in_shared_memory() -> Iterator[None]:
    """Fail the run if a folder of ours is left in /dev/shm."""
    yield
    left = sorted(SHM.glob(f"memodb-*-{os.getpid()}-*"))
    assert not left, f"left in /dev/shm: {left}"
