"""Valid lengths of a batch: taken where the caller's own attention mask is seen, at the door of the encoder.

A layer's mask is of no use for this: its shape and meaning change with the attention implementation, and some
implementations drop it when nothing is padded.
"""

from __future__ import annotations

import inspect
import threading
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["LengthWatch", "valid_lengths"]


def valid_lengths(attention_mask: Tensor | None, rows: int, padded_length: int) -> Tensor | None:
    """Count the tokens of each row of a right-padded batch.

    Parameters
    ----------
    attention_mask
        ``[rows, padded_length]``, nonzero where a token is; ``None`` where nothing is padded.
    rows, padded_length
        Shape of the batch.

    Returns
    -------
    Tensor or None
        int64 ``[rows]`` on the CPU; 0 marks a row that is not right-padded (left padding, holes, no token at all).
        ``None`` when the mask is of another shape, so that nothing can be said.
    """
    if attention_mask is None:
        return torch.full((rows,), padded_length, dtype=torch.int64)
    if not isinstance(attention_mask, Tensor) or attention_mask.shape != (rows, padded_length):
        return None
    present = attention_mask.detach().ne(0).cpu()
    lengths = present.sum(dim=1)
    right_padded = (present == (torch.arange(padded_length) < lengths[:, None])).all(dim=1)
    return torch.where(right_padded, lengths, 0)


class LengthWatch:
    """Hooks on the encoder that hold the valid lengths for as long as one forward runs, per thread.

    Attention layers called outside a forward of the encoder, in training, with gradients enabled, with a cache, or
    when attention weights are to be returned see no lengths, and so take their original path.
    """

    def __init__(self, encoder: nn.Module) -> None:
        self._encoder = encoder
        self._signature = inspect.signature(type(encoder).forward)
        self._current = threading.local()
        self._lock = threading.Lock()
        self.sequences = 0  # sequences that went through the encoder in inference
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    @property
    def lengths(self) -> Tensor | None:
        """Valid lengths int64 ``[n]`` of the forward that runs in this thread, or None."""
        return getattr(self._current, "lengths", None)

    def attach(self) -> None:
        """Register the hooks."""
        self._handles = [
            self._encoder.register_forward_pre_hook(self._enter, with_kwargs=True),
            self._encoder.register_forward_hook(self._leave, with_kwargs=True, always_call=True),
        ]

    def detach(self) -> None:
        """Remove the hooks; a second call does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _enter(self, encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._current.lengths = None
        if encoder.training or torch.is_grad_enabled():
            return
        try:
            call = self._signature.bind_partial(encoder, *args, **kwargs).arguments
        except TypeError:
            return  # the encoder itself will say what is wrong with the call
        given = {**call.pop("kwargs", {}), **call}
        source = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
        if not isinstance(source, Tensor) or source.dim() < 2:
            return
        with self._lock:
            self.sequences += source.shape[0]
        wants_attentions = given.get("output_attentions")
        if wants_attentions is None:
            wants_attentions = getattr(encoder.config, "output_attentions", False)
        cached = given.get("past_key_values") is not None or given.get("encoder_hidden_states") is not None
        if not (wants_attentions or cached):
            self._current.lengths = valid_lengths(given.get("attention_mask"), source.shape[0], source.shape[1])

    def _leave(self, encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self._current.lengths = None
