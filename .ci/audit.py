"""Ask OSV for known vulnerabilities of everything that is installed, and see that all of it is pinned.

Run by ``make audit`` with the interpreter of the environment to look at; needs a network (api.osv.dev). pip-audit is
installed into an environment of its own, which is removed. Exits nonzero where something is not in constraints.txt, is
vulnerable, or could not be asked for.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
#: The tool itself, pinned as well.
TOOL = "pip-audit==2.10.1"


def pins(lines: list[str]) -> dict[str, str]:
    """Return name -> version of lines ``name==version``; a local version (``+cpu``) is left out."""
    found = {}
    for line in lines:
        name, equals, version = line.partition("==")
        if equals and not line.startswith(("#", "-")):
            found[re.sub(r"[-_.]+", "-", name.strip()).lower()] = version.split("+")[0].split(";")[0].strip()
    return found


def unpinned(installed: dict[str, str], constraints: dict[str, str]) -> list[str]:
    """Return what is installed in a version that constraints.txt does not name."""
    return [f"{name}=={version}" for name, version in installed.items() if constraints.get(name) != version]


def main() -> int:
    """Look, ask, tell; return the exit status."""
    freeze = [sys.executable, "-m", "pip", "--disable-pip-version-check", "freeze", "--exclude-editable"]
    frozen = subprocess.run(freeze, check=True, capture_output=True, text=True).stdout
    installed = pins(frozen.splitlines())
    installed.pop("memodb", None)
    missing = unpinned(installed, pins((ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()))
    for pin in missing:
        print(f"not in constraints.txt: {pin}")
    with tempfile.TemporaryDirectory(prefix="memodb-audit-") as name:
        folder = Path(name)
        venv.create(folder / "venv", with_pip=True)
        python = str(folder / "venv" / "bin" / "python")
        subprocess.run([python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", TOOL], check=True)
        listed = folder / "installed.txt"
        listed.write_text("".join(f"{name}=={version}\n" for name, version in sorted(installed.items())))
        command = [python, "-m", "pip_audit", "--vulnerability-service", "osv", "--no-deps", "--disable-pip"]
        command += ["--progress-spinner", "off", "--desc", "off", "--requirement", str(listed)]
        audit = subprocess.run(command, capture_output=True, text=True)
    print(audit.stdout, end="")
    if "ConnectionError" in audit.stderr:
        print("the database of vulnerabilities (api.osv.dev) cannot be reached from here: nothing was asked for")
    else:
        print(audit.stderr, end="", file=sys.stderr)
    print(f"{len(installed)} packages, {len(missing)} of them not pinned")
    return 1 if missing or audit.returncode else 0


if __name__ == "__main__":
    sys.exit(main())
