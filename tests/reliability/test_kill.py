"""A writer that is killed: what was acknowledged is there, nothing is there by half, nothing is left over.

At random moments; and right after each single write, flush, allocation, rename and so on of each operation, by the shim
of fault.c, which sees them all.
"""

import os
import random
import select
import signal
import subprocess
import sys
import time

import effort
import numpy as np
import pytest
from faults import KINDS as STORES
from faults import campaign

import memodb

#: Times that each of ten stores is killed at random (and some thirty times at named steps, in the quick run too).
KILLS = effort.count(1, 20)
#: Share of the long run of kills at named steps.
SHARE = 0.1
#: What is done, and after which calls of it the process is killed.
OPERATIONS = ("create", "put", "delete", "compact", "reindex", "close", "copy")
STEPS = (
    "write", "fdatasync", "fsync", "syncfs", "collapse", "truncate", "fallocate", "rename", "unlink", "mkdir", "mmap",
)  # fmt: skip

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


#: Of the quick run.
QUICK = [
    ("shm", "arena", "put", "write"),
    ("shm", "arena", "compact", "unlink"),
    ("shm", "huge", "copy", "collapse"),
    ("shm", "arena", "create", "mkdir"),
    ("shm", "arena", "copy", "write"),
    ("shm", "arena", "close", "rename"),
    ("shm", "lmdb", "compact", "write"),
    ("shm", "lmdb", "compact", "rename"),
    ("shm", "files", "put", "write"),
    ("shm", "zarr", "put", "rename"),
    ("disk", "arena", "put", "fdatasync"),
    ("disk", "arena", "delete", "fdatasync"),
    ("disk", "arena", "reindex", "unlink"),
    ("disk", "files", "compact", "unlink"),
    ("disk", "lmdb", "put", "fdatasync"),
    ("disk", "zarr", "compact", "unlink"),
]


def kill_after(template, where, kind, operation, step, most):
    """Kill after the N-th call of a kind, at `most` of them (None: each); return how many kills that were.

    Another process has the store open all the time, so LMDB's lock file, which tells what was committed last, is not
    made anew: a commit that reached the disk a moment before the kill must not be overwritten by the next put.
    """
    answer = template.ask(**campaign(where, kind, operation, step, "", "kill", most))
    told = "".join(f"\n{text}" for text in answer["wrong"][:3])
    assert not answer["wrong"], f"{operation} on {kind} in {where}, killed after {step}:{told}"
    assert set(answer["outcomes"]) <= {"killed"}
    return answer["faults"]


def test_killed_at_a_named_step(shm, disk, template):
    for place, kind, operation, step in QUICK:
        kills = kill_after(template, {"shm": shm, "disk": disk}[place], kind, operation, step, 2)
        assert kills, f"{operation} on {kind} makes no call of {step} any more: choose another"
        effort.report("kills", at_a_named_step=kills)


@pytest.mark.skipif(not effort.is_long(), reason="of the long run")
def test_killed_at_every_named_step(shm, disk, template):
    steps = [(w, k, o, s) for w in (shm, disk) for k in STORES for o in OPERATIONS for s in STEPS]
    rng = random.Random(1)
    rng.shuffle(steps)
    following = iter(steps)
    for _ in effort.rounds(1, SHARE):
        kills = kill_after(template, *next(following, rng.choice(steps)), None)
        effort.report("kills", at_a_named_step=kills)


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
    effort.report("kills", at_random=KILLS)
