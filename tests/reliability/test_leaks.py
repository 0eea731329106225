"""Ten thousand gathers, views dropped in any order by any thread, the database closed first: nothing stays behind."""

import effort
import pytest
from conftest import SHARED
from programs import run_program, with_helpers

GATHERS = """
import gc, json, os, random, sys, threading, time
import memodb, numpy as np
from pathlib import Path
from stamps import DTYPE, SHAPE, check, folder_bytes, memodb_maps, stamped

path, backend, gathers = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
ids = np.arange(256)
with memodb.MemoDB.create(path, shape=SHAPE, dtype=DTYPE, backend=backend) as db:
    db.put(stamped(ids, ids))
    strategies = ["map", "copy", "auto"] if memodb_maps(db) else ["copy", "auto"]
    if backend == "memory":
        memory = memodb.MemoDB.open(path)  # as long as a handle is open, so are the records


def in_use():
    gc.collect()
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "mappings": len(Path("/proc/self/maps").read_text().splitlines()),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "anonymous": int(status["RssAnon"].split()[0]) << 10,
        "threads": int(status["Threads"]),
        "files": folder_bytes(path),
        "held": memodb.gather_limits()["mappings_in_use"],
        "idle": memodb.gather_limits()["idle_bytes_in_use"],
    }


def work(seed, n, db, left, lock):
    choose, rng, pages = random.Random(seed), np.random.default_rng(seed), 0
    held = []
    for _ in range(n):
        wanted = rng.integers(0, 256, rng.integers(1, 32))
        batch = db.multiget_mapped(wanted, choose.choice(strategies))
        kind = choose.randrange(4)
        kept = (batch, batch.numpy(), batch.numpy()[::-1][::-1], memoryview(batch.numpy()))[kind]
        held.append((kept, wanted))
        del batch, kept
        if len(held) > 16:
            kept, wanted = held.pop(choose.randrange(16))
            pages += check(np.asarray(kept), wanted, wanted)
            del kept
    with lock:
        left.extend(held)
        total[0] += pages


total = [0]


def round_of(n, seed):
    left, lock = [], threading.Lock()
    db = memodb.MemoDB.open(path)
    threads = [threading.Thread(target=work, args=(seed + i, n // 4, db, left, lock)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    db.close()  # and only then the rest of them
    random.Random(seed).shuffle(left)
    while left:
        kept, wanted = left.pop()
        total[0] += check(np.asarray(kept), wanted, wanted)


for warm in range(3):
    round_of(gathers // 10, warm)
before = in_use()
for turn in range(4):
    round_of(gathers // 4, 10 * turn + 100)
after = in_use()
assert after["descriptors"] == before["descriptors"], (before, after)
assert after["files"] == before["files"], (before, after)
assert after["held"] == before["held"] == 0, (before, after)
assert after["threads"] <= before["threads"], (before, after)
if backend != "memory":
    assert after["idle"] == 0, (before, after)
assert after["mappings"] <= before["mappings"] + 8, (before, after)  # the interpreter's own arenas come and go
assert after["anonymous"] <= before["anonymous"] + (24 << 20), (before, after)
print(total[0])
"""


@pytest.mark.parametrize("backend", [*SHARED, "memory"])
def test_gathers_leak_nothing(shm, backend, monkeypatch):
    """Mappings, descriptors, threads, memory and files are as they were before."""
    with_helpers(monkeypatch)
    gathers = effort.count(1000, 10_000 if backend != "zarr" else 3_000)
    pages = int(run_program(shm, GATHERS, shm / "store", backend, gathers, timeout=1800))
    assert pages > gathers
    effort.report("leaks", backend=backend, gathers=gathers, pages=pages)


LATE = """
import atexit, gc, sys, threading
import memodb, numpy as np

kind, path = sys.argv[1:]
db = memodb.MemoDB.create(path, shape=(1024,), dtype="float32")
ids = db.put(np.ones((64, 1024), np.float32))
batch = db.multiget_mapped(ids[::2], "map")
other = db.multiget_mapped(ids[::2], "copy")
view = batch.numpy()

if kind == "in a function that fails":
    def fail(batch):
        kept = batch.numpy(), other.__dlpack__()
        raise SystemExit(0)
    fail(batch)
elif kind == "in a cycle":
    cycle = [batch, db, other]
    cycle.append(cycle)
    del batch, db, other, cycle
elif kind == "at exit":
    atexit.register(lambda: print(view.sum(), batch.numpy().sum(), db.multiget(ids).sum()))
elif kind == "in a thread":
    local = threading.local()
    local.kept = batch, other, view
    ready = threading.Event()
    def wait():
        mine = db.multiget_mapped(ids[::3]).numpy()
        ready.set()
        threading.Event().wait()
    threading.Thread(target=wait, daemon=True).start()
    ready.wait()
elif kind == "in a thread that gathers":
    ready = threading.Event()
    def gather():
        while True:
            db.multiget_mapped(ids[::3]).numpy()
            ready.set()
    threading.Thread(target=gather, daemon=True).start()
    ready.wait()
elif kind == "prefetched":
    db.prefetch(ids[::3])
elif kind == "in builtins":
    import builtins
    builtins.kept = batch, other, view, db
elif kind == "torch":
    import torch
    kept = torch.from_dlpack(batch), batch.torch()[1:], other.torch()
"""
KINDS = [
    "in a function that fails",
    "in a cycle",
    "at exit",
    "in a thread",
    "in a thread that gathers",
    "prefetched",
    "in builtins",
    "torch",
]


@pytest.mark.parametrize("kind", KINDS if effort.is_long() else KINDS[:5])
def test_the_interpreter_ends_while_batches_live(shm, kind):
    """Wherever they are held, the end is no crash, and no word on stderr."""
    if kind == "torch":
        pytest.importorskip("torch")
    quiet = "import os, sys; os.dup2(1, 2)\n"  # what it says on stderr is told of like the rest
    said = run_program(shm, quiet + LATE, kind, shm / "store")
    assert said == ("32768.0 32768.0 65536.0\n" if kind == "at exit" else "")
