"""Many at once: every page that anybody sees is a committed record's, whoever writes, is stopped, or is killed."""

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import effort
import numpy as np
import pytest
from conftest import SHARED, Peer
from programs import private_mount, run_program
from stamps import DTYPE, SHAPE, Writer, check, folder_bytes, stamped

import memodb

STORE = {"shape": SHAPE, "dtype": DTYPE, "key_dim": 2}
#: Some wait for a stopped process; the kernel tells in this file when it stands.
STOPPED = "T"


@pytest.fixture(scope="module")
def readers():
    """Return four other processes."""
    peers = [Peer() for _ in range(4)]
    yield peers
    for peer in peers:
        peer.close()


def test_every_page_that_readers_see_is_stamped(readers, shm, shared_backend):
    """Four processes gather, hold and search while one puts, deletes, compacts and indexes anew."""
    until = shm / "over"
    with memodb.MemoDB.create(shm / "store", **STORE, **shared_backend) as db:
        writer = Writer(db)
        writer.turn()
        for seed, reader in enumerate(readers):
            reader.tell("watch", path=str(shm / "store"), until=str(until), seed=seed)
        for _ in effort.rounds(48, 0.05):
            writer.turn()
            assert not any(reader.answered() for reader in readers), [reader.answer() for reader in readers]
        until.touch()
        answers = [reader.answer() for reader in readers]
        assert not [answer for answer in answers if "error" in answer]
        pages = writer.check()
    figures = {name: sum(answer[name] for answer in answers) for name in answers[0]}
    assert min(answer["gathers"] for answer in answers) > 0
    assert figures["pages"] > figures["gathers"]
    figures["pages"] += pages
    effort.report("concurrency", backend=shared_backend["backend"], turns=writer.turns, **figures)
