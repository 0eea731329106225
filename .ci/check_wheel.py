"""Build the wheel, install it without torch into an empty environment, and use it there.

Run from the repository: ``python .ci/check_wheel.py``. Exits nonzero where the wheel lacks a file, needs torch, or
does not work.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

EXPECTED = [
    "memodb/__init__.py",
    "memodb/py.typed",
    "memodb/testing/__init__.py",
    "memodb_transformers/__init__.py",
    "memodb_transformers/py.typed",
]
UNWANTED = ("tests/", "demo/", "benchmarks/", "integrations/")

SMOKE = """
import importlib.util
import pathlib
import sys

import numpy as np

assert importlib.util.find_spec("torch") is None, "torch is installed: this check proves nothing"
import memodb

assert "site-packages" in memodb.__file__, memodb.__file__
path = pathlib.Path(sys.argv[1]) / "store"
values = np.arange(4 * 8 * 512, dtype=np.float32).reshape(4, 8, 512)
keys = np.eye(4, dtype=np.float32)
with memodb.MemoDB.create(path, shape=(8, 512), dtype="float32", key_dim=4) as db:
    ids = db.put(values, keys)
    for strategy in ("map", "copy"):
        with db.multiget_mapped(ids[::-1], strategy=strategy) as batch:
            assert np.array_equal(batch.numpy(), values[::-1])
            assert batch.zero_copy == (strategy == "map")
with memodb.MemoDB.open(path) as db:
    found = db.search(keys, k=1)
    assert np.array_equal(found.ids[:, 0], ids), found
    assert np.array_equal(db.multiget(ids), values)
assert not [name for name in sys.modules if name.split(".")[0] == "torch"]
print("wheel works without torch")
"""


def run(*command: str | Path) -> None:
    """Run a command to its end, with nothing of this environment on its path."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    subprocess.run([str(part) for part in command], check=True, env=environment, cwd=ROOT)


def main() -> None:
    """Check the wheel that the tree builds."""
    with tempfile.TemporaryDirectory(prefix="memodb-wheel-") as name:
        folder = Path(name)
        run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT)
        (wheel,) = folder.glob("memodb-*.whl")
        files = zipfile.ZipFile(wheel).namelist()
        missing = [path for path in EXPECTED if path not in files]
        unwanted = [path for path in files if path.startswith(UNWANTED)]
        if missing or unwanted:
            sys.exit(f"{wheel.name}: missing {missing}, not to be shipped {unwanted}")

        environment = folder / "venv"
        venv.create(environment, with_pip=True)
        python = environment / "bin" / "python"
        run(python, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt", wheel)
        run(python, "-I", "-c", SMOKE, folder)
        run(environment / "bin" / "memodb", "info", folder / "store")


if __name__ == "__main__":
    main()
