"""Build a memo database from a real transformer on real text, and use it to skip computation.

Without arguments: docstrings of the installed packages, a small BERT classifier trained here. No network is used.
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
                print(f"\nStore kept: {folder / 'store'}")
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
    from .report import Result

    progress = arguments.progress
    title, model, tokenizer, train, held_out = _job(arguments)
    length, size = arguments.padded_length, arguments.batch_size
    recorded, held_out = train[: arguments.sequences], held_out[: 64 if arguments.quick else arguments.evaluated]
    _say(f"Building the memo database of {len(recorded):,} sequences ...")
    store = folder / "store"
    built = mt.build(
        model,
        to_batches(tokenizer, *zip(*recorded, strict=True), padded_length=length, batch_size=size),
        store,
        store_dtype=arguments.store_dtype,
        embedder="projection",  # the cheapest: sequences of so few tokens save little that an embedder could cost
        progress=progress,
    )
    _say(f"Running {len(held_out):,} held-out sequences with and without memoization ...")
    batches = to_batches(tokenizer, *zip(*held_out, strict=True), padded_length=length, batch_size=size)
    repeats = 1 if arguments.quick else arguments.repeats
    settings = {"kinds": ("plain", "nearest"), "similarity": False, "repeats": repeats, "progress": progress}
    all_layers = mt.evaluate(model, batches, store, layers="all", **settings)
    profiled = mt.evaluate(model, batches, store, levels=["moderate"], **settings)
    chosen = {
        level: [row["layer"] for row in stats["layers"] if row["lookups"]] for level, stats in profiled.stats.items()
    }
    _say("Comparing ways to gather records ...")
    with memodb.MemoDB.open(store) as db:
        ids = db.ids()[: 64 if arguments.quick else 512].tolist()
        shape = "x".join(map(str, built.record_shape))
        count = min(64, len(ids))
        gathers = [compare(db, ids, count, folder, f"{count} records of {shape} {built.store_dtype}")]
        share = db.stats().get("huge_page_share")
    if not arguments.quick and shutil.disk_usage(folder).free > 4 << 30:
        gathers.append(reference_size(folder))
    store_bytes = sum(file.stat().st_blocks * 512 for file in store.rglob("*") if file.is_file())
    return Result(title, built, store_bytes, share, all_layers, profiled, chosen, gathers)


def _job(arguments: argparse.Namespace) -> tuple[str, Any, Any, list[tuple[str, int]], list[tuple[str, int]]]:
    """Make or load the classifier; returns a title, model, tokenizer, training and held-out pairs."""
    if arguments.model is not None:
        return _given(arguments)
    from .classifier import Recipe, train
    from .corpus import collect

    _say("Collecting docstrings of the installed packages ...")
    corpus = collect(40 if arguments.quick else 400, progress=arguments.progress)
    _say(f"Training a small BERT on {len(corpus.train):,} docstrings of {', '.join(corpus.classes)} ...")
    small = {"hidden": 32, "layers": 2, "heads": 2, "vocabulary": 800, "epochs": 1}
    recipe = Recipe(padded_length=arguments.padded_length, **(small if arguments.quick else {}))
    texts, labels = zip(*corpus.train, strict=True)
    model, tokenizer = train(texts, labels, len(corpus.classes), recipe, progress=arguments.progress)
    title = (
        f"which of {len(corpus.classes)} packages does a docstring come from; BERT of {recipe.layers} layers, hidden "
        f"{recipe.hidden}, {recipe.padded_length} tokens"
    )
    return title, model, tokenizer, corpus.train, corpus.held_out


def _given(arguments: argparse.Namespace) -> tuple[str, Any, Any, list[tuple[str, int]], list[tuple[str, int]]]:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import logging

    from memodb_transformers.data import read_text

    from .corpus import is_held_out

    def pairs(path: Path, limit: int | None) -> list[tuple[str, int]]:
        sentences, labels = read_text(path, limit)
        if labels is None:
            raise ValueError(f"expected {path} to have a label column; found none: the demo measures accuracy")
        return list(zip(sentences, labels, strict=True))

    logging.disable_progress_bar()
    model = AutoModelForSequenceClassification.from_pretrained(arguments.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    if arguments.heldout is None:
        both = pairs(arguments.data, None)
        train = [pair for pair in both if not is_held_out(pair[0])]
        held_out = [pair for pair in both if is_held_out(pair[0])]
        train = [train[i * len(train) // arguments.sequences] for i in range(min(arguments.sequences, len(train)))]
    else:
        train = pairs(arguments.data, arguments.sequences)
        held_out = pairs(arguments.heldout, None)
    if not train or not held_out:
        raise ValueError(f"expected sentences on both sides of the split; found {len(train)} and {len(held_out)}")
    title = f"{Path(arguments.model).name} on {arguments.data.name}, {arguments.padded_length} tokens"
    return title, model, tokenizer, train, held_out


@contextlib.contextmanager
def _workplace(arguments: argparse.Namespace) -> Iterator[Path]:
    """Make a folder in memory where there is room, else among temporary files; removed at the end unless kept."""
    parent = arguments.folder
    if parent is None and RAM_DISK.is_dir() and os.access(RAM_DISK, os.W_OK):
        # The store of the default run takes about 0.4 GB, the gather comparison 0.8 GB for a moment.
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
    if (arguments.model is None) != (arguments.data is None):
        parser.error("--model and --data go together")
    if arguments.heldout is not None and arguments.data is None:
        parser.error("--heldout needs --data")
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
    parser.add_argument("--sequences", type=int, default=2000, metavar="N", help="sequences to record (default 2000)")
    parser.add_argument("--padded-length", type=int, default=64, metavar="L", help="tokens of a sequence (default 64)")
    parser.add_argument("--evaluated", type=int, default=400, metavar="N", help="held-out sequences (default 400)")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="sequences a batch (default 32)")
    parser.add_argument("--store-dtype", default="float16", choices=("float16", "float32"), help="default float16")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="timed passes (default 3)")
    parser.add_argument("--folder", type=Path, help="where the store goes (default: in memory where there is room)")
    parser.add_argument("--output", type=Path, default=Path("demo/out"), help="folder of picture and table")
    parser.add_argument("--keep", action="store_true", help="keep the store")
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes: a tiny model, for tests")
    parser.add_argument("--progress", action=argparse.BooleanOptionalAction, help="default: on a terminal")
    return parser


if __name__ == "__main__":
    sys.exit(main())
