"""LMDB's pages are checked before LMDB follows them: what is sound passes, what is damaged is told (`lmdb_guard`)."""

import itertools
import os
import random
import struct
from collections import Counter

import effort
import lmdb
import numpy as np
import pytest

import memodb
from memodb import lmdb_guard
from memodb.environment import Environment
from memodb.lmdb_guard import PageGuard
from memodb.lmdb_meta import META_BYTES, SEAL_AT, Damage
from memodb.lmdb_pages import Page, sound_leaves

PAGE = 4096


def guard_of(path):
    return PageGuard(os.open(path / "data.mdb", os.O_RDWR | os.O_CLOEXEC), f"the file {path}")


def check(path, transaction, keys=(), *, writing=True):
    """Check a file as a whole and key by key, while `transaction` of it is being read."""
    whole, lazy = guard_of(path), guard_of(path)
    try:
        meta = whole.snapshot(transaction)
        whole.check_all(meta, writing=writing)
        for key in keys:
            lazy.check_path(meta, key)
    finally:
        whole.close()
        lazy.close()


def random_changes(txn, rng, known):
    """Put, overwrite and delete: keys and values of all sizes, some on pages of their own."""
    for _ in range(rng.randrange(1, 60)):
        if known and rng.random() < 0.45:
            key = rng.choice(sorted(known))
            if rng.random() < 0.7:
                txn.delete(key)
                known.discard(key)
                continue
        else:
            key = rng.choice([b"a", b"b", b"longer"]) + rng.randbytes(rng.choice([1, 3, 8, 40, 500]))
        txn.put(key, rng.randbytes(rng.choice([0, 1, 50, 900, 2030, 2040, 4080, 4081, 9000, 40000])))
        known.add(key)


@pytest.mark.parametrize("seed", range(4))
def test_whatever_lmdb_writes_is_sound(disk, seed):
    """With readers that hold old snapshots, transactions that are aborted, and the file opened anew now and then."""
    rng = random.Random(seed)
    known, commits = set(), 0
    env, held = None, []
    for _ in effort.rounds(40, share=0.01):
        if env is None:
            env = lmdb.open(str(disk), map_size=1 << 30, max_readers=32, sync=False)
        with env.begin(write=True) as txn:
            number = txn.id()
            random_changes(txn, rng, known)
        commits += 1
        with env.begin() as txn:
            check(disk, txn.id(), rng.sample(sorted(known), min(5, len(known))))
            assert txn.id() == number
        if rng.random() < 0.3:
            held.append(env.begin())
        if held and rng.random() < 0.3:
            held.pop(rng.randrange(len(held))).abort()
        if rng.random() < 0.2:
            with env.begin(write=True) as txn:
                random_changes(txn, rng, set(known))
                txn.abort()
        if rng.random() < 0.1:
            for txn in held:
                txn.abort()
            held.clear()
            env.close()
            env = None
    for txn in held:
        txn.abort()
    if env is not None:
        env.close()
    effort.report("pages", sound_environments_checked=commits)


@pytest.fixture
def store(disk):
    """Return the path of a store whose catalog has a tree of several levels of pages, and of two commits or more."""
    path = disk / "store"
    with memodb.MemoDB.create(path, shape=(4,), dtype="float32", key_dim=100, durability="relaxed") as db:
        for i in range(60):
            db.put(np.full((3, 4), i, "float32"), keys=np.full((3, 100), i, "float32"), namespace=f"name {i} " * 20)
        db.delete([0, 1])
    return path


def data_of(store):
    return store / "catalog" / "data.mdb"


def change(file, at, data):
    with file.open("r+b") as opened:
        opened.seek(at)
        opened.write(data)


def flip(file, at, bit):
    change(file, at, bytes([file.read_bytes()[at] ^ 1 << bit]))


def metas(file):
    guard = guard_of(file.parent)
    try:
        return guard.metas()
    finally:
        guard.close()


@pytest.mark.parametrize("mode", ["r", "r+"])
def test_a_flipped_bit_of_a_meta_page_is_told_or_harmless(store, mode):
    """Every bit of what LMDB writes there: the one that names the newest tree, and the one before."""
    file = data_of(store)
    sound, told, expected = file.read_bytes(), Counter(), None
    newest = max(metas(file)).transaction & 1
    with memodb.MemoDB.open(store) as db:
        expected = db.ids().tolist()
    places = range(META_BYTES) if effort.is_long() else random.Random(1).sample(range(META_BYTES), 20)
    for page in (0, 1):
        for place in places:
            for bit in range(8) if effort.is_long() else (random.Random(place).randrange(8),):
                flip(file, page * PAGE + place, bit)
                try:
                    with memodb.MemoDB.open(store, mode=mode) as db:
                        assert db.ids().tolist() == expected
                except (memodb.CorruptionError, memodb.FormatVersionError):
                    told[page] += 1
                file.write_bytes(sound)
    assert told[newest] > len(places) // 2
    effort.report("flips", meta_bits=2 * len(places) * (8 if effort.is_long() else 1))


