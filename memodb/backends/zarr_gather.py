"""Reading scattered rows of the array into one buffer.

zarr's own indexing cannot be used: what is missing it returns as the fill value, without a word; and a selection of
whole rows it copies element by element. So chunks are fetched from zarr's store here and decoded by zarr's codecs, in
zarr's loop. Files of this machine need neither: they are read by our own threads, plain bytes straight into the buffer.
"""

from __future__ import annotations

import asyncio
import errno
import os
import struct
import sys
import zlib
from collections.abc import Callable
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

Bytes1D = np.ndarray[Any, np.dtype[np.uint8]]
Bytes2D = np.ndarray[Any, np.dtype[np.uint8]]
_Index = np.ndarray[Any, np.dtype[np.uint64]]
#: What the index of a shard says of a chunk that is not there, and the bytes of its checksum.
_ABSENT, _CHECKSUM = (1 << 64) - 1, 4
#: Indexes of shards that are remembered.
_MOST_INDEXES = 1 << 16
#: Smaller records are copied in the loop itself: to wake a thread takes longer.
_SMALL = 64 << 10
#: Header of what blosc made: versions, flags, element size, bytes before, of a block, and after.
_BLOSC = struct.Struct("<BBBBIII")
#: Of what zstd made (RFC 8878, 3.1.1): its beginning; bytes of the dictionary's number and of the size, by two bits.
_ZSTD, _DICTIONARY, _SIZE = b"\x28\xb5\x2f\xfd", (0, 1, 2, 4), (0, 2, 4, 8)
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
        self._decompress: Callable[[Bytes1D, Bytes1D], None] | None = None
        self._whole = array.per_chunk * array.coding.row_bytes
        self._is_native = _is_native(codecs[0], array.coding.dtype)
        self._files = array.place.root if self._is_native else None
        if len(codecs) == 2 and isinstance(codecs[1], ZstdCodec):
            self._decompress = _from_zstd
        elif len(codecs) == 2 and isinstance(codecs[1], BloscCodec):
            self._decompress = _from_blosc
        elif len(codecs) > 1 or not array.coding.plain:
            self._files = None
        # Bytes of a chunk at most: what cannot be compressed becomes a little longer.
        self._most = self._whole + (self._whole // 64 + 4096 if self._decompress is not None else 0)

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
                self._require_possible(int(rows[members[0]]), key, length)
                part = RangeByteRequest(start, start + length)
            else:
                self._require_possible(int(rows[members[0]]), key, self._array.place.size(key) or 0)
            try:
                found = await self._array.place.store.get(key, self._prototype, part)
            except (OSError, BadZipFile, zlib.error) as error:
                raise self._unreadable(int(rows[members[0]]), key, error) from error
            if found is None:
                raise self._missing(key)
            try:
                if self._decompress is not None and self._is_native:
                    raw = np.frombuffer(found.to_bytes(), np.uint8)
                    decoded = await asyncio.to_thread(self._decoded, raw)
                else:
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
                chunk = self._decoded(raw)
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
        if start + length > size or (self._decompress is None and length != self._whole):
            raise self._undecodable(row, key, f"{length} bytes at {start} of {size}, expected {self._whole}")
        self._require_possible(row, key, length)
        return start, length

    def _require_possible(self, row: int, key: str, length: int) -> None:
        """Make sure that a chunk is no longer than a record can make it, before it is read."""
        if length > self._most:
            raise self._undecodable(row, key, f"{length} bytes, at most {self._most} are possible")

    def _decoded(self, raw: Bytes1D) -> np.ndarray[Any, Any]:
        """Return a chunk from its compressed bytes, whatever size they claim to have.

        Raises
        ------
        ValueError, RuntimeError
            If they are not those of a chunk.
        """
        assert self._decompress is not None
        out = np.empty(self._whole, np.uint8)
        self._decompress(raw, out)
        return out.view(self._array.coding.dtype).reshape(self._spec.shape)

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


def _from_zstd(raw: Bytes1D, out: Bytes1D) -> None:
    # What is shorter than `out` would leave the rest of it as it was, without a word.
    head = raw[:18].tobytes().ljust(18, b"\0")
    alone = head[4] >> 5 & 1
    at, n = 5 + (1 - alone) + _DICTIONARY[head[4] & 3], _SIZE[head[4] >> 6] or alone
    size = int.from_bytes(head[at : at + n], "little") + (256 if n == 2 else 0)
    if head[:4] != _ZSTD or size != len(out):
        raise ValueError(f"its header tells of {size} bytes, expected {len(out)}")
    numcodecs.Zstd().decode(raw, out)


def _from_blosc(raw: Bytes1D, out: Bytes1D) -> None:
    # blosc believes the sizes in its header, and reads and writes beyond its buffers where they are wrong.
    if len(raw) < _BLOSC.size:
        raise ValueError(f"{len(raw)} bytes")
    version, _, _, _, size, block, length = _BLOSC.unpack(raw[: _BLOSC.size].tobytes())
    if version != 2 or (size, length) != (len(out), len(raw)) or not 0 < block <= max(size, 1):
        raise ValueError(f"its header tells of {length} bytes that become {size}, found {len(raw)} for {len(out)}")
    numcodecs.Blosc().decode(raw, out)


def _read_fully(fd: int, out: Bytes1D, offset: int) -> None:
    view = memoryview(out)  # type: ignore[arg-type]
    while len(view):
        n = os.preadv(fd, [view], offset)
        if n == 0:
            raise OSError(errno.EIO, "the file ends too early")
        view, offset = view[n:], offset + n
