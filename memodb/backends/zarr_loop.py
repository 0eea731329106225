"""Running jobs in zarr's event loop so that nothing of them is left when the caller goes on, whatever interrupts it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from zarr.core.sync import sync

Job = Callable[[], Awaitable[Any]]


def run(jobs: Iterable[Job], limit: int) -> None:
    """Run coroutine functions in zarr's loop, up to `limit` at a time; the first failure lets no other job begin.

    Jobs write into memory and objects of the caller. So this returns, or raises, when none of them runs any more: an
    interrupt (Ctrl-C) waits for those that have begun.

    Raises
    ------
    BaseException
        What the first failing job raised, or what interrupted the caller.
    """
    listed = list(jobs)
    waiting = iter(listed)  # shared by those that work: each job is taken once
    failed: list[BaseException] = []
    begun, over = threading.Event(), threading.Event()
    stop = False

    async def work() -> None:
        for job in waiting:
            if stop or failed:
                return
            try:
                await job()
            except BaseException as error:
                failed.append(error)

    async def everything() -> None:
        begun.set()
        try:
            if not stop:
                await asyncio.gather(*(work() for _ in range(min(limit, len(listed)))))
        finally:
            over.set()

    if not listed:
        return
    try:
        sync(everything())
    except BaseException:
        stop = True
        # Had the loop not begun by now, it will find `stop` set.
        while begun.is_set() and not over.is_set():
            try:
                over.wait()
            except BaseException:  # a second interrupt: a job still writes to memory that the caller would free
                continue
        raise
    if failed:
        try:
            raise failed[0]
        finally:
            failed.clear()  # or the traceback would keep this frame, and this frame the traceback
