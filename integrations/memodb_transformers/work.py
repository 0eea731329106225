"""The folder in which a store is built, and the journal of what is done: a build that was cut off goes on from it.

A store at ``path`` is built in ``path.building`` and moved to its place at the end as a whole, so that whatever lies
at ``path`` is complete. ``journal.json`` in that folder names the stages that are done; one that was cut off in the
middle is done again, but for recording, which goes on with the sequence it was at.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import resource
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

import memodb
from memodb.safe import Guard, set_permissions

from .errors import UnfinishedBuildError
from .store import move_into_place

__all__ = ["Stage", "Work", "fingerprint"]

_JOURNAL = "journal.json"
_BEGUN, _MOVING = "begun", "moving"


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of a build.

    Attributes
    ----------
    name, padded_length
        Which stage, and of which store, by the length of its records.
    seconds
        Wall-clock time that it took, of all attempts that were finished.
    peak_memory
        Most bytes of memory that the process had held when it ended.
    bytes
        What lay in the folder of the build when it ended.
    resumed
        Whether it was done by an earlier call.
    """

    name: str
    padded_length: int
    seconds: float
    peak_memory: int
    bytes: int
    resumed: bool


class Work:
    """The folder of a build.

    Parameters
    ----------
    path
        Where the store shall be.
    settings
        Everything that the result depends on; an unfinished build of other settings is refused.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.folder = path.with_name(path.name + ".building")
        self.stages: list[Stage] = []
        self._settings = json.loads(json.dumps(settings))
        self._journal: dict[str, Any] = {"settings": self._settings, "done": {}}

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Make the folder, or go on with the one there is; on an error before any stage is done, remove it.

        Raises
        ------
        UnfinishedBuildError
            An unfinished build of other data or settings lies there.
        memodb.UnsafePathError
            The folder is somebody else's, or others may write it.
        memodb.WriterLockedError
            Another process is building there.
        """
        descriptor = self._claim()
        try:
            self._read()
            try:
                yield
            except BaseException as error:
                if set(self._journal["done"]) <= {_BEGUN}:
                    shutil.rmtree(self.folder, ignore_errors=True)  # nothing is lost
                    raise
                error.add_note(
                    f"what was done so far lies in {self.folder}: call build again with the same arguments to go on, "
                    "or remove that folder"
                )
                raise
        finally:
            os.close(descriptor)

    def part(self, padded_length: int) -> Path:
        """Tell the folder of what is needed only while one store is built."""
        return self.folder / f"work-{padded_length}"

    def store(self, padded_length: int) -> Path:
        """Tell where one store is built."""
        return self.folder / "stores" / f"L={padded_length}"

    def run(self, name: str, padded_length: int, do: Callable[[], Any]) -> Any:
        """Run a stage unless it is done; returns what it returned, as JSON types."""
        key = f"L={padded_length}/{name}"
        noted = self._journal["done"].get(key)
        if noted is None:
            began = perf_counter()
            result = do()
            noted = {
                "result": result,
                "seconds": perf_counter() - began,
                # ru_maxrss counts KiB: getrusage(2)
                "peak_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                "bytes": sum(file.stat().st_blocks * 512 for file in self.folder.rglob("*") if file.is_file()),
            }
            self.note(key, noted)
            resumed = False
        else:
            resumed = True
        self.stages.append(Stage(name, padded_length, noted["seconds"], noted["peak_memory"], noted["bytes"], resumed))
        return self._journal["done"][key]["result"]

    def note(self, key: str, value: Any) -> None:
        """Write into the journal; what is written is there as a whole or not at all."""
        self._journal["done"][key] = json.loads(json.dumps(value))
        draft = self.folder / f"{_JOURNAL}.tmp"
        draft.unlink(missing_ok=True)
        Guard.of(self.folder).write(draft, (json.dumps(self._journal, indent=1) + "\n").encode())
        os.replace(draft, self.folder / _JOURNAL)

    def noted(self, key: str) -> Any:
        """Return what was written into the journal, or None."""
        return self._journal["done"].get(key)

    def finish(self, lengths: Iterable[int], *, buckets: bool, permissions: int) -> None:
        """Move what was built to its place and remove the folder."""
        self.note(_MOVING, value=True)
        chosen = self.folder / "stores"
        if not buckets:
            chosen = self.store(next(iter(lengths)))
        else:
            set_permissions(chosen, permissions)  # as the stores in it
        move_into_place(
            chosen,
            self.path,
            memodb.StoreExistsError(
                f"{self.path} was made while the store was built: remove it and call build again with the same "
                "arguments"
            ),
        )
        shutil.rmtree(self.folder, ignore_errors=True)

    def _claim(self) -> int:
        """Make the folder and lock it; returns the descriptor that holds the lock."""
        while True:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            try:
                descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            except FileNotFoundError:
                continue  # another build has just ended
            except OSError as error:
                raise _not_own(self.folder, os.lstat(self.folder)) from error
            try:
                found = os.fstat(descriptor)
                if found.st_uid != os.geteuid() or found.st_mode & 0o022:
                    raise _not_own(self.folder, found)
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                with suppress(FileNotFoundError):
                    if os.path.samestat(found, os.stat(self.folder)):
                        return descriptor
            except BlockingIOError as error:
                os.close(descriptor)
                raise memodb.WriterLockedError(
                    f"another process is building in {self.folder}: wait for it, or choose another path"
                ) from error
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)  # the lock of a folder that another build has removed meanwhile

    def _read(self) -> None:
        file = self.folder / _JOURNAL
        if not file.exists():
            # Killed before its first note, or none of ours: then it is not empty.
            ours = ("stores", f"{_JOURNAL}.tmp")
            names = sorted(part.name for part in self.folder.iterdir())
            strange = [name for name in names if name not in ours and not name.startswith("work-")]
            if strange:
                raise memodb.StoreExistsError(
                    f"{self.folder} is where the store would be built, but holds {strange[0]!r}: remove it, or choose "
                    "another path"
                )
            self.note(_BEGUN, value=True)
            return
        try:
            journal = json.loads(Guard.of(self.folder).read(file))
            settings, done = journal["settings"], journal["done"]
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise UnfinishedBuildError(f"{file} is damaged ({error!r}): remove {self.folder}") from error
        other = sorted(name for name in {*settings, *self._settings} if settings.get(name) != self._settings.get(name))
        if other:
            raise UnfinishedBuildError(
                f"{self.folder} holds an unfinished build that differs in: {', '.join(other)}. Call build as it was "
                "called then, or remove that folder"
            )
        self._journal = {"settings": settings, "done": dict(done)}
        if _MOVING in done and not any(self.folder.glob("stores/L=*")):
            # Killed after the store was moved to its place; as that is free now, it is wanted anew.
            for part in self.folder.iterdir():
                shutil.rmtree(part) if part.is_dir() else part.unlink()
            self._journal = {"settings": self._settings, "done": {}}
            self.note(_BEGUN, value=True)


def _not_own(folder: Path, found: os.stat_result) -> memodb.UnsafePathError:
    """Say that others may put something into the folder: what lies in it is gone on with."""
    return memodb.UnsafePathError(
        f"expected {folder} to be a directory of this user that nobody else may write, for a build to go on in; found "
        f"{stat.filemode(found.st_mode)} of user {found.st_uid}: remove it, or choose another path"
    )


def fingerprint(values: Iterable[Any]) -> str:
    """Tell data from other data: a digest of tensors, arrays and what else can be written as JSON."""
    digest = hashlib.sha256()
    for value in values:
        if isinstance(value, torch.Tensor):
            value = value.detach().cpu()
            value = value.view(torch.uint8).numpy() if value.is_floating_point() and value.dim() else value.numpy()
        if isinstance(value, np.ndarray):
            digest.update(repr((value.shape, value.dtype.str)).encode())
            digest.update(np.ascontiguousarray(value).tobytes())
        else:
            digest.update(json.dumps(value, sort_keys=True, default=repr).encode())
    return digest.hexdigest()
