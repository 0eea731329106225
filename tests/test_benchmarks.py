"""The benchmarks are right before they are quick: every contender delivers the same bytes, on tiny data."""

import json

import numpy as np
import pytest

from benchmarks import report, report_memo, targets
from benchmarks.builders import build
from benchmarks.clock import Samples, Turn, arrays_of, take_turns, timed_gather
from benchmarks.contenders import CONTENDERS
from benchmarks.profiles import BY_NAME, MOST_BATCH, Case
from benchmarks.race import Field, Race
from benchmarks.records import Records, evict, how_many


def _open(contender, folder, shape, dtype, n):
    records = Records(folder / "plain", shape, dtype, 12)
    if why := contender.obstacle(records.nbytes):
        pytest.skip(why)
    made = contender(records)
    build(made)
    made.open(np.ones((n, *shape), dtype))
    return records, made


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("contender", [c for c in CONTENDERS if c.name != "floor"], ids=lambda c: c.name)
def test_contenders_deliver_the_same_bytes(shm, contender, dtype):
    ids = np.array([7, 3, 11, 0, 3])
    shape = (2, 64, 32)
    records, made = _open(contender, shm, shape, dtype, len(ids))
    expected = np.array(records.open())[ids]
    for _ in range(2):  # into warm memory, if it has any
        found = made.gather(ids)
        arrays = arrays_of(found)
        if contender.contiguous:
            assert len(arrays) == 1
            assert arrays[0].flags.c_contiguous
            assert arrays[0].shape == expected.shape
        assert np.concatenate([a.reshape(-1) for a in arrays]).tobytes() == expected.tobytes()
        del found, arrays
    assert made.files()
    made.close()


def test_records_differ_from_each_other(shm):
    values = np.array(Records(shm / "plain", (4, 8), "float16", 40).open())
    assert len(np.unique(values.reshape(40, -1), axis=0)) == 40
    assert np.isfinite(values).all()


@pytest.mark.parametrize("where", ["warm", "cold"])
def test_a_race_times_every_contender(shm, disk, where):
    case = Case((2, 32, 32), "float32", 3, where)
    folder = shm if where == "warm" else disk
    race = Race(case, Field(folder, case, slow=True, stored=6), rounds=2, seconds=1.0, least=1)
    assert {"floor", "memodb", "list of views", "np.memmap[ids]"} <= set(race.samples)
    assert not {"floor", "memodb"} & set(race.absent)
    assert all(len(samples.turns) == 2 for samples in race.samples.values())
    assert all(samples.median() > 0 for samples in race.samples.values())


def test_evict_drops_what_nobody_holds(disk):
    path = disk / "file"
    path.write_bytes(b"\1" * (1 << 20))
    path.read_bytes()
    assert 0 <= evict([path]) <= 1  # how much is up to the file system: tmpfs keeps all, ext4 nothing


def test_turns_are_shared_out_and_the_slow_sit_out():
    ways = {"quick": lambda ids: Turn(0.001), "slow": lambda ids: Turn(1.0, 1.0, 1.0)}
    drawn = iter(range(100))
    samples = take_turns(ways, lambda: next(drawn), rounds=9, seconds=2.0, least=2)
    assert len(samples["quick"].turns) == 9
    assert len(samples["slow"].turns) == 2
    assert samples["slow"].median() == 3.0
    assert samples["slow"].call() == 2.0


def test_a_timed_gather_lets_go_of_what_it_got():
    died = []

    class Found(np.ndarray):
        def __del__(self):
            died.append(self.size)

    turn = timed_gather(lambda ids: np.ones(8, np.float32).view(Found))
    assert turn(None).total > 0
    assert 8 in died
    assert Samples([turn(None)]).median("read") > 0


@pytest.mark.parametrize("profile", BY_NAME.values(), ids=BY_NAME)
def test_profiles_keep_their_promises_of_memory(profile):
    for case in profile.cases:
        assert case.total <= MOST_BATCH
        slow = case.total <= profile.slow_bytes
        same = [c for c in profile.cases if (c.shape, c.dtype) == (case.shape, case.dtype)]
        same = [c for c in same if (c.total <= profile.slow_bytes) == slow]
        stored = max(how_many(c, profile) for c in same)
        files = len({c.store for c in CONTENDERS if slow or not c.slow})
        # The warm batch, a fresh one, and a copy buffer of memodb.
        assert stored * case.nbytes * files + 3 * case.total <= 12 << 30
        assert stored >= case.n


