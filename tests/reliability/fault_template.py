"""The process that suffers the faults: it imports everything once, and forks a child for each fault (see faults.py).

It reads one campaign a line and answers with one JSON line: which calls were hit, what came of it, and what was wrong.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import importlib
import json
import os
import shutil
import signal
import sys
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import faiss  # noqa: F401  (imported once, before anything forks)
import numpy as np
import store_model as model
import zarr  # noqa: F401
from faults import ERRORS

import memodb
from memodb.backends import zarr_array, zarr_gather  # noqa: F401

SHIM = ctypes.CDLL(None)
SHIM.memofault_arm.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_long, ctypes.c_int, ctypes.c_int]
SHIM.memofault_disarm.restype = SHIM.memofault_seen.restype = ctypes.c_long
SHIM.memofault_seen.argtypes = [ctypes.c_char_p]
FLUSHES = ("fsync", "fdatasync", "syncfs")
#: How many calls of each kind an operation makes, by place, kind of store and operation.
CALLS: dict[str, dict[str, int]] = {}
MODES = {"once": 0, "lasting": 1, "half": 2, "kill": 3}
#: A child that takes longer hangs.
SECONDS = 40


def reading(name: str, db: memodb.MemoDB, live: set[int]) -> None:
    ids = sorted(live)
    expected = np.stack([model.value(i) for i in ids])
    match name:
        case "gather":
            assert np.array_equal(db.multiget(ids), expected)
        case "map":
            try:
                with db.multiget_mapped(ids, strategy="map") as batch:
                    assert np.array_equal(batch.numpy(), expected)
            except memodb.MappingUnsupportedError:
                with db.multiget_mapped(ids) as batch:
                    assert np.array_equal(batch.numpy(), expected)
        case "search":
            mine = [i for i in ids if model.namespace(i) == "a"]
            found = db.search(np.stack([model.key(i) for i in mine]), namespace="a")
            assert found.ids[:, 0].tolist() == mine
        case "verify":
            problems = db.verify()
            assert all(problem.id in live or problem.id is None for problem in problems)


class Child:
    """One operation under one fault, in a process of its own."""

    def __init__(self, folder: Path, asked: dict[str, Any], live: set[int]) -> None:
        self.folder, self.path = folder, folder / "store"
        self.asked, self.live = asked, live
        self.operation: str = asked["operation"]
        self.added, self.taken = set(), set()
        #: What was put through the handle after the fault.
        self.more: set[int] = set()
        if self.operation in model.WRITES:
            _, self.added, self.taken = model.WRITES[self.operation]

    def arm(self, nth: int) -> None:
        SHIM.memofault_arm(
            os.fsencode(self.folder), self.asked["call"].encode(), nth, self.asked["errno"], MODES[self.asked["mode"]]
        )

    def run(self, nth: int) -> dict[str, Any]:
        """Do the operation under the fault; return what came of it."""
        db, error = None, None
        if self.operation in model.WRITES:
            db = memodb.MemoDB.open(self.path, "r+")
            if self.operation == "close":  # with an index to save
                model.put(db, model.BATCH)
                db.search(model.key(0)[None], namespace="a")
                model.put(db, range(21, 40))
                self.live = self.live | set(range(15, 40))
        elif self.operation in ("gather", "map", "search", "verify"):
            db = memodb.MemoDB.open(self.path)
        self.arm(nth)
        try:
            if self.operation in model.WRITES:
                model.WRITES[self.operation][0](db)
            elif self.operation == "open":
                db = memodb.MemoDB.open(self.path)
            elif self.operation == "open r+":
                db = memodb.MemoDB.open(self.path, "r+")
            elif self.operation == "create":
                db = memodb.MemoDB.create(
                    self.folder / "new",
                    shape=model.SHAPE,
                    dtype="float32",
                    key_dim=2,
                    **model.KINDS[self.asked["kind"]],
                )
            elif self.operation == "copy":
                self.copy()
            else:
                reading(self.operation, db, self.live)
        except BaseException as caught:
            error = caught
        hits = SHIM.memofault_disarm()
        seen = {call: SHIM.memofault_seen(call.encode()) for call in ERRORS}
        if hits or nth > 1 << 30:
            self.judge(db, error)
        elif db is not None:
            db.close()
        return {"hits": hits, "seen": seen, "outcome": "harmless" if error is None else type(error).__name__}

    def rehearse(self, base: Path) -> None:
        """Do a bit of everything, for what it imports."""
        with memodb.MemoDB.open(base) as db:
            model.look_through(db, self.live)
            model.leftovers(db)

    def create(self) -> memodb.MemoDB:
        kind = model.KINDS[self.asked["kind"]]
        return memodb.MemoDB.create(self.folder / "new", shape=model.SHAPE, dtype="float32", key_dim=2, **kind)

    def copy(self) -> None:
        options = {name: value for name, value in model.KINDS[self.asked["kind"]].items() if name != "backend"}
        memodb.copy(self.path, self.folder / "copy", backend=model.KINDS[self.asked["kind"]]["backend"], **options)

    def judge(self, db: memodb.MemoDB | None, error: BaseException | None) -> None:
        """Look at the handle that met the fault, and then at the store."""
        if error is not None and not isinstance(error, memodb.MemoDBError):
            raise error
        before, after = self.live, (self.live | self.added) - self.taken
        if db is not None and not db.closed:
            self.judge_handle(db, error, before, after)
            db.close()
        del db
        forget_frames(error)
        gc.collect()
        left = model.open_below(self.folder)
        assert not left, f"still open or mapped: {left}"
        if self.operation == "create":
            self.judge_created(error)
        elif self.operation == "copy":
            if error is not None:
                self.copy()
            with memodb.MemoDB.open(self.folder / "copy") as copied:
                model.look_through(copied, self.live)
        self.judge_store(*(ids | self.more for ids in ((after,) if error is None else (before, after))))

    def judge_killed(self) -> None:
        """Look at the store whose writer was killed: the operation is there wholly, or not at all."""
        if self.operation == "close":
            self.live |= set(range(15, 40))
        if self.operation == "create":
            self.judge_created(memodb.MemoDBError())
        elif self.operation == "copy":
            with contextlib.suppress(memodb.StoreExistsError):  # killed when it was finished
                self.copy()
            with memodb.MemoDB.open(self.folder / "copy") as copied:
                model.look_through(copied, self.live)
        self.judge_store(self.live, (self.live | self.added) - self.taken)

    def judge_handle(self, db: memodb.MemoDB, error: BaseException | None, before: set[int], after: set[int]) -> None:
        if self.operation == "create":
            return
        model.look_through(db, *((after,) if error is None else (before, after)))
        if db.mode != "r+":
            return
        poisons = error is not None and self.asked["call"] in FLUSHES and self.asked["errno"] == errno.EIO
        SHIM.memofault_arm(os.fsencode(self.folder), self.asked["call"].encode(), 1 << 40, 0, 0)
        try:
            next_id = int(db.stats()["next_id"])
            ids = model.put(db, range(next_id, next_id + 2))
            assert not poisons, "a put after a failed flush"
        except memodb.ReadOnlyError:
            assert isinstance(error, memodb.DeviceError) or self.asked["call"] in FLUSHES, f"after {error!r}"
            assert not any(SHIM.memofault_seen(call.encode()) for call in FLUSHES), "a failed flush was tried again"
        else:
            self.more.update(ids)
        finally:
            SHIM.memofault_disarm()

    def judge_store(self, *allowed: set[int]) -> None:
        with memodb.MemoDB.open(self.path) as db:
            live = model.look_through(db, *allowed)
        with memodb.MemoDB.open(self.path, "r+") as db:  # gives back what the failed operation left
            # What a killed writer committed last comes to light with the next writer, if a reader was there meanwhile.
            live = model.look_through(db, *(allowed if self.asked["mode"] == "kill" else [live]))
            left = model.leftovers(db)
            # Records of a keyed backend that compaction counted out and did not get to remove: the next one does.
            assert not left or (self.operation == "compact" and db.backend_name in ("files", "zarr")), left
            next_id = int(db.stats()["next_id"])
            more = range(next_id, next_id + 3)
            assert model.put(db, more) == list(more)
            db.compact()
            model.look_through(db, live | set(more))
            left = model.leftovers(db)
            assert not left, f"left over: {left}"

    def judge_created(self, error: BaseException | None) -> None:
        new = self.folder / "new"
        if error is not None:
            # Where nothing can be opened any more, or who made it was killed, an empty store may be left.
            with contextlib.suppress(memodb.StoreExistsError if self.asked["mode"] in ("lasting", "kill") else ()):
                self.create().close()
        with memodb.MemoDB.open(new, "r+") as db:
            assert model.put(db, range(3)) == [0, 1, 2]
            model.look_through(db, {0, 1, 2})


def forget_frames(error: BaseException | None) -> None:
    """Let go of what the tracebacks of an error and its causes keep alive."""
    known: set[int] = set()
    while error is not None and id(error) not in known:
        known.add(id(error))
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def in_child(work: Any) -> dict[str, Any]:
    """Run `work` in a forked child and return its answer; what goes wrong is its key "wrong"."""
    out, into = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(out)
        signal.alarm(SECONDS)
        try:
            answer = work()
        except BaseException:
            SHIM.memofault_disarm()
            answer = {"wrong": traceback.format_exc()}
        data = json.dumps(answer).encode()
        while data:
            data = data[os.write(into, data) :]
        os._exit(0)
    os.close(into)
    with os.fdopen(out, "rb") as pipe:
        data = pipe.read()
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        why = "it hung" if number == signal.SIGALRM else f"signal {signal.Signals(number).name}"
        return {"wrong": why, "signal": number}
    return dict(json.loads(data))


def beside_a_reader(path: Path, work: Any) -> dict[str, Any]:
    """Return what `work` returns, while another process has the store open, which looks through it at the end."""
    ready, tell_ready = os.pipe()
    end, tell_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(2 * SECONDS)
        os.close(tell_end)
        status = 1
        try:
            with memodb.MemoDB.open(path) as db:
                db.search(model.key(0)[None], namespace="a")
                os.write(tell_ready, b".")
                os.read(end, 1)  # until the other end is closed
                model.look_through(db, set(db.ids().tolist()))
                status = 0
        except BaseException:
            traceback.print_exc()
        os._exit(status)
    os.close(tell_ready)
    os.close(end)
    os.read(ready, 1)
    try:
        result: dict[str, Any] = work()
    finally:
        os.close(tell_end)
        os.close(ready)
        status = os.waitpid(pid, 0)[1]
    return {"wrong": f"the reader beside it ended with {status}", **result} if status else result


def campaign(bases: dict[str, tuple[Path, set[int]]], asked: dict[str, Any]) -> dict[str, Any]:
    """One operation under the N-th failure of one call, for each N asked for (none: for all)."""
    where, kind = Path(asked["where"]), asked["kind"]
    if f"{where} {kind}" not in bases:
        base = where / f"base-{kind}"
        known = set(sys.modules)

        def make() -> dict[str, Any]:
            live = sorted(model.make(base, kind))
            Child(where, {**asked, "operation": "none"}, set(live)).rehearse(base)
            return {"live": live, "modules": sorted(set(sys.modules) - known)}

        made = in_child(make)
        if "wrong" in made:
            raise RuntimeError(made["wrong"])
        for name in made["modules"]:  # what is imported at need: here, once, and not in every child
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
        gc.collect()
        gc.freeze()
        bases[f"{where} {kind}"] = base, set(made["live"])
    base, live = bases[f"{where} {kind}"]
    folder = where / "work"

    def under(nth: int) -> dict[str, Any]:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        shutil.copytree(base, folder / "store")
        if asked["mode"] == "kill":
            return beside_a_reader(folder / "store", lambda: killed(nth))
        return in_child(lambda: Child(folder, asked, set(live)).run(nth))

    def killed(nth: int) -> dict[str, Any]:
        result = in_child(lambda: Child(folder, asked, set(live)).run(nth))
        return in_child(judge) if result.get("signal") == signal.SIGKILL else result

    def judge() -> dict[str, Any]:
        Child(folder, asked, set(live)).judge_killed()
        return {"outcome": "killed"}

    answer: dict[str, Any] = {"faults": 0, "outcomes": Counter(), "wrong": []}
    known = f"{where} {kind} {asked['operation']}"
    if known not in CALLS:
        first = under(1 << 40)
        if "wrong" in first:
            return {**answer, "wrong": [f"without a fault: {first['wrong']}"]}
        CALLS[known] = first["seen"]
    calls = range(1, CALLS[known][asked["call"]] + 1)
    for nth in calls if asked["most"] is None else sorted(set(np.linspace(1, len(calls), asked["most"], dtype=int))):
        if not calls:
            break
        result = under(int(nth))
        answer["faults"] += 1
        answer["outcomes"][result.get("outcome", "wrong")] += 1
        if "wrong" in result:
            answer["wrong"].append(f"at call {nth} of {len(calls)}: {result['wrong']}")
    shutil.rmtree(folder, ignore_errors=True)
    return answer


def main() -> None:
    bases: dict[str, tuple[Path, set[int]]] = {}
    for line in sys.stdin:
        print(json.dumps(campaign(bases, json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
