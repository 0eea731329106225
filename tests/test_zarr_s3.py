"""The zarr backend on S3: a real server in a process of its own on this machine (moto), through both clients."""

import json
import os
import re
import secrets
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
import zarr
from programs import run_program

import memodb
from memodb.testing import BackendTests, assert_same_bytes, random_records

pytest.importorskip("moto", reason="moto[server] is not installed (the dev extra has it)")
pytest.importorskip("s3fs", reason="s3fs is not installed (the s3 extra has it)")
pytest.importorskip("obstore", reason="obstore is not installed (the s3 extra has it)")

#: A server that takes longer to answer does not come.
START_SECONDS = 60
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_EC2_METADATA_DISABLED": "true",
}
CLIENTS = ["fsspec", "obstore"]


class Server:
    """moto's S3, which keeps its objects in memory: a new one is empty."""

    def __init__(self, log):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self._log = log.open("wb")
        self.start()

    def start(self):
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
        self.process = subprocess.Popen(command, stdout=self._log, stderr=self._log)
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                self.request("GET", "/moto-api/")
                break
            except (urllib.error.URLError, ConnectionError):
                assert self.process.poll() is None, "the server ended"
                assert time.monotonic() < deadline, f"the server did not answer within {START_SECONDS} s"
                time.sleep(0.05)
        self.request("PUT", "/bucket")

    def request(self, method, path, body=None):
        """Speak plain HTTP to it: moto checks no signatures."""
        request = urllib.request.Request(self.endpoint + path, data=body, method=method)
        request.add_header("Content-Type", "application/octet-stream")
        request.add_header("Authorization", "AWS4-HMAC-SHA256 Credential=testing/20240101/us-east-1/s3/aws4_request")
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.read()

    def kill(self):
        self.process.kill()
        self.process.wait()

    def close(self):
        self.kill()
        self._log.close()

    def options(self, client, prefix=None, **more):
        """Return what a store in this server is created with."""
        return {
            "backend": "zarr",
            "url": f"s3://bucket/{prefix or secrets.token_hex(6)}",
            "client": client,
            "storage_options": {"endpoint_url": self.endpoint, "region": "us-east-1"},
            **more,
        }


