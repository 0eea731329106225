"""What reuse does to a real classifier: both targets, both ways to look up, all levels, beside the plain model.

Run: ``MEMODB_EVAL_DATA=... python -m benchmarks.memo_quality`` (half an hour; with ``--recorded 2000 --tried 300
--repeats 1`` a few minutes); ``--quick`` tries it.

MEMODB_EVAL_DATA names a folder with ``models/minilm-sst2``, ``models/debertav2-sst2`` and ``data/sst2``. Writes
``benchmarks/results/quality.json``; every layer is memoized, so that hit rates can be compared.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

import memodb_transformers as mt
from benchmarks.machine import machine_facts
from benchmarks.memo_models import two_threads
from benchmarks.race import scratch
from memodb_transformers.data import read_text, to_batches

MODELS = ("minilm-sst2", "debertav2-sst2")
PADDED, BATCH = 64, 32
TARGETS = (("probs", "float16"), ("context", "float16"))


def measure(root: Path, name: str, recorded: int, tried: int, repeats: int) -> list[dict[str, Any]]:
    """Build a store of each target, and evaluate each way to look up."""
    folder = root / "models" / name
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    known, new = (
        to_batches(
            tokenizer,
            *read_text(root / "data" / "sst2" / file, count),
            padded_length=PADDED,
            batch_size=BATCH,
        )
        for file, count in (("train.tsv", recorded), ("dev.tsv", tried))
    )
    rows = []
    for target, store_dtype in TARGETS:
        with scratch() as place:
            mt.build(model, known, place / "store", target=target, store_dtype=store_dtype)
            for lookup in ("layer", "sequence"):
                report = mt.evaluate(
                    model,
                    new,
                    place / "store",
                    kinds=("plain", "nearest"),
                    layers="all",
                    lookup=lookup,
                    similarity=False,
                    repeats=repeats,
                )
                for row in report.rows:
                    if row["level"] is not None or not rows:
                        rows.append(
                            {
                                "model": name,
                                "target": target,
                                "lookup": lookup,
                                "recorded": recorded,
                                "tried": tried,
                                **row,
                            }
                        )
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure all models and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few sentences, nothing written")
    parser.add_argument("--recorded", type=int, default=6000, help="sentences of the training set in the store")
    parser.add_argument("--tried", type=int, default=872, help="sentences of the development set")
    parser.add_argument("--repeats", type=int, default=3, help="timed passes")
    given = parser.parse_args(arguments)
    quick = given.quick
    data = os.environ.get("MEMODB_EVAL_DATA")
    if not data:
        print("memo_quality: MEMODB_EVAL_DATA names no folder with models and data", file=sys.stderr)
        return 1
    results = []
    with two_threads():
        for name in MODELS:
            sizes = (200, 64, 1) if quick else (given.recorded, given.tried, given.repeats)
            results += measure(Path(data), name, *sizes)
    written = {"machine": machine_facts(), "profile": "full", "results": results}
    text = json.dumps(written, indent=1) + "\n"
    if quick:
        print(text)
    else:
        (Path(__file__).with_name("results") / "quality.json").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
