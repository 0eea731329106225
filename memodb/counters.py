"""What one handle did since it was opened, for `MemoDB.stats`."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import numpy as np

_COUNT_EVERY = 256


@dataclass
class Counters:
    """Counts of one handle (not persisted, not shared)."""

    puts: int = 0
    records_put: int = 0
    gathers: int = 0
    records_gathered: int = 0
    bytes_mapped: int = 0
    bytes_copied: int = 0
    searches: int = 0
    keys_searched: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _uncounted: list[np.ndarray[Any, np.dtype[np.int64]]] = field(default_factory=list, repr=False)
    _hits: np.ndarray[Any, np.dtype[np.uint32]] = field(default_factory=lambda: np.zeros(0, np.uint32), repr=False)

    def gathered(self, ids: np.ndarray[Any, np.dtype[np.int64]], nbytes: int, *, mapped: bool) -> None:
        """Count one gather of `ids` with `nbytes` in all."""
        with self._lock:
            self.gathers += 1
            self.records_gathered += len(ids)
            if mapped:
                self.bytes_mapped += nbytes
            else:
                self.bytes_copied += nbytes
            self._uncounted.append(ids)  # counting takes as long as the rest of a small gather: later, many at once
            if len(self._uncounted) >= _COUNT_EVERY:
                self._count_hits()

    def _count_hits(self) -> None:
        ids = np.concatenate([np.zeros(0, np.int64), *self._uncounted])
        self._uncounted.clear()
        if len(ids):
            top = int(ids.max())
            if top >= len(self._hits):
                # Zero pages cost nothing until they are counted in.
                grown = np.zeros(max(top + 1, 2 * len(self._hits), 1024), np.uint32)
                used = np.flatnonzero(self._hits)
                grown[used] = self._hits[used]
                self._hits = grown
            np.add.at(self._hits, ids, 1)

    def to_dict(self) -> dict[str, Any]:
        """Return the counts, and a summary of hits per record."""
        counts: dict[str, Any] = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return {**counts, "hits_per_record": self.hits_per_record()}

    def hits_per_record(self) -> dict[str, Any]:
        """Return how many records were gathered how often."""
        with self._lock:
            self._count_hits()
            hits = self._hits[self._hits > 0]
        times, records = np.unique(hits, return_counts=True)
        return {
            "times": {str(number): int(count) for number, count in zip(times, records, strict=True)},
            "records_hit": len(hits),
            "max": int(hits.max(initial=0)),
            "mean": float(hits.mean()) if len(hits) else 0.0,
        }
