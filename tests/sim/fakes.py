"""A simulated model: the real actors run on it in virtual time, without weights.

Its state after a token is a hash of the state before and the token, kept with exact rollback as the real memory keeps
its own; chunks and steps hash differently, as their last bits may. So a token depends on everything computed before it
and how: a rollback forgotten, rows of another sequence, or a replay by chunks where steps were used change the text.
`reference` decodes without actors, memory or drafts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
from forerun.actors.model import Defaults
from forerun.actors.tokenizer import Vocabulary
from forerun.core.errors import PositionLost
from forerun.core.protocol import CHUNK
from forerun.core.vocabulary import SamplingParams
from forerun.kernels.backend import F32
from forerun.kernels.model.memory import HiddenRows, SequenceMemory, SequencePool
from forerun.kernels.model.mtp import MtpRows
from forerun.kernels.model.sampling import choose
from forerun.kernels.model.trunk import Rows

NUM_TOKEN_IDS = 24
STOP = 23
#: One in so many of the head's guesses is wrong.
HEAD_ERRS = 4
MODULUS = 2**24 - 3  # states are whole numbers that float32 holds


def step(state: int, token: int) -> int:
    return (state * 5_318_009 + token * 7_919 + 1) % MODULUS


def chunk(state: int, tokens: Sequence[int]) -> list[int]:
    """States after each token of a chunk, which differ from those of as many steps."""
    states: list[int] = []
    for token in tokens:
        state = (state * 4_256_233 + token * 6_007 + 2) % MODULUS
        states.append(state)
    return states


def choice(state: int) -> int:
    """The token after a state. The text repeats itself now and then, so that n-grams have something to find."""
    return state % 7 if state % 3 else state // 3 % NUM_TOKEN_IDS


def logits_of(states: Sequence[int]) -> F32:
    """[R, V], greedy choice `choice`."""
    out = np.zeros((len(states), NUM_TOKEN_IDS), np.float32)
    out[range(len(states)), [choice(state) for state in states]] = 1
    return out


def reference(prompt: Sequence[int], max_tokens: int, sampling: SamplingParams) -> tuple[int, ...]:
    """The text of a request that is left alone."""
    state = 0
    for start in range(0, len(prompt), CHUNK):
        state = chunk(state, prompt[start : start + CHUNK])[-1]
    out: list[int] = []
    while len(out) < max_tokens and (token := choose(logits_of([state])[0], sampling, len(prompt) + len(out))) != STOP:
        out.append(token)
        state = step(state, token)
    return tuple(out)


class FakeMemory(SequenceMemory):
    """States by position, from the oldest that is held: the newest verify's rows and the one before them."""

    def __init__(self, capacity: int, max_rows: int) -> None:
        self.capacity, self.max_rows = capacity, max_rows
        self.first, self.states = 0, [0]
        self.hidden = HiddenRows(1, 2 * CHUNK + max_rows + 1)

    def check(self, position: int, num_rows: int, *, is_chunk: bool) -> None:
        if not self.first <= position < self.first + len(self.states):
            raise PositionLost(f"position {position} is gone; held: {self.first} to {self.first + len(self.states) - 1}")
        if position + num_rows > self.capacity or num_rows > (CHUNK if is_chunk else self.max_rows):
            raise PositionLost(f"{num_rows} rows from {position} do not fit a lease of {self.capacity}, {self.max_rows} at once")

    def seek(self, position: int) -> int:
        state = self.states[position - self.first]
        self.first, self.states = position, [state]
        return state


class FakeTarget:
    def verify(self, batch: Sequence[Rows]) -> tuple[F32, F32]:
        new: list[int] = []
        for rows in batch:
            memory = cast(FakeMemory, rows.memory)
            memory.check(rows.position, len(rows.tokens), is_chunk=False)
            state = memory.seek(rows.position)
            for token in rows.tokens:
                memory.states.append(state := step(state, token))
            memory.hidden.write(rows.position, np.array(memory.states[1:], np.float32)[:, None])
            new += memory.states[1:]
        return logits_of(new), np.array(new, np.float32)[:, None]

    def prefill(self, rows: Rows, is_last: bool) -> F32 | None:
        memory = cast(FakeMemory, rows.memory)
        memory.check(rows.position, len(rows.tokens), is_chunk=True)
        states = chunk(memory.seek(rows.position), rows.tokens)
        memory.first, memory.states = rows.position + len(rows.tokens), states[-1:]
        memory.hidden.write(rows.position, np.array(states, np.float32)[:, None])
        return logits_of(states[-1:]) if is_last else None

    def seconds(self, num_rows: int) -> float:
        return 0.001 * num_rows


class FakeHead:
    """Guesses right from right hidden rows, but for one in HEAD_ERRS."""

    hidden = 1

    def forward(self, batch: Sequence[MtpRows]) -> F32:
        pairs = [(int(hidden), token) for rows in batch for hidden, token in zip(rows.hidden[:, 0], rows.tokens, strict=True)]
        return np.array([step(state, token) for state, token in pairs], np.float32)[:, None]

    def logits(self, outputs: F32) -> F32:
        states = [int(state) for state in outputs[:, 0]]
        logits = logits_of(states)
        for row, state in zip(logits, states, strict=True):
            if state // 24 % HEAD_ERRS == 0:
                row[:] = np.roll(row, 1)
        return logits

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
class FakeModel:
    name: str = "fake"
    vocabulary: Vocabulary | None = field(default_factory=FakeVocabulary)
    defaults: Defaults = field(default_factory=lambda: Defaults(frozenset({STOP}), {"temperature": 0.0}))
    num_token_ids: int = NUM_TOKEN_IDS
    context: int = 4096
    has_mtp: bool = True

    def pool(self, num_slots: int) -> SequencePool:
        return SequencePool(FakeMemory, num_slots)

    def target(self) -> Any:
        return FakeTarget()

    def draft_head(self) -> Any:
        return FakeHead()
