"""Reading scattered rows of the array into one buffer.

zarr's own indexing cannot be used: what is missing it returns as the fill value, without a word; and a selection of
whole rows it copies element by element. So chunks are fetched from zarr's store here and decoded by zarr's codecs, in
zarr's loop. Files of this machine need neither: they are read by our own threads, plain bytes straight into the buffer.
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

import numcodecs  # type: ignore[import-untyped]
import numpy as np
from zarr.abc.store import RangeByteRequest, SuffixByteRequest
from zarr.codecs import BloscCodec, BytesCodec, ShardingCodec, ZstdCodec
from zarr.core.buffer import default_buffer_prototype

from memodb.backends.base import Locators
from memodb.backends.zarr_array import RecordArray
from memodb.backends.zarr_loop import Job
from memodb.backends.zarr_store import MissingObjectError
from memodb.checksum import crc32c
from memodb.errors import CorruptionError, MemoDBError, StoreAccessError, UnsafePathError
from memodb.safe import open_no_wait
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
        self._sharded = isinstance(codecs[0], ShardingCodec)
        if self._sharded:
            self._per_object = array.per_object // array.per_chunk
            self._pipeline, codecs = codecs[0].codec_pipeline, codecs[0].codecs
        self._spec = replace(spec, shape=(array.per_chunk, *spec.shape[1:]))
        # A committed shard is never written again, and its number never comes again: its index stays true.
        self._indexes: dict[int, _Index] = {}
        self._decompress = None
        self._files = array.place.root if _is_native(codecs[0], array.coding.dtype) else None
        if len(codecs) == 2 and isinstance(codecs[1], ZstdCodec):
            self._decompress = numcodecs.Zstd().decode
        elif len(codecs) == 2 and isinstance(codecs[1], BloscCodec):
            self._decompress = numcodecs.Blosc().decode
        elif len(codecs) > 1 or not array.coding.plain:
            self._files = None

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
        chunks, inverse = np.unique(rows // np.uint64(self._array.per_chunk), return_inverse=True)
        order = np.argsort(inverse, kind="stable")
        members = np.split(order, np.searchsorted(inverse[order], np.arange(1, len(chunks))))
        numbers = chunks.tolist()
        if self._files is not None:
            self._read_files(numbers, members, rows, out)
            return
        if self._sharded:
            unknown = {number // self._per_object for number in numbers} - self._indexes.keys()
            self._array.place.run([self._index_job(shard) for shard in sorted(unknown)], "read")
        # zarr's loop and its threads hold what they ran for a while. A batch is released by nobody looking at it any
        # more, so they reach it through this list only.
        target = [out]
        try:
            jobs = [self._chunk_job(number, rows, at, target) for number, at in zip(numbers, members, strict=True)]
            self._array.place.run(jobs, "read")
        finally:
            target.clear()

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

    def _chunk_job(self, number: int, rows: Locators, members: Any, target: list[Bytes2D]) -> Job:
        shard, inner = divmod(number, self._per_object)
        key = self._array.key(shard)

        async def read() -> None:
            part = None
            if self._sharded:
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

            if self._nbytes * len(members) < _SMALL:
                self._copy(decoded, members.tolist(), rows, target[0])
            else:
                await asyncio.to_thread(lambda: self._copy(decoded, members.tolist(), rows, target[0]))

        return read

    def _copy(self, chunk: Any, members: list[int], rows: Locators, out: Bytes2D) -> None:
        for member in members:
            self._array.coding.decode(chunk[int(rows[member]) % self._array.per_chunk], out[member])

    # --- straight from files ---

    def _read_files(self, chunks: list[int], members: list[Any], rows: Locators, out: Bytes2D) -> None:
        guard = self._array.place.guard

        def read(i: int) -> None:
            shard, inner = divmod(chunks[i], self._per_object)
            key, mine = self._array.key(shard), members[i].tolist()
            row = int(rows[mine[0]])
            try:
                fd = open_no_wait(f"{self._files}/{key}", os.O_RDONLY)
            except FileNotFoundError:
                raise self._missing(key) from None
            except OSError as error:
                raise self._unreadable(row, key, error) from error
            try:
                stat = os.fstat(fd)
                guard.check(f"{self._files}/{key}", stat)
                start, length = self._file_part(fd, stat.st_size, shard, inner, key, row)
                if self._decompress is None:
                    for member in mine:
                        within = int(rows[member]) % self._array.per_chunk
                        _read_fully(fd, out[member], start + within * self._nbytes)
                    return
                raw = np.empty(length, np.uint8)
                _read_fully(fd, raw, start)
            except (MemoDBError, MissingObjectError):
                raise
            except OSError as error:
                raise self._unreadable(row, key, error) from error
            finally:
                os.close(fd)
            try:
                chunk = np.frombuffer(self._decompress(raw), self._array.coding.dtype).reshape(self._spec.shape)
            except (ValueError, RuntimeError) as error:
                raise self._undecodable(row, key, error) from error
            self._copy(chunk, mine, rows, out)

        CREW.share(read, len(chunks))

    def _file_part(self, fd: int, size: int, shard: int, inner: int, key: str, row: int) -> tuple[int, int]:
        """Return where a chunk begins in the file of its object, and how long it is."""
        start, length = 0, size
        if self._sharded:
            start, length = self._file_index(fd, size, shard, key)[inner].tolist()
            if start == _ABSENT:
                raise self._missing(key)
        whole = self._nbytes * self._array.per_chunk
        if start + length > size or (self._decompress is None and length != whole):
            raise self._undecodable(row, key, f"{length} bytes at {start} of {size}, expected {whole}")
        return start, length

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
        if isinstance(translated, (StoreAccessError, UnsafePathError)) or getattr(error, "errno", None) in _HARMLESS:
            return translated
        return self._undecodable(row, key, error)


def _is_native(codec: Any, dtype: np.dtype[Any]) -> bool:
    """Tell whether elements lie in chunks as they lie in memory."""
    if not isinstance(codec, BytesCodec):
        return False
    return dtype.itemsize == 1 or (codec.endian is not None and codec.endian.value == sys.byteorder)


def _read_fully(fd: int, out: np.ndarray[Any, np.dtype[np.uint8]], offset: int) -> None:
    view = memoryview(out)  # type: ignore[arg-type]
    while len(view):
        n = os.preadv(fd, [view], offset)
        if n == 0:
            raise OSError(errno.EIO, "the file ends too early")
        view, offset = view[n:], offset + n
