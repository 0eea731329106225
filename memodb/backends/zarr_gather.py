"""Reading scattered rows of the array into one buffer.

zarr's own indexing cannot be used: what is missing it returns as the fill value, without a word; and a selection of
whole rows it copies element by element. So chunks are fetched from zarr's store here and decoded by zarr's codecs, all
at once in zarr's loop; and of files that hold plain bytes the rows are read straight into the buffer.
"""

from __future__ import annotations

import asyncio
import errno
import os
import sys
import zlib
from dataclasses import replace
from typing import Any
from zipfile import BadZipFile

import numpy as np
from zarr.abc.store import RangeByteRequest, SuffixByteRequest
from zarr.codecs import BytesCodec, ShardingCodec
from zarr.core.buffer import default_buffer_prototype

from memodb.backends.base import Locators
from memodb.backends.zarr_array import RecordArray
from memodb.backends.zarr_loop import Job
from memodb.backends.zarr_store import MissingObjectError
from memodb.checksum import crc32c
from memodb.errors import CorruptionError, MemoDBError, StoreAccessError
from memodb.threads import CREW

Bytes2D = np.ndarray[Any, np.dtype[np.uint8]]
_Index = np.ndarray[Any, np.dtype[np.uint64]]
#: What the index of a shard says of a chunk that is not there, and the bytes of its checksum.
_ABSENT, _CHECKSUM = (1 << 64) - 1, 4
#: Indexes of shards that are remembered.
_MOST_INDEXES = 1 << 16
#: Smaller records are copied in the loop itself: to wake a thread takes longer.
_SMALL = 64 << 10
#: Errors of a full process, not of what is read.
_HARMLESS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR, errno.EAGAIN)


