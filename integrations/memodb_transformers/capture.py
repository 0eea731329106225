"""Look into a model's attention layers while it runs: their inputs, their probabilities, and the calls themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .errors import InvalidBatchError
from .families import AttentionSite, ModelSites

__all__ = ["attention_implementation", "attention_outputs", "in_inference", "model_inputs"]


@contextmanager
def in_inference(model: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode without gradients; every module's own mode is put back at the end."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def attention_implementation(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Run a model with another attention implementation; its own is put back at the end."""
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        if before is not None:
            model.set_attn_implementation(before)


@contextmanager
def attention_outputs(
    sites: ModelSites, receive: Callable[[AttentionSite, Tensor, tuple[Any, ...], dict[str, Any], Any], None]
) -> Iterator[None]:
    """Call ``receive(site, hidden, args, kwargs, output)`` after each attention layer of each forward."""

    def hook_of(site: AttentionSite) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            receive(site, hidden, args, kwargs, output)

        return hook

    handles = []
    try:
        for site in sites.layers:
            handles.append(site.module.register_forward_hook(hook_of(site), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def model_inputs(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Take from a batch what the model is called with: everything but ``labels``, on the model's device.

    Raises
    ------
    InvalidBatchError
        The batch is no mapping or has neither ``input_ids`` nor ``inputs_embeds``.
    """
    if not isinstance(batch, Mapping) or not ({"input_ids", "inputs_embeds"} & batch.keys()):
        found = sorted(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
        raise InvalidBatchError(f"expected each batch to be a dict with input_ids and attention_mask; found {found}")
    return {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in batch.items()
        if name != "labels"
    }
