"""LMDB's two meta pages, which name the newest tree, and the seals behind them.

The layout is that of LMDB 0.9 (``MDB_page``, ``MDB_meta``, ``MDB_db`` in mdb.c), little-endian, 64 bits. LMDB has
no checksum for them. So a *seal* lies behind each, in the part of its page that LMDB does not use: the number of the
transaction, and the CRC-32C of what LMDB wrote.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from memodb.checksum import crc32c
from memodb.errors import FormatVersionError

_MAGIC, _VERSION, _META = 0xBEEFC0DE, 1, 8
_NO_ROOT = (1 << 64) - 1
#: Bytes of the header of every page: number, pad, flags, end of the node offsets, begin of the nodes.
HEADER = 16
PAGE = struct.Struct("<QHHHH")
_META_HEAD = struct.Struct("<IIQQ")  # magic, version, address, size of the map
_TREE = struct.Struct("<IHHQQQQQ")  # pad, flags, depth, branch, leaf and overflow pages, entries, root
_META_TAIL = struct.Struct("<QQ")  # last page, transaction
#: Bytes of a meta page that LMDB writes.
META_BYTES = HEADER + _META_HEAD.size + 2 * _TREE.size + _META_TAIL.size
_SEAL = struct.Struct("<8sQII")  # magic, transaction, CRC-32C of the meta but its transaction, of the seal up to here
_SEAL_MAGIC = b"MDBSEAL1"
#: Where in a meta page its seal is.
SEAL_AT = 256
_DEEPEST = 32


class Damage(Exception):
    """What is wrong with a page; who reads it adds which file."""


class Tree(NamedTuple):
    """One of the two trees that a meta page names."""

    flags: int
    depth: int
    pages: int
    root: int


class Meta(NamedTuple):
    """What a meta page says: the trees of a transaction, and the last page that is in use; `held` pages are there.

    `sealed` tells whether its seal is there, and so that every byte of it is as it was committed.
    """

    transaction: int
    last: int
    page_bytes: int
    held: int
    free: Tree
    main: Tree
    sealed: bool


def parse_meta(page: bytes, number: int, page_bytes: int, held: int, name: str) -> Meta:
    """Return what a meta page says; `name` is that of its file, which has `held` pages.

    Raises
    ------
    Damage
        If it cannot be true.
    FormatVersionError
        If another version of LMDB wrote it.
    """
    if len(page) < page_bytes:
        raise Damage(f"it ends within meta page {number}: it was truncated")
    if PAGE.unpack_from(page)[2] != _META:
        raise Damage(f"page {number} is no meta page")
    magic, version, _, _ = _META_HEAD.unpack_from(page, HEADER)
    if magic != _MAGIC:
        raise Damage(f"meta page {number} has the magic {magic:#010x}, expected {_MAGIC:#010x}")
    if version != _VERSION:
        raise FormatVersionError(
            f"{name}: meta page {number} has LMDB's data version {version}, this memodb reads {_VERSION}; "
            "copy the store with the memodb that wrote it"
        )
    free, main = (_tree(page, number, i) for i in (0, 1))
    last, transaction = _META_TAIL.unpack_from(page, META_BYTES - _META_TAIL.size)
    sealed = _check_seal(page, number, transaction)
    if _TREE.unpack_from(page, HEADER + _META_HEAD.size)[0] != page_bytes or last < 1 or last >> 50:
        raise Damage(f"meta page {number} has impossible sizes")
    if transaction and transaction & 1 != number:
        raise Damage(f"meta page {number} bears transaction {transaction}, which belongs into the other one")
    if max(free.root, main.root) > last:
        raise Damage(f"meta page {number} names a root beyond its last page")
    return Meta(transaction, last, page_bytes, held, free, main, sealed)


def page_size(head: bytes) -> int:
    """Return the bytes of a page, from the first bytes of the file."""
    if len(head) < META_BYTES:
        raise Damage(f"it is {len(head)} bytes long: it was truncated")
    found: int = _TREE.unpack_from(head, HEADER + _META_HEAD.size)[0]
    if found.bit_count() != 1 or not 1 << 9 <= found <= 1 << 16:
        raise Damage(f"meta page 0 says that pages have {found} bytes")
    return found


def _tree(page: bytes, number: int, which: int) -> Tree:
    _, flags, depth, branches, leaves, _, _, root = _TREE.unpack_from(
        page, HEADER + _META_HEAD.size + which * _TREE.size
    )
    # The free list's tree has integers as keys (8); its flags hold those of the environment as well.
    wrong = flags if which else flags & 0x8 == 0
    if wrong or depth > _DEEPEST or (depth == 0) != (root == _NO_ROOT) or branches + leaves >> 50:
        raise Damage(f"meta page {number} describes an impossible tree")
    return Tree(flags, depth, branches + leaves, 0 if root == _NO_ROOT else root)


def _sealed_part(page: bytes) -> bytes:
    return page[HEADER : META_BYTES - 8]


def written_by(page: bytes) -> int:
    """Return the number of the transaction that a meta page was written by."""
    return int(_META_TAIL.unpack_from(page, META_BYTES - _META_TAIL.size)[1])


def pack_seal(page: bytes, transaction: int) -> bytes:
    """Return the seal of a meta page, of which `page` has at least the first `META_BYTES`."""
    first = struct.pack("<8sQI", _SEAL_MAGIC, transaction, crc32c(_sealed_part(page)))
    return first + struct.pack("<I", crc32c(first))


def is_overtaken(page: bytes, newest: int) -> bool:
    """Tell whether a damaged meta page is of an older transaction than the `newest`, by its own number and its seal's.

    Where a commit's write of its meta page fails, LMDB puts the number of the transaction before back and leaves the
    rest as it came: the page is damaged then, and the store sound. LMDB goes by the page with the greater number, and
    takes of the other one only that it is a meta page; the next commit writes it anew.
    """
    if len(page) < SEAL_AT + _SEAL.size or PAGE.unpack_from(page)[2] != _META:
        return False
    if _META_HEAD.unpack_from(page, HEADER)[:2] != (_MAGIC, _VERSION):
        return False
    seal = _seal_of(page)
    return written_by(page) < newest and (seal is None or seal[0] < newest)


def _seal_of(page: bytes) -> tuple[int, int] | None:
    """Return (transaction, CRC-32C of the meta) of the seal in a meta page, None if there is no whole one."""
    magic, sealed, checksum, own = _SEAL.unpack_from(page, SEAL_AT)
    if magic != _SEAL_MAGIC or own != crc32c(page[SEAL_AT : SEAL_AT + _SEAL.size - 4]):
        return None
    return sealed, checksum


def _check_seal(page: bytes, number: int, transaction: int) -> bool:
    """Compare a meta page with its seal; return whether it has that of its transaction.

    It need not: a writer may have been killed before it could seal.
    """
    seal = _seal_of(page)
    if seal is None:
        return False
    sealed, checksum = seal
    same = checksum == crc32c(_sealed_part(page))
    if sealed > transaction or (sealed == transaction) != same:
        raise Damage(f"meta page {number} (transaction {transaction}) does not match its seal (of {sealed})")
    return sealed == transaction
