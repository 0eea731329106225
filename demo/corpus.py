"""Real text that is on any machine where this runs: docstrings of the installed packages.

The task is to tell which package a docstring comes from. Sources are parsed, never imported.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

__all__ = ["Corpus", "collect", "is_held_out", "mixed"]

# All come with memodb's own dependencies (sympy and networkx with torch). What is missing is left out.
_PACKAGES = ("transformers", "torch", "sympy", "networkx", "matplotlib", "numpy", "zarr", "huggingface_hub")
_SHORTEST, _LONGEST = 60, 1200  # characters


@dataclass(frozen=True)
class Corpus:
    """Texts with the number of their class, split into two parts.

    Attributes
    ----------
    classes
        Names of the classes.
    train, held_out
        Pairs of text and class number.
    """

    classes: list[str]
    train: list[tuple[str, int]]
    held_out: list[tuple[str, int]]


def collect(per_class: int, *, progress: bool | None = None) -> Corpus:
    """Collect docstrings, the same number from each package.

    Parameters
    ----------
    per_class
        Docstrings of each package at most; packages that have less than half of it are left out.
    progress
        Progress bar: True, False, or None for where a terminal is.

    Raises
    ------
    RuntimeError
        Fewer than two packages have enough docstrings.
    """
    found: dict[str, list[str]] = {}
    seen: set[str] = set()
    for package in tqdm(
        _PACKAGES, desc="docstrings", unit="package", disable=None if progress is None else not progress
    ):
        texts = []
        for text in _docstrings(package):
            if text.lower() not in seen:
                seen.add(text.lower())
                texts.append(text)
            if len(texts) == per_class:
                break
        if len(texts) >= per_class / 2:
            found[package] = texts
    if len(found) < 2:
        raise RuntimeError(
            f"expected docstrings of at least two of the packages {', '.join(_PACKAGES)}; found {len(found)}: install "
            "memodb with its extras transformers and bench, or give --model and --data"
        )
    size = min(len(texts) for texts in found.values())
    corpus = Corpus(list(found), [], [])
    for number, texts in enumerate(found.values()):
        for text in texts[:size]:
            (corpus.held_out if is_held_out(text) else corpus.train).append((text, number))
    return Corpus(list(found), mixed(corpus.train), mixed(corpus.held_out))


def mixed(pairs: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """Bring pairs of text and class into an order that mixes them, the same on every run."""
    return sorted(pairs, key=lambda pair: _hash(pair[0]))


def is_held_out(text: str) -> bool:
    """Whether a text belongs to the held-out fifth; the same text always falls on the same side."""
    return _hash(text) % 5 == 0


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _docstrings(package: str) -> Iterator[str]:
    spec = importlib.util.find_spec(package)
    roots = list(spec.submodule_search_locations or ()) if spec else []
    files = sorted((file for root in roots for file in Path(root).rglob("*.py")), key=lambda file: _hash(file.name))
    names = re.compile("|".join(_PACKAGES), re.IGNORECASE)
    for file in files:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # other people's invalid escapes
                tree = ast.parse(file.read_text(encoding="utf-8"))
        except (OSError, SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = " ".join((ast.get_docstring(node) or "")[:_LONGEST].split())
                if len(text) >= _SHORTEST:
                    # The answer must not stand in the question.
                    yield names.sub("package", text)
