"""The court's process: imports everything once, and forks for each damaged store (see damage.py).

One JSON line in (store, harm, writer), one out (outcome, error, ids, notes). A child that is killed by a signal, that
hangs, takes more memory than it may, or raises what is no error of memodb's is what tests look for.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
import traceback
import zlib
from pathlib import Path
from typing import Any

import faiss  # noqa: F401 - imported before the fork: it takes a while
import lmdb
import numpy as np
import zarr  # noqa: F401

import memodb
import memodb.backends.arena
import memodb.backends.files
import memodb.backends.lmdb
import memodb.backends.zarr
import memodb.backends.zarr_gather
import memodb.index.faiss
import memodb.verify
from memodb.catalog.tables import seal

#: A case takes a hundredth of this.
HANG_SECONDS = 60
#: Private memory of a child beyond what it begins with. RLIMIT_DATA and not RLIMIT_AS: LMDB's map, reserved ranges and
#: mapped segments are address space by design, and not memory; what is allocated for a claim in a file is private.
MEMORY = 512 << 20


# --- harm ---


def flip(path: Path, bits: list[list[int]], **_: Any) -> None:
    with path.open("r+b") as file:
        for at, bit in bits:
            file.seek(at)
            (byte,) = file.read(1)
            file.seek(at)
            file.write(bytes([byte ^ 1 << bit]))


def write(path: Path, at: int, data: str, **_: Any) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(bytes.fromhex(data))


def replace(path: Path, data: str | None = None, source: str | None = None, **_: Any) -> None:
    path.write_bytes(Path(source).read_bytes() if source else bytes.fromhex(data or ""))


def swap(path: Path, a: int, b: int, n: int, **_: Any) -> None:
    whole = bytearray(path.read_bytes())
    whole[a : a + n], whole[b : b + n] = whole[b : b + n], whole[a : a + n]
    path.write_bytes(whole)


def value(path: Path, key: str, data: str | None, sealed: bool = True, **_: Any) -> None:
    """Put a value into the catalog as somebody who knows its checksums would; None deletes it."""
    with lmdb.open(os.fspath(path.parent), map_size=1 << 28) as env, env.begin(write=True) as txn:
        name = bytes.fromhex(key)
        if data is None:
            txn.delete(name)
        else:
            txn.put(name, seal(name, bytes.fromhex(data)) if sealed else bytes.fromhex(data))


def truncate(path: Path, size: int, **_: Any) -> None:
    os.truncate(path, size)


def remove(path: Path, **_: Any) -> None:
    path.unlink()


def directory(path: Path, **_: Any) -> None:
    path.unlink()
    path.mkdir()


def folder(path: Path, source: str, **_: Any) -> None:
    """Put another store's directory in the place of this one's."""
    shutil.rmtree(path)
    shutil.copytree(source, path)


HARM = {f.__name__: f for f in (flip, write, replace, swap, value, truncate, remove, directory, folder)}


# --- judgement ---


def unlike(found: Any, wanted: Any) -> bool:
    return np.ascontiguousarray(found).tobytes() != np.ascontiguousarray(wanted).tobytes()


def look(path: Path, expected: Any) -> dict[str, Any]:
    """Read the whole store, and say what came of it."""
    ids, values = expected["ids"], expected["values"]
    with memodb.MemoDB.open(path) as db:
        problems = db.verify()
        named = sorted({problem.id for problem in problems if problem.id is not None})
        wrong = [f"{problem.message!r} names no place" for problem in problems if str(path) not in problem.message]
        sound = ~np.isin(ids, named)
        if problems and not sound.all():
            for strategy in ("copy", "auto"):  # it may be refused, or be other bytes: it must not be a signal
                try:
                    db.multiget_mapped(ids, strategy=strategy).numpy().sum()
                except memodb.MemoDBError:
                    continue
        if not problems and db.ids().tolist() != ids.tolist():
            return {"outcome": "wrong", "notes": [f"ids {db.ids().tolist()}"]}
        try:
            for strategy in ("copy", "auto"):
                batch = db.multiget_mapped(ids[sound], strategy=strategy)
                if unlike(batch.numpy(), values[sound]):
                    wrong.append(f"other bytes by {strategy} in records that verify finds sound")
            if problems:
                return {"outcome": "wrong" if wrong else "named", "ids": named, "notes": wrong}
            if unlike(db.keys(ids), expected["keys"]):
                wrong.append("other keys")
            if db.namespace_of(ids) != expected["names"].tolist() or len(db) != len(ids):
                wrong.append("other namespaces")
            found = db.search(expected["keys"], namespace=expected["names"].tolist())
            if found.ids[:, 0].tolist() != ids.tolist() or found.distances.any():
                wrong.append("other neighbours")
            db.stats()
        except memodb.InvalidOptionError:  # an index of the settings that cannot serve
            raise
        except memodb.MemoDBError as error:
            if not problems:
                wrong.append(f"verify finds nothing, but: {type(error).__name__}: {error}")
        return {"outcome": "wrong" if wrong else "named" if problems else "right", "ids": named, "notes": wrong}


def change(path: Path, expected: Any) -> dict[str, Any]:
    """Write to the store: it may be refused, or go well; what is sound before is sound after."""
    with memodb.MemoDB.open(path, mode="r+") as db:
        named = {problem.id for problem in db.verify()}
        new = db.put(expected["values"][:3], expected["keys"][:3], namespace="new")
        db.delete([id for id in expected["ids"][:1].tolist() if id not in named])
        db.compact()
        if unlike(db.multiget(new), expected["values"][:3]):
            return {"outcome": "wrong", "notes": ["what was put is not what comes back"]}
        left = [i for i, id in enumerate(expected["ids"].tolist()) if id in db and id not in named and i]
        if unlike(db.multiget(expected["ids"][left]), expected["values"][left]):
            return {"outcome": "wrong", "notes": ["compaction changed records that were sound"]}
    return {"outcome": "right"}


def judged(path: Path, expected: Any, work: Any) -> dict[str, Any]:
    try:
        return dict(work(path, expected))
    except (memodb.InvalidRecordError, memodb.InvalidKeyError) as error:  # settings may make records others
        return {"outcome": "refused", "error": type(error).__name__}
    except memodb.MemoDBError as error:
        place = str(path) in str(error) and len(str(error)) < 2000
        notes = [] if place else [f"names no place, or says too much: {str(error)[:2000]}"]
        return {"outcome": "refused" if place else "wrong", "error": type(error).__name__, "notes": notes}
    except BaseException:
        return {"outcome": "error", "error": traceback.format_exc()[-1500:]}


def imprint(path: Path) -> dict[str, Any]:
    """Return what a reader must leave as it is: all but LMDB's lock files."""
    found = {}
    for file in sorted(path.rglob("*")):
        if file.name != "lock.mdb":
            where = os.fspath(file.relative_to(path))
            size = file.stat().st_size if file.is_file() else -1
            found[where] = (size, zlib.crc32(file.read_bytes()) if 0 <= size < 1 << 26 else 0)
    return found


