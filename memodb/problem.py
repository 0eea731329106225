"""What `MemoDB.verify` reports."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing that `MemoDB.verify` found wrong.

    Parameters
    ----------
    kind
        "checksum" (bytes changed), "segment" (bytes missing), "keys" (a key damaged or missing), "names" (that of a
        namespace damaged or missing) or "counts" (the catalog contradicts itself).
    message
        What is wrong, where, and what to do.
    id
        The record concerned, None where it is more than one.
    """

    kind: str
    message: str
    id: int | None = None
