"""A backend from outside the package: installed with its own entry point, found, and tested by our suites."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).with_name("third_party") / "memodb_sqlite"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Return the environment of a process in which the package is installed, in a folder of its own."""
    pytest.importorskip("hatchling", reason="hatchling, which builds the package, is not installed (extra dev)")
    site = tmp_path_factory.mktemp("site")
    source = tmp_path_factory.mktemp("source") / "memodb_sqlite"
    subprocess.run(["cp", "-r", PACKAGE, source], check=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--no-build-isolation", "--target", str(site), str(source)], check=True)
    assert (site / "memodb_sqlite.py").exists()
    search_path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": search_path, "PYTHONDONTWRITEBYTECODE": "1"}


def run(environment, *arguments):
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def test_it_is_listed(installed):
    listed = run(installed, "-m", "memodb.cli", "backends")
    assert re.search(r"sqlite +yes +durable", listed)


def test_it_passes_our_suites(installed, disk):
    """From a folder that knows nothing of this repository."""
    (disk / "conftest.py").write_text("import pytest\npytest.register_assert_rewrite('memodb.testing')\n")
    (disk / "test_sqlite.py").write_text((PACKAGE / "tests" / "test_sqlite.py").read_text())
    options = ["-q", "-W", "error", "-p", "no:cacheprovider", "--rootdir", str(disk), "-c", os.devnull]
    shown = run(installed, "-m", "pytest", *options, str(disk / "test_sqlite.py"))
    assert re.search(r"[4-9]\d passed", shown), shown
    assert "failed" not in shown


COPY = """
import sys, memodb
from memodb.testing import assert_same_bytes, random_records

values = random_records(9, (3, 5), "float32")
with memodb.MemoDB.create(sys.argv[1] + "/arena", shape=(3, 5), dtype="float32") as db:
    db.put(values)
memodb.copy(sys.argv[1] + "/arena", sys.argv[1] + "/sqlite", backend="sqlite")
memodb.copy(sys.argv[1] + "/sqlite", sys.argv[1] + "/files", backend="files")
with memodb.MemoDB.open(sys.argv[1] + "/files") as db:
    assert_same_bytes(db.multiget(range(9)), values)
"""


def test_stores_are_copied_to_and_from_it(installed, disk):
    run(installed, "-c", COPY, str(disk))


def test_without_it_a_store_of_its_kind_says_what_is_missing(installed, disk):
    run(installed, "-c", "import memodb, sys; memodb.MemoDB.create(sys.argv[1], shape=3, dtype='i1', backend='sqlite')",
        str(disk / "store"))  # fmt: skip
    import memodb

    with pytest.raises(memodb.BackendNotFoundError, match="'sqlite'"):
        memodb.MemoDB.open(disk / "store")


def test_the_documentation_shows_this_very_class():
    page = Path(__file__).parent.parent.joinpath("docs", "backends.md").read_text()
    source = (PACKAGE / "memodb_sqlite.py").read_text()
    assert source[source.index("class SqliteBackend") :].replace("  # noqa: RUF012", "") in page
