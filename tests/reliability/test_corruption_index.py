"""Damaged saved indexes: built again by themselves with a warning, and the answers are those of the catalog's keys."""

from __future__ import annotations

import logging
import os
import random
import struct
import subprocess
import sys

import effort
import faiss
import numpy as np
import pytest

import memodb
from memodb.checksum import crc32c
from memodb.index import faiss as index_faiss
from memodb.index import manager
from memodb.index import saved as saved_indexes

#: More keys than these make an index worth a file.
KEYS, WIDTH = 400, 8
VECTORS = np.random.default_rng(0).standard_normal((KEYS + 50, WIDTH)).astype(np.float32)


def put(path, keys, index):
    with memodb.MemoDB.create(path, shape=(1,), dtype="int32", key_dim=WIDTH, index=index) as db:
        db.put(np.arange(len(keys), dtype=np.int32)[:, None], keys)
        db.search(keys[:1])
    (file,) = (path / "index").glob("*.index")
    return file


@pytest.fixture(scope="module", params=["HNSW8", "IVF4,Flat"])
def saved(request, tmp_path_factory):
    """Return a store with a saved index, and its file."""
    path = tmp_path_factory.mktemp("index") / "store"
    return path, put(path, VECTORS[:KEYS], request.param)


def sealed(data: bytes, body: bytes) -> bytes:
    """Return a file with the head of `data`, another body, and the right checksum."""
    magic, version, _, length = manager._HEAD.unpack_from(data)
    return manager._HEAD.pack(magic, version, crc32c(body), length) + body


def require_rebuilt(path, caplog, *, warned: bool = True) -> None:
    caplog.clear()
    with caplog.at_level(logging.WARNING, "memodb"), memodb.MemoDB.open(path) as db:
        found = db.search(VECTORS[:KEYS])
        assert (found.ids[:, 0] == np.arange(KEYS)).mean() > 0.9
        assert (found.distances[:, 0] == 0).mean() > 0.9
    if warned:
        assert any("building it again" in record.message for record in caplog.records)


