"""One case: the contenders gather the same records in turn. By hand, as any user, without pytest:

python -m benchmarks.race --shape 12,512,512 --dtype float16 --records 64 [--cold] [--slow] [--rounds 31]
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

import memodb
from benchmarks.builders import build
from benchmarks.clock import Samples, arrays_of, take_turns, timed_gather
from benchmarks.contenders import CONTENDERS, Contender
from benchmarks.profiles import BY_NAME, Case
from benchmarks.records import Records, evict, how_many
from memodb.gather.gather import forget_pages

#: Nothing here takes more memory, /dev/shm included.
MOST_MEMORY = 12 << 30


def scratch_parent(where: str) -> str | None:
    """Return where scratch folders are made: files are memory there, or on a disk ($MEMODB_BENCH_DISK)."""
    if where == "cold":
        return os.environ.get("MEMODB_BENCH_DISK")
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


@contextmanager
def scratch(where: str = "warm") -> Iterator[Path]:
    """Make a private folder; it is removed afterwards."""
    folder = Path(tempfile.mkdtemp(prefix=f"memodb-bench-{os.getpid()}-", dir=scratch_parent(where)))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


class NoRoomError(OSError):
    """The files of a case do not fit where they should go."""


class Field:
    """The contenders of a case, their files made.

    Parameters
    ----------
    folder
        Where the files go.
    case
        The records; cases that differ in the size of the batch may share a field.
    slow
        Whether slow contenders take part.
    stored
        How many records.
    """

    def __init__(self, folder: Path, case: Case, *, slow: bool, stored: int) -> None:
        kinds = [c for c in CONTENDERS if (slow or not c.slow) and (case.where == "cold" or not c.cold_only)]
        self.absent = {c.name: why for c in kinds if (why := c.obstacle(case.nbytes))}
        kinds = [c for c in kinds if c.name not in self.absent]
        needed = stored * case.nbytes * len({c.store for c in kinds})
        if needed > shutil.disk_usage(folder).free:
            raise NoRoomError(f"{needed / 2**30:.1f} GiB of files do not fit in {folder.parent}")
        self.records = Records(folder / "plain", case.shape, case.dtype, stored)
        self.contenders = {c.name: c(self.records) for c in kinds}
        for contender in self.contenders.values():
            build(contender)


class Race:
    """What came of one case: samples by contender, why others are absent, what was cached before cold turns."""

    def __init__(self, case: Case, field: Field, *, rounds: int, seconds: float, least: int) -> None:
        self.case = case
        self.absent = field.absent
        self.cached = dict.fromkeys(field.contenders, 0.0)
        warm = np.ones((case.n, *case.shape), case.dtype)
        rng = np.random.default_rng(1)
        stored = field.records.stored
        with ExitStack() as stack:
            before = self._cold(stack, field, warm) if case.where == "cold" else None
            for contender in field.contenders.values():
                contender.open(warm)
                if before is None:
                    stack.callback(contender.close)
                _check(contender, rng.choice(stored, case.n, replace=False))
                if before is not None:
                    contender.close()
            ways = {name: timed_gather(contender.gather) for name, contender in field.contenders.items()}
            self.samples: dict[str, Samples] = take_turns(
                ways,
                lambda: rng.choice(stored, case.n, replace=False),  # the same ids for all: nobody gets easier ones
                rounds=rounds,
                seconds=seconds,
                least=least,
                before=before,
            )

    def _cold(self, stack: ExitStack, field: Field, warm: np.ndarray):
        """Return what makes a contender's files cold before its turn."""
        # While any database is open memodb keeps its copy buffers, as it does in a program that gathers cold records.
        keeper = memodb.MemoDB.create(field.records.path.with_name(f"keeper-{self.case.n}"), shape=(1,), dtype="uint8")
        stack.callback(keeper.close)
        running: list[Contender] = []
        stack.callback(lambda: running and running.pop().close())

        def before(name: str) -> None:
            # Mapped pages stay in the cache whatever fadvise(2) says: nobody may hold any.
            if running:
                running.pop().close()
            forget_pages()
            contender = field.contenders[name]
            self.cached[name] = max(self.cached[name], evict(contender.files()))
            contender.open(warm)
            running.append(contender)

        return before


def _check(contender: Contender, ids: np.ndarray) -> None:
    """See that a contender delivers the right bytes: who is quick must be right, too."""
    if contender.name == "floor":
        return
    expected = contender.records.open()
    arrays = arrays_of(contender.gather(ids))
    for place in {0, len(ids) // 2, len(ids) - 1}:
        found = arrays[0][place] if contender.contiguous else arrays[place]
        if found.tobytes() != expected[ids[place]].tobytes():
            raise AssertionError(f"{contender.name} delivered other bytes for record {ids[place]}")


def table(race: Race) -> str:
    """Return the medians of a race as text."""
    floor = race.samples["floor"].median()
    lines = [f"{race.case.group} ({race.case.nbytes / 1e6:.2f} MB each), medians"]
    lines.append(f"{'':32}{'gather ms':>12}{'read ms':>12}{'release ms':>12}{'all ms':>12}{'x floor':>10}")
    for name, samples in sorted(race.samples.items(), key=lambda item: item[1].median()):
        parts = [samples.median(part) * 1e3 for part in ("gather", "read", "release", "total")]
        lines.append(f"{name:32}" + "".join(f"{p:12.3f}" for p in parts) + f"{samples.median() / floor:10.2f}")
    lines += [f"{name:32}  left out: {why}" for name, why in race.absent.items()]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Build, measure, print, clean up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="12,512,512", help="of one record (default: %(default)s)")
    parser.add_argument("--dtype", default="float16", help="of the records (default: %(default)s)")
    parser.add_argument("--records", type=int, default=64, help="records a gather (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=31, help="rounds (default: %(default)s)")
    parser.add_argument("--cold", action="store_true", help="from a disk, dropped from the page cache before each turn")
    parser.add_argument("--slow", action="store_true", help="with h5py, zarr, tensorstore, LMDB and safetensors")
    given = parser.parse_args(arguments)
    shape = tuple(map(int, given.shape.split(",")))
    case = Case(shape, given.dtype, given.records, "cold" if given.cold else "warm")
    stored = how_many(case, replace(BY_NAME["full"], slow_bytes=case.total if given.slow else 0))
    # A copy of the records for each file; the warm batch, a fresh one and a copy buffer of memodb.
    if stored * case.nbytes * (6 if given.slow else 2) + 3 * case.total > MOST_MEMORY:
        parser.error("this would take more than 12 GiB of memory")
    with scratch(case.where) as folder:
        field = Field(folder, case, slow=given.slow, stored=stored)
        print(table(Race(case, field, rounds=given.rounds, seconds=30.0, least=5)))


if __name__ == "__main__":
    main()
