"""System calls that fail: a named error, and a store that holds all that was acknowledged and nothing by half.

Each fault is one call of an operation that fails, in a process of its own; so none can be a signal or a hang either.
"""

from __future__ import annotations

import random
from collections import Counter

import effort
import pytest
from faults import ERRORS, KINDS, OPERATIONS, campaign

from memodb import vm

#: Share of the long run.
SHARE = 0.14


#: Of the quick run: (kind of store, operation, call, error, how long it fails). Each of them is hit at least once.
QUICK_MEMORY = [
    ("arena", "put", "write", "EIO", "once"),
    ("arena", "put", "fallocate", "ENOSPC", "once"),
    ("arena", "put", "mmap", "ENOMEM", "once"),
    ("arena", "put", "populate", "EIO", "once"),
    ("huge", "copy", "collapse", "EAGAIN", "lasting"),
    ("huge", "copy", "populate", "EAGAIN", "lasting"),
    ("arena", "compact", "open", "EMFILE", "once"),
    ("arena", "compact", "unlink", "EIO", "once"),
    ("arena", "compact", "truncate", "EIO", "lasting"),
    ("arena", "map", "mmap", "ENOMEM", "lasting"),
    ("arena", "gather", "mmap", "ENOMEM", "once"),
    ("arena", "copy", "mkdir", "ENOSPC", "once"),
    ("arena", "open r+", "open", "EMFILE", "once"),
    ("lmdb", "put", "write", "half", "once"),
    ("lmdb", "compact", "rename", "EIO", "once"),
    ("lmdb", "open", "read", "EIO", "once"),
    ("files", "put", "mkdir", "ENOSPC", "lasting"),
    ("files", "create", "fdatasync", "EIO", "once"),
    ("zarr", "put", "rename", "EIO", "lasting"),
    ("zarr", "reindex", "unlink", "EIO", "once"),
]
QUICK_DISK = [
    ("arena", "put", "fdatasync", "EIO", "once"),
    ("arena", "put", "fsync", "ENOSPC", "once"),
    ("arena", "gather", "read", "EIO", "once"),
    ("files", "put", "syncfs", "EIO", "once"),
    ("zarr", "put", "syncfs", "EINTR", "once"),
    ("lmdb", "put", "fdatasync", "EIO", "once"),
    ("lmdb", "delete", "fdatasync", "EIO", "lasting"),
    ("arena", "close", "write", "ENOSPC", "lasting"),
    ("zarr", "gather", "read", "half", "once"),
    ("zarr", "verify", "open", "EIO", "lasting"),
]


def suffer(template, where, kind, operation, call, error, mode, most):
    """Ask for one campaign; return its answer."""
    answer = template.ask(**campaign(where, kind, operation, call, error, mode, most))
    told = "".join(f"\n{text}" for text in answer["wrong"][:3])
    assert not answer["wrong"], f"{operation} on {kind} in {where}, {call} fails with {error}, {mode}:{told}"
    return answer


@pytest.mark.parametrize(("place", "table"), [("shm", QUICK_MEMORY), ("disk", QUICK_DISK)], ids=["memory", "disk"])
def test_a_call_that_fails(request, template, place, table):
    """The first and the last call of each kind; that each is hit shows that the shim sees what it is to see."""
    where = request.getfixturevalue(place)
    for kind, operation, call, error, mode in table:
        if place == "disk" and call in ("fsync", "syncfs") and vm.filesystem(where).in_memory:
            continue
        answer = suffer(template, where, kind, operation, call, error, mode, 2)
        assert answer["faults"], f"{operation} on {kind} makes no call of {call} any more: choose another"
        effort.report("faults", **{f"{call} {error}": answer["faults"]})


@pytest.mark.parametrize("error", ["EIO", "half"])
def test_any_write_of_a_commit_that_fails(shm, template, error):
    """That of the page that commits is neither the first nor the last: LMDB leaves it half undone."""
    answer = suffer(template, shm, "arena", "delete", "write", error, "once", None)
    assert answer["faults"] >= 3


@pytest.mark.skipif(not effort.is_long(), reason="of the long run")
@pytest.mark.parametrize("place", ["shm", "disk"])
def test_any_call_that_fails(request, template, place):
    """Whatever is done to whatever store: at every call in turn, once or from then on."""
    where, rng = request.getfixturevalue(place), random.Random(place)
    everything = [
        (kind, operation, call, error)
        for kind in KINDS
        for operation in OPERATIONS
        for call in ERRORS
        for error in ERRORS[call]
    ]
    rng.shuffle(everything)
    chosen, faults = iter(everything), Counter()
    for _ in effort.rounds(1, SHARE / 2):
        kind, operation, call, error = next(chosen, rng.choice(everything))
        # What fails for ever with EINTR, Python asks for ever: that is its promise, not ours.
        mode = "once" if error in ("half", "EINTR") else rng.choice(("once", "once", "lasting"))
        answer = suffer(template, where, kind, operation, call, error, mode, 40)
        faults[f"{call} {error}"] += answer["faults"]
    assert faults.total() > 10 * effort.MINUTES * SHARE
    effort.report("faults", **faults)
