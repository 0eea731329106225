"""Table 3: size of the database, time to train the embedder, time to index, for three sizes."""

from __future__ import annotations

import sys
from time import perf_counter

import numpy as np

import memodb
import memodb_transformers as mt
from benchmarks.paper.alone import alone
from benchmarks.paper.experiment import Experiment, Result, table
from benchmarks.paper.workbench import Workbench

MODEL = "minilm-sst2"


def run(bench: Workbench) -> Result:
    """Build stores of three sizes whole."""
    rows = []
    for sentences in bench.choose((1024, 2048, 4096), (96, 192)):
        recorded = bench.batches(MODEL, recorded=sentences, tried=32)[0]
        with bench.place("tab03") as (path,):
            report = mt.build(bench.model(MODEL), recorded, path, store_dtype="bfloat16", profile=False)
            stages = {stage.name: stage.seconds for stage in report.stages}
            with memodb.MemoDB.open(path) as db:
                query = np.zeros((1, db.key_dim), np.float32)
                began = perf_counter()
                for namespace in db.namespaces():
                    db.search(query, 1, namespace=namespace)
                searching = perf_counter() - began
                namespaces, on_store = len(db.namespaces()), db.stats()["bytes_on_store"]
        rows.append(
            {
                "sentences": report.sequences,
                "records": report.records,
                "bytes": on_store,
                "training_seconds": stages["sample"] + stages["train"],
                "recording_seconds": stages["record"],
                "indexing_seconds": stages["index"],
                "namespaces": namespaces,
                "first_search_seconds": searching,
            }
        )
    return {"rows": rows}


def text(result: Result) -> str:
    """Print a column a size, as the paper does in rows."""
    header = ["sentences", "records", "size, GB", "embedder training, s", "recording, s", "indexing, s"]
    header += ["namespaces", "first search in each of them, s"]
    lines = [
        [
            row["sentences"],
            row["records"],
            row["bytes"] / 1e9,
            row["training_seconds"],
            row["recording_seconds"],
            row["indexing_seconds"],
            row["namespaces"],
            row["first_search_seconds"],
        ]
        for row in result["rows"]
    ]
    return "minilm-sst2, six layers, L = 64, bfloat16, the paper's MLP embedder.\n\n" + table(header, lines)


EXPERIMENT = Experiment(
    name="tab03_build",
    where="Table 3",
    title="Size of the database, training of the embedder, indexing",
    paper="L = 512: 4,000, 6,000 and 8,000 sequences take 575, 855 and 1,130 GB; training takes about 1, 1.5 and 3 "
    "hours, indexing 192, 278 and 454 s. L = 1,024: 1,000, 1,500 and 2,000 sequences take 630, 940 and 1,250 GB; about "
    "1.2, 1.4 and 2 hours; 128, 176 and 384 s.",
    differs="BERT alone. Six layers, L = 64, bfloat16: a record is 96 KiB instead of 12 MiB (of float32, it seems: "
    "575 GB "
    "for 4,000 sequences of 12 layers). Training draws 1,500 sentences at most, so it does not grow with the database. "
    "Keys of a layer and length are a namespace of their own, and so few that they are searched one by "
    "one: the index stage of the build has little to do, and the first search, which reads all keys, is given beside "
    "it.",
    run=run,
    text=text,
)

if __name__ == "__main__":
    sys.exit(alone(EXPERIMENT))