def test_a_commit_whose_meta_page_could_not_be_written_leaves_a_sound_store(store):
    """LMDB puts the older transaction's number back and leaves the rest of the page as it came (mdb_env_write_meta)."""
    file = data_of(store)
    newest = max(metas(file)).transaction & 1
    trees = 16 + 24  # behind the header, and magic, version, address and size of the map
    change(file, (1 - newest) * PAGE + trees, file.read_bytes()[newest * PAGE + trees : newest * PAGE + trees + 96])
    assert [meta.transaction & 1 for meta in metas(file)] == [newest]
    with memodb.MemoDB.open(store) as db:
        expected = db.ids().tolist()
    with memodb.MemoDB.open(store, mode="r+") as db:
        assert db.ids().tolist() == expected
        expected += db.put(np.zeros((1, 4), "float32"), keys=np.zeros((1, 100), "float32")).tolist()
    assert len(metas(file)) == 2, "the next commit writes it anew"
    with memodb.MemoDB.open(store) as db:
        assert db.ids().tolist() == expected
        assert db.verify() == []


def test_a_meta_page_that_says_less_than_was_sealed_is_told(store):
    """The newest meta page put back to the one before it, or its number made smaller: an older tree that looks well."""
    file = data_of(store)
    sound = file.read_bytes()
    newest = max(metas(file)).transaction & 1
    at = newest * PAGE + META_BYTES - 8
    change(file, at, struct.pack("<Q", struct.unpack_from("<Q", sound, at)[0] - 4))
    with pytest.raises(memodb.CorruptionError, match="does not match its seal"):
        memodb.MemoDB.open(store)


def test_a_meta_page_without_a_seal_is_taken_as_it_is(store):
    """A writer killed before it could seal leaves the seal of two commits ago; other tools leave none."""
    file = data_of(store)
    for page in (0, 1):
        change(file, page * PAGE + SEAL_AT, bytes(24))
    with memodb.MemoDB.open(store, mode="r+") as db:
        db.put(np.zeros((1, 4), "float32"), keys=np.zeros((1, 100), "float32"))
        assert db.verify() == []
    newest = max(metas(file)).transaction & 1
    assert file.read_bytes()[newest * PAGE + SEAL_AT :][:8] == b"MDBSEAL1", "sealed by the next commit"


@pytest.mark.parametrize("mode", ["r", "r+"])
def test_a_branch_that_leads_to_an_old_page_is_told(store, mode, monkeypatch):
    """The page that it leads to is whole, and was the right one some commits ago."""
    file = data_of(store)
    sound = file.read_bytes()
    newest = max(metas(file))
    assert newest.main.depth >= 2
    root = newest.main.root * PAGE
    count = (struct.unpack_from("<H", sound, root + 12)[0] - 16) // 2
    told = 0
    for i in range(count):
        at = root + struct.unpack_from("<H", sound, root + 16 + 2 * i)[0]
        child = int.from_bytes(sound[at : at + 4], "little")
        for old in range(2, newest.last):
            flags = struct.unpack_from("<H", sound, old * PAGE + 10)[0]
            if old == child or flags != 2 or struct.unpack_from("<Q", sound, old * PAGE)[0] != old:
                continue
            change(file, at, old.to_bytes(4, "little"))
            with pytest.raises(memodb.CorruptionError, match=r"page \d+"):
                memodb.MemoDB.open(store, mode=mode)
            told += 1
    assert told > 3
    change(file, 0, sound)


def test_a_large_tree_is_checked_on_the_way_to_each_key(store, monkeypatch):
    """Where there are many pages, opening checks none; damage off the way is not met, damage on it is."""
    monkeypatch.setattr(lmdb_guard, "CHECKED_AT_OPEN", 0)
    file = data_of(store)
    sound = file.read_bytes()
    with memodb.MemoDB.open(store) as db:
        expected = db.multiget([5, 100])
        env = db._catalog._env
        assert not env._pages.complete
        db.ids()  # goes through a whole table
        assert env._pages.complete
    newest = max(metas(file))
    leaves = [p for p in range(2, newest.last + 1) if struct.unpack_from("<H", sound, p * PAGE + 10)[0] == 2]
    met = unmet = 0
    for page in leaves:
        change(file, page * PAGE + 14, struct.pack("<H", 65535))  # where its nodes begin
        try:
            with memodb.MemoDB.open(store) as db:
                assert np.array_equal(db.multiget([5, 100]), expected)
                unmet += 1
        except memodb.CorruptionError:
            met += 1
        change(file, page * PAGE, sound[page * PAGE : (page + 1) * PAGE])
    assert met
    assert unmet


