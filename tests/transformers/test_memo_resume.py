"""A build that is killed goes on where it was, and ends with the store that it would have made."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import numpy as np  # noqa: E402
from tiny_models import PADDED, logits, tiny_batch, tiny_model  # noqa: E402

import memodb  # noqa: E402
import memodb_transformers as mt  # noqa: E402

STAGES = ("sample", "train", "record", "condense", "index", "profile", "tune")
SETTINGS: dict[str, Any] = {"embedder": "separable", "epochs": 2, "records_per_namespace": 3, "budget": 50.0}

# Kills itself on entering, or in the middle of, one stage.
KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[3])
import torch
torch.set_num_threads(1)
from memodb_transformers import work
from test_memo_resume import data, SETTINGS, STAGES
from tiny_models import tiny_model
import memodb_transformers as mt

at, middle = sys.argv[1], sys.argv[4] == "middle"

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def run(self, name, length, do, original=work.Work.run):
    if name == at and not middle:
        do()
        die()
    return original(self, name, length, do)

work.Work.run = run
if middle:
    noted = work.Work.note
    def note(self, key, value):
        noted(self, key, value)
        if key.endswith({"record": "/recorded", "train": "/layer=0"}[at]) and value.get("steps", 2) == 2:
            die()
    work.Work.note = note
mt.build(tiny_model(), data(), sys.argv[2], **SETTINGS)
"""


def data() -> list[dict[str, Any]]:
    lengths = [5, 9, 12, 16, 7, 5, 9, 12, 5, 5]
    return [{**tiny_batch(lengths, seed=seed), "labels": torch.arange(10) % 2} for seed in range(18)]


def killed(path: Path, stage: str, place: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, stage, str(path), str(Path(__file__).parent), place],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not path.exists()
    assert path.with_name("store.building").exists()


def content(path: Path) -> tuple[Any, ...]:
    with memodb.MemoDB.open(path) as db:
        assert db.verify() == []
        ids = db.ids()
        return db.namespace_of(ids), db.keys(ids), db.multiget(ids)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Sums of several threads are added in another order, which training makes larger: one gives equal embedders."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    path = tmp_path_factory.mktemp("whole") / "store"
    mt.build(tiny_model(), data(), path, **SETTINGS)
    return content(path)


@pytest.mark.parametrize(
    ("stage", "place"), [*((stage, "end") for stage in STAGES), ("record", "middle"), ("train", "middle")]
)
def test_a_build_killed_in_any_stage_goes_on(path: Path, whole: tuple[Any, ...], stage: str, place: str) -> None:
    killed(path, stage, place)
    report = mt.build(tiny_model(), data(), path, **SETTINGS)
    resumed = {row.name: row.resumed for row in report.stages}
    assert list(resumed) == list(STAGES)
    before = STAGES.index(stage)
    assert [resumed[name] for name in STAGES] == [number < before for number in range(len(STAGES))]
    assert not path.with_name("store.building").exists()
    names, keys, records = content(path)
    assert names == whole[0]
    np.testing.assert_allclose(keys, whole[1], atol=1e-6)
    np.testing.assert_allclose(records, whole[2], atol=1e-6)
    with mt.memoize(tiny_model(), path, level="tuned") as memo:
        assert memo.stats()["lookup"] == "layer"
    told = json.loads((path / "transformers" / "build.json").read_text())
    assert told["tuned"]["budget"] == 50.0
    assert told["path"] == str(path)


@pytest.mark.parametrize(
    ("changed", "said"),
    [({"epochs": 3}, "epochs"), ({"seed": 1}, "seed"), ({"records_per_namespace": 2}, "records_per_namespace")],
)
def test_an_unfinished_build_of_other_settings_is_refused_by_name(
    path: Path, changed: dict[str, Any], said: str
) -> None:
    killed(path, "record", "end")
    with pytest.raises(mt.UnfinishedBuildError, match=f"differs in: {said}"):
        mt.build(tiny_model(), data(), path, **{**SETTINGS, **changed})
    with pytest.raises(mt.UnfinishedBuildError, match="differs in: batches"):
        mt.build(tiny_model(), data()[:-1], path, **SETTINGS)
    with pytest.raises(mt.UnfinishedBuildError, match="differs in: model"):
        mt.build(tiny_model(seed=1), data(), path, **SETTINGS)
    report = mt.build(tiny_model(), data(), path, **SETTINGS)
    assert (report.sequences, report.held_out) == (144, 36)


def test_an_interrupt_keeps_what_was_done_and_says_where(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from memodb_transformers import stages

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stages, "condense", interrupted)
        with pytest.raises(KeyboardInterrupt) as caught:
            mt.build(tiny_model(), data(), path, **SETTINGS)
    assert str(path.with_name("store.building")) in caught.value.__notes__[0]
    report = mt.build(tiny_model(), data(), path, **SETTINGS)
    assert [stage.resumed for stage in report.stages[:4]] == [True, True, True, False]


