"""Tiny random models and batches, and a plain reimplementation of what memoized attention should compute."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import memodb

PADDED = 16
VOCABULARY = 60
CLASSES = {
    "bert": ("BertConfig", "BertForSequenceClassification"),
    "roberta": ("RobertaConfig", "RobertaForSequenceClassification"),
    "xlm-roberta": ("XLMRobertaConfig", "XLMRobertaForSequenceClassification"),
    "camembert": ("CamembertConfig", "CamembertForSequenceClassification"),
    "electra": ("ElectraConfig", "ElectraForSequenceClassification"),
}


def tiny_model(family: str = "bert", *, attention: str = "sdpa", layers: int = 2, seed: int = 0) -> Any:
    """Make a random classifier in evaluation mode, with weights large enough for attention to differ by input."""
    config_class, model_class = (getattr(transformers, name) for name in CLASSES[family])
    config = config_class(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=PADDED + 8,
        initializer_range=0.3,
        pad_token_id=0,
        attn_implementation=attention,
    )
    torch.manual_seed(seed)
    return model_class(config).eval()


def tiny_batch(lengths: Sequence[int], *, seed: int = 1, padded: int = PADDED) -> dict[str, Tensor]:
    """Make random token ids of the lengths given, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (len(lengths), padded), generator=generator)
    mask = (torch.arange(padded) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


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
