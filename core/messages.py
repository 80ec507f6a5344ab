"""Every message between actors: who sends it, to whom, when. This file is the architecture diagram.

Messages carry handles and small integers, never activations. `Ask[R]` is answered with an R; `Tell` with nothing.
Every request names the absolute position it continues from, so rolling back is asking for an earlier position.

    sequence --Encode--> tokenizer                sequence --Admit/Release--> memory manager
    sequence --Prefill/Verify--> target decoder   sequence --Observe/Propose/Commit/Forget--> each drafter
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from .vocabulary import Draft, Lease, Prompt, SamplingParams, Verdict

R = TypeVar("R")


class Ask(Generic[R]):
    """A message that is answered with an R, or with an error."""

    __slots__ = ()


class Tell:
    """A message that is not answered."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Encode(Ask[tuple[int, ...]]):
    """Sequence to tokenizer, once: prompt to token ids. Special tokens come from the chat template alone."""

    prompt: Prompt


@dataclass(frozen=True, slots=True)
class Admit(Ask[Lease]):
    """Sequence to memory manager, once: memory for `num_tokens` positions and verifies of `max_rows` rows. Waits while there is none."""

    num_tokens: int
    max_rows: int


@dataclass(frozen=True, slots=True)
class Release(Ask[None]):
    """Sequence to memory manager, once for every lease: the slot is free."""

    slot: int


@dataclass(frozen=True, slots=True)
class Prefill(Ask[Verdict]):
    """Sequence to target decoder, once a chunk of the prompt: compute `tokens` from `position` (a multiple of the chunk size).
    The verdict holds the choice after the prompt's last row, and is empty for the chunks before."""

    slot: int
    position: int
    tokens: tuple[int, ...]
    sampling: SamplingParams
    is_last: bool


@dataclass(frozen=True, slots=True)
class Verify(Ask[Verdict]):
    """Sequence to target decoder, once a round: rows [last token, drafts...] from `position`; rolls back to it first."""

    slot: int
    position: int
    tokens: tuple[int, ...]
    sampling: SamplingParams


@dataclass(frozen=True, slots=True)
class Observe(Ask[None]):
    """Sequence to each drafter, once a prompt chunk, after its Prefill: `tokens` stand at `position` and the target has computed them."""

    slot: int
    position: int
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Propose(Ask[Draft]):
    """Sequence to a drafter, once a round: what follows `last_token`, which stands at `position`? At most `limit` tokens,
    chosen as the target will choose where the drafter has logits of its own."""

    slot: int
    position: int
    last_token: int
    limit: int
    sampling: SamplingParams


@dataclass(frozen=True, slots=True)
class Commit(Ask[None]):
    """Sequence to each drafter, once a round, whoever drafted: `tokens` now stand for good at `position`, computed by the target.
    Waited for, because memory keeps hidden rows for one round only: a drafter that is busy must not fall further behind."""

    slot: int
    position: int
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Forget(Ask[None]):
    """Sequence to each drafter, once, before Release: drop what is known of the slot."""

    slot: int
