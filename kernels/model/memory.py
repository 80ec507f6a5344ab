"""All that one sequence remembers, and who is lent it: keys and values in pages, recurrent state, hidden rows."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from ...core.embeddings import Encoded
from ...core.errors import InternalBug, LeaseLost, PositionLost
from ...core.protocol import CHUNK
from ...core.vocabulary import Lease
from ..backend import F32
from .config import ModelConfig
from .inputs import GivenRows
from .pages import PAGE, Arena, KeyValues
from .prefix import Checkpoint, Entry, PrefixIndex, Snapshot
from .recurrent import STORES, StoreName


class Ring:
    """Which rows a ring of `size` holds, position p in place p % size: those from `first` to before `end`, where somebody wrote last.
    A row that has been overwritten is refused, never another's; another thread may be reading."""

    def __init__(self, size: int) -> None:
        self.size, self.first, self.end = size, 0, 0

    def begin(self, position: int, num_rows: int) -> None:
        """So many rows will be written, and those behind them are no longer right."""
        if not self.first <= position <= self.end:
            self.first = position
        self.end = position
        self.first = max(self.first, position + num_rows - self.size)

    def written(self, position: int, num_rows: int) -> None:
        self.begin(position, num_rows)
        self.end = position + num_rows

    def check(self, position: int, num_rows: int) -> None:
        """PositionLost when a row of `position` to `position + num_rows` is gone; position -1 is always there."""
        if max(position, 0) < self.first or position + num_rows > self.end:
            raise PositionLost(f"hidden rows {position} to {position + num_rows} are gone")


class HiddenRows(Ring):
    """The newest post-norm hidden rows, keyed by position."""

    def __init__(self, width: int, num_rows: int) -> None:
        super().__init__(num_rows)
        self._rows = np.zeros((num_rows, width), np.float32)

    def write(self, position: int, rows: F32) -> None:
        self.begin(position, len(rows))
        at = position % self.size
        num_first = min(len(rows), self.size - at)
        self._rows[at : at + num_first] = rows[:num_first]
        if num_first < len(rows):
            self._rows[: len(rows) - num_first] = rows[num_first:]
        self.written(position, len(rows))

    def read(self, position: int, num_rows: int) -> F32:
        """Rows `position` to `position + num_rows`, [num_rows, hidden]; PositionLost when one of them is gone."""
        self.check(position, num_rows)
        at = position % self.size
        rows = self._rows[at : at + num_rows]
        rows = rows.copy() if len(rows) == num_rows else np.concatenate([rows, self._rows[: num_rows - len(rows)]])
        self.check(position, num_rows)
        return rows

    def before(self, position: int, num_rows: int) -> F32 | None:
        """What an MTP head pairs tokens at `position`... with: the rows of the positions before them, zeros before position 0. None where
        the head finds them itself. PositionLost as in `read`."""
        if position > 0:
            return self.read(position - 1, num_rows)
        first = np.zeros((1, self._rows.shape[1]), np.float32)
        return np.concatenate([first, self.read(0, num_rows - 1)])


