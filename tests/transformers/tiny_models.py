"""Tiny random models and batches, and a plain reimplementation of what memoized attention should compute."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import memodb

PADDED = 16
VOCABULARY = 60

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": PADDED + 8,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
_DEBERTA = {**_COMMON, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 8}


@dataclass(frozen=True)
class Kind:
    """How a tiny model of one family is made, and how it treats the tokens it is given."""

    prefix: str
    config: Mapping[str, Any]
    layers: str = "num_hidden_layers"
    head: str = "ForSequenceClassification"
    attentions: Sequence[str] = ("sdpa", "eager")
    causal: bool = False
    query_and_key: Sequence[str] = ("query", "key")


FAMILIES = {
    "bert": Kind("Bert", _COMMON),
    "roberta": Kind("Roberta", _COMMON),
    "xlm-roberta": Kind("XLMRoberta", _COMMON),
    "camembert": Kind("Camembert", _COMMON),
    "electra": Kind("Electra", {**_COMMON, "embedding_size": 32}),
    "distilbert": Kind(
        "DistilBert",
        {
            "vocab_size": VOCABULARY,
            "dim": 32,
            "n_heads": 4,
            "hidden_dim": 48,
            "max_position_embeddings": PADDED + 8,
            "initializer_range": 0.3,
            "pad_token_id": 0,
        },
        layers="n_layers",
        query_and_key=("q_lin", "k_lin"),
    ),
    "albert": Kind("Albert", {**_COMMON, "embedding_size": 16}),
    "deberta": Kind("Deberta", _DEBERTA, attentions=("eager",), query_and_key=("in_proj",)),
    "deberta-v2": Kind(
        "DebertaV2",
        {**_DEBERTA, "position_buckets": 4, "norm_rel_ebd": "layer_norm", "share_att_key": True},
        attentions=("eager",),
        query_and_key=("query_proj", "key_proj"),
    ),
    "modernbert": Kind(
        "ModernBert",
        {
            **_COMMON,
            "local_attention": 8,
            "cls_token_id": 1,
            "bos_token_id": 1,
            "sep_token_id": 2,
            "eos_token_id": 2,
        },
        query_and_key=("Wqkv",),
    ),
    "gpt2": Kind(
        "GPT2",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 32,
            "n_head": 4,
            "n_positions": PADDED + 16,
            "initializer_range": 0.3,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        layers="n_layer",
        head="LMHeadModel",
        causal=True,
        query_and_key=("c_attn",),
    ),
    "llama": Kind(
        "Llama",
        {**_COMMON, "num_key_value_heads": 2, "max_position_embeddings": PADDED + 16, "pad_token_id": 0},
        head="ForCausalLM",
        causal=True,
        query_and_key=("q_proj", "k_proj"),
    ),
}


def tiny_model(
    family: str = "bert",
    *,
    attention: str | None = None,
    layers: int = 2,
    seed: int = 0,
    head: str | None = None,
    **config: Any,
) -> Any:
    """Make a random model in evaluation mode, with weights large enough for attention to differ by input."""
    kind = FAMILIES[family]
    settings = {**kind.config, kind.layers: layers, **config}
    made = getattr(transformers, f"{kind.prefix}Config")(
        **settings, attn_implementation=attention or kind.attentions[0]
    )
    torch.manual_seed(seed)
    return getattr(transformers, kind.prefix + (head or kind.head))(made).eval()


def tiny_batch(
    lengths: Sequence[int], *, seed: int = 1, padded: int = PADDED, left: Sequence[int] = ()
) -> dict[str, Tensor]:
    """Make random token ids of the lengths given, padded on the right, or on the left in the rows named."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (len(lengths), padded), generator=generator)
    mask = (torch.arange(padded) < torch.tensor(lengths)[:, None]).long()
    ids = ids * mask
    for row in left:
        ids[row], mask[row] = (part[row].roll(padded - lengths[row]) for part in (ids, mask))
    return {"input_ids": ids, "attention_mask": mask}


