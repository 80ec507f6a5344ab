"""ngram-mod: one table for all sequences, from the hash of the last n tokens to the token that followed (llama.cpp,
docs/speculative.md). Unlike there, an entry says which key it is of, and what one tenant wrote another does not find.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from .base import NOTHING, Lookup, Proposal

TABLE_SIZE = 2**22
#: Drafts in a row of which less than a quarter is right, after which all is forgotten.
NUM_FAILURES = 5


class Table:
    """Next tokens by the place a key's hash gives, each with 32 more bits of the hash. 32 MiB; what is not written costs nothing."""

    def __init__(self, size: int = TABLE_SIZE) -> None:
        self._size = size
        self.num_failures = 0
        self.clear()

    def clear(self) -> None:
        self._checks, self._next = np.zeros(self._size, np.uint32), np.full(self._size, -1, np.int32)
        self.num_used = self.num_failures = 0

    def put(self, key: int, token: int) -> None:
        place = key % self._size
        if self._next[place] < 0:
            self.num_used += 1
            if self.num_used > self._size // 4:
                self.clear()
                self.num_used = 1
        self._checks[place], self._next[place] = key >> 32 & 0xFFFFFFFF, token

    def get(self, key: int) -> int:
        """The token, or -1."""
        place = key % self._size
        return int(self._next[place]) if self._checks[place] == key >> 32 & 0xFFFFFFFF else -1


class Mod(Lookup):
    def __init__(self, table: Table, n_match: int, n_min: int, salt: str) -> None:
        super().__init__()
        self._table, self._n_match, self._n_min = table, n_match, n_min
        self._salt = int.from_bytes(hashlib.blake2b(salt.encode(), digest_size=7).digest(), "little")
        self._has_proposed = False

    def _key(self, tokens: Sequence[int]) -> int:
        return hash((self._salt, *tokens))

    def extend(self, tokens: Sequence[int]) -> None:
        size = self._n_match
        for token in tokens:
            if len(self.tokens) >= size and token >= 0:  # an embedding row has an id below 0, which is nobody's to draft
                self._table.put(self._key(self.tokens[-size:]), token)
            self.tokens.append(token)

    def propose(self, ahead: tuple[int, ...], limit: int) -> Proposal:
        newest = list(self.newest(self._n_match, ahead))
        self._has_proposed &= len(ahead) > 1
        if len(newest) < self._n_match:
            return NOTHING
        while len(newest) < self._n_match + limit and (token := self._table.get(self._key(newest[-self._n_match :]))) >= 0:
            newest.append(token)
        found = tuple(newest[self._n_match :])
        if len(found) < self._n_min:
            return NOTHING
        self._has_proposed |= len(ahead) == 1
        return found, (0.7,) * len(found)

    def heard(self, num_tested: int, num_right: int) -> None:
        if self._has_proposed and num_tested:
            table = self._table
            table.num_failures = table.num_failures + 1 if 4 * num_right < num_tested else 0
            if table.num_failures == NUM_FAILURES:
                table.clear()
