"""The ``memodb`` command: every verb of the database, from a shell.

Exit status: 0 when all is well, 1 when the store has problems or refuses (the message is on stderr, without a
traceback), 2 when the command itself is wrong, 130 when interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import memodb
from memodb.cli.parser import build_parser

__all__ = ["main"]

OK, PROBLEM, USAGE, INTERRUPTED = 0, 1, 2, 130

#: The command line asked for something that no store could do.
_USAGE_ERRORS = (
    memodb.InvalidIdError,
    memodb.InvalidKeyError,
    memodb.InvalidOptionError,
    memodb.InvalidRecordError,
    memodb.BackendNotFoundError,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Parameters
    ----------
    argv
        Arguments without the program's name; those of the process by default.

    Returns
    -------
    int
        The exit status (see the module's docstring).

    Raises
    ------
    SystemExit
        With status 2 for arguments that cannot be parsed, with 0 after ``--help``.
    """
    arguments = build_parser().parse_args(_joined(sys.argv[1:] if argv is None else argv))
    try:
        status: int = arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of our output went away (`memodb ... | head`): nothing is wrong; spare the last flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except KeyboardInterrupt:
        return INTERRUPTED
    except _USAGE_ERRORS as error:
        return _complain(error, USAGE)
    except (memodb.MemoDBError, OSError) as error:
        return _complain(error, PROBLEM)
    return status


def _joined(argv: Sequence[str]) -> list[str]:
    """Return the arguments with each key joined to its option: argparse takes ``--key -1,0`` for two options."""
    joined: list[str] = []
    for argument in argv:
        if joined and joined[-1] == "--key":
            joined[-1] = f"--key={argument}"
        else:
            joined.append(argument)
    return joined


def _complain(error: Exception, status: int) -> int:
    print(f"memodb: {error}", file=sys.stderr)
    return status