def test_a_value_longer_than_the_file_is_told_on_the_way_to_its_key(disk, monkeypatch):
    """LMDB hands out as many bytes as a node says, be they beyond the end of the file: a SIGBUS for who reads them."""
    monkeypatch.setattr(lmdb_guard, "CHECKED_AT_OPEN", 0)
    path = disk / "store"
    with memodb.MemoDB.create(path, shape=(4,), dtype="float32") as db:
        db.put(np.zeros((2000, 4), "float32"))
    file = data_of(path)
    sound, changed = file.read_bytes(), 0
    key = b"b" + bytes(8)
    for at in range(0, len(sound), 2):  # its node: size, size, flags, bytes of the key, key
        if sound[at + 8 : at + 8 + len(key)] == key and sound[at + 4 : at + 8] == b"\1\0\x09\0":
            change(file, at + 3, bytes([sound[at + 3] | 0x40]))
            changed += 1
    assert changed
    guard, env = guard_of(path / "catalog"), lmdb.open(str(path / "catalog"), readonly=True)
    with env, env.begin() as txn:
        meta = guard.snapshot(txn.id())
        with pytest.raises(memodb.CorruptionError, match="beyond the last page"):
            guard.check_path(meta, key)
    guard.close()
    with pytest.raises(memodb.CorruptionError, match="beyond the last page"), memodb.MemoDB.open(path) as db:
        db.multiget([5])


def test_leaves_checked_together_are_checked_as_well_as_one_by_one(disk):
    """What `sound_leaves` lets pass passes `Page` as well, whichever byte is damaged."""
    rng, keys = random.Random(3), set()
    with lmdb.open(str(disk), map_size=1 << 30) as env, env.begin(write=True) as txn:
        for _ in range(600):
            key = rng.choice([b"b", b"n", b"jx"]) + rng.choice([b"", b"\0"]) + rng.randbytes(rng.choice([1, 4, 8, 30]))
            txn.put(key, rng.randbytes(rng.choice([0, 3, 60, 700, 5000])))
            keys.add(key)
    guard = guard_of(disk)
    meta = max(guard.metas())
    root = Page(guard._read(meta, meta.main.root, 1), meta.main.root, meta, leaf=False)
    guard.close()
    assert meta.main.depth == 2
    pages = (disk / "data.mdb").read_bytes()
    bounds = [(low, high) for low, high in itertools.pairwise([*root.keys, None])]
    whole = b"".join(pages[child * PAGE : (child + 1) * PAGE] for child in root.children)

    def one_by_one(data):
        found = []
        for i, (number, (low, high)) in enumerate(zip(root.children, bounds, strict=True)):
            page = Page(data[i * PAGE : (i + 1) * PAGE], number, meta, leaf=True)
            page.check_keys(low, high)
            found.append(page.large())
        return tuple(np.concatenate(part).tolist() for part in zip(*found, strict=True))

    starts, lengths = sound_leaves(whole, root.children, bounds, meta)
    assert (starts.tolist(), lengths.tolist()) == one_by_one(whole)
    assert len(starts) > 50
    refused = Counter()
    for _ in effort.rounds(1500, share=0.01):
        data = bytearray(whole)
        place = rng.randrange(len(root.children)) * PAGE
        # Headers and the offsets of nodes, or the nodes themselves.
        place += rng.randrange(40) if rng.random() < 0.5 else rng.randrange(PAGE)
        data[place] ^= 1 << rng.randrange(8)
        together = sound_leaves(bytes(data), root.children, bounds, meta)
        try:
            expected = one_by_one(bytes(data))
        except Damage:
            assert together is None, f"byte {place}"
            refused[True] += 1
        else:
            refused[False] += 1
            if together is not None:
                assert tuple(part.tolist() for part in together) == expected
    assert min(refused.values()) > 100


def test_readers_of_a_large_tree_beside_a_writer(store, peer, monkeypatch):
    """Snapshots are overtaken while they begin: a reader then begins again."""
    monkeypatch.setattr(lmdb_guard, "CHECKED_AT_OPEN", 0)
    writer = peer()
    writer.ask("open", path=str(store), mode="r+")
    env = Environment.acquire(store / "catalog")
    try:
        for round in effort.rounds(30, share=0.01):
            writer.tell("delete", ids=[3 + round]) if round < 150 else writer.tell("ids")
            while not writer.answered():
                with env.read() as txn:
                    assert txn.get(b"mcounters") is not None
            assert "error" not in str(writer.answer())
    finally:
        env.release()


def test_a_free_list_that_names_a_page_in_use_is_told_before_anything_is_written(store):
    file = data_of(store)
    sound = file.read_bytes()
    newest = max(metas(file))
    leaf = newest.free.root * PAGE
    node = leaf + struct.unpack_from("<H", sound, leaf + 16)[0]
    key_bytes = struct.unpack_from("<H", sound, node + 6)[0]
    value = node + 8 + key_bytes
    assert struct.unpack_from("<Q", sound, value)[0] >= 1
    change(file, value + 8, struct.pack("<Q", newest.main.root))
    damaged = file.read_bytes()
    for mode in ("r", "r+"):
        with pytest.raises(memodb.CorruptionError, match="used twice, or used and free"):
            memodb.MemoDB.open(store, mode=mode)
    assert file.read_bytes() == damaged, "nothing was written"
