"""The error tree: one root, and for each error the builtin that a caller would catch without knowing memodb."""

import inspect
import io
import types

import numpy as np
import pytest

import memodb

TREE = {
    "RecordNotFoundError": KeyError,
    "InvalidIdError": ValueError,
    "InvalidKeyError": ValueError,
    "InvalidRecordError": ValueError,
    "InvalidOptionError": ValueError,
    "StoreExistsError": FileExistsError,
    "StoreNotFoundError": FileNotFoundError,
    "StoreFullError": OSError,
    "StoreAccessError": PermissionError,
    "UnsafePathError": PermissionError,
    "CorruptionError": OSError,
    "DeviceError": OSError,
    "FormatVersionError": ValueError,
    "WriterLockedError": BlockingIOError,
    "ReadOnlyError": io.UnsupportedOperation,
    "ClosedError": ValueError,
    "MappingUnsupportedError": NotImplementedError,
    "BackendNotFoundError": LookupError,
    "BackendUnavailableError": ImportError,
}


@pytest.mark.parametrize(("name", "builtin"), TREE.items(), ids=TREE)
def test_error_is_also_the_builtin(name, builtin):
    error = getattr(memodb, name)
    assert issubclass(error, memodb.MemoDBError)
    assert issubclass(error, builtin)


def test_the_tree_is_complete():
    """No error class is public that the table above does not know."""
    public = {
        name
        for name in memodb.__all__
        if inspect.isclass(getattr(memodb, name)) and issubclass(getattr(memodb, name), Exception)
    }
    assert public == {"MemoDBError", *TREE}


def test_the_tree_is_drawn_in_the_docstring():
    import memodb.errors

    for name in TREE:
        assert name in memodb.errors.__doc__


def test_all_is_the_public_namespace():
    public = {
        name
        for name, value in vars(memodb).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType) and name != "annotations"
    }
    assert public == {name for name in memodb.__all__ if not name.startswith("__")}
    assert len(memodb.__all__) == len(set(memodb.__all__))


@pytest.mark.parametrize("name", TREE)
def test_message_is_shown_as_written(name):
    """KeyError quotes its message and OSError splits its arguments: ours show the sentence."""
    assert str(getattr(memodb, name)("record 7 of /store is gone")) == "record 7 of /store is gone"


def test_star_import_gives_what_the_contract_names():
    """The subpackage ``memodb.backends`` is no part of it: what lists the backends is a function."""
    namespace = {}
    exec("from memodb import *", namespace)
    named = {"MemoDB", "MappedBatch", "SearchResult", "Problem", "copy", "available_backends", "MemoDBError", *TREE}
    assert named <= set(namespace)
    assert not any(isinstance(value, types.ModuleType) for name, value in namespace.items() if name != "__builtins__")


@pytest.mark.parametrize("wrong", [np.zeros((2, 2)), np.zeros((0, 8)), "\ud800", "", 0, False])
def test_options_of_a_wrong_kind_are_refused_by_name(tmp_path, wrong):
    kind = {"shape": (4,), "dtype": "float32", "key_dim": 2}
    with memodb.MemoDB.create(tmp_path / "store", **kind) as db:
        for call in (
            lambda: db.multiget_mapped([], wrong),
            lambda: db.reindex(wrong),
            lambda: memodb.MemoDB.open(tmp_path / "store", wrong),
            lambda: memodb.MemoDB.open(tmp_path / "store", verify=wrong),
            lambda: memodb.MemoDB.open(wrong),
            lambda: memodb.MemoDB.create(wrong, **kind),
            lambda: memodb.MemoDB.create(tmp_path / "other", index=wrong, **kind),
        ):
            with pytest.raises(memodb.InvalidOptionError):
                call()
