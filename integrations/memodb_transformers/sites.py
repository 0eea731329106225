"""The attention layers of a model: found, checked, and patched for the length of a block."""

from __future__ import annotations

import inspect
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from .errors import MemoizationActiveError, UnsupportedModelError, copied_inside
from .families import Family, families
from .projections import FusedConv1D, Separate

__all__ = ["AttentionSite", "ModelSites", "find_memoizable", "find_sites", "patched"]

Forward = Callable[..., Any]

# Rotations that depend on the length of the longest sequence of a batch: equal hidden states of equal length then have
# other probabilities in another batch.
_ROTATIONS_BY_BATCH = ("dynamic", "longrope")

_IMPLEMENTATIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")

_patching = threading.Lock()


def _renew() -> None:
    """In a forked child: a thread that is not there may have held the lock."""
    global _patching
    _patching = threading.Lock()


os.register_at_fork(after_in_child=_renew)


@dataclass(frozen=True, slots=True)
class AttentionSite:
    """One attention layer of a model. A module that serves several layers (ALBERT) has a site for each.

    Attributes
    ----------
    layer
        Number of the layer, in the order of the forward.
    module
        The attention module.
    family
        Its row in ``families.py``.
    parameters
        Names of the positional parameters of the module's forward.
    """

    layer: int
    module: nn.Module
    family: Family
    parameters: tuple[str, ...]

    @property
    def computes_as_recorded(self) -> bool:
        """Whether the module's attention is, at present, one that computes what the eager one does."""
        return _implementation_problem(self.module, self.family) is None

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return int(getattr(self.module, self.family.head_dim))

    def values(self, hidden: Tensor) -> Tensor:
        """Project V of ``hidden`` [n, L, H]: ``[n, L, kv_heads, head_dim]``."""
        return self.family.projection.values(self.module, hidden, self.head_dim)

    def keys(self, hidden: Tensor, call: Mapping[str, Any]) -> Tensor:
        """Project K of ``hidden`` [n, L, H] as it is cached: ``[n, kv_heads, L, head_dim]``."""
        projection = self.family.projection
        assert isinstance(projection, Separate | FusedConv1D)
        keys = projection.keys(self.module, hidden, self.head_dim).transpose(1, 2)
        if self.family.rotary:
            cos, sin = call["position_embeddings"]
            rotate = sys.modules[self.family.module].apply_rotary_pos_emb
            keys = rotate(keys, keys, cos, sin)[1]
        return keys

    def finish(self, context: Tensor, hidden: Tensor) -> Tensor:
        """Finish the context [n, L, heads * head_dim]: what the module returns first."""
        return self.family.finish(self.module, context, hidden)

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Name all arguments of a call of the module's forward."""
        return {**dict(zip(self.parameters, args, strict=False)), **kwargs}


@dataclass(frozen=True, slots=True)
class ModelSites:
    """A model's encoder (or decoder), and its attention layers from the first to the last."""

    encoder: nn.Module
    layers: tuple[AttentionSite, ...]
    heads: int

    @property
    def family(self) -> Family:
        """The family that all layers belong to."""
        return self.layers[0].family

    @property
    def modules(self) -> list[nn.Module]:
        """The attention modules, each once."""
        return list({id(site.module): site.module for site in self.layers}.values())

    @property
    def hidden_size(self) -> int:
        """Width H of the hidden state that attention is called with."""
        return int(self.encoder.config.hidden_size)  # type: ignore[union-attr, arg-type]


def find_sites(model: object) -> ModelSites:
    """Find a model's attention layers; the model is only looked at.

    Parameters
    ----------
    model
        A transformers model, with or without a task head.

    Raises
    ------
    UnsupportedModelError
        The model is none of transformers, of no supported family, has several encoders or cross-attention, is compiled,
        or computes attention in a way that the family's row does not tell.
    """
    known = ", ".join(family.name for family in families())
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"expected a transformers.PreTrainedModel of one of the families {known}; found {type(model).__name__}. "
            "A compiled or wrapped model: memoize the model inside it"
        )
    name = type(model).__name__
    modules = list(model.modules())
    if problem := _whole(modules):
        raise UnsupportedModelError(f"{name} cannot be memoized: {problem}. Supported are the families {known}")
    for family in families():
        found = [
            child
            for parent in modules
            if (child := getattr(parent, family.attribute, None)) is not None
            and _base(child, family, family.attention_class) is not None
        ]
        if not found:
            continue
        problem = next((said for module in found if (said := _problem(module, family))), None)
        if problem:
            raise UnsupportedModelError(f"{name} cannot be memoized: {problem}. Supported are the families {known}")
        encoders = [module for module in modules if _base(module, family, family.model_class) is not None]
        if len(encoders) != 1:
            raise UnsupportedModelError(
                f"{name} holds {len(encoders)} encoders of class {family.model_class}, expected exactly one: "
                f"memoize each of them by itself. Supported are the families {known}"
            )
        config: Any = encoders[0].config
        if family.shared:
            found = _in_order_of_calls(found, config)
        layers = tuple(
            AttentionSite(layer, module, family, tuple(inspect.signature(type(module).forward).parameters)[1:])
            for layer, module in enumerate(found)
        )
        return ModelSites(encoders[0], layers, int(getattr(config, family.heads)))
    raise UnsupportedModelError(
        f"{name} (model_type {getattr(model.config, 'model_type', 'unknown')!r}) has no attention layers that can be "
        f"memoized. Supported are the families {known}"
    )