class Reader:
    """Reads rows of one array that is open.

    Parameters
    ----------
    array
        The array.
    nbytes
        Bytes of a record.
    """

    def __init__(self, array: RecordArray, nbytes: int) -> None:
        metadata = array.metadata
        self._array = array
        self._nbytes = nbytes
        self._prototype = default_buffer_prototype()
        self._pipeline = array.pipeline
        spec = metadata.get_chunk_spec((0,) * len(metadata.shape), array.config, self._prototype)
        codecs = metadata.codecs
        self._per_object = 1
        if isinstance(codecs[0], ShardingCodec):
            self._per_object = array.per_object // array.per_chunk
            self._pipeline, codecs = codecs[0].codec_pipeline, codecs[0].codecs
        self._spec = replace(spec, shape=(array.per_chunk, *spec.shape[1:]))
        # A committed shard is never written again, and its number never comes again: its index stays true.
        self._indexes: dict[int, _Index] = {}
        self._files = array.place.root if array.coding.plain and _is_plain(codecs, array.coding.dtype) else None

    def read(self, rows: Locators, out: Bytes2D) -> None:
        """Read rows into `out`, uint8 [n, nbytes].

        Raises
        ------
        FileNotFoundError
            If the object of a row is not there.
        CorruptionError
            If one cannot be decoded.
        StoreAccessError
            If the store cannot be reached.
        """
        if len(self._indexes) > _MOST_INDEXES:
            self._indexes.clear()
        if self._files is not None:
            numbers = rows.tolist()
            CREW.share(lambda i: self._read_file(numbers[i], out[i]), len(numbers))
            return
        chunks, inverse = np.unique(rows // np.uint64(self._array.per_chunk), return_inverse=True)
        order = np.argsort(inverse, kind="stable")
        members = np.split(order, np.searchsorted(inverse[order], np.arange(1, len(chunks))))
        numbers = chunks.tolist()
        if self._per_object > 1:
            unknown = {number // self._per_object for number in numbers} - self._indexes.keys()
            self._array.place.run([self._index_job(shard) for shard in sorted(unknown)], "read")
        jobs = [self._chunk_job(number, rows, at, out) for number, at in zip(numbers, members, strict=True)]
        self._array.place.run(jobs, "read")

    # --- through zarr's store and codecs ---

    def _index_job(self, shard: int) -> Job:
        async def read() -> None:
            size = 16 * self._per_object + _CHECKSUM
            key = self._array.key(shard)
            found = await self._array.place.store.get(key, self._prototype, SuffixByteRequest(size))
            if found is None:
                raise self._missing(key)
            self._indexes[shard] = self._parsed_index(found.to_bytes(), key)

        return read

    def _chunk_job(self, number: int, rows: Locators, members: Any, out: Bytes2D) -> Job:
        shard, inner = divmod(number, self._per_object)
        key = self._array.key(shard)

        async def read() -> None:
            part = None
            if self._per_object > 1:
                start, length = self._indexes[shard][inner].tolist()
                if start == _ABSENT:
                    raise self._missing(key)
                part = RangeByteRequest(start, start + length)
            try:
                found = await self._array.place.store.get(key, self._prototype, part)
            except (OSError, BadZipFile, zlib.error) as error:
                raise self._unreadable(int(rows[members[0]]), key, error) from error
            if found is None:
                raise self._missing(key)
            try:
                (chunk,) = await self._pipeline.decode([(found, self._spec)])
                decoded = chunk.as_numpy_array()
                if decoded.shape != self._spec.shape:
                    raise ValueError(f"decoded to {list(decoded.shape)}, expected {list(self._spec.shape)}")
            except MemoryError:
                raise
            except Exception as error:
                raise self._undecodable(int(rows[members[0]]), key, error) from error

            def copy() -> None:
                for member in members.tolist():
                    self._array.coding.decode(decoded[int(rows[member]) % self._array.per_chunk], out[member])

            if self._nbytes * len(members) < _SMALL:
                copy()
            else:
                await asyncio.to_thread(copy)

        return read

    # --- straight from files ---

    def _read_file(self, row: int, out: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        number, within = divmod(row, self._array.per_chunk)
        shard, inner = divmod(number, self._per_object)
        key = self._array.key(shard)
        chunk = self._nbytes * self._array.per_chunk
        try:
            fd = os.open(f"{self._files}/{key}", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise self._missing(key) from None
        except OSError as error:
            raise self._unreadable(row, key, error) from error
        try:
            size, start = os.fstat(fd).st_size, 0
            if self._per_object > 1:
                start, length = self._file_index(fd, size, shard, key)[inner].tolist()
                if start == _ABSENT:
                    raise self._missing(key)
                if length != chunk or start + length > size:
                    raise self._undecodable(row, key, f"its index says {length} bytes at {start}, of {size}")
            elif size != chunk:
                raise self._undecodable(row, key, f"{size} bytes, expected {chunk}")
            _read_fully(fd, out, start + within * self._nbytes)
        except (MemoDBError, MissingObjectError):
            raise
        except OSError as error:
            raise self._unreadable(row, key, error) from error
        finally:
            os.close(fd)

    def _file_index(self, fd: int, size: int, shard: int, key: str) -> _Index:
        found = self._indexes.get(shard)
        if found is None:
            wanted = 16 * self._per_object + _CHECKSUM
            found = self._parsed_index(os.pread(fd, wanted, max(size - wanted, 0)), key)
            self._indexes[shard] = found
        return found

    # --- what may be wrong ---

    def _parsed_index(self, raw: bytes, key: str) -> _Index:
        body, checksum = raw[:-_CHECKSUM], raw[-_CHECKSUM:]
        if len(body) != 16 * self._per_object or crc32c(body) != int.from_bytes(checksum, "little"):
            raise CorruptionError(
                f"the index of shard {key} of {self._array.place} is damaged: restore the shard from a copy, or delete "
                "what verify() names"
            )
        return np.frombuffer(body, "<u8").reshape(-1, 2)

    def _missing(self, key: str) -> MissingObjectError:
        return MissingObjectError(f"{key} is not at {self._array.place}, or not all of it")

    def _undecodable(self, row: int, key: str, why: object) -> CorruptionError:
        return CorruptionError(
            f"row {row} of {self._array.place} ({key}) is damaged: {why}; delete the record and put it again, or "
            "restore it from a copy"
        )

    def _unreadable(self, row: int, key: str, error: Exception) -> Exception:
        """Return an error of a store as what it tells: no access, a full process, or else a damaged device."""
        translated = self._array.place.failure("read", error)
        if isinstance(translated, StoreAccessError) or getattr(error, "errno", None) in _HARMLESS:
            return translated
        return self._undecodable(row, key, error)


def _is_plain(codecs: Any, dtype: np.dtype[Any]) -> bool:
    """Tell whether chunks hold the bytes of their elements as they lie in memory."""
    if len(codecs) != 1 or not isinstance(codecs[0], BytesCodec):
        return False
    endian = codecs[0].endian
    return dtype.itemsize == 1 or (endian is not None and endian.value == sys.byteorder)


def _read_fully(fd: int, out: np.ndarray[Any, np.dtype[np.uint8]], offset: int) -> None:
    view = memoryview(out)  # type: ignore[arg-type]
    while len(view):
        n = os.preadv(fd, [view], offset)
        if n == 0:
            raise OSError(errno.EIO, "the file ends too early")
        view, offset = view[n:], offset + n
