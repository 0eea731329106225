"""Attach a memo store to a model, and take it off again without a trace."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from transformers import PreTrainedModel

from .card import ModelCard
from .choices import Level, asked_profiles, check_lookup, resolve_thresholds
from .embedding import Embedder
from .memo import Memo
from .sites import find_memoizable
from .store import open_stores

__all__ = ["memoize"]


@contextmanager
def memoize(
    model: PreTrainedModel,
    path: str | os.PathLike[str],
    *,
    level: Level = "moderate",
    threshold: float | None = None,
    layers: str | Sequence[int] = "profiled",
    lookup: str = "layer",
    length_tolerance: int = 0,
    neighbours: int = 1,
    embedder: Embedder | None = None,
) -> Iterator[Memo]:
    """Let a model reuse stored attention for the length of a block.

    Inside the block the model is called as always. Where a layer finds a record of the same valid length within its
    threshold, it projects V only and multiplies it with the record (``target="probs"``), or takes the record for the
    context itself (``target="context"``); all other sequences of the batch go through the original layer. On exit, also
    by an exception, the model is the very same object graph as before.

    The original layers run: in training mode, with ``output_attentions``, for decoding steps on a filled cache, for
    sequences whose tokens have holes, and for batches padded longer than the store's records. Many threads may call the
    model at once. Gradients do not pass through what was reused: asking for them is an error.

    Parameters
    ----------
    model
        The model that the store was built from.
    path
        The memo store.
    level
        ``"conservative"``, ``"moderate"`` or ``"aggressive"``: reuse where a similarity (Eq. 1) of at least 0.9, 0.8
        or 0.75 is predicted; or that similarity itself, a number from 0 to 1. ``"tuned"``: the layers and thresholds
        that :func:`memodb_transformers.tune` chose, for the way to look up that it chose them for.
    threshold
        Largest squared L2 distance of keys, for all layers, instead of a level.
    layers
        ``"profiled"``: those where the profile predicts a gain of time (Eq. 3), evaluated for each batch from its size
        and padded length; ``"all"``; or a list of numbers.
    lookup
        ``"layer"``: each layer embeds its own hidden state and searches (the paper). ``"sequence"``: one embedding and
        one search, at the input of the first layer, serve all layers.
    length_tolerance
        Reuse records of up to so many more tokens: columns beyond the length are cut, rows sum to 1 again.
    neighbours
        Reuse the mean of the nearest so many records, as far as they are within the threshold; whether a sequence is a
        hit is for the nearest to say. The mean is made anew for each batch, in float32. Not together with
        ``length_tolerance``.
    embedder
        Only for a store that was built with an embedder of the caller's own: that embedder.

    Yields
    ------
    Memo
        With ``stats()`` and ``layers``.

    Raises
    ------
    UnsupportedModelError, StoreMismatchError
        The model is of no supported family, or not the one of the store; the store has no profile and none can be
        done without, or was not tuned, or for another ``lookup``; ``length_tolerance`` with a store of contexts, which
        cannot be cut; ``lookup="sequence"`` with one that was condensed by layer.
    MemoizationActiveError
        The model is memoized already.
    ValueError
        ``level``, ``threshold``, ``layers``, ``lookup``, ``length_tolerance`` or ``neighbours`` cannot be used.
    """
    sites = find_memoizable(model)
    with open_stores(path, ModelCard.of(sites), embedder) as stores:
        check_lookup(stores, lookup, length_tolerance, neighbours)
        thresholds = resolve_thresholds(
            stores, level, threshold, layers, lookup, length_tolerance=length_tolerance, neighbours=neighbours
        )
        memo = Memo(
            sites,
            stores,
            thresholds,
            lookup=lookup,
            length_tolerance=length_tolerance,
            neighbours=neighbours,
            profiles=asked_profiles(stores, layers),
        )
        with memo.attached():
            yield memo
