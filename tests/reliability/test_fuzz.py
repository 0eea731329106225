"""Fuzzing what parses files (fuzz/parsers.py): only errors of memodb's come out, and memory stays bounded."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import effort
import pytest

HERE = Path(__file__).parent
#: Seconds of the quick run; in the long one, a share of its minutes.
QUICK, SHARE = 12, 0.08


def test_parsers_of_what_lies_on_a_disk(shm):
    pytest.importorskip("atheris", reason="atheris has no wheel here: fuzzing needs it")
    seconds = max(QUICK, round(60 * effort.MINUTES * SHARE))
    command = [
        *(sys.executable, "-W", "ignore", os.fspath(HERE / "fuzz" / "parsers.py"), os.fspath(shm)),
        *(f"-max_total_time={seconds}", "-seed=1" if not effort.is_long() else "-seed=0"),
        *("-rss_limit_mb=2048", "-malloc_limit_mb=512", "-timeout=30", "-max_len=20000", f"-artifact_prefix={shm}/"),
    ]
    paths = os.pathsep.join([os.fspath(HERE), os.fspath(HERE.parent.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=seconds + 180, env={**os.environ, "PYTHONPATH": paths}
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    counted = re.findall(r"Done (\d+) runs", done.stderr)
    assert counted, done.stderr[-2000:]
    assert int(counted[-1]) > 200
    effort.report("fuzzing", inputs=int(counted[-1]), seconds=seconds)
