"""What prompts have in common is computed once: checkpoints of prefixes, found by what they hold.

A checkpoint is the recurrent state, the convolution window and the pending hidden row where a prefill chunk ended, and
the pages that hold the keys and values before it. It is found by a chain of hashes over the tokens (and a salt, which
keeps tenants apart), at the ends of chunks: where chunks end depends on the tokens before alone, so that going on from a
checkpoint computes the very chunks that would have been computed without it. (A chain of hashes over pages finds what a
radix tree would, and forgets without touching its neighbours: vLLM's design document "Automatic Prefix Caching".)
The least recently used goes first, of equals the shorter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..backend import F32
from .pages import PAGE, Arena


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One sequence at `position`: states [layers, Hv, dk, dv], windows [layers, width - 1, channels], and the post-norm hidden
    row [1, hidden] of the position before."""

    position: int
    state: F32
    columns: F32
    hidden: F32

    @property
    def num_bytes(self) -> int:
        return self.state.nbytes + self.columns.nbytes + self.hidden.nbytes


@dataclass(slots=True)
class Entry:
    """A checkpoint in the index, and the pages of the positions before it."""

    key: bytes
    checkpoint: Checkpoint
    pages: list[int]
    last_used: int


@dataclass(frozen=True, slots=True)
class PrefixStatistics:
    """Since the start: look-ups that found something and did not, prompt tokens found and asked for. Now: entries and their bytes
    without pages, and pages they hold."""

    num_hits: int
    num_misses: int
    num_cached_tokens: int
    num_prompt_tokens: int
    num_entries: int
    num_bytes: int
    num_pages: int


def keys(tokens: Sequence[int], ends: Sequence[int], salt: str) -> Iterator[tuple[int, bytes]]:
    """(position, key of the tokens before it) for each of `ends`, which ascend."""
    chain = hashlib.blake2b(salt.encode(), digest_size=32)
    start = 0
    for end in ends:
        chain.update(np.array(tokens[start:end], "<i8").tobytes())
        start = end
        yield end, chain.digest()


class PrefixIndex:
    """At most `max_bytes` of checkpoints, pages not counted: those are the arena's."""

    def __init__(self, pages: Arena, max_bytes: int) -> None:
        self._pages, self._max_bytes = pages, max_bytes
        self._entries: dict[bytes, Entry] = {}
        self._num_bytes = self._clock = 0
        self._num_hits = self._num_misses = self._num_cached_tokens = self._num_prompt_tokens = 0

    def find(self, tokens: Sequence[int], ends: Sequence[int], salt: str) -> Entry | None:
        """The longest checkpoint of a prefix of `tokens`, all of them excepted: at least one row must be computed for logits."""
        found: Entry | None = None
        for end, key in keys(tokens, ends, salt):
            if end < len(tokens) and key in self._entries:
                found = self._entries[key]
        if found is not None:
            self._clock += 1
            found.last_used = self._clock
        return found

    def count(self, found: Entry | None, num_tokens: int) -> None:
        """One request with so many prompt tokens was admitted, and went on from `found`."""
        self._num_hits += found is not None
        self._num_misses += found is None
        self._num_cached_tokens += found.checkpoint.position if found is not None else 0
        self._num_prompt_tokens += num_tokens

    def publish(self, tokens: Sequence[int], salt: str, checkpoints: Sequence[Checkpoint], table: list[int]) -> None:
        """Takes in the checkpoints of a prompt that are not known yet, with a reference to each page before them."""
        self._clock += 1
        by_position = {checkpoint.position: checkpoint for checkpoint in checkpoints}
        for end, key in keys(tokens, sorted(by_position), salt):
            if key in self._entries:
                self._entries[key].last_used = self._clock
                continue
            pages = table[: -(-end // PAGE)]
            self._pages.share(pages)
            self._entries[key] = Entry(key, by_position[end], pages, self._clock)
            self._num_bytes += by_position[end].num_bytes
        while self._num_bytes > self._max_bytes:
            self.evict()

    def evict(self, but: Entry | None = None) -> bool:
        """Forgets the least valuable entry, `but` excepted. Whether there was one."""
        candidates = [entry for entry in self._entries.values() if entry is not but]
        if not candidates:
            return False
        entry = min(candidates, key=lambda each: (each.last_used, each.checkpoint.position))
        del self._entries[entry.key]
        self._num_bytes -= entry.checkpoint.num_bytes
        self._pages.give_back(entry.pages)
        return True

    @property
    def holders(self) -> list[list[int]]:
        """The pages of each entry."""
        return [entry.pages for entry in self._entries.values()]

    def statistics(self) -> PrefixStatistics:
        return PrefixStatistics(
            num_hits=self._num_hits,
            num_misses=self._num_misses,
            num_cached_tokens=self._num_cached_tokens,
            num_prompt_tokens=self._num_prompt_tokens,
            num_entries=len(self._entries),
            num_bytes=self._num_bytes,
            num_pages=len({page for entry in self._entries.values() for page in entry.pages}),
        )
