"""The exceptions of memodb_transformers; all stand under :class:`memodb.MemoDBError`.

::

    memodb.MemoDBError
    ├── UnsupportedModelError    (TypeError)      no attention family that can be memoized
    ├── StoreMismatchError       (ValueError)     the store was built from another model, or is no memo store
    ├── MemoizationActiveError   (RuntimeError)   the model is memoized already
    ├── GradientUnavailableError (RuntimeError)   a gradient through attention that was reused
    ├── InvalidBatchError        (ValueError)     batches that cannot be recorded
    └── UnfinishedBuildError     (FileExistsError) an unfinished build of something else is in the way
"""

from __future__ import annotations

from memodb import MemoDBError

__all__ = [
    "GradientUnavailableError",
    "InvalidBatchError",
    "MemoizationActiveError",
    "StoreMismatchError",
    "UnfinishedBuildError",
    "UnsupportedModelError",
    "copied_inside",
    "no_batch_fits",
]


class UnsupportedModelError(MemoDBError, TypeError):
    """The model has no attention layers of a supported family; the message lists the families."""


class StoreMismatchError(MemoDBError, ValueError):
    """The memo store does not belong to this model, or lacks what was asked of it."""


class MemoizationActiveError(MemoDBError, RuntimeError):
    """The model is inside a ``memoize`` block already."""


class GradientUnavailableError(MemoDBError, RuntimeError):
    """A gradient was asked for through attention that came from a store."""


def copied_inside() -> MemoizationActiveError:
    """Say that what belongs to a memoized model cannot go into a copy of it."""
    return MemoizationActiveError(
        "the model is inside a memoize block and cannot be copied or pickled: leave the block first, or save its "
        "state_dict"
    )


class InvalidBatchError(MemoDBError, ValueError):
    """Batches are empty, of differing padded length, or lack what a recording needs."""


def no_batch_fits(given: int, longest: int) -> InvalidBatchError:
    """Say that there are no batches, or none that is as short as the records and holds a sequence."""
    found = "no batches at all: an iterator can be read once only"
    if given:
        found = "only longer ones, or ones without sequences"
    return InvalidBatchError(f"expected batches padded to at most {longest} tokens, as the store's; found {found}")


class UnfinishedBuildError(MemoDBError, FileExistsError):
    """What an earlier ``build`` left where this one would build is of other data or settings, or damaged."""
