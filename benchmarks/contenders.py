"""Who gathers: memodb and its peers, each in the idiom that is quickest for it.

A contender says which file it needs (`store`, filled by `benchmarks.builders` from the plain file of `Records`), opens
it, and turns ids into one contiguous array [n, *shape], or, "list of views" alone, into n arrays. ``open(warm)`` gets
an array of the batch's shape whose pages are all there: those that can gather into given memory gather into it.

Drivers that are not installed leave their contenders out, with a reason; ``pip install -e '.[bench]'`` brings them.
"""

from __future__ import annotations

import importlib.util
import mmap
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

import memodb
from benchmarks.records import Records


class Contender:
    """One way to gather."""

    name: ClassVar[str]
    store: ClassVar[str] = "plain"
    needs: ClassVar[str | None] = None
    #: Delivers one contiguous tensor.
    contiguous: ClassVar[bool] = True
    #: Left out of the largest batches, see `benchmarks.profiles.Profile`.
    slow: ClassVar[bool] = False
    #: Tried on a cold disk only: the same as another, with advice that only matters there.
    cold_only: ClassVar[bool] = False

    def __init__(self, records: Records) -> None:
        self.records = records
        self.path = records.path if self.store == "plain" else records.path.with_name(self.store)

    @classmethod
    def obstacle(cls, nbytes: int) -> str:
        """Return why it cannot take part, "" if it can."""
        if cls.needs is not None and importlib.util.find_spec(cls.needs) is None:
            return f"{cls.needs} is not installed"
        return ""

    def files(self) -> list[Path]:
        """Return the files that hold its records."""
        return [path for path in self.path.rglob("*") if path.is_file()] if self.path.is_dir() else [self.path]

    def open(self, warm: np.ndarray) -> None:
        """Open the file; outside the clock."""
        self.warm = warm
        self.source: Any = self.records.open()

    def gather(self, ids: np.ndarray) -> Any:
        """Gather; on the clock."""
        raise NotImplementedError

    def close(self) -> None:
        """Let go of everything."""
        self.source = self.warm = None


class Floor(Contender):
    name = "floor"

    def gather(self, ids):
        return self.warm  # contiguous and warm already: no gather can be quicker than nothing


class ListOfViews(Contender):
    name = "list of views"
    contiguous = False

    def gather(self, ids):
        return [self.source[i] for i in ids.tolist()]


class NumpyIndexed(Contender):
    name = "np.memmap[ids]"

    def gather(self, ids):
        return self.source[ids]


class NumpyTake(Contender):
    name = "np.take(out=warm)"

    def gather(self, ids):
        # mode="raise" would gather into a buffer of its own first.
        return np.take(self.source, ids, 0, out=self.warm, mode="clip")


class _Advised(Contender):
    cold_only = True

    def open(self, warm):
        super().open(warm)
        self.source._mmap.madvise(mmap.MADV_RANDOM)


class NumpyIndexedRandom(_Advised, NumpyIndexed):
    name = "np.memmap[ids], MADV_RANDOM"


class NumpyTakeRandom(_Advised, NumpyTake):
    name = "np.take(out=warm), MADV_RANDOM"


class _Torch(Contender):
    needs = "torch"

    def open(self, warm):
        import torch

        self.torch = torch
        self.warm = torch.from_numpy(warm)
        # "r+": torch warns of memory that it may not write. Nothing writes.
        self.source = torch.from_numpy(self.records.open("r+"))


class TorchSelect(_Torch):
    name = "torch.index_select"

    def gather(self, ids):
        return self.torch.index_select(self.source, 0, self.torch.from_numpy(ids)).numpy()


class TorchSelectWarm(_Torch):
    name = "torch.index_select(out=warm)"

    def gather(self, ids):
        return self.torch.index_select(self.source, 0, self.torch.from_numpy(ids), out=self.warm).numpy()


