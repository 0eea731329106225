"""What the ``memodb`` command accepts."""

from __future__ import annotations

import argparse
import inspect
import re
from typing import Any

import memodb
from memodb.cli import bench, commands

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


#: What `MemoDB.create` and `memodb.copy` take beside the options of a backend.
_ARGUMENTS = {
    parameter
    for function in (memodb.MemoDB.create, memodb.copy)
    for parameter in inspect.signature(function).parameters
    if parameter not in ("options", "backend_options")
} | {"cls"}


def shape(text: str) -> tuple[int, ...]:
    """Parse ``12x512x512`` or ``12,512,512``; an empty text is the shape of a scalar."""
    try:
        dims = tuple(int(part) for part in re.split(r"[x,]", text)) if text else ()
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no shape: write 12x512x512") from None
    if any(dim < 1 for dim in dims):
        raise argparse.ArgumentTypeError(f"{text!r}: every dimension must be at least 1")
    return dims


def size(text: str) -> int:
    """Parse a number of bytes: ``4096``, ``8GB`` (powers of ten), ``8GiB`` (powers of two)."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?", text.strip().lower())
    if found is None or found[2] not in _UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write 4096, 8GB or 8GiB")
    return int(float(found[1]) * _UNITS[found[2]])


def positive(text: str) -> int:
    """Parse an integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no integer of at least 1")
    return int(text)


def permissions(text: str) -> int:
    """Parse permissions in octal; which of them a store can have, `MemoDB.create` says."""
    try:
        return int(text, 8)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} are no permissions: write 700, 750 or 770") from None


def vector(text: str) -> list[float]:
    """Parse ``0.1,0.2,...``."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no key: write 0.1,0.2,...") from None


def option(text: str) -> tuple[str, Any]:
    """Parse ``name=value``; the value is an integer, a float, true, false or else the text itself."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier() or name in _ARGUMENTS:
        why = "is an argument of the command itself" if name in _ARGUMENTS else "write name=value"
        raise argparse.ArgumentTypeError(f"{text!r} is no option of a backend: {why}")
    if value.lower() in ("true", "false"):
        return name, value.lower() == "true"
    try:
        return name, int(value)
    except ValueError:
        pass
    try:
        number = float(value)
        return name, int(number) if "e" in value.lower() and number.is_integer() else number
    except ValueError:
        pass
    if re.fullmatch(r"\d+(\.\d+)? ?[kKmMgGtT]i?[bB]", value):
        return name, size(value)
    return name, value


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; each parsed command carries its function as ``run``."""
    parser = argparse.ArgumentParser(
        prog="memodb", description="A memo database: large tensors, found by similarity, gathered without a copy."
    )
    parser.add_argument("--version", action="version", version=f"memodb {memodb.__version__}")
    commands_of = parser.add_subparsers(title="commands", metavar="command", required=True)

    def command(name: str, run: Any, summary: str, *, json: bool = True) -> argparse.ArgumentParser:
        made = commands_of.add_parser(name, help=summary, description=summary)
        made.set_defaults(run=run)
        if json:
            made.add_argument("--json", action="store_true", help="print JSON, for programs")
        return made

    create = command("create", commands.create, "Make an empty store.")
    create.add_argument("path", help="folder of the store; must not exist, or be empty")
    create.add_argument("--shape", type=shape, required=True, help="shape of one record, e.g. 12x512x512")
    create.add_argument("--dtype", required=True, help="dtype of the records, e.g. float16 or bfloat16")
    create.add_argument("--key-dim", type=positive, metavar="N", help="width of the keys (default: no keys, no search)")
    create.add_argument("--backend", default="arena", help="where record bytes live (default: %(default)s)")
    create.add_argument("--index", default="auto", help="faiss factory string, or auto (default: %(default)s)")
    create.add_argument("--max-bytes", type=size, metavar="SIZE", help="refuse puts beyond this size, e.g. 8GiB")
    _add_permissions(create)
    _add_options(create)

    info = command("info", commands.info, "Tell what a store holds.")
    info.add_argument("path", help="folder of the store")

    verify = command(
        "verify", commands.verify, "Read every record back against its checksum; status 1 if there are problems."
    )
    verify.add_argument("path", help="folder of the store")

    copy = command(
        "copy",
        commands.copy,
        "Copy a store, to another backend if asked for; ids, keys, namespaces and tombstones are kept. A copy that was "
        "cut off goes on where it stopped when the same command is given again.",
    )
    copy.add_argument("source", help="folder of the store")
    copy.add_argument("destination", help="folder of the copy; must not exist, or be an unfinished copy of the source")
    copy.add_argument("--backend", default="arena", help="backend of the copy (default: %(default)s)")
    copy.add_argument("--index", help="index of the copy (default: the source's)")
    copy.add_argument("--max-bytes", type=size, metavar="SIZE", help="limit of the copy, e.g. 8GiB")
    copy.add_argument("--no-verify", action="store_true", help="do not read back what was written")
    _add_permissions(copy)
    _add_options(copy)

    compact = command("compact", commands.compact, "Give back the bytes of deleted records.")
    compact.add_argument("path", help="folder of the store")

    search = command("search", commands.search, "Find the records whose keys are nearest (squared L2 distance).")
    search.add_argument("path", help="folder of the store")
    keys = search.add_mutually_exclusive_group(required=True)
    keys.add_argument(
        "--key", type=vector, action="append", metavar="X,X,...", help="one key; may be given several times"
    )
    keys.add_argument("--keys", metavar="FILE.npy", help="keys, a float array [n, key_dim]")
    search.add_argument("-k", type=positive, default=1, help="neighbours a key (default: %(default)s)")
    search.add_argument("--namespace", default="", help="namespace to search (default: the unnamed one)")
    search.add_argument("--max-distance", type=float, metavar="D", help="leave out records farther away than this")

    get = command("get", commands.get, "Read records: a summary of each, or all of them into a file.")
    get.add_argument("path", help="folder of the store")
    get.add_argument("ids", nargs="+", type=int, metavar="id", help="ids, in the order wanted")
    get.add_argument("-o", "--output", metavar="FILE.npy", help="write the batch [n, *shape] as a numpy file")

    measure = command(
        "bench",
        bench.run,
        "Time gathers of random records of a store, mapped, copied, multiget; or measure what gathers cost here.",
    )
    measure.add_argument("path", nargs="?", help="folder of the store")
    measure.add_argument(
        "--calibrate",
        action="store_true",
        help='measure what mapping and copying cost on this machine, and keep it: strategy="auto" goes by it',
    )
    measure.add_argument(
        "--records", type=positive, default=64, metavar="N", help="records a gather (default: %(default)s)"
    )
    measure.add_argument("--rounds", type=positive, default=20, metavar="R", help="rounds (default: %(default)s)")
    measure.add_argument("--seed", type=int, default=0, help="seed of the choice of records (default: %(default)s)")

    command("backends", commands.backends, "List the known backends, what they can do and whether they are installed.")
    return parser


def _add_permissions(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--permissions",
        type=permissions,
        default=0o700,
        metavar="OCTAL",
        help="700: the owner alone (default); 750, 770: the group of the folder reads, or writes as well",
    )


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--option",
        type=option,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of the backend; may be given several times",
    )
