"""A simulated model: the real actors run on it in virtual time, without weights.

Its state after a token is a hash of the state before and the token, kept with exact rollback as the real memory keeps
its own; chunks and steps hash differently, as their last bits may. So a token depends on everything computed before it
and how: a rollback forgotten, rows of another sequence, or a replay by chunks where steps were used change the text.
`reference` decodes without actors, memory or drafts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
from forerun.actors.model import Defaults
from forerun.actors.tokenizer import Vocabulary
from forerun.core.begun import Begun, Mark
from forerun.core.errors import PositionLost
from forerun.core.protocol import CHUNK, chunk_ends
from forerun.core.vocabulary import Choosing, SamplingParams
from forerun.kernels.backend import F32
from forerun.kernels.model.drafts import Drafted, Following, MtpRows, NextRows, Wanted, brought, draft_by_guesses, following
from forerun.kernels.model.memory import HiddenRows, SequenceMemory
from forerun.kernels.model.pages import Arena, KeyValues
from forerun.kernels.model.prefix import Checkpoint
from forerun.kernels.model.recurrent import StoreName
from forerun.kernels.model.trunk import Rows
from forerun.kernels.sampling import Choices, choose

NUM_TOKEN_IDS = 24
STOP = 23
#: One in so many of the head's guesses is wrong.
HEAD_ERRS = 4
MODULUS = 2**24 - 3  # states are whole numbers that float32 holds


def step(state: int, token: int) -> int:
    return (state * 5_318_009 + token * 7_919 + 1) % MODULUS


def chunk(state: int, tokens: Sequence[int], *, is_like_steps: bool) -> list[int]:
    """States after each token of a chunk, which differ from those of as many steps unless it `is_like_steps`."""
    states: list[int] = []
    for token in tokens:
        state = step(state, token) if is_like_steps else (state * 4_256_233 + token * 6_007 + 2) % MODULUS
        states.append(state)
    return states


def choice(state: int) -> int:
    """The token after a state. The text repeats itself now and then, so that n-grams have something to find."""
    return state % 7 if state % 3 else state // 3 % NUM_TOKEN_IDS


def logits_of(hidden: F32) -> F32:
    """[R, V] of hidden rows [R, 2], each a state and the sum of all keys up to its own."""
    out = np.zeros((len(hidden), NUM_TOKEN_IDS), np.float32)
    out[range(len(hidden)), [choice((int(state) + 131 * int(total)) % MODULUS) for state, total in hidden]] = 1
    return out


def key_of(state: int) -> int:
    return state % 997


def reference(prompt: Sequence[int], max_tokens: int, sampling: SamplingParams, *, is_like_steps: bool = False) -> tuple[int, ...]:
    """The text of a request that is left alone."""
    state, start, total = 0, 0, 0
    for end in chunk_ends(tuple(prompt), frozenset({STOP})):
        states = chunk(state, prompt[start:end], is_like_steps=is_like_steps)
        total += sum(map(key_of, states))
        start, state = end, states[-1]
    out: list[int] = []
    while len(out) < max_tokens:
        logits = logits_of(np.array([[state, total]], np.float32))
        token = choose(logits[0], sampling, len(prompt) + len(out))
        if token == STOP:
            break
        out.append(token)
        state = step(state, token)
        total += key_of(state)
    return tuple(out)


class FakeMemory(SequenceMemory):
    """States by position, from the oldest that is held: the newest verify's rows and the one before them. Keys in real pages."""

    def __init__(self, arena: Arena, table: list[int], capacity: int, max_rows: int) -> None:
        self.capacity, self.max_rows, self.table = capacity, max_rows, table
        self.trunk, self.mtp = KeyValues(arena.trunk, table), KeyValues(arena.mtp, table)
        self.first, self.states = 0, [0]
        self.begun: tuple[int, list[int]] | None = None  # both, of a verify that nobody has heard of yet
        self.hidden = HiddenRows(2, 2 * CHUNK + max_rows + 1)
        self.max_checkpoint_bytes = self.checkpoint_share = 0
        self.checkpoints = []
        self.frozen = None

    def check(self, position: int, num_rows: int, *, is_chunk: bool) -> None:
        assert self.begun is None, "its states have moved on"
        if not self.first <= position < self.first + len(self.states):
            raise PositionLost(f"position {position} is gone; held: {self.first} to {self.first + len(self.states) - 1}")
        if position + num_rows > self.capacity or num_rows > (CHUNK if is_chunk else self.max_rows):
            raise PositionLost(f"{num_rows} rows from {position} do not fit a lease of {self.capacity}, {self.max_rows} at once")

    def seek(self, position: int) -> int:
        state = self.states[position - self.first]
        self.first, self.states = position, [state]
        return state

    def rows(self, position: int, states: Sequence[int]) -> F32:
        """Hidden rows [R, 2] of states from `position`: each the state and the sum of all keys in the pages, up to its own."""
        new = np.array([[key_of(state)] for state in states], np.float32)[:, None]
        keys = self.trunk.write(0, position, new, new)[0][0, : position + len(states), 0]
        hidden = np.stack([np.array(states, np.float32), keys.cumsum()[position:]], -1)
        self.hidden.write(position, hidden)
        return hidden

    def checkpoint(self) -> Checkpoint:
        state = np.array(self.states[:1], np.float32)
        return Checkpoint(self.first, state, state[:0], self.hidden.read(self.first - 1, 1))

    def restore(self, checkpoint: Checkpoint) -> None:
        self.first, self.states = checkpoint.position, [int(checkpoint.state[0])]
        self.hidden.write(checkpoint.position - 1, checkpoint.hidden)


