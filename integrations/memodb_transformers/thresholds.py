"""From a wanted similarity to a threshold on the distance of keys.

The search knows distances only; what matters is the similarity (Eq. 1) of the record that would be reused. On
held-out sequences both are known. A falling step function is fitted to these pairs, and a level's threshold in a
layer is the largest distance at which the fitted similarity still reaches the level.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["LEVELS", "TUNED", "fit_falling", "threshold_for"]

# Mean similarity of what is reused, not a promise about accuracy: measure that with `evaluate`. The paper's settings
# for BERT, 0.96 to 0.98 (its Table 2), are out of reach of a store of thousands of short sentences.
LEVELS: dict[str, float] = {"conservative": 0.9, "moderate": 0.8, "aggressive": 0.75}

# The level that goes by what the tuner chose.
TUNED = "tuned"


def fit_falling(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Fit the falling sequence nearest to ``values`` in least squares (pool adjacent violators).

    Parameters
    ----------
    values
        ``[n]``, in the order in which they should fall.
    """
    blocks: list[tuple[float, int]] = []  # mean and size of each level stretch
    for value in values.tolist():
        mean, size = value, 1
        while blocks and blocks[-1][0] < mean:
            above, count = blocks.pop()
            mean, size = (above * count + mean * size) / (count + size), count + size
        blocks.append((mean, size))
    return np.repeat([mean for mean, _ in blocks], [size for _, size in blocks]).astype(np.float64)


def threshold_for(
    distances: Sequence[float | None], similarities: Sequence[float | None], similarity: float
) -> float | None:
    """Find the largest distance at which the predicted similarity reaches ``similarity``.

    Parameters
    ----------
    distances, similarities
        One pair for each held-out sequence, None where nothing was found for it. Distances are squared L2.
    similarity
        The level, in [0, 1].

    Returns
    -------
    float or None
        None when no distance that was seen reaches it: nothing should be reused.
    """
    pairs = sorted((d, s) for d, s in zip(distances, similarities, strict=True) if d is not None and s is not None)
    if not pairs:
        return None
    fitted = fit_falling(np.array([s for _, s in pairs]))
    reaching = np.flatnonzero(fitted >= similarity)
    return float(pairs[int(reaching[-1])][0]) if len(reaching) else None
