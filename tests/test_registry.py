"""Backends by name: listed with what they can do, loaded when asked for, with a remedy where something is missing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import memodb
from memodb import layout
from memodb.backends import registry


def test_the_list_tells_what_each_can_do():
    found = {backend.name: backend for backend in memodb.available_backends()}
    assert {"arena", "files", "memory"} <= set(found)
    for backend in found.values():
        assert backend.installed, backend
        assert {"maps", "durable", "remote", "compresses"} <= set(backend.abilities)
    assert found["files"].abilities["maps"]
    assert not found["memory"].abilities["durable"]


def test_a_missing_driver_gives_the_command(monkeypatch, capsys, disk):
    monkeypatch.setitem(registry._BUILTIN, "tape", ("memodb_no_such_module", "TapeBackend", "pip install memodb-tape"))
    with pytest.raises(memodb.BackendUnavailableError, match="pip install memodb-tape"):
        memodb.MemoDB.create(disk / "store", shape=3, dtype="int8", backend="tape")
    assert not (disk / "store").exists()
    from memodb.cli import main

    assert main(["backends"]) == 0
    assert "no: backend 'tape' cannot be loaded" in capsys.readouterr().out
    assert main(["backends", "--json"]) == 0
    listed = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert listed["arena"]["installed"]
    assert not listed["tape"]["installed"]
    assert "pip install memodb-tape" in listed["tape"]["hint"]


def test_without_zarr(monkeypatch, make):
    monkeypatch.setattr(registry, "find_spec", lambda name: None)
    found = {backend.name: backend for backend in memodb.available_backends()}
    assert not found["zarr"].installed
    with pytest.raises(memodb.BackendUnavailableError, match="pip install zarr"):
        make(backend="zarr")


class _Point:
    """An entry point of somebody else's."""

    def __init__(self, name, loaded):
        self.name, self.loaded, self.dist = name, loaded, None

    def load(self):
        if isinstance(self.loaded, Exception):
            raise self.loaded
        return self.loaded


class _Nameless(registry.ValueBackend):
    """A subclass that says nothing of itself."""


@pytest.mark.parametrize("loaded", [SyntaxError("no Python"), RuntimeError("no licence"), dict, _Nameless])
def test_a_broken_third_party_stops_nobody_else(monkeypatch, make, loaded):
    monkeypatch.setattr(registry, "entry_points", lambda group: [_Point("broken", loaded)])
    found = {backend.name: backend for backend in memodb.available_backends()}
    assert not found["broken"].installed
    assert found["arena"].installed
    with pytest.raises(memodb.BackendUnavailableError, match="broken"):
        make(backend="broken")
    make()


def test_ours_is_not_replaced(monkeypatch, make):
    monkeypatch.setattr(registry, "entry_points", lambda group: [_Point("arena", dict)])
    assert make().backend_name == "arena"


def test_an_unknown_name_names_those_there_are(make):
    with pytest.raises(memodb.BackendNotFoundError, match="arena, files"):
        make(backend="arean")


def test_nothing_is_loaded_that_was_not_asked_for(path):
    program = (
        "import sys, memodb; memodb.MemoDB.create(sys.argv[1], shape=3, dtype='i1').close(); "
        "print([name for name in sys.modules if name.split('.')[0] in ('zarr', 'fsspec', 'obstore')])"
    )
    done = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


class TestMemoryPath:
    def test_a_throwaway_store(self):
        with memodb.MemoDB.create(":memory:", shape=3, dtype="int8", key_dim=2) as db:
            assert db.backend_name == "memory"
            ids = db.put([[1, 2, 3], [4, 5, 6]], [[0, 0], [1, 1]])
            assert db.multiget(ids[::-1]).tolist() == [[4, 5, 6], [1, 2, 3]]
            assert db.search([[1, 1]]).ids.tolist() == [[1]]
            where = db.path
            with memodb.MemoDB.open(where) as reader:
                assert reader.multiget([0]).tolist() == [[1, 2, 3]]
        assert not where.exists()

    def test_two_are_two(self):
        one, two = (memodb.MemoDB.create(":memory:", shape=1, dtype="int8") for _ in range(2))
        with one, two:
            one.put([[1]])
            assert (len(one), len(two)) == (1, 0)

    def test_any_backend(self):
        with memodb.MemoDB.create(":memory:", shape=1024, dtype="float32", backend="arena") as db:
            assert db.backend_name == "arena"
            where = db.path
        assert not where.exists()

    def test_it_cannot_be_opened_by_that_name(self):
        with pytest.raises(memodb.StoreNotFoundError, match="new store each time"):
            memodb.MemoDB.open(":memory:")

    def test_nothing_is_left_by_a_process_that_does_not_close(self):
        program = (
            "import memodb; db = memodb.MemoDB.create(':memory:', shape=1, dtype='int8'); db.put([[1]]); print(db.path)"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert not Path(done.stdout.strip()).exists()
        assert done.stderr == ""

    def test_what_a_killed_process_left_is_removed_by_the_next(self, tmp_path, monkeypatch):
        """A folder of a live process stays, and so does one that nobody has locked yet."""
        program = (
            "import memodb, sys; db = memodb.MemoDB.create(':memory:', shape=1, dtype='int8', backend='arena');"
            "db.put([[1]]); print(db.path, flush=True); sys.stdin.read()"
        )
        monkeypatch.setattr(layout, "SHM", tmp_path)
        children = [
            subprocess.Popen(
                [sys.executable, "-c", f"from pathlib import Path; import memodb.layout as layout; "
                 f"layout.SHM = Path({str(tmp_path)!r}); {program}"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )
            for _ in range(2)
        ]  # fmt: skip
        killed, alive = (Path(child.stdout.readline().strip()) for child in children)
        children[0].kill()
        children[0].wait()
        assert (killed / "catalog" / "data.mdb").exists(), "a killed process leaves its store"
        beginning = tmp_path / "memodb-memory-1-begun"
        beginning.mkdir()
        (beginning / "writer.lock").touch()
        foreign = tmp_path / "memodb-memory-2-link"
        foreign.symlink_to(alive)
        with memodb.MemoDB.create(":memory:", shape=1, dtype="int8"):
            assert not killed.exists()
            assert (alive / "catalog" / "data.mdb").exists()
            assert beginning.exists()
            assert foreign.is_symlink()
        for child in children:
            child.communicate()
        assert not alive.exists(), "the live one went on, and tidied up after itself"


def test_records_in_memory_are_not_another_process_s(disk):
    program = (
        "import sys, memodb; db = memodb.MemoDB.create(sys.argv[1], shape=1, dtype='int8', backend='memory'); "
        "db.put([[1]]); db.close()"
    )
    subprocess.run([sys.executable, "-c", program, disk / "store"], check=True)
    with pytest.raises(memodb.StoreNotFoundError, match="memory of a process"):
        memodb.MemoDB.open(disk / "store")