class SequenceMemory:
    """All of one sequence: room in the pages of `table` for `capacity` positions, and for `max_rows` rows in one verify."""

    max_chunk = CHUNK
    given: GivenRows | None = None  # what its prompt has in place of tokens
    #: Of the MTP head's cache, rows that are done with: exact, or given up. Whoever has the head draft moves it on: the MTP drafter, and
    #: the target decoder where a verify begins just before it, as none does while the drafter has anything to do for the sequence.
    num_head_rows = 0

    def __init__(self, config: ModelConfig, arena: Arena, table: list[int], capacity: int, max_rows: int, store: StoreName) -> None:
        self.capacity, self.table = capacity, table
        self.trunk, self.mtp = KeyValues(arena.trunk, table), KeyValues(arena.mtp, table)
        self.recurrent = STORES[store](config, max_rows)
        # A drafter reads a chunk's rows while the next is computed, and needs the row before its first.
        self.hidden = HiddenRows(config.hidden, 2 * self.max_chunk + max_rows + 1)
        self.max_checkpoint_bytes = self.checkpoint_share = 0
        self.checkpoints: list[Checkpoint] = []  # taken while the prompt was computed
        self.frozen: Snapshot | None = None  # all of it, on its way to a file

    def give(self, given: GivenRows) -> None:
        """Says what stands in place of tokens, before anything is computed."""
        self.given = given

    def check(self, position: int, num_rows: int, *, is_chunk: bool) -> None:
        """PositionLost unless `num_rows` rows can be computed from `position`. Changes nothing."""
        self.recurrent.check(position)
        max_rows = self.max_chunk if is_chunk else self.recurrent.max_rows
        if position + num_rows > self.capacity or num_rows > max_rows:
            lease = f"a lease of {self.capacity} positions, {max_rows} at once"
            raise PositionLost(f"rows {position} to {position + num_rows} do not fit {lease}")

    def checkpoint(self) -> Checkpoint:
        """A copy of what is not keys and values, at the position memory goes on from."""
        position = self.recurrent.base_position
        state, columns = self.recurrent.read()
        return Checkpoint(position, state, columns, self.hidden.read(position - 1, 1))

    def snapshot(self) -> Snapshot:
        """A copy of everything, at the position memory goes on from."""
        checkpoint = self.checkpoint()
        rows = self.given.rows if self.given is not None else checkpoint.hidden[:0]
        return Snapshot(checkpoint, self.trunk.read(checkpoint.position), self.mtp.read(checkpoint.position), rows)

    def freeze(self, *, is_whole: bool) -> None:
        """A copy of everything for who saves it, or a checkpoint for others."""
        if is_whole:
            self.frozen = self.snapshot()
        else:
            self.keep()

    def keep(self) -> None:
        """Takes a checkpoint where memory goes on from, if there is memory for it. Beyond `max_checkpoint_bytes`, and more than CHECKPOINTS
        beyond `checkpoint_share`, the oldest are dropped, but the first last: it is where most others begin."""
        with suppress(MemoryError):
            self.checkpoints.append(self.checkpoint())
        while (num_bytes := sum(each.num_bytes for each in self.checkpoints)) > self.max_checkpoint_bytes or (
            len(self.checkpoints) > CHECKPOINTS and num_bytes > self.checkpoint_share
        ):
            self.checkpoints.pop(min(1, len(self.checkpoints) - 1))

    def restore_snapshot(self, snapshot: Snapshot) -> None:
        """Goes on from where `snapshot` was taken; its shapes must fit."""
        self.restore(snapshot.checkpoint)
        self.trunk.restore(snapshot.trunk)
        self.mtp.restore(snapshot.mtp)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Goes on from a checkpoint whose keys and values are in the pages already."""
        self.recurrent.restore(checkpoint.position, checkpoint.state, checkpoint.columns)
        self.hidden.write(checkpoint.position - 1, checkpoint.hidden)


#: That a sequence may keep until it hands them on, whatever its share of memory for them.
CHECKPOINTS = 4


def num_pages(capacity: int, max_rows: int) -> int:
    """Pages of a lease: drafts may run past the last position."""
    return -(-(capacity + max_rows) // PAGE)


@dataclass(frozen=True, slots=True)
class MemoryParams:
    """How much memory sequences may have: `num_slots` at once, `num_pages` for all of them and the checkpoints of prefixes, of which
    there are at most `prefix_bytes` (0: none are kept); what is forgotten of them is handed out if `is_archived`. `store` says how
    recurrent states go back."""

    num_slots: int
    num_pages: int
    prefix_bytes: int
    store: StoreName
    is_archived: bool = False


class MemoryMaker(Protocol):
    """What a model gives a pool."""

    @property
    def max_together(self) -> int:
        """Rows that chunks of a prompt may have that are computed at once; 0 where what is computed depends on each one's ends."""
        ...

    @property
    def steps_equal_chunks(self) -> bool:
        """Whether a row has the same bits in a chunk of a prompt, wherever that ends, as in a verify: an answer is a beginning, then, that
        other prompts may go on from."""
        ...

    def arena(self, num_pages: int) -> Arena: ...

    def memory(self, arena: Arena, table: list[int], capacity: int, max_rows: int, store: StoreName) -> SequenceMemory: ...


def alone(make: MemoryMaker, capacity: int, max_rows: int, store: StoreName = "log") -> SequenceMemory:
    """Memory of a sequence that shares with nobody."""
    arena = make.arena(num_pages(capacity, max_rows))
    return make.memory(arena, arena.take(arena.num_pages)[0], capacity, max_rows, store)


def blank(make: MemoryMaker, store: StoreName) -> Snapshot:
    """A sequence at position 0."""
    return make.memory(make.arena(1), [0], 0, 1, store).snapshot()


