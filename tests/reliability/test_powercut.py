"""The parts of ``make powercut`` that need no virtual machine: it must find what it looks for."""

import os
import shutil
import struct

import numpy as np
import pytest
from powercut import writelog
from powercut.outcome import Outcome
from powercut.script import Lost, Store, advanced, reopened

import memodb
from memodb.testing import flip_stored_byte

SECTOR = 512


def log_of(path, *written):
    """Write a log as dm-log-writes does: (flags, sector, data) or a mark's text each."""
    with path.open("wb") as file:
        file.write(struct.pack("<QQQI", writelog.MAGIC, 1, len(written), SECTOR).ljust(SECTOR, b"\0"))
        for entry in written:
            if isinstance(entry, str):
                file.write((struct.pack("<QQQQ", 0, 0, 8, len(entry)) + entry.encode()).ljust(SECTOR, b"\0"))
            else:
                flags, sector, data = entry
                file.write(struct.pack("<QQQQ", sector, len(data) // SECTOR, flags, 0).ljust(SECTOR, b"\0"))
                file.write(b"" if flags & writelog.DISCARD else data)
    return os.open(path, os.O_RDONLY)


def sectors(byte, n=1):
    return bytes([byte]) * (SECTOR * n)


def test_log_is_read_to_each_moment_at_which_something_became_durable(tmp_path):
    log = log_of(
        tmp_path / "log",
        (0, 0, sectors(1, 2)),
        (writelog.FLUSH, 0, b""),  # before the beginning: the file system is being made
        "begin",
        (0, 1, sectors(2)),
        (writelog.DISCARD, 3, sectors(9)),
        (writelog.FLUSH, 0, b""),
        "a=1",
        "b=1",
        (writelog.FUA, 2, sectors(3)),
        (writelog.FLUSH, 0, b""),  # nothing was written since: no moment of its own
        (0, 0, sectors(4)),  # never flushed
    )
    try:
        found = writelog.entries(log)
        moments = list(writelog.points(found, "begin"))
        assert [(p.last, p.marks, p.unflushed) for p in moments] == [
            (2, ("begin",), (3, 4)),
            (7, ("begin", "a=1", "b=1"), ()),
            (8, ("begin", "a=1", "b=1"), ()),
        ]
        device = os.open(tmp_path / "device", os.O_RDWR | os.O_CREAT)
        try:
            os.pwrite(device, sectors(7, 4), 0)
            for entry in found[: moments[1].last + 1]:
                writelog.apply(log, entry, device)
            assert os.pread(device, 4 * SECTOR, 0) == sectors(1) + sectors(2) + sectors(7) + sectors(0)
            writelog.apply(log, found[0], device, np.array([False, True]))
            assert os.pread(device, 2 * SECTOR, 0) == sectors(1, 2)
        finally:
            os.close(device)
    finally:
        os.close(log)


def test_what_is_no_log_is_refused(tmp_path):
    (tmp_path / "log").write_bytes(bytes(4096))
    log = os.open(tmp_path / "log", os.O_RDONLY)
    try:
        with pytest.raises(ValueError, match="no log"):
            writelog.entries(log)
    finally:
        os.close(log)


@pytest.fixture(params=["arena", "files", "lmdb"])
def written(request, disk):
    """A store that took 30 steps, and a function that returns it as the host knows it after a cut."""

    def known(steps):
        return advanced(Store("store", disk, {"backend": request.param}, 1), steps)

    store = known(0)
    db = reopened(store)
    kinds = set()
    while store.steps < 30 or store.next().kind != "put":
        step = store.next()
        kinds.add(step.kind)
        store.do(db, step)
        store.take(step)
    assert kinds == {"put", "delete", "compact"}
    db.close()
    return store, known


def test_step_under_way_may_be_there_or_not(written):
    store, known = written
    with reopened(known(store.steps)) as db:
        store.do(db, store.next())
    after = known(store.steps)
    reopened(after).close()
    assert after.steps == store.steps + 1


def test_lost_batch_is_found(written):
    store, known = written
    backup = store.path.with_name("before")
    shutil.copytree(store.path, backup)
    with memodb.MemoDB.open(store.path, "r+") as db:
        for _ in range(2):
            step = store.next()
            store.do(db, step)
            store.take(step)
    shutil.rmtree(store.path)
    backup.rename(store.path)
    with pytest.raises(Lost, match="acknowledged"):
        reopened(known(store.steps))


def test_wrong_byte_is_found(written):
    store, known = written
    id, (step, row, _) = next(iter(store.live.items()))
    assert flip_stored_byte(store.path, store.values(step, row + 1)[row], 100), id
    with pytest.raises((Lost, AssertionError, memodb.CorruptionError)):
        reopened(known(store.steps))


def test_a_loss_fails_the_run_and_is_what_a_proof_must_have():
    outcome = Outcome("cuts", stores={"arena-disk": "", "lmdb-disk": "", "arena-dax": ""})
    assert outcome.is_good(prove=False)
    assert not outcome.is_good(prove=True)
    outcome.lose("arena-disk", "a batch")
    assert not outcome.is_good(prove=False)
    assert not outcome.is_good(prove=True), "one store was not found to lose"
    outcome.lose("lmdb-disk", "a batch")
    assert outcome.is_good(prove=True)
    assert [row[2] for row in outcome.rows(prove=False)].count("FAILED") == 2
    outcome.failures.append("the guest ended")
    assert not outcome.is_good(prove=True)
    assert not Outcome("nothing was seen").is_good(prove=False)
