"""What is done to a store, step by step: every step follows from the seed, the store's name and the step's number.

So a guest that was cut off needs to know no more than how many steps of each store were acknowledged, and can tell what
each must hold: which ids, every byte, every key. Step 0 creates the store.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import memodb
from memodb.testing import assert_same_bytes

SHAPE, DTYPE, KEY_DIM = (32, 32), "float32", 8
NAMESPACES = ("a", "b", "")
#: A store with more records than this loses some before it gets more: checks must not take ever longer.
MOST = 300


class Lost(Exception):
    """A store does not hold what it acknowledged."""


@dataclass(frozen=True)
class Step:
    """One call that changes a store: "create", "put", "delete" or "compact"; what is put, or deleted."""

    kind: str
    ids: tuple[int, ...] = ()
    namespace: str = ""


@dataclass
class Store:
    """A store, and what it holds after its first `steps` steps.

    Parameters
    ----------
    name
        Of its directory.
    at
        Where that is made.
    options
        For `memodb.MemoDB.create`.
    seed
        Of its script.
    """

    name: str
    at: Path
    options: dict[str, Any]
    seed: int
    steps: int = 0
    next_id: int = 0
    #: id -> (step that put it, row in that batch, namespace)
    live: dict[int, tuple[int, int, str]] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        return self.at / self.name

    def _random(self, step: int, what: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, zlib.crc32(self.name.encode()), step, what])

    def next(self) -> Step:
        """Return the step that comes after those already taken."""
        if not self.steps:
            return Step("create")
        rng = self._random(self.steps, 0)
        chance = rng.random()
        if len(self.live) >= MOST or (self.live and 0.65 <= chance < 0.88):
            share = 0.5 if len(self.live) >= MOST else 0.15
            chosen = rng.choice(list(self.live), max(1, int(len(self.live) * share)), replace=False)
            return Step("delete", tuple(int(id) for id in np.sort(chosen)))
        if self.live and chance >= 0.88:
            return Step("compact")
        # Mostly small ones; now and then one of some hundred pages.
        n = int(rng.integers(1, 9)) if rng.random() < 0.9 else int(rng.integers(60, 120))
        return Step("put", tuple(range(self.next_id, self.next_id + n)), str(rng.choice(NAMESPACES)))

    def take(self, step: Step) -> None:
        """Note that `step`, which `next` returned, was taken."""
        for row, id in enumerate(step.ids):
            if step.kind == "put":
                self.live[id] = (self.steps, row, step.namespace)
            else:
                del self.live[id]
        self.next_id = max(self.next_id, step.ids[-1] + 1) if step.kind == "put" else self.next_id
        self.steps += 1

    def values(self, step: int, n: int) -> np.ndarray[Any, Any]:
        """Return the records of a step: no byte of them is another's, or what a hole reads as."""
        bits = self._random(step, 1).integers(0, 1 << 32, (n, *SHAPE), dtype=np.uint32)
        return (bits & np.uint32(0x3FFFFFFF) | np.uint32(0x20000000)).view(DTYPE)

    def keys(self, step: int, n: int) -> np.ndarray[Any, Any]:
        return self._random(step, 2).standard_normal((n, KEY_DIM), dtype=np.float32)

    def create(self) -> memodb.MemoDB:
        return memodb.MemoDB.create(self.path, shape=SHAPE, dtype=DTYPE, key_dim=KEY_DIM, **self.options)

    def do(self, db: memodb.MemoDB, step: Step) -> None:
        """Take a step other than "create" on the open store."""
        if step.kind == "put":
            n = len(step.ids)
            ids = db.put(self.values(self.steps, n), self.keys(self.steps, n), namespace=step.namespace)
            if tuple(ids.tolist()) != step.ids:
                raise Lost(f"put gave ids {ids.tolist()}, expected {list(step.ids)}")
        elif step.kind == "delete":
            db.delete(step.ids)
        else:
            db.compact()

    def find(self, db: memodb.MemoDB) -> None:
        """Take the step that was under way at the cut, if the store shows it as taken.

        Raises
        ------
        Lost
            If the store is neither as it was acknowledged nor one step further.
        """
        found = self._shown(db)
        if found == (self.next_id, sorted(self.live)):
            return
        before, step = (self.next_id, sorted(self.live)), self.next()
        self.take(step)
        if found != (self.next_id, sorted(self.live)):
            raise Lost(
                f"{self.steps - 1} steps were acknowledged: next id {before[0]}, {len(before[1])} records; "
                f"{step.kind} of {len(step.ids)} may have been under way; found next id {found[0]}, {len(found[1])} "
                f"records; missing {[id for id in before[1] if id not in set(found[1])][:5]}"
            )

    @staticmethod
    def _shown(db: memodb.MemoDB) -> tuple[int, list[int]]:
        return db.stats()["next_id"], db.ids().tolist()

    def check(self, db: memodb.MemoDB) -> None:
        """Compare everything that the store holds with what was put.

        Raises
        ------
        Lost, AssertionError, MemoDBError
            If an id, a byte, a key or a namespace is missing, or another's.
        """
        ids = np.array(sorted(self.live), np.int64)
        if self._shown(db) != (self.next_id, ids.tolist()) or len(db) != len(ids):
            raise Lost(f"ids {self._shown(db)}, expected next {self.next_id} and {len(ids)} records")
        batches = list(self._batches())
        for namespace in NAMESPACES:
            of_it = [(ids, keys) for ids, keys, _, name in batches if name == namespace]
            wanted, keys = (np.concatenate(parts) for parts in zip(*of_it, strict=True)) if of_it else (ids[:0], None)
            if not np.array_equal(db.ids(namespace), np.sort(wanted)):
                raise Lost(f"namespace {namespace!r} holds {db.ids(namespace).tolist()}, expected {wanted.tolist()}")
            if keys is not None:
                found = db.search(keys, namespace=namespace).ids[:, 0]
                if not np.array_equal(found, wanted):
                    raise Lost(f"{np.sum(found != wanted)} of {len(wanted)} searches in {namespace!r} found another id")
        if batches:
            ids, keys, values, _ = zip(*batches, strict=True)
            everything = np.concatenate(ids)
            assert_same_bytes(db.multiget(everything), np.concatenate(values))
            assert_same_bytes(db.keys(everything), np.concatenate(keys))
            with db.multiget_mapped(everything) as batch:
                assert_same_bytes(batch.numpy(), np.concatenate(values))
        if problems := db.verify():
            raise Lost(f"verify: {len(problems)} problems, the first: {problems[0]}")

    def _batches(self) -> Iterator[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any], str]]:
        """Yield what lives of each batch: ids, keys, values, namespace."""
        by_step: dict[int, list[int]] = {}
        for id, (step, _, _) in self.live.items():
            by_step.setdefault(step, []).append(id)
        for step, ids in by_step.items():
            rows = [self.live[id][1] for id in ids]
            n = max(rows) + 1  # what is drawn for fewer rows is what the first of more are
            keys, values = self.keys(step, n)[rows], self.values(step, n)[rows]
            yield np.array(ids, np.int64), keys, values, self.live[ids[0]][2]


def advanced(store: Store, steps: int) -> Store:
    """Return the store after so many steps: nothing is done to any file."""
    while store.steps < steps:
        store.take(store.next())
    return store


def reopened(store: Store) -> memodb.MemoDB:
    """Open a store after a cut, first as a reader, then as the writer; return it when all that it holds was checked.

    Raises
    ------
    Lost, AssertionError, MemoDBError
        If it does not hold what was acknowledged.
    """
    if not store.steps:
        try:
            db = store.create()
        except memodb.StoreExistsError:  # it was made, and the cut came before that was told
            db = memodb.MemoDB.open(store.path, "r+")
        store.take(store.next())
        store.check(db)
        return db
    with memodb.MemoDB.open(store.path) as reader:
        store.find(reader)
        store.check(reader)
    db = memodb.MemoDB.open(store.path, "r+")
    try:
        store.check(db)
    except BaseException:
        db.close()
        raise
    return db
