"""The zarr array of a store: its metadata, its objects, and writing rows into it.

An *object* is what is written at once: a chunk, or a shard of several chunks. Objects lie flat side by side, as
``c.17.0.0.0``: with zarr's usual ``c/17/0/0/0`` each record would take as many directories as it has dimensions.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import zarr
from zarr.abc.codec import BytesBytesCodec
from zarr.codecs import BloscCodec, BytesCodec, ZstdCodec
from zarr.storage import MemoryStore, StorePath

from memodb.backends.base import Values
from memodb.backends.zarr_codecs import Coding
from memodb.backends.zarr_loop import Job
from memodb.backends.zarr_store import METADATA, Place
from memodb.errors import CorruptionError, StoreExistsError
from memodb.record import RecordSpec

Objects = np.ndarray[Any, np.dtype[np.int64]]
#: The array's attribute that tells which store it belongs to.
_OWNER = "memodb"
#: Half-written files that zarr's local store leaves when it is killed.
_PARTIAL = ".partial"
#: Bytes of the metadata at most, the codecs that it may name, and what of it must be as it was written.
_MOST_METADATA = 1 << 20
_CODECS = {"bytes", "zstd", "blosc", "sharding_indexed", "crc32c"}
_NUMBER = re.compile("[0-9]{1,18}")


class RecordArray:
    """The array, as one store uses it.

    Parameters
    ----------
    place
        Where it lies.
    spec, options
        As for `ValueBackend`.
    coding
        What records look like in it.

    Attributes
    ----------
    per_object, per_chunk
        Records in an object, and in the smallest part of it that can be read.
    """

    def __init__(self, place: Place, spec: RecordSpec, options: Mapping[str, Any], coding: Coding) -> None:
        self.place = place
        self.coding = coding
        self.per_chunk: int = options["chunk_records"]
        self.shards: int | None = options["shard_records"]
        self.per_object = self.shards or self.per_chunk
        self._shape = spec.shape
        self._options = options
        self._token = options["token"]
        self._suffix = ".0" * len(spec.shape)
        #: None as long as nothing was ever put.
        self._array: Any = None

    # --- metadata ---

    @property
    def opened(self) -> bool:
        """Whether the metadata was read, or written."""
        return self._array is not None

    @property
    def length(self) -> int:
        """Rows of the array, 0 if it was not made yet."""
        return 0 if self._array is None else int(self._array.shape[0])

    @property
    def metadata(self) -> Any:
        """What zarr knows of the array."""
        return self._array.metadata

    @property
    def config(self) -> Any:
        """How zarr reads and writes it."""
        return self._array.config

    @property
    def pipeline(self) -> Any:
        """Its codecs."""
        return self._array.codec_pipeline

    def open(self, *, repair: bool) -> bool:
        """Read the metadata; return False if there is none.

        Parameters
        ----------
        repair
            Write it anew where it is damaged, as a power cut may leave it on some file systems.

        Raises
        ------
        CorruptionError
            If it is damaged, or does not fit the records.
        StoreExistsError
            If it is that of another store.
        StoreAccessError
            If it cannot be read.
        """
        raw = self.place.get(METADATA, most=_MOST_METADATA)
        if raw is None:
            self._array = None
            return False
        try:
            document = json.loads(raw)
        except (ValueError, RecursionError) as error:
            if not repair:
                raise CorruptionError(
                    f"{METADATA} of {self.place} is damaged ({error}); opening the store once with mode='r+' writes it "
                    "anew"
                ) from error
            self.make(0)
            return True
        attributes = document.get("attributes") if isinstance(document, dict) else None
        owner = attributes.get(_OWNER) if isinstance(attributes, dict) else None
        if not isinstance(owner, dict) or owner.get("store") != self._token:
            raise StoreExistsError(
                f"what lies at {self.place} belongs to another store, or to somebody else, and was put there; move it "
                "away, or create this store anew with another url"
            )
        self._check(document)
        return True

    def exists(self) -> bool:
        """Return whether the metadata is there still."""
        return self.place.get(METADATA, most=_MOST_METADATA) is not None

    def make(self, rows: int) -> None:
        """Write the metadata; chunks are left as they are."""
        document = self._document(rows)
        self.place.put(METADATA, document)
        self._array = self._parsed(json.loads(document))

    def _document(self, rows: int) -> bytes:
        """Return the metadata of the array with so many rows, as zarr writes it."""
        memory: dict[str, Any] = {}
        # Made aside: zarr looks first whether an array is there, and removes its chunks or refuses.
        zarr.create_array(
            MemoryStore(memory),
            shape=(rows, *self._shape),
            chunks=(self.per_chunk, *self._shape),
            shards=None if self.shards is None else (self.shards, *self._shape),
            dtype=self.coding.dtype,
            serializer=BytesCodec(),
            filters=None,
            compressors=_compressor(self._options, self.coding.dtype),
            fill_value=0,
            chunk_key_encoding={"name": "default", "separator": "."},
            attributes={_OWNER: {"store": self._token}, **self.coding.attributes},
        )
        return bytes(memory[METADATA].to_bytes())

    def _parsed(self, document: Any) -> Any:
        array = zarr.Array.from_dict(StorePath(self.place.store), document)
        # Otherwise zarr leaves chunks out that equal the fill value, and to it -0.0 equals 0.0.
        return array.async_array.with_config({"write_empty_chunks": True})

    def _check(self, document: Any) -> None:
        """Open the array that a document tells of, if it is the one that `make` writes, of any length."""
        try:
            # First: a codec is code, and parsing a document loads what it names.
            if not _codec_names(document["codecs"]) <= _CODECS:
                raise ValueError(f"codecs {', '.join(sorted(_codec_names(document['codecs'])))[:200]}")
            array, expected = self._parsed(document), self._parsed(json.loads(self._document(0)))
            found, wanted = _essence(array.metadata), _essence(expected.metadata)
        except MemoryError:
            raise
        except Exception as error:  # zarr's, of whatever kind
            raise CorruptionError(
                f"{METADATA} of {self.place} cannot be used ({error}): restore it from a copy"
            ) from error
        different = [name for name in wanted if found[name] != wanted[name]]
        if different:
            name = different[0]
            raise CorruptionError(
                f"{METADATA} of {self.place} tells of {name} {str(found[name])[:300]}, expected "
                f"{str(wanted[name])[:300]}: restore it from a copy"
            )
        self._array = array

    def resize(self, rows: int) -> None:
        """Let the array have `rows` rows; chunks are left as they are."""

        async def resize() -> None:
            await self._array.resize((rows, *self._shape), delete_outside_chunks=False)

        self.place.run([resize], "written")

    def forget(self) -> None:
        """Know nothing of the array, as before `open`: it is tied to the store that it was opened through."""
        self._array = None

    # --- objects ---

    def key(self, number: int) -> str:
        """Return the name of object `number`."""
        return f"c.{number}{self._suffix}"

    def write(self, first: int, values: Values) -> int:
        """Write rows from `first` on, the beginning of an object; return the bytes that they take on the store.

        Raises
        ------
        StoreFullError, StoreAccessError
            If they cannot be written; objects that no commit knows may be left then.
        """
        before = self.place.store.written
        if self.place.target.kind == "memory":
            values = values.copy()  # zarr's memory store keeps what it is given, which is the caller's

        def job(start: int) -> Job:
            part = values[start : start + self.per_object]

            async def write() -> None:
                await self._array.setitem((slice(first + start, first + start + len(part)),), part)

            return write

        self.place.run([job(start) for start in range(0, len(values), self.per_object)], "written")
        return self.place.store.written - before

    def objects(self) -> Objects:
        """Return the numbers of all objects, ascending."""
        names: list[str] = []

        async def collect() -> None:
            names.extend([name async for name in self.place.store.list_dir("")])

        self.place.run([collect], "listed")
        parts = (name.split(".") for name in names if name.startswith("c.") and not name.endswith(_PARTIAL))
        return np.unique(np.array([int(part[1]) for part in parts if _NUMBER.fullmatch(part[1])], np.int64))

    def sizes(self, numbers: Objects) -> list[int]:
        """Return the bytes of objects; 0 for one that is not there."""
        found = [0] * len(numbers)

        def job(i: int, key: str) -> Job:
            async def measure() -> None:
                with contextlib.suppress(FileNotFoundError):
                    found[i] = await self.place.store.getsize(key)

            return measure

        self.place.run([job(i, self.key(number)) for i, number in enumerate(numbers.tolist())], "read")
        return found

    def remove(self, numbers: Objects) -> None:
        """Remove objects; those that are not there are passed over."""

        def job(key: str) -> Job:
            async def delete() -> None:
                await self.place.store.delete(key)

            return delete

        self.place.run([job(self.key(number)) for number in numbers.tolist()], "written")

    def remove_partial(self) -> None:
        """Remove the half-written files that a killed process left on a local file system."""
        if self.place.root is not None:
            for file in self.place.root.glob(f"*{_PARTIAL}"):
                file.unlink(missing_ok=True)

    def remove_all(self) -> None:
        """Remove the array."""
        self.remove(self.objects())

        async def delete() -> None:
            await self.place.store.delete(METADATA)

        self.place.run([delete], "written")


def _compressor(options: Mapping[str, Any], dtype: np.dtype[Any]) -> BytesBytesCodec | None:
    if options["codec"] == "zstd":
        return ZstdCodec(level=options["level"], checksum=True)  # so that a read finds changed bytes by itself
    if options["codec"] == "blosc":
        return BloscCodec(cname="lz4", clevel=options["level"], shuffle="shuffle", typesize=dtype.itemsize)
    return None


def _codec_names(codecs: Any) -> set[str]:
    names = set()
    for codec in codecs:
        names.add(str(codec["name"]))
        inside = codec.get("configuration") or {}
        names |= _codec_names(inside.get("codecs", ())) | _codec_names(inside.get("index_codecs", ()))
    return names


def _essence(metadata: Any) -> dict[str, Any]:
    """Return what of the metadata must be as this store writes it: all but length, attributes and byte order."""
    plain = metadata.to_dict()
    codecs = [dict(codec.to_dict()) for codec in metadata.codecs]
    inside = codecs[0].get("configuration", {}) if codecs[0]["name"] == "sharding_indexed" else {}
    for codec in (*codecs, *inside.get("codecs", ())):
        if codec["name"] == "bytes":  # of the machine that made it
            codec.pop("configuration", None)
    return {
        "shape": list(metadata.shape[1:]),
        "data_type": metadata.data_type.to_native_dtype(),
        "chunk_grid": plain["chunk_grid"],
        "chunk_key_encoding": plain["chunk_key_encoding"],
        "fill_value": plain["fill_value"],
        "storage_transformers": list(plain["storage_transformers"]),
        "codecs": codecs,
    }
