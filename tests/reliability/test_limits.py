"""The limits of a process: few descriptors, little address space, few mappings; and stores of very many records."""

import effort
import numpy as np
import pytest
from conftest import SHARED
from programs import run_program, with_helpers

import memodb

EVERY_BACKEND = [*SHARED, "memory"]

DESCRIPTORS = """
import os, resource, sys, traceback
import memodb, numpy as np
from stamps import DTYPE, SHAPE, check, keys_of, stamped

# What a store needs comes out of this limit from the start.
resource.setrlimit(resource.RLIMIT_NOFILE, (32, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
path, backend = sys.argv[1:]
ids = np.arange(200)
with memodb.MemoDB.create(path, shape=SHAPE, dtype=DTYPE, key_dim=2, backend=backend) as db:
    for part in np.split(ids, 4):
        assert db.put(stamped(part, part), keys_of(part, 0)).tolist() == part.tolist()
    for strategy in ("auto", "copy"):
        check(db.multiget_mapped(ids[::-1], strategy).numpy(), ids[::-1], ids[::-1])
    assert db.search(keys_of(ids, 0)).ids[:, 0].tolist() == ids.tolist()
    with memodb.MemoDB.open(path) as reader:
        check(reader.multiget(ids[::3]), ids[::3], ids[::3])
    db.delete(ids[::2])
    db.compact()
    db.reindex("HNSW16")
    assert db.verify() == []
    check(db.multiget(ids[1::2]), ids[1::2], ids[1::2])

    # And now less and less, down to nothing: each step works or says what is missing, and leaves the store as it was.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    live, refused, unclear = ids[1::2].tolist(), 0, []
    steps = {
        "gather": lambda: check(db.multiget(np.array(live)), np.array(live), np.array(live)),
        "put": lambda: live.extend(db.put(stamped(at, at), keys_of(at, 0)).tolist()),
        "search": lambda: db.search(keys_of(at, 0)),
        "delete": lambda: (db.delete(live[:1]), live.pop(0)),
        "compact": lambda: db.compact(),
        "verify": lambda: db.verify(),
        "open": lambda: memodb.MemoDB.open(path).close(),
        "create": lambda: memodb.MemoDB.create(path + str(free), shape=1, dtype="int8", backend=backend).close(),
    }
    for free in range(12, -1, -int(sys.argv[3])):
        for name, step in steps.items():
            used = len(os.listdir("/proc/self/fd")) - 1
            at = np.arange(int(db.stats()["next_id"]), int(db.stats()["next_id"]) + 3)
            taken = []
            resource.setrlimit(resource.RLIMIT_NOFILE, (used + free, hard))
            try:
                # Numbers below the limit that gaps leave are others'.
                while len(taken) < 64:
                    taken.append(os.open("/dev/null", os.O_RDONLY))
            except OSError:
                pass
            for fd in taken[:free]:
                os.close(fd)
            try:
                step()
            except memodb.MemoDBError as error:
                refused += 1
                if "ulimit -n" not in str(error):
                    unclear.append((free, name, repr(error)))
            except Exception as error:
                unclear.append((free, name, repr(error), traceback.format_exc()))
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
                for fd in taken[free:]:
                    os.close(fd)
    assert not unclear, unclear
    assert refused
    assert sorted(live) == db.ids().tolist()
    assert db.verify() == []
    check(db.multiget(np.array(live)), np.array(live), np.array(live))
with memodb.MemoDB.open(path, mode="r+") as db:
    assert db.verify() == []
    db.put(stamped(ids[:1], ids[:1]), keys_of(ids[:1], 0))
print("ok")
"""


@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_32_descriptors_are_enough_and_fewer_are_told(shm, backend, monkeypatch):
    """RLIMIT_NOFILE: everything works with 32; with fewer, an error names the limit and the store is as before."""
    with_helpers(monkeypatch)
    assert run_program(shm, DESCRIPTORS, shm / "store", backend, 1 if effort.is_long() else 4) == "ok\n"
