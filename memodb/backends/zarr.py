"""Records as rows of a zarr array: in a directory, in a zip file, or on another machine.

zarr is imported when a store of this kind is made or opened: the modules ``zarr_*`` beside this one import it.
"""

from __future__ import annotations

import os
import secrets
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from memodb import vm
from memodb.backends.base import Locators, Usage, Values, Victim
from memodb.backends.keyed import KeyedBackend
from memodb.backends.place import require_outside
from memodb.backends.zarr_codecs import Coding
from memodb.backends.zarr_options import check, recheck
from memodb.backends.zarr_url import Target, choose_client, parse_storage_options, parse_url
from memodb.errors import (
    CorruptionError,
    InvalidOptionError,
    MemoDBError,
    StoreAccessError,
    StoreExistsError,
    StoreNotFoundError,
    UnsafePathError,
)
from memodb.record import RecordSpec
from memodb.safe import Guard, user

if TYPE_CHECKING:
    from memodb.backends.zarr_gather import Reader

_STATE = struct.Struct("<QQ")
_MOST_ROWS = 1 << 62
#: Objects that compaction removes at a time.
_GROUP = 4096


class ZarrBackend(KeyedBackend):
    """One zarr (v3) array [rows, *shape]; a record is a row, and its locator the row's number.

    ``zarr.open_array(path_of_store + "/values")`` reads it without memodb: rows are records in the order of their ids
    as long as none was deleted. An object (a chunk, or a shard) is written once and never again, so nothing committed
    can be damaged by what comes later: a put begins at the next multiple of `chunk_records` or `shard_records`, and
    rows that it skips keep the fill value 0. Put whole multiples to have none of them. Compaction removes objects all
    of whose records are deleted.

    Options (of ``MemoDB.create``)
    ------------------------------
    codec : {"zstd", "none", "blosc"}
        "zstd" (default) makes what has structure several times smaller, and a read finds changed bytes by itself.
        "none": records on a local file system are read straight into the batch, two to three times as quick. "blosc"
        (LZ4 after a byte shuffle) lies between.
    level : int
        Of the codec: 1 for zstd (-7 to 22), 5 for blosc (0 to 9).
    chunk_records : int
        Records that are compressed and read together (default 1).
    shard_records : int
        Chunks are kept in shards of so many records, a multiple of `chunk_records`: fewer files or objects, where
        records are small.
    bitround : int
        Keep so many mantissa bits of float16, float32 or float64 records, the rest becomes zeros that compress.
    packed_dtype, scale_factor, add_offset : str, float, float
        Store floats as integers ("uint8", "int16" ...): ``round((value - add_offset) / scale_factor)``. Values outside
        of what that reaches, and NaN, are refused. The names are those of the CF conventions, by which others decode
        the array.
    url : str
        Where the array is, instead of in the store's own directory: a directory, ``memory://name`` (shared in this
        process), ``s3://bucket/prefix``, ``gs://``, ``az://``. It stays there when the store's directory is deleted.
    client : {"auto", "fsspec", "obstore"}
        Through what a URL on another machine is reached; "auto" takes fsspec's driver where that is installed.
    storage_options : dict
        For that client, kept with the store, so no secrets; ``endpoint_url``, ``region`` and ``anon`` are understood by
        both clients, all else is handed on.
    durability : {"full", "relaxed"}
        "full" (default): a put that returned survives a power cut on a disk file system (syncfs before the commit).
        "relaxed": chunks reach the disk when the kernel likes. On another machine: what the provider promises.
    """

    name: ClassVar[str] = "zarr"
    abilities: ClassVar[Mapping[str, bool]] = {"maps": False, "durable": True, "remote": True, "compresses": True}

    def __init__(self, path: Path, spec: RecordSpec, options: Mapping[str, Any], *, writable: bool) -> None:
        recheck(self.name, options, spec)
        target = _target(path, options)
        if target.kind == "zip" and writable:
            raise StoreAccessError(
                f"the records of {path.parent} are in {target}, which can be read only: to write, unpack it into "
                f"{path} and remove it; to read, open with mode='r'"
            )
        super().__init__(path, spec, options, writable=writable)
        from memodb.backends.zarr_array import RecordArray
        from memodb.backends.zarr_store import Place

        self._coding = Coding(spec, options)
        guard = Guard.of(path.parent)
        if target.kind == "remote" and guard.is_foreign:
            raise UnsafePathError(
                f"the settings of {path.parent}, a store of {user(guard.uid)}, keep its records at {target}: that "
                f"would be asked with the credentials of {user(os.geteuid())}; let its owner make a copy that holds "
                "its records"
            )
        self._place = Place(target, options["client"], options["storage_options"], writable=writable, guard=guard)
        self._array = RecordArray(self._place, spec, options, self._coding)
        self._reader: Reader | None = None
        #: Bytes of the objects that are committed.
        self._stored = 0
        self._fd = -1

    @classmethod
    def check_options(cls, options: Mapping[str, Any], spec: RecordSpec, *, room: int) -> dict[str, Any]:
        """Return the options to persist, and see that nothing is at the `url` yet (see `ValueBackend.check_options`).

        Raises
        ------
        BackendUnavailableError
            If a driver is not installed; the message tells what to install.
        StoreExistsError
            If there is something at `url`; it is not touched.
        StoreAccessError
            If `url` cannot be reached.
        """
        taken = check(cls.name, options, spec)
        target = None if taken["url"] is None else parse_url(taken["url"])
        taken["storage_options"] = parse_storage_options(taken["storage_options"], target)
        taken["token"] = secrets.token_hex(8)
        if target is not None:
            taken["url"] = str(target)
            _require_nothing(target, taken)
        elif taken["client"] != "auto":
            raise InvalidOptionError(f"client={taken['client']!r} reaches a url on another machine; give url as well")
        return taken

    # --- writing ---

    def begin(self) -> None:
        """Make the array of a new store whose records go elsewhere, so that no other store takes its place."""
        target = self._place.target
        if self.options["url"] is None:
            return
        if target.kind == "local":
            require_outside(Path(target.where), self.path.parent, "url")
        try:
            self._place.make_root()
            self._array.make(0)
        except MemoDBError:
            raise
        except OSError as error:
            raise StoreAccessError(
                f"no array can be made at {self._place}: {error.strerror}; choose another url, or ask for access"
            ) from error
        self._open_array()

    def append(self, values: Values) -> Locators:
        """Write records as the next rows, from the beginning of an object on (see `ValueBackend.append`)."""
        self.next = vm.round_up(self.next, self._array.per_object)
        return super().append(values)

    def write(self, numbers: Locators, values: Values) -> None:
        """Write rows (see `KeyedBackend.write`)."""
        rows = self._coding.encode(values)
        if self._place.root is not None:
            self._descriptor(self._place.root)
        first = int(numbers[0])
        # Before the rows: then what a crash leaves of them lies within the array, where the next writer finds it.
        if self._array.opened or self._array.open(repair=False):
            self._array.resize(first + len(rows))
        else:
            self._array.make(first + len(rows))
        self._stored += self._array.write(first, rows)

    def _descriptor(self, root: Path) -> int:
        """Return a descriptor of the array's directory, opened before anything is written (see `sync_filesystem`)."""
        if self._fd < 0:
            self._place.make_root()
            self._fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        return self._fd

    def as_kept(self, values: Values) -> Values:
        """Return `values` as they will be read back (see `ValueBackend.as_kept`)."""
        return self._coding.kept(values)

    @property
    def travels(self) -> bool:
        """Whether the array lies on an object store."""
        return self._place.target.kind == "remote"

    @property
    def unit(self) -> int:
        """Records of an object (see `ValueBackend.unit`)."""
        return int(self._array.per_object)

    def append_bytes(self, n: int) -> int:
        """Return how many bytes `n` more records would take, if nothing of them could be compressed."""
        chunks = -(-n // self._array.per_chunk)
        index = 0 if self._array.shards is None else 16 * chunks + 20 * -(-n // self._array.per_object)
        return chunks * self._array.per_chunk * self._coding.row_bytes + index

    def sync(self) -> None:
        """Make the array durable on a local disk (elsewhere, and with durability "relaxed": nothing)."""
        root = self._place.root
        if root is not None and self.options["durability"] == "full" and not vm.filesystem(root).in_memory:
            try:
                vm.sync_filesystem(self._descriptor(root))
            except OSError as error:
                translated = self._place.failure("flushed", error)
                if translated is error:
                    raise
                raise translated from error

    # --- what is committed ---

    def state(self) -> bytes:
        """Return the next row, and the bytes of all objects."""
        return _STATE.pack(self.next, self._stored)

    def refresh(self, state: bytes) -> bool:
        """Take note of a committed state, and see whether the array is there (see `ValueBackend.refresh`)."""
        self._parse(state)
        if self.next and not self._array.opened:
            self._open_array()
        return False

    def restore(self, state: bytes) -> None:
        """Go back to a committed state: cut off the rows that no commit knows, and remove their objects."""
        self._parse(state)
        self._reader = None
        self._open_array()
        self._array.remove_partial()
        length = self._array.length
        if length == self.next:
            return
        if length > self.next:
            left = self._array.objects()  # of those that are there: the length may be anybody's
            self._array.remove(left[left >= -(-self.next // self._array.per_object)])
        self._array.resize(self.next)

    def numbers(self, first: int) -> Locators:
        """Return the rows from `first` on, whether or not they hold a record."""
        return np.arange(first, max(min(self._array.length, self.next), first), dtype=np.uint64)

    def erase(self, numbers: Locators) -> None:
        """Remove the objects of rows."""
        self._array.remove(np.unique(numbers // np.uint64(self._array.per_object)).astype(np.int64))

    def _parse(self, state: bytes) -> None:
        if state and len(state) != _STATE.size:
            raise self.damaged(f"{len(state)} bytes, expected {_STATE.size}")
        self.next, self._stored = _STATE.unpack(state) if state else (0, 0)
        if self.next > _MOST_ROWS:
            raise self.damaged(f"next row {self.next}")

    def _open_array(self) -> None:
        try:
            if not self._array.open(repair=self.writable) and self.next:
                raise self._lost()
        except BaseException as error:
            self._array.forget()
            self._place.close()  # a handle that cannot be opened is never closed; the store opens again at need
            if isinstance(error, (FileNotFoundError, NotADirectoryError)) and not isinstance(error, MemoDBError):
                raise StoreAccessError(
                    f"{self._place} cannot be made or reached: {error.strerror}; choose another url, or ask for access"
                ) from error
            raise

    def _lost(self) -> CorruptionError | StoreNotFoundError:
        if self._place.target.kind == "memory":
            return StoreNotFoundError(
                f"the records of {self.path.parent} were in {self._place}, the memory of a process that ended, or of "
                "another one: no other process can read them; remove the directory"
            )
        if self._place.target.kind == "remote":
            return StoreNotFoundError(
                f"the records of {self.path.parent} should be at {self._place}, where there is no array: check the "
                "endpoint (option storage_options) and the bucket, or restore the objects from a copy"
            )
        return CorruptionError(
            f"{self._place} holds no zarr array, but {self.path.parent} has records: restore it from a copy (a "
            "values.zip has zarr.json at its top)"
        )

    # --- reading ---

    def read(self, locators: Locators, out: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        """Read rows into `out` (see `ValueBackend.read`).

        Raises
        ------
        StoreAccessError
            If the store cannot be reached.
        """
        from memodb.backends.zarr_store import MissingObjectError

        reader = self._reader
        if reader is None:
            reader = self._reader = self._make_reader()
        try:
            reader.read(locators, out)
        except MissingObjectError:
            # Of a lost bucket, or a server that forgot it, each object is missing; and so is the array.
            if self._place.target.kind == "remote" and not self._array.exists():
                raise self._lost() from None
            raise

    def _make_reader(self) -> Reader:
        from memodb.backends.zarr_gather import Reader

        if not self._array.opened:  # in a forked child
            self._open_array()
        return Reader(self._array, self.spec.nbytes)

    # --- compaction ---

    def victims(self, locators: Locators) -> list[Victim]:
        """Return the objects all of whose records are dead, some thousands at a time."""
        if not self._array.opened:
            return []
        per_object = self._array.per_object
        objects = self._array.objects()
        objects = objects[objects * per_object < self.next]
        if self._place.root is not None:  # a compaction that was cut off had counted out what is there still
            self._stored = sum(self._array.sizes(objects))
        dead = np.setdiff1d(objects, (locators // np.uint64(per_object)).astype(np.int64))
        self._dead = [dead[start : start + _GROUP].astype(np.uint64) for start in range(0, len(dead), _GROUP)]
        return [Victim(token, np.zeros(0, np.intp)) for token in range(len(self._dead))]

    def rewrite(self, token: int, locators: Locators) -> Locators:
        """Count a group of dead objects out."""
        # On another machine, objects that an interrupted compaction had counted out may be counted twice.
        self._stored = max(0, self._stored - sum(self._array.sizes(self._dead[token].astype(np.int64))))
        return locators

    def discard(self, token: int) -> None:
        """Remove a group of dead objects."""
        self._array.remove(self._dead[token].astype(np.int64))

    # --- the rest ---

    def after_fork(self) -> None:
        """Go on in a forked child: zarr's loop and connections are the parent's."""
        super().after_fork()
        self._place.after_fork()
        self._array.forget()
        self._reader = None

    def usage(self) -> Usage:
        """Return the bytes of all objects, and where they are."""
        root = self._place.root
        filesystem = vm.filesystem(root).kind if root is not None and root.exists() else ""
        return Usage(self._stored, filesystem=filesystem, place=str(self._place))

    def bytes_on_store(self) -> int:
        """Return the bytes of all objects."""
        return self._stored

    def remove(self) -> None:
        """Remove the array, wherever it is, if it is this store's."""
        if self.options["url"] is not None and self._array.opened:
            self._array.remove_all()
        super().remove()

    def close(self) -> None:
        """Close connections."""
        self._reader = None
        self._place.close()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _target(path: Path, options: Mapping[str, Any]) -> Target:
    if options["url"] is not None:
        return parse_url(options["url"])
    packed = path.with_suffix(".zip")
    return Target("zip", str(packed)) if packed.is_file() and not path.is_dir() else Target("local", str(path))


def _require_nothing(target: Target, options: Mapping[str, Any]) -> None:
    """Make sure that a new array can be made at `target`, and that nothing is there yet."""
    if target.kind == "remote":
        choose_client(target, options["client"])  # what is missing is told before zarr is imported
    from memodb.backends.zarr_store import Place

    place = Place(target, options["client"], options["storage_options"], writable=False)
    try:
        found = place.holds_something()
    finally:
        place.close()
    if found:
        raise StoreExistsError(
            f"found {found} at {place} already, and nothing of it was touched: choose another url, or open the "
            "store that it belongs to"
        )
