"""What the profiler measures and leaves out, and Eq. 3 decided batch by batch. No test depends on measured times."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tiny_models import PADDED, join, logits, rows_of, snapshot, tiny_batch, tiny_model  # noqa: E402

import memodb_transformers as mt  # noqa: E402
from memodb_transformers.costs import PARTS  # noqa: E402

FREE = dict.fromkeys(PARTS, 0.0)


@pytest.fixture
def built(path: Path) -> tuple[Any, Path]:
    """A model whose attention is flat enough for any record of the same length to be similar, and its store."""
    model = tiny_model(initializer_range=0.05)
    mt.build(model, [tiny_batch([8] * 40)], path)
    return model, path


def set_costs(path: Path, *rows: dict[str, Any]) -> None:
    """Write known costs by layer, as of batches of 10 padded to 16: what is not named costs nothing."""
    file = path / "transformers" / "profile.json"
    profile = json.loads(file.read_text())
    for layer, costs in zip(profile["layers"], rows, strict=True):
        layer.update({f"{part}_seconds": 0.0 for part in PARTS})
        layer.update({"batch_size": 10, "padded_length": PADDED, "fixed_seconds": FREE, **costs})
    file.write_text(json.dumps(profile))


#: Pays in batches of more than 5: a second a sequence against 5 seconds for a lookup.
LARGE = {"attention_seconds": 1.0, "lookup_seconds": 0.5, "fixed_seconds": {**FREE, "lookup": 5.0}}
#: Pays in batches of fewer than 5: the lookup takes 2 seconds a sequence, the attention 5 seconds a batch and 1 each.
SMALL = {"attention_seconds": 1.5, "lookup_seconds": 2.0, "fixed_seconds": {**FREE, "attention": 5.0}}
ALWAYS = {"attention_seconds": 1.0}
NEVER = {"attention_seconds": 1.0, "lookup_seconds": 2.0}


def counts(memo: mt.Memo, name: str) -> list[int]:
    return [row[name] for row in memo.stats()["layers"]]


def test_each_batch_is_memoized_where_it_pays(built: tuple[Any, Path]) -> None:
    model, path = built
    set_costs(path, LARGE, SMALL)
    few, many = tiny_batch([8] * 3), tiny_batch([8] * 8)
    with mt.memoize(model, path) as memo:
        assert memo.layers == [0, 1]
        for _ in range(2):
            logits(model, few)
        assert counts(memo, "hits") == [0, 6]
        assert counts(memo, "bypassed") == counts(memo, "unprofitable") == [6, 0]
        logits(model, many)
        assert counts(memo, "hits") == [8, 6]
        assert counts(memo, "lookups") == [8, 6]
        assert counts(memo, "bypassed") == counts(memo, "unprofitable") == [6, 8]
        memo.reset_stats()
        assert counts(memo, "unprofitable") == [0, 0]


def test_the_padded_length_decides_as_well(built: tuple[Any, Path]) -> None:
    model, path = built
    # Of a batch of 10 the lookup takes 5 seconds, the attention 10, or 5 at half the length, less what hits cost.
    hit = {"hit_seconds": 0.1, **LARGE}
    set_costs(path, hit, hit)
    short = {name: value[:, :8] for name, value in tiny_batch([8] * 10).items()}
    with mt.memoize(model, path) as memo:
        logits(model, short)
        assert counts(memo, "unprofitable") == [10, 10]
        logits(model, tiny_batch([8] * 10))
        assert counts(memo, "hits") == [10, 10]
        assert counts(memo, "unprofitable") == [10, 10]


def test_an_unprofitable_batch_runs_as_without_a_memo(built: tuple[Any, Path]) -> None:
    model, path = built
    set_costs(path, LARGE, LARGE)
    batch = tiny_batch([8] * 3, seed=7)
    plain = logits(model, batch)
    with mt.memoize(model, path) as memo:
        assert torch.equal(logits(model, batch), plain)
    assert counts(memo, "lookups") == [0, 0]
    assert [row["search_seconds"] for row in memo.stats()["layers"]] == [0.0, 0.0]


def test_layers_that_never_pay_are_not_memoized(built: tuple[Any, Path]) -> None:
    model, path = built
    set_costs(path, NEVER, LARGE)
    with mt.memoize(model, path) as memo:
        assert memo.layers == [1]
        logits(model, tiny_batch([8] * 2))
    assert counts(memo, "bypassed") == counts(memo, "unprofitable") == [0, 2]


@pytest.mark.parametrize("layers", ["all", [0, 1]])
@pytest.mark.parametrize("lookup", ["layer", "sequence"])
def test_layers_asked_for_by_name_are_not_filtered(built: tuple[Any, Path], layers: Any, lookup: str) -> None:
    model, path = built
    set_costs(path, NEVER, LARGE)
    with mt.memoize(model, path, layers=layers, lookup=lookup) as memo:
        assert memo.layers == [0, 1]
        logits(model, tiny_batch([8] * 2))
    assert counts(memo, "hits") == [2, 2]
    assert counts(memo, "unprofitable") == [0, 0]


def test_one_lookup_must_be_paid_for_by_all_layers_of_the_batch(built: tuple[Any, Path]) -> None:
    model, path = built
    set_costs(path, LARGE, ALWAYS)  # two seconds a sequence against five for the lookup of a batch
    with mt.memoize(model, path, lookup="sequence") as memo:
        assert memo.layers == [0, 1]
        logits(model, tiny_batch([8] * 2))
        assert counts(memo, "hits") == counts(memo, "lookups") == [0, 0]
        assert counts(memo, "bypassed") == counts(memo, "unprofitable") == [2, 2]
        logits(model, tiny_batch([8] * 3))
        assert counts(memo, "hits") == [3, 3]


def test_the_first_layer_looks_up_for_others_where_it_does_not_pay_itself(built: tuple[Any, Path]) -> None:
    model, path = built
    # The first layer's hits cost more than its attention, unless the batch is small.
    first = {"attention_seconds": 0.5, "hit_seconds": 1.0, "fixed_seconds": {**FREE, "attention": 5.0}}
    set_costs(path, first, ALWAYS)
    with mt.memoize(model, path, lookup="sequence") as memo:
        assert memo.layers == [0, 1]
        logits(model, tiny_batch([8] * 8))
        assert counts(memo, "hits") == [0, 8]
        assert counts(memo, "bypassed") == counts(memo, "unprofitable") == [8, 0]
        logits(model, tiny_batch([8] * 2))
        assert counts(memo, "hits") == [2, 10]


def test_evaluation_decides_by_the_size_of_its_batches(built: tuple[Any, Path]) -> None:
    model, path = built
    set_costs(path, LARGE, NEVER)
    for rows, rate in ((3, 0.0), (8, 0.5)):
        found = mt.evaluate(model, [tiny_batch([8] * rows)], path, levels=["moderate"], repeats=1)
        assert found.rows[1]["memoization_rate"] == rate


def test_costs_are_measured_at_several_sizes_and_their_scaling_is_checked(built: tuple[Any, Path]) -> None:
    model, path = built
    before = snapshot(model)
    report = mt.profile(model, [tiny_batch([8] * 8, seed=5), tiny_batch([8] * 3, seed=6)], path)
    assert snapshot(model) == before
    assert (report.sequences, report.batch_size, report.attention) == (11, 8, "sdpa")
    for row in report.layers:
        assert (row.batch_size, row.padded_length) == (8, PADDED)
        assert min(row.attention_seconds, row.lookup_seconds, row.hit_seconds) > 0
        assert row.uncompiled_seconds == 0.0
        for part in PARTS:
            assert 0 <= row.fixed_seconds[part] <= row.seconds(part) * 8 * (1 + 1e-9)
            for errors in (row.scaling_error, row.linear_error):
                assert set(errors[part]) == {"batch", "length"}
                assert all(error is not None and math.isfinite(error) for error in errors[part].values())
    written = json.loads((path / "transformers" / "profile.json").read_text())
    assert mt.ProfileReport.from_dict(written, path) == report


@pytest.mark.parametrize("family", ["bert", "deberta-v2", "albert", "gpt2", "llama", "modernbert"])
@pytest.mark.parametrize("target", ["probs", "context"])
def test_batches_are_cut_to_size_for_every_kind_of_model(path: Path, family: str, target: str) -> None:
    model = tiny_model(family)
    mt.build(model, [tiny_batch([8, 16, 12, 16])], path, profile=False, target=target)
    batch = tiny_batch([8, 16, 12, 16, 16, 8, 12, 16], seed=5, left=[0, 2])
    batch["position_ids"] = torch.arange(PADDED)[None]
    if family.startswith("deberta"):
        batch["token_type_ids"] = torch.zeros(8, PADDED, dtype=torch.long)
    report = mt.profile(model, [batch], path)
    assert report.sequences > 0
    assert all(row.linear_error["hit"]["length"] is not None for row in report.layers)


def test_a_single_sequence_is_profiled_too(built: tuple[Any, Path]) -> None:
    model, path = built
    report = mt.profile(model, [tiny_batch([8], seed=5, padded=8)], path)
    row = report.layers[0]
    assert (row.batch_size, row.padded_length, report.padded_length) == (1, 8, PADDED)
    assert set(row.fixed_seconds.values()) == {0.0}
    assert row.scaling_error == {part: {"batch": None, "length": None} for part in PARTS}
    assert row.split_seconds == 0.0


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("store_dtype", ["float32", "float16", "bfloat16", "float8_e5m2", "float8_e4m3fn"])
@pytest.mark.parametrize("target", ["probs", "context"])
def test_sequences_that_the_store_holds_are_left_out(path: Path, family: str, store_dtype: str, target: str) -> None:
    model = tiny_model(family)
    known, new = tiny_batch([8, 5, 16, 8]), tiny_batch([8, 5, 16], seed=5)
    mt.build(model, [known], path, profile=False, store_dtype=store_dtype, target=target)
    # In other company, and padded on the other side.
    mixed = join(new, rows_of(known, [3, 1]), rows_of(tiny_batch([8, 5, 16, 8], left=[0, 1, 2, 3]), [2]))
    report = mt.profile(model, [mixed], path)
    assert (report.sequences, report.self_hits) == (3, 3)
    alone = mt.profile(model, [new], path)
    assert alone.self_hits == 0
    for row, same in zip(report.layers, alone.layers, strict=True):
        for name in ("distances", "sequence_distances"):
            assert getattr(row, name) == pytest.approx(getattr(same, name), rel=1e-3)
            assert min(getattr(row, name)) > 1e-4
    assert report.to_dict()["self_hits"] == 3
    assert "3 more are in the store" in report.to_markdown()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_half_precision_find_themselves_too(path: Path, dtype: Any) -> None:
    model = tiny_model().to(dtype)
    known = tiny_batch([8] * 6)
    mt.build(model, [known], path, profile=False, store_dtype=str(dtype).removeprefix("torch."))
    report = mt.profile(model, [join(rows_of(known, [2]), tiny_batch([8] * 2, seed=5))], path)
    assert (report.sequences, report.self_hits) == (2, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("embedder", ["projection", "separable"])
def test_sequences_find_themselves_in_another_precision_too(
    path: Path, dtype: Any, turned: bool, embedder: str
) -> None:
    model = tiny_model(initializer_range=0.2)
    other = tiny_model(initializer_range=0.2).to(dtype)
    if turned:
        model, other = other, model
    known = tiny_batch([8] * 20)
    mt.build(model, [known], path, profile=False, embedder=embedder)
    near = rows_of(known, [3])
    near["input_ids"][0, 4] += 1  # one token is another: not the same sequence
    report = mt.profile(other, [join(rows_of(known, [2]), near, tiny_batch([8] * 2, seed=5))], path)
    assert (report.sequences, report.self_hits) == (3, 1)


def test_nothing_but_stored_sequences_is_refused_and_changes_nothing(built: tuple[Any, Path]) -> None:
    model, path = built
    file = path / "transformers" / "profile.json"
    before = file.read_bytes()
    with pytest.raises(mt.InvalidBatchError, match=r"found 5, .* Profile on held-out data"):
        mt.profile(model, [tiny_batch([8] * 5)], path)
    assert file.read_bytes() == before
    with pytest.raises(mt.InvalidBatchError, match="whose tokens lie together"):
        mt.profile(model, [{**tiny_batch([8]), "attention_mask": torch.tensor([[1, 0] * (PADDED // 2)])}], path)
    assert file.read_bytes() == before


def test_a_build_whose_held_out_sequences_all_repeat_has_no_profile(path: Path) -> None:
    model = tiny_model()
    batch = tiny_batch([8] * 10)
    batch["input_ids"][9] = batch["input_ids"][0]
    report = mt.build(model, [batch], path)
    assert (report.held_out, report.profile) == (1, None)
    with pytest.raises(mt.StoreMismatchError, match="no profile"), mt.memoize(model, path):
        pass


class OneKey:
    """An embedder that tells nothing."""

    kind = "one"
    key_dim = 4

    def embed(self, layer: int, hidden: torch.Tensor, lengths: torch.Tensor) -> Any:
        return torch.ones(len(hidden), 4).numpy()

    def config(self) -> dict[str, Any]:
        return {"kind": self.kind}

    def arrays(self) -> dict[str, Any]:
        return {}


def test_equal_keys_of_different_sequences_are_no_self_hits(path: Path) -> None:
    model = tiny_model()
    known = tiny_batch([8])
    mt.build(model, [known], path, profile=False, embedder=OneKey())
    report = mt.profile(model, [join(known, tiny_batch([8] * 2, seed=5))], path, embedder=OneKey())
    assert (report.sequences, report.self_hits) == (2, 1)
    assert report.layers[0].distances == (0.0, 0.0)
    assert max(report.layers[0].similarities) < 0.99


def test_a_mean_of_many_is_no_sequence_but_a_mean_of_one_is(path: Path) -> None:
    model = tiny_model()
    many, one = tiny_batch([8] * 6), tiny_batch([5])
    mt.build(model, [join(many, one)], path, profile=False)
    small = path.with_name("small")
    mt.condense(path, small, records_per_namespace=2)
    report = mt.profile(model, [join(one, tiny_batch([5, 8], seed=5))], small)
    assert (report.sequences, report.self_hits) == (2, 1)
    shutil.rmtree(small)


def test_buckets_are_left_out_and_profiled_each_by_itself(path: Path) -> None:
    model = tiny_model(initializer_range=0.05)
    batches = {padded: tiny_batch([padded] * 20, padded=padded, seed=padded) for padded in (8, 16)}
    mt.build(model, batches.values(), path, buckets=(8, 16))
    files = {length: path / f"L={length}" / "transformers" / "profile.json" for length in batches}
    before = {length: file.read_bytes() for length, file in files.items()}
    # The second bucket is given nothing of its own: it keeps what it had.
    new = [tiny_batch([8] * 4, padded=8, seed=5), rows_of(batches[16], [0, 1])]
    report = mt.profile(model, [*new, rows_of(batches[8], [2])], path)
    assert [(bucket.padded_length, bucket.sequences) for bucket in report.buckets] == [(8, 4)]
    assert (report.sequences, report.self_hits) == (4, 1)
    assert files[8].read_bytes() != before[8]
    assert files[16].read_bytes() == before[16]
    with pytest.raises(mt.InvalidBatchError, match="found 3"):
        mt.profile(model, [rows_of(batches[8], [0]), rows_of(batches[16], [0, 1])], path)
    set_costs(path / "L=8", LARGE, LARGE)
    set_costs(path / "L=16", SMALL, SMALL)
    with mt.memoize(model, path) as memo:
        logits(model, rows_of(batches[8], [0, 1, 2]))
        logits(model, rows_of(batches[16], [0, 1, 2]))
        assert counts(memo, "hits") == [3, 3]
        assert counts(memo, "unprofitable") == [3, 3]


def test_the_attention_is_timed_as_the_model_has_it(path: Path) -> None:
    model = tiny_model(attention="eager")
    mt.build(model, [tiny_batch([8] * 4)], path, profile=False)
    assert mt.profile(model, [tiny_batch([8] * 2, seed=5)], path).attention == "eager"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, when it first imports its compiler
def test_the_attention_is_timed_compiled_where_that_is_asked_for(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = path.with_name("compiled")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(compiled))
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("torch.compile needs a C++ compiler")
    model = tiny_model(layers=1)
    mt.build(model, [tiny_batch([8] * 2)], path, profile=False)
    before = snapshot(model)
    report = mt.profile(model, [tiny_batch([8], seed=5, padded=8)], path, compiled=True)
    assert snapshot(model) == before
    assert report.attention == "sdpa, compiled"
    assert report.layers[0].attention_seconds > 0
    assert list(compiled.rglob("*.py"))
