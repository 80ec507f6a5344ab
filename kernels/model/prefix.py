"""What prompts have in common is computed once: checkpoints of prefixes, found by what they hold.

A checkpoint is the recurrent state, the convolution window and the pending hidden row where a chunk or an answer ended, and
the blocks that hold the keys and values before it. It is found by a chain of hashes over the tokens (and a salt, which
keeps tenants apart), at the ends of chunks: where chunks end depends on the tokens before alone, so that going on from a
checkpoint computes the very chunks that would have been computed without it. Where a row has the same bits however it was
computed, it is found by the tokens alone, wherever it ends: an answer is the beginning of a conversation's next turn.
(A chain of hashes over pages finds what a radix tree would, and forgets without touching its neighbours: vLLM's design
document "Automatic Prefix Caching".)

What is least valuable moves out first, the least recently used, of equals the shorter: a block from its page into host
memory when pages are wanted, a checkpoint with all its blocks into the files of a folder, if there is one, when host
memory is full; else it is forgotten. Whoever finds it brings it back.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ...core.errors import InternalBug
from ..backend import F32
from .pages import PAGE, Arena, PageRows

#: Of a key, that tell where it ends.
POSITION_BYTES = 4


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


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A sequence at a position, and its keys and values before it: trunk [2, layers, KV, positions, D], MTP head
    [2, 1, KV, positions, D]; and the rows that its prompt has in place of tokens, [n, hidden], where they are wanted."""

    checkpoint: Checkpoint
    trunk: F32
    mtp: F32
    rows: F32

    @property
    def arrays(self) -> dict[str, F32]:
        c = self.checkpoint
        return {"state": c.state, "columns": c.columns, "hidden": c.hidden, "trunk": self.trunk, "mtp": self.mtp, "rows": self.rows}

    @property
    def num_bytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())

    def shapes_at(self, position: int, num_rows: int) -> dict[str, tuple[int, ...]]:
        """Of the arrays of a sequence of the same model at another position, with so many embedding rows."""
        return {
            name: (*array.shape[:3], position, *array.shape[4:]) if name in ("trunk", "mtp") else array.shape
            for name, array in self.arrays.items()
        } | {"rows": (num_rows, *self.rows.shape[1:])}


@dataclass(slots=True, eq=False)
class Block:
    """Keys and values of PAGE positions, or of fewer at the end of a prefix, known to `num_entries` checkpoints: in a page of the arena,
    or moved out of it."""

    place: int | PageRows
    num_entries: int = 0


#: Where a block is that is about to be moved out of its page.
NOWHERE: PageRows = (np.zeros(0, np.float32), np.zeros(0, np.float32))


@dataclass(slots=True, eq=False)
class Entry:
    """A checkpoint in the index, and the blocks of the positions before it."""

    key: bytes
    checkpoint: Checkpoint
    blocks: list[Block]
    last_used: int


@dataclass(frozen=True, slots=True)
class PrefixStatistics:
    """Since the start: look-ups that found something and did not, prompt tokens found and asked for, checkpoints brought back from files.
    Now: checkpoints in memory, their bytes without pages, pages they hold, and checkpoints in files."""

    num_hits: int
    num_misses: int
    num_cached_tokens: int
    num_prompt_tokens: int
    num_loaded: int
    num_entries: int
    num_bytes: int
    num_pages: int
    num_files: int


def keys(tokens: Sequence[int], ends: Sequence[int], salt: str, *, is_by_chunks: bool) -> Iterator[tuple[int, bytes]]:
    """(position, key of the tokens before it, and if it `is_by_chunks`, of where their chunks end) for each of `ends`, which ascend. A key
    begins with its position."""
    chain = hashlib.blake2b(hashlib.blake2b(salt.encode()).digest(), digest_size=32)  # a salt that spells tokens is no other's beginning
    start = 0
    for end in ends:
        chain.update(np.array([end, *tokens[start:end]] if is_by_chunks else tokens[start:end], "<i8").tobytes())
        start = end
        yield end, end.to_bytes(POSITION_BYTES, "big") + chain.digest()


def position_of(key: bytes) -> int:
    return int.from_bytes(key[:POSITION_BYTES], "big")


