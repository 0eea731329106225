"""What a backend is: the `ValueBackend` base class and the optional ability to be mapped, `SupportsExtents`.

Who writes one starts from `memodb.backends.keyed.KeyedBackend`, which leaves four short methods to fill in.
"""

from __future__ import annotations

import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np

from memodb.errors import InvalidOptionError
from memodb.extents import Extents
from memodb.record import RecordSpec

Locators = np.ndarray[Any, np.dtype[np.uint64]]
Values = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Usage:
    """What a backend holds.

    Parameters
    ----------
    bytes_on_store
        Bytes allocated for records.
    huge_bytes
        How many of them lie on huge pages.
    huge_note
        Why not all of them do, and what could be done; empty where nothing can be gained.
    filesystem
        Kind of the file system that holds them ("tmpfs", "ext4", "hugetlbfs", "ext4, DAX"); empty where that does not
        matter.
    place
        Directory that holds them; empty where there is none.
    dax
        Of files that are accessed directly in persistent memory: "mount_option" (how the file system was mounted, such
        as "dax=always"), "map_sync" (whether they are written through mappings with MAP_SYNC), "flush" (what makes a
        put durable). None where no records lie on DAX.
    """

    bytes_on_store: int
    huge_bytes: int = 0
    huge_note: str = ""
    filesystem: str = ""
    place: str = ""
    dax: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Victim:
    """A part of the store that `ValueBackend.rewrite` can empty.

    `members` are indices into the locators it was asked about.
    """

    token: int
    members: np.ndarray[Any, np.dtype[np.intp]]


