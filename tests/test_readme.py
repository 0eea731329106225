"""The README's example runs as it is printed there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"


def test_the_twenty_lines_run_as_written(shm):
    pytest.importorskip("torch", reason="the example looks at the batch with torch, too")
    section = README.read_text().split("## Twenty lines")[1]
    program = re.search(r"```python\n(.*?)```", section, re.DOTALL).group(1)
    assert "multiget_mapped" in program
    assert len(program.splitlines()) <= 24
    # Only the place of the store differs: tests keep to a directory of their own.
    program = program.replace('tempfile.mkdtemp(dir="/dev/shm")', f"tempfile.mkdtemp(dir={str(shm)!r})")
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "<MappedBatch of 3 records float16[12, 512, 512], 18874368 bytes" in done.stdout
    assert "[5 9 5]" in done.stdout
