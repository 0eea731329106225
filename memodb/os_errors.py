"""The operating system's errors in memodb's words: what could not be used, why, and the remedy."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from memodb.errors import DeviceError, MemoDBError, StoreAccessError, StoreFullError

#: There is no room.
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
#: A limit of the process or of the machine; the same call may be granted later.
LIMITS = frozenset({errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.EINTR, errno.EBUSY})
#: What the path is, or who may use it.
_REFUSED = frozenset(
    {
        errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EEXIST,
        errno.ENAMETOOLONG, errno.ENOTEMPTY,
    }
)  # fmt: skip


def named(error: OSError, what: str | os.PathLike[str]) -> MemoDBError:
    """Return an error of the operating system about `what` (a path, or words for it) as one of memodb's."""
    code, what = error.errno, os.fspath(what)
    why = error.strerror or str(error)
    if error.filename and os.fspath(error.filename) != what:
        why = f"{os.fsdecode(error.filename)}: {why}"
    if code in FULL:
        return StoreFullError(f"no room at {what}: {why}; free space there, or delete and compact()")
    if code == errno.ENOMEM:
        return StoreFullError(
            f"no memory for what was asked of {what}: {why}; ask for less at once, or raise the limits of this process "
            "(ulimit -v, vm.max_map_count)"
        )
    if code in LIMITS:
        return StoreAccessError(
            f"{what} cannot be used at the moment: {why}; close some files, or raise the limit (ulimit -n), and try "
            "again"
        )
    if code in _REFUSED:
        return StoreAccessError(f"{what} cannot be used: {why}; choose another path, or ask for access")
    return DeviceError(
        f"the device of {what} failed: {why}; check it (dmesg), then close and open the store, and let verify() tell "
        "what is lost",
        code,
    )


@contextmanager
def naming(what: str | os.PathLike[str]) -> Iterator[None]:
    """Turn errors of the operating system about `what` into memodb's."""
    try:
        yield
    except MemoDBError:
        raise
    except OSError as error:
        raise named(error, what) from error