class FakeTarget:
    num_prepared = 0

    def __init__(self, marker: Callable[[], Mark] | None = None, *, is_like_steps: bool = False) -> None:
        self.marker, self._is_like_steps = marker, is_like_steps

    def verify(self, batch: Sequence[Rows]) -> tuple[F32, F32]:
        new: list[F32] = []
        for rows in batch:
            memory = cast(FakeMemory, rows.memory)
            memory.check(rows.position, len(rows.tokens), is_chunk=False)
            state = memory.seek(rows.position)
            for token in rows.tokens:
                memory.states.append(state := step(state, token))
            new.append(memory.rows(rows.position, memory.states[1:]))
        hidden = np.concatenate(new)
        return logits_of(hidden), hidden

    def verify_next(self, batch: Sequence[NextRows], choices: Choices, drafts: Any) -> F32 | None:
        if self.marker is None:
            return None
        rows, before = list[Rows](), list[tuple[int, list[int]]]()
        for each in batch:
            position, tokens = brought(choices, each.index)
            later = drafts[each.draft][: each.num_drafts] if each.num_drafts else ()
            rows.append(Rows(each.memory, position + len(tokens) - 1, (tokens[-1], *later)))
            memory = cast(FakeMemory, each.memory)
            before.append((memory.first, memory.states))
        logits = self.verify(rows)[0]
        for each, (first, states) in zip(batch, before, strict=True):
            memory = cast(FakeMemory, each.memory)
            memory.begun, memory.first, memory.states = (memory.first, memory.states), first, states
        return logits

    def settle(self, memory: SequenceMemory, position: int, num_rows: int) -> None:
        fake = cast(FakeMemory, memory)
        assert fake.begun is not None
        (fake.first, fake.states), fake.begun = fake.begun, None
        assert (fake.first, len(fake.states)) == (position, num_rows + 1)

    def prefill(self, rows: Rows, is_last: bool) -> F32 | None:
        memory = cast(FakeMemory, rows.memory)
        memory.check(rows.position, len(rows.tokens), is_chunk=True)
        states = chunk(memory.seek(rows.position), rows.tokens, is_like_steps=self._is_like_steps)
        hidden = memory.rows(rows.position, states)
        memory.first, memory.states = rows.position + len(rows.tokens), states[-1:]
        return logits_of(hidden[-1:]) if is_last else None

    def freeze(self, memory: SequenceMemory, position: int, *, is_whole: bool) -> None:
        fake = cast(FakeMemory, memory)
        fake.check(position, 0, is_chunk=False)
        fake.seek(position)
        fake.freeze(is_whole=is_whole)

    def seconds(self, num_rows: int) -> float:
        return 0.001 * num_rows


