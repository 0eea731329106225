"""Damage in LMDB's pages, of the catalog and of records; and values with right checksums that somebody made up."""

from __future__ import annotations

import json
import os
import random
import struct

import effort
import lmdb
import numpy as np
import pytest
from damage import KEY_DIM, RECORDS, SHAPE, STORES, build, court, require, tally

import memodb
from memodb.catalog import journal
from memodb.catalog.rows import BLOCK, ROW, _sum, block_key
from memodb.catalog.tables import BACKEND, COUNTERS, COUNTS, JOURNAL, NAMES, SETTINGS, unseal
from memodb.checksum import crc32c
from memodb.lmdb_guard import PageGuard
from memodb.lmdb_meta import META_BYTES, SEAL_AT

PAGE = 4096
HEADER = 16
META, LEAF, BRANCH, OVERFLOW = 8, 2, 1, 4


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    made = {name: build(folder / name, **STORES[name]) for name in ("arena", "files", "lmdb", "zarr")}
    made["deep"] = deep(folder / "deep")
    return made


@pytest.fixture(scope="module")
def judge():
    with court() as held:
        yield held


def deep(path):
    """Make a store whose catalog has branch and overflow pages and a free list: many namespaces, many puts."""
    values, vectors = np.zeros((600, 2), np.float32), np.random.default_rng(0).standard_normal((600, 8)).astype("f4")
    values[:, 0] = np.arange(600)
    names = [f"namespace {i % 60} {'x' * 100}" for i in range(600)]
    with memodb.MemoDB.create(path, shape=(2,), dtype="float32", key_dim=8, segment_bytes=4096) as db:
        for start in range(0, 600, 50):
            part = slice(start, start + 50)
            db.put(values[part], vectors[part], namespace=names[part])
        db.delete(np.arange(0, 600, 7))
    live = np.setdiff1d(np.arange(600), np.arange(0, 600, 7))
    np.savez(path.with_suffix(".npz"), ids=live, values=values[live], keys=vectors[live], names=np.array(names)[live])
    return path


def places(page: bytes, draw: random.Random) -> list[int]:
    """Return offsets where damage leads LMDB astray: header, node offsets, node headers, keys; and one more."""
    flags, lower = struct.unpack_from("<HH", page, 10)
    anywhere = draw.randrange(PAGE)
    if flags == META:
        return [*range(HEADER + 136), *range(256, 280), anywhere]
    found = [*range(HEADER), anywhere]
    if flags in (LEAF, BRANCH) and HEADER <= lower <= PAGE:
        found += range(HEADER, lower)
        for at in struct.unpack_from(f"<{(lower - HEADER) // 2}H", page, HEADER):
            if at + 8 <= PAGE:
                found += range(at, min(PAGE, at + 8 + struct.unpack_from("<H", page, at + 6)[0]))
    return found


