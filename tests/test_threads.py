"""The threads that share one loop: every index once, errors and interrupts at the caller, nobody left at work."""

import threading

import pytest

from memodb.threads import Crew


@pytest.fixture
def crew():
    made = Crew()
    yield made
    made.stop()


@pytest.mark.parametrize("n", [0, 1, 2, 7, 1000])
@pytest.mark.parametrize("threads", [1, 2, 8])
def test_every_index_is_worked_on_once(crew, n, threads):
    for _ in range(20):
        done = []
        crew.share(done.append, n, threads)
        assert sorted(done) == list(range(n))


def test_an_error_is_raised_and_ends_the_loop(crew):
    def work(i):
        if i == 3:
            raise ZeroDivisionError
        done.append(i)

    for _ in range(50):
        done = []
        with pytest.raises(ZeroDivisionError):
            crew.share(work, 10_000)
        assert len(done) < 10_000


def test_nobody_works_after_an_interrupt(crew):
    """The caller is interrupted while a helper is in the middle of its part: it waits for the helper all the same."""
    inside, go_on, after = threading.Event(), threading.Event(), threading.Event()
    late = []

    def work(i):
        if threading.current_thread() is threading.main_thread():
            inside.wait(60)
            timer = threading.Timer(0.05, go_on.set)
            timer.start()
            raise KeyboardInterrupt
        inside.set()
        go_on.wait(60)
        late.append(after.is_set())

    crew._start(1)
    with pytest.raises(KeyboardInterrupt):
        crew.share(work, 2, 2)
    after.set()
    assert late in ([False], []), "a helper wrote after share had returned"


def test_a_late_helper_keeps_nothing_alive(crew):
    import gc
    import weakref

    class Work:
        def __call__(self, i):
            pass

    work = Work()
    gone = weakref.ref(work)
    crew.share(work, 1, 2)
    crew.share(lambda i: None, 2, 2)
    del work
    gc.collect()
    assert gone() is None


def test_stopping_and_going_on(crew):
    for _ in range(3):
        done = []
        crew.share(done.append, 100)
        crew.stop()
        assert len(done) == 100


def test_stopping_while_others_go_on(crew):
    """The end that is meant for old helpers is not taken by new ones: nobody waits for ever."""
    inside, go_on = threading.Event(), threading.Event()

    def slow(i):
        inside.set()
        go_on.wait(60)

    loop = threading.Thread(target=crew.share, args=(slow, 2, 2))
    loop.start()
    inside.wait(60)
    stop = threading.Thread(target=crew.stop)
    stop.start()
    done = []
    for _ in range(20):
        crew.share(done.append, 10)
    go_on.set()
    loop.join(60)
    stop.join(60)
    assert not stop.is_alive()
    assert not loop.is_alive()
    assert len(done) == 200


def test_an_interrupted_start_does_not_hold_up_the_end(crew, monkeypatch):
    """A thread that runs, but whose start was interrupted, takes the end that was meant for another one."""

    def interrupted(thread):
        start(thread)
        raise KeyboardInterrupt

    start = threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", interrupted)
    for wanted in (1, 2, 3):
        with pytest.raises(KeyboardInterrupt):
            crew._start(wanted)
    monkeypatch.undo()
    crew._start(4)
    stopped = threading.Thread(target=crew.stop, daemon=True)
    stopped.start()
    stopped.join(30)
    assert not stopped.is_alive()
