"""Siamese training of an embedder: distances of keys shall say how unlike the records are.

As in the AttMemo paper (its section 5.2): two hidden states go through the same embedder, and the 2-norm between their
keys is fitted to what it should be, one minus the similarity score (Eq. 1) of their records. Hard pairs, sequences
with the most similar records of all, are sought out; random pairs are far apart and teach little about who is nearest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from time import perf_counter

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .embedding import Embedder, LinearMLP, RandomProjection
from .forward import Ints
from .samples import LayerSample
from .separable import Separable, principal_tokens, separable_keys, token_width
from .train_report import LayerTraining

__all__ = ["TRAINED", "assemble", "retrieval", "split_known", "train_layer"]

TRAINED = ("mlp", "separable")
DEFAULT_EPOCHS = 30

_ANCHORS = 16
_PARTNERS = 3
_NEAREST = 8
# Training ends when so many passes, and so many steps, have brought nothing.
_PATIENCE = 4
_PATIENT_STEPS = 200
_TESTED = 5  # every fifth sequence of a sample tests what the others taught
_RATE = {"mlp": 3e-4, "separable": 1e-3}
_WIDTH = 128
# A pair at this distance counts half as much as one at distance 0: what decides a search are the near ones.
_NEAR = 0.1


def split_known(count: int) -> NDArray[np.bool_]:
    """Tell which sequences of a sample are trained on; the others test."""
    known: NDArray[np.bool_] = np.arange(count) % _TESTED != _TESTED - 1
    return known


def retrieval(
    keys: NDArray[np.float32], sample: LayerSample, tests: Sequence[tuple[int, Ints]] | None = None
) -> float | None:
    """Mean similarity of the record that the nearest key finds.

    Parameters
    ----------
    keys, sample
        Keys of the sample, float32 ``[n, key_dim]``, and what is known of it.
    tests
        The sequences that are looked for, and the known ones of their length; default: all that are not known.
    """
    found = []
    for row, candidates in _tests(sample) if tests is None else tests:
        distances = ((keys[candidates] - keys[row]) ** 2).sum(axis=1)
        found.append(float(sample.similarities[row, candidates[distances.argmin()]]))
    return float(np.mean(found)) if found else None


def train_layer(
    kind: str,
    layer: int,
    sample: LayerSample,
    *,
    key_dim: int = 128,
    epochs: int | None = None,
    seed: int = 0,
) -> tuple[dict[str, NDArray[np.float32]], LayerTraining]:
    """Train the embedder of one layer.

    Parameters
    ----------
    kind
        ``"mlp"`` or ``"separable"``.
    layer, sample
        The layer, and what is known of it.
    key_dim
        Components of a key.
    epochs
        Most passes over the sample; training stops before when retrieval no longer improves. Default 30.
    seed
        Of what is drawn at first and of the order; equal seeds give equal embedders, with as many threads.

    Returns
    -------
    dict, LayerTraining
        The parameters of this layer, for :func:`assemble`, and how it went.
    """
    # Whatever the caller runs the model in, this is training in full precision.
    with torch.inference_mode(mode=False), torch.autocast("cpu", enabled=False):
        return _train(kind, layer, sample, key_dim, DEFAULT_EPOCHS if epochs is None else epochs, seed)


def _train(
    kind: str, layer: int, sample: LayerSample, key_dim: int, epochs: int, seed: int
) -> tuple[dict[str, NDArray[np.float32]], LayerTraining]:
    began = perf_counter()
    trainee = _Trainee(kind, sample.hidden.shape[1], sample.hidden.shape[2], key_dim, seed + 1000 * layer)
    anchors = np.flatnonzero(sample.known & (np.isfinite(sample.similarities[:, sample.known]).sum(axis=1) > 1))
    # What decides when to stop does not also tell how good it is: that would be the best of many looks.
    stops = list(_tests(sample))[::2]
    tests = list(_tests(sample))[1::2] or stops
    done = 0
    best = trainee.copy()
    if len(anchors):
        trainee.begin_with(sample)
        trainee.rescale(sample)
        best = trainee.copy()
    if len(anchors) and stops:
        random = np.random.default_rng(seed + layer)
        patience = max(_PATIENCE, -(-_PATIENT_STEPS * _ANCHORS // len(anchors)))
        score, waited = retrieval(trainee.embed(sample), sample, stops) or 0.0, 0
        optimizer = torch.optim.AdamW(trainee.parameters, lr=_RATE[kind], weight_decay=1e-2)
        with torch.enable_grad():
            for _ in range(epochs):
                for rows in _batches(sample, anchors, random):
                    loss = _loss(trainee.keys(sample.hidden[rows], sample.lengths[rows]), sample, rows)
                    optimizer.zero_grad(set_to_none=True)
                    loss.backward()
                    optimizer.step()
                done += 1
                now = retrieval(trainee.embed(sample), sample, stops) or 0.0
                if now > score + 1e-4:
                    best, score, waited = trainee.copy(), now, 0
                else:
                    waited += 1
                    if waited >= patience:
                        break
    trainee.restore(best)
    arrays = trainee.folded()
    found = retrieval(trainee.embed(sample), sample, tests)
    return arrays, LayerTraining(
        layer=layer,
        found=found,
        untrained=retrieval(_projected(sample, key_dim, seed), sample, tests),
        oracle=float(np.mean([sample.similarities[row, known].max() for row, known in tests])) if tests else None,
        mean=float(np.nanmean(sample.to_mean[[row for row, _ in tests]])) if tests else None,
        tested=len(tests),
        epochs=done,
        seconds=perf_counter() - began,
    )


def assemble(kind: str, layers: list[dict[str, NDArray[np.float32]]]) -> Embedder:
    """Put the parameters of all layers together into one embedder."""
    names = ("weights", "biases") if kind == "mlp" else ("tokens", "mixing", "biases")
    stacked = [np.stack([arrays[name] for arrays in layers]) for name in names]
    made: Embedder = LinearMLP(*stacked) if kind == "mlp" else Separable(*stacked)
    return made


class _Trainee:
    """The parameters of one layer's embedder, as they are trained."""

    def __init__(self, kind: str, padded: int, width: int, key_dim: int, seed: int) -> None:
        self._kind = kind
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int, fan_in: int) -> Tensor:
            drawn: Tensor = torch.randn(*shape, generator=generator, dtype=torch.float32) / fan_in**0.5
            return drawn.requires_grad_()

        bias = torch.zeros(key_dim, dtype=torch.float32).requires_grad_()
        if kind == "mlp":
            sizes = (padded * width, _WIDTH, _WIDTH, key_dim)
            self.parameters = [draw(size, after, fan_in=size) for size, after in pairwise(sizes)]
            self.parameters += [torch.zeros(after, dtype=torch.float32).requires_grad_() for after in sizes[1:-1]] + [
                bias
            ]
        else:
            few = token_width(width, key_dim)
            tokens = draw(width, few, fan_in=width)
            self.parameters = [tokens, draw(padded, few, key_dim, fan_in=padded * few), bias]

    def keys(self, hidden: Tensor, lengths: Ints) -> Tensor:
        """Embed hidden states float32 ``[n, L, H]``; what lies beyond their lengths is zero already."""
        if self._kind == "mlp":
            first, second, third, one, two, bias = self.parameters
            keys: Tensor = ((hidden.flatten(1) @ first + one) @ second + two) @ third + bias
            return keys
        return separable_keys(hidden, torch.from_numpy(lengths), *self.parameters)

    def embed(self, sample: LayerSample) -> NDArray[np.float32]:
        """Embed a whole sample, without gradients."""
        with torch.no_grad():
            parts = [
                self.keys(sample.hidden[start : start + 256], sample.lengths[start : start + 256])
                for start in range(0, len(sample.lengths), 256)
            ]
        found: NDArray[np.float32] = torch.cat(parts).numpy()
        return found

    def begin_with(self, sample: LayerSample) -> None:
        """Let a separable one begin with the directions in which the tokens of known sequences differ most."""
        if self._kind == "separable":
            tokens = self.parameters[0]
            # Nothing is known of a sequence that is not even like itself: its numbers are not finite.
            known = sample.known & np.isfinite(sample.similarities.diagonal())
            found = principal_tokens(sample.hidden, torch.from_numpy(sample.lengths * known), tokens.shape[1])
            if found is not None:
                with torch.no_grad():
                    tokens.copy_(found)

    def rescale(self, sample: LayerSample) -> None:
        """Let distances be of the size that they should have, on average: the rest is easier to learn."""
        keys = torch.from_numpy(self.embed(sample))
        wanted, counted = _targets(sample, np.arange(len(sample.lengths)))
        mean = float(torch.cdist(keys, keys)[counted].mean())
        if mean > 0:
            last = self.parameters[2 if self._kind == "mlp" else 1]
            with torch.no_grad():
                last.mul_(float(wanted[counted].mean()) / mean)

    def copy(self) -> list[Tensor]:
        """Copy the parameters."""
        return [part.detach().clone() for part in self.parameters]

    def restore(self, parameters: list[Tensor]) -> None:
        """Go back to earlier parameters."""
        with torch.no_grad():
            for part, earlier in zip(self.parameters, parameters, strict=True):
                part.copy_(earlier)

    def folded(self) -> dict[str, NDArray[np.float32]]:
        """Return the parameters as they are used: the three linear layers of the MLP are one matrix and a bias."""
        with torch.no_grad():
            if self._kind == "mlp":
                first, second, third, one, two, bias = self.parameters
                return {
                    "weights": (first @ (second @ third)).numpy(),
                    "biases": ((one @ second + two) @ third + bias).numpy(),
                }
            names = ("tokens", "mixing", "biases")
            return {name: part.detach().numpy() for name, part in zip(names, self.parameters, strict=True)}


