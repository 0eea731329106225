"""Which model a store was built from: enough to refuse another one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .capture import in_inference
from .errors import StoreMismatchError
from .sites import ModelSites

__all__ = ["ModelCard"]

_PROBE_TOKENS = 32
# How far hidden states of the same model may lie apart, relatively, on another machine or in this precision.
_TOLERANCES = {"float64": 1e-3, "float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}
# What attention computes beyond its weights, wherever a configuration says it.
_SETTINGS = (
    "global_attn_every_n_layers",
    "is_causal",
    "layer_types",
    "local_attention",
    "max_relative_positions",
    "norm_rel_ebd",
    "num_key_value_heads",
    "pos_att_type",
    "position_biased_input",
    "position_buckets",
    "relative_attention",
    "reorder_and_upcast_attn",
    "rope_parameters",
    "scale_attn_by_inverse_layer_idx",
    "scale_attn_weights",
    "share_att_key",
    "sliding_window",
)


@dataclass(frozen=True, slots=True, eq=False)
class ModelCard:
    """A model's shape, the settings of its attention, and what it makes of a fixed input.

    Attributes
    ----------
    family, layers, heads, head_dim, hidden_size
        Its shape.
    settings
        What its configuration says of attention.
    dtype
        Precision of its parameters.
    probe
        Last hidden state of a fixed input, float32 ``[tokens, H]``: whatever is different (weights, adapters, settings
        that no list here names) shows in it.
    """

    family: str
    layers: int
    heads: int
    head_dim: int
    hidden_size: int
    settings: Mapping[str, Any]
    dtype: str
    probe: NDArray[np.float32]

    @classmethod
    def of(cls, sites: ModelSites) -> ModelCard:
        """Describe a model; it is run once on a few tokens."""
        config: Any = sites.encoder.config
        found = {name: getattr(config, name) for name in _SETTINGS if hasattr(config, name)}
        return cls(
            sites.family.name,
            len(sites.layers),
            sites.heads,
            sites.layers[0].head_dim,
            sites.hidden_size,
            json.loads(json.dumps(found, default=str)),
            str(next(sites.encoder.parameters()).dtype).removeprefix("torch."),
            _probe(sites),
        )

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any], probe: NDArray[Any]) -> ModelCard:
        """Read a card back from what :meth:`to_dict` returned."""
        layers, heads, head_dim, hidden_size = (
            int(plain[name]) for name in ("layers", "heads", "head_dim", "hidden_size")
        )
        settings, dtype = dict(plain["settings"]), str(plain["dtype"])
        return cls(str(plain["family"]), layers, heads, head_dim, hidden_size, settings, dtype, probe)

    def to_dict(self) -> dict[str, Any]:
        """Return all but the probe as JSON types."""
        names = ("family", "layers", "heads", "head_dim", "hidden_size", "settings", "dtype")
        return {name: getattr(self, name) for name in names}

    def check(self, other: ModelCard, path: Path) -> None:
        """Raise :class:`StoreMismatchError` unless ``other`` is the model that the store at ``path`` is of."""
        for name in ("family", "layers", "heads", "head_dim", "hidden_size"):
            self._compare(name, getattr(self, name), getattr(other, name), path)
        for name in sorted({*self.settings, *other.settings}):
            self._compare(f"config.{name}", self.settings.get(name), other.settings.get(name), path)
        norm = float(np.linalg.norm(self.probe))
        shape = self.probe.shape == other.probe.shape
        apart = float(np.linalg.norm(self.probe - other.probe)) / max(norm, 1e-30) if shape else float("inf")
        most = max(_TOLERANCES.get(dtype, 1e-1) for dtype in (self.dtype, other.dtype))
        if not apart <= most:
            raise StoreMismatchError(
                f"the store at {path} was built from a model of this shape that computes something else: its hidden "
                f"states of a fixed input lie {apart:.2g} apart, relatively (at most {most:.2g}): other weights, an "
                "adapter, or other settings. Build a store for this model"
            )

    def _compare(self, name: str, built: Any, found: Any, path: Path) -> None:
        if built != found:
            raise StoreMismatchError(
                f"the store at {path} was built from a model with {name} = {built}; found {name} = {found}: "
                "build a store for this model"
            )


def _probe(sites: ModelSites) -> NDArray[np.float32]:
    encoder: Any = sites.encoder
    config = encoder.config
    longest = getattr(config, "max_position_embeddings", None) or _PROBE_TOKENS
    tokens = max(2, min(_PROBE_TOKENS, int(longest) - 4))  # RoBERTa counts positions from 2 on
    ids = (torch.arange(tokens, device=encoder.device) * 7 + 11) % int(config.vocab_size)
    inputs: dict[str, Any] = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]}
    if sites.family.caches:
        inputs["use_cache"] = False
    with in_inference(encoder):
        hidden = encoder(**inputs)[0][0]
    probe: NDArray[np.float32] = hidden.float().cpu().numpy()
    return probe