def find_memoizable(model: object) -> ModelSites:
    """Find the attention layers of a model that is not memoized at present."""
    sites = find_sites(model)
    _check_free(sites)
    return sites


@contextmanager
def patched(sites: ModelSites, replacement: Callable[[nn.Module, Forward], Forward]) -> Iterator[None]:
    """Let the attention modules run another forward for the length of a block.

    Only the attribute ``forward`` of the module objects is set: modules, names, parameters and hooks stay as they are.

    Parameters
    ----------
    sites
        The encoder and its attention layers.
    replacement
        Called with the encoder and each attention module, and its own forward; returns what is to run instead.

    Raises
    ------
    MemoizationActiveError
        The modules are patched already.
    """
    with ExitStack() as stack:
        with _patching:
            _check_free(sites)
            for module in [sites.encoder, *sites.modules]:
                own: Forward = module.forward
                stack.callback(_put_back, module, vars(module).get("forward"))
                vars(module)["forward"] = _Patched(own, replacement(module, own))
        yield


class _Patched:
    """A forward that stands in for a module's own. It belongs to one object: no copy of the model may have it."""

    def __init__(self, own: Forward, run: Forward) -> None:
        # Callers that look at what a forward takes (generation, pipelines) shall see what they always saw.
        self.__signature__ = inspect.signature(own)
        self._run = run

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise copied_inside()


def _put_back(module: nn.Module, own: Forward | None) -> None:
    if not isinstance(vars(module).get("forward"), _Patched):
        return  # somebody gave the module another one meanwhile
    if own is None:
        vars(module).pop("forward", None)
    else:
        vars(module)["forward"] = own


def _check_free(sites: ModelSites) -> None:
    if any(isinstance(vars(module).get("forward"), _Patched) for module in sites.modules):
        raise MemoizationActiveError(
            "the model is inside a memoize block already: leave that first, or use another instance of the model"
        )


def _base(module: object, family: Family, class_name: str) -> type | None:
    """Return the family's class among those that a module's class inherits from."""
    for kind in type(module).__mro__:
        if kind.__name__ == class_name and kind.__module__ == family.module:
            return kind
    return None


def _problem(module: nn.Module, family: Family) -> str | None:
    """Say what about an attention module the family's row does not tell, or None."""
    base: Any = _base(module, family, family.attention_class)
    if type(module).forward is not base.forward:
        return f"{type(module).__name__} computes attention in a forward of its own"
    if getattr(module, "is_cross_attention", False):
        return "it has cross-attention"
    if not family.causal and any(bool(getattr(module, flag, False)) for flag in ("is_decoder", "is_causal")):
        return "it is configured as a decoder, whose causal attention and growing cache this family is not known with"
    if family.causal and getattr(getattr(module, "config", None), "is_causal", True) is False:
        return "its configuration makes causal attention bidirectional (is_causal=False)"
    if getattr(module, "talking_head", False):
        return "its talking heads mix probabilities after the softmax"
    if not hasattr(module, family.head_dim):
        return f"its {type(module).__name__} has no {family.head_dim}"
    rope = getattr(getattr(module, "config", None), "rope_parameters", None)
    kinds = [rope] if isinstance(rope, Mapping) and "rope_type" in rope else list((rope or {}).values())
    for kind in kinds:
        if isinstance(kind, Mapping) and kind.get("rope_type") in _ROTATIONS_BY_BATCH:
            return f"its rotary embedding of type {kind['rope_type']!r} depends on the other sequences of a batch"
    return _implementation_problem(module, family) or family.projection.problem(module)


def _implementation_problem(module: nn.Module, family: Family) -> str | None:
    """Say that the attention implementation is not known to compute what the eager one does, or None."""
    chosen = getattr(getattr(module, "config", None), "_attn_implementation", None)
    if chosen is None or family.asks_for_probabilities or chosen in _IMPLEMENTATIONS:
        return None
    return (
        f"its attention implementation {chosen!r} is not known to compute what eager attention does, of which records "
        f"are; known are {', '.join(_IMPLEMENTATIONS)}"
    )


def _whole(modules: list[nn.Module]) -> str | None:
    for module in modules:
        if type(module).__name__ == "OptimizedModule":
            return "a part of it is compiled (OptimizedModule): memoize a model that is not"
        if getattr(module, "_compiled_call_impl", None) is not None:
            return "it was compiled in place by .compile(): memoize a copy that is not"
    return None


def _in_order_of_calls(found: list[nn.Module], config: Any) -> list[nn.Module]:
    """Repeat ALBERT's shared modules in the order in which its transformer calls them."""
    inner = int(config.inner_group_num)
    order = []
    for layer in range(config.num_hidden_layers):
        group = int(layer / (config.num_hidden_layers / config.num_hidden_groups))
        order += found[group * inner : (group + 1) * inner]
    return order
