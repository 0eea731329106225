"""How often a memo reused each record, told by its stats: during a block, after it, and with length buckets."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from tiny_models import PADDED, logits, tiny_batch, tiny_model

import memodb_transformers as mt


def test_reuse_is_counted_by_record(path: Path) -> None:
    model = tiny_model()
    mt.build(model, [tiny_batch([8] * 4)], path)
    with mt.memoize(model, path, threshold=1e-3, layers=[0]) as memo:
        assert memo.stats()["reuse"]["records_hit"] == 0
        logits(model, tiny_batch([8] * 4))
        assert memo.stats()["reuse"]["times"] == {"1": 4}
        memo.reset_stats()
        logits(model, tiny_batch([8] * 3))
        told = memo.stats()
    assert told["layers"][0]["hits"] == 3
    assert told["reuse"] == {"times": {"1": 1, "2": 3}, "records_hit": 4, "max": 2, "mean": 7 / 4}
    assert memo.stats()["reuse"] == told["reuse"]  # the store is closed by now


def test_reuse_is_told_by_bucket(path: Path) -> None:
    model = tiny_model()
    short = {name: value[:, : PADDED // 2] for name, value in tiny_batch([6] * 2).items()}
    mt.build(model, [short, tiny_batch([12] * 3)], path, buckets=(PADDED // 2, PADDED))
    with mt.memoize(model, path, threshold=1e-3, layers=[0]) as memo:
        logits(model, short)
    reuse = memo.stats()["reuse"]
    assert {length: found["records_hit"] for length, found in reuse.items()} == {PADDED // 2: 2, PADDED: 0}


def test_an_error_in_the_block_is_the_one_that_is_raised(path: Path) -> None:
    model = tiny_model()
    mt.build(model, [tiny_batch([8] * 4)], path)

    def fail() -> None:
        with mt.memoize(model, path, threshold=1e-3, layers=[0]):
            logits(model, tiny_batch([8] * 4))
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fail()


def test_an_evaluation_tells_no_reuse_as_its_runs_share_a_store(path: Path) -> None:
    model = tiny_model(initializer_range=0.05)
    mt.build(model, [tiny_batch([8] * 40)], path)
    report = mt.evaluate(model, [tiny_batch([8] * 6)], path, layers="all", repeats=1, progress=False)
    assert all("reuse" not in stats for stats in report.stats.values())
