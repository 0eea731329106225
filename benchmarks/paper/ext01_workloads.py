"""Not in the paper: where memoization pays. Short sentences, templates, near-duplicates, dense long text."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from typing import Any

import torch
import transformers

import memodb_transformers as mt
from benchmarks.memo_data import Batches, root
from benchmarks.paper.alone import alone
from benchmarks.paper.experiment import Experiment, Result, change, table
from benchmarks.paper.workbench import Workbench
from memodb_transformers.data import to_batches

MODEL, BUDGET = "minilm-sst2", 2.0
_GOOD = [
    "good",
    "great",
    "lovely",
    "superb",
    "bright",
    "warm",
    "funny",
    "clever",
    "fresh",
    "touching",
    "rich",
    "strong",
]
_BAD = ["bad", "awful", "dull", "weak", "stale", "cold", "tedious", "clumsy", "flat", "bland", "messy", "hollow"]
_THINGS = [
    "film",
    "story",
    "plot",
    "script",
    "cast",
    "acting",
    "music",
    "ending",
    "camera",
    "pace",
    "dialogue",
    "humour",
]
_TEMPLATES = (
    "the {thing} of this {place} is {word} and the {other} is {more} .",
    "i thought that the {thing} was {word} , but above all the {other} was {more} .",
    "a {word} {thing} , a {more} {other} : that is what this {place} has .",
)
_PLACES = ["movie", "series", "play", "show"]

Parts = tuple[Batches, Batches, Batches, Batches]


def run(bench: Workbench) -> Result:
    """Record, profile, tune to a budget and evaluate, for each kind of text alike."""
    rows = []
    budget = bench.choose(BUDGET, 20.0)
    for name, make in KINDS.items():
        model, (recorded, profiled, tuned, tests) = make(bench)
        with bench.place("ext01", "ext01-means") as (path, condensed):
            # The paper's embedder is large and slow at 512 tokens: 25 million weights a layer.
            embedder = bench.choose("separable", "projection")
            mt.build(model, recorded, path, embedder=embedder, store_dtype="bfloat16", profile=False)
            mt.condense(path, condensed, records_per_namespace=4)
            for kind, store in (("nearest", path), ("condensed", condensed)):
                report = mt.profile(model, profiled, store)
                choice = mt.tune(model, tuned, store, budget=budget)
                settings: Any = {"kinds": ("plain", kind), "similarity": False, "repeats": bench.choose(3, 1)}
                for level, layers in (("tuned", "profiled"), (0.0, "all")):
                    found = mt.evaluate(model, tests, store, levels=[level], layers=layers, **settings)
                    similar = [value for layer in report.layers for value in layer.similarities if value is not None]
                    plain, row = found.rows
                    rows.append(
                        {
                            "workload": name,
                            "layers": sorted(choice.thresholds),
                            "self_hits": found.self_hits,
                            "found": sum(similar) / max(1, len(similar)),
                            "plain_accuracy": plain["accuracy"],
                            **row,
                        }
                    )
    return {"rows": rows, "budget": budget}


def _short(bench: Workbench) -> tuple[Any, Parts]:
    sizes = bench.choose({"recorded": 2048, "profiled": 256, "tuned": 512, "tried": 0}, _QUICK)
    return bench.model(MODEL), bench.batches(MODEL, **sizes)


def _templated(bench: Workbench) -> tuple[Any, Parts]:
    """Sentences of a few templates, no two alike, and the model fine-tuned on others of them."""
    draw = random.Random(0)
    texts: dict[str, int] = {}
    while len(texts) < sum(sizes := bench.choose((2048, 256, 512, 872), (128, 32, 64, 32))) + 512:
        label = draw.randrange(2)
        words = draw.sample(_GOOD if label else _BAD, 2)
        things = draw.sample(_THINGS, 2)
        template = draw.choice(_TEMPLATES)
        text = template.format(
            thing=things[0], other=things[1], word=words[0], more=words[1], place=draw.choice(_PLACES)
        )
        texts[text] = label
    pairs = list(texts.items())
    parts = _tokenized(pairs[512:], sizes)
    model = type(bench.model(MODEL)).from_pretrained(root() / "models" / MODEL, dtype=torch.float32)
    _fine_tune(model.train(), _tokenized(pairs[:512], (512,))[0])
    return model.eval(), (parts[0], parts[1], parts[2], parts[3])


def _near_duplicates(bench: Workbench) -> tuple[Any, Parts]:
    """Sentences of SST-2, each of which differs from a recorded one in a single token."""
    sizes = bench.choose({"recorded": 2048, "tried": 32}, {"recorded": 128, "tried": 32})
    recorded = bench.batches(MODEL, **sizes)[0]
    draw = torch.Generator().manual_seed(0)
    changed = [_change_one(batch, draw) for batch in recorded]
    first, second = bench.choose((8, 24), (1, 3))
    return bench.model(MODEL), (recorded, changed[:first], changed[first:second], changed[second:])


def _dense(bench: Workbench) -> tuple[Any, Parts]:
    sizes = bench.choose({"recorded": 96, "profiled": 64, "tuned": 192, "tried": 200}, _FEW)
    padded = bench.choose(512, 128)
    return bench.model(MODEL), bench.batches(MODEL, data="movie_reviews", padded=padded, batch=16, **sizes)


_QUICK = {"recorded": 128, "profiled": 32, "tuned": 64, "tried": 32}
_FEW = {"recorded": 16, "profiled": 8, "tuned": 32, "tried": 16}
KINDS: dict[str, Callable[[Workbench], tuple[Any, Parts]]] = {
    "short sentences (SST-2)": _short,
    "templates": _templated,
    "near-duplicates (SST-2, one token changed)": _near_duplicates,
    "dense long text (film reviews)": _dense,
}


def _tokenized(texts: list[tuple[str, int]], sizes: tuple[int, ...]) -> list[Batches]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(root() / "models" / MODEL)
    made, start = [], 0
    for size in sizes:
        part = texts[start : start + size]
        start += size
        words, labels = [text for text, _ in part], [label for _, label in part]
        made.append(list(to_batches(tokenizer, words, labels, padded_length=64, batch_size=32)))
    return made


def _fine_tune(model: Any, batches: Batches) -> None:
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)
    for batch in batches:
        loss = model(**batch).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()


def _change_one(batch: dict[str, Any], draw: torch.Generator) -> dict[str, Any]:
    """Put another token in one place of each sequence, out of those of the batch."""
    ids = batch["input_ids"].clone()
    lengths = batch["attention_mask"].sum(dim=1)
    # Not the first and last tokens of sentences, nor padding.
    words = torch.cat([row[1 : length - 1] for row, length in zip(batch["input_ids"], lengths.tolist(), strict=True)])
    for row, length in enumerate(lengths.tolist()):
        place = int(torch.randint(1, max(2, length - 1), (1,), generator=draw))
        tokens = words[words != ids[row, place]]
        ids[row, place] = tokens[int(torch.randint(0, len(tokens), (1,), generator=draw))]
    return {**batch, "input_ids": ids}


def text(result: Result) -> str:
    """Print what a budget allows, and what everything costs."""
    lines = []
    for row in result["rows"]:
        tuned = row["level"] == "tuned"
        lines.append(
            [
                row["workload"],
                row["kind"],
                f"budget of {result['budget']:g}" if tuned else "everything",
                (" ".join(map(str, row["layers"])) or "declined") if tuned else "all",
                row["found"],
                row["memoization_rate"],
                f"{100 * row['plain_accuracy']:.1f}",
                change(row),
                1 / row["speedup_vs_plain"],
            ]
        )
    header = ["text", "store", "reused", "layers", "similarity found", "memoization rate", "plain, %", "change (95 %)"]
    known = max(row["self_hits"] for row in result["rows"])
    note = (
        f"{'No' if not known else f'At most {known}'} sequences of a test are in its store. Layers: which the tuner "
        f"chose; "
        "of those, Eq. 3 may leave some out.\n\n"
    )
    return note + table([*header, "time, of plain"], lines)


EXPERIMENT = Experiment(
    name="ext01_workloads",
    where="not in the paper",
    title="Where memoization pays",
    paper="Nothing: it evaluates SST-2 and WikiText-2 alone.",
    differs="The same model for four kinds of text, film reviews cut at 512 tokens, all else at 64; for templates, a "
    "copy that was fine-tuned on other sentences of the same templates. Near-duplicates are recorded sentences with "
    "one "
    "token changed, so the best case by construction; they keep the labels of those. A budget is in points of accuracy "
    "and is tuned on up to 512 sequences, of the training set but for film reviews: the model is surer of those than "
    "of "
    "new ones, so a budget may be overdrawn. Tested are the development set of SST-2 (872), 872 templates, 1,280 "
    "near-duplicates and 200 reviews.",
    run=run,
    text=text,
)

if __name__ == "__main__":
    sys.exit(alone(EXPERIMENT))
