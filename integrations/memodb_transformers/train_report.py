"""What training an embedder tells of itself."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .reports import markdown_table

__all__ = ["LayerTraining", "TrainingReport"]


@dataclass(frozen=True, slots=True)
class LayerTraining:
    """How the training of one layer went.

    Similarities are means over sequences that were neither trained on nor used to decide when to stop.

    Attributes
    ----------
    layer
        Its number.
    found
        Similarity (Eq. 1) of the record whose key is nearest.
    untrained
        The same for a random projection, which knows nothing of records.
    oracle
        Similarity of the most similar record there is.
    mean
        Similarity of the mean of all records of the length.
    tested
        Sequences that these are means over; 0: too few to train on, and the embedder is as it began.
    epochs, seconds
        Passes over the sample, and wall-clock time.
    """

    layer: int
    found: float | None
    untrained: float | None
    oracle: float | None
    mean: float | None
    tested: int
    epochs: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain types."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class TrainingReport:
    """How the training of an embedder went.

    Attributes
    ----------
    kind
        ``"mlp"`` or ``"separable"``.
    sequences
        Sequences in the sample; every tenth decides when to stop, every tenth tests.
    parameters
        Numbers that the embedder holds, all layers together.
    layers
        One row a layer.
    """

    kind: str
    sequences: int
    parameters: int
    layers: tuple[LayerTraining, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain types."""
        return asdict(self)

    def to_markdown(self) -> str:
        """Return the report as Markdown."""
        header = ("layer", "found", "random projection", "best there is", "mean record", "epochs", "seconds")
        rows = [(r.layer, r.found, r.untrained, r.oracle, r.mean, r.epochs, r.seconds) for r in self.layers]
        tested = max((row.tested for row in self.layers), default=0)
        note = (
            f"Embedder {self.kind!r}, {self.parameters} parameters, from a sample of {self.sequences} sequences. "
            f"Similarity (Eq. 1) of what is found, for {tested} of them that training did not see.\n"
        )
        return markdown_table(header, rows) + "\n" + note
