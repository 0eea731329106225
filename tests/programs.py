"""Programs run in processes of their own: what they do could hang, crash or exhaust the test process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import memodb


def run_program(folder: Path, text: str, *arguments: Any, wrapper: tuple[str, ...] = (), timeout: float = 180) -> str:
    """Run a Python program from a file in `folder` and return what it printed.

    Raises
    ------
    AssertionError
        If it hangs, crashes or fails; its stderr is shown.
    """
    program = folder / "program.py"
    program.write_text(text)
    command = [*wrapper, sys.executable, str(program), *map(str, arguments)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        import signal

        os.killpg(process.pid, signal.SIGKILL)  # its children hang as well
        out, err = process.communicate()
        raise AssertionError(f"the program hung for {timeout} s\n{out}\n{err}") from None
    assert process.returncode == 0, f"status {process.returncode}\n{out}\n{err}"
    return out


def with_helpers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let programs import what lies beside this file."""
    places = [os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, places)))


def private_mount(at: Path, kind: str, options: str) -> tuple[str, ...]:
    """Return the command that runs another one where a file system is mounted at `at`, seen by nobody else; or skip."""
    at.mkdir()
    mount = f'mount -t {kind} -o {options} none "{at}" && exec "$@"'
    refused = []
    # Root of the machine, where the tests run as that; else of a user namespace, which may mount tmpfs as well.
    for namespaces in (["--mount"], ["--user", "--map-root-user", "--mount"]):
        wrapper = ("unshare", *namespaces, "sh", "-c", mount, "sh")
        try:
            subprocess.run([*wrapper, "true"], check=True, capture_output=True, timeout=60)
            return wrapper
        except subprocess.CalledProcessError as error:
            refused.append(error.stderr.decode().strip())
        except (OSError, subprocess.TimeoutExpired) as error:
            refused.append(str(error))
    pytest.skip(f"this user cannot mount a {kind} with {options}: {'; '.join(refused)}")


def gather_and_tell(db, answers):
    """Gather record 4 of a handle that came from another process, and tell how that went."""
    try:
        db.multiget([4])
    except memodb.CorruptionError as error:
        answers.put(str(error))
    else:
        answers.put("read")