class TorchStack(_Torch):
    name = "torch.stack"

    def gather(self, ids):
        return self.torch.stack([self.source[i] for i in ids.tolist()]).numpy()


class H5py(Contender):
    name = "h5py read_direct(out=warm)"
    store, needs, slow = "h5", "h5py", True

    def open(self, warm):
        import h5py

        self.warm = warm
        self.file = h5py.File(self.path, "r")
        self.source = self.file["records"]

    def gather(self, ids):
        # Its own fancy indexing wants ids sorted and unique, and is slower.
        for to, i in enumerate(ids.tolist()):
            self.source.read_direct(self.warm, np.s_[i], np.s_[to])
        return self.warm

    def close(self):
        super().close()
        self.file.close()


class Zarr(Contender):
    name = "zarr oindex[ids]"
    store, needs, slow = "zarr", "zarr", True

    def open(self, warm):
        import zarr

        self.source = zarr.open_array(self.path, mode="r")

    def gather(self, ids):
        return self.source.oindex[ids]

    def close(self):
        self.source = None


class Tensorstore(Contender):
    name = "tensorstore[ids] (zarr3)"
    store, needs, slow = "zarr", "tensorstore", True

    def open(self, warm):
        import tensorstore

        kvstore = {"driver": "file", "path": f"{self.path}/"}
        self.source = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}, open=True, read=True).result()

    def gather(self, ids):
        return self.source[ids].read().result()

    def close(self):
        self.source = None


class Lmdb(Contender):
    name = "LMDB get, copied (out=warm)"
    store, needs, slow = "lmdb", "lmdb", True

    def open(self, warm):
        import lmdb

        self.warm = warm
        self.environment = lmdb.open(str(self.path), readonly=True, lock=False, max_dbs=0)
        self.rows = warm.reshape(len(warm), -1)

    def gather(self, ids):
        with self.environment.begin(buffers=True) as transaction:
            for row, i in zip(self.rows, ids.tolist(), strict=True):
                row[:] = np.frombuffer(transaction.get(b"%08d" % i), row.dtype)
        return self.warm

    def close(self):
        self.warm = self.rows = None
        self.environment.close()


class Safetensors(Contender):
    name = "safetensors, torch.stack"
    store, needs, slow = "safetensors", "safetensors", True

    @classmethod
    def obstacle(cls, nbytes):
        return super().obstacle(nbytes) or _Torch.obstacle(nbytes)

    def open(self, warm):
        import safetensors
        import torch

        self.stack = torch.stack
        self.source = safetensors.safe_open(self.path, framework="pt")
        self.source.__enter__()

    def gather(self, ids):
        return self.stack([self.source.get_tensor(str(i)) for i in ids.tolist()]).numpy()

    def close(self):
        self.source.__exit__(None, None, None)
        self.source = None


class Memodb(Contender):
    name = "memodb"
    store = "memodb"
    strategy: ClassVar[str] = "auto"

    def open(self, warm):
        self.source = memodb.MemoDB.open(self.path)

    def gather(self, ids):
        return self.source.multiget_mapped(ids, strategy=self.strategy)

    def files(self):
        return [path for path in super().files() if "values" in path.parts]

    def close(self):
        self.source.close()


class MemodbMap(Memodb):
    name = 'memodb, "map"'
    strategy = "map"

    @classmethod
    def obstacle(cls, nbytes):
        return f"records of {nbytes} bytes are no multiple of a page" if nbytes % mmap.PAGESIZE else ""


class MemodbCopy(Memodb):
    name = 'memodb, "copy"'
    strategy = "copy"


CONTENDERS: tuple[type[Contender], ...] = (
    *(Floor, Memodb, MemodbMap, MemodbCopy, ListOfViews),
    *(NumpyIndexed, NumpyIndexedRandom, NumpyTake, NumpyTakeRandom, TorchSelect, TorchSelectWarm, TorchStack),
    *(H5py, Zarr, Tensorstore, Lmdb, Safetensors),
)
