"""File systems with room for a few pages, or for none: whatever is refused changed nothing, and the space comes back.

The room that is left goes from nothing up, page by page, so the records, the catalog, LMDB's list of free pages, the
index that is saved and a segment's last pages are each met by the end of the room.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import effort
import numpy as np
import pytest
import store_model as model
from programs import private_mount, run_program

import memodb

HERE = os.path.dirname(__file__)
#: Pages that are left.
ROOMS = [0, 1, 2, 4, 9, 40] if not effort.is_long() else [*range(64), *range(64, 600, 7)]

LEVELS = """
import os, shutil, sys
sys.path.insert(0, sys.argv[1])
import numpy as np
import memodb
import store_model as model

place, kind = sys.argv[2], sys.argv[3]
path, ballast = place + "/store", place + "/ballast"
refused = done = 0


def attempt(operation, before, after):
    global refused, done
    try:
        operation()
    except memodb.StoreFullError as error:
        assert place in str(error), error
        refused += 1
        return before
    done += 1
    return after


for room in map(int, sys.argv[4].split(",")):
    live = model.make(model.Path(path), kind)
    db = memodb.MemoDB.open(path, "r+")
    with open(ballast, "wb") as file:
        there = os.statvfs(place)
        free = there.f_bavail * there.f_frsize - room * 4096
        while free > 0:
            try:
                os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, free)
                break
            except OSError:  # the file system needs a bit for itself
                free -= 4096
    for _ in range(2):
        more = set(model.BATCH) if live.isdisjoint(model.BATCH) else set()
        if more:
            live = attempt(lambda: model.put(db, model.BATCH), live, live | more)
        model.look_through(db, live)
        gone = {min(live)}
        live = attempt(lambda: db.delete(list(gone)), live, live - gone)
        model.look_through(db, live)
        attempt(db.compact, None, None)
        model.look_through(db, live)
        attempt(lambda: db.reindex("HNSW16"), None, None)
        model.look_through(db, live)
    db.close()
    with memodb.MemoDB.open(path) as db:
        model.look_through(db, live)
    with memodb.MemoDB.open(path, "r+") as db:  # also where there is no room at all: how else could it be made?
        model.look_through(db, live)
        rest = live - {max(live)}
        live = attempt(lambda: db.delete(sorted(rest)), live, live - rest)
        attempt(db.compact, None, None)
        model.look_through(db, live)
        os.unlink(ballast)
        db.compact()
        next_id = db.stats()["next_id"]
        live |= set(model.put(db, range(next_id, next_id + 6)))
        model.look_through(db, live)
        assert not model.leftovers(db), model.leftovers(db)
    shutil.rmtree(path)
print(refused, done)
"""


def ext4(folder: Path) -> tuple[str, ...]:
    """Return the command that runs another one where `folder`/small is a small ext4, or skip."""
    (folder / "small").mkdir()
    image = folder / "image"
    if shutil.which("mkfs.ext4") is None:
        pytest.skip("mkfs.ext4 is not installed")
    image.write_bytes(b"")
    os.truncate(image, 24 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", "-b", "4096", "-O", "^has_journal", image], check=True, timeout=60)
    mount = f'mount -o loop "{image}" "{folder / "small"}" && exec "$@"'
    wrapper = ("unshare", "--mount", "sh", "-c", mount, "sh")
    done = subprocess.run([*wrapper, "true"], capture_output=True, text=True, timeout=60)
    if done.returncode:
        pytest.skip(f"this user cannot mount an image: {done.stderr.strip()}")
    return wrapper


@pytest.mark.parametrize("kind", model.KINDS)
@pytest.mark.parametrize("system", ["tmpfs", "ext4"])
def test_at_every_fill_level(disk, system, kind):
    wrapper = private_mount(disk / "small", "tmpfs", "size=24m") if system == "tmpfs" else ext4(disk)
    rooms = ",".join(map(str, ROOMS))
    told = run_program(disk, LEVELS, HERE, disk / "small", kind, rooms, wrapper=wrapper, timeout=1200)
    refused, done = map(int, told.split())
    assert refused
    assert done
    effort.report("full file systems", levels=len(ROOMS), refused=refused, done=done)


LIMITED = """
import resource, sys
sys.path.insert(0, sys.argv[1])
import memodb
import store_model as model

path, kind = sys.argv[2] + "/store", sys.argv[3]
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
live = model.make(model.Path(path), kind)
refused = 0
for kib in map(int, sys.argv[4].split(",")):
    resource.setrlimit(resource.RLIMIT_FSIZE, (kib << 10, hard))
    try:
        with memodb.MemoDB.open(path, "r+") as db:
            for _ in range(2):
                next_id = db.stats()["next_id"]
                live |= set(model.put(db, range(next_id, next_id + 6)))
    except memodb.StoreFullError:
        refused += 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    with memodb.MemoDB.open(path, "r+") as db:
        model.look_through(db, live)
        assert not model.leftovers(db), model.leftovers(db)
        db.delete(sorted(live)[:-1])
        live = {max(live)}
        db.compact()
        next_id = db.stats()["next_id"]
        live |= set(model.put(db, range(next_id, next_id + 6)))
        model.look_through(db, live)
print(refused)
"""


@pytest.mark.parametrize("kind", model.KINDS)
def test_limits_of_a_file_s_size(disk, kind):
    """RLIMIT_FSIZE: LMDB and the arena meet it somewhere in a file, the others at a file's first bytes."""
    sizes = [4, 20, 64, 300, 1000] if not effort.is_long() else [*range(4, 400, 12), *range(400, 5000, 300)]
    told = run_program(disk, LIMITED, HERE, disk, kind, ",".join(map(str, sizes)), timeout=600)
    assert int(told) >= 1


@pytest.mark.parametrize("kind", model.KINDS)
def test_max_bytes_of_any_backend(folder, kind):
    """Refused, nothing changed, all readable; after delete and compact there is room again, and again."""
    values = np.stack([model.value(i) for i in range(16)])
    keys = np.stack([model.key(i) for i in range(16)])
    limit = 6 << 20
    settings = {**model.KINDS[kind], "shape": model.SHAPE, "dtype": "float32", "key_dim": 2, "max_bytes": limit}
    with memodb.MemoDB.create(folder / "store", **settings) as db:
        for _ in range(2):
            with pytest.raises(memodb.StoreFullError, match="max_bytes"):  # noqa: PT012
                for _ in range(100):
                    db.put(values, keys)
            ids = db.ids()
            assert len(ids) >= 16
            assert len(ids) % 16 == 0
            assert np.array_equal(db.multiget(ids[-16:]), values)
            assert db.stats()["bytes_on_store"] + db.stats()["bytes_catalog"] <= limit
            assert db.verify() == []
            db.delete(ids)
            assert db.compact() > 0
