"""zarr's store of a directory of this machine, with our way of opening and making files."""

from __future__ import annotations

import asyncio
import os
import secrets
from pathlib import Path
from typing import Any

from zarr.abc.store import OffsetByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import LocalStore

from memodb.safe import Guard, make_directory


class GuardedStore(LocalStore):
    """zarr's store of a directory, whose files are opened as those of any store of ours (`memodb.safe`)."""

    def __init__(self, root: Path | str, *, read_only: bool = False, guard: Guard | None = None) -> None:
        super().__init__(root, read_only=read_only)
        self._parent = guard
        self._guard: Guard | None = None

    def with_read_only(self, read_only: bool = False) -> GuardedStore:
        """Return the same store with another answer to whether it may be written."""
        return type(self)(self.root, read_only=read_only, guard=self._parent)

    @property
    def guard(self) -> Guard:
        """What the directory, which is checked now if it was not yet, says of the files in it."""
        if self._guard is None:
            self._guard = Guard.of(self.root) if self._parent is None else self._parent.directory(self.root)
        return self._guard

    async def _open(self, *, mode: Any = None) -> None:
        self._ensure_open_sync()

    def _ensure_open_sync(self) -> None:
        # zarr would make the directory at the first look, with permissions that go by the umask (see `make_root`).
        if self.read_only and not self.root.exists():
            raise FileNotFoundError(f"{self.root} does not exist")
        self._is_open = True

    def make_root(self) -> None:
        """Make the directory, and those above it."""
        parent = self._parent or Guard.of(self.root.parent)
        for folder in reversed(self.root.parents):
            if not folder.exists():
                make_directory(folder, parent.directory_mode)
        self._guard = parent.make_directory(self.root)

    def _read(self, key: str, prototype: Any, part: Any) -> Any:
        with os.fdopen(self.guard.open(self.root / key, os.O_RDONLY), "rb") as file:
            if isinstance(part, RangeByteRequest):
                file.seek(part.start)
                return prototype.buffer.from_bytes(file.read(part.end - part.start))
            if isinstance(part, OffsetByteRequest):
                file.seek(part.offset)
            elif isinstance(part, SuffixByteRequest):
                file.seek(max(0, file.seek(0, os.SEEK_END) - part.suffix))
            return prototype.buffer.from_bytes(file.read())

    def _write(self, key: str, value: Any, exclusive: bool) -> None:
        if exclusive:
            self.guard.write(self.root / key, value.as_buffer_like())
            return
        # zarr's own name for a draft, by which `RecordArray.remove_partial` finds what a killed process left.
        draft = self.root / f"{key}.{secrets.token_hex(16)}.partial"
        try:
            self.guard.write(draft, value.as_buffer_like())
            draft.replace(self.root / key)
        finally:
            draft.unlink(missing_ok=True)

    async def get(self, key: str, prototype: Any = None, byte_range: Any = None) -> Any:
        """Return an object, or a part of it; None if it is not there."""
        if not self._is_open:
            await self._open()
        try:
            return await asyncio.to_thread(self._read, key, prototype or default_buffer_prototype(), byte_range)
        except (FileNotFoundError, NotADirectoryError):
            return None

    async def get_partial_values(self, prototype: Any, key_ranges: Any) -> list[Any]:
        """Return parts of objects."""
        return [await self.get(key, prototype, part) for key, part in key_ranges]

    def get_sync(self, key: str, *, prototype: Any = None, byte_range: Any = None) -> Any:
        """Return an object, or a part of it; None if it is not there."""
        self._ensure_open_sync()
        try:
            return self._read(key, prototype or default_buffer_prototype(), byte_range)
        except (FileNotFoundError, NotADirectoryError):
            return None

    async def _set(self, key: str, value: Any, exclusive: bool = False) -> None:
        if not self._is_open:
            await self._open()
        self._check_writable()
        await asyncio.to_thread(self._write, key, value, exclusive)

    def set_sync(self, key: str, value: Any) -> None:
        """Write an object."""
        self._ensure_open_sync()
        self._check_writable()
        self._write(key, value, False)
