"""Controls: the same sequences reuse another record, and a report that tells how good the nearest one is."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import numpy as np  # noqa: E402
from tiny_models import (  # noqa: E402
    FAMILIES,
    PADDED,
    join,
    logits,
    reference_logits,
    rows_of,
    snapshot,
    tiny_batch,
    tiny_model,
)

import memodb  # noqa: E402
import memodb_transformers as mt  # noqa: E402
from memodb_transformers import fidelity  # noqa: E402
from memodb_transformers.attention import MemoAttention  # noqa: E402
from memodb_transformers.trials import Trial  # noqa: E402

ANY = 1e9
LEVEL = 0.5
CONTROLS = ("random", "mean", "nearest", "oracle")
KINDS = ("plain", *CONTROLS)
LENGTHS = (5, 8, 16)


def store(model: Any, path: Path, threshold: float = ANY, *, known: Any = None, **options: Any) -> None:
    """Build a store of ten sequences of each length; every level then has one threshold."""
    mt.build(model, [tiny_batch(LENGTHS * 10)] if known is None else known, path, profile=False, **options)
    if (path / "transformers").exists():
        calibrate(model, path, threshold)


def calibrate(model: Any, path: Path, threshold: float) -> None:
    """Give a store a profile in which the similarity is 1 up to a threshold."""
    mt.profile(model, [tiny_batch(LENGTHS, seed=3)], path)
    file = path / "transformers" / "profile.json"
    profile = json.loads(file.read_text())
    for row in profile["layers"]:
        for prefix in ("", "sequence_"):
            row.update({f"{prefix}distances": [threshold], f"{prefix}similarities": [1.0]})
    file.write_text(json.dumps(profile))


def tried(model: Any, batches: Sequence[Any], path: Path, **options: Any) -> dict[str, dict[str, Any]]:
    """Evaluate at one level: the rows by kind."""
    settings = {"kinds": KINDS, "levels": [LEVEL], "layers": "all", "repeats": 1, **options}
    rows = mt.evaluate(model, batches, path, **settings).rows
    return {row["kind"]: row for row in rows}


def change(found: torch.Tensor, plain: torch.Tensor) -> float:
    """Mean relative difference of logits ``[n, C]``."""
    norm = torch.linalg.vector_norm
    return float((norm(found - plain, dim=-1) / norm(plain, dim=-1)).mean())


def stored(path: Path, layer: int, length: int) -> torch.Tensor:
    """Read all records of a namespace."""
    with memodb.MemoDB.open(path) as db:
        return torch.from_numpy(db.multiget(db.ids(f"layer={layer}/len={length}"))).float()


@contextmanager
def noted_decisions() -> Iterator[dict[str, set[Any]]]:
    """Note by kind which rows of which batch and layer are hits, and which records they reuse."""
    noted: dict[str, set[Any]] = {}
    running: list[Trial] = []
    attend, run = MemoAttention.attend, Trial.running

    @contextmanager
    def note_run(self: Trial, model: Any) -> Iterator[None]:
        running.append(self)
        with run(self, model):
            yield
        running.pop()

    def note(
        self: MemoAttention, args: Any, kwargs: Any, call: Any, spans: Any, store: Any, found: Any, **more: Any
    ) -> Any:
        trial = running[-1]
        assert trial.reuse is not None
        key = (trial.reuse.batch, self.site.layer, tuple(found.ids.tolist()))
        noted.setdefault(trial.kind, set()).add(key)
        return attend(self, args, kwargs, call, spans, store, found, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trial, "running", note_run)
        patch.setattr(MemoAttention, "attend", note)
        yield noted


@pytest.mark.parametrize("lookup", ["layer", "sequence"])
def test_controls_reuse_other_records_in_the_very_same_sequences(path: Path, lookup: str) -> None:
    model = tiny_model(layers=3)
    store(model, path)
    fresh = [tiny_batch(LENGTHS * 3, seed=7), tiny_batch([8, 3], seed=8)]
    # A threshold that some rows of later layers meet and some do not.
    with mt.memoize(model, path, threshold=ANY, layers="all", lookup=lookup) as memo:
        logits(model, fresh[0])
    assert memo.stats()["memoization_rate"] == 1.0
    distances = sorted(mt.profile(model, fresh, path).layers[1].distances[:9])
    calibrate(model, path, distances[4])
    with noted_decisions() as noted:
        rows = tried(model, fresh, path, lookup=lookup, repeats=2)
    hits = {
        kind: {(batch, layer, tuple(i >= 0 for i in ids)) for batch, layer, ids in found}
        for kind, found in noted.items()
    }
    assert hits["random"] == hits["mean"] == hits["oracle"] == hits["nearest"]
    assert any(any(mask) and not all(mask) for _, _, mask in hits["nearest"])
    # Each batch and layer has one choice, whatever the pass; and the choices are not the same.
    for kind in CONTROLS:
        assert len(noted[kind]) == len({(batch, layer) for batch, layer, _ in noted[kind]})
    assert noted["random"] != noted["nearest"] != noted["oracle"]
    assert 0 < rows["nearest"]["memoization_rate"] < 1
    assert len({rows[kind]["memoization_rate"] for kind in CONTROLS}) == 1


def test_each_layer_has_the_same_hits_in_each_kind(path: Path) -> None:
    model = tiny_model()
    store(model, path)
    report = mt.evaluate(
        model, [tiny_batch(LENGTHS, seed=7)], path, kinds=KINDS, levels=[LEVEL, "moderate"], layers=[1], repeats=1
    )
    assert report.main == "nearest"
    assert list(report.stats) == ["0.5", "moderate"]
    for by_level in report.stats_by_kind.values():
        for stats in by_level.values():
            assert [row["hits"] for row in stats["layers"]] == [0, 3]
    assert report.to_dict()["stats_by_kind"]["oracle"]["0.5"]["sequences"] == 3
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()
    table = report.to_markdown()
    assert "| nearest: level | layer | hits | rate" in table
    assert "95 %" in table


def test_the_mean_is_that_of_the_layer_and_length(path: Path) -> None:
    model = tiny_model()
    store(model, path)
    fresh = tiny_batch([8, 8, 5], seed=7)
    means = [{length: stored(path, layer, length).mean(dim=0) for length in LENGTHS} for layer in range(2)]
    row = tried(model, [fresh], path)["mean"]
    expected = reference_logits(model, fresh, means)
    assert row["output_change"] == pytest.approx(change(expected, logits(model, fresh)), rel=1e-3)
    assert row["bytes"] == 2 * 3 * 4 * PADDED * PADDED * 4
    first = tried(model, [fresh], path, layers=[0])["mean"]
    own = tiny_eager_probabilities(model, fresh)[0]
    scores = [mt.similarity_score(own[i], means[0][length], lengths=length) for i, length in enumerate((8, 8, 5))]
    assert first["similarity"] == pytest.approx(float(np.mean(scores)), abs=1e-5)


def tiny_eager_probabilities(model: Any, batch: Any) -> list[torch.Tensor]:
    """Run a copy of a BERT with eager attention: its probabilities by layer, with nothing in the columns of padding."""
    eager = tiny_model(attention="eager", layers=len(model.bert.encoder.layer))
    eager.load_state_dict(model.state_dict())
    with torch.no_grad():
        found: list[torch.Tensor] = list(eager(**batch, output_attentions=True).attentions)
    return found


def test_similarity_is_to_what_the_layer_would_compute_in_the_memoized_run(path: Path) -> None:
    model = tiny_model(attention="eager")
    store(model, path, known=[tiny_batch([8])])
    fresh = tiny_batch([8, 8], seed=7)
    seen: list[torch.Tensor] = []
    handle = model.bert.encoder.layer[1].attention.self.register_forward_hook(
        lambda _, args, output: seen.append(output[1])
    )
    with mt.memoize(model, path, threshold=ANY, layers=[0]):
        logits(model, fresh)  # the second layer computes, from what the first one's reuse made of the sequence
    handle.remove()
    own = [tiny_eager_probabilities(model, fresh)[0], seen[-1]]
    scores = [
        mt.similarity_score(own[layer][row], stored(path, layer, 8)[0], lengths=8)
        for layer in range(2)
        for row in range(2)
    ]
    row = tried(model, [fresh], path, kinds=["nearest"])["nearest"]
    assert row["similarity"] == pytest.approx(float(np.mean(scores)), abs=1e-5)


@pytest.mark.parametrize("target", ["probs", "context"])
def test_the_oracle_is_the_most_similar_of_all(path: Path, target: str) -> None:
    model = tiny_model()
    store(model, path, target=target)
    rows = tried(model, [tiny_batch(LENGTHS * 3, seed=7)], path, layers=[0])
    assert rows["oracle"]["similarity"] > max(rows["nearest"]["similarity"], rows["random"]["similarity"])
    assert rows["nearest"]["similarity"] != rows["random"]["similarity"]
    if target == "context":
        return
    fresh = tiny_batch([8] * 3, seed=7)
    own = tiny_eager_probabilities(model, fresh)[0]
    best = [max(mt.similarity_score(mine, record, lengths=8) for record in stored(path, 0, 8)) for mine in own]
    found = tried(model, [fresh], path, layers=[0])["oracle"]["similarity"]
    assert found == pytest.approx(float(np.mean(best)), abs=1e-5)


def test_the_oracle_may_be_had_without_measuring_similarity(path: Path) -> None:
    model = tiny_model()
    store(model, path)
    fresh = [tiny_batch(LENGTHS * 3, seed=7)]
    with_scores, without = (tried(model, fresh, path, similarity=similar) for similar in (True, False))
    assert all(row["similarity"] is None for row in without.values())
    for kind in KINDS:
        assert without[kind]["output_change"] == with_scores[kind]["output_change"]


def test_random_records_depend_on_the_seed_alone(path: Path) -> None:
    model = tiny_model()
    store(model, path)
    fresh = [tiny_batch(LENGTHS * 3, seed=7)]
    first, again, other = (
        tried(model, fresh, path, kinds=["random", "nearest"], seed=seed, similarity=False) for seed in (0, 0, 1)
    )
    assert first["random"]["output_change"] == again["random"]["output_change"]
    assert first["random"]["output_change"] != other["random"]["output_change"]
    assert first["nearest"]["output_change"] == other["nearest"]["output_change"]
    alone = tried(model, fresh, path, kinds=["random"], levels=["moderate"], similarity=False)
    assert alone["random"]["output_change"] == first["random"]["output_change"]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_recorded_itself_is_reused_as_it_was(path: Path, family: str) -> None:
    model = tiny_model(family)
    known = tiny_batch([16, 9, 5], left=[1] if FAMILIES[family].causal else [])
    store(model, path, known=[known], threshold=1e-4)
    kinds = ("plain", "nearest", "random", "mean", "oracle")  # one record a length: all are the same
    rows = tried(model, [known], path, kinds=kinds)
    for kind in kinds[1:]:
        assert rows[kind]["memoization_rate"] == 1.0
        assert rows[kind]["similarity"] == pytest.approx(1.0, abs=1e-4)
        assert rows[kind]["agreement"] == 1.0
        assert rows[kind]["output_change"] < 1e-3
        if FAMILIES[family].causal:
            assert rows[kind]["perplexity"] == pytest.approx(rows["plain"]["perplexity"], rel=1e-4)


def test_the_perplexity_of_a_memoized_decoder_is_that_of_its_logits(path: Path) -> None:
    model = tiny_model("gpt2")
    store(model, path, known=[tiny_batch([12])])
    fresh = tiny_batch([12, 12, 12], seed=7, left=[1])
    fresh["position_ids"] = (fresh["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    with mt.memoize(model, path, threshold=ANY, layers="all") as memo, torch.no_grad():
        found = model(**fresh).logits
    assert memo.stats()["memoization_rate"] == 1.0
    chances, count = 0.0, 0
    for ids, mask, scores in zip(fresh["input_ids"], fresh["attention_mask"], found, strict=True):
        for place in mask.nonzero()[:-1, 0].tolist():
            chances += scores[place].double().log_softmax(dim=0)[ids[place + 1]].item()
            count += 1
    rows = tried(model, [fresh], path, kinds=["plain", "nearest"])
    assert rows["nearest"]["perplexity"] == pytest.approx(np.exp(-chances / count), rel=1e-4)
    assert rows["nearest"]["accuracy"] is None
    apart = rows["nearest"]["perplexity"] - rows["plain"]["perplexity"]
    assert rows["nearest"]["perplexity_change"] == pytest.approx(apart)
    assert rows["nearest"]["perplexity_change_low"] <= apart <= rows["nearest"]["perplexity_change_high"]
    assert rows["plain"]["perplexity_change_low"] == rows["plain"]["perplexity_change_high"] == 0.0
    labelled = tried(model, [{**fresh, "labels": fresh["input_ids"]}], path, kinds=["plain"])["plain"]
    assert 0.0 <= labelled["accuracy"] <= 1.0
    assert labelled["perplexity"] == rows["plain"]["perplexity"]


def test_tokens_that_are_classified_are_counted_one_by_one(path: Path) -> None:
    model = tiny_model(head="ForTokenClassification", num_labels=3)
    store(model, path)
    fresh = tiny_batch([8, 5], seed=7)
    labels = torch.randint(0, 3, (2, PADDED), generator=torch.Generator().manual_seed(0))
    labels[0, 2] = -100
    counted = fresh["attention_mask"].bool() & (labels != -100)
    plain = logits(model, fresh).argmax(dim=-1)
    with mt.memoize(model, path, threshold=ANY, layers="all"):
        found = logits(model, fresh).argmax(dim=-1)
    rows = tried(model, [{**fresh, "labels": labels}], path, kinds=["plain", "nearest"])
    assert rows["plain"]["accuracy"] == pytest.approx((plain == labels)[counted].float().mean().item())
    assert rows["nearest"]["accuracy"] == pytest.approx((found == labels)[counted].float().mean().item())
    tokens = fresh["attention_mask"].bool()
    assert rows["nearest"]["agreement"] == pytest.approx((plain == found)[tokens].float().mean().item())
    assert rows["nearest"]["perplexity"] is rows["plain"]["perplexity"] is None


def test_changes_and_intervals_are_paired_with_the_plain_model(path: Path) -> None:
    model = tiny_model(head="ForSequenceClassification", num_labels=4)
    store(model, path)
    fresh = tiny_batch(LENGTHS * 8, seed=7)
    fresh["labels"] = logits(model, fresh).argmax(dim=-1)
    fresh["labels"][::4] = 0
    rows = tried(model, [fresh], path, repeats=1)
    for row in rows.values():
        assert row["accuracy_change"] == pytest.approx(row["accuracy"] - rows["plain"]["accuracy"])
        assert row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"]
        assert row["accuracy_change_low"] <= row["accuracy_change"] <= row["accuracy_change_high"]
        assert row["agreement_low"] <= row["agreement"] <= row["agreement_high"]
    assert (rows["plain"]["accuracy_change_low"], rows["plain"]["accuracy_change_high"]) == (0.0, 0.0)
    assert rows["random"]["agreement"] < 1.0
    wider = tried(model, [fresh], path, kinds=["nearest"], confidence=0.5)["nearest"]
    assert (
        wider["accuracy_high"] - wider["accuracy_low"]
        < rows["nearest"]["accuracy_high"] - rows["nearest"]["accuracy_low"]
    )
    known = tiny_batch(LENGTHS * 10)
    known["labels"] = torch.zeros(30, dtype=torch.long)
    calibrate(model, path, 1e-4)
    itself = tried(model, [known], path, kinds=["nearest"])["nearest"]
    assert itself["memoization_rate"] == 1.0
    assert itself["accuracy_change_low"] == itself["accuracy_change_high"] == itself["accuracy_change"] == 0.0


def test_averaged_neighbours_are_compared_with_as_many_random_records(path: Path) -> None:
    model = tiny_model()
    store(model, path)
    fresh = [tiny_batch([8] * 6, seed=7)]
    # As many neighbours as the namespace has records: nearest and random are its mean.
    rows = tried(model, fresh, path, neighbours=10)
    for kind in ("nearest", "random"):
        assert rows[kind]["output_change"] == pytest.approx(rows["mean"]["output_change"], rel=1e-4)
        assert rows[kind]["similarity"] == pytest.approx(rows["mean"]["similarity"], abs=1e-5)
    few = tried(model, fresh, path, neighbours=3)
    assert few["nearest"]["output_change"] != pytest.approx(few["mean"]["output_change"], rel=1e-4)
    assert few["mean"]["output_change"] == pytest.approx(rows["mean"]["output_change"], rel=1e-5)


def test_a_condensed_store_stands_beside_the_others(path: Path) -> None:
    model = tiny_model()
    store(model, path)
    means = path.with_name("means")
    mt.condense(path, means, records_per_namespace=1)
    calibrate(model, means, ANY)
    fresh = [tiny_batch(LENGTHS, seed=7)]
    report = mt.evaluate(model, fresh, path, condensed=means, levels=[LEVEL], layers="all", repeats=1)
    assert [row["kind"] for row in report.rows] == ["plain", "random", "mean", "nearest", "condensed"]
    *_, mean, nearest, condensed = report.rows
    # One mean a namespace is what the kind mean makes for itself.
    for name in ("output_change", "similarity", "memoization_rate", "bytes"):
        assert condensed[name] == pytest.approx(mean[name], rel=1e-6)
    assert nearest["bytes"] == 10 * mean["bytes"]
    calibrate(model, means, 0.0)
    own = mt.evaluate(
        model, fresh, path, condensed=means, levels=[LEVEL], layers="all", repeats=1, kinds=["nearest", "condensed"]
    )
    assert [row["memoization_rate"] for row in own.rows] == [1.0, 0.0]
    assert own.rows[1]["similarity"] is None


def test_a_condensed_store_by_itself_is_told_as_what_it_is(path: Path) -> None:
    model = tiny_model()
    store(model, path)
    means = path.with_name("means")
    mt.condense(path, means, records_per_namespace=2)
    calibrate(model, means, ANY)
    report = mt.evaluate(model, [tiny_batch(LENGTHS, seed=7)], means, levels=[LEVEL], layers="all", repeats=1)
    assert [row["kind"] for row in report.rows] == ["plain", "condensed"]
    assert report.main == "condensed"
    assert report.stats["0.5"]["memoization_rate"] == 1.0
    for kind in CONTROLS:
        with pytest.raises(ValueError, match=f"'{kind}'.* single records: .*condensed="):
            tried(model, [tiny_batch([8])], means, kinds=["plain", kind])
    with pytest.raises(ValueError, match="condensed itself"):
        tried(model, [tiny_batch([8])], means, kinds=None, condensed=means)
    with pytest.raises(mt.StoreMismatchError, match="single records"):
        tried(model, [tiny_batch([8])], path, kinds=None, condensed=path)
    bare = path.with_name("bare")
    mt.condense(path, bare, records_per_namespace=2)
    with pytest.raises(mt.StoreMismatchError, match="no profile"):
        tried(model, [tiny_batch([8])], path, kinds=None, condensed=bare)


def test_all_kinds_work_with_length_buckets(path: Path) -> None:
    model = tiny_model()
    known = [tiny_batch([5, 8, 8, 5] * 5, padded=8), tiny_batch([12, 16] * 10)]
    mt.build(model, known, path, buckets=(8, 16))
    fresh = [tiny_batch([5, 8], seed=7, padded=8), tiny_batch([12, 16], seed=7)]
    rows = tried(model, fresh, path, levels=[0.0])
    assert len({rows[kind]["memoization_rate"] for kind in CONTROLS}) == 1
    assert rows["nearest"]["memoization_rate"] > 0
    assert rows["oracle"]["similarity"] >= rows["nearest"]["similarity"]
    assert rows["mean"]["bytes"] == 2 * 4 * 4 * (2 * 8 * 8 + 2 * 16 * 16)
    assert sorted(part.name for part in path.iterdir()) == ["L=16", "L=8"]
    assert sorted(part.name for part in path.parent.iterdir()) == [path.name]


def test_records_of_longer_sequences_are_compared_as_they_are_cut(path: Path) -> None:
    model = tiny_model()
    store(model, path, known=[tiny_batch([9] * 10)])
    fresh = [tiny_batch([8, 9, 7], seed=7)]
    rows = tried(model, fresh, path, layers=[0], length_tolerance=1)
    assert rows["nearest"]["memoization_rate"] == pytest.approx(2 / 6)
    assert rows["oracle"]["similarity"] > rows["nearest"]["similarity"] > 0
    own = tiny_eager_probabilities(model, rows_of(fresh[0], [0, 1]))[0]
    records = stored(path, 0, 9)
    cut = records.clone()
    cut[..., 8:] = 0.0
    cut /= cut.sum(dim=-1, keepdim=True)
    best = [
        max(mt.similarity_score(own[0], record, lengths=8) for record in cut),
        max(mt.similarity_score(own[1], record, lengths=9) for record in records),
    ]
    assert rows["oracle"]["similarity"] == pytest.approx(float(np.mean(best)), abs=1e-5)


def test_a_record_that_lost_all_by_being_cut_attends_to_all_tokens_alike() -> None:
    records = torch.zeros(2, 1, 4, 4)
    records[..., 3] = 1.0
    cut = fidelity.cut_records(records, np.array([2, 4]), np.array([4, 4]))
    assert torch.equal(cut[0], torch.tensor([0.5, 0.5, 0.0, 0.0]).expand(1, 4, 4))
    assert torch.equal(cut[1], records[1])
    assert fidelity.cut_records(records, np.array([4, 4]), np.array([4, 4])) is records


def test_nothing_is_left_of_the_means_whatever_happens(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    store(model, path)
    before = snapshot(model)
    seen: list[list[str]] = []
    pooler = type(model.bert.pooler).forward

    def stop(self: Any, hidden: Any) -> Any:
        seen.append([part.name for part in path.parent.iterdir() if part != path])
        if len(seen) > 4:
            raise KeyboardInterrupt
        return pooler(self, hidden)

    monkeypatch.setattr(type(model.bert.pooler), "forward", stop)
    with pytest.raises(KeyboardInterrupt):
        tried(model, [tiny_batch(LENGTHS, seed=7)], path)
    assert len(seen[-1]) == 1
    assert list(path.parent.iterdir()) == [path]
    assert snapshot(model) == before
    monkeypatch.undo()
    tried(model, [tiny_batch(LENGTHS, seed=7)], path)
    assert list(path.parent.iterdir()) == [path]
    assert snapshot(model) == before


def test_an_oracle_that_would_take_too_long_is_refused_with_numbers(path: Path) -> None:
    model = tiny_model()
    store(model, path)
    fresh = [tiny_batch([8] * 3, seed=7), tiny_batch([5, 3], seed=7)]
    # 4 sequences of a known length, 2 layers, 10 records each, 2 levels.
    settings = {"kinds": ["oracle"], "levels": [LEVEL, "moderate"]}
    with pytest.raises(
        ValueError, match=r"at most 159 comparisons.*5 sequences at 2 levels may need 160.*oracle_limit"
    ):
        tried(model, fresh, path, oracle_limit=159, **settings)
    assert tried(model, fresh, path, oracle_limit=160, **settings)["oracle"]["memoization_rate"] == 0.8


def test_a_level_that_reuses_nothing_has_nothing_to_compare(path: Path) -> None:
    model = tiny_model()
    store(model, path)
    rows = tried(model, [tiny_batch(LENGTHS, seed=7)], path, layers=[])
    for kind in CONTROLS:
        assert rows[kind]["memoization_rate"] == rows[kind]["output_change"] == 0.0
        assert rows[kind]["similarity"] is None


def test_the_same_batch_object_may_come_twice(path: Path) -> None:
    model = tiny_model()
    store(model, path)
    batch = tiny_batch(LENGTHS, seed=7)
    once, twice = (tried(model, [batch] * count, path, kinds=["random", "nearest"]) for count in (1, 2))
    assert twice["nearest"]["output_change"] == pytest.approx(once["nearest"]["output_change"])
    # Each place in the data draws its own random records.
    assert twice["random"]["output_change"] != pytest.approx(once["random"]["output_change"])
    assert mt.evaluate(model, [join(batch, batch)], path, levels=[LEVEL], kinds=["plain"], repeats=1).sequences == 6
