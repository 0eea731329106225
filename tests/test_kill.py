"""A writer killed with SIGKILL at random moments: what was acknowledged is there, nothing is there by half.

``MEMODB_KILLS=50`` sets how many times each case kills (default 5).
"""

import os
import select
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import memodb
from memodb.testing import random_records

KILLS = int(os.environ.get("MEMODB_KILLS", "5"))

WRITER = """
import sys
import memodb
sys.path.insert(0, sys.argv[3])
from test_kill import play

with memodb.MemoDB.open(sys.argv[1], mode="r+") as db:
    for number in range(int(sys.argv[2]), 10**9):
        play(db, number)
        print(number, flush=True)
"""


def batch_of(number):
    """Return the records and keys that operation `number` puts: every int32 tells where it belongs."""
    n = 1 + number * 7 % 13
    stamps = number * 100 + np.arange(n, dtype=np.int32)
    values = np.repeat(stamps, 2048).reshape(n, 2, 1024) ^ np.arange(2048, dtype=np.int32).reshape(2, 1024)
    return values, np.stack([stamps, np.zeros(n)], axis=1).astype(np.float32)


def kind_of(number):
    """Every fifth operation deletes a batch of three operations ago, every seventeenth compacts."""
    return "compact" if number % 17 == 16 else "delete" if number % 5 == 4 and number > 8 else "put"


def play(db, number):
    """Do operation `number` on a store."""
    match kind_of(number):
        case "compact":
            db.compact()
        case "delete":
            db.delete(state_after(number - 1)[1].get(number - 3, []))
        case "put":
            values, keys = batch_of(number)
            db.put(values, keys, namespace=f"n{number % 3}")


def state_after(number):
    """Return (next id, {operation: ids of its batch}) after operations 0 to `number`."""
    batches, next_id = {}, 0
    for i in range(number + 1):
        match kind_of(i):
            case "delete":
                batches.pop(i - 3, None)
            case "put":
                n = len(batch_of_sizes(i))
                batches[i] = list(range(next_id, next_id + n))
                next_id += n
    return next_id, batches


def batch_of_sizes(number):
    return range(1 + number * 7 % 13)


def matches(db, number):
    """Tell whether the store knows exactly the ids of the state after operation `number`."""
    _, batches = state_after(number)
    return db.ids().tolist() == sorted(i for ids in batches.values() for i in ids)


def check(db, acknowledged):
    """Find which operations took effect: all acknowledged ones, and the one after them wholly or not at all."""
    reached = next((n for n in (acknowledged + 1, acknowledged) if matches(db, n)), None)
    assert reached is not None, (
        f"after operation {acknowledged} was acknowledged the store holds {db.ids().tolist()[-50:]}"
    )
    _, batches = state_after(reached)
    for number, ids in batches.items():
        values, _ = batch_of(number)
        assert np.array_equal(db.multiget(ids), values), f"the batch of operation {number} is damaged"
    for number in list(batches)[-20:]:
        _, keys = batch_of(number)
        assert db.search(keys, namespace=f"n{number % 3}").ids[:, 0].tolist() == batches[number]
    assert db.verify() == []
    return reached


def acknowledged_until_killed(process, deadline, last):
    """Read acknowledgements until the deadline, kill, and read what the pipe still holds."""
    data = b""
    while (left := deadline - time.monotonic()) > 0:
        if select.select([process.stdout], [], [], left)[0]:
            read = os.read(process.stdout.fileno(), 1 << 16)
            assert read, f"the writer failed with status {process.wait()}"
            data += read
    process.send_signal(signal.SIGKILL)
    data += process.stdout.read()
    process.wait()
    lines = data.split(b"\n")[:-1]  # what follows the last newline was not wholly written
    return int(lines[-1]) if lines else last


KINDS = {
    "small segments": {"segment_bytes": 1 << 20},
    "one segment": {"segment_bytes": 1 << 30},
    "files": {"backend": "files"},
    "lmdb": {"backend": "lmdb", "map_bytes": 1 << 20},
    "zarr": {"backend": "zarr", "shard_records": 4},
}


