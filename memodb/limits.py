"""What a process may have no more of: said by every verb in the same words, wherever below it was noticed."""

from __future__ import annotations

import errno
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from memodb.errors import MemoDBError, StoreAccessError, StoreFullError

P = ParamSpec("P")
T = TypeVar("T")
#: Whatever opens a file may meet it, in libraries too: so it is told at the top, and not at each of these places.
NO_DESCRIPTOR = "this process holds as many descriptors as it may have: close some, or raise the limit (ulimit -n)"
NO_MEMORY = (
    "this process gets no more memory: take fewer records at once, release batches, or raise the limit (ulimit -v)"
)


def no_descriptor(error: OSError) -> bool:
    """Tell whether the process, or the machine, has no descriptor left."""
    return error.errno in (errno.EMFILE, errno.ENFILE)


def names_limits(verb: Callable[P, T]) -> Callable[P, T]:
    """Let `verb` raise memodb's errors, with the remedy, where the process has no descriptor or memory left.

    Raises
    ------
    StoreAccessError
        Instead of an `OSError` of EMFILE or ENFILE.
    StoreFullError
        Instead of a `MemoryError`.
    """

    @wraps(verb)
    def told(*arguments: P.args, **options: P.kwargs) -> T:
        try:
            return verb(*arguments, **options)
        except OSError as error:
            if isinstance(error, MemoDBError) or not no_descriptor(error):
                raise
            raise StoreAccessError(f"{error}; {NO_DESCRIPTOR}") from error
        except MemoryError as error:
            raise StoreFullError(f"{str(error) or 'out of memory'}; {NO_MEMORY}") from error

    return told
