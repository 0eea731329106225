"""Key/value caches of decoders, where some sequences of a batch are computed and others are not."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

__all__ = ["ScratchCache", "is_empty"]


class ScratchCache:
    """Stands in for the cache while the original module computes the misses, and keeps what it is given.

    Attributes
    ----------
    keys, values
        ``[misses, kv_heads, L, head_dim]``, once the module has run.
    """

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Keep keys and values; before them there were none."""
        self.keys, self.values = keys, values
        return keys, values


def is_empty(cache: Any, layer: int) -> bool:
    """Tell whether a cache is one that grows, and holds nothing of a layer yet.

    Others (static, sliding, quantized, offloaded) hand out keys of another length than they were given.
    """
    if type(cache) is not DynamicCache or cache.offloading:
        return False
    if len(cache.layers) <= layer:
        return cache.layer_class_to_replicate is DynamicLayer
    return type(cache.layers[layer]) is DynamicLayer and cache.get_seq_length(layer) == 0
