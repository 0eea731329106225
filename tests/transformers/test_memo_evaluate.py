"""Profile, levels, evaluation and the command, end to end on a tiny model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import median
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tiny_models import PADDED, logits, snapshot, tiny_batch, tiny_model  # noqa: E402

import memodb_transformers as mt  # noqa: E402
from memodb_transformers.cli import main  # noqa: E402
from memodb_transformers.data import read_text, to_batches  # noqa: E402

COLUMNS = {
    "kind", "level", "accuracy", "agreement", "perplexity", "memoization_rate", "similarity", "seconds",
    "speedup_vs_plain", "speedup_vs_eager", "bytes", "pass_seconds",
    "output_change", "accuracy_change", "perplexity_change",
    "accuracy_low", "accuracy_high", "agreement_low", "agreement_high",
    "accuracy_change_low", "accuracy_change_high", "perplexity_change_low", "perplexity_change_high",
}  # fmt: skip
NONE = dict.fromkeys(("attention", "lookup", "hit", "split", "uncompiled"), 0.0)


@pytest.fixture
def built(path: Path) -> tuple[Any, Path]:
    """A model whose attention is flat enough for any record of the same length to be similar, and its store."""
    model = tiny_model(initializer_range=0.05)
    mt.build(model, [tiny_batch([8] * 40)], path)
    return model, path


def set_costs(path: Path, **seconds: Any) -> None:
    """Put known costs in the place of measured ones, so that no test depends on the machine."""
    file = path / "transformers" / "profile.json"
    profile = json.loads(file.read_text())
    for row in profile["layers"]:
        row.update(seconds)
    file.write_text(json.dumps(profile))


def test_levels_reuse_what_is_similar_enough(built: tuple[Any, Path]) -> None:
    model, path = built
    for level in mt.LEVELS:
        with mt.memoize(model, path, level=level, layers="all") as memo:
            found = logits(model, tiny_batch([8] * 5))  # all recorded
        assert memo.stats()["memoization_rate"] == 1.0
        assert torch.allclose(found, logits(model, tiny_batch([8] * 5)), atol=1e-4)


def test_profiled_layers_are_those_that_pay(built: tuple[Any, Path]) -> None:
    model, path = built
    set_costs(path, attention_seconds=1.0, lookup_seconds=0.1, hit_seconds=0.1, split_seconds=0.0, fixed_seconds=NONE)
    with mt.memoize(model, path) as memo:
        assert memo.layers == [0, 1]
    set_costs(path, attention_seconds=1.0, lookup_seconds=2.0, hit_seconds=0.1, split_seconds=0.0, fixed_seconds=NONE)
    before = snapshot(model)
    with mt.memoize(model, path) as memo:
        assert memo.layers == []
        assert snapshot(model)["modules"] == before["modules"]
    with mt.memoize(model, path, layers=[1]) as memo:
        assert memo.layers == [1]


def test_the_profile_measures_similarity_on_data_of_its_own(built: tuple[Any, Path]) -> None:
    model, path = built
    before = snapshot(model)
    report = mt.profile(model, [tiny_batch([8] * 5), tiny_batch([8, 3], seed=9)], path)
    assert snapshot(model) == before
    assert (report.sequences, report.self_hits) == (2, 5)
    for row in report.layers:
        assert row.distances[0] > 1e-5  # (1 - similarity) squared, as trained; of itself it would be 0
        assert 0 < row.similarities[0] < 1
        assert row.distances[1] is row.similarities[1] is None  # no record of that length
        assert min(row.attention_seconds, row.lookup_seconds, row.hit_seconds) > 0
    assert report.to_dict()["layers"][0]["layer"] == 0
    assert "layer" in report.to_markdown()
    with pytest.raises(mt.InvalidBatchError):
        mt.profile(model, [tiny_batch([8], padded=20)], path)


def test_evaluate_compares_with_the_plain_model(built: tuple[Any, Path]) -> None:
    model, path = built
    batches = [tiny_batch([8] * 6), tiny_batch([5, 8], seed=4)]
    for batch in batches:
        batch["labels"] = logits(model, batch).argmax(dim=-1)
    before = snapshot(model)
    report = mt.evaluate(model, batches, path, layers="all", repeats=1, progress=False)
    assert snapshot(model) == before
    rows = report.to_dict()["rows"]
    assert [(row["kind"], row["level"]) for row in rows] == [
        ("plain", None),
        *((kind, level) for kind in ("random", "mean", "nearest") for level in mt.LEVELS),
    ]
    assert all(set(row) == COLUMNS for row in rows)
    assert all(row["seconds"] == median(row["pass_seconds"]) for row in rows)
    plain, *_, conservative, _, _ = rows
    assert plain["accuracy"] == plain["agreement"] == plain["speedup_vs_plain"] == 1.0
    assert plain["memoization_rate"] is plain["bytes"] is None
    assert conservative["memoization_rate"] >= 6 / 8
    assert conservative["bytes"] == 36 * 2 * 4 * PADDED * PADDED * 4
    assert all(math.isfinite(row["speedup_vs_eager"]) for row in rows)
    assert report.stats["moderate"]["sequences"] == 8
    assert "conservative" in report.to_markdown()


def test_evaluate_without_labels_or_classes_has_no_accuracy(built: tuple[Any, Path]) -> None:
    model, path = built
    settings = {"levels": ["moderate"], "kinds": ["plain", "nearest"], "layers": "all", "repeats": 1}
    report = mt.evaluate(model, [tiny_batch([8])], path, **settings)
    assert [row["accuracy"] for row in report.rows] == [None, None]
    assert report.rows[0]["agreement"] == 1.0
    bare = mt.evaluate(model.bert, [tiny_batch([8])], path, **settings)
    assert [row["agreement"] for row in bare.rows] == [None, None]
    assert [row["output_change"] for row in bare.rows] == [0.0, pytest.approx(0.0, abs=1e-4)]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"kinds": ["nearby"]}, "plain, random, mean, nearest, condensed, oracle"),
        ({"kinds": "nearest"}, "list of kinds"),
        ({"kinds": ["condensed"]}, "condensed="),
        ({"levels": ["bold"]}, "conservative"),
        ({"levels": [1.5]}, "similarity"),
        ({"neighbours": 0}, "neighbours"),
        ({"repeats": 0}, "at least 1"),
        ({"repeats": True}, "at least 1"),
        ({"seed": -1}, "seed"),
        ({"confidence": 1.0}, "confidence"),
        ({"confidence": 95}, "confidence"),
        ({"kinds": ["oracle"], "oracle_limit": 10}, "at most 10 comparisons.* 36"),
    ],
)
def test_evaluate_refuses_what_it_does_not_know(built: tuple[Any, Path], arguments: Any, said: str) -> None:
    model, path = built
    with pytest.raises(ValueError, match=said):
        mt.evaluate(model, [tiny_batch([8])], path, **{"layers": [0], "levels": ["moderate"], **arguments})


@pytest.fixture
def saved(shm: Path) -> tuple[Path, Path]:
    """A model directory with a tokenizer, and a labelled file."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[PAD]", "[UNK]", *(f"w{number}" for number in range(40))]
    pieces = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    pieces.pre_tokenizer = pre_tokenizers.Whitespace()
    directory = shm / "model"
    tiny_model().save_pretrained(directory)
    transformers.PreTrainedTokenizerFast(tokenizer_object=pieces, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(
        directory
    )
    data = shm / "data.tsv"
    lines = [f"{' '.join(f'w{(i * 7 + j) % 40}' for j in range(6))}\t{i % 2}" for i in range(30)]
    data.write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
    return directory, data


def test_the_command_builds_profiles_and_evaluates(
    saved: tuple[Path, Path], path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = [*map(str, saved), str(path), "--padded-length", "8", "--batch-size", "10", "--json"]
    assert main(["build", *common, "--store-dtype", "float16"]) == 0
    assert json.loads(capsys.readouterr().out)["records"] == 54
    assert main(["profile", *common, "--limit", "10"]) == 0
    profiled = json.loads(capsys.readouterr().out)
    assert (profiled["sequences"], profiled["self_hits"]) == (1, 9)  # every tenth was held out
    assert main(["profile", *common[:-1]]) == 0
    printed = capsys.readouterr().out
    assert "| layer |" in printed
    assert "\nlayer 0  " in printed  # a bar
    assert "half the batch" in printed
    assert main(["evaluate", *common, "--levels", "moderate", "--layers", "all", "--repeats", "1"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["kind"] for row in rows] == ["plain", "random", "mean", "nearest"]
    means = path.with_name("means")
    mt.condense(path, means, records_per_namespace=2)
    assert main(["profile", *common[:2], str(means), *common[3:], "--limit", "10"]) == 0
    capsys.readouterr()
    several = ["--kinds", "plain,nearest,condensed", "--condensed", str(means), "--neighbours", "2", "--no-similarity"]
    assert main(["evaluate", *common, "--levels", "moderate,0.5", "--layers", "all", "--repeats", "1", *several]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["kind"], row["level"]) for row in rows] == [
        ("plain", None), ("nearest", "moderate"), ("nearest", 0.5), ("condensed", "moderate"), ("condensed", 0.5),
    ]  # fmt: skip
    assert main(["evaluate", *common, "--kinds", "far"]) == 1
    assert "'far'" in capsys.readouterr().err
    assert main(["build", *common]) == 1
    assert str(path) in capsys.readouterr().err
    assert main(["evaluate", *common, "--layers", "first"]) == 1
    assert "0,3,5" in capsys.readouterr().err


def test_texts_are_read_with_and_without_labels(shm: Path) -> None:
    table, lines = shm / "a.tsv", shm / "a.txt"
    table.write_text('sentence\tlabel\nsaid "so\t1\n\nb\t0\n')
    lines.write_text("one\n\ntwo\nthree\n")
    assert read_text(table) == (['said "so', "b"], [1, 0])
    assert read_text(lines) == (["one", "two", "three"], None)
    assert read_text(lines, 2) == (["one", "two"], None)


@pytest.mark.parametrize("content", ["text\tclass\na\t1\n", "sentence\tlabel\na\tgood\n", "sentence\tlabel\n", ""])
def test_a_table_that_cannot_be_read_is_refused_by_name(shm: Path, content: str) -> None:
    file = shm / "bad.tsv"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"bad\.tsv"):
        read_text(file)


def test_batches_are_padded_on_the_right_to_one_length(saved: tuple[Path, Path]) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(saved[0])
    first, second = to_batches(tokenizer, ["w1 w2", "w3", "w1 w2 w3 w4 w5"], [1, 0, 1], padded_length=4, batch_size=2)
    assert first["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 0, 0, 0]]
    assert second["attention_mask"].tolist() == [[1, 1, 1, 1]]
    assert first["labels"].tolist() == [1, 0]