def flips(file, name: str, quick: int) -> list[dict]:
    draw = random.Random(name)
    data = file.read_bytes()
    cases = []
    for number in range(len(data) // PAGE):
        for at in places(data[number * PAGE : (number + 1) * PAGE], draw):
            cases.append({"kind": "flip", "file": name, "bits": [[number * PAGE + at, draw.randrange(8)]]})
    used = [case for case in cases if any(data[case["bits"][0][0] // PAGE * PAGE :][:PAGE])]
    return draw.sample(used, min(effort.count(quick, 1500), len(used)))


@pytest.mark.parametrize("backend", ["arena", "deep"])
def test_bits_flipped_in_the_catalog_s_pages(stores, judge, backend):
    """Metas, branch, leaf and overflow pages, the free list: what readers, then a writer, make of it."""
    name = "catalog/data.mdb"
    cases = flips(stores[backend] / name, name, 25)
    verdicts = require(judge.all(stores[backend], cases, writer=True))
    effort.report("corruption", catalog_flips=len(verdicts), **{f"catalog_{o}": n for o, n in tally(verdicts).items()})


def test_bits_flipped_in_pages_of_records(stores, judge):
    name = "values/00000001/data.mdb"
    verdicts = require(judge.all(stores["lmdb"], flips(stores["lmdb"] / name, name, 25), writer=True))
    effort.report("corruption", record_page_flips=len(verdicts))


@pytest.mark.parametrize(("backend", "name"), [("arena", "catalog/data.mdb"), ("lmdb", "values/00000001/data.mdb")])
def test_an_lmdb_file_cut_short(stores, judge, backend, name):
    size = (stores[backend] / name).stat().st_size
    sizes = sorted({0, 1, 15, 200, size - 1, *(p + by for p in range(0, size, PAGE) for by in (-1, 0, 1))} - {-1, size})
    cases = [{"kind": "truncate", "file": name, "size": s} for s in sizes if 0 <= s < size]
    cases = cases if effort.is_long() else [*cases[:3], *random.Random(0).sample(cases, 4), cases[-1]]
    require(judge.all(stores[backend], cases, writer=True))


@pytest.mark.parametrize("backend", ["arena", "lmdb"])
def test_pages_swapped_and_written_anew(stores, judge, backend):
    """Whole pages in the wrong place, and pages of another kind: zeros, ones, noise."""
    name = {"arena": "catalog/data.mdb", "lmdb": "values/00000001/data.mdb"}[backend]
    data = (stores[backend] / name).read_bytes()
    pages, draw = [n for n in range(len(data) // PAGE) if any(data[n * PAGE :][:PAGE])], random.Random(backend)
    verdicts = []
    for _ in range(effort.count(12, 120)):
        a, b = draw.sample(pages, 2)
        noise = draw.choice(["00" * PAGE, "ff" * PAGE, draw.randbytes(PAGE).hex()])
        harm = draw.choice(
            [
                {"kind": "swap", "file": name, "a": a * PAGE, "b": b * PAGE, "n": PAGE},
                {"kind": "write", "file": name, "at": a * PAGE, "data": noise},
            ]
        )
        verdicts.append(judge.judge(stores[backend], harm, writer=True))
    require(verdicts)
    effort.report("corruption", pages_replaced=len(verdicts))


@pytest.mark.parametrize("meta", [0, 1])
def test_a_root_beyond_the_file_without_a_seal(stores, meta):
    """Found by fuzzing: the older of two meta pages is read as well. (A writer may be killed before it seals.)"""
    data = bytearray((stores["arena"] / "catalog" / "data.mdb").read_bytes())
    tail = meta * PAGE + META_BYTES - 16  # behind the root of the main tree
    data[tail - 8 : tail] = struct.pack("<Q", 1 << 63)
    data[meta * PAGE + SEAL_AT : meta * PAGE + SEAL_AT + 24] = bytes(24)
    fd = os.memfd_create("pages")
    os.write(fd, data)
    guard = PageGuard(fd, "the catalog")
    newest = max(struct.unpack_from("<Q", data, page * PAGE + META_BYTES - 8)[0] for page in (0, 1))
    try:
        if newest & 1 == meta:
            with pytest.raises(memodb.CorruptionError, match="root beyond"):
                guard.metas()
        else:
            assert [found.transaction for found in guard.metas()] == [newest], "nobody goes by the other one"
    finally:
        guard.close()


# --- values that somebody made up, with right checksums ---


def catalog_of(store) -> dict[bytes, bytes]:
    with lmdb.open(os.fspath(store / "catalog"), readonly=True, lock=False, max_dbs=0) as env, env.begin() as txn:
        return dict(txn.cursor())


def made_up(key: bytes, value: bytes | None, *, sealed: bool = True) -> dict:
    data = None if value is None else value.hex()
    return {"kind": "value", "file": "catalog/data.mdb", "key": key.hex(), "data": data, "sealed": sealed}


def settings_of(store) -> dict:
    return json.loads(unseal(SETTINGS, catalog_of(store)[SETTINGS], store))


SETTINGS_CHANGES = [
    {"shape": [1 << 40]},
    {"shape": [1 << 61, 4]},
    {"shape": [1 << 40] * 63},
    {"shape": [1] * 100},
    {"shape": [0]},
    {"shape": [-1]},
    {"shape": "1024"},
    {"shape": [1024.0]},
    {"shape": [True]},
    {"shape": []},
    {"shape": [2048]},
    {"dtype": "object"},
    {"dtype": "O"},
    {"dtype": "V1000000000000"},
    {"dtype": "U1000000"},
    {"dtype": "float32," * 8},
    {"dtype": 7},
    {"dtype": "complex256"},
    {"key_dim": 1 << 40},
    {"key_dim": 0},
    {"key_dim": 9},
    {"key_dim": "8"},
    {"backend": "nonsense"},
    {"backend": "../arena"},
    {"backend": "files"},
    {"backend": "lmdb"},
    {"backend": "memory"},
    {"options": {}},
    {"options": []},
    {"options": {"segment_bytes": 1 << 60, "durability": "full", "huge_pages": True, "segments_path": None}},
    {"options": {"segment_bytes": 4096.5, "durability": "full", "huge_pages": True, "segments_path": None}},
    {"options": {"segment_bytes": 8192, "durability": "full", "huge_pages": True, "segments_path": "/etc"}},
    {"options": {"segment_bytes": 8192, "durability": "full", "huge_pages": True, "segments_path": "/nowhere/x"}},
    {"index": "HNSW0"},
    {"index": "IVF1000000000,Flat"},
    {"index": "HNSW100000000"},
    {"index": "PQ8x40"},
    {"index": "x" * 100_000},
    {"max_bytes": -1},
    {"max_bytes": "much"},
    {"uid": ""},
    {"uid": 5},
    {"copy_of": {"path": "/elsewhere"}},
    {"copy_of": {"path": "/elsewhere", "uid": "u", "asked": "[]"}},
    {"copy_of": "store"},
    {"copied_from": 3},
    {"format": 2},
    {"format": 0},
    {"format": "1"},
    {"format": None},
    {"format": 1.0},
]


def test_settings_that_somebody_made_up(stores, judge):
    store = stores["arena"]
    kept = settings_of(store)
    texts = [json.dumps({**kept, **change}).encode() for change in SETTINGS_CHANGES]
    texts += [b"", b"{", b"[]", b"null", b"7", b"[" * 10_000, b'{"a":' * 10_000, b"\xff\xfe", b" " * (2 << 20)]
    texts += [json.dumps({name: kept[name] for name in kept if name != left}).encode() for left in kept]
    texts.append(json.dumps(kept).replace("1024", "9" * 5000).encode())
    texts = texts if effort.is_long() else random.Random(0).sample(texts, 24)
    verdicts = require(judge.judge(store, made_up(SETTINGS, text), writer=True) for text in texts)
    assert all(v.outcome != "right" for v in verdicts)
    effort.report("corruption", made_up_values=len(verdicts))


@pytest.mark.parametrize("version", [2, 0])
def test_a_newer_and_an_older_format(stores, judge, version):
    for name in ("arena", "zarr"):
        text = json.dumps({**settings_of(stores[name]), "format": version}).encode()
        verdict = judge.judge(stores[name], made_up(SETTINGS, text), writer=True)
        assert (verdict.outcome, verdict.error) == ("refused", "FormatVersionError")


def test_options_of_the_other_backends_that_somebody_made_up(stores, judge):
    changes = {
        "files": [{"durability": 3}, {"huge_pages": "yes"}, {"more": 1}],
        "lmdb": [{"map_bytes": 1 << 60}, {"map_bytes": "1"}, {"map_bytes": 1 << 46}, {"durability": []}],
        "zarr": [
            {"chunk_records": 1 << 60},
            {"chunk_records": 1 << 20},
            {"chunk_records": 0},
            {"shard_records": 3.5},
            {"codec": "pickle"},
            {"codec": "blosc"},
            {"level": 1000},
            {"packed_dtype": "int8"},
            {"scale_factor": "1"},
            {"url": "memory://nothing"},
            {"url": "ftp://nowhere/x"},
            {"url": 4},
            {"client": "other"},
            {"storage_options": [1]},
            {"token": None},
            {"more": 1},
        ],
    }
    verdicts = []
    for backend, each in changes.items():
        kept = settings_of(stores[backend])
        for change in each if effort.is_long() else each[:6]:
            text = json.dumps({**kept, "options": {**kept["options"], **change}}).encode()
            verdicts.append(judge.judge(stores[backend], made_up(SETTINGS, text), writer=True))
    require(verdicts)
    effort.report("corruption", made_up_values=len(verdicts))


HUGE = (1 << 64) - 1


def counters(next_id=RECORDS, live=RECORDS - 2, sequence=10, namespaces=2) -> bytes:
    return struct.pack("<QQQI", next_id, live, sequence, namespaces)


def test_numbers_that_somebody_made_up(stores, judge):
    """Counters, counts, names, rows, journal: all with right checksums."""
    store = stores["arena"]
    kept = catalog_of(store)
    block = kept[block_key(0)]
    stamp, _ = struct.unpack_from("<QI", block)
    rows = np.frombuffer(block, ROW, offset=12).copy()

    def block_of(changed: np.ndarray, number: int = 0) -> dict:
        body = changed.tobytes()
        raw = struct.pack("<QI", stamp + 1, _sum(block_key(number), stamp + 1, body)) + body
        return made_up(block_key(number), raw, sealed=False)

    def row(**changes) -> np.ndarray:
        changed = rows.copy()
        for name, value in changes.items():
            changed[name][4] = value
        return changed

    def entry(kind=b"A", count=1, mark=1, ids=b"", vectors=b"", namespace=0, sequence=50) -> dict:
        body = ids + vectors
        key = JOURNAL + struct.pack(">IQ", namespace, sequence)
        head = journal._HEAD.pack(kind, count, mark, crc32c(body))
        return made_up(key, head + journal._SUM.pack(crc32c(key + head)) + body, sealed=False)

    id_of = struct.pack("<q", 3)
    vector = np.zeros(KEY_DIM, np.float32).tobytes()
    cases = [
        *(made_up(COUNTERS, counters(**{name: n})) for name in ("next_id", "live") for n in (0, 5, 1 << 40, HUGE)),
        *(made_up(COUNTERS, counters(sequence=n)) for n in (0, HUGE)),
        *(made_up(COUNTERS, counters(namespaces=n)) for n in (0, (1 << 32) - 1)),
        made_up(COUNTERS, b""),
        made_up(COUNTERS, counters() + b"\0"),
        made_up(COUNTERS, None),
        *(made_up(BACKEND, value) for value in (b"", b"\0", b"\xff" * 8, b"\xff" * 40, b"\0" * 48, None)),
        made_up(COUNTS + b"\0\0\0\0", struct.pack("<QQ", HUGE, HUGE)),
        made_up(COUNTS + b"\0\0\0\0", b"\0"),
        made_up(COUNTS + b"\0", struct.pack("<QQ", 1, 1)),
        made_up(COUNTS + b"\0" * 100, struct.pack("<QQ", 1, 1)),
        made_up(NAMES + b"layer=0", struct.pack("<I", (1 << 32) - 1)),
        made_up(NAMES + b"layer=0", struct.pack("<I", 1)),
        made_up(NAMES + b"layer=0", b"\0"),
        made_up(NAMES + b"layer=0", None),
        made_up(NAMES + b"\xff\xfe", struct.pack("<I", 2)),
        *(block_of(row(locator=n)) for n in (0, 1 << 33, (1 << 32) + 6, (1 << 33) - 1, HUGE, 1 << 63)),
        *(block_of(row(state=n)) for n in (0, 2, 3, 255)),
        *(block_of(row(namespace=n)) for n in (1, 7, (1 << 32) - 1)),
        *(block_of(rows, n) for n in (1, 1 << 32, (HUGE // BLOCK) + 1, HUGE)),
        block_of(rows[:3]),
        block_of(np.zeros(BLOCK + 1, ROW)),
        made_up(block_key(0), b"", sealed=False),
        made_up(block_key(0), b"\0" * 12, sealed=False),
        made_up(block_key(0), b"\0" * 13, sealed=False),
        made_up(block_key(0), None),
        made_up(block_key(0)[:3], b"x"),
        made_up(block_key(0) + b"\0" * 300, b"x"),
        entry(count=0),
        entry(count=1),
        entry(count=(1 << 32) - 1),
        entry(kind=b"D", count=(1 << 32) - 1),
        entry(kind=b"X", ids=id_of, vectors=vector),
        entry(ids=id_of, vectors=vector),
        entry(ids=struct.pack("<q", -1), vectors=vector),
        entry(ids=struct.pack("<q", 1 << 62), vectors=vector),
        entry(count=2, ids=id_of * 2, vectors=vector * 2),
        entry(kind=b"D", ids=struct.pack("<q", 1 << 62)),
        entry(sequence=HUGE, ids=id_of, vectors=vector),
        entry(ids=id_of, vectors=np.full(KEY_DIM, np.nan, np.float32).tobytes()),
        made_up(JOURNAL + b"\0", b"x", sealed=False),
        made_up(JOURNAL + b"\0" * 300, b"x", sealed=False),
        made_up(JOURNAL + struct.pack(">IQ", 0, 1), b"", sealed=False),
        made_up(JOURNAL + struct.pack(">IQ", 0, 1), None),
    ]
    cases = cases if effort.is_long() else random.Random(0).sample(cases, 30)
    verdicts = [judge.judge(store, case, writer=True) for case in cases]
    # Whoever may write the catalog may take a record's row for another one's: that is no damage that can be told.
    bad = [v for v in verdicts if not v.acceptable and v.outcome != "wrong"]
    assert not bad, bad[:8]
    effort.report("corruption", made_up_values=len(verdicts))


@pytest.mark.parametrize("backend", ["arena", "files", "lmdb", "zarr"])
def test_a_backend_s_state_that_somebody_made_up(stores, judge, backend):
    store = stores[backend]
    kept = unseal(BACKEND, catalog_of(store)[BACKEND], store)
    draw = random.Random(backend)
    states = [b"", kept[:-1], kept + b"\0", b"\xff" * len(kept), b"\0" * len(kept), kept[:8], kept * 2]
    for _ in range(effort.count(4, 100)):
        changed = bytearray(kept)
        at = draw.randrange(0, len(kept), 4)
        changed[at : at + 4] = draw.choice([b"\xff\xff\xff\xff", b"\0\0\0\0", b"\0\0\0\x80", draw.randbytes(4)])
        states.append(bytes(changed))
    verdicts = [judge.judge(store, made_up(BACKEND, state), writer=True) for state in states]
    bad = [v for v in verdicts if not v.acceptable and v.outcome != "wrong"]
    assert not bad, bad[:8]


def test_each_byte_of_the_small_values(stores, judge):
    """Settings, counters, counts, names and the backend's state: whatever byte changes is noticed."""
    store = stores["arena"]
    draw = random.Random(0)
    small = {key: raw for key, raw in catalog_of(store).items() if key[:1] in b"mcn"}
    cases = []
    for key, raw in small.items():
        for at in range(len(raw)):
            changed = bytearray(raw)
            changed[at] ^= 1 << draw.randrange(8)
            cases.append(made_up(key, bytes(changed), sealed=False))
    cases = cases if effort.is_long() else draw.sample(cases, 25)
    verdicts = require(judge.all(store, cases))
    assert {v.outcome for v in verdicts} <= {"refused", "named"}
    effort.report("corruption", small_value_flips=len(verdicts))


def test_each_part_of_rows_and_journal(stores, judge):
    store = stores["arena"]
    draw = random.Random(0)
    cases = []
    for key, raw in catalog_of(store).items():
        if key[:1] in b"bj":
            for at in {*range(30), *(draw.randrange(len(raw)) for _ in range(20))}:
                changed = bytearray(raw)
                changed[at % len(raw)] ^= 1 << draw.randrange(8)
                cases.append(made_up(key, bytes(changed), sealed=False))
    cases = cases if effort.is_long() else draw.sample(cases, 25)
    verdicts = require(judge.all(store, cases))
    assert {v.outcome for v in verdicts} <= {"refused", "named"}
    assert SHAPE
