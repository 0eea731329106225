"""verify(): sound stores have no problems, damaged ones name them; damage is an error, never a signal."""

import os

import numpy as np
import pytest

import memodb
from memodb.testing import assert_same_bytes, flip_stored_byte, random_records

SHAPE = (3, 1000)  # 12,000 bytes: records share pages
VALUES = random_records(50, SHAPE, "float32")


@pytest.fixture
def damaged(folder):
    """Return a function that puts the records, lets harm be done to the closed store, and opens it again."""
    opened = []

    def create(harm):
        with memodb.MemoDB.create(folder / "store", shape=SHAPE, dtype="float32", key_dim=2) as db:
            db.put(VALUES[:20], np.zeros((20, 2), np.float32))
            db.put(VALUES[20:], np.zeros((30, 2), np.float32))
        harm(folder / "store")
        opened.append(memodb.MemoDB.open(folder / "store"))
        return opened[-1]

    yield create
    for db in opened:
        db.close()


def test_a_sound_store_has_no_problems(damaged):
    calls = []
    db = damaged(lambda path: None)
    assert db.verify(progress=lambda done, total: calls.append((done, total))) == []
    assert calls[-1][0] == calls[-1][1] > 0


@pytest.mark.parametrize("at", [0, 1, 4095, 4096, 11_999])
def test_one_flipped_bit_is_found_and_named(damaged, at):
    def harm(path):
        assert flip_stored_byte(path, VALUES[33], at)

    problems = damaged(harm).verify()
    assert [problem.id for problem in problems] == [33]
    assert "33" in problems[0].message
    assert problems[0].kind
    assert isinstance(problems[0], memodb.Problem)


def test_every_damaged_record_is_named(damaged):
    def harm(path):
        for i in (0, 19, 20, 49):
            assert flip_stored_byte(path, VALUES[i], 100 * i)

    db = damaged(harm)
    assert sorted(problem.id for problem in db.verify()) == [0, 19, 20, 49]
    assert_same_bytes(db.multiget([1, 18, 48]), VALUES[[1, 18, 48]])


def test_two_records_swapped(damaged):
    """Both checksums are right, each for the other record."""

    def harm(path):
        first, second = VALUES[3].tobytes(), VALUES[40].tobytes()
        for file in path.rglob("*"):
            if file.is_file() and first in file.read_bytes():
                data = file.read_bytes()
                a, b = data.find(first), data.find(second)
                with file.open("r+b") as handle:
                    os.pwrite(handle.fileno(), second, a)
                    os.pwrite(handle.fileno(), first, b)
                return
        pytest.fail("the records were not found")

    assert sorted(problem.id for problem in damaged(harm).verify()) == [3, 40]


def segment_of(path, record):
    (found,) = [file for file in path.rglob("*") if file.is_file() and record.tobytes() in file.read_bytes()]
    return found


@pytest.mark.parametrize("size", [0, 1, 4096, 100_000])
def test_a_truncated_segment_is_an_error_and_no_signal(damaged, size):
    """Reading mapped pages beyond a file's end would kill the process."""
    db = damaged(lambda path: os.truncate(segment_of(path, VALUES[49]), size))
    assert 49 in [problem.id for problem in db.verify()]
    for read in (
        lambda: db.multiget([49]),
        lambda: db.multiget_mapped([49], strategy="copy").numpy(),
        lambda: db.multiget_mapped([48, 49]).numpy(),
    ):
        with pytest.raises(memodb.CorruptionError):
            read()


def test_a_segment_truncated_under_an_open_reader(damaged):
    """Truncated after the first gather: the next gather is an error and no signal."""
    db = damaged(lambda path: None)
    assert_same_bytes(db.multiget([49]), VALUES[[49]])
    os.truncate(segment_of(db.path, VALUES[49]), 4096)
    with pytest.raises(memodb.CorruptionError):
        db.multiget([49])
    with pytest.raises(memodb.CorruptionError):
        db.multiget_mapped([49])


def test_a_missing_segment_is_an_error(damaged):
    db = damaged(lambda path: segment_of(path, VALUES[49]).unlink())
    assert 49 in [problem.id for problem in db.verify()]
    with pytest.raises(memodb.CorruptionError):
        db.multiget([49])


@pytest.mark.parametrize("harm", ["empty", "garbage", "half"])
def test_a_damaged_catalog_is_refused_by_name(folder, harm):
    """In a process of its own: LMDB maps the file, and a mapping of nonsense may crash it."""
    import subprocess
    import sys

    with memodb.MemoDB.create(folder / "store", shape=SHAPE, dtype="float32") as db:
        db.put(VALUES)
    (catalog,) = folder.rglob("data.mdb")
    data = catalog.read_bytes()
    catalog.write_bytes({"empty": b"", "garbage": b"\x5a" * len(data), "half": data[: 4 * 4096]}[harm])
    program = """
import sys, memodb
try:
    with memodb.MemoDB.open(sys.argv[1]) as db:
        db.ids(); db.multiget([49])
except memodb.MemoDBError as error:
    print(type(error).__name__)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, folder / "store"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, f"status {done.returncode}: {done.stderr}"
    assert done.stdout.strip() in ("CorruptionError", "FormatVersionError", "StoreNotFoundError")


def test_an_interrupted_lookup_is_read_again(make, path, monkeypatch):
    """Ctrl-C while a block of the catalog is read: what it holds is not taken for never put."""
    from memodb.catalog import rows

    with make(shape=(2,), dtype="int32") as db:
        ids = db.put(np.arange(12_000, dtype=np.int32).reshape(-1, 2))
    with memodb.MemoDB.open(path) as db:
        db.multiget(ids[:4000])
        whole = rows.unpack

        def interrupted(raw, block, where):
            raise KeyboardInterrupt

        monkeypatch.setattr(rows, "unpack", interrupted)
        with pytest.raises(KeyboardInterrupt):
            db.multiget(ids[5000:])
        monkeypatch.setattr(rows, "unpack", whole)
        assert db.multiget(ids)[:, 0].tolist() == list(range(0, 12_000, 2))