def test_a_full_store_keeps_what_was_done(path: Path) -> None:
    with pytest.raises(memodb.StoreFullError):
        mt.build(tiny_model(), data(), path, **SETTINGS, max_bytes=40 * 4 * PADDED * PADDED * 4)
    assert path.with_name("store.building").exists()


def test_two_builds_of_one_path_exclude_each_other(path: Path) -> None:
    from memodb_transformers.work import Work

    with Work(path, {}).entered(), pytest.raises(memodb.WriterLockedError, match="another process is building"):
        mt.build(tiny_model(), data(), path, **SETTINGS)


def test_somebody_else_s_folder_is_not_built_in(path: Path) -> None:
    other = path.with_name("store.building")
    other.mkdir()
    (other / "thesis.txt").write_text("all of it")
    with pytest.raises(memodb.StoreExistsError, match=r"thesis\.txt"):
        mt.build(tiny_model(), data(), path, **SETTINGS)
    assert (other / "thesis.txt").read_text() == "all of it"


def test_a_damaged_journal_is_said_to_be_one(path: Path) -> None:
    killed(path, "record", "end")
    journal = path.with_name("store.building") / "journal.json"
    journal.write_text(journal.read_text()[:-20])
    with pytest.raises(mt.UnfinishedBuildError, match="damaged"):
        mt.build(tiny_model(), data(), path, **SETTINGS)


def test_a_store_made_at_the_path_meanwhile_is_not_touched(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from memodb_transformers import stages

    def meanwhile(*arguments: Any, original: Any = stages.condense, **options: Any) -> Any:
        path.mkdir()
        (path / "else").touch()
        return original(*arguments, **options)

    monkeypatch.setattr(stages, "condense", meanwhile)
    with pytest.raises(memodb.StoreExistsError, match="was made while"):
        mt.build(tiny_model(), data(), path, **SETTINGS)
    assert [file.name for file in path.iterdir()] == ["else"]


def test_the_report_tells_each_stage(path: Path) -> None:
    report = mt.build(tiny_model(), data(), path, **SETTINGS)
    assert [stage.name for stage in report.stages] == list(STAGES)
    assert all(stage.peak_memory > 1 << 20 and stage.bytes > 0 for stage in report.stages)
    assert report.training is not None
    assert [row.layer for row in report.training.layers] == [0, 1]
    assert report.condensed is not None
    assert report.condensed.records == report.records < report.condensed.source_records
    text = report.to_markdown()
    assert all(name in text for name in STAGES)
    assert os.listdir(path.parent) == ["store"]
    model = tiny_model()
    with mt.memoize(model, path, threshold=1e9, layers="all") as memo:
        logits(model, data()[0])
    # The fifth sequence of ten was kept out to tune with, and no other has seven tokens.
    assert memo.stats()["memoization_rate"] == 0.9


def test_a_build_killed_after_its_store_was_moved_begins_anew(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from memodb_transformers import work

    def die(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(work.os, "rename", lambda *names, move=os.rename: (move(*names), die()))
        with pytest.raises(KeyboardInterrupt):
            mt.build(tiny_model(), data(), path, **SETTINGS)
    assert path.exists()
    path.rename(path.with_name("elsewhere"))
    report = mt.build(tiny_model(), data(), path, **SETTINGS)
    assert not any(stage.resumed for stage in report.stages)
    assert sorted(part.name for part in path.parent.iterdir()) == ["elsewhere", "store"]


def test_what_would_fail_at_the_end_is_said_before_anything_is_recorded(path: Path) -> None:
    from transformers import BertConfig, BertModel

    with pytest.raises(ValueError, match="condensed_bytes to hold a record for each layer"):
        mt.build(tiny_model(), data(), path, condensed_bytes=100)
    bare = BertModel(BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32))
    with pytest.raises(mt.InvalidBatchError, match="logits of classes"):
        mt.build(bare, data(), path, budget=50.0)
    with pytest.raises((TypeError, ValueError), match="no_such_option"):
        mt.build(tiny_model(), data(), path, no_such_option=1)
    assert list(path.parent.iterdir()) == []


def test_somebody_else_may_not_write_where_a_build_goes_on(path: Path) -> None:
    place = path.with_name("store.building")
    place.mkdir()
    place.chmod(0o777)
    with pytest.raises(memodb.UnsafePathError, match="nobody else may write"):
        mt.build(tiny_model(), data(), path, **SETTINGS)
    assert list(place.iterdir()) == []
    place.rmdir()
    place.symlink_to(path.parent)
    with pytest.raises(memodb.UnsafePathError):
        mt.build(tiny_model(), data(), path, **SETTINGS)