class PrefixIndex:
    """At most `max_bytes` of checkpoints and of blocks outside the arena. With `is_archived` it forgets nothing by itself: its owner puts
    what is `overdue` elsewhere, and forgets it then."""

    def __init__(self, arena: Arena, max_bytes: int, *, is_by_chunks: bool = True, is_archived: bool = False) -> None:
        """`is_by_chunks`: what is computed of a prompt depends on where its chunks end."""
        self._arena, self._max_bytes = arena, max_bytes
        self._is_by_chunks, self._is_archived = is_by_chunks, is_archived
        self._entries: dict[bytes, Entry] = {}
        self._by_page: dict[int, Block] = {}
        self._clock = self._num_bytes = 0
        self._moving, self._lock = list[tuple[Block, int]](), threading.Lock()
        self._num_hits = self._num_misses = self._num_cached_tokens = self._num_prompt_tokens = self._num_loaded = 0
        self.is_short = False  # of room for what pages are wanted from

    def find(self, tokens: Sequence[int], ends: Sequence[int], salt: str) -> Entry | None:
        """The longest checkpoint of a prefix of `tokens`, all of them excepted: at least one row must be computed for logits."""
        found: Entry | None = None
        for _, key in self.keys(tokens, ends, salt, map(position_of, self._entries)):
            if key in self._entries:
                found = self._entries[key]
        if found is not None:
            self._clock += 1
            found.last_used = self._clock
        return found

    def keys(self, tokens: Sequence[int], ends: Sequence[int], salt: str, known: Iterable[int]) -> Iterator[tuple[int, bytes]]:
        """Those that a prompt whose chunks end at `ends` may go on from, where `known` are the positions of all there are."""
        where = ends if self._is_by_chunks or not ends else sorted(set(known))
        return keys(tokens, [end for end in where if end < len(tokens)], salt, is_by_chunks=self._is_by_chunks)

    def count(self, found: Entry | None, num_tokens: int) -> None:
        """One request with so many prompt tokens was admitted, and went on from `found`."""
        self._num_hits += found is not None
        self._num_misses += found is None
        self._num_cached_tokens += found.checkpoint.position if found is not None else 0
        self._num_prompt_tokens += num_tokens

    def publish(self, tokens: Sequence[int], ends: Sequence[int], salt: str, checkpoints: Sequence[Checkpoint], table: list[int]) -> None:
        """Takes in the checkpoints of a prompt whose chunks ended at `ends` that are not known yet, with the pages before them."""
        self._clock += 1
        by_position = {checkpoint.position: checkpoint for checkpoint in checkpoints}
        for end, key in keys(tokens, ends, salt, is_by_chunks=self._is_by_chunks):
            if key in self._entries:
                self._entries[key].last_used = self._clock
            elif end in by_position:
                self._add(key, by_position[end], [self._block_of(page) for page in table[: -(-end // PAGE)]])
        while not self._is_archived and (entry := self.overdue()) is not None:
            self.forget(entry)

    def overdue(self, more_bytes: int = 0) -> Entry | None:
        """The least valuable checkpoint, if there is no room for so many bytes more."""
        if not self._entries or (self._num_bytes + more_bytes <= self._max_bytes and not self.is_short):
            return None
        return self._least_valuable(None)

    def size_of(self, snapshot: Snapshot) -> int:
        """Bytes that it would take in the index."""
        return snapshot.checkpoint.num_bytes + -(-snapshot.checkpoint.position // PAGE) * self._arena.page_bytes

    def num_bytes(self, entry: Entry) -> int:
        """Of a checkpoint and all blocks before it."""
        return entry.checkpoint.num_bytes + len(entry.blocks) * self._arena.page_bytes

    @property
    def max_bytes(self) -> int:
        return self._max_bytes

    def adopt(self, key: bytes, snapshot: Snapshot) -> None:
        """Takes in what was loaded from a file, if there is room for it."""
        if self._num_bytes + self.size_of(snapshot) > self._max_bytes or key in self._entries:
            return
        self._clock += 1
        self._num_loaded += 1
        num_blocks = -(-snapshot.checkpoint.position // PAGE)
        blocks = [Block(self._arena.rows_of(snapshot.trunk, snapshot.mtp, i)) for i in range(num_blocks)]
        self._num_bytes += num_blocks * self._arena.page_bytes
        self._add(key, snapshot.checkpoint, blocks)

    def _add(self, key: bytes, checkpoint: Checkpoint, blocks: list[Block]) -> None:
        for block in blocks:
            block.num_entries += 1
        self._entries[key] = Entry(key, checkpoint, blocks, self._clock)
        self._num_bytes += checkpoint.num_bytes

    def _block_of(self, page: int) -> Block:
        if page not in self._by_page:
            self._arena.share([page])
            self._by_page[page] = Block(page)
        return self._by_page[page]

    def put_back(self, block: Block, page: int) -> None:
        """A block that had been moved out stands whole in `page` again, which somebody else holds too."""
        if not isinstance(block.place, int):
            self._arena.share([page])
            block.place, self._by_page[page] = page, block
            self._num_bytes -= self._arena.page_bytes

    def give_way(self, num_pages: int, but: Entry | None) -> bool:
        """Moves blocks out of pages that nobody else holds, `num_pages` of them if there are, and forgets the least valuable checkpoints
        where there is no room for them; `but` stays as it is. Whether a page has become free."""
        kept, before = set[Block](but.blocks if but is not None else ()), self._arena.num_free
        for entry in sorted(self._entries.values(), key=self._value):
            for block in reversed(entry.blocks if entry is not but else ()):
                while isinstance(block.place, int) and block.num_entries and block not in kept and self._arena.is_alone(block.place):
                    if self._arena.num_free - before >= num_pages:
                        return True
                    if self._num_bytes + self._arena.page_bytes <= self._max_bytes:
                        self._move_out(block, block.place)
                    elif self._is_archived:
                        self.is_short = True
                        return self._arena.num_free > before
                    else:
                        self.forget(self._least_valuable(but))
        return self._arena.num_free > before

    def _move_out(self, block: Block, page: int) -> None:
        block.place = NOWHERE
        self._moving.append((block, page))
        del self._by_page[page]
        self._arena.give_back([page])
        self._num_bytes += self._arena.page_bytes

    @property
    def num_moving(self) -> int:
        return len(self._moving)

    def finish_moves(self) -> None:
        """Copies what is to be moved out of pages, before anybody writes into them: `give_way` only counts."""
        with self._lock:  # what an ended life left behind may still be at it
            while self._moving:
                block, page = self._moving[0]
                block.place = self._arena.read(page)
                del self._moving[0]

    def num_movable(self, but: Entry | None) -> int:
        """Pages that `give_way` could free at most."""
        kept = set[Block](but.blocks if but is not None else ())
        return sum(self._arena.is_alone(page) and block not in kept for page, block in self._by_page.items())

    @staticmethod
    def _value(entry: Entry) -> tuple[int, int]:
        return entry.last_used, entry.checkpoint.position

    def _least_valuable(self, but: Entry | None) -> Entry:
        return min((entry for entry in self._entries.values() if entry is not but), key=self._value)

    def forget(self, entry: Entry) -> None:
        self.is_short = False
        del self._entries[entry.key]
        self._num_bytes -= entry.checkpoint.num_bytes
        for block in entry.blocks:
            block.num_entries -= 1
            if block.num_entries:
                continue
            if isinstance(block.place, int):
                del self._by_page[block.place]
                self._arena.give_back([block.place])
            else:
                self._num_bytes -= self._arena.page_bytes

    @property
    def entries(self) -> list[Entry]:
        """All checkpoints, the most valuable first."""
        return sorted(self._entries.values(), key=self._value, reverse=True)

    def snapshot(self, entry: Entry) -> Snapshot:
        """A copy of a checkpoint and all before it."""
        self.finish_moves()
        rows = [self._arena.read(block.place) if isinstance(block.place, int) else block.place for block in entry.blocks]
        position = entry.checkpoint.position
        trunk, mtp = (np.concatenate(parts, axis=3)[:, :, :, :position] for parts in zip(*rows, strict=True))
        return Snapshot(entry.checkpoint, trunk, mtp, entry.checkpoint.hidden[:0])

    @property
    def holders(self) -> list[list[int]]:
        """The pages the index holds."""
        return [list(self._by_page)]

    def check_integrity(self) -> None:
        """InternalBug unless blocks, pages and bytes are counted as they are."""
        counts: dict[Block, int] = {}
        for entry in self._entries.values():
            for block in entry.blocks:
                counts[block] = counts.get(block, 0) + 1
        if any(block.num_entries != count for block, count in counts.items()):
            raise InternalBug("blocks are known to other checkpoints than counted")
        if {block.place for block in counts if isinstance(block.place, int)} != set(self._by_page):
            raise InternalBug("the index holds pages that are in no checkpoint, or the reverse")
        num_outside = sum(not isinstance(block.place, int) for block in counts)
        num_bytes = sum(entry.checkpoint.num_bytes for entry in self._entries.values()) + num_outside * self._arena.page_bytes
        if num_bytes != self._num_bytes or num_bytes > self._max_bytes:
            raise InternalBug(f"checkpoints and blocks take {num_bytes} bytes, counted are {self._num_bytes} of {self._max_bytes}")

    def statistics(self, num_files: int = 0) -> PrefixStatistics:
        return PrefixStatistics(
            num_hits=self._num_hits,
            num_misses=self._num_misses,
            num_cached_tokens=self._num_cached_tokens,
            num_prompt_tokens=self._num_prompt_tokens,
            num_loaded=self._num_loaded,
            num_entries=len(self._entries),
            num_bytes=self._num_bytes,
            num_pages=len(self._by_page),
            num_files=num_files,
        )
