"""Records every page of which tells whose it is: one that is mixed, zero, stale or another record's shows."""

from __future__ import annotations

import os
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np

import memodb

PAGES, WORDS = 4, 512
#: Four pages of 4 KiB.
SHAPE, DTYPE = (PAGES, WORDS), "uint64"
#: Odd, so that multiplying by it loses nothing.
_MIX = np.uint64(0x9E3779B97F4A7C15)
#: What was put in one call shares its generation; keys are (id, generation), which float32 holds exactly below this.
MOST = 1 << 24

Ids = np.ndarray[Any, np.dtype[np.int64]]
Values = np.ndarray[Any, np.dtype[np.uint64]]


def stamped(ids: Ids, generations: Any) -> Values:
    """Return records [n, PAGES, WORDS]: every word of a page follows from id, generation, page and place."""
    base = np.asarray(ids, np.uint64) << np.uint64(32) | np.asarray(generations, np.uint64)
    pages = base[:, None] * np.uint64(PAGES) + np.arange(PAGES, dtype=np.uint64)
    return ((pages * _MIX)[:, :, None] + np.arange(WORDS, dtype=np.uint64)) * _MIX


def keys_of(ids: Ids, generation: int) -> Any:
    """Return the keys [n, 2] of records: id and generation."""
    return np.stack([ids, np.full(len(ids), generation)], axis=1).astype(np.float32)


def check(found: Any, ids: Ids, generations: Any) -> int:
    """Assert that records are those of `ids`, whole; return how many pages were looked at."""
    wrong = (found != stamped(ids, generations)).any(axis=2)
    if wrong.any():
        record, page = np.argwhere(wrong)[0].tolist()
        raise AssertionError(
            f"{wrong.sum()} of {wrong.size} pages are not what they should be, first page {page} of id {ids[record]}: "
            f"{found[record, page, :4].tolist()}"
        )
    return wrong.size


class Writer:
    """Puts, deletes, compacts and indexes anew, by turns; knows what is there."""

    def __init__(self, db: memodb.MemoDB, seed: int = 0) -> None:
        self.db = db
        self.generation = 0
        self.live: dict[int, int] = {}
        self.random = np.random.default_rng(seed)
        self.turns = 0

    def put(self, n: int) -> Ids:
        """Put stamped records, whose ids are known beforehand."""
        first = int(self.db.stats()["next_id"])
        ids = np.arange(first, first + n)
        self.generation += 1
        assert max(first + n, self.generation) < MOST
        given = self.db.put(stamped(ids, [self.generation] * n), keys_of(ids, self.generation))
        assert given.tolist() == ids.tolist()
        self.live.update(dict.fromkeys(ids.tolist(), self.generation))
        return ids

    def turn(self, keep: int = 96) -> None:
        """Do a little of everything, leaving about `keep` records."""
        self.turns += 1
        self.put(int(self.random.integers(1, 24)))
        if len(self.live) > keep:
            doomed = self.random.choice(list(self.live), len(self.live) - keep * 2 // 3, replace=False)
            self.db.delete(doomed)
            for id in doomed.tolist():
                del self.live[id]
        if self.turns % 4 == 0:
            self.db.compact()
        if self.turns % 16 == 0:
            self.db.reindex()

    def check(self) -> int:
        """Look at everything once more."""
        ids = np.array(sorted(self.live), np.int64)
        assert self.db.ids().tolist() == ids.tolist()
        assert self.db.verify() == []
        return check(self.db.multiget(ids), ids, [self.live[id] for id in ids.tolist()])


def watch(path: str, until: str, seed: int) -> dict[str, int]:
    """Read a store until the file `until` is there: gathers of every kind, batches held, searches; return figures."""
    random = np.random.default_rng(seed)
    figures = dict.fromkeys(("gathers", "pages", "searches", "overtaken"), 0)
    held: deque[tuple[Any, Ids, Any]] = deque()
    strategies = ["map", "copy", "auto"]
    with memodb.MemoDB.open(path) as db:
        if not memodb_maps(db):
            strategies.remove("map")
        while not os.path.exists(until) or not figures["gathers"]:
            ids = db.ids()
            if not len(ids):
                time.sleep(0)
                continue
            ids = random.choice(ids, random.integers(1, min(len(ids), 40) + 1))
            try:
                generations = db.keys(ids)[:, 1].astype(np.int64)
                turn = int(random.integers(0, 5))
                if turn == 0:
                    figures["pages"] += check(db.multiget(ids), ids, generations)
                elif turn == 1:
                    wanted = keys_of(ids, 0)
                    wanted[:, 1] = generations
                    found = db.search(wanted)
                    same = found.ids[:, 0] == ids  # or else it was deleted meanwhile, and another is the nearest
                    assert (found.distances[same] == 0).all()
                    assert (found.ids >= 0).all(), "nothing found, while there are records"
                    figures["searches"] += len(ids)
                    continue
                else:
                    batch = db.multiget_mapped(ids, strategies[turn % len(strategies)])
                    figures["pages"] += check(batch.numpy(), ids, generations)
                    held.append((batch, ids, generations))
            except memodb.RecordNotFoundError:  # deleted since we asked for the ids
                figures["overtaken"] += 1
                continue
            figures["gathers"] += 1
            while len(held) > 3:
                batch, ids, generations = held.popleft()
                figures["pages"] += check(batch.numpy(), ids, generations)
    for batch, ids, generations in held:  # the store is closed, and they are as they were
        figures["pages"] += check(batch.numpy(), ids, generations)
    return figures


def memodb_maps(db: memodb.MemoDB) -> bool:
    """Tell whether the store's backend can map."""
    return next(bool(one.abilities["maps"]) for one in memodb.available_backends() if one.name == db.backend_name)


def folder_bytes(path: Path) -> int:
    """Return the bytes that the files below a folder take."""
    return sum(file.stat().st_blocks * 512 for file in path.rglob("*") if file.is_file())
