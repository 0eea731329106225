"""The reference backend: records in a dict of this process. For tests, and for stores that nobody wants to keep."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from memodb.backends.base import Locators, Values, take_options
from memodb.backends.keyed import KeyedBackend
from memodb.errors import StoreFullError, StoreNotFoundError
from memodb.record import RecordSpec

_Records = dict[int, np.ndarray[Any, np.dtype[np.uint8]]]
#: Every store of this process: (its token, device and inode of its directory) -> records, and where it was seen last.
_STORES: dict[tuple[str, int, int], tuple[_Records, Path]] = {}


class MemoryBackend(KeyedBackend):
    """Records in the memory of the process that puts them.

    All handles of that process share them, and they stay until the store is deleted or the process ends. No other
    process can read them; a forked child reads what there was when it was forked.
    """

    name: ClassVar[str] = "memory"
    abilities: ClassVar[Mapping[str, bool]] = {
        "maps": False,
        "durable": False,
        "remote": False,
        "compresses": False,
        "shared": False,
    }

    def __init__(self, path: Path, spec: RecordSpec, options: Mapping[str, Any], *, writable: bool) -> None:
        super().__init__(path, spec, options, writable=writable)
        stat = path.stat()
        self._key = (str(options["token"]), stat.st_dev, stat.st_ino)
        self._records: _Records = _STORES.setdefault(self._key, ({}, path))[0]
        _STORES[self._key] = self._records, path
        for key in [key for key, (_, place) in list(_STORES.items()) if not place.exists()]:
            _STORES.pop(key, None)

    @classmethod
    def check_options(cls, options: Mapping[str, Any], spec: RecordSpec, *, room: int) -> dict[str, Any]:
        """Return a token, by which the store is known again (see `ValueBackend.check_options`)."""
        take_options(cls.name, options, {})
        return {"token": secrets.token_hex(8)}

    def write(self, numbers: Locators, values: Values) -> None:
        """Keep a copy of each record."""
        try:
            for number, value in zip(numbers.tolist(), values, strict=True):
                self._records[number] = np.frombuffer(value.tobytes(), np.uint8)
        except MemoryError as error:
            raise StoreFullError(f"no memory for {values.nbytes} more bytes; nothing was stored") from error

    def read(self, locators: Locators, out: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        """Copy records into `out` (see `ValueBackend.read`)."""
        for row, number in zip(out, locators.tolist(), strict=True):
            record = self._records.get(number)
            if record is None:
                raise FileNotFoundError(f"record {number} is not in the memory of this process")
            row[:] = record

    def erase(self, numbers: Locators) -> None:
        """Forget records."""
        for number in numbers.tolist():
            self._records.pop(number, None)

    def numbers(self, first: int) -> Locators:
        """Return the numbers of all records from `first` on."""
        return np.array(sorted(number for number in list(self._records) if number >= first), np.uint64)

    def refresh(self, state: bytes) -> bool:
        """Take note of a committed state, and see whether its records are here at all."""
        super().refresh(state)
        if self.kept and not self._records:
            raise StoreNotFoundError(
                f"the records of {self.path.parent} were in the memory of a process that ended, or of another one: no "
                "other process can read them; remove the directory, and put what shall last into a store of another "
                "backend (memodb.copy makes one while that process lives)"
            )
        return False

    def remove(self) -> None:
        """Forget the whole store."""
        super().remove()
        _STORES.pop(self._key, None)
