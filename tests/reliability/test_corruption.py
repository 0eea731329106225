"""Damaged files of every backend: an error that names the place, or right results; never a wrong byte or a signal."""

from __future__ import annotations

import os
import random
from pathlib import Path

import effort
import numpy as np
import pytest
from damage import RECORDS, STORES, build, court, files, require, tally

import memodb
from memodb.testing import random_records

PAGE = 4096


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Return backend -> a sound store of it; nothing in the tests changes them."""
    folder = tmp_path_factory.mktemp("stores")
    return {name: build(folder / name, **settings) for name, settings in STORES.items()}


@pytest.fixture(scope="module")
def judge():
    with court() as held:
        yield held


def some(cases: list, quick: int, seed: str) -> list:
    """Return all cases in the long run, a few of them, always the same, in the quick one."""
    return cases if effort.is_long() else random.Random(seed).sample(cases, min(quick, len(cases)))


def sizes(file: Path) -> list[int]:
    """Return lengths to cut a file to: nothing, in a header, around pages, in the middle, one byte short."""
    size = file.stat().st_size
    pages = {page + by for page in range(0, size, PAGE) for by in (-1, 0, 1)}
    return sorted(s for s in {0, 1, 2, 7, 13, 24, size // 3, size // 2, size - 1, *pages} if 0 <= s < size)


@pytest.mark.parametrize("backend", STORES)
def test_truncated(stores, judge, backend):
    store = stores[backend]
    cases = [
        {"kind": "truncate", "file": file, "size": size}
        for file in files(store)
        if not file.startswith("catalog")
        for size in sizes(store / file)
    ]
    verdicts = require(judge.all(store, some(cases, 5, backend), writer=True))
    # Nothing lives in a segment's last places, nor in the files of deleted records.
    assert {"named", "refused"} & {v.outcome for v in verdicts}
    effort.report("corruption", truncations=len(verdicts))


@pytest.mark.parametrize("backend", STORES)
def test_a_longer_file_is_no_harm(stores, judge, backend):
    """A sparse terabyte: nobody reads it, or allocates for it."""
    store = stores[backend]
    cases = [{"kind": "truncate", "file": file, "size": 1 << 40} for file in files(store)]
    verdicts = require(judge.all(store, some(cases, 3, backend)))
    effort.report("corruption", **{f"longer_{outcome}": n for outcome, n in tally(verdicts).items()})


@pytest.mark.parametrize("backend", STORES)
def test_removed_or_no_file(stores, judge, backend):
    store = stores[backend]
    cases = [{"kind": kind, "file": file} for file in files(store) for kind in ("remove", "directory")]
    verdicts = require(judge.all(store, some(cases, 5, backend), writer=True))
    assert sum(v.outcome == "right" for v in verdicts) <= 4  # files of the two deleted records


@pytest.mark.parametrize("backend", STORES)
def test_bits_flipped_in_files(stores, judge, backend):
    """Wherever it is: records, chunk headers, zarr's metadata. The catalog has a test of its own."""
    store = stores[backend]
    draw = random.Random(backend)
    named = [file for file in files(store) if not file.startswith("catalog")]
    named = [file for file in named if not file.endswith("data.mdb")]
    if not named:
        pytest.skip("its files are LMDB's: see test_corruption_catalog.py")
    cases = []
    for _ in range(effort.count(12, 250)):
        file = draw.choice(named)
        size = (store / file).stat().st_size
        at = draw.randrange(min(size, 64)) if draw.random() < 0.4 else draw.randrange(size)
        cases.append({"kind": "flip", "file": file, "bits": [[at, draw.randrange(8)]]})
    verdicts = require(judge.all(store, cases))
    effort.report("corruption", flips_in_files=len(verdicts))


