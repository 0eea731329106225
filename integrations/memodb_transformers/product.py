"""Stored probabilities times V, in a precision that the processor multiplies fast."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["weighted_values"]

# Elements of a block that is turned into float32 before it is multiplied: 2 MiB, which stays in the cache in between.
# Turning a whole batch over first writes it to memory and reads it again, twice its size each way.
_BLOCK = 1 << 19


def weighted_values(probabilities: Tensor, value: Tensor) -> Tensor:
    """Weigh V by attention probabilities: the context of scaled dot-product attention.

    Sums are in float32 whatever the records are stored in. Only bfloat16 times bfloat16 is left to the processor: a
    model whose V is bfloat16 runs where that is fast. CPUs multiply float16 ten times slower than they convert it.

    Parameters
    ----------
    probabilities
        ``[n, heads, L, L]`` of any floating dtype; it may be a window of a larger tensor.
    value
        ``[n, L, kv_heads, head_dim]``, where ``heads`` is a multiple of ``kv_heads``.

    Returns
    -------
    Tensor
        ``[n, L, heads * head_dim]`` of the dtype of ``value``.
    """
    n, heads, length = probabilities.shape[:3]
    split = value.transpose(1, 2)  # [n, kv_heads, L, head_dim]
    if heads != split.shape[1]:
        split = split.repeat_interleave(heads // split.shape[1], dim=1)
    if probabilities.dtype == split.dtype and split.dtype in (torch.float32, torch.float64, torch.bfloat16):
        context = torch.matmul(probabilities, split)
    elif probabilities.device.type != "cpu":
        context = torch.matmul(probabilities.to(split.dtype), split)
    else:
        context = _by_blocks(probabilities, split.float())
    return context.transpose(1, 2).reshape(n, length, -1).to(value.dtype)


def _by_blocks(probabilities: Tensor, value: Tensor) -> Tensor:
    """Multiply ``[n, heads, L, L]`` by float32 ``[n, heads, L, head_dim]``, a few heads at a time."""
    n, heads, length, width = value.shape
    step = max(1, min(heads, _BLOCK // max(1, length * length)))
    value = value.contiguous()
    context = value.new_empty(n, heads, length, width)
    block = value.new_empty(step, length, length)
    for row in range(n):
        for head in range(0, heads, step):
            chosen = slice(head, min(head + step, heads))
            part = block[: chosen.stop - chosen.start]
            part.copy_(probabilities[row, chosen])
            torch.bmm(part, value[row, chosen], out=context[row, chosen])
    return context