def rows_of(batch: Mapping[str, Tensor], rows: Sequence[int]) -> dict[str, Tensor]:
    """Take some rows of a batch, in the order given."""
    return {name: value[list(rows)] for name, value in batch.items()}


def join(*batches: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put batches one below the other."""
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def states(model: Any, batch: Mapping[str, Tensor], **settings: Any) -> Tensor:
    """Run a model in inference: the last hidden state ``[n, L, H]``, with zeros where padding is."""
    with torch.no_grad():
        found: Tensor = model.base_model(**batch, **settings)[0].float()
    return found * batch["attention_mask"][:, :, None]


def states_alone(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Run each sequence by itself, as :func:`states`."""
    return torch.cat([states(model, rows_of(batch, [row])) for row in range(len(batch["input_ids"]))])


@contextmanager
def counted_projections(model: Any, names: Sequence[str]) -> Iterator[list[str]]:
    """Note each call of the parts of that name: the projections of Q and K."""
    calls: list[str] = []
    found = [module for name, module in model.named_modules() if name.rsplit(".", 1)[-1] in names]
    assert found

    def note(part: Any, *_: object) -> None:
        if any(part is one for one in found):
            calls.append(type(part).__name__)

    # Of all modules: fused projections that have hooks of their own are not cut into parts.
    handle = torch.nn.modules.module.register_module_forward_hook(note)
    try:
        yield calls
    finally:
        handle.remove()


def logits(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Run a model in inference."""
    with torch.no_grad():
        found: Tensor = model(**batch).logits
    return found


def records_by_length(path: Path, layer: int) -> dict[int, Tensor]:
    """Read the one record that a store has of each length in a layer."""
    found = {}
    with memodb.MemoDB.open(path) as db:
        for length in range(1, PADDED + 1):
            ids = db.ids(namespace=f"layer={layer}/len={length}")
            if len(ids):
                assert len(ids) == 1
                found[length] = torch.from_numpy(db.multiget(ids)[0]).float()
    return found


def reference_logits(model: Any, batch: Mapping[str, Tensor], stored: Sequence[Mapping[int, Tensor]]) -> Tensor:
    """Compute row by row what a memoized BERT should: with the stored record of the row's length where there is one."""
    rows = []
    with torch.no_grad():
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            hidden = model.bert.embeddings(input_ids=ids[None])
            for number, layer in enumerate(model.bert.encoder.layer):
                attention = layer.attention.self

                def split(states: Tensor, heads: int = attention.num_attention_heads) -> Tensor:
                    return states.view(1, len(ids), heads, -1).transpose(1, 2)  # noqa: B023

                probabilities = stored[number].get(int(mask.sum()))
                if probabilities is None:
                    query, key = split(attention.query(hidden)), split(attention.key(hidden))
                    scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[-1])
                    probabilities = scores.masked_fill(mask == 0, -torch.inf).softmax(dim=-1)
                context = probabilities @ split(attention.value(hidden))
                attended = layer.attention.output(context.transpose(1, 2).reshape(hidden.shape), hidden)
                hidden = layer.feed_forward_chunk(attended)
            rows.append(model.classifier(model.bert.pooler(hidden)))
    return torch.cat(rows)


def snapshot(model: Any) -> dict[str, Any]:
    """Describe a model's object graph: module and parameter identities, hooks, modes, attention implementation."""
    return {
        "modules": [(name, id(module), module.training) for name, module in model.named_modules()],
        "parameters": [(name, id(parameter)) for name, parameter in model.named_parameters()],
        "state": list(model.state_dict()),
        "hooks": [
            (name, len(module._forward_hooks), len(module._forward_pre_hooks), "forward" in vars(module))
            for name, module in model.named_modules()
        ],
        "attention": model.config._attn_implementation,
    }
