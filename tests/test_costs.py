"""What "auto" goes by: costs of this machine, kept in a file; limits of what gathers may take."""

import json
from dataclasses import replace

import numpy as np
import pytest

import memodb
from memodb import calibration
from memodb.gather.costs import Costs, costs_here, load_costs, save_costs


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Where the costs of this test are kept; those of the process are read anew, now and afterwards."""
    path = tmp_path / "cache" / "calibration.json"
    monkeypatch.setenv("MEMODB_CALIBRATION", str(path))
    costs_here.cache_clear()
    yield path
    costs_here.cache_clear()


def test_costs_survive_the_file(file):
    costs = replace(Costs(), vma=1.5e-6, copied_byte=((1e-12,) * 7,))
    save_costs(costs, file)
    assert load_costs(file) == costs
    assert costs_here() == costs


DAMAGES = {
    "nothing": None,
    "no JSON": "{",
    "empty": "",
    "binary": "\x00\x01",
    "other JSON": "[1, 2]",
    "a number": "3",
    "nested": "[" * 100_000,
}


@pytest.mark.parametrize("text", DAMAGES.values(), ids=DAMAGES)
def test_an_unreadable_calibration_means_defaults(file, text, recwarn):
    if text is not None:
        file.parent.mkdir()
        file.write_text(text)
    assert load_costs(file) is None
    assert costs_here() == Costs()
    assert not recwarn.list


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("format",), 99),
        (("machine", "cpu"), "another"),
        (("costs", "vma"), -1.0),
        (("costs", "vma"), "fast"),
        (("costs", "vma"), float("nan")),
        (("costs", "huge_page"), True),
        (("costs", "mapped_byte"), [1e-12]),
        (("costs", "copied_byte"), []),
        (("costs",), {}),
    ],
    ids=str,
)
def test_a_calibration_that_does_not_fit_means_defaults(file, where, value):
    save_costs(Costs(), file)
    kept = json.loads(file.read_text())
    inside = kept
    for name in where[:-1]:
        inside = inside[name]
    inside[where[-1]] = value
    file.write_text(json.dumps(kept))
    assert load_costs(file) is None
    assert costs_here() == Costs()


def test_auto_goes_by_the_costs(file, make):
    """The same batch is mapped or copied, as the machine is said to charge."""
    db = make()
    values = np.arange(40 * 2048, dtype=np.float32).reshape(40, 2, 1024)
    ids = db.put(values)[::2]
    for costs, mapped in (
        (replace(Costs(), copied_record=0.5), True),
        (replace(Costs(), map_call=0.5), False),
    ):
        save_costs(costs, file)
        costs_here.cache_clear()
        with db.multiget_mapped(ids) as batch:
            assert batch.zero_copy == mapped
            assert np.array_equal(batch.numpy(), values[::2])


def test_calibration_measures_and_keeps(file, monkeypatch, shm):
    """On a small scale: what it finds is used at once, and nothing of its scratch stores is left."""
    monkeypatch.setattr(calibration, "_MOST_BYTES", 16 << 20)
    monkeypatch.setattr(calibration, "_BATCH", 4 << 20)
    told = []
    found = memodb.calibrate(shm, progress=lambda done, steps: told.append((done, steps)))
    assert found["path"] == str(file)
    assert json.loads(file.read_text())["costs"] == json.loads(json.dumps(found["costs"]))
    assert costs_here() == load_costs(file) != Costs()
    assert told[-1][0] == told[-1][1]
    assert list(shm.iterdir()) == []


def test_limits(make):
    before = memodb.gather_limits()
    assert before["idle_bytes"] > 0
    try:
        db = make()
        db.put(np.zeros((64, 2, 1024), np.float32))
        db.multiget_mapped(range(64), "copy").release()
        assert memodb.gather_limits()["idle_bytes_in_use"] >= 64 * 8192
        assert memodb.gather_limits(idle_bytes=0)["idle_bytes_in_use"] == 0
        db.multiget_mapped(range(64), "copy").release()
        assert memodb.gather_limits()["idle_bytes_in_use"] == 0
        memodb.gather_limits(mappings=10)
        held = db.multiget_mapped(range(0, 20, 2), "map")
        assert memodb.gather_limits()["mappings_in_use"] == 10
        with pytest.raises(memodb.MappingUnsupportedError, match="gather_limits"):
            db.multiget_mapped(range(0, 20, 2), "map")
        assert not db.multiget_mapped(range(0, 20, 2)).zero_copy
        held.release()
        db.multiget_mapped(range(0, 20, 2), "map").release()
        for bad in (-1, True, 1.5, "1"):
            with pytest.raises(memodb.InvalidOptionError):
                memodb.gather_limits(idle_bytes=bad)
    finally:
        memodb.gather_limits(idle_bytes=before["idle_bytes"], mappings=before["mappings"])
