"""The scripts that re-measure the paper: each says all that a page needs, runs go on where they stopped."""

from __future__ import annotations

import ast
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import memodb
import memodb_transformers
from benchmarks.paper import __main__ as runner
from benchmarks.paper import report
from benchmarks.paper.all import EXPERIMENTS
from benchmarks.paper.experiment import FULL, QUICK, read_result, table, write_result
from benchmarks.paper.workbench import Workbench

#: The rows of the table that was asked for.
ROWS = (
    *("fig01_breakdown", "fig03_similarity", "fig12_lengths", "fig15_llama", "fig04_threshold", "fig07_embedding"),
    *("tab03_build", "fig10_speedup", "tab07_selective", "tab04_breakdown", "tab05_accuracy", "tab06_fetch"),
    *("fig11_reuse", "tab02_levels", "sec52_embedders", "sec53_search", "gpt2_wikitext", "fig13_dbsize"),
    *("tab08_sparse", "tab09_cost", "ext01_workloads", "ext02_condense"),
)
BY_NAME = {experiment.name: experiment for experiment in EXPERIMENTS}


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let quick results lie in a folder of their own."""
    monkeypatch.setattr(runner, "QUICK_RESULTS", tmp_path / "results")
    monkeypatch.setenv("MEMODB_EVAL_DATA", str(tmp_path))  # these scripts read nothing there
    return tmp_path / "results"


def test_every_table_and_figure_has_a_script() -> None:
    assert sorted(BY_NAME) == sorted(ROWS)
    for name, experiment in BY_NAME.items():
        assert Path(runner.__file__).with_name(f"{name}.py").exists()
        for said in (experiment.where, experiment.title, experiment.paper, experiment.differs):
            assert said.strip()


def test_what_was_measured_is_not_measured_again(
    elsewhere: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--quick", "--work", str(tmp_path / "work"), "tab09_cost", "sec53_search"]
    assert runner.main(asked) == 0
    first = {path.name: path.read_text() for path in elsewhere.glob("*.json")}
    assert sorted(first) == ["sec53_search.json", "tab09_cost.json"]
    assert "measured before" not in capsys.readouterr().out
    assert runner.main(asked) == 0
    said = capsys.readouterr().out
    assert "sec53_search: measured before" in said
    assert "tab09_cost: measured before" not in said  # its inputs are there to be edited, and it takes no time
    assert (elsewhere / "sec53_search.json").read_text() == first["sec53_search.json"]
    assert runner.main([*asked[:3], "--again", "sec53_search"]) == 0
    assert "measured before" not in capsys.readouterr().out
    page = (elsewhere / "paper.md").read_text()
    assert "**A calculation.**" in page
    assert "**Measured.**" in page
    assert page.count("Not measured yet") == len(EXPERIMENTS) - 2
    assert page.count("A quick run") == 1  # a calculation is as good as any
    assert "**Measured.** **A quick run" in page


@pytest.mark.parametrize("found", [RuntimeError("the store is full"), {"share": float("nan")}])
def test_a_script_that_fails_does_not_keep_others_from_running(
    found: Any, elsewhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(_: Any) -> Any:
        if isinstance(found, Exception):
            raise found
        return found

    broken = replace(BY_NAME["sec53_search"], run=run)
    monkeypatch.setattr(runner, "EXPERIMENTS", (broken, BY_NAME["tab09_cost"]))
    assert runner.main(["--quick", "--work", str(tmp_path / "work"), "sec53_search", "tab09_cost"]) == 1
    said = capsys.readouterr()
    assert f"sec53_search: {'RuntimeError' if isinstance(found, Exception) else 'ValueError'}: " in said.err
    assert "failed: sec53_search" in said.err
    assert not (elsewhere / "sec53_search.json").exists()
    assert (elsewhere / "tab09_cost.json").exists()


def test_places_are_empty_before_and_after(tmp_path: Path) -> None:
    bench = Workbench(tmp_path, tmp_path, quick=True)

    def fail() -> None:
        with bench.place("a", "b") as (first, second):
            second.mkdir()
            first.with_name("a.building").mkdir()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    (bench.folder / "a").mkdir()
    (bench.folder / "kept").mkdir()
    with bench.place("a") as (first,):
        assert not first.exists()
    assert [path.name for path in bench.folder.iterdir()] == ["kept"]
    bench.drop("ke")
    assert not any(bench.folder.iterdir())
    assert Workbench(tmp_path, tmp_path, quick=False).folder != bench.folder


def test_results_of_another_version_or_profile_do_not_count(tmp_path: Path) -> None:
    experiment = BY_NAME["tab09_cost"]
    assert read_result(tmp_path, experiment) is None
    write_result(tmp_path, experiment, QUICK, 1.0, {"rows": []})
    assert read_result(tmp_path, experiment, QUICK) is not None
    assert read_result(tmp_path, experiment, FULL) is None
    file = tmp_path / "tab09_cost.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "version": experiment.version + 1}))
    assert read_result(tmp_path, experiment) is None
    file.write_text("half of a")
    assert read_result(tmp_path, experiment) is None


def test_a_name_that_there_is_not_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        runner.main(["fig99"])
    assert "no script is called fig99" in capsys.readouterr().err


def test_numbers_have_the_digits_that_they_deserve() -> None:
    printed = table(["a", "b"], [[1234.5678, 0.12345], [None, 12.345], [0.00001234, 7], [0.0, "text"]])
    assert printed.splitlines()[2:] == ["| 1,235 | 0.123 |", "| - | 12.3 |", "| 1.2e-05 | 7 |", "| 0.000 | text |"]


def test_the_page_and_its_plots_are_made_of_the_committed_results(tmp_path: Path) -> None:
    page = report.write(runner.RESULTS, tmp_path).read_text()
    assert (runner.ROOT / "docs" / "paper.md").read_text() == page
    assert "Not measured yet" not in page
    for experiment in EXPERIMENTS:
        assert read_result(runner.RESULTS, experiment, FULL) is not None, experiment.name
        assert f"## {experiment.title} ({experiment.where})" in page
        if experiment.draw:
            drawn = tmp_path / "images" / f"paper-{experiment.name.replace('_', '-')}.svg"
            assert "<svg" in drawn.read_text()
            assert (runner.ROOT / "docs" / "images" / drawn.name).exists()


def test_scripts_call_public_functions_alone() -> None:
    public = {"memodb", "memodb_transformers", "memodb_transformers.data"}
    for file in Path(runner.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                assert name.partition(".")[0] not in ("memodb", "memodb_transformers") or name in public, (file, name)
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id in ("mt", "memodb")
            ):
                module = memodb if node.value.id == "memodb" else memodb_transformers
                assert node.attr in module.__all__, (file, node.attr)


def test_what_was_cut_off_half_made_is_made_anew(tmp_path: Path) -> None:
    bench = Workbench(tmp_path, tmp_path, quick=True)

    def cut_off(draft: Path) -> None:
        draft.mkdir()
        (draft / "half").touch()
        raise KeyboardInterrupt

    for name in ("store", "tokens.npz"):
        with pytest.raises(KeyboardInterrupt):
            bench.made(name, cut_off)
        assert not (bench.folder / name).exists()
        path = bench.made(name, lambda draft: draft.write_text("whole"))
        assert path.read_text() == "whole"
        assert bench.made(name, cut_off) == path
    assert sorted(left.name for left in bench.folder.iterdir()) == ["store", "tokens.npz"]


def test_what_is_made_of_another_result_is_made_anew_with_it(
    elsewhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = iter(range(10))
    first = replace(BY_NAME["sec53_search"], run=lambda _: {"found": next(counted)}, text=str)
    second = replace(
        BY_NAME["tab07_selective"],
        source="sec53_search",
        run=lambda bench: dict(read_result(bench.results, first)["result"]),  # type: ignore[index]
        text=str,
    )
    monkeypatch.setattr(runner, "EXPERIMENTS", (first, second))
    monkeypatch.setattr(report, "write", lambda *_: "nothing")
    asked = ["--quick", "--work", str(tmp_path / "work")]
    for arguments, expected in (((), 0), ((), 0), (("--again", "sec53_search"), 1)):
        assert runner.main([*asked, *arguments]) == 0
        for experiment in (first, second):
            content = read_result(elsewhere, experiment)
            assert content is not None
            assert content["result"] == {"found": expected}


@pytest.mark.parametrize("facts", [{"cpus": 99}, {"versions": {"transformers": "0.1"}}])
def test_what_another_machine_measured_is_measured_here(tmp_path: Path, facts: dict[str, Any]) -> None:
    experiment = BY_NAME["tab09_cost"]
    write_result(tmp_path, experiment, FULL, 1.0, {"rows": []})
    assert read_result(tmp_path, experiment, FULL, here=True) is not None
    file = tmp_path / "tab09_cost.json"
    content = json.loads(file.read_text())
    content["machine"] |= facts
    file.write_text(json.dumps(content))
    assert read_result(tmp_path, experiment, FULL, here=True) is None
    assert read_result(tmp_path, experiment, FULL) is not None
