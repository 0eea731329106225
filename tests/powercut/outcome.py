"""What came of one part: figures, losses, and what went wrong with the test itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

#: Losses of one store that are shown; all are counted.
SHOWN = 5


@dataclass
class Outcome:
    """What came of one part.

    Parameters
    ----------
    part
        Its name in the table.
    """

    part: str
    #: Store -> what was seen of it while nothing was lost.
    stores: dict[str, str] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    losses: list[tuple[str, str]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def lose(self, store: str, what: str) -> None:
        self.losses.append((store, what))
        print(f"LOST {store}: {what}", flush=True)

    def is_good(self, prove: bool) -> bool:
        """Tell whether it ended as it must: without a loss, or, for `prove`, with one of every store of the disk.

        What is written to a DAX mount is in the file of the NVDIMM at once, flushed or not: no loss can be seen there.
        """
        losers = {store for store, _ in self.losses}
        needed = {store for store in self.stores if store.endswith("-disk")}
        return not self.failures and bool(self.stores) and (losers >= needed if prove else not losers)

    def rows(self, prove: bool) -> list[tuple[str, str, str, str]]:
        """Return the rows of the table."""
        rows = [(self.part, "figures", "ok", ", ".join(f"{k} {v}" for k, v in self.figures.items()))]
        for store in sorted({*self.stores, *(store for store, _ in self.losses)}):
            losses = [what for loser, what in self.losses if loser == store]
            wanted = bool(losses) == prove or (prove and not store.endswith("-disk"))
            seen = f"{len(losses)} losses, the first: {losses[0]}" if losses else self.stores[store]
            rows.append((self.part, store, "ok" if wanted else "FAILED", seen))
            if not prove:
                rows += [(self.part, store, "FAILED", what) for what in losses[1:SHOWN]]
        return rows + [(self.part, "the test itself", "FAILED", what) for what in self.failures]
