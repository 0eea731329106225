"""Embedders side by side: what they find, how many parameters they have, how long they take.

Run: ``MEMODB_EVAL_DATA=... python -m benchmarks.memo_embedders`` (about ten minutes, on a machine that does nothing
else); ``--quick`` tries it. Writes ``benchmarks/results/embedders.json``.

Found is the similarity (Eq. 1) of the record whose key is nearest, for sequences that no embedder was trained on: 1,500
sentences of SST-2's training set in minilm-sst2, every fifth of which tests. Times are of one layer, hidden size 384,
one batch in memory that is not in the cache.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from time import perf_counter
from typing import Any

import torch

from benchmarks.machine import machine_facts
from benchmarks.memo_data import TASKS, load_batches, load_model
from benchmarks.memo_models import two_threads
from benchmarks.race import scratch
from memodb_transformers import LinearMLP, RandomProjection, Separable
from memodb_transformers.capture import in_inference
from memodb_transformers.embedding import make_keys
from memodb_transformers.samples import Samples
from memodb_transformers.sites import find_memoizable
from memodb_transformers.train_report import LayerTraining
from memodb_transformers.training import split_known, train_layer

HIDDEN, LAYERS, KEY = 384, 2, 128
#: Batches that take turns, so that none of them lies in the cache.
TURNS = 4


def retrieval(count: int) -> dict[str, Any]:
    """Train both embedders on every layer of a real model; means over the layers."""
    task = TASKS["sst2-minilm"]
    model = load_model(task)
    recorded = load_batches(task)[0][: count // task.batch]
    sites = find_memoizable(model)
    rows: dict[str, list[LayerTraining]] = {"mlp": [], "separable": []}
    with scratch() as place:
        with in_inference(model):
            samples = Samples.collect(model, sites, recorded, place, task.padded, "probs")
        known = split_known(len(samples))
        for layer in range(len(sites.layers)):
            sample = samples.layer(layer, known)
            for kind, found in rows.items():
                found.append(train_layer(kind, layer, sample, key_dim=KEY)[1])
    return {
        "layers": {kind: [row.to_dict() for row in found] for kind, found in rows.items()},
        "found": {
            "mlp": _mean(row.found for row in rows["mlp"]),
            "separable": _mean(row.found for row in rows["separable"]),
            "projection": _mean(row.untrained for row in rows["mlp"]),
        },
        "oracle": _mean(row.oracle for row in rows["mlp"]),
        "mean_record": _mean(row.mean for row in rows["mlp"]),
    }


def _mean(values: Any) -> float:
    return fmean(value for value in values if value is not None)


def times(rounds: int) -> list[dict[str, Any]]:
    """Time one layer's keys; embedders take turns."""
    rows = []
    for padded in (64, 128, 512):
        kinds: dict[str, Any] = {
            "mlp": LinearMLP.create(padded, HIDDEN, LAYERS, key_dim=KEY),
            "separable": Separable.create(padded, HIDDEN, LAYERS, key_dim=KEY),
            "projection": RandomProjection.create(padded, HIDDEN, key_dim=KEY),
        }
        for batch in (8, 32):
            states = [torch.randn(batch, padded, HIDDEN) for _ in range(TURNS)]
            lengths = torch.full((batch,), padded)
            taken: dict[str, list[float]] = {kind: [] for kind in kinds}
            for turn in range(rounds + 2):
                for kind, embedder in kinds.items():
                    began = perf_counter()
                    make_keys(embedder, turn % LAYERS, states[turn % TURNS], lengths)
                    if turn > 1:
                        taken[kind].append(perf_counter() - began)
            for kind, embedder in kinds.items():
                arrays = embedder.arrays().values()
                shared = 1 if kind == "projection" else LAYERS
                rows.append(
                    {
                        "kind": kind,
                        "padded": padded,
                        "batch": batch,
                        "ms": 1e3 * median(taken[kind]),
                        "parameters_of_a_layer": sum(array.size for array in arrays) // shared,
                    }
                )
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few sentences, nothing written")
    given = parser.parse_args(arguments)
    with two_threads():
        measured = times(3 if given.quick else 41)
        found = retrieval(128 if given.quick else 1500)
    results = [{"times": measured, "retrieval": found}]
    text = json.dumps({"machine": machine_facts(), "profile": "full", "results": results}, indent=1) + "\n"
    if given.quick:
        print(text)
    else:
        (Path(__file__).with_name("results") / "embedders.json").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
