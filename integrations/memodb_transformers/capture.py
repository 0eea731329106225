"""Look into a model's attention layers while it runs: their inputs, their probabilities, their contexts."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .errors import InvalidBatchError
from .forward import ForwardWatch
from .sites import AttentionSite, ModelSites, patched

__all__ = [
    "Visit",
    "attention_implementation",
    "attention_visits",
    "in_inference",
    "model_inputs",
    "observe",
    "whole_inputs",
]


@dataclass(frozen=True, slots=True)
class Visit:
    """One call of an attention layer.

    Attributes
    ----------
    site
        The layer.
    original
        The module's own forward.
    args, kwargs, call
        What it was called with, as it was and by name.
    probabilities
        ``[n, heads, L, L]``, or None where the attention implementation does not give them.
    context
        ``[n, L, heads * head_dim]``: the attention output before the output projection.
    """

    site: AttentionSite
    original: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    call: dict[str, Any]
    probabilities: Tensor | None
    context: Tensor

    @property
    def hidden(self) -> Tensor:
        """The hidden state ``[n, L, H]`` that the layer was called with."""
        hidden: Tensor = self.call["hidden_states"]
        return hidden


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
    """Run a model with another attention implementation; the own one of each of its parts is put back at the end.

    Parts may have configurations of their own, with different implementations, or one that was chosen without a check:
    so what each holds is kept and put back as it is, and not chosen again.
    """
    parts: list[Any] = [part for part in model.modules() if hasattr(part, "config")]
    configs = {id(part.config): part.config for part in parts}
    before = [(config, config._attn_implementation_internal) for config in configs.values() if _has_choice(config)]
    try:
        for config, _ in before:
            config._attn_implementation_internal = name
        yield
    finally:
        for config, own in before:
            config._attn_implementation_internal = own


def _has_choice(config: Any) -> bool:
    return hasattr(config, "_attn_implementation_internal")


@contextmanager
def attention_visits(
    sites: ModelSites, receive: Callable[[Visit], None], *, probabilities: bool = False
) -> Iterator[None]:
    """Call ``receive`` after each attention layer of each forward that this thread makes.

    Parameters
    ----------
    sites
        The attention layers.
    receive
        Called with a :class:`Visit`; the layer's output is what it is without.
    probabilities
        Ask modules for their probabilities that give them only when asked (DeBERTa).
    """
    watch = ForwardWatch(sites.encoder)
    asked = probabilities and sites.family.asks_for_probabilities
    owner = threading.get_ident()

    def stand_in(module: nn.Module, original: Callable[..., Any]) -> Callable[..., Any]:
        if module is sites.encoder:
            return watch.around(original)
        mine = [site for site in sites.layers if site.module is module]

        def run(*args: Any, **kwargs: Any) -> Any:
            forward = watch.current
            if forward is None or threading.get_ident() != owner:
                return original(*args, **kwargs)  # somebody else uses the model meanwhile
            site = sites.layers[forward.next_call()] if sites.family.shared else mine[0]
            call = site.arguments(args, kwargs)
            with _context_of(site) as contexts:
                output = original(**{**call, "output_attentions": True}) if asked else original(*args, **kwargs)
            context = contexts[0] if contexts else output[0]
            receive(Visit(site, original, args, kwargs, call, output[1], context))
            return (output[0], None) if asked else output

        return run

    with patched(sites, stand_in):
        yield


def observe(
    site: AttentionSite, original: Callable[..., Any], call: Mapping[str, Any], *, probabilities: bool = False
) -> Visit:
    """Let an attention layer compute, for nothing but to look at what it does: no cache is filled.

    Parameters
    ----------
    site, original, call
        The layer, the module's own forward, and what it is called with by name.
    probabilities
        As for :func:`attention_visits`.
    """
    given = {**call, "past_key_values": None} if "past_key_values" in call else dict(call)
    if probabilities and site.family.asks_for_probabilities:
        given["output_attentions"] = True
    with _context_of(site) as contexts:
        output = original(**given)
    context = contexts[0] if contexts else output[0]
    return Visit(site, original, (), given, given, output[1], context)


@contextmanager
def _context_of(site: AttentionSite) -> Iterator[list[Tensor]]:
    """Catch the input of the part that projects the context; nothing where the module returns the context itself."""
    caught: list[Tensor] = []
    handles = [
        part.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
        for part in site.family.finish.modules(site.module)
    ]
    try:
        yield caught
    finally:
        for handle in handles:
            handle.remove()


def whole_inputs(batch: Mapping[str, Any], device: torch.device, sites: ModelSites) -> dict[str, Any]:
    """Take from a batch what the model is called with where whole sequences go through it: without a cache.

    Raises
    ------
    InvalidBatchError
        As :func:`model_inputs`.
    """
    inputs = model_inputs(batch, device)
    if sites.family.caches:
        inputs.setdefault("use_cache", False)
    return inputs


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
