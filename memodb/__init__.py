"""memodb: a memo database for large tensors. It trades big memory for computation.

``MemoDB.open(path).multiget_mapped(ids)`` fetches many scattered records as one contiguous tensor, without a copy where
pages can be mapped.
"""

from importlib.metadata import PackageNotFoundError as _PackageNotFoundError
from importlib.metadata import version as _version

from memodb.backends.registry import BackendInfo, available_backends
from memodb.calibration import calibrate
from memodb.database import MemoDB, SearchResult
from memodb.errors import (
    BackendNotFoundError,
    BackendUnavailableError,
    ClosedError,
    CorruptionError,
    DeviceError,
    FormatVersionError,
    InvalidIdError,
    InvalidKeyError,
    InvalidOptionError,
    InvalidRecordError,
    MappingUnsupportedError,
    MemoDBError,
    ReadOnlyError,
    RecordNotFoundError,
    StoreAccessError,
    StoreExistsError,
    StoreFullError,
    StoreNotFoundError,
    UnsafePathError,
    WriterLockedError,
)
from memodb.gather.batch import MappedBatch
from memodb.gather.gather import gather_limits
from memodb.problem import Problem
from memodb.record import RecordSpec
from memodb.transfer import copy

try:
    __version__ = _version("memodb")
except _PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"

__all__ = [
    "BackendInfo",
    "BackendNotFoundError",
    "BackendUnavailableError",
    "ClosedError",
    "CorruptionError",
    "DeviceError",
    "FormatVersionError",
    "InvalidIdError",
    "InvalidKeyError",
    "InvalidOptionError",
    "InvalidRecordError",
    "MappedBatch",
    "MappingUnsupportedError",
    "MemoDB",
    "MemoDBError",
    "Problem",
    "ReadOnlyError",
    "RecordNotFoundError",
    "RecordSpec",
    "SearchResult",
    "StoreAccessError",
    "StoreExistsError",
    "StoreFullError",
    "StoreNotFoundError",
    "UnsafePathError",
    "WriterLockedError",
    "__version__",
    "available_backends",
    "calibrate",
    "copy",
    "gather_limits",
]
