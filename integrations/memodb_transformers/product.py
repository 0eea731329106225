"""Stored probabilities times V, in a precision that the processor multiplies fast."""

from __future__ import annotations

from functools import cache
from time import perf_counter

import torch
from torch import Tensor

__all__ = ["multiplies_bfloat16", "weighted_values"]

# Elements of a block that is turned into float32 before it is multiplied: 2 MiB, which stays in the cache in between.
# Turning a whole batch over first writes it to memory and reads it again, twice its size each way.
_BLOCK = 1 << 19


def weighted_values(probabilities: Tensor, value: Tensor) -> Tensor:
    """Weigh V by attention probabilities: the context of scaled dot-product attention.

    Products are in float32 whatever the records are stored in, but for bfloat16 records where the processor multiplies
    bfloat16 faster than it converts it (measured once, :func:`multiplies_bfloat16`), or where V is bfloat16 itself:
    then V and the context are rounded as the records are, and sums are in float32. CPUs multiply float16 many times
    slower than they convert it.

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
    elif probabilities.dtype == torch.bfloat16 and multiplies_bfloat16():
        context = torch.matmul(probabilities, split.to(torch.bfloat16))
    else:
        context = _by_blocks(probabilities, split.float())
    return context.transpose(1, 2).reshape(n, length, -1).to(value.dtype)


@cache
def multiplies_bfloat16() -> bool:
    """Measure whether this processor multiplies bfloat16 faster than it converts and multiplies float32."""
    probabilities = torch.full((1, 4, 256, 256), 1 / 256, dtype=torch.bfloat16)
    value = torch.ones(1, 4, 256, 64)

    def seconds(convert: bool) -> float:
        times = []
        for _ in range(7):
            began = perf_counter()
            if convert:
                _by_blocks(probabilities, value)
            else:
                torch.matmul(probabilities, value.to(torch.bfloat16))
            times.append(perf_counter() - began)
        return min(times)

    with torch.no_grad():
        return seconds(convert=False) < 0.8 * seconds(convert=True)


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
