"""The limits of a process: few descriptors, little address space, few mappings; and stores of very many records."""

import effort
import numpy as np
import pytest
from conftest import SHARED
from programs import run_program, with_helpers

import memodb
from memodb.environment import Environment

EVERY_BACKEND = [*SHARED, "memory"]

DESCRIPTORS = """
import os, resource, sys, traceback
import memodb, numpy as np
from stamps import DTYPE, SHAPE, check, keys_of, stamped

# What a store needs comes out of this limit from the start.
resource.setrlimit(resource.RLIMIT_NOFILE, (32, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
path, backend = sys.argv[1:3]
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


ADDRESS_SPACE = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
import memodb, numpy as np
from stamps import DTYPE, SHAPE, check, keys_of, memodb_maps, stamped

path, backend = sys.argv[1:]
ids = np.arange(4096)
# The default, a 32nd of the file system, may be most of the address space there is: then memodb says so.
options = {"segment_bytes": 32 << 20} if backend == "arena" else {}
with memodb.MemoDB.create(path, shape=SHAPE, dtype=DTYPE, key_dim=2, backend=backend, **options) as db:
    for part in np.split(ids, 8):
        db.put(stamped(part, part), keys_of(part, 0))
    strategies = ["auto", "copy", "map"] if memodb_maps(db) else ["auto", "copy"]
    for strategy in strategies:
        check(db.multiget_mapped(ids[::-1], strategy).numpy(), ids[::-1], ids[::-1])
    assert (db.search(keys_of(ids, 0), 3).ids[:, 0] == ids).all()
    too_many = np.resize(ids, 40 * 4096)  # 2.5 GiB
    for strategy in strategies:
        try:
            db.multiget_mapped(too_many, strategy)
        except (memodb.StoreFullError, memodb.MappingUnsupportedError) as error:
            assert "fewer" in str(error) or "RLIMIT_AS" in str(error), error
        else:
            raise AssertionError("more than the limit allows was gathered")
    try:
        db.multiget(too_many)
    except memodb.StoreFullError as error:
        assert "fewer" in str(error), error
    more = stamped(np.arange(4096, 5120), np.arange(4096, 5120))  # the test's own memory is taken before it is short
    more_keys = keys_of(np.arange(4096, 5120), 0)
    held = []
    try:
        while len(held) < 1000:  # to the very end of the address space
            held.append(db.multiget_mapped(ids, "copy"))
    except memodb.StoreFullError:
        pass
    assert 0 < len(held) < 1000
    for step in (
        lambda: db.multiget(ids),
        lambda: db.put(more, more_keys),
        lambda: db.delete(db.ids()[4096:]),
        lambda: db.search(keys_of(ids, 0), 100),
        lambda: db.compact(),
    ):
        try:
            step()
        except memodb.MemoDBError as error:
            assert isinstance(error, memodb.StoreFullError), repr(error)
    del held[:]
    memodb.gather_limits(idle_bytes=64 << 20)  # what stays warm for the next batch goes by the machine's memory
    check(db.multiget(ids), ids, ids)
    db.delete(ids[::2])
    db.compact()
    db.reindex()
    assert db.verify() == []
    check(db.multiget(ids[1::2]), ids[1::2], ids[1::2])
if backend != "memory":
    with memodb.MemoDB.open(path, mode="r+") as db:
        assert db.verify() == []
print("ok")
"""


@pytest.mark.parametrize("backend", EVERY_BACKEND if effort.is_long() else ["arena", "lmdb"])
def test_two_gigabytes_of_address_space(shm, backend, monkeypatch):
    """RLIMIT_AS: everything works; what does not fit says so, and leaves all as it was."""
    with_helpers(monkeypatch)
    assert run_program(shm, ADDRESS_SPACE, shm / "store", backend) == "ok\n"


@pytest.mark.parametrize("backend", ["arena", "files"])
def test_70_000_alternating_ids(shm, backend):
    """One mapping each: more than the kernel allows. "auto" copies; "map" refuses, also where its budget is lifted."""
    ids = np.resize([0, 2], 70_000)
    before = memodb.gather_limits()
    with memodb.MemoDB.create(shm / "store", shape=(512,), dtype="uint64", backend=backend, **SHARED[backend]) as db:
        db.put(np.arange(3, dtype=np.uint64)[:, None] * np.ones(512, np.uint64))
        try:
            for mappings in (before["mappings"], 1 << 20):
                memodb.gather_limits(mappings=mappings)
                with pytest.raises(memodb.MappingUnsupportedError, match=r"gather_limits|max_map_count"):
                    db.multiget_mapped(ids, "map")
                with db.multiget_mapped(ids) as batch:
                    assert not batch.zero_copy
                    assert (batch.numpy() == ids[:, None]).all()
                assert memodb.gather_limits()["mappings_in_use"] == before["mappings_in_use"]
        finally:
            memodb.gather_limits(mappings=before["mappings"])
        with db.multiget_mapped(ids[:5000], "map") as batch:
            assert batch.zero_copy
            assert (batch.numpy() == ids[:5000, None]).all()


