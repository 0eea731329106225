"""The demo runs through in its quick form, cleans up, and says plainly what it found."""

from __future__ import annotations

from pathlib import Path

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
        "profiler",
    ):
        assert part in said
    assert (shm / "out" / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(file.name for file in shm.iterdir()) == ["out"]


@pytest.mark.parametrize("arguments", [["--model", "x"], ["--heldout", "x.tsv"], ["--sequences", "0"]])
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
