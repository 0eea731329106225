"""Checksums of what a gather returns: none, once for each record, or always."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Literal, get_args

import numpy as np

from memodb.checksum import record_checksums
from memodb.errors import InvalidOptionError

Verify = Literal["never", "first", "always"]
Ids = np.ndarray[Any, np.dtype[np.int64]]


class Checks:
    """What one handle checks of the records that it returns.

    Parameters
    ----------
    mode
        "never"; "first": each record the first time that this handle returns it; "always".

    Raises
    ------
    InvalidOptionError
        If `mode` is none of these.
    """

    def __init__(self, mode: Verify) -> None:
        if not isinstance(mode, str) or mode not in get_args(Verify):
            raise InvalidOptionError(f"verify must be 'never', 'first' or 'always', found {mode!r}")
        self.mode: Verify = mode
        #: Records whose checksum was computed.
        self.checked = 0
        self._known = np.zeros(0, np.bool_)
        self.renew_lock()

    def renew_lock(self) -> None:
        """Take a fresh lock (in a forked child, which goes by what its parent checked)."""
        self._lock = threading.Lock()

    def damaged(
        self, ids: Ids, records: np.ndarray[Any, Any], expected: Callable[[Ids], np.ndarray[Any, np.dtype[np.uint32]]]
    ) -> tuple[Ids, np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Compare the records of a batch with their checksums, as far as this handle checks them.

        Parameters
        ----------
        ids
            int64 [n].
        records
            [n, ...], each C-contiguous.
        expected
            Returns the CRC-32C that were committed.

        Returns
        -------
        tuple
            Ids of those that do not match, the CRC-32C found and the one expected.
        """
        none = np.zeros(0, np.int64)
        if self.mode == "never" or not len(ids):
            return none, none, none
        distinct, places = np.unique(ids, return_index=True)
        if self.mode == "first":
            new = ~self._is_known(distinct)
            distinct, places = distinct[new], places[new]
            if not len(distinct):
                return none, none, none
        sums, wanted = record_checksums(records, places), expected(distinct)
        wrong = sums != wanted
        with self._lock:
            self.checked += len(distinct)
            if self.mode == "first":
                self._note(distinct[~wrong])
        return distinct[wrong], sums[wrong], wanted[wrong]

    def _is_known(self, ids: Ids) -> np.ndarray[Any, np.dtype[np.bool_]]:
        known = self._known  # another thread may put a larger one in its place
        found = np.zeros(len(ids), np.bool_)
        inside = np.searchsorted(ids, len(known))
        found[:inside] = known[ids[:inside]]
        return found

    def _note(self, ids: Ids) -> None:
        if len(ids) and ids[-1] >= len(self._known):
            grown = np.zeros(max(int(ids[-1]) + 1, 2 * len(self._known), 1024), np.bool_)
            grown[: len(self._known)] = self._known
            self._known = grown
        self._known[ids] = True
