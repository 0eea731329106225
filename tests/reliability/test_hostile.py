"""Hostile files: what others may put into, or in place of, a store (docs/security.md). Each attempt is kept by name."""

from __future__ import annotations

import json
import os
import pickle
import pickletools
import shutil
import stat
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import attacks
import effort
import pytest
from attacks import STRANGER
from programs import run_program

import memodb
from memodb.catalog import Catalog
from memodb.testing import random_records

BACKENDS = ("arena", "files", "lmdb", "zarr")
#: A child that says nothing for so long hangs.
DEADLINE = 120 if not effort.is_long() else 600

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can play two users")


@pytest.fixture(scope="session")
def attempts() -> Iterator[Callable[[str], list[dict[str, Any]]]]:
    """Return a function that has every attempt on a store of a backend made, once, in a process of their own."""

    @cache
    def make(backend: str) -> list[dict[str, Any]]:
        folder = top / backend
        folder.mkdir()
        command = [sys.executable, attacks.__file__, str(folder), backend, *(["every"] if effort.is_long() else [])]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE)
            out, status = done.stdout, f"status {done.returncode}\n{done.stderr}"
        except subprocess.TimeoutExpired as error:
            out, status = (error.stdout or b"").decode(), "no answer"
        lines = [json.loads(line) for line in out.splitlines()]
        assert lines, status
        assert lines[-1] == {"done": True}, f"the last attempt hung or crashed: {lines[-1]}, {status}"
        tried = [line for line in lines if "attack" in line]
        effort.report(
            "hostile files",
            attempts=len(tried),
            refused=sum(line.get("found", "").startswith("UnsafePathError") for line in tried),
            **{f"of kind {kind}": n for kind, n in Counter(line["attack"].replace("-", " ") for line in tried).items()},
        )
        return lines

    top = Path(tempfile.mkdtemp(prefix=f"memodb-test-{os.getpid()}-", dir=memory_folder()))
    yield make
    shutil.rmtree(top)


def memory_folder() -> Path:
    shm = Path("/dev/shm")
    return shm if os.access(shm, os.W_OK) else Path(tempfile.gettempdir())


