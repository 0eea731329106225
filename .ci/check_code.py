"""See that no code here runs what it reads: no pickle, no eval, no shell, no module whose name comes from data.

Run from the repository: ``python .ci/check_code.py [FOLDER ...]``. It reads the syntax trees of memodb, integrations
and demo, prints each place that is not allowed, and exits nonzero where there is one. What is allowed nevertheless is
listed in `ALLOWED`, by file and call, each with the reason.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("memodb", "integrations", "demo")

#: Modules that turn data into objects or code: not even imported.
MODULES = {
    "_pickle",
    "cPickle",
    "cloudpickle",
    "code",
    "codeop",
    "dill",
    "joblib",
    "jsonpickle",
    "marshal",
    "pickle",
    "pickletools",
    "runpy",
    "shelve",
    "yaml",
}
#: Builtins that run text.
BUILTINS = {"__import__", "breakpoint", "compile", "eval", "exec"}
#: Functions by their full names, as they are after the file's imports.
FUNCTIONS = {
    "ctypes.PyDLL": "loads code",
    "faiss.read_index": "reads a file that nobody compared with its checksum",
    "faiss.read_VectorTransform": "reads a file that nobody compared with its checksum",
    "importlib.__import__": "imports by name",
    "importlib.import_module": "imports by name",
    "importlib.metadata.entry_points": "finds code by name",
    "importlib.util.spec_from_file_location": "imports a file",
    "logging.config.fileConfig": "evaluates what is in a file",
    "numpy.load": "reads a pickle unless it is told allow_pickle=False",
    "os.execl": "runs a program",
    "os.execv": "runs a program",
    "os.execve": "runs a program",
    "os.execvp": "runs a program",
    "os.popen": "runs a shell",
    "os.spawnl": "runs a program",
    "os.spawnv": "runs a program",
    "os.system": "runs a shell",
    "pandas.read_pickle": "reads a pickle",
    "subprocess.getoutput": "runs a shell",
    "subprocess.getstatusoutput": "runs a shell",
    "tempfile.mktemp": "names a file that somebody else may make first",
    "torch.hub.load": "fetches code",
    "torch.jit.load": "reads code",
    "torch.load": "reads a pickle",
    "zipimport.zipimporter": "imports a file",
}
#: Methods that are dangerous whatever they are called on.
METHODS = {"Unpickler": "reads a pickle", "exec_module": "runs a module", "load_module": "runs a module"}
#: Arguments that are dangerous in whatever call.
KEYWORDS = {("shell", True), ("allow_pickle", True), ("trust_remote_code", True), ("weights_only", False)}

#: (file, what) -> why it may stand there.
ALLOWED = {
    ("memodb/backends/registry.py", "importlib.import_module"): "the names of our own modules, a constant table",
    ("memodb/backends/registry.py", "importlib.metadata.entry_points"): (
        "backends of installed packages; a store's settings choose among them and cannot add to them"
    ),
    ("memodb/backends/registry.py", "point.load"): "the same: what is loaded was installed by the user",
}


class Finding(NamedTuple):
    """Something that is not allowed."""

    file: str
    line: int
    what: str
    why: str


def check(source: str, file: str) -> list[Finding]:
    """Return what is not allowed in a Python file."""
    tree = ast.parse(source, file)
    names = dict(_imported(tree))
    found = [Finding(file, line, what, why) for line, what, why in _suspicious(tree, names)]
    return [finding for finding in found if (file, finding.what) not in ALLOWED]


def _imported(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Yield (name in this file, full name) of what is imported."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield (name.asname, name.name) if name.asname else (name.name.split(".")[0], name.name.split(".")[0])
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for name in node.names:
                yield name.asname or name.name, f"{node.module}.{name.name}"


def _full_name(node: ast.expr, names: dict[str, str]) -> str:
    """Return the dotted name that an expression is, through the file's imports; empty if it is something else."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        base = _full_name(node.value, names)
        return f"{base}.{node.attr}" if base else ""
    return ""


def _suspicious(tree: ast.AST, names: dict[str, str]) -> Iterator[tuple[int, str, str]]:
    harmless = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call) and _refuses_pickles(node)}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [name.name for name in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            if isinstance(node, ast.ImportFrom) and not node.level:
                modules += [f"{node.module}.{name.name}" for name in node.names]
            for module in modules:
                if module.split(".")[0] in MODULES:
                    yield node.lineno, module, "turns data into objects or code"
        elif isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Load):
            # Wherever it stands: called, given to somebody who calls it, or under another name.
            full = _full_name(node, names)
            if not (full == "numpy.load" and id(node) in harmless):
                yield from _of_name(node, full, names)
        if isinstance(node, ast.Call):
            yield from _of_call(node, _full_name(node.func, names))


def _of_name(node: ast.Name | ast.Attribute, full: str, names: dict[str, str]) -> Iterator[tuple[int, str, str]]:
    if isinstance(node, ast.Name) and node.id in BUILTINS and node.id not in names:
        yield node.lineno, node.id, "runs text"
    elif full.startswith("builtins.") and full.removeprefix("builtins.") in BUILTINS:
        yield node.lineno, full, "runs text"
    elif full in FUNCTIONS:
        yield node.lineno, full, FUNCTIONS[full]
    elif isinstance(node, ast.Attribute) and node.attr in METHODS:
        yield node.lineno, full or node.attr, METHODS[node.attr]


def _of_call(node: ast.Call, full: str) -> Iterator[tuple[int, str, str]]:
    given = {word.arg: word.value for word in node.keywords if word.arg}
    for name, value in given.items():
        for keyword, bad in KEYWORDS:
            if name == keyword and not (isinstance(value, ast.Constant) and value.value is not bad):
                yield node.lineno, f"{keyword}={bad}", "lets the callee run what it reads"
    if isinstance(node.func, ast.Attribute) and node.func.attr == "load" and full.split(".")[0] in ("point", "entry"):
        yield node.lineno, full, "loads an entry point"
    if isinstance(node.func, ast.Name) and node.func.id == "getattr" and len(node.args) > 1:
        name = node.args[1]
        if isinstance(name, ast.Constant) and (name.value in METHODS or name.value in BUILTINS):
            yield node.lineno, f"getattr(..., {name.value!r})", "runs what it reads, by a name in quotes"


def _refuses_pickles(node: ast.Call) -> bool:
    return any(
        word.arg == "allow_pickle" and isinstance(word.value, ast.Constant) and word.value.value is False
        for word in node.keywords
    )


def main(folders: list[Path]) -> int:
    """Check all Python files of some folders; return the exit status."""
    files = sorted(file for folder in folders for file in folder.rglob("*.py"))
    found = [
        finding
        for file in files
        for finding in check(file.read_text(encoding="utf-8"), file.resolve().relative_to(ROOT).as_posix())
    ]
    for finding in found:
        print(f"{finding.file}:{finding.line}: {finding.what}: {finding.why}")
    print(
        f"{len(files)} files, {len(found)} places that could run what they read, {len(ALLOWED)} allowed with a reason"
    )
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main([Path(name) for name in sys.argv[1:]] or [ROOT / folder for folder in FOLDERS]))
