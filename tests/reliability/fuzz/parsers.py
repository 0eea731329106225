"""Coverage-guided fuzzing (atheris) of everything that parses what lies on a disk; run by test_fuzz.py.

    python parsers.py FOLDER [libFuzzer's options ...]

The first byte of an input says which parser gets the rest, with a right checksum where there is one. Only errors of
memodb's may come out; libFuzzer watches memory and time. FOLDER gets the stores that seeds are taken from.
"""

from __future__ import annotations

import os
import struct
import sys
from contextlib import contextmanager
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["memodb"]):
    import memodb
    from memodb.backends import registry
    from memodb.backends.lmdb import LmdbBackend
    from memodb.backends.zarr_gather import Reader
    from memodb.catalog import Catalog, journal
    from memodb.catalog.rows import _sum
    from memodb.catalog.tables import BACKEND, seal, unseal
    from memodb.checksum import crc32c
    from memodb.gather.costs import Costs, load_costs, save_costs
    from memodb.index.faiss import FaissIndex
    from memodb.lmdb_guard import PageGuard
    from memodb.lock import _locked
    from memodb.record import RecordSpec

import numpy as np
from damage import KEY_DIM, SHAPE, STORES, build

FOLDER = Path(sys.argv[1])


class Table:
    """A read transaction on a dict."""

    def __init__(self, values: dict[bytes, bytes]) -> None:
        self._values = values

    def id(self) -> int:
        return 7

    def get(self, key, default=None):
        return self._values.get(bytes(key), default)

    def cursor(self):
        values = self._values

        class Cursor:
            def set_range(self, first):
                self._keys = [key for key in sorted(values) if key >= first]
                return bool(self._keys)

            def __iter__(self):
                return iter((key, memoryview(values[key])) for key in self._keys)

        return Cursor()


def kept(store: Path) -> dict[bytes, bytes]:
    catalog = Catalog(store / "catalog")
    with catalog._env.read() as txn:
        cursor = txn.cursor()
        cursor.first() if hasattr(cursor, "first") else None
        found = {bytes(key): bytes(value) for key, value in cursor}
    catalog.close()
    return found


STORE = {name: build(FOLDER / name, **STORES[name]) for name in ("arena", "files", "lmdb", "zarr", "zarr-blosc")}
VALUES = kept(STORE["arena"])
KEYS = sorted(VALUES)
CATALOG = Catalog(STORE["arena"] / "catalog")
REAL = CATALOG._env
TABLE = Table(VALUES)


class Environment:
    @contextmanager
    def read(self):
        yield TABLE

    def last_transaction(self) -> int:
        return 7

    def release(self) -> None:
        pass


CATALOG._env = Environment()


def with_checksum(key: bytes, data: bytes) -> bytes:
    if key[:1] in b"mcn":
        return seal(key, data)
    if key[:1] == b"b" and len(data) >= 12:
        return data[:8] + struct.pack("<I", _sum(key, struct.unpack("<Q", data[:8])[0], data[12:])) + data[12:]
    if key[:1] == b"j" and len(data) >= journal._BODY:
        kind, count, mark, _ = journal._HEAD.unpack_from(data)
        head = journal._HEAD.pack(kind, count, mark, crc32c(data[journal._BODY :]))
        return head + struct.pack("<I", crc32c(key + head)) + data[journal._BODY :]
    return data


def catalog(data: bytes) -> None:
    """Put a value in the place of one of the catalog's, and read everything."""
    if not data:
        return
    key = KEYS[data[0] % len(KEYS)]
    TABLE._values = {**VALUES, key: with_checksum(key, data[1:]) if data[0] < 192 else data[1:]}
    CATALOG._rows.clear()
    ids = np.arange(14)
    for read in (
        CATALOG._read_settings,
        CATALOG.counters,
        CATALOG.count,
        CATALOG.live,
        CATALOG.namespaces,
        CATALOG.backend_state,
        lambda: CATALOG.journal(0, 0),
        lambda: CATALOG.journal(1, 0, (2, 5)),
        lambda: CATALOG.mark(0, 1),
        lambda: CATALOG.added(0),
        lambda: CATALOG.names_of(CATALOG.rows(ids)["namespace"]),
        lambda: CATALOG.keys(ids[3:6], CATALOG.rows(ids[3:6])),
        lambda: CATALOG.nameless(CATALOG.rows(ids)),
    ):
        try:
            read()
        except memodb.MemoDBError:
            continue