@pytest.mark.parametrize("backend", ["arena", "files", "lmdb", "zarr-none"])
def test_each_flipped_payload_bit_is_named(stores, judge, backend):
    """One bit of one record, anywhere in it: verify names that record, and no other."""
    store = stores[backend]
    with np.load(store.with_suffix(".npz")) as loaded:
        ids, values = loaded["ids"], loaded["values"]
    homes = {}
    for file in files(store):
        data = (store / file).read_bytes()
        for id, value in zip(ids.tolist(), values, strict=True):
            place = data.find(value.tobytes())
            if place >= 0:
                homes[id] = file, place
    assert sorted(homes) == ids.tolist()
    draw = random.Random(backend)
    verdicts, missed = [], []
    for _ in range(effort.count(13, 250)):
        id = draw.choice(ids.tolist())
        file, place = homes[id]
        at = place + draw.randrange(values[0].nbytes)
        verdicts.append(judge.judge(store, {"kind": "flip", "file": file, "bits": [[at, draw.randrange(8)]]}))
        if (verdicts[-1].outcome, verdicts[-1].ids) != ("named", [id]):
            missed.append((id, verdicts[-1]))
    require(verdicts)
    assert not missed, missed[:5]
    effort.report("corruption", payload_flips=len(verdicts), payload_flips_named=len(verdicts) - len(missed))


def test_two_records_swapped(stores, judge):
    """Each is whole, and in the other's place."""
    store = stores["arena"]
    (first, *_) = [file for file in files(store) if file.endswith(".seg")]
    verdict = judge.judge(store, {"kind": "swap", "file": first, "a": 0, "b": PAGE, "n": PAGE})
    assert (verdict.outcome, verdict.ids) == ("named", [0, 1]), verdict
    for backend in ("files", "zarr"):
        store = stores[backend]
        inside = [file for file in files(store) if file.startswith("values/") and not file.endswith("zarr.json")]
        a, b = inside[0], inside[1]
        verdict = judge.judge(
            store,
            {"kind": "replace", "file": a, "source": os.fspath(store / b)},
            {"kind": "replace", "file": b, "source": os.fspath(store / a)},
        )
        assert (verdict.outcome, verdict.ids) == ("named", [0, 1]), verdict


@pytest.mark.parametrize("backend", STORES)
def test_a_file_of_another_store(stores, judge, backend, shm):
    """Of the same shape, backend and number of records: nothing but the bytes tells."""
    other = build(shm / "other", seed=1, **STORES[backend])
    cases = [
        {"kind": "replace", "file": file, "source": os.fspath(other / file)}
        for file in files(stores[backend])
        if file.startswith("values/") and (other / file).exists()
    ]
    verdicts = require(judge.all(stores[backend], some(cases, 4, backend), writer=True))
    assert sum(v.outcome == "right" for v in verdicts) <= 2  # files of the two deleted records


def test_the_catalog_of_another_store(stores, judge, shm):
    other = build(shm / "other", seed=1, **STORES["arena"])
    verdict = judge.judge(
        stores["arena"], {"kind": "folder", "file": "catalog", "source": os.fspath(other / "catalog")}, writer=True
    )
    assert verdict.outcome == "named", verdict
    assert len(verdict.ids) == RECORDS - 2


def test_damage_of_large_mapped_records(judge, shm):
    """Records that are mapped, from a segment cut short under an open reader: errors, no SIGBUS (judged in a child)."""
    path = shm / "large"
    values = random_records(4, (1 << 19,), "float32")
    with memodb.MemoDB.create(path, shape=(1 << 19,), dtype="float32", segment_bytes=8 << 20, key_dim=8) as db:
        vectors = np.eye(4, 8, dtype=np.float32)
        ids = db.put(values, vectors, namespace="n")
    np.savez(path.with_suffix(".npz"), ids=ids, values=values, keys=vectors, names=np.array(["n"] * 4))
    (segment,) = [file for file in files(path) if file.endswith(".seg")]
    cases = [{"kind": "truncate", "file": segment, "size": size} for size in (0, PAGE, (4 << 20) + 5, (8 << 20) - 1)]
    verdicts = require(judge.all(path, cases, writer=True))
    assert {v.outcome for v in verdicts} == {"named"}
    assert judge.judge(path).outcome == "right"