def in_child(path: Path, expected: Any, work: Any) -> dict[str, Any]:
    """Fork, and return what the child says, or what became of it."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        signal.alarm(HANG_SECONDS)
        held = int(Path("/proc/self/statm").read_text().split()[5]) * os.sysconf("SC_PAGESIZE")
        resource.setrlimit(resource.RLIMIT_DATA, (held + MEMORY, held + MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.write(writing, json.dumps(judged(path, expected, work)).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status == -signal.SIGALRM:
        return {"outcome": "hang"}
    if status < 0:
        return {"outcome": f"signal {signal.Signals(-status).name}"}
    return dict(json.loads(said)) if said else {"outcome": "error", "error": f"status {status}"}


def run(case: dict[str, Any], at: Path) -> dict[str, Any]:
    store = Path(case["store"])
    path = at / store.name
    shutil.rmtree(at, ignore_errors=True)
    shutil.copytree(store, path, ignore=shutil.ignore_patterns("lock.mdb"))
    for harm in case["harm"]:
        HARM[harm["kind"]](path / harm["file"], **{name: harm[name] for name in harm if name not in ("kind", "file")})
    for lock in path.rglob("lock.mdb"):
        lock.unlink()
    with np.load(store.with_suffix(".npz")) as loaded:
        expected = dict(loaded)
    before = imprint(path)
    verdict = in_child(path, expected, look)
    if imprint(path) != before:
        verdict["outcome"] = "wrong"
        verdict["notes"] = [*verdict.get("notes", []), "a reader changed the store"]
    if case["writer"] and verdict["outcome"] in ("right", "named", "refused"):
        written = in_child(path, expected, change)
        if written["outcome"] not in ("right", "refused"):
            return written
    return verdict


def main() -> None:
    at = Path(sys.argv[1])
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line), at)), flush=True)


if __name__ == "__main__":
    main()