def backend(name: str):
    settings = Catalog(STORE[name] / "catalog").settings
    spec = RecordSpec.of(settings["shape"], settings["dtype"])
    made = registry.load(settings["backend"])(STORE[name] / "values", spec, settings["options"], writable=False)
    made.refresh(unseal(BACKEND, kept(STORE[name])[BACKEND], STORE[name]))
    return made


BACKENDS = {name: backend(name) for name in STORE}


def state(data: bytes) -> None:
    made = BACKENDS[sorted(BACKENDS)[data[0] % len(BACKENDS)]] if data else BACKENDS["arena"]
    made._note(data[1:]) if isinstance(made, LmdbBackend) else made.refresh(data[1:])


ARRAY = BACKENDS["zarr"]._array
READERS = [Reader(BACKENDS[name]._array, 4 * SHAPE[0]) for name in ("zarr", "zarr-blosc")]


def zarr_metadata(data: bytes) -> None:
    ARRAY.place.get = lambda key, most: data
    ARRAY.open(repair=False)


def chunk(data: bytes) -> None:
    reader = READERS[data[0] & 1] if data else READERS[0]
    try:
        reader._decoded(np.frombuffer(data[1:], np.uint8))
    except (ValueError, RuntimeError):  # who calls it says which row that is
        return


FILE = FOLDER / "calibration.json"


def calibration(data: bytes) -> None:
    FILE.write_bytes(data)
    load_costs(FILE)


def index(data: bytes) -> None:
    try:
        FaissIndex.deserialize(data, KEY_DIM, "HNSW8").search(np.zeros((1, KEY_DIM), np.float32), 3)
    except ValueError:  # who calls it says which file that is
        return


def lock(data: bytes) -> None:
    _locked(FOLDER, data[:32])


PAGES = (STORE["arena"] / "catalog" / "data.mdb").read_bytes()
MEMORY = os.memfd_create("pages")


def pages(data: bytes) -> None:
    """Write a part of the catalog's pages anew."""
    if len(data) < 4:
        return
    at = int.from_bytes(data[:3], "little") % len(PAGES)
    os.pwrite(MEMORY, PAGES, 0)
    os.ftruncate(MEMORY, len(PAGES))
    os.pwrite(MEMORY, data[3:][: len(PAGES) - at], at)
    guard = PageGuard(os.dup(MEMORY), "the catalog")
    try:
        for meta in guard.metas():
            guard.check_path(meta, b"mcounters")
            guard.check_all(meta, writing=True)
    finally:
        guard.close()


PARSERS = [catalog, state, zarr_metadata, chunk, calibration, index, lock, pages]


def seeds(folder: Path) -> None:
    """Write inputs that are sound."""
    folder.mkdir(exist_ok=True)
    found = [(0, bytes([i]) + VALUES[key][4 if key[:1] in b"mcn" else 0 :]) for i, key in enumerate(KEYS)]
    for i, name in enumerate(sorted(BACKENDS)):
        found.append((1, bytes([i]) + unseal(BACKEND, kept(STORE[name])[BACKEND], STORE[name])))
    found.append((2, (STORE["zarr"] / "values" / "zarr.json").read_bytes()))
    found += [
        (3, bytes([i]) + next((STORE[n] / "values").glob("c.0.*")).read_bytes())
        for i, n in enumerate(("zarr", "zarr-blosc"))
    ]
    save_costs(Costs(), FILE)
    found.append((4, FILE.read_bytes()))
    made = FaissIndex(KEY_DIM, "HNSW8")
    made.add(np.arange(20), np.random.default_rng(0).standard_normal((20, KEY_DIM)).astype(np.float32))
    found += [(5, made.serialize()), (6, b"1234\n")]
    found += [(7, at.to_bytes(3, "little") + PAGES[at : at + 64]) for at in range(0, len(PAGES), 4096)]
    for number, (parser, data) in enumerate(found):
        (folder / f"seed{number:03d}").write_bytes(bytes([parser]) + data)


def one(data: bytes) -> None:
    if data:
        try:
            PARSERS[data[0] % len(PARSERS)](data[1:])
        except memodb.MemoDBError:
            return


if __name__ == "__main__":
    seeds(FOLDER / "corpus")
    atheris.Setup([sys.argv[0], os.fspath(FOLDER / "corpus"), *sys.argv[2:]], one)
    atheris.Fuzz()