@dataclass(frozen=True, slots=True)
class ModelMemory:
    """A real model's."""

    config: ModelConfig
    steps_equal_chunks: bool = False

    @property
    def max_together(self) -> int:
        return 0

    def arena(self, num_pages: int) -> Arena:
        return Arena(num_pages, self.config.num_attention, self.config.kv_heads, self.config.head_dim)

    def memory(self, arena: Arena, table: list[int], capacity: int, max_rows: int, store: StoreName) -> SequenceMemory:
        return SequenceMemory(self.config, arena, table, capacity, max_rows, store)


@dataclass(frozen=True, slots=True)
class Filling:
    """What is to be done before a lease is used: pages are cleared, and what is known of its prompt is put there."""

    do: Callable[[], None]
    num_bytes: int  # that are copied or cleared


class SequencePool:
    """Memory by lease number, the handle that messages carry. The memory manager fills and empties it, the actors that compute
    read it. A number is never given twice. A lease has all the pages it can ever need, so that decoding never runs out."""

    def __init__(self, make: MemoryMaker, params: MemoryParams) -> None:
        self._make, self._params = make, params
        self._leases: dict[int, tuple[str, SequenceMemory]] = {}
        self._revoked: set[int] = set()
        self.num_revoked = 0
        self._first = self._next = 1  # the numbers lent in this life: from _first, below _next
        self._begin(params.num_pages)

    def _begin(self, num_pages: int) -> None:
        self._arena = self._make.arena(num_pages)
        is_by_chunks = not self._make.steps_equal_chunks
        self.prefixes = PrefixIndex(self._arena, self._params.prefix_bytes, is_by_chunks=is_by_chunks, is_archived=self._params.is_archived)

    @cached_property
    def blank(self) -> Snapshot:
        """A sequence at position 0: what others are shaped like."""
        return blank(self._make, self._params.store)

    def __getitem__(self, lease: int) -> SequenceMemory:
        if lease not in self._leases or lease in self._revoked:
            raise LeaseLost(f"lease {lease} is not lent")
        return self._leases[lease][1]

    @property
    def max_together(self) -> int:
        return self._make.max_together

    @property
    def steps_equal_chunks(self) -> bool:
        return self._make.steps_equal_chunks

    @property
    def num_slots(self) -> int:
        return self._params.num_slots

    @property
    def num_used(self) -> int:
        return len(self._leases)

    @property
    def num_pages(self) -> int:
        return self._params.num_pages

    @property
    def page_bytes(self) -> int:
        return self._arena.page_bytes

    @property
    def num_pages_free(self) -> int:
        return self._arena.num_free

    @property
    def owners(self) -> dict[int, str]:
        """Lease number -> who has it."""
        return {lease: owner for lease, (owner, _) in self._leases.items()}

    @property
    def num_positions(self) -> int:
        """That one lease can have."""
        return PAGE * self.num_pages - 1

    def can_ever_lease(self, capacity: int) -> bool:
        """Whether a lease of `capacity` positions fits into empty memory."""
        return num_pages(capacity, 1) <= self._params.num_pages

    def lease(
        self, owner: str, prompt: Encoded, ends: tuple[int, ...], capacity: int, max_rows: int, salt: str = ""
    ) -> tuple[Lease, Filling] | None:
        """Memory for a prompt whose chunks end at `ends` (no ends: with nothing in it), and what puts as much of it in place as is known;
        None while there is too little. Room for drafts beyond the last position gives way first, then checkpoints of prefixes."""
        if len(self._leases) == self.num_slots:
            return None
        tokens = prompt.ids
        found = self.prefixes.find(tokens, ends, salt) if self._params.prefix_bytes else None
        shared = self._shared_pages(found)
        while num_pages(capacity, max_rows) - len(shared) > self._arena.num_free:
            if num_pages(capacity, 1) < num_pages(capacity, max_rows):
                max_rows = num_pages(capacity, 1) * PAGE - capacity
            elif not self._give_way(num_pages(capacity, max_rows) - len(shared) - self._arena.num_free, found):
                if found is None or self.prefixes.is_short:
                    return None
                found, shared = None, {}  # what it would save is in the way
        self._arena.share(list(shared.values()))
        taken, used = self._arena.take(num_pages(capacity, max_rows) - len(shared))
        new = iter(taken)
        table = [shared[i] if i in shared else next(new) for i in range(num_pages(capacity, max_rows))]
        try:
            memory = self._make.memory(self._arena, table, capacity, max_rows, self._params.store)
        except MemoryError:
            self._arena.give_back(table)
            raise
        if prompt.embeddings:
            memory.give(GivenRows(prompt.embeddings))
        memory.max_checkpoint_bytes = self._params.prefix_bytes
        memory.checkpoint_share = self._params.prefix_bytes // self.num_slots
        position = found.checkpoint.position if found is not None else 0
        if ends:
            self.prefixes.count(found, len(tokens))
        number, self._next = self._next, self._next + 1
        self._leases[number] = (owner, memory)

        arena, prefixes = self._arena, self.prefixes  # of this life: what outlives it fills nobody else's pages

        def fill() -> None:
            prefixes.finish_moves()
            arena.clear(used)
            if found is None:
                return
            for i, block in enumerate(found.blocks):
                if i not in shared:
                    arena.write(table[i], arena.read(block.place) if isinstance(block.place, int) else block.place)
                    if i < position // PAGE:
                        prefixes.put_back(block, table[i])
            memory.restore(found.checkpoint)

        num_copied = self.prefixes.num_moving + len(used) + (len(found.blocks) - len(shared) if found is not None else 0)
        of_states = found.checkpoint.num_bytes if found is not None else 0
        return Lease(number, max_rows, position), Filling(fill, num_copied * self._arena.page_bytes + of_states)

    def _give_way(self, num_wanted: int, but: Entry | None) -> bool:
        """Whether checkpoints have left at least one page; none does where all that could are too few, unless some of them go to files."""
        return self.prefixes.num_movable(but) >= num_wanted and self.prefixes.give_way(num_wanted, but)

    @staticmethod
    def _shared_pages(found: Entry | None) -> dict[int, int]:
        """Place in the table -> page, of those that can be shared: one in which rows are still to be written is copied."""
        whole = found.blocks[: found.checkpoint.position // PAGE] if found is not None else []
        return {i: block.place for i, block in enumerate(whole) if isinstance(block.place, int)}

    def revoke(self, lease: int) -> None:
        """Nobody begins to work on the lease any more; its memory is still its owner's to give back."""
        if lease not in self._leases:
            raise InternalBug(f"lease {lease} is not lent, and cannot be revoked")
        self._revoked.add(lease)
        self.num_revoked += 1

    @property
    def is_yielding(self) -> bool:
        """Whether a revoked lease has not been given back yet."""
        return bool(self._revoked)

    def would_fit(self, capacity: int, without: list[int]) -> bool:
        """Whether a lease of `capacity` positions could be had once those of `without` are given back. A page they share counts as free:
        an upper bound."""
        num_free = self._arena.num_free + self.prefixes.statistics().num_pages + sum(len(self._leases[lease][1].table) for lease in without)
        return num_pages(capacity, 1) <= num_free and len(self._leases) - len(without) < self.num_slots

    def publish(self, lease: int, tokens: tuple[int, ...], ends: tuple[int, ...], salt: str = "") -> None:
        """What was kept of a prompt while it was computed may be used by others. A lease that has ended has nothing to give."""
        if lease in self._leases:
            memory = self._leases[lease][1]
            self.prefixes.publish(tokens, ends, salt, memory.checkpoints, memory.table)
            memory.checkpoints.clear()

    def release(self, lease: int) -> None:
        """The lease ends. One of a former life has ended already."""
        if lease < self._first:
            return
        if lease not in self._leases:
            raise InternalBug(f"lease {lease} was given back, but is not lent")
        _, memory = self._leases.pop(lease)
        self._revoked.discard(lease)
        self._arena.give_back(memory.table)

    def end(self) -> None:
        """All leases end, and nobody will want another."""
        for _, memory in self._leases.values():
            with suppress(InternalBug):  # a wrong count of pages is of no account any more
                self._arena.give_back(memory.table)
        self._forget_leases()

    def _forget_leases(self) -> None:
        self._leases.clear()
        self._revoked.clear()
        self._first = self._next

    def reset(self) -> None:
        """All leases end, and a new life begins, in new arrays: work that was left behind holds the old ones, and may still write into
        them. Where there is none, no two lives' are held at once."""
        self._forget_leases()
        self._begin(0)
        self._begin(self._params.num_pages)

    def check_integrity(self) -> None:
        """InternalBug unless every page is free or held as often as counted, and leases are within their number."""
        if len(self._leases) > self.num_slots:
            raise InternalBug(f"{len(self._leases)} leases of {self.num_slots} slots")
        self.prefixes.check_integrity()
        self._arena.check_integrity([*(memory.table for _, memory in self._leases.values()), *self.prefixes.holders])
