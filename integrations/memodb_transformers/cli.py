"""The ``memodb-transformers`` command: build, condense, profile, tune and evaluate a memo store on a text file."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from memodb import MemoDBError

from .cli_parser import build_parser, numbers

__all__ = ["main"]

_NEW_LENGTH = 64


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    arguments = build_parser().parse_args(argv)
    try:
        report = _COMMANDS[arguments.command](arguments)
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
        embedder=arguments.embedder,
        epochs=arguments.epochs,
        seed=arguments.seed,
        profile=not arguments.no_profile,
        records_per_namespace=arguments.records_per_namespace,
        condensed_bytes=arguments.condensed_bytes,
        budget=arguments.budget,
        progress=arguments.progress,
        **({} if arguments.scratch_bytes is None else {"scratch_bytes": arguments.scratch_bytes}),
    )


def _condense(arguments: argparse.Namespace) -> Any:
    from .condense import condense

    return condense(
        arguments.source,
        arguments.out,
        records_per_namespace=arguments.records_per_namespace,
        max_bytes=arguments.max_bytes,
        by=arguments.by,
        store_dtype=arguments.store_dtype,
        backend=arguments.backend,
        seed=arguments.seed,
        progress=arguments.progress,
    )


def _profile(arguments: argparse.Namespace) -> Any:
    from .profiling import profile

    model, batches = _load(arguments)
    return profile(model, batches, arguments.store, compiled=arguments.compiled, progress=arguments.progress)


def _tune(arguments: argparse.Namespace) -> Any:
    from .tuning import tune

    model, batches = _load(arguments)
    return tune(
        model,
        batches,
        arguments.store,
        budget=arguments.budget,
        metric=arguments.metric,
        lookup=arguments.lookup,
        confidence=arguments.confidence,
        progress=arguments.progress,
    )


def _evaluate(arguments: argparse.Namespace) -> Any:
    from .evaluation import evaluate

    model, batches = _load(arguments)
    layers = arguments.layers
    if layers not in ("profiled", "all"):
        layers = numbers("--layers profiled, all or", layers)
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
        lengths = [_NEW_LENGTH] if arguments.command == "build" else stored_lengths(arguments.store)
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


_COMMANDS = {"build": _build, "condense": _condense, "profile": _profile, "tune": _tune, "evaluate": _evaluate}


if __name__ == "__main__":
    sys.exit(main())