@pytest.mark.parametrize("name", [*attacks.ON_FILES, "file"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_put_in_place_of_ours_is_refused(attempts, backend, name):
    """Every file and directory of a store, read and written: an error by name, no hang, nothing followed."""
    first, *lines = attempts(backend)
    tried = [line for line in lines if line.get("attack") == name]
    at = {line["victim"] for line in tried}
    assert at == ({*first["files"]} if name in attacks.ON_FILES else set()) | (
        {*first["directories"]} if name in attacks.ON_DIRECTORIES else set()
    )
    if skipped := [line["skipped"] for line in tried if "skipped" in line]:
        pytest.skip(skipped[0])
    wrong = [line for line in tried if not line["found"].startswith("UnsafePathError: ") or line["followed"]]
    assert wrong == []
    assert all(Path(line["victim"]).name in line["found"] for line in tried), "a message does not name the path"


def modes(store: Path) -> dict[str, int]:
    return {str(p.relative_to(store.parent)): stat.S_IMODE(p.stat().st_mode) for p in [store, *store.rglob("*")]}


MAKE_UNDER_UMASK = """
import os, sys
sys.path.insert(0, sys.argv[5])
from pathlib import Path
import memodb, attacks

os.umask(int(sys.argv[3], 8))
if int(sys.argv[4]):
    os.setgroups([])
    os.setgid(int(sys.argv[4]))
    os.setuid(int(sys.argv[4]))
path = Path(sys.argv[1])
attacks.make(path, sys.argv[2])
attacks.write(path)
memodb.copy(path, path.parent / "copy", backend=sys.argv[2])
with memodb.MemoDB.create(":memory:", shape=(4,), dtype="float32", backend=sys.argv[2]) as db:
    db.put([[1, 2, 3, 4]])
    for file in [db.path, *db.path.rglob("*")]:
        assert file.stat().st_mode & 0o777 == (0o700 if file.is_dir() else 0o600), file
"""


@pytest.mark.parametrize("umask", ["000", "022", "777"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_stores_are_the_owners_alone_whatever_the_umask(disk, backend, umask):
    """As a user who is not root where that can be played: permissions do not stop root."""
    home = disk / "home"
    home.mkdir()
    who = 0
    if os.geteuid() == 0 and readable_by_all(disk):
        who = STRANGER
        os.chown(home, who, who)
    run_program(disk, MAKE_UNDER_UMASK, home / "store", backend, umask, who, Path(attacks.__file__).parent)
    for store in (home / "store", home / "copy"):
        found = modes(store)
        wrong = {name: oct(mode) for name, mode in found.items() if mode != (0o700, 0o600)[(home / name).is_file()]}
        assert wrong == {}
        assert len(found) > 6


def readable_by_all(folder: Path) -> bool:
    """Let another user reach `folder`, Python and memodb; tell whether that is so."""
    folder.chmod(0o711)
    needed = [folder, Path(sys.executable).resolve(), Path(sys.prefix), Path(memodb.__file__), Path(attacks.__file__)]
    return all(step.stat().st_mode & (0o001 if step.is_dir() else 0o004) for at in needed for step in (at, *at.parents))


def test_a_directory_that_was_there_is_closed_to_others(path):
    path.mkdir(mode=0o755)
    with memodb.MemoDB.create(path, shape=(2,), dtype="float32"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700


@pytest.mark.parametrize(("permissions", "of_files", "of_readers"), [(0o750, 0o640, 0o660), (0o770, 0o660, 0o660)])
def test_sharing_with_a_group_is_a_choice(path, shared_backend, permissions, of_files, of_readers):
    settings = {"shape": (2,), "dtype": "float32", "key_dim": 2, **shared_backend}
    with memodb.MemoDB.create(path, permissions=permissions, **settings) as db:
        ids = db.put([[1, 2], [3, 4]], [[0, 0], [1, 1]])
    for name, mode in modes(path).items():
        is_directory = (path.parent / name).is_dir()
        expected = permissions if is_directory else of_readers if name.endswith("lock.mdb") else of_files
        assert mode & 0o777 == expected, name
        if is_directory and permissions == 0o770:
            assert (path.parent / name).stat().st_mode & stat.S_ISGID, f"{name} does not hand its group on"
    for mode in ("r", "r+"):
        with memodb.MemoDB.open(path, mode) as db:
            assert db.multiget(ids).tolist() == [[1, 2], [3, 4]]
    (path / "catalog" / "lock.mdb").chmod(0o666)
    with pytest.raises(memodb.UnsafePathError, match=r"lock\.mdb may be written by others"):
        memodb.MemoDB.open(path)


@pytest.mark.parametrize("permissions", [0o777, 0o755, 0o600, 0, True, "700", None])
def test_permissions_that_no_store_has(path, permissions):
    with pytest.raises(memodb.InvalidOptionError, match="0o750"):
        memodb.MemoDB.create(path, shape=(2,), dtype="float32", permissions=permissions)
    assert not path.exists()


def test_reading_may_be_widened_afterwards(make, path):
    """``chmod -R g+rX``: what is readable by others is no danger to who opens it."""
    with make() as db:
        db.put(random_records(2, (2, 1024), "float32"))
    for file in [path, *path.rglob("*")]:
        file.chmod(file.stat().st_mode | (0o055 if file.is_dir() else 0o044))
    (path / "catalog" / "lock.mdb").chmod(0o664)
    with memodb.MemoDB.open(path) as db:
        assert len(db) == 2


# --- the store's own place ---


def test_a_store_that_everybody_may_write(make, path):
    make().close()
    path.chmod(0o707)
    for mode in ("r", "r+"):
        with pytest.raises(memodb.UnsafePathError, match="written by everybody"):
            memodb.MemoDB.open(path, mode)


def test_the_path_itself_may_be_a_link_of_ones_own(make, path, shm):
    with make() as db:
        db.put(random_records(2, (2, 1024), "float32"))
    (shm / "link").symlink_to(path)
    with memodb.MemoDB.open(shm / "link", "r+") as db:
        assert len(db) == 2


def test_creation_through_a_dangling_link(path, shm):
    path.symlink_to(shm / "elsewhere")
    with pytest.raises(memodb.StoreExistsError):
        memodb.MemoDB.create(path, shape=(2,), dtype="float32")
    assert not (shm / "elsewhere").exists()


@pytest.mark.parametrize("what", ["fifo", "socket"])
def test_something_else_at_the_path(path, shm, what):
    attack = attacks.ON_FILES[what]
    path.touch()
    attack(path, shm / "good")
    with pytest.raises(memodb.StoreExistsError):
        memodb.MemoDB.create(path, shape=(2,), dtype="float32")
    with pytest.raises(memodb.StoreNotFoundError):
        memodb.MemoDB.open(path)


@needs_root
@pytest.mark.parametrize("mode", [0o700, 0o777, 0o1777])
def test_squatting_on_the_path_of_a_store_to_be(path, mode):
    """A directory that another user made first in /dev/shm, empty, to see or exchange what is put into it."""
    path.mkdir()
    path.chmod(mode)
    os.chown(path, STRANGER, STRANGER)
    with pytest.raises(memodb.UnsafePathError, match=f"belongs to user {STRANGER}"):
        memodb.MemoDB.create(path, shape=(2,), dtype="float32")
    assert list(path.iterdir()) == []


@needs_root
@pytest.mark.parametrize("is_cut_off", [True, False])
def test_squatting_with_a_store(make, path, is_cut_off):
    """A hostile store at the path: neither opened, nor taken for what a creation left, nor touched."""
    make().close()
    if is_cut_off:
        (path / "catalog" / "data.mdb").write_bytes(b"")
    give_away(path)
    before = attacks.digest(path)
    for mode in ("r", "r+"):
        with pytest.raises(memodb.UnsafePathError, match=f"owner={STRANGER}"):
            memodb.MemoDB.open(path, mode)
    with pytest.raises(memodb.UnsafePathError, match=f"belongs to user {STRANGER}"):
        memodb.MemoDB.create(path, shape=(2,), dtype="float32")
    with pytest.raises(memodb.UnsafePathError):
        memodb.copy(path, path.parent / "copy")
    assert attacks.digest(path) == before


@needs_root
def test_a_link_of_another_user(make, path, shm):
    """Who planted the link chooses which of my stores I write."""
    make().close()
    (shm / "link").symlink_to(path)
    os.chown(shm / "link", STRANGER, STRANGER, follow_symlinks=False)
    with pytest.raises(memodb.UnsafePathError, match="symbolic link of user"):
        memodb.MemoDB.open(shm / "link")


def give_away(path: Path) -> None:
    for file in [path, *path.rglob("*")]:
        os.chown(file, STRANGER, STRANGER)


# --- another user ---

SPY = """
import os, sys
import memodb

os.setgroups([int(group) for group in sys.argv[3].split(",") if group])
os.setgid(54322)
os.setuid(54322)
tried = {
    "list": lambda: os.listdir(sys.argv[1]),
    "read": lambda: open(sys.argv[2], "rb").read(),
    "open": lambda: memodb.MemoDB.open(sys.argv[1]).multiget([0, 1]),
    "open, trusting": lambda: memodb.MemoDB.open(sys.argv[1], owner=int(sys.argv[4])).multiget([0, 1]),
    "write": lambda: memodb.MemoDB.open(sys.argv[1], "r+", owner=int(sys.argv[4])).close(),
}
for name, attempt in tried.items():
    try:
        attempt()
        print(name, "done")
    except Exception as error:
        print(name, type(error).__name__)
"""


@needs_root
@pytest.mark.parametrize("permissions", [0o700, 0o750, 0o770])
def test_what_a_second_user_can_do(disk, shared_backend, permissions):
    """Nothing, by default; as one of the group that the store is shared with: read, once the owner is trusted."""
    if not readable_by_all(disk):
        pytest.skip("Python or memodb lies where another user cannot read it")
    home, group = disk / "home", STRANGER + 10
    home.mkdir()
    os.chown(home, 0, group)
    home.chmod(0o2755)  # what is made in there gets its group
    path = home / "store"
    with memodb.MemoDB.create(path, shape=(2,), dtype="float32", permissions=permissions, **shared_backend) as db:
        db.put([[1, 2], [3, 4]])
    give_to_user(path, STRANGER)
    record = next(file for file in (path / "values").rglob("*") if file.is_file())
    for groups in ("", str(group)):
        out = run_program(disk, SPY, path, record, groups, STRANGER)
        found = dict(line.rsplit(" ", 1) for line in out.splitlines())
        if not groups or permissions == 0o700:
            assert found == {
                "list": "PermissionError",
                "read": "PermissionError",
                "open": "StoreAccessError",
                "open, trusting": "StoreAccessError",
                "write": "StoreAccessError",
            }
        else:
            assert found == {
                "list": "done",
                "read": "done",
                "open": "UnsafePathError",
                "open, trusting": "done",
                "write": "done" if permissions == 0o770 else "StoreAccessError",
            }


MEMBER = """
import os, sys
import memodb

os.setgroups([int(sys.argv[2])])
os.setgid(54322)
os.setuid(54322)
with memodb.MemoDB.open(sys.argv[1], "r+", owner=int(sys.argv[3])) as db:
    print(db.put([[5, 6]] * 3000).tolist()[-1], db.verify())
"""


@needs_root
def test_a_member_whose_own_group_is_another_one_writes(disk, shared_backend):
    """In a store whose group is that of its maker, in a directory that hands on none."""
    if not readable_by_all(disk):
        pytest.skip("Python or memodb lies where another user cannot read it")
    path, group = disk / "store", STRANGER + 10
    before = os.getegid()
    os.setegid(group)
    try:
        with memodb.MemoDB.create(path, shape=(2,), dtype="float32", permissions=0o770, **shared_backend) as db:
            db.put([[1, 2], [3, 4]])
    finally:
        os.setegid(before)
    give_to_user(path, STRANGER)
    assert run_program(disk, MEMBER, path, group, STRANGER).split() == ["3001", "[]"]
    with memodb.MemoDB.open(path, "r+", owner=STRANGER) as db:
        assert db.verify() == []
        assert db.multiget([1, 3001]).tolist() == [[3, 4], [5, 6]]


def give_to_user(path: Path, uid: int) -> None:
    for file in [path, *path.rglob("*")]:
        os.chown(file, uid, -1)


@needs_root
def test_a_trusted_owner(make, path, monkeypatch, shared_backend):
    with make(**shared_backend) as db:
        db.put(random_records(2, (2, 1024), "float32"))
    give_away(path)
    with pytest.raises(memodb.UnsafePathError, match="MEMODB_TRUSTED_OWNERS"):
        memodb.MemoDB.open(path)
    with memodb.MemoDB.open(path, owner=STRANGER) as db, pickle.loads(pickle.dumps(db)) as again:
        assert db.multiget([0, 1]).tobytes() == again.multiget([0, 1]).tobytes()
    monkeypatch.setenv("MEMODB_TRUSTED_OWNERS", f"root, {STRANGER}")
    with memodb.MemoDB.open(path) as db:
        assert len(db) == 2


@pytest.mark.parametrize("owner", ["nobody of that name", -1, True, 1.5])
def test_owners_that_there_are_not(make, path, owner):
    make().close()
    with pytest.raises(memodb.InvalidOptionError, match="owner"):
        memodb.MemoDB.open(path, owner=owner)


# --- settings that lead outside ---


def change_settings(path: Path, **options: Any) -> None:
    catalog = Catalog(path / "catalog")
    catalog.change_settings(options={**catalog.settings["options"], **options})
    catalog.close()


@pytest.mark.parametrize("victim", ["values", "segments", "memodb-0123456789abcdef"])
def test_a_store_whose_settings_name_somebody_elses_directory(make, path, shm, victim):
    """A writer clears the directory of its segments: one that memodb did not make for them is never touched."""
    precious = shm / "precious" / victim
    precious.mkdir(parents=True)
    (precious / "00000009.seg").write_text("precious")
    if victim == "memodb-0123456789abcdef":  # of that name, but in a store
        (precious.parent / "catalog").mkdir()
        (precious.parent / "catalog" / "data.mdb").touch()
    make().close()
    change_settings(path, segments_path=str(precious))
    for mode in ("r", "r+"):
        with pytest.raises((memodb.UnsafePathError, memodb.InvalidOptionError), match="segments"):
            memodb.MemoDB.open(path, mode)
    assert (precious / "00000009.seg").read_text() == "precious"


@needs_root
@pytest.mark.parametrize("backend", ["arena", "zarr"])
def test_a_place_outside_is_the_owners_too(make, path, shm, backend):
    """Records elsewhere are held to the same rule: another user's directory there is refused."""
    (shm / "elsewhere").mkdir()
    options = {"segments_path": shm / "elsewhere"} if backend == "arena" else {"url": str(shm / "elsewhere" / "array")}
    with make(backend=backend, **options) as db:
        db.put(random_records(2, (2, 1024), "float32"))
    (place,) = (shm / "elsewhere").iterdir()
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    give_away(place)
    with pytest.raises(memodb.UnsafePathError, match="belongs to user"):
        memodb.MemoDB.open(path)


@needs_root
def test_a_strangers_store_does_not_use_my_credentials(make, path):
    make(backend="zarr").close()
    change_settings(path, url="s3://bucket/prefix", storage_options={"endpoint_url": "http://127.0.0.1:1"})
    give_away(path)
    with pytest.raises(memodb.UnsafePathError, match="credentials"):
        memodb.MemoDB.open(path, owner=STRANGER)


def test_a_backend_that_nobody_installed_is_not_looked_for(make, path):
    """A name in the settings never becomes an import."""
    make().close()
    catalog = Catalog(path / "catalog")
    catalog.change_settings(backend="os:system")
    catalog.close()
    with pytest.raises(memodb.BackendNotFoundError, match="os:system"):
        memodb.MemoDB.open(path)


# --- the rest ---

GATHER = """
import sys, logging
import memodb
from memodb.gather.costs import Costs, calibration_file, costs_here

logging.basicConfig(stream=sys.stdout, format="%(message)s")
assert costs_here() == Costs(), "costs of an unsafe file were used"
"""


@pytest.mark.parametrize("what", ["fifo", "world-writable", "device"])
def test_measured_costs_are_not_read_from_anything(shm, monkeypatch, what):
    file = shm / "calibration.json"
    file.write_text("{}")
    try:
        attacks.ON_FILES[what](file, shm / "good")
    except attacks.NotHereError as reason:
        pytest.skip(str(reason))
    monkeypatch.setenv("MEMODB_CALIBRATION", str(file))
    assert "calibration.json" in run_program(shm, GATHER, timeout=DEADLINE)


def test_a_pickled_handle_holds_a_path_and_how_to_open_it(make, path):
    with make() as db:
        names = [argument for _, argument, _ in pickletools.genops(pickle.dumps(db)) if isinstance(argument, str)]
    imported = ["builtins", "getattr", "memodb.database", "MemoDB", "_reopened"]
    assert [name for name in names if name != str(path)] == [*imported, "never"]
