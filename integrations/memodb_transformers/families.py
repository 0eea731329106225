"""Which architectures can be memoized: one frozen row each.

A row says which class is the self-attention, where it hangs, how it projects K and V, how it ends, and what its
arguments mean. Nothing is imported from the models: classes are told by their names.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .projections import Finish, FusedConv1D, FusedLinear, Interleaved, Nothing, Output, Projection, Residual, Separate

__all__ = ["Family", "families"]


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
        Class of the self-attention. Its forward takes ``hidden_states [n, L, H]`` and returns ``(output, probabilities
        or None)``.
    model_class
        Class of the bare encoder or decoder: the one that sees the 2-D attention mask of the caller.
    attribute
        Name under which the attention hangs at its parent.
    projection
        How K and V are projected.
    finish
        What comes after the context.
    heads, head_dim
        Names of attributes: heads in the module's configuration (``config.<heads>``), width of one in the module.
    causal
        Whether a position attends to earlier ones only.
    rotary
        Whether K is rotated before it is cached, by the ``position_embeddings`` the module is called with.
    caches
        Whether the module fills a key/value cache; its projection then projects K as well.
    normed
        Whether the attention sees its input normalised, while the layer goes on with what it was.
    shared
        Whether one module serves several layers, so that layers are told apart by the order of calls.
    asks_for_probabilities
        Whether probabilities are returned for ``output_attentions=True`` (outside the attention registry), or by the
        eager implementation.
    masks_rows
        Whether positions of padding attend to nothing, which makes their probabilities all equal.
    batch_arguments, common_arguments
        Tensors the module is called with: those with one row for each sequence, or one for all; and those of no batch.
        Any other tensor sends the batch the original way.
    """

    name: str
    module: str
    attention_class: str
    model_class: str
    attribute: str = "self"
    projection: Projection = field(default_factory=Separate)
    finish: Finish = field(default_factory=Nothing)
    heads: str = "num_attention_heads"
    head_dim: str = "attention_head_size"
    causal: bool = False
    rotary: bool = False
    caches: bool = False
    normed: bool = False
    shared: bool = False
    asks_for_probabilities: bool = False
    masks_rows: bool = False
    batch_arguments: frozenset[str] = frozenset({"attention_mask", "position_ids"})
    common_arguments: frozenset[str] = frozenset()


def _modeling(name: str) -> str:
    folder = name.replace("-", "_")
    return f"transformers.models.{folder}.modeling_{folder}"


def _bert_like(name: str, prefix: str) -> Family:
    return Family(name, _modeling(name), f"{prefix}SelfAttention", f"{prefix}Model")


def _deberta(name: str, model_class: str, projection: Projection) -> Family:
    return Family(
        name,
        _modeling(name),
        "DisentangledSelfAttention",
        model_class,
        projection=projection,
        asks_for_probabilities=True,
        masks_rows=True,
        batch_arguments=frozenset({"attention_mask", "relative_pos"}),
        common_arguments=frozenset({"rel_embeddings"}),
    )


_ROTARY = frozenset({"attention_mask", "position_ids", "position_embeddings"})

_FAMILIES = (
    _bert_like("bert", "Bert"),
    _bert_like("roberta", "Roberta"),
    _bert_like("xlm-roberta", "XLMRoberta"),
    _bert_like("camembert", "Camembert"),
    _bert_like("electra", "Electra"),
    Family(
        "distilbert",
        _modeling("distilbert"),
        "DistilBertSelfAttention",
        "DistilBertModel",
        attribute="attention",
        projection=Separate("q_lin", "k_lin", "v_lin"),
        finish=Output("out_lin"),
    ),
    Family(
        "albert",
        _modeling("albert"),
        "AlbertAttention",
        "AlbertModel",
        attribute="attention",
        finish=Residual(),
        shared=True,
    ),
    _deberta("deberta", "DebertaModel", Interleaved("in_proj")),
    _deberta("deberta-v2", "DebertaV2Model", Separate("query_proj", "key_proj", "value_proj")),
    Family(
        "modernbert",
        _modeling("modernbert"),
        "ModernBertAttention",
        "ModernBertModel",
        attribute="attn",
        projection=FusedLinear("Wqkv"),
        finish=Output("Wo"),
        head_dim="head_dim",
        batch_arguments=_ROTARY,
    ),
    Family(
        "gpt2",
        _modeling("gpt2"),
        "GPT2Attention",
        "GPT2Model",
        attribute="attn",
        projection=FusedConv1D("c_attn"),
        finish=Output("c_proj"),
        head_dim="head_dim",
        causal=True,
        caches=True,
        normed=True,
    ),
    Family(
        "llama",
        _modeling("llama"),
        "LlamaAttention",
        "LlamaModel",
        attribute="self_attn",
        projection=Separate("q_proj", "k_proj", "v_proj"),
        finish=Output("o_proj"),
        head_dim="head_dim",
        causal=True,
        rotary=True,
        caches=True,
        normed=True,
        batch_arguments=_ROTARY,
    ),
)


def families() -> tuple[Family, ...]:
    """List the supported architectures, one row each."""
    return _FAMILIES