def _tests(sample: LayerSample) -> Iterator[tuple[int, Ints]]:
    """Give each sequence that is not known and the known ones of its length."""
    for row in np.flatnonzero(~sample.known).tolist():
        candidates = np.flatnonzero(sample.known & np.isfinite(sample.similarities[row]))
        if len(candidates):
            yield row, candidates


def _batches(sample: LayerSample, anchors: Ints, random: np.random.Generator) -> Iterator[Ints]:
    """Give batches of some anchors, and for each some of the sequences whose records are most like its own."""
    order = random.permutation(anchors)
    for start in range(0, len(order), _ANCHORS):
        some = order[start : start + _ANCHORS]
        # Neighbours in length as well, so that a batch has many pairs that can be compared.
        chosen = [some]
        for anchor in some.tolist():
            similar = np.where(sample.known, sample.similarities[anchor], np.nan)
            similar[anchor] = np.nan
            partners = np.flatnonzero(np.isfinite(similar))
            if len(partners):
                nearest = partners[np.argsort(-similar[partners], kind="stable")[:_NEAREST]]
                chosen.append(random.choice(nearest, size=min(_PARTNERS, len(nearest)), replace=False))
                chosen.append(random.choice(partners, size=1))
        yield np.unique(np.concatenate(chosen))


