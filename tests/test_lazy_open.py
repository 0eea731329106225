"""Opening a large store reads next to nothing of it."""

import numpy as np
from programs import run_program

PROGRAM = """
import re, sys
import numpy as np
import memodb

def resident():
    with open("/proc/self/status") as status:
        return sum(int(kb) for kb in re.findall(r"Rss(?:Anon|File|Shmem):\\s+(\\d+) kB", status.read())) << 10

# What any open costs once a process (libraries, thread pools) is not counted.
with memodb.MemoDB.open(sys.argv[1] + "/small") as db:
    db.multiget(db.ids())
    db.multiget_mapped([0]).release()
before = resident()
db = memodb.MemoDB.open(sys.argv[1] + "/large")
opened = resident()
assert len(db) == 1_000_000
with db.multiget_mapped([0, 999_999, 500_000]) as batch:
    assert batch.numpy()[:, 0].tolist() == [0, 999_999, 500_000]
    gathered = resident()
print(opened - before, gathered - before)
"""


def test_open_of_a_million_records(shm, make):
    with make(shm / "small", shape=(2,), dtype="int32", key_dim=4, index="Flat") as small:
        small.put(np.zeros((1, 2), np.int32), np.zeros((1, 4), np.float32))
    with make(shm / "large", shape=(2,), dtype="int32", key_dim=4, index="Flat") as large:
        values = np.arange(2_000_000, dtype=np.int32).reshape(-1, 2) // 2
        for start in range(0, 1_000_000, 250_000):
            stop = start + 250_000
            large.put(values[start:stop], np.zeros((250_000, 4), np.float32))
    size = sum(file.stat().st_size for file in (shm / "large").rglob("*"))
    assert size > 32 << 20, "a store that small proves nothing"
    opened, gathered = map(int, run_program(shm, PROGRAM, shm).split())
    assert opened < 4 << 20
    assert gathered < 12 << 20
