"""64 random records of 12x512x512 float16 become one tensor, and every byte of it is read once.

Run: ``make bench BENCH_ARGS="-k gather"``. Smaller, to see that it works: ``MEMODB_BENCH_RECORDS=8 make bench``.
"""

import os
import warnings

import numpy as np
import pytest

import memodb

SHAPE = (12, 512, 512)
#: Records of one gather; the store holds four times as many.
RECORDS = int(os.environ.get("MEMODB_BENCH_RECORDS", "64"))
STORED = 4 * RECORDS
NBYTES = 2 * 12 * 512 * 512
ROUNDS = 15


def read(values):
    """Read every byte once, at the speed of memory."""
    return values.reshape(-1).view(np.uint64).max()


@pytest.fixture(scope="module")
def db(shm):
    with memodb.MemoDB.create(shm / "store", shape=SHAPE, dtype="float16") as made:
        block = np.empty((8, *SHAPE), np.float16)
        for start in range(0, STORED, 8):
            block[:] = np.arange(start, start + 8, dtype=np.float16)[:, None, None, None]
            made.put(block[: STORED - start])
        yield made


@pytest.fixture(scope="module")
def memmap(db, shm):
    """The same records in one plain file, as numpy users keep them."""
    values = np.lib.format.open_memmap(shm / "plain.npy", mode="w+", dtype=np.float16, shape=(STORED, *SHAPE))
    db.multiget(range(STORED), out=values)
    yield np.load(shm / "plain.npy", mmap_mode="r")
    (shm / "plain.npy").unlink()


@pytest.fixture(scope="module")
def warm():
    """A contiguous batch whose pages are all there."""
    return np.ones((RECORDS, *SHAPE), np.float16)


@pytest.fixture
def draw():
    """Return a function that draws the ids of the next gather: every contender draws the same ones."""
    rng = np.random.default_rng(0)
    return lambda: rng.choice(STORED, RECORDS, replace=False)


@pytest.fixture
def measure(benchmark, draw, warm):
    """Return a function that measures one way to gather, with and without reading the result."""

    def run(contender, gather, *, reading):
        def work(ids):
            found = gather(ids)
            if reading:
                read(found.numpy() if isinstance(found, memodb.MappedBatch) else found)
            return found

        benchmark.group = f"gather {RECORDS} x {NBYTES / 1e6:.2f} MB" + (" + read" if reading else "")
        benchmark.extra_info.update(contender=contender, bytes=RECORDS * NBYTES)
        benchmark.pedantic(work, setup=lambda: ((draw(),), {}), rounds=ROUNDS, warmup_rounds=2)

    return run


READING = pytest.mark.parametrize("reading", [False, True], ids=["gather", "gather+read"])


def test_floor(measure, warm):
    """One read of what is contiguous already: no gather can be quicker than nothing."""
    measure("floor", lambda ids: warm, reading=True)


@READING
def test_memodb_mapped(measure, db, reading):
    measure("memodb mapped", lambda ids: db.multiget_mapped(ids, strategy="map"), reading=reading)


@READING
def test_memodb_copied(measure, db, reading):
    measure("memodb copied", lambda ids: db.multiget_mapped(ids, strategy="copy"), reading=reading)


@READING
def test_numpy_memmap(measure, memmap, reading):
    measure("np.memmap[ids]", lambda ids: memmap[ids], reading=reading)


@READING
def test_numpy_take_warm(measure, memmap, warm, reading):
    # mode="raise" would gather into a buffer of its own first.
    measure("np.take(out=warm)", lambda ids: np.take(memmap, ids, 0, out=warm, mode="clip"), reading=reading)


@READING
def test_torch_index_select_warm(measure, memmap, warm, reading):
    torch = pytest.importorskip("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns, once, that the file is read-only; nothing writes to it
        source = torch.from_numpy(memmap)
    target = torch.from_numpy(warm)

    def gather(ids):
        torch.index_select(source, 0, torch.from_numpy(ids), out=target)
        return warm

    measure("torch.index_select(out=warm)", gather, reading=reading)


@pytest.mark.parametrize("per_put", [1, 8])
def test_put(benchmark, shm, per_put):
    """Throughput of put, from an array in memory; deleted and compacted between rounds, which is not timed."""
    values = np.ones((per_put, *SHAPE), np.float16)
    with memodb.MemoDB.create(shm / f"put{per_put}", shape=SHAPE, dtype="float16", segment_bytes=64 << 20) as db:

        def clear():
            if len(db) * NBYTES > 256 << 20:
                db.delete(db.ids())
                db.compact()

        benchmark.group = "put"
        benchmark.pedantic(lambda: db.put(values), setup=clear, rounds=ROUNDS, warmup_rounds=2)
        seconds = benchmark.stats.stats.median
        benchmark.extra_info.update(contender=f"put of {per_put}", gb_per_second=per_put * NBYTES / seconds / 1e9)
