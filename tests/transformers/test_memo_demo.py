"""The demo runs through in its quick form, cleans up, and says plainly what it found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
demo = pytest.importorskip("demo.__main__", reason="the demo is not installed: run from the repository")

from tiny_models import tiny_model  # noqa: E402


def test_the_quick_demo_prints_a_table_and_draws_a_picture(shm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(["--quick", "--folder", str(shm), "--output", str(shm / "out")]) == 0
    said = capsys.readouterr().out
    for part in (
        "records",
        "bytes of records",
        "accuracy",
        "By layer",
        "np.memmap[ids]",
        "torch.index_select",
        "means made of them",
        "single records, aggressive",
        "means, tuned for 25 points",
    ):
        assert part in said
    assert (shm / "out" / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(file.name for file in shm.iterdir()) == ["out"]


@pytest.mark.parametrize(
    "arguments",
    [["--model", "x"], ["--heldout", "x.tsv"], ["--sequences", "0"], ["--budget", "0"], ["--budget", "nan"]],
)
def test_options_that_do_not_go_together_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        demo.main(arguments)
    assert arguments[0] in capsys.readouterr().err


def test_a_missing_file_is_an_error_and_nothing_is_left(shm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model().save_pretrained(shm / "model")
    stores = shm / "stores"
    stores.mkdir()
    arguments = ["--model", str(shm / "model"), "--data", str(shm / "none.tsv"), "--folder", str(stores)]
    assert demo.main([*arguments, "--output", str(shm / "out")]) == 1
    assert "demo: " in capsys.readouterr().err
    assert list(stores.iterdir()) == []


def test_docstrings_do_not_name_their_package_and_the_split_is_stable() -> None:
    from demo.corpus import collect, is_held_out

    corpus = collect(20)
    texts = [text for text, _ in corpus.train + corpus.held_out]
    assert len(texts) == len({text.lower() for text in texts})
    assert not any(name in text.lower() for text in texts for name in corpus.classes)
    assert all(is_held_out(text) for text, _ in corpus.held_out)
    assert not any(is_held_out(text) for text, _ in corpus.train)
    again = collect(20)
    assert (again.train, again.held_out) == (corpus.train, corpus.held_out)


def test_what_is_recorded_and_what_layers_are_chosen_with_never_meet() -> None:
    for count in (0, 1, 2, 3, 5, 12, 100, 3000, 20_000):
        for sequences in (1, 50, 2000, 10_000):
            pairs = [(str(number), 0) for number in range(count)]
            recorded, others = demo._split(pairs, sequences)
            assert len(set(recorded) | set(others)) == len(recorded) + len(others)
            assert len(recorded) <= sequences
            assert len(others) <= demo._OTHERS
            if count >= 3 and sequences >= count:
                assert len(recorded) + len(others) == count  # nothing is thrown away
            if count >= sequences + demo._OTHERS:
                assert (len(recorded), len(others)) == (sequences, demo._OTHERS)


_WORDS = ["one", "two", "six", "ten", "red", "sea", "sky", "oak", "elm", "owl", "fox", "bee"]


def texts(count: int) -> list[str]:
    """Sentences of three words, all of them different."""
    return [" ".join(_WORDS[number // 12**place % 12] for place in range(3)) for number in range(count)]


def data(path: Path, rows: int) -> Path:
    """A file whose classes come one after the other, as many have them."""
    lines = [f"{text}\t{number * 2 // rows}" for number, text in enumerate(texts(rows))]
    path.write_text("sentence\tlabel\n" + "\n".join(lines) + "\n")
    return path


def own_model(path: Path) -> Path:
    from demo.classifier import _tokenizer

    tiny_model().save_pretrained(path)
    _tokenizer(texts(200), 60).save_pretrained(path)
    return path


@pytest.mark.parametrize("separate", [False, True])
def test_a_model_and_data_of_ones_own(shm: Path, capsys: pytest.CaptureFixture[str], separate: bool) -> None:
    arguments = ["--model", str(own_model(shm / "model")), "--data", str(data(shm / "train.tsv", 300))]
    if separate:
        arguments += ["--heldout", str(data(shm / "held.tsv", 40))]
    stores = shm / "stores"
    stores.mkdir()
    options = ["--padded-length", "16", "--repeats", "1", "--budget", "30", "--folder", str(stores)]
    assert demo.main([*arguments, *options, "--quick", "--output", str(shm / "out")]) == 0
    said = capsys.readouterr().out
    assert "model on train.tsv, 16 tokens" in said
    assert list(stores.iterdir()) == []


def test_a_sorted_file_is_mixed_and_held_out_text_is_not_recorded(shm: Path) -> None:
    arguments = ["--model", str(own_model(shm / "model")), "--data", str(data(shm / "train.tsv", 300))]
    given = demo._arguments([*arguments, "--heldout", str(data(shm / "held.tsv", 40)), "--quick"])
    _, _, _, recorded, others, held_out = demo._given(given)
    for part in (recorded[:30], others[:30], held_out[:30]):
        assert 0 < sum(label for _, label in part) < 30
    texts = {text for text, _ in held_out}
    assert not texts & {text for text, _ in [*recorded, *others]}


def test_too_little_data_is_refused_before_anything_is_built(shm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", str(own_model(shm / "model")), "--data", str(data(shm / "train.tsv", 60))]
    assert demo.main([*arguments, "--folder", str(shm), "--output", str(shm / "out")]) == 1
    said = capsys.readouterr().err
    assert "larger --budget" in said
    assert "Building" not in said
    assert demo.main(["--model", "x", "--data", str(data(shm / "train.tsv", 1)), "--output", str(shm / "out")]) == 1
    assert "demo: expected" in capsys.readouterr().err


def test_a_tuner_that_declines_is_said_to(shm: Path) -> None:
    from types import SimpleNamespace as Some

    import memodb_transformers as mt
    from demo.picture import draw
    from demo.report import Result, write_table

    zero = {f"{part}_seconds": 0.0 for part in ("embed", "search", "fetch", "attention")}
    layer = {"layer": 0, "hits": 0, "lookups": 0, "memoized": False, "threshold": None, **zero}
    row = {
        **{"kind": "condensed", "level": "tuned", "memoization_rate": 0.0, "accuracy": 0.5, "agreement": 1.0},
        **{"seconds": 1.0, "speedup_vs_plain": 1.0},
        **dict.fromkeys(("accuracy_change", "accuracy_change_low", "accuracy_change_high"), 0.0),
    }
    rows = ({**row, "kind": "plain", "level": None, "memoization_rate": None}, row)
    stats = {"condensed": {"tuned": {"sequences": 9, "memoization_rate": 0.0, "layers": [layer]}}}
    tuned = mt.TuneReport(2.0, "accuracy", 0.8, "layer", {}, 0.0, 0.0, 1.0, 50, 60, 7, 0.0, 0.0, 1.0, 64)
    profile = Some(layers=[Some(attention_seconds=0.1, alpha=lambda _: 0.0, benefit=lambda _: 0.0)])
    built = Some(records=1, sequences=1, layers=1, bytes=4, record_shape=(1,), store_dtype="float32", seconds=1.0)
    result: Any = Result(
        title="t",
        built=built,  # type: ignore[arg-type]
        condensed=Some(records=1),  # type: ignore[arg-type]
        bytes_taken={"nearest": 1, "condensed": 1},
        huge_pages=None,
        profiles={"nearest": profile, "condensed": profile},  # type: ignore[dict-item]
        tuned={"nearest": tuned, "condensed": tuned},
        evaluation=Some(rows=rows, stats_by_kind=stats, self_hits=3, sequences=9, repeats=1),  # type: ignore[arg-type]
        gathers=[],
    )
    said = write_table(result)
    assert "means, tuned for 2 points: the tuner declined. On 110 sequences it could not show" in said
    assert "attention replaced" not in said
    assert "By layer" not in said
    assert "3 of the 9 held-out sequences" in said
    result.gathers.append(Some(seconds={"a": 1.0, "already contiguous (floor)": 0.5}, title="g", zero_copy=True))
    draw(result, shm / "declined.png")
    assert (shm / "declined.png").stat().st_size > 1000
