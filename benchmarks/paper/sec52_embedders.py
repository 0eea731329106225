"""Section 5.2: an MLP against a CNN and a transformer layer as the embedder: what they find, what they take."""

from __future__ import annotations

import sys
from statistics import fmean, stdev
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import memodb_transformers as mt
from benchmarks.clock import take_turns, timed
from benchmarks.paper.alone import alone
from benchmarks.paper.experiment import Experiment, Result, table
from benchmarks.paper.probabilities import capture
from benchmarks.paper.workbench import Workbench

MODEL, KEY = "minilm-sst2", 128
#: As the paper says of its times: a batch of 64 sequences of 128 tokens, of a base-sized model.
BATCH, LENGTH, HIDDEN = 64, 128, 768


class Mlp(nn.Module):
    """Three linear layers on the flattened hidden state, the middle ones of width 128."""

    def __init__(self, length: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(length * hidden, 128), nn.Linear(128, 128), nn.Linear(128, KEY))

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """Embed states ``[n, L, H]``."""
        return self.layers((states * mask[..., None]).flatten(1))


class Cnn(nn.Module):
    """Two convolutions over the positions, and the mean of what they say."""

    def __init__(self, length: int, hidden: int) -> None:
        super().__init__()
        self.first = nn.Conv1d(hidden, 256, 5, padding=2)
        self.second = nn.Conv1d(256, KEY, 5, padding=2)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """Embed states ``[n, L, H]``."""
        found = self.second(torch.relu(self.first((states * mask[..., None]).transpose(1, 2))))
        return (found * mask[:, None]).sum(dim=2) / mask.sum(dim=1, keepdim=True)


class Transformer(nn.Module):
    """One transformer layer, and the mean of what it says, projected."""

    def __init__(self, length: int, hidden: int) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(hidden, 12, 2 * hidden, dropout=0.0, batch_first=True)
        self.last = nn.Linear(hidden, KEY)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """Embed states ``[n, L, H]``."""
        found = self.layer(states, src_key_padding_mask=mask == 0)
        return self.last((found * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True))


KINDS = {"MLP": Mlp, "CNN, two layers": Cnn, "transformer, one layer": Transformer}


def run(bench: Workbench) -> Result:
    """Train all alike on the first layer, and time them."""
    return {"times": _times(bench.choose(9, 2)), "retrieval": _retrieval(bench)}


def _times(rounds: int) -> dict[str, float]:
    states, mask = torch.randn(BATCH, LENGTH, HIDDEN), torch.ones(BATCH, LENGTH)
    with torch.inference_mode():
        embedders: dict[str, Any] = {name: kind(LENGTH, HIDDEN).eval() for name, kind in KINDS.items()}
        folded = mt.LinearMLP.create(LENGTH, HIDDEN, 1, key_dim=KEY)
        cheap = mt.Separable.create(LENGTH, HIDDEN, 1, key_dim=KEY)
        lengths = torch.full((BATCH,), LENGTH)
        ways = {name: lambda embed=embed: embed(states, mask) for name, embed in embedders.items()}
        ways["MLP, folded into one matrix (memodb)"] = lambda: folded.embed(0, states, lengths)
        ways["separable (memodb)"] = lambda: cheap.embed(0, states, lengths)
        turns = {name: timed(lambda _, way=way: way()) for name, way in ways.items()}
        samples = take_turns(turns, lambda: None, rounds=rounds, seconds=60.0, least=2)
    return {name: samples[name].median() for name in ways}


def _retrieval(bench: Workbench) -> Result:
    count, epochs = bench.choose((1504, 12), (192, 2))
    batches = bench.batches(MODEL, recorded=count, tried=32)[0]
    model = bench.another(MODEL)
    probabilities = capture(model, batches, [0])
    parts = []
    with torch.inference_mode():
        for batch in batches:
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            parts.append(model(**inputs, output_hidden_states=True).hidden_states[0])
    states = torch.cat(parts).clone()
    lengths = probabilities.lengths
    mask = (torch.arange(states.shape[1]) < torch.from_numpy(lengths)[:, None]).float()
    groups = {}
    for length in np.unique(lengths):
        rows = np.flatnonzero(lengths == length)
        if len(rows) > 4:
            records = probabilities.layers[0][torch.from_numpy(rows)]
            groups[int(length)] = (rows, mt.similarity_matrix(records, records, int(length)))
    tests = np.arange(len(lengths)) % 5 == 4
    found: Result = {"sentences": count, "epochs": epochs, "found": {}, "seconds": {}}
    found["exhaustive"] = _found(groups, tests, None)
    nothing = np.random.default_rng(0).standard_normal((len(lengths), KEY)).astype(np.float32)
    found["random"] = _found(groups, tests, nothing)  # keys that tell nothing: any record of the length
    for name, kind in KINDS.items():
        torch.manual_seed(0)
        began = perf_counter()
        trained = _train(kind(states.shape[1], states.shape[2]), states, mask, groups, tests, epochs)
        found["seconds"][name] = perf_counter() - began
        found["found"][name] = _found(groups, tests, trained)
    return found


