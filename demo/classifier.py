"""A small DeBERTa-v2 classifier with its own word-piece vocabulary, trained from scratch in about a minute.

DeBERTa, because its disentangled attention is where reuse saves most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import DebertaV2Config, DebertaV2ForSequenceClassification, PreTrainedTokenizerFast

from memodb_transformers.data import to_batches

__all__ = ["Recipe", "train"]


#: Attention like that of the published DeBERTa-v3 models, with fewer buckets for so few positions.
_DISENTANGLED: dict[str, Any] = {
    "relative_attention": True,
    "position_buckets": 32,
    "pos_att_type": ["c2p", "p2c"],
    "position_biased_input": False,
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
}


@dataclass(frozen=True)
class Recipe:
    """Sizes of the model and of its training; the padded length is in tokens."""

    padded_length: int = 64
    hidden: int = 256
    layers: int = 4
    heads: int = 8
    vocabulary: int = 6000
    epochs: int = 3
    batch_size: int = 32
    learning_rate: float = 8e-4


def train(
    texts: Sequence[str], labels: Sequence[int], classes: int, recipe: Recipe, *, progress: bool | None = None
) -> tuple[DebertaV2ForSequenceClassification, Any]:
    """Train a classifier; returns it, in evaluation mode, with its tokenizer."""
    torch.manual_seed(0)
    tokenizer = _tokenizer(texts, recipe.vocabulary)
    config = DebertaV2Config(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        intermediate_size=2 * recipe.hidden,
        max_position_embeddings=recipe.padded_length,
        type_vocab_size=0,
        **_DISENTANGLED,
    )
    config.num_labels = classes
    model = DebertaV2ForSequenceClassification(config)
    # Texts of about one length go together, so that little of a batch is padding.
    order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
    batches = to_batches(
        tokenizer,
        [texts[number] for number in order],
        [labels[number] for number in order],
        padded_length=recipe.padded_length,
        batch_size=recipe.batch_size,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=0.01)
    steps = recipe.epochs * len(batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.1 * steps + 1), max(0.0, (steps - step) / (0.9 * steps)))
    )
    model.train()
    disable = None if progress is None else not progress
    with tqdm(total=steps, desc="training", unit="batch", disable=disable) as bar:
        for _ in range(recipe.epochs):
            for number in torch.randperm(len(batches)).tolist():
                # Only as many columns as the longest text needs: training does not depend on the padded length.
                batch = batches[number]
                longest = int(batch["attention_mask"].sum(dim=1).max())
                short = {name: value[:, :longest] if value.dim() == 2 else value for name, value in batch.items()}
                loss = model(**short).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad(set_to_none=True)
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
                bar.update()
    return model.eval(), tokenizer


def _tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    pieces = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    pieces.normalizer = normalizers.BertNormalizer(lowercase=True)
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pieces.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=vocabulary, special_tokens=special, show_progress=False)
    )
    ends = [(token, special.index(token)) for token in ("[SEP]", "[CLS]")]  # ids begin with the special tokens
    pieces.post_processor = processors.BertProcessing(*ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=pieces, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
