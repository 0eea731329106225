"""The lock that counters are changed under: one for all, so that a fork has one to renew."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["counting"]

_lock = threading.Lock()


def _renew() -> None:
    """In a forked child: a thread that is not there may have held the lock."""
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_renew)


@contextmanager
def counting() -> Iterator[None]:
    """Change counters; nobody else does meanwhile."""
    with _lock:
        yield