def test_harm_without_a_right_checksum(saved, caplog):
    path, file = saved
    whole = file.read_bytes()
    draw = random.Random(0)
    harms = [whole[:size] for size in (0, 1, 11, 12, 13, 40, len(whole) // 2, len(whole) - 1)] + [whole + b"\0"]
    for _ in range(effort.count(6, 200)):
        changed = bytearray(whole)
        at = draw.randrange(60) if draw.random() < 0.4 else draw.randrange(len(whole))
        changed[at] ^= 1 << draw.randrange(8)
        harms.append(bytes(changed))
    try:
        for harm in harms:
            file.write_bytes(harm)
            require_rebuilt(path, caplog)
            assert file.read_bytes() == harm, "a reader leaves it"
    finally:
        file.write_bytes(whole)
    require_rebuilt(path, caplog, warned=False)
    effort.report("corruption", index_harms=len(harms))


def test_a_terabyte(saved, caplog):
    """The file, or what its head claims: nothing is allocated for it."""
    path, file = saved
    whole = file.read_bytes()
    try:
        os.truncate(file, 1 << 40)
        require_rebuilt(path, caplog)
        length = manager._HEAD.unpack_from(whole)[3]
        label, rest = whole[manager._HEAD.size :][:length], whole[manager._HEAD.size + length :]
        n, sequence, mark, exact = index_faiss._HEAD.unpack_from(rest)
        for claimed in (0, n - 1, n + 1, 1 << 40, (1 << 64) - 1):
            head = index_faiss._HEAD.pack(claimed, sequence, mark, exact)
            file.write_bytes(sealed(whole, label + head + rest[index_faiss._HEAD.size :]))
            require_rebuilt(path, caplog)
        # What faiss itself counts by: sizes in its own part of the file.
        start = manager._HEAD.size + length + index_faiss._HEAD.size + 8 * n + -(-n // 8)
        for at in range(start + 4, min(start + 120, len(whole) - 8), 4 if effort.is_long() else 20):
            changed = bytearray(whole)
            changed[at : at + 8] = struct.pack("<Q", 1 << 37)
            file.write_bytes(sealed(whole, bytes(changed)[manager._HEAD.size :]))
            require_rebuilt(path, caplog, warned=False)  # faiss does not look at all of these
    finally:
        file.write_bytes(whole)


def test_an_index_of_something_else(saved, caplog, shm):
    path, file = saved
    whole = file.read_bytes()
    others = [put(shm / "other", VECTORS[50:], "HNSW8"), put(shm / "wide", VECTORS[:KEYS], "HNSW16")]
    try:
        for other in others:
            data = other.read_bytes()
            file.write_bytes(data)
            require_rebuilt(path, caplog, warned=False)
            # With this store's label, as a swapped disk would not bear it but somebody could write it.
            mine, its = manager._HEAD.unpack_from(whole)[3], manager._HEAD.unpack_from(data)[3]
            label = whole[manager._HEAD.size :][:mine]
            magic, version, _, _ = manager._HEAD.unpack_from(whole)
            body = label + data[manager._HEAD.size + its :]
            file.write_bytes(manager._HEAD.pack(magic, version, crc32c(body), mine) + body)
            require_rebuilt(path, caplog, warned=False)
    finally:
        file.write_bytes(whole)


def test_a_directory_in_its_place(saved, caplog):
    """No damage does that, so it is refused like everything that somebody put there; without it all is well."""
    path, file = saved
    whole = file.read_bytes()
    file.unlink()
    file.mkdir()
    try:
        with pytest.raises(memodb.UnsafePathError, match=file.name):
            require_rebuilt(path, caplog)
    finally:
        file.rmdir()
        file.write_bytes(whole)


PROGRAM = """
import random, sys
import numpy as np
from memodb.index.faiss import FaissIndex

factory, seed, rounds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
rng = np.random.default_rng(0)
n = 1100 if "Q" in factory else 400  # until it is trained
keys = rng.standard_normal((n, 8)).astype(np.float32)
index = FaissIndex(8, factory)
index.add(np.arange(n), keys)
index.sequence = 1
assert index.worth_saving
whole = index.serialize()
draw = random.Random(seed)
taken = 0
for _ in range(rounds):
    changed = bytearray(whole)
    for _ in range(draw.choice((1, 1, 2, 4))):
        size = draw.choice((1, 2, 4, 8))
        at = draw.randrange(len(whole) - size)
        if draw.random() < 0.5:  # the head, and what faiss writes before its arrays
            start = 28 + 8 * n + n // 8
            at = draw.choice((draw.randrange(28), start + draw.randrange(300), len(whole) - 8 - draw.randrange(200)))
        value = draw.choice((0, 1, 255, 256, 400, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63, draw.getrandbits(64)))
        changed[at : at + size] = (value % 256**size).to_bytes(size, "little")
    try:
        made = FaissIndex.deserialize(bytes(changed), 8, factory)
    except ValueError:
        continue
    taken += 1
    try:
        made.remove(np.arange(0, 400, 3))
        made.search(keys[:20], 5)
        made.add(np.arange(n, n + 20), keys[:20])
        made.search(keys[:20], 30)
    except RuntimeError:
        continue
print(taken)
"""


@pytest.mark.parametrize("factory", ["HNSW8", "IVF4,Flat", "PQ4x4", "OPQ4,IVF4,PQ4x4", "SQ8"])
def test_an_index_that_somebody_made_up(tmp_path, factory):
    """With a right checksum, so that faiss reads it: refused, or an index that can be searched; no signal."""
    rounds = effort.count(100, 8_000)
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    limited = f"ulimit -d {6 << 20}; exec {sys.executable} -W ignore {program} '{factory}' 1 {rounds}"
    done = subprocess.run(["sh", "-c", limited], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, (done.returncode, done.stderr[-1500:])
    effort.report("corruption", made_up_indexes=rounds, taken=int(done.stdout))


@pytest.mark.parametrize(
    "factory",
    [
        "HNSW8",
        "IVF4,Flat",
        "PQ4x4",
        "OPQ4,IVF4,PQ4x4",
        "SQ8",
        "IVF4_HNSW8,Flat",
        "PQ4x4,RFlat",
        "PCA4,IVF4,Flat",
        "RQ2x4",
    ],
)
def test_a_sound_index_is_believed(factory):
    """Or else each reader would build it again, which nobody would notice but by the clock."""
    keys = np.random.default_rng(0).standard_normal((1200, WIDTH)).astype(np.float32)
    index = index_faiss.FaissIndex(WIDTH, factory)
    index.add(np.arange(1200), keys)
    index.sequence = 1
    assert index.worth_saving
    again = index_faiss.FaissIndex.deserialize(index.serialize(), WIDTH, factory)
    assert again.search(keys[:50], 5)[0].tolist() == index.search(keys[:50], 5)[0].tolist()


def test_faiss_is_left_as_it_was():
    """The limits of its reader are the process's."""
    from memodb.index.saved import read_index

    before = faiss.get_deserialization_vector_byte_limit(), faiss.get_deserialization_loop_limit()
    with pytest.raises(RuntimeError):
        read_index(np.zeros(10, np.uint8))
    assert (faiss.get_deserialization_vector_byte_limit(), faiss.get_deserialization_loop_limit()) == before


def test_a_process_forked_while_an_index_is_read_keeps_no_limit_of_it():
    """faiss's limits on what it reads are the process's; what the program reads by faiss itself must not meet them."""
    usual = faiss.get_deserialization_vector_byte_limit(), faiss.get_deserialization_loop_limit()
    with saved_indexes._bounded(100):
        child = os.fork()
        if child == 0:
            found = faiss.get_deserialization_vector_byte_limit(), faiss.get_deserialization_loop_limit()
            os._exit(0 if found == usual and saved_indexes._limits.acquire(blocking=False) else 1)
        assert faiss.get_deserialization_vector_byte_limit() == 100
    assert os.waitpid(child, 0)[1] == 0
    assert (faiss.get_deserialization_vector_byte_limit(), faiss.get_deserialization_loop_limit()) == usual
