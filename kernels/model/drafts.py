"""What an MTP head computes, and what it drafts: token after token, each from its own output for the one before."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from ...core.speculation import num_alike
from ...core.vocabulary import Choosing
from ..backend import F32
from ..sampling import Choices, choose, share
from .memory import SequenceMemory


@dataclass(frozen=True, slots=True)
class MtpRows:
    """Consecutive rows of one sequence's MTP cache: tokens from an absolute position, and for each the hidden row of the
    position before it, [R, hidden]; None: the target's, where the memory has them."""

    memory: SequenceMemory
    position: int
    tokens: tuple[int, ...]
    hidden: F32 | None

    def split(self, at: int) -> tuple[MtpRows, MtpRows]:
        """The first `at` rows, and the others."""
        first, others = (self.hidden[:at], self.hidden[at:]) if self.hidden is not None else (None, None)
        start, middle = self.position, self.position + at
        return MtpRows(self.memory, start, self.tokens[:at], first), MtpRows(self.memory, middle, self.tokens[at:], others)


class Guesses(Protocol):
    def guess(self, batch: Sequence[MtpRows]) -> tuple[F32, F32]:
        """Outputs [sequences, hidden] and logits [sequences, V] of each one's last row."""
        ...


@dataclass(frozen=True, slots=True)
class Wanted:
    """At most `limit` tokens of one sequence, chosen as `choosing` says: none that is less probable than `least`, nor any after those
    that are less probable together than `floor`."""

    choosing: Choosing
    limit: int
    floor: float = 0.0
    least: float = 0.0

    def cut(self, tokens: Sequence[int], shares: Sequence[float]) -> Drafted:
        """What is wanted of tokens with these probabilities."""
        count, together = 0, 1.0
        while count < min(self.limit, len(tokens)) and together >= self.floor and shares[count] >= self.least:
            together *= shares[count]
            count += 1
        return Drafted(tuple(tokens[:count]), tuple(shares[:count]))


def brought(choices: Choices, index: int) -> tuple[int, tuple[int, ...]]:
    """Where the tokens begin that a verify brings of one of its sequences, and they."""
    ask, chosen = choices.asks[index], choices.read()[index]
    return ask.position, tuple(chosen[: num_alike(ask.ahead, chosen) + 1])


@dataclass(frozen=True, slots=True)
class Following:
    """What is wanted after the tokens that a verify brings of one sequence, the one of `choices.asks[index]`. `wanted` is said as if there
    were none of them."""

    memory: SequenceMemory
    index: int
    wanted: Wanted

    def after(self, choices: Choices) -> tuple[MtpRows, Wanted]:
        """The rows that bring its head up to them, and what is wanted then."""
        position, tokens = brought(choices, self.index)
        rows = MtpRows(self.memory, position, tokens, self.memory.hidden.before(position, len(tokens)))
        return rows, replace(self.wanted, choosing=self.wanted.choosing.then(tokens))


def following(batch: Sequence[Following], choices: Choices) -> tuple[list[MtpRows], list[Wanted]]:
    """What to draft, once it is known what the verify brings."""
    rows, wanted = zip(*(each.after(choices) for each in batch), strict=True)
    return list(rows), list(wanted)


@dataclass(frozen=True, slots=True)
class NextRows:
    """Rows of a sequence that follow a verify which nobody has read: the last token that it brings of `choices.asks[index]`, and
    `num_drafts` of what has been drafted after it; which, `draft` says, among all that is drafted."""

    memory: SequenceMemory
    index: int
    draft: int
    num_drafts: int


@dataclass(frozen=True, slots=True)
class Drafted:
    """Tokens, and how probable the head held each."""

    tokens: tuple[int, ...] = ()
    shares: tuple[float, ...] = ()


def draft_by_guesses(head: Guesses, batch: Sequence[MtpRows], wanted: Sequence[Wanted]) -> list[Drafted]:
    """The rows of each sequence, then a row for each token drafted."""
    rows, tokens, shares = list(batch), [list[int]() for _ in batch], [list[float]() for _ in batch]
    active = [i for i, each in enumerate(wanted) if each.limit > 0]
    while active:
        outputs, all_logits = head.guess([rows[i] for i in active])
        still = list[int]()
        for i, output, logits in zip(active, outputs, all_logits, strict=True):
            how, position = wanted[i].choosing, rows[i].position + len(rows[i].tokens)
            how = how.then(tuple(tokens[i]))
            token = choose(logits, how.sampling, position, how.history, how.limits)
            tokens[i].append(token)
            shares[i].append(share(logits, token))
            rows[i] = MtpRows(rows[i].memory, position, (token,), output[None])
            is_open = shares[i][-1] >= wanted[i].least and math.prod(shares[i]) >= wanted[i].floor
            if is_open and len(tokens[i]) < wanted[i].limit:
                still.append(i)
        active = still
    return [each.cut(*found) for each, found in zip(wanted, zip(tokens, shares, strict=True), strict=True)]
