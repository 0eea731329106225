"""The ``memodb`` command: output for people and for programs, exit status, messages without tracebacks."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

import memodb
from memodb.cli import main
from memodb.testing import flip_stored_byte, random_records

VALUES = random_records(10, (2, 1024), "int16")
KEYS = np.eye(10, 4, dtype=np.float32) * np.arange(1, 11, dtype=np.float32)[:, None]


@pytest.fixture
def store(make, path):
    db = make(dtype="int16", key_dim=4)
    db.put(VALUES, KEYS)
    db.close()
    return str(path)


@pytest.fixture
def run(capsys):
    """Return a function that runs a command and returns (status, stdout, stderr)."""

    def call(*arguments):
        status = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return status, captured.out, captured.err

    return call


def test_create_and_info(run, path):
    status, out, _ = run(
        "create", path, "--shape", "12x8x8", "--dtype", "bfloat16", "--key-dim", 16, "--index", "HNSW32",
        "--max-bytes", "1GiB", "--option", "durability=relaxed", "--json",
    )  # fmt: skip
    assert status == 0
    assert json.loads(out)["shape"] == [12, 8, 8]
    with memodb.MemoDB.open(path) as db:
        assert (db.spec.shape, db.spec.dtype_name, db.key_dim, db.index_factory) == (
            (12, 8, 8),
            "bfloat16",
            16,
            "HNSW32",
        )
    status, out, _ = run("info", path, "--json")
    facts = json.loads(out)
    assert (status, facts["dtype"], facts["records"], facts["backend"]) == (0, "bfloat16", 0, "arena")
    assert facts["stats"]["records"] == 0
    status, out, _ = run("info", path)
    assert status == 0
    assert "bfloat16" in out


def test_verify_sound_and_damaged(run, store, path):
    status, out, _ = run("verify", store)
    assert (status, "10 records, 0 problems" in out) == (0, True)
    assert flip_stored_byte(path, VALUES[3], 100)
    status, out, _ = run("verify", store)
    assert status == 1
    assert "3" in out
    status, out, _ = run("verify", store, "--json")
    assert status == 1
    assert [problem["id"] for problem in json.loads(out)["problems"]] == [3]


def test_search(run, store, shm):
    status, out, _ = run("search", store, "--key", "0,2,0,0", "-k", 2, "--json")
    assert status == 0
    assert json.loads(out)["hits"][0][0] == {"id": 1, "distance": 0.0}
    np.save(shm / "keys.npy", KEYS[:3])
    status, out, _ = run("search", store, "--keys", shm / "keys.npy", "--json")
    assert [row[0]["id"] for row in json.loads(out)["hits"]] == [0, 1, 2]
    status, out, _ = run("search", store, "--key", "-1,0,0,0", "--json")
    assert status == 0, "a key may begin with a minus sign"
    status, out, _ = run("search", store, "--key", "0,2,0,0", "--max-distance", 0.5)
    assert status == 0
    assert out.splitlines()[1].split() == ["0", "1", "0"]
    status, out, _ = run("search", store, "--key", "0,2,0,0", "--namespace", "none", "--json")
    assert (status, json.loads(out)) == (0, {"hits": [[]]})


def test_get(run, store, shm):
    status, out, _ = run("get", store, 3, 1, "--json")
    rows = json.loads(out)["records"]
    assert (status, [row["id"] for row in rows]) == (0, [3, 1])
    assert rows[0]["max"] == VALUES[3].max()
    assert rows[1]["mean"] == pytest.approx(VALUES[1].mean())
    status, _, _ = run("get", store, 3, 1, "-o", shm / "out.npy")
    assert status == 0
    assert np.array_equal(np.load(shm / "out.npy"), VALUES[[3, 1]])


def test_get_of_an_extension_dtype(run, make, path, shm):
    values = random_records(2, (8,), "bfloat16")
    db = make(shape=(8,), dtype="bfloat16")
    db.put(values)
    db.close()
    status, out, _ = run("get", path, 1, "-o", shm / "out.npy", "--json")
    assert (status, json.loads(out)["stored_as"]) == (0, "uint16")
    assert np.array_equal(np.load(shm / "out.npy"), values[1:].view(np.uint16))
    assert run("get", path, 0, 1)[0] == 0


def test_compact(run, store):
    with memodb.MemoDB.open(store, mode="r+") as db:
        db.delete(range(9))
    status, out, _ = run("compact", store, "--json")
    assert status == 0
    assert json.loads(out)["bytes_returned"] >= 0
    with memodb.MemoDB.open(store) as db:
        assert np.array_equal(db.multiget([9]), VALUES[9:])


def test_copy(run, store, disk):
    status, out, _ = run("copy", store, disk / "copy", "--option", "durability=relaxed", "--json")
    assert (status, json.loads(out)["records"]) == (0, 10)
    with memodb.MemoDB.open(disk / "copy") as db:
        assert np.array_equal(db.multiget(range(10)), VALUES)


def test_bench(run, store):
    status, out, _ = run("bench", store, "--records", 4, "--rounds", 3, "--json")
    figures = json.loads(out)
    assert (status, figures["records"], figures["bytes"]) == (0, 4, 4 * 4096)
    assert {"read alone", "multiget_mapped (map)", "multiget_mapped (copy)", "multiget"} <= set(figures["median_ms"])
    assert all(row["gather+read"] >= row["gather"] >= 0 for row in figures["median_ms"].values())
    status, out, _ = run("bench", store, "--records", 20, "--rounds", 1)
    assert status == 0
    assert "multiget_mapped (copy)" in out


def test_bench_of_what_cannot_be_mapped(run, make, path):
    db = make(shape=(3,))
    db.put(np.zeros((4, 3), np.float32))
    db.close()
    status, out, _ = run("bench", path, "--records", 2, "--rounds", 1, "--json")
    assert status == 0
    assert "multiget_mapped (map)" not in json.loads(out)["median_ms"]


def test_backends(run):
    status, out, _ = run("backends", "--json")
    arena = next(backend for backend in json.loads(out) if backend["name"] == "arena")
    assert (status, arena["installed"], arena["abilities"]["maps"]) == (0, True, True)
    assert "arena" in run("backends")[1]


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["info", "{shm}/nothing"], 1),
        (["verify", "{shm}/nothing"], 1),
        (["get", "{store}", "99"], 1),
        (["create", "{store}", "--shape", "2", "--dtype", "int8"], 1),
        (["copy", "{store}", "{store}"], 1),
        (["get", "{store}", "1", "-o", "{shm}/no/such/folder/x.npy"], 1),
        (["search", "{store}", "--keys", "{shm}/nothing.npy"], 1),
        (["get", "{store}", "-1"], 2),
        (["search", "{store}", "--key", "1,2"], 2),
        (["search", "{store}", "--key", "1,2,3,nan"], 2),
        (["search", "{store}", "--key", "1,2,3,4", "--key", "1,2"], 2),
        (["create", "{shm}/new", "--shape", "2", "--dtype", "float7"], 2),
        (["create", "{shm}/new", "--shape", "2", "--dtype", "int8", "--backend", "none"], 2),
        (["create", "{shm}/new", "--shape", "2", "--dtype", "int8", "--option", "colour=red"], 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_goes_wrong_is_one_line_and_a_status(run, store, shm, arguments, status):
    got, out, err = run(*(argument.format(store=store, shm=shm) for argument in arguments))
    assert got == status
    assert out == ""
    assert err.startswith("memodb: ")
    assert len(err.strip()) > len("memodb: ")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["frobnicate"],
        ["info"],
        ["create", "x", "--dtype", "int8"],
        ["create", "x", "--shape", "2xx3", "--dtype", "int8"],
        ["create", "x", "--shape", "0", "--dtype", "int8"],
        ["create", "x", "--shape", "2", "--dtype", "int8", "--max-bytes", "lots"],
        ["get", "x", "one"],
        ["search", "x"],
        ["search", "x", "--key", "a,b"],
        ["bench", "x", "--rounds", "0"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "nbytes"), [("4096", 4096), ("8GB", 8 * 10**9), ("8GiB", 8 << 30), ("1.5k", 1500), ("2Mi", 2 << 20)]
)
def test_sizes(text, nbytes):
    from memodb.cli.parser import size

    assert size(text) == nbytes


def test_as_a_program(store):
    """The installed command's way: a process, its status, and a reader of its output that goes away early."""
    command = [sys.executable, "-m", "memodb.cli"]
    assert subprocess.run([*command, "info", store], capture_output=True, timeout=120).returncode == 0
    failed = subprocess.run([*command, "info", store + "-not"], capture_output=True, text=True, timeout=120)
    assert (failed.returncode, failed.stdout) == (1, "")
    assert "Traceback" not in failed.stderr
    read, write = os.pipe()
    os.close(read)
    piped = subprocess.run(
        [*command, "info", store, "--json"], stdout=write, stderr=subprocess.PIPE, text=True, timeout=120
    )
    os.close(write)
    assert (piped.returncode, piped.stderr) == (0, "")
