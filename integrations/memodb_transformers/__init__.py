"""Memoized attention for Hugging Face models, on a memodb database.

A store is built once from a model and data; inside ``memoize`` the model reuses stored attention where
a similar sequence was seen before::

    import memodb_transformers as mt

    mt.build(model, batches, "memo-store")
    with mt.memoize(model, "memo-store", level="moderate") as memo:
        output = model(**batch)
        print(memo.stats()["memoization_rate"])
"""

try:
    import torch as _torch  # noqa: F401
    import transformers as _transformers  # noqa: F401
except ModuleNotFoundError as _error:
    raise ModuleNotFoundError(
        f'memodb_transformers needs torch and transformers ({_error}): pip install "memodb[transformers]"'
    ) from _error

from .condense import CondenseReport, condense
from .embedding import Embedder, LinearMLP, RandomProjection
from .errors import (
    GradientUnavailableError,
    InvalidBatchError,
    MemoizationActiveError,
    StoreMismatchError,
    UnfinishedBuildError,
    UnsupportedModelError,
)
from .evaluation import EvaluationReport, evaluate
from .families import Family, families
from .memo import Memo
from .memoize import memoize
from .performance import LayerProfile, ProfileReport
from .profiling import profile
from .record import BuildReport, build
from .separable import Separable
from .similarity import best_records, memoization_rate, similarity_matrix, similarity_score
from .thresholds import LEVELS
from .train_report import LayerTraining, TrainingReport
from .transfer import copy
from .tune_report import TuneReport
from .tuning import tune
from .work import Stage

__all__ = [
    "LEVELS",
    "BuildReport",
    "CondenseReport",
    "Embedder",
    "EvaluationReport",
    "Family",
    "GradientUnavailableError",
    "InvalidBatchError",
    "LayerProfile",
    "LayerTraining",
    "LinearMLP",
    "Memo",
    "MemoizationActiveError",
    "ProfileReport",
    "RandomProjection",
    "Separable",
    "Stage",
    "StoreMismatchError",
    "TrainingReport",
    "TuneReport",
    "UnfinishedBuildError",
    "UnsupportedModelError",
    "best_records",
    "build",
    "condense",
    "copy",
    "evaluate",
    "families",
    "memoization_rate",
    "memoize",
    "profile",
    "similarity_matrix",
    "similarity_score",
    "tune",
]
