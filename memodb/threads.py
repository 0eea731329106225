"""The helper threads of this process: they share one loop with whoever runs it.

Copying, prefaulting and checksums leave the GIL, so a few threads are worth having; but a thread that sleeps takes
longer to wake (tens of microseconds) than a small batch takes to copy. So nobody waits for a helper to arrive: the
caller begins at once, and helpers take what is left when they come.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from itertools import count
from queue import SimpleQueue

#: Threads that a loop may have, its caller included: more do not add bandwidth.
MOST = min(len(os.sched_getaffinity(0)), 8)


#: How often the caller looks whether its helpers are done before it sleeps.
_TURNS = 100


class _Loop:
    """One loop under way: ``work(0)`` to ``work(n - 1)``, each index taken once, in order."""

    def __init__(self, work: Callable[[int], object], n: int) -> None:
        self._work = work
        self._n = n
        self._next = count()
        self._lock = threading.Lock()
        self._helping = 0
        self._over = False
        self._idle: threading.Event | None = None  # where the caller waits for helpers
        self.error: BaseException | None = None

    def run(self) -> None:
        """Take indices until none is left, or one of them failed."""
        for i in self._next:  # one bytecode of C: no index is taken twice
            if i >= self._n or self.error is not None:
                return
            try:
                self._work(i)
            except BaseException as error:
                self.error = error

    def help(self) -> None:
        """Run in a helper, unless the loop is over."""
        with self._lock:
            if self._over:
                return
            self._helping += 1
        try:
            self.run()
        finally:
            with self._lock:
                self._helping -= 1
                if self._idle is not None:
                    self._idle.set()

    def wait(self) -> None:
        """Let no helper come any more, and wait for those that did. May be interrupted, and then called again."""
        for turn in count():
            with self._lock:
                self._over = True
                if not self._helping:
                    break
                if turn >= _TURNS:
                    self._idle = self._idle or threading.Event()
                    self._idle.clear()
            if self._idle is None:
                time.sleep(0)  # lets the helper have the GIL; to be woken would take longer than it does
            else:
                self._idle.wait()
        self._work = _nothing  # a helper that comes too late must not keep alive what the loop worked on


def _nothing(index: int) -> None:
    pass


class Crew:
    """Threads started at need, stopped with the last database, gone in a forked child."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Know of no threads (in a forked child there are none)."""
        self._lock = threading.RLock()  # a garbage collection inside may close the last database
        self._queue: SimpleQueue[_Loop | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []

    def share(self, work: Callable[[int], object], n: int, threads: int = MOST) -> None:
        """Run ``work(0)`` to ``work(n - 1)`` on up to `threads` threads, this one included; return when all are done.

        Raises
        ------
        BaseException
            What the first failing call raised; indices not yet begun are left out then.
        """
        helpers = min(threads, MOST, n) - 1
        loop = _Loop(work, n)
        try:
            if helpers > 0:
                self._start(helpers)
                for _ in range(min(helpers, len(self._threads))):
                    self._queue.put(loop)
            loop.run()
        except BaseException as error:  # an interrupt between two calls
            loop.error = error
        while True:  # whatever interrupts it: helpers may still write to memory that the caller would free
            try:
                loop.wait()
                break
            except BaseException as error:
                loop.error = error
        failed, loop.error = loop.error, None
        if failed is not None:
            try:
                raise failed
            finally:
                del failed, loop  # or the traceback would keep this frame, and this frame the traceback

    def _start(self, wanted: int) -> None:
        if len(self._threads) >= wanted:
            return
        with self._lock:
            while len(self._threads) < wanted:
                thread = threading.Thread(
                    target=_serve, args=(self._queue,), name=f"memodb-{len(self._threads) + 1}", daemon=True
                )
                self._threads.append(thread)  # first: an interrupt may come when it runs and `start` has not returned
                try:
                    thread.start()
                except RuntimeError:  # no more threads to be had (RLIMIT_NPROC): those there are do the work
                    self._threads.remove(thread)
                    return

    def stop(self) -> None:
        """Let the threads end, and wait for them (they may hold the last reference to a record file)."""
        with self._lock:
            # A queue of their own from here on: a newcomer must not take the end that is meant for one of these.
            threads, self._threads = self._threads, []
            queue, self._queue = self._queue, SimpleQueue()
            queue.put(None)
        for thread in threads:
            # One whose start was interrupted has no id, or not yet.
            if thread is not threading.current_thread() and thread.ident is not None:
                thread.join()


def _serve(queue: SimpleQueue[_Loop | None]) -> None:
    while (loop := queue.get()) is not None:
        loop.help()
        del loop  # what a loop holds must not live until the next one comes
    queue.put(None)  # for the next one: nobody counts them, so nobody can wait for an end that another one took


CREW = Crew()
os.register_at_fork(after_in_child=CREW.forget)
