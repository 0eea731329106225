"""constraints.txt pins what is installed, so that `make audit` can ask for all of it."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def audit():
    spec = importlib.util.spec_from_file_location("audit", ROOT / ".ci" / "audit.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_all_that_is_declared_is_pinned(audit):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [
        *project["dependencies"],
        *(name for extra in project["optional-dependencies"].values() for name in extra),
    ]
    names = {re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", text)[0]).lower() for text in declared} - {"memodb"}
    assert names <= audit.pins((ROOT / "constraints.txt").read_text().splitlines()).keys()


def test_what_is_not_pinned_is_found(audit):
    constraints = audit.pins(["# comment", "numpy==2.0.1", "Ml_Dtypes==0.5"])
    assert audit.unpinned(audit.pins(["numpy==2.0.1", "ml-dtypes==0.5", "torch==2.1+cpu"]), constraints) == [
        "torch==2.1"
    ]
    assert audit.unpinned({"numpy": "2.0.2"}, constraints) == ["numpy==2.0.2"]
