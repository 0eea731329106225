"""Makes docs/paper.md and its plots of the results: each one beside what the paper reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.paper.all import EXPERIMENTS
from benchmarks.paper.experiment import FULL, Experiment, Result, read_result, table

__all__ = ["write"]

_HEAD = """# The paper, re-measured

*AttMemo: Accelerating Self-Attention with Memoization on Big Memory Systems*, table by table and figure by figure.
`make paper` measures all of this and writes this page (`make paper-quick`: a little of everything, in a quarter of an
hour). Each section is one script of `benchmarks/paper/`, each result a JSON file in `benchmarks/results/paper/`. What
is measured goes through public functions of memodb and memodb_transformers alone. What is written here comes from
there, but for the conclusions (`conclusions.md`): edit those, not this page.

The paper's models could not be had, and the machine has neither its 48 cores nor its 1.6 TB of DRAM and Optane, which
thousands of inputs of 512 and 1,024 tokens would need. The models are stand-ins. *minilm-sst2* is all-MiniLM-L6-v2, a
BERT of six layers, fine-tuned on SST-2; *debertav2-sst2* was started from its weights and trained on the same data, so
the two are relatives, not independent witnesses, and it is no pretrained DeBERTa; *stories260k-llama*
(karpathy/tinyllamas) has 260 thousand parameters, and its stories were drawn from itself; the GPT-2 is trained by its
script. No RoBERTa and no ALBERT was at hand but for their shapes. Data are SST-2, WikiText-2 (without its training
part) and the film reviews of Pang and Lee (polarity 2.0). Records are bfloat16, unless a section says otherwise.
"""
_PAPER_ORDER = (
    *("fig01_breakdown", "fig03_similarity", "fig04_threshold", "sec52_embedders", "fig07_embedding", "sec53_search"),
    *("tab02_levels", "tab03_build", "fig10_speedup", "tab04_breakdown", "tab05_accuracy", "fig11_reuse"),
    *("tab06_fetch", "tab07_selective", "fig13_dbsize", "fig12_lengths", "tab08_sparse", "gpt2_wikitext"),
    *("fig15_llama", "tab09_cost", "ext01_workloads", "ext02_condense"),
)


def write(results: Path, docs: Path) -> Path:
    """Write the page and the plots of what was measured; returns the page's path."""
    found = {experiment.name: (experiment, read_result(results, experiment)) for experiment in EXPERIMENTS}
    chosen = [found[name] for name in _PAPER_ORDER]
    parts = [_HEAD, _overview(chosen)]
    conclusions = Path(__file__).with_name("conclusions.md")
    if conclusions.exists() and all(content and content["profile"] == FULL for _, content in chosen):
        parts.append(conclusions.read_text().rstrip() + "\n")
    for experiment, content in chosen:
        parts.append(_section(experiment, content, docs))
    page = docs / "paper.md"
    docs.mkdir(parents=True, exist_ok=True)
    page.write_text("\n".join(parts))
    return page


def _overview(chosen: list[tuple[Experiment, Result | None]]) -> str:
    rows = [
        [
            f"[{experiment.title}](#{experiment.name.replace('_', '-')})",
            experiment.where,
            f"`{experiment.name}`",
            "not measured yet"
            if content is None
            else "calculated"
            if experiment.calculated
            else f"made of `{experiment.source}`"
            if experiment.source
            else "several sittings"
            if content["seconds"] is None
            else f"{content['seconds']:.0f} s",
        ]
        for experiment, content in chosen
    ]
    machines = {_machine(content["machine"]) for _, content in chosen if content is not None}
    machine = f"Machine: {'; '.join(sorted(machines))}; PyTorch with two threads."
    return f"{table(['', 'the paper', 'script', 'measured in'], rows)}\n{machine}\n"


def _machine(facts: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {facts['versions'][name]}" for name in ("torch", "faiss-cpu"))
    size = f"{facts['cpus']} cores, {facts['memory_gib']} GiB"
    return f"{facts['cpu']}, {size}, Linux {facts['kernel']}, {versions}"


def _section(experiment: Experiment, content: Result | None, docs: Path) -> str:
    anchor = f'<a id="{experiment.name.replace("_", "-")}"></a>'
    head = f"{anchor}\n\n## {experiment.title} ({experiment.where})\n\n**The paper.** {experiment.paper}\n"
    head += f"\n**Here.** {experiment.differs}\n"
    if content is None:
        return f"{head}\nNot measured yet: `python -m benchmarks.paper {experiment.name}`.\n"
    quick = (
        " **A quick run: these figures mean little.**"
        if content["profile"] != FULL and not experiment.calculated
        else ""
    )
    picture = (
        f"\n![{experiment.title}](images/{_draw(experiment, content['result'], docs)})\n" if experiment.draw else ""
    )
    said = experiment.text(content["result"])
    found = "A calculation" if experiment.calculated else "Measured"
    return f"{head}{picture}\n**{found}.**{quick}{_apart(said)}{said}"


def _apart(said: str) -> str:
    return "\n\n" if said.startswith("|") else " "  # a table begins a paragraph of its own


def _draw(experiment: Experiment, result: Result, docs: Path) -> str:
    import matplotlib

    matplotlib.rcParams["svg.hashsalt"] = "memodb"
    from matplotlib.figure import Figure

    assert experiment.draw is not None
    figure = Figure(figsize=experiment.size, layout="constrained")
    experiment.draw(result, figure)
    name = f"paper-{experiment.name.replace('_', '-')}.svg"
    (docs / "images").mkdir(parents=True, exist_ok=True)
    figure.savefig(docs / "images" / name, metadata={"Date": None})
    return name
