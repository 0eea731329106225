"""Text files into batches of one padded length."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["read_text", "to_batches"]


def read_text(path: str | os.PathLike[str], limit: int | None = None) -> tuple[list[str], list[int] | None]:
    """Read sentences, and labels where there are any.

    Parameters
    ----------
    path
        A ``.tsv`` file with the header ``sentence<TAB>label`` (the label column may be missing; labels are integers),
        or any other text file with one sentence a line.
    limit
        Read at most so many sentences, evenly spread over the file.

    Raises
    ------
    FileNotFoundError
        No file is there.
    ValueError
        The file is empty, its header has no ``sentence``, or a label is no integer.
    """
    file = Path(path)
    labels: list[int] | None = None
    with file.open(encoding="utf-8", newline="") as lines:
        if file.suffix.lower() == ".tsv":
            table = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
            if "sentence" not in (table.fieldnames or ()):
                raise ValueError(
                    f"expected {file} to begin with the header sentence<TAB>label; found {table.fieldnames}"
                )
            rows = [row for row in table if row["sentence"]]
            sentences = [row["sentence"].strip() for row in rows]
            if rows and "label" in (table.fieldnames or ()):
                try:
                    labels = [int(row["label"]) for row in rows]
                except (TypeError, ValueError) as error:
                    raise ValueError(f"expected an integer label in every line of {file}; found {error}") from error
        else:
            sentences = [line.strip() for line in lines if line.strip()]
    if not sentences:
        raise ValueError(f"expected at least one sentence in {file}; found none")
    if limit is not None and limit < len(sentences):
        chosen = [i * len(sentences) // limit for i in range(limit)]
        sentences = [sentences[i] for i in chosen]
        labels = None if labels is None else [labels[i] for i in chosen]
    return sentences, labels


def to_batches(
    tokenizer: Any,
    sentences: Sequence[str],
    labels: Sequence[int] | None,
    *,
    padded_length: int,
    batch_size: int,
    buckets: Sequence[int] = (),
) -> list[dict[str, Tensor]]:
    """Tokenize sentences into batches, all padded on the right, or cut, to one length.

    With buckets, sentences of like length come together, and each batch is padded to the smallest bucket that holds it.

    Parameters
    ----------
    tokenizer
        A transformers tokenizer.
    sentences, labels
        Texts and, optionally, their classes.
    padded_length
        Tokens L of every sequence.
    batch_size
        Sequences a batch; the last one may be smaller.
    buckets
        Lengths to choose from, instead of ``padded_length``.

    Returns
    -------
    list of dict
        ``input_ids``, ``attention_mask`` int64 ``[n, L]`` and, with labels, ``labels`` int64 ``[n]``.
    """
    lengths = sorted(buckets) or [padded_length]
    order = list(range(len(sentences)))
    counts = [0] * len(sentences)
    if buckets:
        counts = [len(ids) for ids in tokenizer(list(sentences), truncation=True, max_length=lengths[-1])["input_ids"]]
        order.sort(key=counts.__getitem__)
    batches = []
    for start in range(0, len(sentences), batch_size):
        rows = order[start : start + batch_size]
        longest = max(counts[row] for row in rows)
        encoded = tokenizer(
            [sentences[row] for row in rows],
            padding="max_length",
            padding_side="right",
            truncation=True,
            max_length=next(length for length in lengths if length >= longest),
            return_tensors="pt",
        )
        batch = {name: encoded[name] for name in ("input_ids", "attention_mask")}
        if labels is not None:
            batch["labels"] = torch.tensor([labels[row] for row in rows])
        batches.append(batch)
    return batches
