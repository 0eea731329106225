"""The conformance suites that every backend has to pass: ours and third parties' alike.

They use the public API only, and need ``pytest`` and ``hypothesis`` (the ``dev`` extra). A third party that registers
a backend under the entry-point group ``memodb.backends`` tests it with a module such as::

    import pytest
    from hypothesis import settings

    from memodb.testing import BackendTests, StoreMachine


    class TestTapeBackend(BackendTests):
        backend = "tape"                      # the registered name
        options = {"drive": "/dev/nst0"}      # handed to MemoDB.create(..., **options)


    class TapeMachine(StoreMachine):
        backend = "tape"


    TestTapeMachine = TapeMachine.TestCase
    TestTapeMachine.settings = settings(max_examples=100, deadline=None)

and, so that failing assertions show their operands, in its ``conftest.py``::

    pytest.register_assert_rewrite("memodb.testing")

`BackendTests` runs one behaviour a test, each on a fresh store in ``tmp_path``; override the fixture
`BackendTests.folder` to run it on another file system, and `BackendTests.damage` if the backend compresses.
`StoreMachine` plays random sequences of verbs against a dict.
"""

from memodb.testing.backend import BackendTests
from memodb.testing.machine import StoreMachine
from memodb.testing.values import DTYPES, assert_same_bytes, flip_stored_byte, random_records

__all__ = [
    "DTYPES",
    "BackendTests",
    "StoreMachine",
    "assert_same_bytes",
    "flip_stored_byte",
    "random_records",
]
