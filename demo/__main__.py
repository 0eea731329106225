"""Build a memo database from a real transformer on real text, and use it to skip computation.

Without arguments: docstrings of the installed packages, a small DeBERTa-v2 trained here. No network is used.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

__all__ = ["main"]

_BEGAN = time.perf_counter()
RAM_DISK = Path("/dev/shm")
#: Means of a layer and length, at most.
_MEANS = 8
#: Sequences that the profile and the tuner are given, at most.
_OTHERS = 1024

Pairs = Sequence[tuple[str, int]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns its exit status."""
    arguments = _arguments(argv)
    from memodb import MemoDBError

    from .picture import draw
    from .report import write_table

    try:
        with _workplace(arguments) as folder:
            result = _run(arguments, folder)
            table = write_table(result)
            image = arguments.output / "demo.png"
            draw(result, image)
            (arguments.output / "demo.txt").write_text(table + "\n", encoding="utf-8")
            print("\n" + table)
            if arguments.keep:
                print(f"\nStores kept: {folder / 'single'}, {folder / 'means'}")
    except (MemoDBError, ValueError, OSError, RuntimeError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    print(f"\nPicture: {image}\nTable:   {arguments.output / 'demo.txt'}")
    print(f"Wall time: {time.perf_counter() - _BEGAN:.0f} s")
    return 0


def _run(arguments: argparse.Namespace, folder: Path) -> Any:
    import memodb
    import memodb_transformers as mt
    from memodb_transformers.data import to_batches

    from .gather import compare, reference_size
    from .report import NAMES, Result

    progress = arguments.progress
    title, model, tokenizer, recorded, others, held_out = _job(arguments)
    held_out = held_out[: 64 if arguments.quick else arguments.evaluated]

    def batches(pairs: Pairs) -> list[dict[str, Any]]:
        return to_batches(
            tokenizer,
            *zip(*pairs, strict=True),
            padded_length=arguments.padded_length,
            batch_size=arguments.batch_size,
        )

    _say(f"Building the memo database of {len(recorded):,} sequences ...")
    single, means = folder / "single", folder / "means"
    built = mt.build(
        model,
        batches(recorded),
        single,
        store_dtype=arguments.store_dtype,
        embedder="projection",  # the cheapest: sequences of so few tokens save little that an embedder could cost
        profile=False,
        progress=progress,
    )
    condensed = mt.condense(single, means, records_per_namespace=_MEANS, progress=progress)
    quarter = len(others) // 4
    calibrating, choosing = batches(others[:quarter]), batches(others[quarter:])
    stores = {"nearest": single, "condensed": means}
    profiles, tuned = {}, {}
    for kind, path in stores.items():
        _say(f"Choosing layers for {NAMES[kind]} on {len(others):,} others ...")
        profiles[kind] = mt.profile(model, calibrating, path, progress=progress)
        tuned[kind] = mt.tune(model, choosing, path, budget=arguments.budget, progress=progress)
    _say(f"Running {len(held_out):,} held-out sequences with and without memoization ...")
    found = mt.evaluate(
        model,
        batches(held_out),
        single,
        levels=["moderate", "aggressive", "tuned"],
        kinds=("plain", *stores),
        condensed=means,
        similarity=False,
        repeats=1 if arguments.quick else arguments.repeats,
        progress=progress,
    )
    _say("Comparing ways to gather records ...")
    with memodb.MemoDB.open(single) as db:
        ids = db.ids()[: 64 if arguments.quick else 512].tolist()
        shape = "x".join(map(str, built.record_shape))
        count = min(64, len(ids))
        gathers = [compare(db, ids, count, folder, f"{count} records of {shape} {built.store_dtype}")]
        share = db.stats().get("huge_page_share")
    if not arguments.quick and shutil.disk_usage(folder).free > 4 << 30:
        gathers.append(reference_size(folder))
    return Result(
        title=title,
        built=built,
        condensed=condensed,
        bytes_taken={kind: _taken(path) for kind, path in stores.items()},
        huge_pages=share,
        profiles=profiles,
        tuned=tuned,
        evaluation=found,
        gathers=gathers,
    )


def _split(pairs: Pairs, sequences: int) -> tuple[Pairs, Pairs]:
    """Part what is recorded from what layers are chosen with: the two must not meet."""
    kept = min(sequences, len(pairs) - min(_OTHERS, len(pairs) // 3))
    return pairs[:kept], pairs[kept:][:_OTHERS]


def _check_enough(others: Pairs, budget: float) -> None:
    """Refuse data that the tuner would refuse in the end, before anything is built."""
    from memodb_transformers.tuning import fewest_tuned

    needed = -(-4 * fewest_tuned(budget) // 3)  # a quarter calibrates
    if len(others) < needed:
        raise ValueError(
            f"expected {needed} sequences beside the recorded ones, to choose layers within {budget:g} points; found "
            f"{len(others)}: give more data, fewer --sequences, or a larger --budget"
        )


def _taken(store: Path) -> int:
    return sum(file.stat().st_blocks * 512 for file in store.rglob("*") if file.is_file())


def _job(arguments: argparse.Namespace) -> tuple[str, Any, Any, Pairs, Pairs, Pairs]:
    """Make or load the classifier; returns title, model, tokenizer, what is recorded, chosen with, and held out."""
    if arguments.model is not None:
        return _given(arguments)
    from .classifier import Recipe, train
    from .corpus import collect

    _say("Collecting docstrings of the installed packages ...")
    corpus = collect(60 if arguments.quick else 500, progress=arguments.progress)
    # The model is fitted to what is recorded. On the others it errs as it does on new text, so that what is chosen on
    # them holds there.
    recorded, others = _split(corpus.train, arguments.sequences)
    _check_enough(others, arguments.budget)
    _say(f"Training a small DeBERTa-v2 on {len(recorded):,} docstrings of {', '.join(corpus.classes)} ...")
    small = {"hidden": 32, "layers": 2, "heads": 2, "vocabulary": 800, "epochs": 1}
    recipe = Recipe(padded_length=arguments.padded_length, **(small if arguments.quick else {}))
    texts, labels = zip(*recorded, strict=True)
    model, tokenizer = train(texts, labels, len(corpus.classes), recipe, progress=arguments.progress)
    title = (
        f"which of {len(corpus.classes)} packages does a docstring come from; DeBERTa-v2 of {recipe.layers} layers, "
        f"hidden {recipe.hidden}, {recipe.padded_length} tokens"
    )
    return title, model, tokenizer, recorded, others, corpus.held_out


def _given(arguments: argparse.Namespace) -> tuple[str, Any, Any, Pairs, Pairs, Pairs]:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import logging

    from memodb_transformers.data import read_text

    from .corpus import is_held_out, mixed

    def read(path: Path) -> list[tuple[str, int]]:
        sentences, labels = read_text(path, None)
        if labels is None:
            raise ValueError(f"expected {path} to have a label column; found none: the demo measures accuracy")
        return mixed(list(zip(sentences, labels, strict=True)))  # files are often sorted

    train = read(arguments.data)
    if arguments.heldout is None:
        held_out = [pair for pair in train if is_held_out(pair[0])]
        train = [pair for pair in train if not is_held_out(pair[0])]
    else:
        held_out = read(arguments.heldout)
        again = {text for text, _ in held_out}
        train = [pair for pair in train if pair[0] not in again]
    if not held_out:
        raise ValueError("expected sentences to try memoization with; found none")
    recorded, others = _split(train, arguments.sequences)
    _check_enough(others, arguments.budget)
    logging.disable_progress_bar()
    model = AutoModelForSequenceClassification.from_pretrained(arguments.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    title = f"{Path(arguments.model).name} on {arguments.data.name}, {arguments.padded_length} tokens"
    return title, model, tokenizer, recorded, others, held_out


@contextlib.contextmanager
def _workplace(arguments: argparse.Namespace) -> Iterator[Path]:
    """Make a folder in memory where there is room, else among temporary files; removed at the end unless kept."""
    parent = arguments.folder
    if parent is None and RAM_DISK.is_dir() and os.access(RAM_DISK, os.W_OK):
        # The stores of the default run take about 0.5 GB, the gather comparison 0.8 GB for a moment.
        parent = RAM_DISK if shutil.disk_usage(RAM_DISK).free > 3 << 30 else None
    folder = Path(tempfile.mkdtemp(prefix="memodb-demo-", dir=parent))
    try:
        yield folder
    finally:
        if not arguments.keep:
            shutil.rmtree(folder, ignore_errors=True)


def _say(message: str) -> None:
    print(f"[{time.perf_counter() - _BEGAN:4.0f} s] {message}", file=sys.stderr, flush=True)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.budget is None:
        arguments.budget = 25.0 if arguments.quick else 2.0  # of a few dozen sequences nothing finer can be told
    if (arguments.model is None) != (arguments.data is None):
        parser.error("--model and --data go together")
    if arguments.heldout is not None and arguments.data is None:
        parser.error("--heldout needs --data")
    if not 0 < arguments.budget <= 100:
        parser.error("--budget must be above 0 and at most 100")
    for name in ("sequences", "evaluated", "padded_length", "batch_size", "repeats"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", metavar="DIR_OR_HUB_NAME", help="a classifier, instead of training one")
    parser.add_argument("--data", type=Path, metavar="FILE.tsv", help="with --model: sentence<TAB>label, with header")
    parser.add_argument("--heldout", type=Path, metavar="FILE.tsv", help="held-out part (default: a fifth of --data)")
    parser.add_argument(
        "--sequences", type=int, default=2000, metavar="N", help="sequences for the store (default 2000)"
    )
    parser.add_argument(
        "--budget",
        type=float,
        metavar="POINTS",
        help="points of accuracy that may be lost (default 2; with --quick 25)",
    )
    parser.add_argument("--padded-length", type=int, default=64, metavar="L", help="tokens of a sequence (default 64)")
    parser.add_argument("--evaluated", type=int, default=400, metavar="N", help="held-out sequences (default 400)")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="sequences a batch (default 32)")
    parser.add_argument("--store-dtype", default="float16", choices=("float16", "float32"), help="default float16")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="timed passes (default 3)")
    parser.add_argument("--folder", type=Path, help="where the store goes (default: in memory where there is room)")
    parser.add_argument("--output", type=Path, default=Path("demo/out"), help="folder of picture and table")
    parser.add_argument("--keep", action="store_true", help="keep the stores")
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes: a tiny model, for tests")
    parser.add_argument("--progress", action=argparse.BooleanOptionalAction, help="default: on a terminal")
    return parser


if __name__ == "__main__":
    sys.exit(main())