def _train(
    embedder: nn.Module, states: Tensor, mask: Tensor, groups: Any, tests: NDArray[np.bool_], epochs: int
) -> NDArray[np.float32]:
    """Fit distances of pairs to one minus their similarity; returns the keys of all."""
    random = np.random.default_rng(0)
    optimizer = torch.optim.AdamW(embedder.parameters(), lr=3e-4)
    for _ in range(epochs):
        for length in random.permutation(list(groups)):
            rows, similar = groups[int(length)]
            known = random.permutation(np.flatnonzero(~tests[rows]))
            for start in range(0, len(known) - 1, 32):
                part = known[start : start + 32]
                chosen = torch.from_numpy(rows[part])
                keys = embedder(states[chosen], mask[chosen])
                first, second = np.triu_indices(len(part), 1)
                if not len(first):
                    continue
                apart = ((keys[first] - keys[second]).square().sum(dim=1) + 1e-12).sqrt()
                wanted = torch.from_numpy(1.0 - similar[part[first], part[second]])
                loss = (apart - wanted).square().mean()
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
    with torch.inference_mode():
        found = [embedder(s, m) for s, m in zip(states.split(128), mask.split(128), strict=True)]
    keys_of_all: NDArray[np.float32] = torch.cat(found).numpy()
    return keys_of_all


def _found(groups: Any, tests: NDArray[np.bool_], keys: NDArray[np.float32] | None) -> list[float]:
    """Mean similarity of what the nearest key finds, or of the most similar record; and its standard error."""
    scores = []
    for rows, similar in groups.values():
        known = np.flatnonzero(~tests[rows])
        for row in np.flatnonzero(tests[rows]):
            if len(known):
                if keys is None:
                    place = similar[row, known].argmax()
                else:
                    place = ((keys[rows[known]] - keys[rows[row]]) ** 2).sum(axis=1).argmin()
                scores.append(float(similar[row, known[place]]))
    return [fmean(scores), stdev(scores) / len(scores) ** 0.5]


def _with_error(found: list[float] | None) -> str:
    return "-" if found is None else f"{found[0]:.3f} ± {found[1]:.3f}"


def text(result: Result) -> str:
    """Print what they find and take."""
    found = result["retrieval"]
    lines = [
        [name, _with_error(found["found"].get(name)), found["seconds"].get(name), 1e3 * seconds]
        for name, seconds in result["times"].items()
    ]
    note = (
        f"Trained alike on layer 0 of {MODEL}, {found['sentences']} sentences, {found['epochs']} passes; an "
        f"exhaustive search finds {found['exhaustive'][0]:.3f}, a random record of the length has a similarity of "
        f"{found['random'][0]:.3f}. One seed, means and their standard errors. Times: {BATCH} sequences of {LENGTH} "
        f"tokens, hidden size {HIDDEN}.\n\n"
    )
    return note + table(["", "similarity found", "training, s", "embedding a batch, ms"], lines)


EXPERIMENT = Experiment(
    name="sec52_embedders",
    where="Section 5.2",
    title="An MLP against a CNN and a transformer layer as the embedder",
    paper="64 sequences of 128 tokens on 24 cores: 5 ms with the MLP, about 100 ms with a CNN of two layers and "
    "150 ms with a transformer layer, at similar accuracy.",
    differs="Two cores. The loss is the paper's, without hard pairs, the same for all three; sizes of the CNN and "
    "of the transformer layer are not given in the paper.",
    run=run,
    text=text,
    version=2,
)

if __name__ == "__main__":
    sys.exit(alone(EXPERIMENT))