@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_a_million_records(disk, backend):
    """In the quick run, a few thousand; on a disk, where each of a million files has room."""
    n = 1_000_000 if effort.is_long() else 6_000
    if backend == "files" and effort.is_long():
        n = 200_000  # an inode each
    options = {**SHARED.get(backend, {}), **({"chunk_records": 2_000} if backend == "zarr" else {})}
    options.pop("segment_bytes", None)
    random, step = np.random.default_rng(0), n // 5
    with memodb.MemoDB.create(disk / "store", shape=(2,), dtype="int64", backend=backend, **options) as db:
        for start in range(0, n, step):
            ids = np.arange(start, start + step)
            assert (db.put(np.stack([ids, ~ids], axis=1)) == ids).all()
        assert len(db) == n
        for reader in (db, memodb.MemoDB.open(disk / "store")):
            wanted = random.integers(0, n, 5000)
            assert (reader.multiget(wanted) == np.stack([wanted, ~wanted], axis=1)).all()
        reader.close()
        db.delete(np.setdiff1d(np.arange(n), np.arange(0, n, 7)))
        db.compact()
        assert db.ids().tolist() == list(range(0, n, 7))
        assert db.verify() == []
        assert db.put(np.zeros((1, 2), np.int64)).tolist() == [n]
    effort.report("records", backend=backend, records=n)


def test_a_hundred_namespaces_and_odd_names(make):
    """What names a namespace is its exact text: no normalisation, no folding, no clash."""
    odd = [
        "", " ", "  ", "a", "A", "é", "e\u0301", "ß", "ss", "\u202eabc", "\u200b", "\ufeff", "\x00", "a\x00b", "\x00a",
        "../..", "/",
        "\n", "🤯" * 120, "x" * 480, "\uffff", "\U0010ffff", "layer=3/len=27", "'; DROP TABLE names; --", "%s%n", "\\",
        "ﬁ", "fi",
    ]  # fmt: skip
    names = odd + [f"layer={i}" for i in range(100)]
    n = len(names)
    db = make(shape=(3,), dtype="int64", key_dim=2)
    ids = db.put(np.arange(n * 3).reshape(n, 3), np.tile(np.float32([1, 2]), (n, 1)), namespace=names)
    assert db.search(np.tile(np.float32([1, 2]), (n, 1)), namespace=names).ids[:, 0].tolist() == ids.tolist()
    assert db.namespace_of(ids) == names
    assert db.namespaces() == dict.fromkeys(names, 1)
    for name, record in zip(names, ids.tolist(), strict=True):
        assert db.ids(name).tolist() == [record]
    for wrong in ("\ud800", "x" * 481, "é" * 241, 3, None, b"a", ["a", "b"], {"a"}):
        with pytest.raises(memodb.InvalidOptionError):
            db.put(np.zeros((1, 3), np.int64), np.zeros((1, 2)), namespace=wrong)
    assert len(db) == n


def test_a_reader_of_little_address_space_follows_a_catalog_that_grows(path, peer, monkeypatch):
    """It maps as much of the catalog as it may when it opens it, and then what another process made of it."""
    memodb.MemoDB.create(path, shape=(4,), dtype="float32", key_dim=2).close()
    monkeypatch.setattr(Environment, "_granted", lambda self: max(1 << 20, 2 * (self.path / "data.mdb").stat().st_size))
    writer = peer()
    writer.ask("open", path=str(path), mode="r+")
    with memodb.MemoDB.open(path) as reader:
        handle = reader._catalog._env.handle
        before = handle.info()["map_size"]
        while (path / "catalog" / "data.mdb").stat().st_size < 2 * before:
            writer.ask("put", n=50_000, seed=1, keys=[[1, 2]] * 50_000)
        there = len(reader)
        assert there >= 50_000
        assert reader.multiget([there - 1]).shape == (1, 4)
        assert reader.namespaces() == {"": there}
        assert reader._catalog._env.handle.info()["map_size"] > before
