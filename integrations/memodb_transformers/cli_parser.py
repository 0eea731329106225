"""What the ``memodb-transformers`` command can be told: its commands, their options, and what these mean."""

from __future__ import annotations

import argparse

from memodb.cli.parser import size

__all__ = ["build_parser", "numbers"]


def numbers(option: str, text: str) -> list[int]:
    """Parse numbers between commas; ``option`` says whose they are, in the error."""
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
        return numbers("lengths,", text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def build_parser() -> argparse.ArgumentParser:
    """Make the parser; ``command`` of what it parses is the name of the command."""
    parser = argparse.ArgumentParser(
        prog="memodb-transformers",
        description="Memoize the attention of a transformers model: build a store, condense, profile, tune, evaluate.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    output, data = _output_options(), _data_options()
    _add_build(commands.add_parser("build", parents=[data, output], help="record what attention computes, and more"))
    _add_condense(commands.add_parser("condense", parents=[output], help="make a store of means from a store"))
    profile = commands.add_parser("profile", parents=[data, output], help="calibrate and time a store on other data")
    profile.add_argument("--compiled", action="store_true", help="compare with attention under torch.compile")
    _add_tune(commands.add_parser("tune", parents=[data, output], help="choose layers within an accuracy budget"))
    _add_evaluate(commands.add_parser("evaluate", parents=[data, output], help="compare with and without memoization"))
    return parser


def _output_options() -> argparse.ArgumentParser:
    output = argparse.ArgumentParser(add_help=False)
    output.add_argument("--json", action="store_true", help="print JSON instead of Markdown")
    output.add_argument(
        "--progress", action=argparse.BooleanOptionalAction, help="progress bars (default: on a terminal)"
    )
    return output


def _data_options() -> argparse.ArgumentParser:
    data = argparse.ArgumentParser(add_help=False)
    data.add_argument("model", help="model directory or hub name, with its tokenizer")
    data.add_argument(
        "data", help=".tsv file with the header sentence<TAB>label, or a text file with one sentence a line"
    )
    data.add_argument("store", help="folder of the memo store")
    data.add_argument(
        "--padded-length", type=_count, metavar="L", help="tokens of a sequence (default: the store's, or 64)"
    )
    data.add_argument(
        "--buckets", type=_lengths, metavar="L,L", help="lengths with a store for each, such as 64,128,256"
    )
    data.add_argument("--batch-size", type=_count, default=32, metavar="N", help="sequences a batch (default 32)")
    data.add_argument("--limit", type=_count, metavar="N", help="use N sentences, evenly spread over the file")
    return data


def _add_build(build: argparse.ArgumentParser) -> None:
    build.add_argument("--target", default="probs", help="probs, the probabilities (default), or context, the output")
    build.add_argument("--store-dtype", default="float32", help="dtype of the records (default float32)")
    build.add_argument("--backend", default="arena", help="backend of the store (default arena)")
    build.add_argument(
        "--embedder",
        default="mlp",
        help="mlp, the paper's (default); separable, ten times cheaper; projection, which is not trained",
    )
    build.add_argument("--epochs", type=int, metavar="N", help="passes of training, at most (default 30)")
    build.add_argument("--key-dim", type=int, default=128, help="components of a key (default 128)")
    build.add_argument("--seed", type=int, default=0, help="seed of all that is drawn (default 0)")
    build.add_argument(
        "--records-per-namespace",
        type=_count,
        metavar="K",
        help="condense: K mean records of each layer and length, in the place of single ones",
    )
    build.add_argument(
        "--condensed-bytes", type=size, metavar="SIZE", help="condense: means of at most this size, e.g. 200MB"
    )
    build.add_argument("--no-profile", action="store_true", help="neither hold out nor profile")
    build.add_argument(
        "--budget",
        type=float,
        metavar="POINTS",
        help="tune: choose layers that cost at most so many points of accuracy, or percent of perplexity",
    )
    build.add_argument(
        "--scratch-bytes", type=size, metavar="SIZE", help="size of the sample to train on, at most (default 2GiB)"
    )


def _add_condense(condense: argparse.ArgumentParser) -> None:
    condense.add_argument("source", help="folder of a memo store of single records")
    condense.add_argument("out", help="folder of the new store")
    condense.add_argument(
        "--records-per-namespace",
        type=_count,
        metavar="K",
        help="means of each layer and length (default 16, or what --max-bytes allows)",
    )
    condense.add_argument("--max-bytes", type=size, metavar="SIZE", help="size of the means, at most, e.g. 200MB")
    condense.add_argument(
        "--by",
        default="layer",
        help="layer: each has its own clusters (default); sequence: one for all, for lookups so",
    )
    condense.add_argument("--store-dtype", help="dtype of the means (default: that of the records)")
    condense.add_argument("--backend", default="arena", help="backend of the new store (default arena)")
    condense.add_argument("--seed", type=int, default=0, help="seed of the clustering (default 0)")


def _add_tune(tune: argparse.ArgumentParser) -> None:
    tune.add_argument(
        "--budget",
        type=float,
        default=1.0,
        metavar="POINTS",
        help="points of accuracy or agreement that may be lost, or percent of perplexity (default 1)",
    )
    tune.add_argument("--metric", help="accuracy, agreement or perplexity (default: accuracy where there are labels)")
    tune.add_argument("--lookup", default="layer", help="layer: each searches (default); sequence: one for all")
    tune.add_argument(
        "--confidence",
        type=float,
        default=0.8,
        metavar="SHARE",
        help="how sure it must be that the loss is within the budget, from 0.5 to below 1 (default 0.8)",
    )


def _add_evaluate(evaluate: argparse.ArgumentParser) -> None:
    evaluate.add_argument(
        "--levels",
        default="conservative,moderate,aggressive",
        help="comma-separated levels, tuned, or similarities such as 0.85",
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
