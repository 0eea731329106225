"""Runs in the guest: the suites of `memodb.testing` with stores on the DAX mount that MEMODB_DAX names."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

import memodb
from memodb.testing import BackendTests, StoreMachine

MOUNT = Path(os.environ["MEMODB_DAX"])
#: Those whose records are files that the file system maps.
BACKENDS = sorted({"arena", "files"} & {backend.name for backend in memodb.available_backends() if backend.installed})
#: Few: the processor is emulated.
SETTINGS = settings(
    max_examples=4,
    stateful_step_count=15,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


class OnDax(BackendTests):
    @pytest.fixture
    def folder(self):
        made = Path(tempfile.mkdtemp(dir=MOUNT))
        yield made
        shutil.rmtree(made)

    def raw(self, path, number):
        if self.backend == "files":
            return (path / "values" / "000000" / "000" / f"{number:03x}").read_bytes()
        return (path / "values" / "00000001.seg").read_bytes()[number * 16384 : (number + 1) * 16384]


def machine(backend):
    case = type(f"Machine_{backend}", (StoreMachine,), {"backend": backend, "parent": MOUNT}).TestCase
    case.settings = SETTINGS
    return type(f"TestMachine_{backend}", (case,), {})


# pytest finds classes by the names of the module.
globals().update({f"TestSuite_{name}": type(f"TestSuite_{name}", (OnDax,), {"backend": name}) for name in BACKENDS})
globals().update({f"TestMachine_{name}": machine(name) for name in BACKENDS})
