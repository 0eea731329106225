"""The cost model: its fit, its errors, Eq. 3 at other sizes, and how they are shown. All numbers are made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import memodb_transformers as mt  # noqa: E402
from memodb_transformers.charts import bar_chart  # noqa: E402
from memodb_transformers.costs import PARTS, Cost, Shape, Shapes, fit_costs, scaling_errors  # noqa: E402
from memodb_transformers.timing import reference_shape  # noqa: E402

NO_ERRORS = {part: {"batch": None, "length": None} for part in PARTS}


def layer(number: int = 0, **settings: Any) -> mt.LayerProfile:
    """A layer that gains 4 us a sequence and pays 32 us for the lookup of a batch, measured with 32 sequences of 16."""
    plain: dict[str, Any] = {
        "attention_seconds": 10e-6,
        "lookup_seconds": 1e-6,
        "hit_seconds": 2e-6,
        "split_seconds": 0.0,
        "distances": (0.1, 0.3),
        "similarities": (0.95, 0.5),
        "sequence_distances": (0.1, 0.3),
        "sequence_similarities": (0.95, 0.5),
        "batch_size": 32,
        "padded_length": 16,
        "fixed_seconds": {**dict.fromkeys(PARTS, 0.0), "lookup": 32e-6},
        "scaling_error": NO_ERRORS,
        "linear_error": NO_ERRORS,
        **settings,
    }
    return mt.LayerProfile(layer=number, **plain)


@pytest.mark.parametrize(
    ("points", "fixed", "each"),
    [
        ([(8, 10.0), (2, 4.0)], 2.0, 1.0),
        ([(8, 10.0), (2, 1.0)], 0.0, 1.25),  # steeper than through the origin
        ([(8, 10.0), (2, 11.0)], 10.0, 0.0),  # a small batch took longer
        ([(8, 10.0)], 0.0, 1.25),
    ],
)
def test_costs_are_a_line_through_the_reference_and_never_negative(
    points: list[tuple[int, float]], fixed: float, each: float
) -> None:
    cost = Cost.fit(points)
    assert (cost.fixed, cost.per_sequence) == pytest.approx((fixed, each))
    assert cost.seconds(8) == pytest.approx(10.0)
    assert cost.seconds(16, 0.5) == pytest.approx(fixed + 8 * each)


def test_a_split_seen_once_is_taken_for_fixed_cost() -> None:
    assert Cost.fit([(2, 10.0)], alone_fixed=True) == Cost(10.0, 0.0)


def test_batches_are_timed_at_sizes_that_differ() -> None:
    assert Shapes.of(Shape(32, 64)).all == [Shape(32, 64), Shape(8, 64), Shape(16, 64), Shape(32, 32)]
    assert Shapes.of(Shape(3, 15)).all == [Shape(3, 15), Shape(1, 15)]
    assert Shapes.of(Shape(1, 16)).all == [Shape(1, 16), Shape(1, 8)]
    assert Shapes.of(Shape(4, 8)).all == [Shape(4, 8), Shape(1, 8), Shape(2, 8)]
    sizes = [Shape(8, 16), Shape(8, 8), Shape(8, 16), Shape(2, 16)]
    assert reference_shape(sizes) == Shape(8, 16)
    assert reference_shape(sizes[1:2] + sizes[3:]) == Shape(8, 8)


def test_errors_are_against_measurements_that_the_fit_has_not_seen() -> None:
    shapes = Shapes.of(Shape(8, 16))
    of = {"reference": 10.0, "small": 4.0, "half": 7.5, "short": 4.0}  # 2 + n; half is 6, short is 2 + 4
    measured = {
        getattr(shapes, name): {"attention": seconds, "lookup": 1.0, "hit": 2.0, "split": 0.0, "uncompiled": 1.0}
        for name, seconds in of.items()
    }
    costs = fit_costs(shapes, measured)
    fitted, linear = scaling_errors(shapes, measured, costs)
    assert fitted["attention"] == pytest.approx({"batch": 1.5 / 7.5, "length": 2.0 / 4.0})
    assert linear["attention"] == pytest.approx({"batch": 2.5 / 7.5, "length": 1.0 / 4.0})
    assert fitted["lookup"] == {"batch": 0.0, "length": 0.0}
    assert linear["lookup"] == {"batch": 0.5, "length": 0.5}
    assert fitted["split"] == {"batch": 0.0, "length": 0.0}  # nothing, predicted as nothing
    assert linear["uncompiled"] == pytest.approx({"batch": 0.5 / 7.5, "length": 0.5 / 4.0})  # of the attention's time


def test_what_was_not_measured_has_no_error() -> None:
    shapes = Shapes.of(Shape(2, 8))
    parts = {"attention": 1.0, "lookup": 1.0, "hit": 1.0, "split": 0.5, "uncompiled": 0.0}
    measured = {shapes.reference: parts, shapes.small: {**parts, "split": None}}
    costs = fit_costs(shapes, measured)  # type: ignore[arg-type]
    assert costs["split"] == Cost(0.5, 0.0)
    assert scaling_errors(shapes, measured, costs) == (NO_ERRORS, NO_ERRORS)  # type: ignore[arg-type]


def test_a_layer_pays_in_large_batches_and_loses_in_small_ones() -> None:
    row = layer()
    # Half of the sequences hit: each of these saves 8 us; one lookup of a batch is 32 us, whatever its size.
    assert row.benefit(0.2) == pytest.approx(3e-6)
    for batch in (1, 4, 8, 32, 128):
        assert row.benefit(0.2, batch=batch) == pytest.approx(4e-6 - 32e-6 / batch)
    assert row.benefit(0.2, batch=32, padded=8) == pytest.approx(2e-6 - 1e-6)
    assert row.benefit(0.2, "sequence", batch=1) == pytest.approx(4e-6)
    assert row.benefit(0.2, batch=32, padded=16) == row.benefit(0.2)
    report = mt.ProfileReport((row,), 2, 32, 1, "sdpa", 16)
    assert [report.paying({0: 0.2}, batch=batch) for batch in (1, 4, 7, 9)] == [[], [], [], [0]]
    assert [report.paying({0: 0.2}, batch=9, padded=padded) for padded in (16, 8)] == [[0], []]


def test_a_layer_that_loses_in_the_batches_measured_may_pay_in_others() -> None:
    row = layer(fixed_seconds={**dict.fromkeys(PARTS, 0.0), "lookup": 160e-6}, lookup_seconds=5e-6)
    report = mt.ProfileReport((row,), 2, 32, 1, "sdpa", 16)
    assert report.paying({0: 0.2}) == []
    assert report.may_pay({0: 0.2}) == [0]
    assert report.may_pay({0: 0.05}) == report.may_pay({}) == []
    hopeless = mt.ProfileReport((layer(lookup_seconds=6e-6),), 2, 32, 1, "sdpa", 16)
    assert hopeless.may_pay({0: 0.2}) == []


def test_one_sequence_is_never_split() -> None:
    row = layer(split_seconds=1.0, fixed_seconds=dict.fromkeys(PARTS, 0.0))
    assert row.benefit(0.2, batch=2) < 0 < row.benefit(0.2, batch=1)
    assert mt.ProfileReport((row,), 2, 32, 1, "sdpa", 16).may_pay({0: 0.2}) == [0]


def test_all_layers_together_pay_for_the_one_lookup_of_a_batch() -> None:
    rows = (layer(0), layer(1))
    report = mt.ProfileReport(rows, 2, 32, 1, "sdpa", 16)
    found = [report.paying({0: 0.2, 1: 0.2}, "sequence", batch=batch) for batch in (1, 3, 5, 32)]
    assert found == [[], [], [0, 1], [0, 1]]  # 8 us a sequence against 32 us a batch
    assert report.paying({1: 0.2}, "sequence", batch=7) == []
    assert report.may_pay({1: 0.2}, "sequence") == [1]


def test_misses_of_a_compiled_model_run_as_they_are() -> None:
    row = layer(uncompiled_seconds=3e-6)
    assert row.overhead(0.2) == pytest.approx(1e-6 + 0.5 * 2e-6 + 0.5 * 3e-6)
    assert row.benefit(0.2) == pytest.approx(5e-6 - row.overhead(0.2))
    assert row.benefit(None) == pytest.approx(-4e-6)


@pytest.mark.parametrize("sizes", [{"batch": 0}, {"padded": 0}, {"batch": -1, "padded": 4}])
def test_sizes_that_are_none_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        layer().benefit(0.2, **sizes)
    with pytest.raises(ValueError, match="attention, lookup, hit"):
        layer().seconds("search")


def test_a_profile_survives_json() -> None:
    rows = (layer(0), layer(1, scaling_error={**NO_ERRORS, "hit": {"batch": 0.25, "length": None}}))
    report = mt.ProfileReport(rows, 2, 32, 1, "sdpa, compiled", 16, self_hits=3)
    again = mt.ProfileReport.from_dict(json.loads(json.dumps(report.to_dict())), Path("store"))
    assert again == report


def _without(name: str) -> Any:
    return lambda plain: plain["layers"][0].pop(name)


@pytest.mark.parametrize(
    "harm",
    [
        *map(_without, ("fixed_seconds", "scaling_error", "linear_error", "batch_size", "uncompiled_seconds")),
        lambda plain: plain.pop("self_hits"),
        lambda plain: plain["layers"][0].update(batch_size=0),
        lambda plain: plain["layers"][0].update(fixed_seconds={"attention": 1.0}),
        lambda plain: plain["layers"][0]["fixed_seconds"].update(hit=-1.0),
        lambda plain: plain["layers"][0].update(lookup_seconds=float("nan")),
        lambda plain: plain["layers"][0].update(scaling_error=[]),
        lambda plain: plain["layers"][0]["linear_error"]["hit"].update(batch=float("inf")),
    ],
)
def test_a_damaged_or_older_profile_is_to_be_made_again(harm: Any) -> None:
    plain = json.loads(json.dumps(mt.ProfileReport((layer(),), 2, 32, 1, "sdpa", 16).to_dict()))
    harm(plain)
    with pytest.raises(mt.StoreMismatchError, match="profile the store again"):
        mt.ProfileReport.from_dict(plain, Path("store"))


def test_bars_grow_to_the_right_for_gains_and_to_the_left_for_losses() -> None:
    assert bar_chart(["a", "bb"], [100.0, -50.0], unit="us", width=6) == (
        "a     |####  +100 us\n"  #
        "bb  --|       -50 us\n"
    )
    assert bar_chart(["a", "b"], [1000.0, 1.0], width=4).splitlines() == ["a  |####  +1,000", "b  |#         +1"]
    assert bar_chart(["a"], [0.0]) == "a  |  +0\n"
    assert bar_chart([], []) == ""


def test_the_report_shows_costs_a_chart_and_errors() -> None:
    errors = {**NO_ERRORS, "attention": {"batch": 0.125, "length": 0.5}}
    gains, loses = layer(0, scaling_error=errors), layer(1, lookup_seconds=9e-6)
    text = mt.ProfileReport((gains, loses), 2, 32, 1, "sdpa", 16, self_hits=4).to_markdown()
    assert "4 more are in the store and were left out" in text
    chart = text.split("```")[1].strip("\n").splitlines()
    assert [line.split()[-2:] for line in chart] == [["+3", "us"], ["-5", "us"]]
    assert ["#" in line for line in chart] == [True, False]
    scaling = next(line for line in text.splitlines() if line.startswith("| attention "))
    assert [cell.strip() for cell in scaling.strip("|").split("|")] == ["attention", "0", "12 %", "-", "50 %", "-"]
    assert "uncompiled" not in text
    assert "uncompiled" in mt.ProfileReport((layer(uncompiled_seconds=1e-6),), 2, 32, 1, "sdpa").to_markdown()
