"""Backends by name, loaded when first asked for.

Third parties register a class in the entry-point group ``memodb.backends``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec

from memodb.backends.base import ValueBackend
from memodb.errors import BackendNotFoundError, BackendUnavailableError

GROUP = "memodb.backends"


@dataclass(frozen=True)
class BackendInfo:
    """One line of ``memodb backends``.

    Parameters
    ----------
    name
        What ``MemoDB.create(backend=...)`` takes.
    installed
        Whether it can be imported here.
    abilities
        "maps", "durable", "remote", "compresses" -> bool; empty where it is not installed.
    hint
        How to install what is missing.
    """

    name: str
    installed: bool
    abilities: Mapping[str, bool] = field(default_factory=dict)
    hint: str = ""


#: name -> (module, class, what to install)
_BUILTIN: dict[str, tuple[str, str, str]] = {
    "arena": ("memodb.backends.arena", "ArenaBackend", "pip install memodb"),
    "files": ("memodb.backends.files", "FilesBackend", "pip install memodb"),
    "lmdb": ("memodb.backends.lmdb", "LmdbBackend", "pip install memodb"),
    "zarr": ("memodb.backends.zarr", "ZarrBackend", "pip install zarr"),
    "memory": ("memodb.backends.memory", "MemoryBackend", "pip install memodb"),
}


#: Drivers that a backend imports when a store is opened, not when it is loaded.
_DRIVERS = {"zarr": "zarr"}


def _third_parties() -> dict[str, EntryPoint]:
    # A registered name never replaces one of ours, nor the first of two that claim it.
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=GROUP):
        if point.name not in _BUILTIN:
            found.setdefault(point.name, point)
    return found


def load(name: str) -> type[ValueBackend]:
    """Return the class of the backend `name`.

    Raises
    ------
    BackendNotFoundError
        If nobody registered that name.
    BackendUnavailableError
        If it cannot be imported; the message tells what to install.
    """
    hint = f"repair the package that provides it (entry-point group {GROUP})"
    try:
        if name in _BUILTIN:
            module, attribute, hint = _BUILTIN[name]
            if name in _DRIVERS and find_spec(_DRIVERS[name]) is None:
                raise ImportError(f"the package {_DRIVERS[name]} is not installed")
            loaded = getattr(import_module(module), attribute)
        else:
            point = _third_parties().get(name)
            if point is None:
                known = ", ".join(sorted([*_BUILTIN, *_third_parties()]))
                raise BackendNotFoundError(f"no backend is called {name!r}; there are: {known}")
            if point.dist is not None:
                hint = f"pip install --upgrade {point.dist.name}"
            loaded = point.load()
    except BackendNotFoundError:
        raise
    except Exception as error:  # what a third party's module does wrong is not to stop anybody who wants another
        raise BackendUnavailableError(f"backend {name!r} cannot be loaded: {error}; {hint}") from error
    if not (isinstance(loaded, type) and issubclass(loaded, ValueBackend)):
        raise BackendUnavailableError(f"backend {name!r} is {loaded!r}, not a subclass of ValueBackend; {hint}")
    if not isinstance(getattr(loaded, "abilities", None), Mapping) or not isinstance(
        getattr(loaded, "name", None), str
    ):
        raise BackendUnavailableError(f"backend {name!r} does not say its name and its abilities; {hint}")
    return loaded


def available_backends() -> list[BackendInfo]:
    """Return every backend that is known here, by name."""
    infos = []
    for name in sorted([*_BUILTIN, *_third_parties()]):
        try:
            infos.append(BackendInfo(name, True, dict(load(name).abilities)))
        except BackendUnavailableError as error:
            infos.append(BackendInfo(name, False, hint=str(error)))
    return infos
