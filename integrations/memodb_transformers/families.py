"""Which architectures can be memoized: one frozen row each, and the search for their attention layers in a model.

A row says which class is the self-attention, where it hangs, and how its parts are called. Only encoders are listed:
every position of a record may depend on every other, which a causal model's growing cache does not allow.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from .errors import UnsupportedModelError

__all__ = ["AttentionSite", "Family", "ModelSites", "families", "find_sites"]


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture whose attention layers can be memoized.

    Attributes
    ----------
    name
        Short name, as in ``config.model_type``.
    module
        Dotted module that defines the classes. It is compared with a model's classes by name and never imported.
    attention_class
        Class of the self-attention. Its forward takes ``hidden_states [n, L, H]``, ``attention_mask`` and
        ``past_key_values`` and returns ``(context [n, L, heads * head_dim], probabilities or None)``.
    model_class
        Class of the bare encoder: the one that sees the 2-D attention mask of the caller.
    attribute
        Name under which the attention hangs at its parent.
    query, key, value
        Names of the three projections.
    heads, head_dim
        Names of the attributes with the number of heads and the width of one.
    """

    name: str
    module: str
    attention_class: str
    model_class: str
    attribute: str = "self"
    query: str = "query"
    key: str = "key"
    value: str = "value"
    heads: str = "num_attention_heads"
    head_dim: str = "attention_head_size"


def _bert_like(name: str, prefix: str) -> Family:
    return Family(
        name=name,
        module=f"transformers.models.{name.replace('-', '_')}.modeling_{name.replace('-', '_')}",
        attention_class=f"{prefix}SelfAttention",
        model_class=f"{prefix}Model",
    )


_FAMILIES = (
    _bert_like("bert", "Bert"),
    _bert_like("roberta", "Roberta"),
    _bert_like("xlm-roberta", "XLMRoberta"),
    _bert_like("camembert", "Camembert"),
    _bert_like("electra", "Electra"),
)


def families() -> tuple[Family, ...]:
    """List the supported architectures, one row each."""
    return _FAMILIES


@dataclass(frozen=True, slots=True)
class AttentionSite:
    """One attention layer of a model: ``getattr(parent, family.attribute) is module``."""

    layer: int
    parent: nn.Module
    module: nn.Module
    family: Family

    @property
    def heads(self) -> int:
        """Number of attention heads."""
        return int(getattr(self.module, self.family.heads))

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return int(getattr(self.module, self.family.head_dim))

    def projection(self, which: str) -> nn.Module:
        """Return the ``"query"``, ``"key"`` or ``"value"`` projection."""
        projection = getattr(self.module, getattr(self.family, which))
        assert isinstance(projection, nn.Module)
        return projection


@dataclass(frozen=True, slots=True)
class ModelSites:
    """A model's encoder, and its attention layers from the first to the last."""

    encoder: nn.Module
    layers: tuple[AttentionSite, ...]

    @property
    def family(self) -> Family:
        """The family that all layers belong to."""
        return self.layers[0].family

    @property
    def hidden_size(self) -> int:
        """Width H of the hidden state that attention is called with."""
        return int(self.encoder.config.hidden_size)  # type: ignore[union-attr, arg-type]


def _is(module: object, family: Family, class_name: str) -> bool:
    # The exact class: a subclass may compute attention differently, and nothing here could know.
    kind = type(module)
    return kind.__name__ == class_name and kind.__module__ == family.module


def find_sites(model: object) -> ModelSites:
    """Find a model's attention layers; the model is only looked at.

    Parameters
    ----------
    model
        A transformers model, with or without a task head.

    Raises
    ------
    UnsupportedModelError
        The model is none of transformers, of no supported family, a decoder, or has several encoders.
    """
    known = ", ".join(family.name for family in _FAMILIES)
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"expected a transformers.PreTrainedModel of one of the families {known}; found {type(model).__name__}. "
            "A compiled or wrapped model: memoize the model inside it"
        )
    name = type(model).__name__
    modules = list(model.modules())
    for family in _FAMILIES:
        parents = [
            parent for parent in modules if _is(getattr(parent, family.attribute, None), family, family.attention_class)
        ]
        layers = tuple(
            AttentionSite(layer, parent, getattr(parent, family.attribute), family)
            for layer, parent in enumerate(parents)
        )
        if not layers:
            continue
        if any(bool(getattr(site.module, flag, False)) for site in layers for flag in ("is_decoder", "is_causal")):
            raise UnsupportedModelError(
                f"{name} is configured as a decoder: its causal attention with a growing cache cannot be memoized. "
                f"Supported are encoders of the families {known}"
            )
        encoders = [module for module in modules if _is(module, family, family.model_class)]
        if len(encoders) != 1:
            raise UnsupportedModelError(
                f"{name} holds {len(encoders)} encoders of class {family.model_class}, expected exactly one: "
                f"memoize each of them by itself. Supported are encoders of the families {known}"
            )
        return ModelSites(encoders[0], layers)
    raise UnsupportedModelError(
        f"{name} (model_type {getattr(model.config, 'model_type', 'unknown')!r}) has no attention layers that can be "
        f"memoized. Supported are encoders of the families {known}"
    )