class ValueBackend(ABC):
    """Bytes of records, addressed by locators: 64-bit numbers of the backend's own that the catalog remembers.

    The database calls `append` and `sync` before it commits to the catalog, and hands `state` to the same commit. Bytes
    whose commit never came are leftovers: `restore` is called with the last committed state when a writer opens, and
    after a failed write, and forgets them. Committed bytes never change. A backend implements `read`, or
    `SupportsExtents`, or both.

    An `OSError` of a write that is not one of memodb's own errors counts as a failure of the device: nothing more is
    written through that handle. So a backend raises `StoreFullError` where room is missing, and `StoreAccessError`
    where another attempt may succeed.

    Parameters
    ----------
    path
        Directory of the backend's own inside the store.
    spec
        Shape and dtype of the records.
    options
        What `check_options` returned when the store was created.
    writable
        Whether this process is the writer.
    """

    name: ClassVar[str]
    #: What the backend can do: "maps" (pages, without a copy), "durable" (a put that returned survives a power cut, on
    #: a disk), "remote" (records may lie on another machine), "compresses", "shared" (other processes can read; taken
    #: for granted where it is not named).
    abilities: ClassVar[Mapping[str, bool]]

    def __init__(self, path: Path, spec: RecordSpec, options: Mapping[str, Any], *, writable: bool) -> None:
        self.path = path
        self.spec = spec
        self.options = options
        self.writable = writable

    @classmethod
    def check_options(cls, options: Mapping[str, Any], spec: RecordSpec, *, room: int) -> dict[str, Any]:
        """Return the options to persist, defaults filled in.

        Parameters
        ----------
        options
            What the caller of ``MemoDB.create`` gave.
        spec
            Shape and dtype of the records.
        room
            Bytes that the store may grow to: the size of its file system, or ``max_bytes`` where that is less.

        Raises
        ------
        InvalidOptionError
            For an option that the backend does not have, or a value that it cannot use.
        """
        return take_options(cls.name, options, {})

    def begin(self) -> None:  # noqa: B027 - most backends make what they need with the first put
        """Claim the place of a new store: called once, when its catalog is there. An error undoes the creation."""

    @abstractmethod
    def append(self, values: Values) -> Locators:
        """Store `values` [n, *shape] (any strides) and return n locators; nothing is promised before `sync`.

        Raises
        ------
        StoreFullError
            If they do not fit; the caller then calls `restore`.
        """

    def as_kept(self, values: Values) -> Values:
        """Return `values` [n, *shape] as they will be read back: what checksums are taken of.

        Other than `values` themselves only where the store was created with a lossy option.
        """
        return values

    @property
    def travels(self) -> bool:
        """Whether records come over a network: then gathers check them, unless the caller of ``open`` says no."""
        return bool(self.abilities.get("remote"))

    @property
    def unit(self) -> int:
        """How many records are kept together: puts of multiples of it waste nothing."""
        return 1

    def append_bytes(self, n: int) -> int:
        """Return how many more bytes on the store `n` more records would take."""
        return n * self.spec.nbytes

    @abstractmethod
    def sync(self) -> None:
        """Make appended bytes as durable as the store promises."""

    @abstractmethod
    def state(self) -> bytes:
        """Return what `restore` needs to go on from here."""

    @abstractmethod
    def restore(self, state: bytes) -> None:
        """Writer: go back to a committed state and give back what leftovers hold."""

    @abstractmethod
    def refresh(self, state: bytes) -> bool:
        """Reader: take note of a newly committed state, and drop what it no longer names.

        Return whether something was dropped that can be mapped: then idle windows let go of their pages.
        """

    def read(self, locators: Locators, out: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        """Copy records into `out`, uint8 [n, nbytes] C-contiguous.

        Raises
        ------
        FileNotFoundError
            If a record is not there: compaction may have removed or moved it since the locators were looked up.
        CorruptionError
            If one cannot be read.
        """
        raise NotImplementedError(f"backend {self.name!r} offers extents only")

    def victims(self, locators: Locators) -> list[Victim]:
        """Given the locators of all live records, return the parts that hold dead ones."""
        return []

    def rewrite(self, token: int, locators: Locators) -> Locators:
        """Append the given live records of a victim elsewhere and leave the victim out of `state`.

        Return the new locators.
        """
        raise NotImplementedError

    def discard(self, token: int) -> None:  # noqa: B027 - a backend without victims has nothing to discard
        """After the commit: remove a victim from the store (existing mappings of it stay intact)."""

    def after_fork(self) -> None:
        """Go on in a forked child, which only reads: take fresh locks, drop threads."""
        self.writable = False

    @abstractmethod
    def usage(self) -> Usage:
        """Return what the store holds."""

    def bytes_on_store(self) -> int:
        """Return the bytes allocated for records: what `usage` says, where that is asked before every put."""
        return self.usage().bytes_on_store

    def remove(self) -> None:
        """Remove everything that this backend keeps, also outside the store's directory; the store is being deleted."""
        shutil.rmtree(self.path, ignore_errors=True)

    @abstractmethod
    def close(self) -> None:
        """Let go of every resource that no batch needs."""


@runtime_checkable
class SupportsExtents(Protocol):
    """A backend whose records lie uncompressed in files that can be mapped."""

    def extents(self, locators: Locators) -> Extents:
        """Return where the records lie.

        Raises
        ------
        FileNotFoundError
            As `ValueBackend.read`; also later, by whoever uses the extents.
        """


def take_options(
    backend: str, given: Mapping[str, Any], known: Mapping[str, tuple[Any, Callable[[Any], bool], str]]
) -> dict[str, Any]:
    """Check `given` options against `known`: name -> (default, test, what is expected).

    Raises
    ------
    InvalidOptionError
        Naming the option, what was expected and what was found.
    """
    for name in given:
        if name not in known:
            have = ", ".join(sorted(known)) or "none"
            raise InvalidOptionError(f"backend {backend!r} has no option {name!r}; its options: {have}")
    taken = {}
    for name, (default, good, expected) in known.items():
        value = given.get(name, default)
        if isinstance(value, (np.integer, np.bool_, np.floating)):
            value = value.item()
        elif isinstance(value, os.PathLike):
            value = os.fspath(value)
        if not good(value):
            raise InvalidOptionError(f"option {name}={value!r} of backend {backend!r}: expected {expected}")
        taken[name] = value
    return taken


def require_options(options: Mapping[str, Any], known: Mapping[str, Callable[[Any], bool]]) -> None:
    """Check options as they come back from a store's settings, which may be damaged or made up.

    Raises
    ------
    ValueError
        Naming the first that is missing or cannot be used.
    """
    for name, good in known.items():
        if name not in options:
            raise ValueError(f"option {name} is missing")
        if not good(options[name]):
            raise ValueError(f"option {name} is {str(options[name])[:60]!r}")
