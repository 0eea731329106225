"""Guard pages: what a batch gave back is never used again, and touching it is a SIGSEGV. For processes of their own."""

from __future__ import annotations

from memodb import vm
from memodb.gather.window import POOL, Pool, Range

#: Address and length of every range that was given back.
fenced: dict[int, int] = {}
#: Addresses of ranges that were given back twice: two batches would have shared them.
twice: list[int] = []


def install() -> None:
    """From now on the pool fences every range that comes back: nothing can be mapped there any more, or touched."""

    def fence(pool: Pool, owned: Range) -> None:
        pool.vmas -= owned.vmas
        vm.map_nothing(owned.address, owned.nbytes)
        if owned.address in fenced:
            twice.append(owned.address)
        fenced[owned.address] = owned.nbytes

    Pool._sort_in = fence  # type: ignore[method-assign]
    assert not POOL._kept
    assert not POOL._empty
    assert not POOL._buffers