def _targets(sample: LayerSample, rows: Ints) -> tuple[Tensor, NDArray[np.bool_]]:
    """Tell what the distances of some sequences should be, and which pairs count."""
    wanted = 1.0 - sample.similarities[np.ix_(rows, rows)]
    counted = np.isfinite(wanted)
    np.fill_diagonal(counted, val=False)
    return torch.from_numpy(np.where(counted, wanted, 0.0).astype(np.float32)), counted


def _loss(keys: Tensor, sample: LayerSample, rows: Ints) -> Tensor:
    """Squared error of the 2-norms between keys, nearer pairs counting more."""
    wanted, counted = _targets(sample, rows)
    pairs = torch.from_numpy(np.argwhere(np.triu(counted)))
    apart = (keys[pairs[:, 0]] - keys[pairs[:, 1]]).square().sum(dim=1)
    distance = (apart + 1e-12).sqrt()
    target = wanted[pairs[:, 0], pairs[:, 1]]
    weight = 1.0 / (_NEAR + target)
    loss: Tensor = (weight * (distance - target).square()).sum() / weight.sum().clamp(min=1e-6)
    return loss


def _projected(sample: LayerSample, key_dim: int, seed: int) -> NDArray[np.float32]:
    """Embed a sample by a random projection."""
    mixes = max(part for part in (1, 2, 4, 8) if key_dim % part == 0)
    plain = RandomProjection.create(
        sample.hidden.shape[1], sample.hidden.shape[2], key_dim=key_dim, mixes=mixes, seed=seed
    )
    with torch.no_grad():
        return plain.embed(0, sample.hidden, torch.from_numpy(sample.lengths))
