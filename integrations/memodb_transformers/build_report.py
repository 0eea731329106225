"""What a build tells of itself."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from .condense import CondenseReport
from .performance import ProfileReport
from .reports import markdown_table, readable_bytes
from .train_report import TrainingReport
from .tune_report import TuneReport
from .work import Stage

__all__ = ["BuildReport"]


@dataclass(frozen=True, slots=True)
class BuildReport:
    """What :func:`build` made.

    Attributes
    ----------
    sequences, held_out, skipped
        Sequences recorded; kept out, for the profile and the tuner; left out because their tokens have holes, their
        hidden states are not finite, or they are longer than all buckets.
    layers, records
        Attention layers, and records: one for each layer and sequence.
    record_shape, store_dtype
        Shape and dtype of a record: ``[heads, L, L]`` for probabilities, ``[L, heads * head_dim]`` for contexts. With
        length buckets, those of the longest.
    bytes
        Logical size of the records. Of a condensed store: of the means, which ``records`` counts as well.
    seconds
        Wall-clock time of all stages.
    profile
        The profile, or None where no sequence was held out, all of them repeat recorded ones, or none was asked for;
        with length buckets, see there.
    target
        ``"probs"`` or ``"context"``.
    embedder
        Kind of the embedder.
    training, condensed, tuned
        How these stages went; None where they were not asked for, and with length buckets: see there.
    stages
        Time, memory and bytes of each stage.
    buckets
        With length buckets, the report of each store; the counts above are their sums.
    """

    path: str
    sequences: int
    held_out: int
    skipped: int
    layers: int
    records: int
    record_shape: tuple[int, ...]
    store_dtype: str
    bytes: int
    seconds: float
    profile: ProfileReport | None
    target: str = "probs"
    embedder: str = "projection"
    training: TrainingReport | None = None
    condensed: CondenseReport | None = None
    tuned: TuneReport | None = None
    stages: tuple[Stage, ...] = ()
    buckets: tuple[BuildReport, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain types."""
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in ("profile", "training", "condensed", "tuned"):
            plain[name] = plain[name].to_dict() if plain[name] else None
        plain["stages"] = [asdict(stage) for stage in self.stages]
        plain["buckets"] = [bucket.to_dict() for bucket in self.buckets]
        return plain

    def to_markdown(self) -> str:
        """Return the report as Markdown."""
        rows = [
            ("sequences", self.sequences),
            ("held out", self.held_out),
            ("skipped", self.skipped),
            ("layers", self.layers),
            ("records", self.records),
            ("target", self.target),
            ("embedder", self.embedder),
            ("record", f"{'x'.join(map(str, self.record_shape))} {self.store_dtype}"),
            ("size", readable_bytes(self.bytes)),
            ("seconds", self.seconds),
        ]
        parts = [markdown_table(("store", self.path), rows)]
        parts += [part.to_markdown() for part in (self.training, self.condensed, self.profile, self.tuned) if part]
        if self.stages:
            header = ("stage", "L", "seconds", "peak memory", "on disk", "done before")
            told = [
                (s.name, s.padded_length, s.seconds, readable_bytes(s.peak_memory), readable_bytes(s.bytes), s.resumed)
                for s in self.stages
            ]
            parts.append(markdown_table(header, told))
        return "\n".join([*parts, *(bucket.to_markdown() for bucket in self.buckets)])