class FakeHead:
    """Guesses right from right hidden rows, but for one in HEAD_ERRS."""

    hidden, num_prepared = 2, 0

    def __init__(self, marker: Callable[[], Mark] | None = None) -> None:
        self._marker = marker

    def last(self, batch: Sequence[MtpRows]) -> F32:
        out: list[tuple[int, int]] = []
        for rows in batch:
            assert rows.hidden is not None
            state, total = rows.hidden[-1]
            after = step(int(state), rows.tokens[-1])
            out.append((after, int(total) + key_of(after)))
        return np.array(out, np.float32)

    def guess(self, batch: Sequence[MtpRows]) -> tuple[F32, F32]:
        outputs = self.last(batch)
        logits = logits_of(outputs)
        for row, (state, _) in zip(logits, outputs, strict=True):
            if int(state) // 24 % HEAD_ERRS == 0:
                row[:] = np.roll(row, 1)
        return outputs, logits

    def mark(self, rows: MtpRows, num_marked: int, choosing: Choosing) -> tuple[bool, ...]:
        found = list[bool]()
        assert rows.hidden is not None
        for end in range(len(rows.tokens) - num_marked, len(rows.tokens)):
            (logits,) = self.guess([MtpRows(rows.memory, rows.position, rows.tokens[:end], rows.hidden[:end])])[1]
            found.append(choose(logits, choosing.sampling, rows.position + end) == rows.tokens[end])
        return tuple(found)

    def draft(self, batch: Sequence[MtpRows], wanted: Sequence[Wanted]) -> list[Drafted]:
        return draft_by_guesses(self, batch, wanted)

    def begin(self, batch: Sequence[MtpRows], wanted: Sequence[Wanted]) -> Begun[list[Drafted]]:
        return self._begun(lambda: self.draft(batch, wanted), wanted)

    def draft_after(self, batch: Sequence[Following], choices: Choices) -> Begun[list[Drafted]]:
        return self._begun(lambda: self.draft(*following(batch, choices)), [each.wanted for each in batch])

    def _begun(self, draft: Callable[[], list[Drafted]], wanted: Sequence[Wanted]) -> Begun[list[Drafted]]:
        if self._marker is None:
            return Begun(None, draft)
        found = draft()
        # A device drafts as many as may be wanted.
        whole = [(*each.tokens, *[0] * (some.limit - len(each.tokens))) for each, some in zip(found, wanted, strict=True)]
        return Begun(self._marker(), lambda: found, on_device=whole)

    def seconds(self, num_rows: int) -> float:
        return 0.001 * num_rows


class FakeVocabulary(Vocabulary):
    """One token a character, from "a" on."""

    chat_template = None

    def __init__(self) -> None:
        pass

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(ord(character) - ord("a") for character in text)

    def token_bytes(self, token: int) -> bytes:
        return bytes([ord("a") + token])


@dataclass
class FakeMaker:
    steps_equal_chunks: bool = False
    max_together: int = 0

    def arena(self, num_pages: int) -> Arena:
        return Arena(num_pages, 1, 1, 1)

    def memory(self, arena: Arena, table: list[int], capacity: int, max_rows: int, store: StoreName) -> SequenceMemory:
        return FakeMemory(arena, table, capacity, max_rows)


@dataclass
class FakeModel:
    name: str = "fake"
    vocabulary: Vocabulary | None = field(default_factory=FakeVocabulary)
    defaults: Defaults = field(default_factory=lambda: Defaults(frozenset({STOP}), {"temperature": 0.0}))
    num_token_ids: int = NUM_TOKEN_IDS
    context: int = 4096
    hidden: int = 2
    has_mtp: bool = True
    fingerprint: str = "f" * 64
    instructions: str = ""
    marker: Callable[[], Mark] | None = None  # of a device that computes beside whoever began it
    is_like_steps: bool = False

    def memory(self) -> FakeMaker:
        return FakeMaker(self.is_like_steps)

    def target(self) -> Any:
        return FakeTarget(self.marker, is_like_steps=self.is_like_steps)

    def draft_head(self) -> Any:
        return FakeHead(self.marker)
