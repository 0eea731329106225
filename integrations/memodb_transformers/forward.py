"""One forward of a model as its attention layers need to know it: where each sequence lies, and which layer is next.

Valid lengths are taken where the caller's own attention mask is seen, at the door of the encoder. A layer's mask is of
no use for this: its shape and meaning change with the attention implementation, and some implementations drop it when
nothing is padded.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import DynamicCache

from .counting import counting
from .errors import UnsupportedModelError, copied_inside

__all__ = ["Forward", "ForwardWatch", "Spans", "find_spans", "present", "roll_back", "roll_front"]

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Spans:
    """Where the tokens of each sequence of a batch lie: ``length`` positions from ``start`` on.

    Attributes
    ----------
    starts, lengths
        int64 ``[n]``. A length of 0 marks a sequence that cannot be reused: its tokens have holes, or there are none.
    padded
        Positions of the batch, L.
    """

    starts: Ints
    lengths: Ints
    padded: int

    def take(self, rows: Ints) -> Spans:
        """Return the spans of some rows."""
        return Spans(self.starts[rows], self.lengths[rows], self.padded)

    def __len__(self) -> int:
        return len(self.lengths)


def find_spans(attention_mask: Any, rows: int, padded: int, position_ids: Any = None) -> Spans | None:
    """Find the tokens of each sequence of a batch, padded on either side.

    Parameters
    ----------
    attention_mask
        ``[rows, padded]``, nonzero where a token is; ``None`` where nothing is padded.
    rows, padded
        Shape of the batch.
    position_ids
        Positions given by the caller, ``[1 or rows, padded]``. Sequences in which they do not count up one by one are
        marked as not to be reused: their hidden state does not tell what their probabilities depend on (rotary
        embeddings), or several sequences are packed into one row.

    Returns
    -------
    Spans or None
        ``None`` when the mask or the positions are of another shape, so that nothing can be said.
    """
    if attention_mask is None:
        starts, lengths = np.zeros(rows, dtype=np.int64), np.full(rows, padded, dtype=np.int64)
    elif isinstance(attention_mask, Tensor) and attention_mask.shape == (rows, padded):
        present = attention_mask.detach().ne(0).cpu().numpy()
        starts, lengths = present.argmax(axis=1).astype(np.int64), present.sum(axis=1, dtype=np.int64)
        places = np.arange(padded) - starts[:, None]
        whole = (present == ((places >= 0) & (places < lengths[:, None]))).all(axis=1)
        lengths = np.where(whole, lengths, 0)
    else:
        return None
    if position_ids is not None:
        if not isinstance(position_ids, Tensor) or position_ids.shape not in ((1, padded), (rows, padded)):
            return None
        steps = np.diff(position_ids.detach().cpu().numpy(), axis=1) == 1
        places = np.arange(padded - 1) - starts[:, None]
        inside = (places >= 0) & (places < lengths[:, None] - 1)
        lengths = np.where((steps | ~inside).all(axis=1), lengths, 0)
    return Spans(starts, lengths, padded)


def present(lengths: Tensor, padded: int) -> Tensor:
    """Tell which of ``padded`` positions hold tokens that begin at 0: bool ``[n, padded]``, where ``lengths`` lie."""
    return torch.arange(padded, device=lengths.device) < lengths[:, None]


def roll_front(states: Tensor, starts: Ints, axis: int = 1) -> Tensor:
    """Turn each row of ``[n, L, ...]`` round along ``axis`` so that its tokens begin at 0; a copy where one moves."""
    return _roll(states, -starts, axis)


def roll_back(states: Tensor, starts: Ints, axis: int = 1) -> Tensor:
    """Turn each row back to where its tokens were; see :func:`roll_front`."""
    return _roll(states, starts, axis)


def _roll(states: Tensor, shifts: Ints, axis: int) -> Tensor:
    if not shifts.any():
        return states
    moved = [state.roll(int(shift), axis - 1) if shift else state for state, shift in zip(states, shifts, strict=True)]
    return torch.stack(moved)


class Forward:
    """What is known of the forward that runs in a thread.

    Attributes
    ----------
    spans
        Where the sequences lie; None: nothing may be reused in this forward.
    embedded
        Whether the caller gave embeddings instead of token ids.
    found
        What the search for the whole sequences found, with ``lookup="sequence"``.
    """

    __slots__ = ("_calls", "embedded", "found", "spans")

    def __init__(self, spans: Spans | None, *, embedded: bool = False) -> None:
        self.spans = spans
        self.embedded = embedded
        self.found: Any = None
        self._calls = 0

    def next_call(self) -> int:
        """Count the calls of shared attention modules."""
        self._calls += 1
        return self._calls - 1


class ForwardWatch:
    """Stands around the encoder's forward and holds a :class:`Forward` for as long as one runs, per thread.

    Attention layers called outside a forward of the encoder, in training, on top of a filled cache, or when attention
    weights are to be returned see none, or one without spans, and so take their original path.
    """

    def __init__(self, encoder: nn.Module) -> None:
        self.encoder = encoder
        self._signature = inspect.signature(type(encoder).forward)
        self._running = threading.local()
        self.sequences = 0  # sequences that went through the encoder in inference

    @property
    def current(self) -> Forward | None:
        """The forward that runs in this thread, or None."""
        return getattr(self._running, "forward", None)

    def around(self, own: Callable[..., Any]) -> Callable[..., Any]:
        """Return what is to run in the place of the encoder's own forward.

        A hook would see less: hooks registered later may change the arguments after it, and none runs when the forward
        is interrupted.
        """

        def run(*args: Any, **kwargs: Any) -> Any:
            before = self.current
            self._running.forward = self._begin(args, kwargs)
            try:
                return own(*args, **kwargs)
            finally:
                self._running.forward = before

        return run

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise copied_inside()

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Forward:
        if self.encoder.training:
            return Forward(None)
        if torch.jit.is_tracing() or torch.compiler.is_compiling():  # type: ignore[attr-defined, no-untyped-call]
            raise UnsupportedModelError(
                "a memoized model can be neither compiled nor traced: what it computes depends on what is found in the "
                "store. Compile or trace the model outside of the memoize block"
            )
        try:
            call = self._signature.bind_partial(self.encoder, *args, **kwargs).arguments
        except TypeError:
            return Forward(None)  # the encoder itself will say what is wrong with the call
        given = {**call.pop("kwargs", {}), **call}
        embedded = given.get("input_ids") is None
        source = given.get("inputs_embeds") if embedded else given.get("input_ids")
        if not isinstance(source, Tensor) or source.dim() < 2:
            return Forward(None)
        cache = given.get("past_key_values")
        if cache is not None and not (type(cache) is DynamicCache and cache.get_seq_length() == 0):
            return Forward(None)  # a decoding step, or a cache that does not simply grow
        with counting():
            self.sequences += source.shape[0]
        return Forward(self._spans(given, source), embedded=embedded)

    def reset(self) -> None:
        """Count sequences from zero again."""
        with counting():
            self.sequences = 0

    def _spans(self, given: dict[str, Any], source: Tensor) -> Spans | None:
        wants_attentions = given.get("output_attentions")
        if wants_attentions is None:
            wants_attentions = getattr(self.encoder.config, "output_attentions", False)
        if wants_attentions or given.get("encoder_hidden_states") is not None or source.shape[1] < 2:
            return None
        return find_spans(given.get("attention_mask"), source.shape[0], source.shape[1], given.get("position_ids"))
