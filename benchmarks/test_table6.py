"""The paper's Table 6, memory copy against mapping, and what its figures leave out.

Run: ``make bench BENCH_ARGS=benchmarks/test_table6.py``

The paper (AttMemo, section 6.5) times mapping and unmapping alone. A mapping that nobody read has no pages yet: each
page faults at its first touch, and the reader pays. So "mmap + munmap" is measured as the paper did, then with one
read, beside memodb's gather (whose pages are all entered on its clock) and beside copies. Records are 12xLxL float32.
"""

from __future__ import annotations

from pathlib import Path
from time import perf_counter as now

import numpy as np
import pytest

from benchmarks.builders import build
from benchmarks.clock import Samples, Turn, hand_over, read, take_turns, timed_gather
from benchmarks.contenders import Memodb, NumpyIndexed, NumpyTake
from benchmarks.profiles import Case, chosen
from benchmarks.records import Records, how_many
from memodb import vm

#: (L, n) -> the paper's figures: memory copy, mapping and unmapping. Its Table 6 heads the columns "(s)".
PAPER = {
    **{(256, 1): (52, 0.12), (256, 32): (104, 0.19), (256, 64): (106, 0.33)},
    **{(512, 1): (111, 0.25), (512, 32): (548, 0.19), (512, 64): (731, 0.33)},
}
MAPPED, READ = "mmap + munmap", "mmap + read + munmap"
NAMES = (MAPPED, READ, Memodb.name, NumpyTake.name, NumpyIndexed.name)


def _mapped(fd: int, nbytes: int, *, reading: bool):
    """Return a turn of the paper's kind: pages laid side by side, nothing entered."""

    def turn(ids) -> Turn:
        start = now()
        total = len(ids) * nbytes
        address = vm.reserve(total)
        for place, i in enumerate(ids.tolist()):
            vm.map_shared(address + place * nbytes, nbytes, fd, i * nbytes)
        mapped = now()
        if reading:
            read(vm.Span(address, total, writable=False).array())
        done = now()
        vm.unmap(address, total)
        return Turn(mapped - start, done - mapped, now() - done)

    return turn


@pytest.fixture(scope="module", params=[(length, n) for length in chosen().table6 for n in (1, 32, 64)], ids=str)
def race(request, shm, profile) -> tuple[tuple[int, int], dict[str, Samples]]:
    length, n = request.param
    case = Case((12, length, length), "float32", n)
    folder = shm / f"{length}-{n}"
    folder.mkdir()
    records = Records(folder / "plain", case.shape, case.dtype, how_many(case, profile))
    warm = np.ones((n, *case.shape), case.dtype)
    peers = [kind(records) for kind in (Memodb, NumpyTake, NumpyIndexed)]
    for peer in peers:
        build(peer)
        peer.open(warm)
    rng = np.random.default_rng(0)
    with records.path.open("rb") as file:
        ways = {
            MAPPED: _mapped(file.fileno(), case.nbytes, reading=False),
            READ: _mapped(file.fileno(), case.nbytes, reading=True),
            **{peer.name: timed_gather(peer.gather) for peer in peers},
        }
        samples = take_turns(
            ways,
            lambda: rng.choice(records.stored, n, replace=False),
            rounds=profile.rounds,
            seconds=profile.seconds,
            least=profile.least,
        )
    for peer in peers:
        peer.close()
    for path in [records.path, *peers[0].files()]:
        path.unlink()
    return request.param, samples


@pytest.mark.parametrize("name", NAMES)
def test_table6(benchmark, race, name):
    (length, n), samples = race
    benchmark.group = f"Table 6: {n} x 12x{length}x{length} float32"
    copied, mapped = PAPER.get((length, n), (None, None))
    facts = {"length": length, "n": n, "paper_copy": copied, "paper_mapping": mapped}
    hand_over(benchmark, samples[name], contender=name, **facts)


def test_the_mapping_call_alone_reads_nothing(shm):
    """What the figure leaves out, shown: a fresh mapping has no page in memory of this process."""
    path = shm / "untouched"
    path.write_bytes(b"\1" * (4 << 20))
    with path.open("rb") as file:
        address = vm.reserve(4 << 20)
        vm.map_shared(address, 4 << 20, file.fileno(), 0)
        before = _resident(address)
        read(vm.Span(address, 4 << 20, writable=False).array())
        after = _resident(address)
        vm.unmap(address, 4 << 20)
    path.unlink()
    assert before == 0
    assert after == 4 << 10


def _resident(address: int) -> int:
    """Return the KiB of the mapping at an address that are entered, from /proc/self/smaps."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0] and not line.split()[0].endswith(":"):
            inside = int(line.partition("-")[0], 16) == address
        elif inside and line.startswith("Rss:"):
            return int(line.split()[1])
    raise AssertionError("the mapping is gone")