def _row(group, contender, total, **facts):
    parts = {"gather_ms": total / 2, "read_ms": total / 4, "release_ms": total / 4, "call_ms": total / 2}
    base = {"group": group, "contender": contender, "total_ms": total, "iqr_ms": 0.0, "rounds": 3, **parts}
    return base | facts


def _results():
    gathers = []
    for record, nbytes in (("12x512x512 float16", 6291456), ("12x64x64 float16", 98304)):
        facts = {"where": "warm", "n": 64, "record": record, "record_bytes": nbytes, "cached_before": 0.0}
        times = {"floor": 10.0, "memodb": 10.5, "np.memmap[ids]": 42.0, "torch.index_select(out=warm)": 21.0}
        for name, total in (times | {"list of views": 9.0}).items():
            kind = {"contiguous": name != "list of views", "times_floor": total / 10.0}
            gathers.append(_row(f"warm 64 x {record}", name, total, **facts, **kind))
    facts = {"record_bytes": 4096, "n": 4, "huge_pages": True, "chose": "map", "map_ms": 1.0, "copy_ms": 2.0}
    cell = _row("auto, huge pages", "4 x 4096 B", 1.2, **facts, auto_over_best=1.2, choice_over_best=1.0)
    machine = {"cpu": "a processor", "cpus": 2, "memory_gib": 8.0, "kernel": "6", "python": "3", "versions": {}}
    whole = {"machine": machine, "profile": "full"}
    group = "BERT-base, 6 layers, L = 512, batch 8"
    parts = {f"layer_{part}_ms": 1.25 for part in report_memo.PARTS}
    memo = [
        _row(
            group,
            name,
            ms,
            family="BERT",
            length=512,
            times_plain=ms / 100,
            times_eager=ms / 125,
            **more,
        )
        for name, ms, more in (
            ("plain", 100.0, {}),
            ("plain, eager", 125.0, {}),
            ("100% hits", 75.0, parts),
            ("0% hits, one lookup", 103.0, parts),
        )
    ]
    found = {"gather": gathers, "auto": [cell], "memo": memo}
    return {name: {**whole, "results": rows} for name, rows in found.items()}


def test_targets_are_found_in_results():
    found = {line["key"]: line for line in targets.evaluate(_results())}
    assert found["floor:12x512x512 float16"]["value"] == pytest.approx(1.05)
    assert found["floor:12x512x512 float16"]["met"] is True
    assert found["index_select:12x512x512 float16"]["value"] == pytest.approx(0.5)
    assert found["memmap:12x512x512 float16"]["value"] == pytest.approx(0.25)
    assert found["peer:12x64x64 float16"]["against"] == "torch.index_select(out=warm)"
    assert found["views:12x64x64 float16"]["met"] is False
    assert found["auto"]["met"] is False
    assert found["memo:bert"]["met"] is True
    assert found["memo:eager"]["value"] == pytest.approx(0.6)
    assert found["memo:one"]["met"] is False
    assert found["memo:deberta"]["met"] is None
    assert found["put"]["met"] is None
    assert "MISSED" in targets.as_text(_results())


def test_the_report_is_written_from_results_or_says_that_there_are_none(tmp_path):
    pytest.importorskip("matplotlib", reason="the report draws")
    results, docs = tmp_path / "results", tmp_path / "docs"
    results.mkdir()
    report.main([str(results), "--docs", str(docs)])
    assert "not measured yet" in (docs / "performance.md").read_text()
    for name, content in _results().items():
        (results / f"{name}.json").write_text(json.dumps(content))
    report.main([str(results), "--docs", str(docs)])
    text = (docs / "performance.md").read_text()
    assert "| 64 x 12x512x512 float16: times the read alone | 1.05 | 1.08 | yes |" in text
    assert "list of views" in text.split("Where memodb loses")[1]
    assert "| 100% hits | 75.0 | 0.750 | 0.600 |" in text
    assert "| 100% hits | 1.25 | 1.25 | 1.25 | 1.25 | 1.25 | 1.25 | 1.25 | 8.75 |" in text
    assert "Original attention, misses" in report_memo.as_text(_results())
    assert list((docs / "images").glob("*.svg"))
