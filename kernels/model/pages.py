"""Keys and values in pages of PAGE positions, shared by reference count.

A page belongs to whoever holds a reference. Several holders may read it; a row is only ever written by the one that was
lent the page new, beyond what the others know of it. Who wants to write into a page that others hold takes a copy first.
"""

from __future__ import annotations

import numpy as np

from ...core.errors import InternalBug
from ...core.protocol import CHUNK
from ..backend import F32

#: Positions a page holds: those of a prefill chunk, so that whole chunks can be shared without copying.
PAGE = CHUNK


#: Keys and values of one page outside an arena: trunk [2, layers, KV, PAGE, D], MTP head [2, 1, KV, PAGE, D].
PageRows = tuple[F32, F32]


class Arena:
    """`num_pages` pages: keys and values of the trunk's attention layers [2, layers, pages, KV, PAGE, D], and of the MTP head's one."""

    def __init__(self, num_pages: int, layers: int, kv_heads: int, head_dim: int) -> None:
        self.num_pages = num_pages
        self._allocate(num_pages, layers, kv_heads, head_dim)
        self._references = [0] * num_pages
        self._free = list(reversed(range(num_pages)))  # the last given back goes first: those never used stay with the system
        self._num_touched = 0  # pages from here on have never been lent, and hold zeros

    def _allocate(self, num_pages: int, layers: int, kv_heads: int, head_dim: int) -> None:
        shape = (num_pages, kv_heads, PAGE, head_dim)
        # Zeros are taken from the system untouched: a page costs memory once it is written.
        self.trunk = np.zeros((2, layers, *shape), np.float32)
        self.mtp = np.zeros((2, 1, *shape), np.float32)

    def clear(self, pages: list[int]) -> None:
        self.trunk[:, :, pages] = 0
        self.mtp[:, :, pages] = 0

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> tuple[list[int], list[int]]:
        """New pages, with one reference each; and those of them that former holders wrote into, which are to be cleared. InternalBug when
        there are too few."""
        if count > len(self._free):
            raise InternalBug(f"{count} pages wanted of {len(self._free)}")
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._references[page] = 1
        used = sorted(page for page in pages if page < self._num_touched)
        self._num_touched = max(self._num_touched, *(page + 1 for page in pages), 0)
        return pages, used

    def share(self, pages: list[int]) -> None:
        """One reference more to each."""
        for page in pages:
            if not self._references[page]:
                raise InternalBug(f"page {page} is nobody's")
            self._references[page] += 1

    def give_back(self, pages: list[int]) -> None:
        """One reference less to each; a page without any is free."""
        for page in pages:
            if not self._references[page]:
                raise InternalBug(f"page {page} was given back too often")
            self._references[page] -= 1
            if not self._references[page]:
                self._free.append(page)

    def is_alone(self, page: int) -> bool:
        """Whether there is one reference to it."""
        return self._references[page] == 1

    @property
    def page_bytes(self) -> int:
        return (self.trunk.nbytes + self.mtp.nbytes) // self.num_pages

    def read(self, page: int) -> PageRows:
        """A copy of all of a page."""
        return self.trunk[:, :, page].copy(), self.mtp[:, :, page].copy()

    def write(self, page: int, rows: PageRows) -> None:
        """All of a page."""
        self.trunk[:, :, page], self.mtp[:, :, page] = rows

    def rows_of(self, trunk: F32, mtp: F32, i: int) -> PageRows:
        """The i-th page of keys and values [2, layers, KV, positions, D], zeros after their end."""
        rows: list[F32] = []
        for positions in (trunk, mtp):
            part = positions[:, :, :, i * PAGE : (i + 1) * PAGE]
            whole = np.zeros((*part.shape[:3], PAGE, part.shape[4]), np.float32)
            whole[:, :, :, : part.shape[3]] = part
            rows.append(whole)
        return rows[0], rows[1]

    def check_integrity(self, holders: list[list[int]]) -> None:
        """InternalBug unless the pages that `holders` hold are the ones referred to, each as often, and all others are free once."""
        counts = [0] * self.num_pages
        for pages in holders:
            for page in pages:
                counts[page] += 1
        if counts != self._references:
            wrong = [page for page in range(self.num_pages) if counts[page] != self._references[page]]
            raise InternalBug(f"pages {wrong[:10]} are held {[counts[p] for p in wrong[:10]]} times, not as counted")
        if sorted(self._free) != [page for page in range(self.num_pages) if not counts[page]]:
            raise InternalBug("the free pages are not those that nobody holds")


class KeyValues:
    """One sequence's keys and values, in the pages of `table`. Rows at and after the position written from are void."""

    def __init__(self, arrays: F32, table: list[int]) -> None:
        self.arrays, self.table = arrays, table

    def write(self, layer: int, position: int, keys: F32, values: F32) -> tuple[F32, F32]:
        """Rows [R, KV, D] from `position`; returns the layer's keys and values [KV, at least position + R, D], in order of position."""
        end = position + len(keys)
        pages = self.arrays[:, layer]
        start = position
        while start < end:
            stop = min(end, (start // PAGE + 1) * PAGE)
            page, rows, at = self.table[start // PAGE], slice(start - position, stop - position), start % PAGE
            pages[0, page, :, at : at + stop - start] = keys[rows].swapaxes(0, 1)
            pages[1, page, :, at : at + stop - start] = values[rows].swapaxes(0, 1)
            start = stop
        seen = pages[:, self.table[: -(-end // PAGE)]].swapaxes(1, 2)  # [2, KV, pages, PAGE, D]
        both = seen.reshape(2, seen.shape[1], -1, seen.shape[-1])
        return both[0], both[1]

    def read(self, num_positions: int) -> F32:
        """The first rows of all layers: [2, layers, KV, num_positions, D], a copy."""
        pages = self.arrays[:, :, self.table[: -(-num_positions // PAGE)]].swapaxes(2, 3)
        return np.ascontiguousarray(pages.reshape(*pages.shape[:3], -1, pages.shape[-1])[..., :num_positions, :])

    def restore(self, rows: F32) -> None:
        """What `read` gave, into this sequence's own pages."""
        for start in range(0, rows.shape[3], PAGE):
            part = rows[:, :, :, start : start + PAGE]
            self.arrays[:, :, self.table[start // PAGE], :, : part.shape[3]] = part
