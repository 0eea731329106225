"""The operating system's errors in memodb's words: what could not be used, why, and the remedy."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

from memodb.errors import DeviceError, MemoDBError, StoreAccessError, StoreFullError, StoreNotFoundError

P = ParamSpec("P")
T = TypeVar("T")
#: Whatever opens a file may meet it, in libraries too: so `names_limits` tells it at the top as well.
NO_DESCRIPTOR = "this process holds as many descriptors as it may have: close some, or raise the limit (ulimit -n)"
NO_MEMORY = (
    "this process gets no more memory: take fewer records at once, release batches, or raise the limit (ulimit -v)"
)
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
    if no_descriptor(error):
        return StoreAccessError(f"{what} cannot be used at the moment: {why}; {NO_DESCRIPTOR}")
    if code in LIMITS:
        return StoreAccessError(f"{what} cannot be used at the moment: {why}; try again")
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


def no_descriptor(error: OSError) -> bool:
    """Tell whether the process, or the machine, has no descriptor left."""
    return error.errno in (errno.EMFILE, errno.ENFILE)


def names_limits(verb: Callable[P, T]) -> Callable[P, T]:
    """Let `verb` raise memodb's errors, with the remedy, where descriptors, memory or the store itself are gone.

    Raises
    ------
    StoreAccessError
        Instead of an `OSError` of EMFILE or ENFILE.
    StoreFullError
        Instead of a `MemoryError`.
    StoreNotFoundError
        Instead of a `FileNotFoundError` where an open store is no longer at its path.
    """

    @wraps(verb)
    def told(*arguments: P.args, **options: P.kwargs) -> T:
        try:
            return verb(*arguments, **options)
        except OSError as error:
            place = getattr(arguments[0], "_path", None) if arguments else None
            # Rooms below have made of it what it would mean of a store that is where it was: damage, or no access.
            missing = any(isinstance(part, FileNotFoundError) for part in (error, error.__cause__))
            if missing and place is not None and not os.path.exists(place):
                raise StoreNotFoundError(
                    f"the store at {os.fspath(place)} was moved or removed while it was open ({error}): close it, and "
                    "open it where it is now"
                ) from error
            if isinstance(error, MemoDBError) or not no_descriptor(error):
                raise
            raise StoreAccessError(f"{error}; {NO_DESCRIPTOR}") from error
        except MemoryError as error:
            raise StoreFullError(f"{str(error) or 'out of memory'}; {NO_MEMORY}") from error

    return told
