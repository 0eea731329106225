"""The ``memodb-transformers`` command: build, profile and evaluate a memo store of a classifier on a text file."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from memodb import MemoDBError

__all__ = ["main"]

_NEW_LENGTH = 64


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    arguments = _parser().parse_args(argv)
    try:
        report = arguments.run(arguments)
    except (MemoDBError, ValueError, OSError) as error:
        print(f"memodb-transformers: {error}", file=sys.stderr)
        return 1
    print(json.dumps(report.to_dict(), indent=1) if arguments.json else report.to_markdown())
    return 0


def _build(arguments: argparse.Namespace) -> Any:
    from .record import build

    model, batches = _load(arguments)
    return build(
        model,
        batches,
        arguments.store,
        target=arguments.target,
        store_dtype=arguments.store_dtype,
        buckets=arguments.buckets,
        backend=arguments.backend,
        key_dim=arguments.key_dim,
        seed=arguments.seed,
        profile=not arguments.no_profile,
        progress=arguments.progress,
    )


def _profile(arguments: argparse.Namespace) -> Any:
    from .profiling import profile

    model, batches = _load(arguments)
    return profile(model, batches, arguments.store, compiled=arguments.compiled, progress=arguments.progress)


def _evaluate(arguments: argparse.Namespace) -> Any:
    from .evaluation import evaluate

    model, batches = _load(arguments)
    layers = arguments.layers
    if layers not in ("profiled", "all"):
        layers = _numbers("--layers profiled, all or", layers)
    return evaluate(
        model,
        batches,
        arguments.store,
        levels=[_level(level) for level in arguments.levels.split(",")],
        kinds=None if arguments.kinds is None else arguments.kinds.split(","),
        condensed=arguments.condensed,
        layers=layers,
        lookup=arguments.lookup,
        length_tolerance=arguments.length_tolerance,
        neighbours=arguments.neighbours,
        similarity=not arguments.no_similarity,
        seed=arguments.seed,
        repeats=arguments.repeats,
        progress=arguments.progress,
    )


def _level(text: str) -> str | float:
    """Take a level for a similarity where it is a number; what is neither will be refused by name."""
    try:
        return float(text)
    except ValueError:
        return text


def _numbers(option: str, text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError as error:
        raise ValueError(f"expected {option} numbers such as 0,3,5; found {text!r}") from error


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1; found {text!r}")
    return int(text)


def _lengths(text: str) -> list[int]:
    try:
        return _numbers("lengths,", text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _load(arguments: argparse.Namespace) -> tuple[Any, list[Any]]:
    """Load model and tokenizer, and tokenize the file."""
    import torch
    from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import logging

    from .data import read_text, to_batches
    from .store import stored_lengths

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # a bare model of a classifier's weights is what is meant
    sentences, labels = read_text(arguments.data, arguments.limit)
    kind = AutoModel if labels is None else AutoModelForSequenceClassification
    # CPUs multiply half precision far more slowly than float32, and the memo multiplies in float32 anyway.
    model = kind.from_pretrained(arguments.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    lengths = arguments.buckets or ([arguments.padded_length] if arguments.padded_length else [])
    if not lengths:
        lengths = [_NEW_LENGTH] if arguments.run is _build else stored_lengths(arguments.store)
    most = getattr(model.config, "max_position_embeddings", None)
    if most is not None and max(lengths) > most:
        raise ValueError(f"expected lengths of at most {most} tokens, as the model knows; found {max(lengths)}")
    batches = to_batches(
        tokenizer,
        sentences,
        labels,
        padded_length=max(lengths),
        batch_size=arguments.batch_size,
        buckets=lengths if len(lengths) > 1 else (),
    )
    return model, batches


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="memodb-transformers",
        description="Memoize the attention of a transformers classifier: build a store, profile it, evaluate it.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("model", help="model directory or hub name, with its tokenizer")
    common.add_argument(
        "data", help=".tsv file with the header sentence<TAB>label, or a text file with one sentence a line"
    )
    common.add_argument("store", help="folder of the memo store")
    common.add_argument(
        "--padded-length",
        type=_count,
        metavar="L",
        help="tokens of a sequence (default: the store's, or 64)",
    )
    common.add_argument(
        "--buckets", type=_lengths, metavar="L,L", help="lengths with a store for each, such as 64,128,256"
    )
    common.add_argument("--batch-size", type=_count, default=32, metavar="N", help="sequences a batch (default 32)")
    common.add_argument("--limit", type=_count, metavar="N", help="use N sentences, evenly spread over the file")
    common.add_argument("--json", action="store_true", help="print JSON instead of Markdown")
    common.add_argument(
        "--progress", action=argparse.BooleanOptionalAction, help="progress bars (default: on a terminal)"
    )

    build = commands.add_parser("build", parents=[common], help="record what attention computes into a new store")
    build.add_argument("--target", default="probs", help="probs, the probabilities (default), or context, the output")
    build.add_argument("--store-dtype", default="float32", help="dtype of the records (default float32)")
    build.add_argument("--backend", default="arena", help="backend of the store (default arena)")
    build.add_argument("--key-dim", type=int, default=128, help="components of a key (default 128)")
    build.add_argument("--seed", type=int, default=0, help="seed of the random projection (default 0)")
    build.add_argument("--no-profile", action="store_true", help="neither hold out nor profile")
    build.set_defaults(run=_build)

    profile = commands.add_parser("profile", parents=[common], help="calibrate and time a store on held-out data")
    profile.add_argument("--compiled", action="store_true", help="compare with attention under torch.compile")
    profile.set_defaults(run=_profile)

    evaluate = commands.add_parser("evaluate", parents=[common], help="compare with and without memoization")
    evaluate.add_argument(
        "--levels",
        default="conservative,moderate,aggressive",
        help="comma-separated levels, or similarities such as 0.85",
    )
    evaluate.add_argument(
        "--kinds", metavar="KIND,KIND", help="plain, random, mean, nearest, condensed, oracle (default: all but oracle)"
    )
    evaluate.add_argument("--condensed", metavar="PATH", help="a condensed store of the same model, profiled")
    evaluate.add_argument(
        "--neighbours", type=_count, default=1, metavar="N", help="reuse the mean of the N nearest records (default 1)"
    )
    evaluate.add_argument("--layers", default="profiled", help="profiled, all, or numbers such as 0,3,5")
    evaluate.add_argument("--lookup", default="layer", help="layer: each searches (default); sequence: one for all")
    evaluate.add_argument(
        "--length-tolerance", type=int, default=0, metavar="N", help="reuse records of up to N more tokens (default 0)"
    )
    evaluate.add_argument("--repeats", type=int, default=3, help="timed passes of each row (default 3)")
    evaluate.add_argument("--no-similarity", action="store_true", help="do not measure how similar reused records are")
    evaluate.add_argument("--seed", type=int, default=0, help="seed of random records and of the bootstrap (default 0)")
    evaluate.set_defaults(run=_evaluate)
    return parser


if __name__ == "__main__":
    sys.exit(main())