@pytest.fixture(scope="module")
def credentials():
    """Credentials are the environment's, never an option's."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_") or name.lower().endswith("_proxy")]:
            patch.delenv(name)
        for name, value in CREDENTIALS.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def server(credentials, tmp_path_factory):
    """Return the server that tests share, each with prefixes of its own."""
    started = Server(tmp_path_factory.mktemp("moto") / "log")
    yield started
    started.close()


@pytest.fixture
def own_server(credentials, tmp_path):
    """Return a server that a test may kill."""
    started = Server(tmp_path / "log")
    yield started
    started.close()


class OnS3(BackendTests):
    backend = "zarr"
    client: str

    @pytest.fixture
    def folder(self, disk, server):
        self.server = server
        return disk

    def create(self, path, **settings):
        options = {**self.server.options(self.client, prefix=secrets.token_hex(6)), **settings}
        self.prefix = options["url"].removeprefix("s3://")
        return memodb.MemoDB.create(path, **options)

    def raw(self, path, number):
        import s3fs

        fs = s3fs.S3FileSystem(endpoint_url=self.server.endpoint, asynchronous=True, skip_instance_cache=True)
        store = zarr.storage.FsspecStore(fs, path=self.prefix, read_only=True)
        try:
            return zarr.open_array(store, mode="r")[number].tobytes()
        finally:
            zarr.core.sync.sync(fs._s3.close())

    def test_copy_keeps_everything(self, folder):
        """Each store needs a prefix of its own."""
        with pytest.MonkeyPatch.context() as patch:
            options = self.server.options(self.client)
            del options["backend"]
            patch.setattr(self, "options", options)
            super().test_copy_keeps_everything(folder)


class TestZarrS3ByFsspec(OnS3):
    client = "fsspec"


class TestZarrS3ByObstore(OnS3):
    client = "obstore"


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize(
    "more", [{"shard_records": 4}, {"codec": "none", "chunk_records": 2, "shard_records": 4}, {"bitround": 5}], ids=str
)
def test_shards_and_lost_bits(make, path, server, client, more):
    values = random_records(10, (2, 1024), "float32")
    values[:, 0] = np.linspace(0, 1, 1024)
    with make(**server.options(client, **more)) as db:
        db.put(values[:5])
        db.put(values[5:])
        if "bitround" not in more:
            assert_same_bytes(db.multiget([9, 0, 9, 4, 5]), values[[9, 0, 9, 4, 5]])
        db.delete([0, 1, 2, 3])
        assert db.compact() > 0
        assert db.verify() == []
    with memodb.MemoDB.open(path, mode="r+") as db:
        db.put(values[:1])
        assert db.verify() == []


@pytest.mark.parametrize("client", CLIENTS)
def test_what_is_at_the_url_already_is_not_touched(make, shm, server, client):
    options = server.options(client)
    values = random_records(2, (2, 1024), "float32")
    with make(shm / "first", **options) as db:
        db.put(values)
        with pytest.raises(memodb.StoreExistsError, match="s3://bucket/"):
            make(shm / "second", **options)
        assert not (shm / "second").exists()
        assert db.verify() == []


@pytest.mark.parametrize("client", CLIENTS)
def test_a_missing_object_is_never_zeros(make, server, client):
    options = server.options(client)
    db = make(**options)
    db.put(np.ones((3, 2, 1024), np.float32))
    server.request("DELETE", options["url"].removeprefix("s3:/") + "/c.1.0.0")
    with pytest.raises(memodb.CorruptionError, match=r"c\.1\.0\.0"):
        db.multiget([0, 1, 2])
    assert [problem.id for problem in db.verify()] == [1]
    assert (db.multiget([0, 2]) == 1).all()


@pytest.mark.parametrize("client", CLIENTS)
def test_a_changed_object_is_found_by_reading(make, server, client):
    options = server.options(client)
    db = make(**options)
    db.put(np.ones((3, 2, 1024), np.float32))
    server.request("PUT", options["url"].removeprefix("s3:/") + "/c.1.0.0", b"something else")
    with pytest.raises(memodb.CorruptionError, match="row 1 of s3://bucket/"):
        db.multiget([0, 1, 2])


@pytest.mark.parametrize("client", CLIENTS)
def test_a_server_that_is_gone_and_comes_back(make, path, shm, own_server, client):
    """No answer is an error of access, never damage; and an empty server is no store."""
    options = own_server.options(client)
    if client == "fsspec":  # or each call would be tried for ten seconds
        options["storage_options"]["config_kwargs"] = {"retries": {"max_attempts": 1}}
    values = random_records(4, (2, 1024), "float32")
    db = make(**options)
    db.put(values[:3])
    objects = {
        key: own_server.request("GET", options["url"].removeprefix("s3:/") + f"/{key}")
        for key in ("zarr.json", "c.0.0.0", "c.1.0.0", "c.2.0.0")
    }
    own_server.kill()
    for attempt in (
        lambda: db.multiget([0, 2]),
        lambda: db.put(values[3:]),
        lambda: memodb.MemoDB.open(path),
        lambda: make(shm / "other", **options),
    ):
        with pytest.raises(memodb.StoreAccessError, match="s3://bucket/"):
            attempt()
    assert not (shm / "other").exists()
    own_server.start()
    for attempt in (lambda: db.multiget([0]), lambda: memodb.MemoDB.open(path)):
        with pytest.raises(memodb.StoreNotFoundError, match="s3://bucket/"):
            attempt()
    for key, body in objects.items():
        own_server.request("PUT", options["url"].removeprefix("s3:/") + f"/{key}", body)
    assert_same_bytes(db.multiget([2, 0]), values[[2, 0]])
    ids = db.put(values[3:])
    assert_same_bytes(db.multiget(ids), values[3:])
    assert db.verify() == []


@pytest.mark.parametrize("client", CLIENTS)
def test_a_bucket_that_does_not_exist(make, path, server, client):
    """It is told when the store is created, and nothing is left of that."""
    with pytest.raises(memodb.StoreAccessError, match="no-such-bucket"):
        make(**{**server.options(client), "url": "s3://no-such-bucket/prefix"})
    assert not path.exists()


def test_options_from_the_command_line(path, server):
    options = server.options("auto")
    said = run_cli(path, options["url"], json.dumps(options["storage_options"]))
    assert said.returncode == 0, said.stderr
    with memodb.MemoDB.open(path, mode="r+") as db:
        db.put(np.ones((1, 4), np.float32))
        assert db.stats()["values_path"] == options["url"]


def run_cli(path, url, storage_options):
    command = [sys.executable, "-m", "memodb.cli", "create", str(path), "--shape", "4", "--dtype", "float32"]
    command += ["--backend", "zarr", "--option", f"url={url}", "--option", f"storage_options={storage_options}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


FORKED = """
import os
import sys
import memodb
with memodb.MemoDB.open(sys.argv[1]) as db:
    expected = db.multiget([0, 1]).tobytes()
    pid = os.fork()
    if pid == 0:
        said = "?"
        try:
            said = "same" if db.multiget([0, 1]).tobytes() == expected else "other"
        except memodb.StoreAccessError as error:
            said = f"refused: {error}"
        finally:
            print(said, flush=True)
            os._exit(0)
    os.waitpid(pid, 0)
    assert db.multiget([0, 1]).tobytes() == expected
    print("parent same")
"""


@pytest.mark.parametrize(("client", "said"), [("fsspec", "same"), ("obstore", "refused: .*spawn")])
def test_a_forked_child_reads_or_says_why_not(make, path, shm, server, client, said):
    with make(**server.options(client)) as db:
        db.put(random_records(2, (2, 1024), "float32"))
    lines = run_program(shm, FORKED, path).splitlines()
    assert len(lines) == 2
    assert lines[1] == "parent same"
    assert re.match(said, lines[0])


@pytest.mark.parametrize("client", CLIENTS)
def test_a_missing_driver_is_told_at_create_and_at_open(make, path, shm, server, client):
    with make(**server.options(client)) as db:
        db.put(np.ones((1, 2, 1024), np.float32))
    said = run_program(shm, WITHOUT.replace("DRIVER", {"fsspec": "s3fs"}.get(client, client)), path, client)
    lines = said.splitlines()
    assert all(line.startswith("BackendUnavailableError") and "pip install" in line for line in lines)
    assert len(lines) == 2


WITHOUT = """
import importlib.util
import sys
import memodb
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "DRIVER" else find(name, package)
for attempt in (
    lambda: memodb.MemoDB.open(sys.argv[1]),
    lambda: memodb.MemoDB.create(
        sys.argv[1] + "2", shape=(2,), dtype="float32", backend="zarr", url="s3://bucket/x", client=sys.argv[2]
    ),
):
    try:
        attempt()
    except memodb.MemoDBError as error:
        print(type(error).__name__, error)
"""
