"""Many at once: every page that anybody sees is a committed record's, whoever writes, is stopped, or is killed."""

import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import effort
import numpy as np
import pytest
from conftest import SHARED, Peer
from programs import private_mount, run_program
from stamps import DTYPE, SHAPE, Writer, check, folder_bytes, stamped

import memodb

STORE = {"shape": SHAPE, "dtype": DTYPE, "key_dim": 2}
#: Some wait for a stopped process; the kernel tells in this file when it stands.
STOPPED = "T"


@pytest.fixture(scope="module")
def readers():
    """Return four other processes."""
    peers = [Peer() for _ in range(4)]
    yield peers
    for peer in peers:
        peer.close()


def test_every_page_that_readers_see_is_stamped(readers, shm, shared_backend):
    """Four processes gather, hold and search while one puts, deletes, compacts and indexes anew."""
    until = shm / "over"
    with memodb.MemoDB.create(shm / "store", **STORE, **shared_backend) as db:
        writer = Writer(db)
        writer.turn()
        for seed, reader in enumerate(readers):
            reader.tell("watch", path=str(shm / "store"), until=str(until), seed=seed)
        for _ in effort.rounds(48, 0.05):
            writer.turn()
            assert not any(reader.answered() for reader in readers), [reader.answer() for reader in readers]
        until.touch()
        answers = [reader.answer() for reader in readers]
        assert not [answer for answer in answers if "error" in answer]
        pages = writer.check()
    figures = {name: sum(answer[name] for answer in answers) for name in answers[0]}
    assert min(answer["gathers"] for answer in answers) > 0
    assert figures["pages"] > figures["gathers"]
    figures["pages"] += pages
    effort.report("concurrency", backend=shared_backend["backend"], turns=writer.turns, **figures)


FREED = """
import os, signal, sys, memodb
from stamps import DTYPE, SHAPE, check, stamped
import numpy as np

place, backend, settings = sys.argv[1], sys.argv[2], eval(sys.argv[3])

def used():
    found = os.statvfs(place)
    return (found.f_blocks - found.f_bfree) * found.f_frsize

with memodb.MemoDB.create(place + "/store", shape=SHAPE, dtype=DTYPE, backend=backend, **settings) as db:
    ids = np.arange(1024)
    db.put(stamped(ids, 0 * ids))
    full = used()
    ready, told = os.pipe()
    reader = os.fork()
    if reader == 0:
        mine = memodb.MemoDB.open(place + "/store")
        held = mine.multiget_mapped(ids, "map" if backend in ("arena", "files") else "copy")
        check(held.numpy(), ids, 0 * ids)
        os.write(told, b"x")
        signal.pause()
    os.read(ready, 1)
    db.delete(ids[1:])
    db.compact()
    if backend in ("arena", "files"):
        assert used() > full - (4 << 20), "held elsewhere: the memory is still there"
    os.kill(reader, signal.SIGKILL)
    os.waitpid(reader, 0)
    db.compact()  # where the catalog's pages of before are given back as well
    assert used() < full - 1000 * 16384 + (4 << 20), (full, used())
    check(db.multiget(ids[:1]), ids[:1], 0 * ids[:1])
    assert db.verify() == []
print("ok")
"""


def test_what_a_killed_reader_held_is_free_again(disk, shared_backend, monkeypatch):
    """On a file system of its own: what no process maps any more takes no memory there."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([os.path.dirname(stamped.__code__.co_filename), *_paths()]))
    settings = {name: value for name, value in shared_backend.items() if name != "backend"}
    if shared_backend["backend"] == "zarr":
        settings["codec"] = "none"
    wrapper = private_mount(disk / "small", "tmpfs", "size=96m")
    done = run_program(disk, FREED, disk / "small", shared_backend["backend"], settings, wrapper=wrapper)
    assert done == "ok\n"


def _paths():
    found = os.environ.get("PYTHONPATH")
    return [found] if found else []


IN_A_TRANSACTION = """
import sys, memodb
db = memodb.MemoDB.open(sys.argv[1])
with db._catalog._env.read() as txn:
    next(iter(txn.cursor()))
    print("inside", flush=True)
    sys.stdin.read()
"""


def test_a_reader_killed_in_a_transaction_does_not_make_the_catalog_grow_for_ever(shm):
    """LMDB keeps all pages that a reader may see; of one that is dead it has to be told."""
    with memodb.MemoDB.create(shm / "store", **STORE, **SHARED["arena"]) as db:
        writer = Writer(db)
        for _ in range(40):
            writer.turn(keep=48)
        with subprocess.Popen(
            [sys.executable, "-c", IN_A_TRANSACTION, str(shm / "store")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as reader:
            assert reader.stdout.readline() == b"inside\n"
            reader.kill()
        writer.turn(keep=48)
        before = folder_bytes(shm / "store" / "catalog")
        for _ in range(effort.count(300, 4000)):
            writer.turn(keep=48)
        after = folder_bytes(shm / "store" / "catalog")
        assert after < 2 * before + (4 << 20), f"from {before} to {after} bytes"
        writer.check()
