"""`MappedBatch`: what a gather hands out, and how numpy, torch and every DLPack consumer look at it."""

from __future__ import annotations

import weakref
from types import TracebackType
from typing import Any

import numpy as np

from memodb import interop, vm
from memodb.errors import ClosedError
from memodb.record import RecordSpec

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


class MappedBatch:
    """n records as one contiguous tensor [n, *shape], without a copy where their pages could be mapped.

    Every view of the batch (numpy array, torch tensor, DLPack capsule, and whatever is made of them) keeps its memory
    valid, whether or not the database is closed or this object is gone. Pages are private: writing through a view
    changes neither the store nor other batches.

    Parameters
    ----------
    root
        uint8 [bytes of the batch], writable; the death of its base gives the memory back.
    spec
        What one record is.
    ids
        int64 [n], in the order of the records.
    zero_copy
        Whether pages were mapped.
    """

    def __init__(
        self, root: Bytes, spec: RecordSpec, ids: np.ndarray[Any, np.dtype[np.int64]], *, zero_copy: bool
    ) -> None:
        self._root: Bytes | None = root
        self._spec = spec
        self._ids = ids.copy()
        self._ids.flags.writeable = False
        self._zero_copy = zero_copy

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the batch, [n, *record shape]."""
        return self._spec.batch_shape(len(self._ids))

    @property
    def dtype(self) -> np.dtype[Any]:
        """The numpy dtype (of ml_dtypes for bfloat16 and float8)."""
        return self._spec.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the batch."""
        return len(self._ids) * self._spec.nbytes

    @property
    def ids(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The ids, int64 [n], read-only."""
        return self._ids

    @property
    def zero_copy(self) -> bool:
        """True where the records' own pages were mapped, False where they were copied."""
        return self._zero_copy

    @property
    def released(self) -> bool:
        """Whether `release` was called."""
        return self._root is None

    def __len__(self) -> int:
        return len(self._ids)

    def __repr__(self) -> str:
        how = "released" if self.released else "mapped" if self._zero_copy else "copied"
        return f"<MappedBatch of {len(self)} records {self._spec}, {self.nbytes} bytes, {how}>"

    def numpy(self, writable: bool = False) -> np.ndarray[Any, Any]:
        """Return the batch as a numpy array [n, *shape], C-contiguous.

        Parameters
        ----------
        writable
            Let the array be written; what is written stays in this batch.

        Raises
        ------
        ClosedError
            If the batch was released.
        """
        root = self._root
        if root is None:
            raise ClosedError("this batch was released; gather it again with multiget_mapped()")
        if not writable and root.size:
            # Another object on the same memory, so that numpy cannot be talked into making the view writable.
            root = vm.Span(root.__array_interface__["data"][0], root.size, writable=False, keep=root.base).array()
        return root.view(self._spec.dtype).reshape(self.shape)

    def torch(self) -> Any:
        """Return the batch as a torch tensor of the matching dtype; in-place operations stay private to the batch.

        Raises
        ------
        InvalidRecordError
            If torch has no such dtype.
        ImportError
            If torch is not installed.
        """
        return interop.to_torch(self.numpy(writable=True))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        view = self.numpy()
        if dtype is not None and np.dtype(dtype) != view.dtype:
            if copy is False:
                raise ValueError(f"a batch of {view.dtype} cannot become {np.dtype(dtype)} without a copy")
            return view.astype(dtype)
        return view.copy() if copy else view

    def __dlpack__(
        self,
        *,
        stream: Any = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        """Return a DLPack capsule that keeps the batch's memory alive (bfloat16 and float8 included)."""
        return interop.to_dlpack(
            self.numpy(writable=True), stream=stream, max_version=max_version, dl_device=dl_device, copy=copy
        )

    def __reduce__(self) -> Any:
        raise TypeError(
            "a batch cannot be pickled, it stands on memory of this process; pickle the database and batch.ids, and "
            "gather again over there"
        )

    def __dlpack_device__(self) -> tuple[int, int]:
        """Return (kDLCPU, 0)."""
        return (1, 0)

    def release(self) -> None:
        """Give the memory back now instead of when the last reference dies. Releasing twice is fine.

        Raises
        ------
        BufferError
            If a view of the batch still lives; the batch stays as it was.
        """
        if self._root is None:
            return
        if self._root.base is None:  # of no record at all
            self._root = None
            return
        alive = weakref.ref(self._root.base)
        self._root = None
        holder = alive()
        if holder is not None:
            self._root = np.asarray(holder)
            raise BufferError(
                f"{self!r} cannot be released: a numpy array, torch tensor or DLPack capsule made from it is still "
                "alive; delete those first, or let the last one free the memory by itself"
            )

    def __enter__(self) -> MappedBatch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Views may outlive the block; then the last of them frees the memory.
        self._root = None