AT_A_WRITE = """
import os, sys
import memodb
from memodb.testing import random_records

with memodb.MemoDB.open(sys.argv[1], mode="r+") as db:
    number = int(sys.argv[2])
    os.write(2, b"")  # a mark for the trace: what follows is the put
    db.put(random_records(3, (2, 1024), "float32", number), namespace=str(number))
"""


@pytest.mark.parametrize("backend", ["arena", "files", "lmdb", "zarr"])
@pytest.mark.parametrize("call", ["pwrite64", "fdatasync"])
def test_killed_right_after_a_write_while_somebody_reads(disk, peer, backend, call):
    """Killed after its N-th write or flush, for each N: what it committed is there as a whole, or not at all.

    Another process has the store open all the time, so LMDB's lock file, which tells what was committed last, is not
    made anew: a commit that reached the disk a moment before the kill must not be overwritten by the next put.
    """
    if shutil.which("strace") is None:
        pytest.skip("strace, which kills at a given call, is not installed")
    path = disk / "store"
    with memodb.MemoDB.create(path, shape=(2, 1024), dtype="float32", backend=backend) as db:
        db.put(random_records(3, (2, 1024), "float32", 999))
    reader = peer()
    reader.ask("open", path=str(path))
    model, killed = dict.fromkeys(range(3), ("", 999)), 0
    for nth in range(1, 60):
        trace = ["strace", "-f", "-qq", "-e", f"trace={call}", "-o", "/dev/null"]
        # SIGKILL would come before the call is made; this comes after it, and Python has no handler for it.
        inject = ["-e", f"inject={call}:signal=SIGTERM:when={nth}"]
        done = subprocess.run([*trace, *inject, sys.executable, "-c", AT_A_WRITE, path, str(nth)], capture_output=True)
        killed += done.returncode in (-signal.SIGTERM, 128 + signal.SIGTERM)
        with memodb.MemoDB.open(path, mode="r+") as db:
            found = db.ids(str(nth)).tolist()
            assert found == [] or found == list(range(max(model) + 1, max(model) + 4))
            assert found or done.returncode != 0, "it was acknowledged"
            model.update((i, (str(nth), nth)) for i in found)
            ids = db.put(random_records(3, (2, 1024), "float32", 100 + nth), namespace=f"next {nth}").tolist()
            assert ids == list(range(max(model) + 1, max(model) + 4)), "ids go on where the catalog is"
            model.update((i, (f"next {nth}", 100 + nth)) for i in ids)
            assert db.verify() == []
            for i in [*found[:1], ids[0]]:
                expected = random_records(3, (2, 1024), "float32", model[i][1])
                assert np.array_equal(db.multiget([i, i + 1, i + 2]).view(np.uint8), expected.view(np.uint8))
        assert reader.ask("ids") == sorted(model)
        if done.returncode == 0:
            break
    assert done.returncode == 0, done.stderr
    assert killed >= 1
    assert reader.ask("verify") == []


@pytest.mark.parametrize("kind", KINDS)
def test_killed_writer(folder, kind):
    rng = np.random.default_rng(len(kind))
    path = folder / "store"
    memodb.MemoDB.create(path, shape=(2, 1024), dtype="int32", key_dim=2, **KINDS[kind]).close()
    done = -1
    for _ in range(KILLS):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), str(done + 1), os.path.dirname(__file__)],
            stdout=subprocess.PIPE,
            bufsize=0,  # acknowledgements are read from the descriptor: none may wait in a buffer of ours
        ) as process:
            first = process.stdout.readline()  # the writer is at work
            assert first, f"the writer failed with status {process.wait()}"
            moment = time.monotonic() + rng.exponential(0.05)
            acknowledged = acknowledged_until_killed(process, moment, int(first))
        with memodb.MemoDB.open(path) as db:
            reached = check(db, acknowledged)
        with memodb.MemoDB.open(path, mode="r+") as db:  # which gives back what the killed writer left over
            assert matches(db, reached)
            assert db.verify() == []
        done = reached
    assert done >= KILLS
