"""The command on tiny models: what it builds, condenses, tunes, and how it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tiny_models import tiny_model  # noqa: E402

import memodb  # noqa: E402
import memodb_transformers as mt  # noqa: E402
from memodb_transformers.cli import main  # noqa: E402

Run = Callable[..., Any]
SENTENCES = 200


@pytest.fixture
def saved(shm: Path) -> list[str]:
    """A model directory with a tokenizer, and a labelled file."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[PAD]", "[UNK]", *(f"w{number}" for number in range(40))]
    pieces = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    pieces.pre_tokenizer = pre_tokenizers.Whitespace()
    directory, data = shm / "model", shm / "data.tsv"
    tiny_model().save_pretrained(directory)
    transformers.PreTrainedTokenizerFast(tokenizer_object=pieces, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(
        directory
    )
    lines = [f"{' '.join(f'w{(i + j * (1 + i // 40)) % 40}' for j in range(6))}\t{i % 2}" for i in range(SENTENCES)]
    data.write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
    return [str(directory), str(data)]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command, which must succeed, and read what it prints."""

    def command(*arguments: Any) -> Any:
        assert main([*map(str, arguments), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return command


def test_build_does_all_stages_that_it_is_told_of(saved: list[str], path: Path, run: Run) -> None:
    common = [*saved, path, "--padded-length", 8]
    report = run(
        "build", *common, "--embedder", "separable", "--epochs", 2, "--condensed-bytes", "8KiB", "--budget", 100,
        "--scratch-bytes", "300kB",
    )  # fmt: skip
    assert report["embedder"] == "separable"
    assert max(row["epochs"] for row in report["training"]["layers"]) == 2
    assert report["training"]["sequences"] == 300_000 // 3072  # 3 KiB each
    # Two layers and one length: 1 KiB a record, four of each layer.
    assert (report["records"], report["bytes"]) == (8, 8 * 1024)
    assert report["condensed"]["records_per_namespace"] == 4
    assert (report["tuned"]["budget"], report["tuned"]["metric"]) == (100.0, "accuracy")
    assert [stage["name"] for stage in report["stages"]] == [
        "sample", "train", "record", "condense", "index", "profile", "tune",
    ]  # fmt: skip
    rows = run("evaluate", *common, "--levels", "tuned,0.5", "--repeats", 1, "--limit", 40)["rows"]
    assert [(row["kind"], row["level"]) for row in rows] == [
        ("plain", None), ("condensed", "tuned"), ("condensed", 0.5),
    ]  # fmt: skip


def test_condense_needs_neither_model_nor_data(saved: list[str], path: Path, run: Run) -> None:
    run("build", *saved, path, "--padded-length", 8, "--no-profile", "--embedder", "projection", "--limit", 40)
    out, by_sequence = path.with_name("few"), path.with_name("fewer")
    report = run("condense", path, out, "--records-per-namespace", 3)
    assert (report["source_records"], report["records"], report["by"]) == (80, 6, "layer")
    with memodb.MemoDB.open(out) as db:
        assert (len(db), db.spec.dtype_name, db.verify()) == (6, "float32", [])
    more = ["--max-bytes", "3KiB", "--by", "sequence", "--store-dtype", "float16", "--backend", "zarr", "--seed", 4]
    report = run("condense", path, by_sequence, *more)
    assert (report["records"], report["bytes"], report["by"]) == (6, 3072, "sequence")
    with memodb.MemoDB.open(by_sequence) as db:
        assert (len(db), db.spec.dtype_name, db.stats()["backend"]) == (6, "float16", "zarr")


def test_tune_prints_its_choice(saved: list[str], path: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(saved[0]).eval()
    common = [*saved, path, "--padded-length", 8]
    run("build", *common, "--embedder", "projection", "--limit", 60)
    told = run("tune", *common, "--budget", 2.5, "--metric", "agreement", "--lookup", "sequence", "--confidence", 0.6)
    assert [told[name] for name in ("budget", "metric", "lookup", "confidence")] == [2.5, "agreement", "sequence", 0.6]
    assert json.loads((path / "transformers" / "tuned.json").read_text()) == told
    with mt.memoize(model, path, level="tuned", lookup="sequence") as memo:
        assert memo.layers == sorted(map(int, told["thresholds"]))
    assert main(["tune", *map(str, common), "--budget", "20"]) == 0
    printed = capsys.readouterr().out
    assert "20 points of accuracy" in printed
    tuned = json.loads((path / "transformers" / "tuned.json").read_text())
    assert printed == mt.TuneReport.from_dict(tuned, path).to_markdown() + "\n"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--embedder", "cnn"], "mlp, separable, projection"),
        (["--embedder", "projection", "--epochs", "3"], "not trained"),
        (["--condensed-bytes", "0"], "condensed_bytes"),
        (["--scratch-bytes", "0MB"], "scratch_bytes"),
        (["--budget", "-1"], "budget"),
        (["--budget", "1", "--no-profile"], "profile=True"),
        (["--seed", "-1"], "seed"),
    ],
)
def test_build_refuses_in_one_line(
    saved: list[str], path: Path, capsys: pytest.CaptureFixture[str], more: list[str], said: str
) -> None:
    assert main(["build", *saved, str(path), "--padded-length", "8", *more]) == 1
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert sorted(part.name for part in path.parent.iterdir()) == ["data.tsv", "model"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["condense", "A", "B", "--max-bytes", "much"], "8GB or 8GiB"),
        (["condense", "A", "B", "--records-per-namespace", "0"], "at least 1"),
        (["build", "A", "B", "C", "--records-per-namespace", "few"], "at least 1"),
        (["tune", "A", "B", "C", "--budget", "some"], "budget"),
        (["learn"], "condense"),
    ],
)
def test_what_cannot_be_parsed_is_refused(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert said in capsys.readouterr().err


def test_condense_and_tune_refuse_in_one_line(
    saved: list[str], path: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    out = path.with_name("out")
    assert main(["condense", str(path), str(out)]) == 1
    assert str(path) in capsys.readouterr().err
    run("build", *saved, path, "--padded-length", 8, "--no-profile", "--embedder", "projection", "--limit", 40)
    for more, said in (
        (["--by", "token"], "layer, sequence"),
        (["--store-dtype", "int8"], "float16"),
        (["--max-bytes", "10"], "2048 bytes"),
        (["--seed", "-1"], "seed"),
    ):
        assert main(["condense", str(path), str(out), *more]) == 1
        assert said in capsys.readouterr().err
        assert not out.exists()
    for more, said in (([], "no profile"), (["--budget", "-2"], "budget"), (["--confidence", "95"], "confidence")):
        assert main(["tune", *saved, str(path), *more]) == 1
        assert said in capsys.readouterr().err
