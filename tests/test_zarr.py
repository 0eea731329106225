"""The zarr backend on this machine: conformance, and what it alone promises. (On another one: test_zarr_s3.py.)"""

import asyncio
import json
import os
import secrets
import shutil
import signal
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, settings
from hypothesis.stateful import precondition, rule
from programs import private_mount, run_program

import memodb
from memodb.backends.zarr_loop import run
from memodb.checksum import crc32c
from memodb.testing import BackendTests, StoreMachine, assert_same_bytes, random_records

SETTINGS = settings(
    max_examples=int(os.environ.get("MEMODB_EXAMPLES", "15")),
    stateful_step_count=30,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
IN_MEMORY = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None


def flip(path, at, mask=0x10):
    """Change one byte of a file."""
    raw = bytearray(path.read_bytes())
    raw[at] ^= mask
    path.write_bytes(raw)


def in_array(place, number):
    """Return a row as zarr alone reads it."""
    return zarr.open_array(place, mode="r")[number].tobytes()


class TestZarr(BackendTests):
    backend = "zarr"

    @pytest.fixture
    def folder(self, shm):
        return shm

    def raw(self, path, number):
        return in_array(path / "values", number)

    def damage(self, path, record, at):
        found = [key for key in (path / "values").glob("c.*") if in_array_equals(path, key, record)]
        flip(found[0], found[0].stat().st_size // 2)
        return True


def in_array_equals(path, key, record):
    return in_array(path / "values", int(key.name.split(".")[1])) == record.tobytes()


class TestZarrOnDisk(TestZarr):
    @pytest.fixture
    def folder(self, disk):
        return disk


class TestZarrPlain(BackendTests):
    """Chunks are plain bytes in files, which the suite itself can damage."""

    backend = "zarr"
    options = {"codec": "none"}  # noqa: RUF012

    @pytest.fixture
    def folder(self, shm):
        return shm

    def raw(self, path, number):
        return in_array(path / "values", number)


class TestZarrShards(BackendTests):
    backend = "zarr"
    options = {"codec": "zstd", "level": 3, "chunk_records": 2, "shard_records": 4}  # noqa: RUF012

    @pytest.fixture
    def folder(self, shm):
        return shm

    def raw(self, path, number):
        # put() of two and of three: the second begins a shard
        return in_array(path / "values", number if number < 2 else number + 2)

    def damage(self, path, record, at):
        return False  # both records of a chunk are damaged: test_a_changed_byte_is_found_by_reading


class TestZarrPlainShards(TestZarrShards):
    options = {"codec": "none", "chunk_records": 2, "shard_records": 4}  # noqa: RUF012
    damage = BackendTests.damage


class TestZarrShardOfOne(TestZarr):
    """A shard of one chunk has an index all the same."""

    options = {"codec": "none", "shard_records": 1}  # noqa: RUF012
    damage = BackendTests.damage


class TestZarrChunks(BackendTests):
    backend = "zarr"
    options = {"codec": "blosc", "chunk_records": 3}  # noqa: RUF012

    @pytest.fixture
    def folder(self, shm):
        return shm

    def raw(self, path, number):
        return in_array(path / "values", number if number < 2 else number + 1)


class TestZarrInThisProcess(BackendTests):
    backend = "zarr"

    @pytest.fixture
    def folder(self, disk):
        self.options = {"url": f"memory://{secrets.token_hex(4)}"}
        return disk

    def test_copy_keeps_everything(self, folder):
        self.create = lambda path, **settings: memodb.MemoDB.create(
            path, backend="zarr", **{"url": f"memory://{secrets.token_hex(4)}", **settings}
        )
        super().test_copy_keeps_everything(folder)


class Zarr(StoreMachine):
    backend = "zarr"
    parent = IN_MEMORY


class ZarrOnDisk(Zarr):
    parent = None
    options = {"codec": "none"}  # noqa: RUF012


class ZarrShards(Zarr):
    options = {"chunk_records": 2, "shard_records": 4}  # noqa: RUF012
    shape = (3, 5)


class ZarrChunks(Zarr):
    options = {"codec": "blosc", "chunk_records": 3}  # noqa: RUF012


class ZarrInThisProcess(Zarr):
    """No other process can read it, and each store needs a name of its own."""

    def __init__(self):
        super().__init__()
        self.shared = False
        self.options = {"url": f"memory://{secrets.token_hex(8)}"}

    @precondition(lambda self: self.copies < 2)
    @rule()
    def copy(self):
        self.options = {"url": f"memory://{secrets.token_hex(8)}"}
        super().copy()


TestZarrMachine = Zarr.TestCase
TestZarrMachineOnDisk = ZarrOnDisk.TestCase
TestZarrMachineShards = ZarrShards.TestCase
TestZarrMachineChunks = ZarrChunks.TestCase
TestZarrMachineInThisProcess = ZarrInThisProcess.TestCase
TestZarrMachine.settings = SETTINGS
TestZarrMachineOnDisk.settings = SETTINGS
TestZarrMachineShards.settings = SETTINGS
TestZarrMachineChunks.settings = SETTINGS
TestZarrMachineInThisProcess.settings = SETTINGS


# What is written


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_extension_dtypes_are_unsigned_integers_with_their_name(make, path, dtype):
    values = random_records(2, (2, 64), dtype)
    make(backend="zarr", shape=(2, 64), dtype=dtype).put(values)
    array = zarr.open_array(path / "values", mode="r")
    assert array.dtype == f"uint{8 * values.dtype.itemsize}"
    assert array.attrs["dtype"] == dtype
    assert array[:].tobytes() == values.tobytes()


@pytest.mark.parametrize("options", [{}, {"chunk_records": 2, "shard_records": 4}])
def test_zeros_of_either_sign_are_written(make, path, options):
    """To zarr -0.0 equals the fill value, and a chunk of nothing else need not be written."""
    zeros = np.zeros((2, 2, 1024), np.float32)
    with make(backend="zarr", **options) as db:
        db.put(np.concatenate([-zeros, zeros]))
        assert_same_bytes(db.multiget([0, 1, 2, 3]), np.concatenate([-zeros, zeros]))
    assert np.signbit(zarr.open_array(path / "values", mode="r")[0]).all()
    assert [file.name for file in (path / "values").glob("c.*")] != []


def test_a_put_begins_an_object_and_none_is_written_twice(make, path):
    values = random_records(5, (2, 1024), "float32")
    with make(backend="zarr", chunk_records=3) as db:
        db.put(values[:2])
        before = {file: (file.read_bytes(), file.stat().st_ino) for file in (path / "values").glob("c.*")}
        db.put(values[2:])
        assert_same_bytes(db.multiget(range(5)), values)
        assert all((file.read_bytes(), file.stat().st_ino) == was for file, was in before.items())
    array = zarr.open_array(path / "values", mode="r")
    assert array.shape == (6, 2, 1024)
    assert not array[2].any(), "the row that was skipped"


def test_what_a_killed_writer_left_is_cut_off(make, path, shm):
    """Rows that were written, and half-written files, without a commit."""
    values = random_records(5, (2, 1024), "float32")
    with make(backend="zarr") as db:
        db.put(values[:2])
    shutil.copytree(path, shm / "older")
    with memodb.MemoDB.open(path, mode="r+") as db:
        db.put(values[2:])
    (path / "values" / "c.5.0.0123.partial").touch()
    shutil.rmtree(path / "catalog")
    shutil.copytree(shm / "older" / "catalog", path / "catalog")
    with memodb.MemoDB.open(path, mode="r+") as db:
        assert {file.name for file in (path / "values").iterdir()} == {"zarr.json", "c.0.0.0", "c.1.0.0"}
        assert zarr.open_array(path / "values", mode="r").shape[0] == 2
        db.put(values[2:])
        assert_same_bytes(db.multiget(range(5)), values)
        assert db.verify() == []


def test_a_metadata_file_cut_short_is_written_anew_by_the_next_writer(make, path):
    """Some file systems leave it empty after a power cut."""
    values = random_records(3, (2, 1024), "float32")
    with make(backend="zarr") as db:
        db.put(values)
    before = (path / "values" / "zarr.json").read_bytes()
    (path / "values" / "zarr.json").write_bytes(b"")
    with pytest.raises(memodb.CorruptionError, match=r"zarr\.json.*r\+"):
        memodb.MemoDB.open(path)
    memodb.MemoDB.open(path, mode="r+").close()
    assert (path / "values" / "zarr.json").read_bytes() == before
    with memodb.MemoDB.open(path) as db:
        assert_same_bytes(db.multiget(range(3)), values)


def test_another_array_in_its_place_is_refused(make, path, shm):
    for at in (path, shm / "other"):
        with make(at, backend="zarr") as db:
            db.put(random_records(1, (2, 1024), "float32"))
    shutil.rmtree(path / "values")
    shutil.copytree(shm / "other" / "values", path / "values")
    for mode in ("r", "r+"):
        with pytest.raises(memodb.StoreExistsError, match="another store"):
            memodb.MemoDB.open(path, mode=mode)


def test_compaction_removes_objects_of_dead_records_only(make, path):
    values = random_records(8, (2, 1024), "float32")
    with make(backend="zarr", codec="none", chunk_records=2) as db:
        db.put(values)
        used = db.stats()["bytes_on_store"]
        db.delete([0, 1, 2, 6, 7])
        assert used == values.nbytes
        assert db.compact() == 4 * values[0].nbytes
        assert sorted(file.name for file in (path / "values").glob("c.*")) == ["c.1.0.0", "c.2.0.0"]
        assert_same_bytes(db.multiget([3, 4, 5]), values[3:6])
        db.delete([3, 4, 5])
        db.compact()
        assert db.stats()["bytes_on_store"] == 0


FILLING = """
import os, sys, numpy as np, memodb
from memodb.testing import assert_same_bytes, random_records

path = sys.argv[1] + "/store"
db = memodb.MemoDB.create(path, shape=(64, 1024), dtype="float32", backend="zarr", codec="none")
model = {}
for seed in range(1000):
    values = random_records(5, (64, 1024), "float32", seed)
    try:
        ids = db.put(values)
    except memodb.StoreFullError as error:
        assert path in str(error), error
        break
    model.update(zip(ids.tolist(), values))
else:
    raise AssertionError("the file system never got full")
assert len(model) >= 30, len(model)
assert_same_bytes(db.multiget(sorted(model)), np.stack([model[i] for i in sorted(model)]))
assert db.verify() == []
db.close()
db = memodb.MemoDB.open(path, mode="r+")
left = [name for name in os.listdir(path + "/values") if name != "zarr.json"]
assert len(left) == len(model), "what did not fit was removed"
db.delete(sorted(model)[:10])
assert db.compact() > 0
ids = db.put(values)
assert_same_bytes(db.multiget(ids), values)
assert db.verify() == []
print("done")
"""


def test_a_full_file_system(shm):
    inside = private_mount(shm / "small", "tmpfs", "size=24m")
    assert "done" in run_program(shm, FILLING, shm / "small", wrapper=inside)


# What is missing or damaged


@pytest.mark.parametrize(
    "options",
    [{"codec": "none"}, {}, {"shard_records": 2}, {"packed_dtype": "int8"}, {"url": "elsewhere"}, {"url": "memory://"}],
    ids=str,
)
def test_a_missing_chunk_is_never_zeros(make, path, shm, options):
    if "url" in options:
        options = {"url": str(shm / "far") if "memory" not in options["url"] else f"memory://{secrets.token_hex(4)}"}
    db = make(backend="zarr", **options)
    db.put(np.ones((4, 2, 1024), np.float32))
    if str(options.get("url")).startswith("memory"):
        from memodb.backends.zarr_store import _MEMORY

        del _MEMORY[options["url"].removeprefix("memory://")]["c.0.0.0"]
    else:
        next(shm.rglob("c.0.0.0")).unlink()
    with pytest.raises(memodb.CorruptionError, match=r"c\.0\.0\.0"):
        db.multiget([3, 0])
    assert 0 in [problem.id for problem in db.verify()]
    assert (db.multiget([3]) == 1).all()


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_a_chunk_that_its_shard_does_not_name_is_never_zeros(make, path, codec):
    db = make(backend="zarr", codec=codec, shard_records=2)
    db.put(np.ones((2, 2, 1024), np.float32))
    shard = path / "values" / "c.0.0.0"
    raw = shard.read_bytes()
    index = np.frombuffer(raw[-36:-4], "<u8").copy()
    index[:2] = (1 << 64) - 1
    shard.write_bytes(raw[:-36] + index.tobytes() + crc32c(index).to_bytes(4, "little"))
    assert not zarr.open_array(path / "values", mode="r")[0].any(), "zarr takes it for the fill value"
    with pytest.raises(memodb.CorruptionError, match=r"c\.0\.0\.0"):
        db.multiget([0])
    assert (db.multiget([1]) == 1).all()


@pytest.mark.parametrize("at", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("options", [{}, {"shard_records": 4}, {"packed_dtype": "int8"}], ids=str)
def test_a_changed_byte_is_found_by_reading(make, path, options, at):
    with make(backend="zarr", **options) as db:
        db.put(np.arange(4 * 2048, dtype=np.float32).reshape(4, 2, 1024) % 100)
    file = path / "values" / "c.0.0.0"
    flip(file, int(file.stat().st_size * at))
    with memodb.MemoDB.open(path) as db, pytest.raises(memodb.CorruptionError, match=r"(row|shard).*c\.0\.0\.0"):
        db.multiget(range(4))


@pytest.mark.parametrize("options", [{"codec": "none"}, {}, {"codec": "blosc"}, {"shard_records": 1}], ids=str)
def test_a_chunk_cut_short_is_found_by_reading(make, path, options):
    with make(backend="zarr", **options) as db:
        db.put(np.ones((2, 2, 1024), np.float32))
    file = path / "values" / "c.1.0.0"
    file.write_bytes(file.read_bytes()[:-10])
    with memodb.MemoDB.open(path) as db:
        with pytest.raises(memodb.CorruptionError, match=r"c\.1\.0\.0"):
            db.multiget([0, 1])
        assert [problem.id for problem in db.verify()] == [1]


# Elsewhere


@pytest.mark.parametrize("form", ["{}", "file://{}"])
def test_a_directory_elsewhere(make, path, disk, form):
    values = random_records(3, (2, 1024), "float32")
    with make(backend="zarr", url=form.format(disk / "array")) as db:
        db.put(values)
        assert db.stats()["values_path"] == str(disk / "array")
    assert not any((path / "values").iterdir())
    assert zarr.open_array(disk / "array", mode="r")[:].tobytes() == values.tobytes()
    with memodb.MemoDB.open(path) as db:
        assert_same_bytes(db.multiget([2, 0]), values[[2, 0]])


@pytest.mark.parametrize("name", ["zarr.json", "other.txt"])
def test_what_is_at_the_url_already_is_not_touched(path, disk, name):
    (disk / name).write_text("mine")
    with pytest.raises(memodb.StoreExistsError, match=str(disk)):
        memodb.MemoDB.create(path, shape=(2,), dtype="float32", backend="zarr", url=str(disk))
    assert [(file.name, file.read_text()) for file in disk.iterdir()] == [(name, "mine")]
    assert not path.exists()


def test_a_name_in_memory_is_taken_once(make, shm):
    url = f"memory://{secrets.token_hex(4)}"
    make(shm / "first", backend="zarr", url=url).put(np.ones((1, 2, 1024), np.float32))
    with pytest.raises(memodb.StoreExistsError, match=url):
        make(shm / "second", backend="zarr", url=url)


def test_what_was_put_into_memory_is_a_copy(make):
    values = random_records(2, (2, 1024), "float32")
    db = make(backend="zarr", codec="none", url=f"memory://{secrets.token_hex(4)}")
    ids = db.put(values)
    values[:] = 0
    assert_same_bytes(db.multiget(ids), random_records(2, (2, 1024), "float32"))


def test_memory_of_another_process_is_not_there(make, path, shm):
    make(backend="zarr", url="memory://mine").put(np.ones((1, 2, 1024), np.float32))
    said = run_program(shm, OPEN, path)
    assert "StoreNotFoundError" in said
    assert "memory://mine" in said


OPEN = """
import sys
import memodb
try:
    memodb.MemoDB.open(sys.argv[1])
except memodb.MemoDBError as error:
    print(type(error).__name__, error)
"""


# Zipped


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("options", [{}, {"codec": "none"}, {"codec": "none", "shard_records": 4}], ids=str)
def test_a_zip_of_the_values_is_read(make, path, options, compression):
    values = random_records(6, (2, 1024), "float32")
    with make(backend="zarr", key_dim=2, **options) as db:
        db.put(values, np.zeros((6, 2)))
    zip_values(path, compression)
    with memodb.MemoDB.open(path) as db:
        assert_same_bytes(db.multiget([5, 0, 0]), values[[5, 0, 0]])
        assert db.verify() == []
        assert db.stats()["values_path"] == str(path / "values.zip")
        assert in_child(lambda: db.multiget([5, 0]).tobytes() == values[[5, 0]].tobytes())
        assert_same_bytes(db.multiget([1]), values[[1]])
    with pytest.raises(memodb.StoreAccessError, match="unpack"):
        memodb.MemoDB.open(path, mode="r+")
    assert not (path / "values").exists()


def test_a_damaged_zip_is_said_to_be(make, path):
    with make(backend="zarr", codec="none") as db:
        db.put(np.ones((2, 2, 1024), np.float32))
    zip_values(path, zipfile.ZIP_STORED)
    raw = (path / "values.zip").read_bytes()
    flip(path / "values.zip", raw.index(np.ones(1024, np.float32).tobytes()) + 100)
    with memodb.MemoDB.open(path) as db, pytest.raises(memodb.CorruptionError, match="row"):
        db.multiget([0, 1])
    (path / "values.zip").write_bytes(raw[:100])
    with pytest.raises(memodb.CorruptionError, match=r"values\.zip"):
        memodb.MemoDB.open(path)


def zip_values(path, compression):
    with zipfile.ZipFile(path / "values.zip", "w", compression) as packed:
        for file in (path / "values").iterdir():
            packed.write(file, file.name)
    shutil.rmtree(path / "values")


# Processes, threads, imports


def in_child(check):
    """Return what `check` says in a forked child."""
    pid = os.fork()
    if pid == 0:
        status = 2
        try:
            status = 0 if check() else 1
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.mark.parametrize(
    "options",
    [{}, {"codec": "none"}, {"codec": "blosc"}, {"packed_dtype": "int8"}, {"url": "memory://forked"}],
    ids=str,
)
def test_a_forked_child_reads(make, path, options):
    values = np.arange(4 * 2048, dtype=np.float32).reshape(4, 2, 1024) % 100
    db = make(backend="zarr", **options)
    db.put(values)
    assert_same_bytes(db.multiget([0]), values[:1])
    assert in_child(lambda: db.multiget([3, 0]).tobytes() == values[[3, 0]].tobytes() and db.verify() == [])
    db.put(values)
    assert_same_bytes(db.multiget([4, 3]), values[[0, 3]])


def test_many_threads_read(make):
    values = random_records(16, (2, 1024), "float32")
    db = make(backend="zarr", packed_dtype=None, chunk_records=2, url=f"memory://{secrets.token_hex(4)}")
    db.put(values)
    with ThreadPoolExecutor(8) as pool:
        for i, found in enumerate(pool.map(lambda i: db.multiget([i % 16, 3]), range(64))):
            assert_same_bytes(found, values[[i % 16, 3]])


def test_an_interrupt_waits_for_what_has_begun_and_begins_nothing_more():
    """Otherwise a write of an interrupted put could come after that of the next one, into the same rows."""
    begun, done = [], []

    def job(i):
        async def work():
            begun.append(i)
            if i == 0:
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            for _ in range(1000):
                await asyncio.sleep(0)
            done.append(i)

        return work

    # A shell starts its background jobs with the interrupt ignored, and Python leaves it at that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run([job(i) for i in range(100_000)], 3)
    finally:
        signal.signal(signal.SIGINT, before)
    finished = sorted(done)
    assert finished == sorted(begun)
    assert len(finished) < 100_000


def test_zarr_is_imported_for_its_own_stores_only(make, path, shm):
    with make() as db:
        db.put(np.ones((1, 2, 1024), np.float32))
    assert run_program(shm, IMPORTS, path).split() == ["False", "True"]


IMPORTS = """
import sys
import memodb
memodb.available_backends()
memodb.MemoDB.open(sys.argv[1]).multiget([0])
print("zarr" in sys.modules)
memodb.MemoDB.create(sys.argv[1] + "2", shape=(2,), dtype="float32", backend="zarr").close()
print("zarr" in sys.modules)
"""


def test_zarrs_settings_stay_the_programs(make):
    before = deepcopy(zarr.config.config)
    db = make(backend="zarr")
    db.multiget(db.put(np.ones((2, 2, 1024), np.float32)))
    assert zarr.config.config == before


def test_two_stores_do_not_share_a_url(disk):
    """The url is taken when the first is created, before anything is put; nothing is left of the second."""
    settings = {"shape": 3, "dtype": "int8", "backend": "zarr", "url": str(disk / "records")}
    with memodb.MemoDB.create(disk / "one", **settings) as one:
        with pytest.raises(memodb.StoreExistsError, match="another url"):
            memodb.MemoDB.create(disk / "two", **settings)
        assert not (disk / "two").exists()
        assert one.multiget(one.put([[1, 2, 3]])).tolist() == [[1, 2, 3]]


@pytest.mark.parametrize(
    "found", [{"zarr_format": 3, "node_type": "group", "attributes": {}}, [1, 2], {"attributes": 5}]
)
def test_what_somebody_else_put_there_is_not_repaired(disk, found):
    settings = {"shape": 3, "dtype": "int8", "backend": "zarr", "url": str(disk / "records")}
    with memodb.MemoDB.create(disk / "store", **settings) as db:
        db.put([[1, 2, 3]])
    theirs = json.dumps(found)
    (disk / "records" / "zarr.json").write_text(theirs)
    for mode in ("r", "r+"):
        with pytest.raises(memodb.StoreExistsError, match="somebody else"):
            memodb.MemoDB.open(disk / "store", mode=mode)
    assert (disk / "records" / "zarr.json").read_text() == theirs


@pytest.mark.parametrize("url", ["/proc/records", "{disk}/a file/records"])
def test_a_url_that_cannot_be_made(disk, url):
    (disk / "a file").write_text("")
    with pytest.raises(memodb.MemoDBError, match=r"another url|access"):
        memodb.MemoDB.create(disk / "store", shape=3, dtype="int8", backend="zarr", url=url.format(disk=disk))
    assert not (disk / "store").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"endpoint_url": "https://user:hunter2@host"},
        {"client_kwargs": {"proxy_url": "http://me:you@proxy"}},
        {"sas_url": "x"},
        {"endpoint_url": "https://host/?sig=abc"},
    ],
)
def test_secrets_in_values_are_refused(disk, options):
    with pytest.raises(memodb.InvalidOptionError, match="written down"):
        memodb.MemoDB.create(
            disk / "store", shape=3, dtype="int8", backend="zarr", url="s3://bucket/x", storage_options=options
        )
