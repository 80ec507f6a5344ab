"""Every message between actors: who sends it, to whom, when. This file is the architecture diagram.

Messages carry handles and small integers, never activations; the rows a prompt brings are the caller's, and pass by
reference. A `Mail[R]` is answered with an R when it is asked, and with nothing when it is told. Every request names the
absolute position it continues from, so rolling back is asking for an earlier position. `lease` is a number never given
twice; memory of a former life is refused by it (LeaseLost).

    sequence --Encode--> tokenizer              sequence --Admit/Publish/Save/Release--> memory manager
    sequence --Prefill/Verify/Freeze/Forget--> target decoder
    sequence --Observe/Propose/Commit/Resume/Forget--> each drafter
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import ClassVar, Generic, TypeVar

from .embeddings import Encoded
from .speculation import Draft
from .trace import Flow
from .vocabulary import CheckedPrompt, Choosing, Lease, SavedFile, Verdict

R = TypeVar("R")


class WhenFull(Enum):
    """What a full mailbox does with one more message of a class; see channel.py."""

    WAIT = auto()
    REFUSE = auto()
    NEWEST_WINS = auto()


@dataclass(frozen=True, slots=True)
class Mail(Generic[R]):
    """A message. Asked, it is answered with an R, or with an error."""

    flow: Flow
    when_full: ClassVar[WhenFull] = WhenFull.WAIT


@dataclass(frozen=True, slots=True)
class Encode(Mail[Encoded]):
    """Sequence to tokenizer, once: prompt to ids. Special tokens come from the chat template alone."""

    prompt: CheckedPrompt
    when_full = WhenFull.REFUSE


@dataclass(frozen=True, slots=True)
class Admit(Mail[Lease]):
    """Sequence to memory manager, once, and again after memory was lost or revoked: memory for `num_tokens` positions and verifies of
    `max_rows` rows, with what is known of `prompt`, whose chunks end at `ends`, for this `salt`. Waits while there is none; one
    that `is_replay` was admitted or had queued before, goes first, and is not refused for a full queue; one that `was_preempted` is not
    again, and nobody for it. With `saved`, what that file
    holds is in the memory, and nothing else."""

    prompt: Encoded
    ends: tuple[int, ...]
    salt: str
    num_tokens: int
    max_rows: int
    is_replay: bool
    was_preempted: bool = False
    saved: SavedFile | None = None


@dataclass(frozen=True, slots=True)
class Publish(Mail[None]):
    """Sequence to memory manager, after the prompt, and after the answer: what was kept of these tokens may serve others with the same
    `salt`."""

    lease: int
    tokens: tuple[int, ...]
    ends: tuple[int, ...]
    salt: str


@dataclass(frozen=True, slots=True)
class Save(Mail[None]):
    """Sequence to memory manager, after Freeze: put what was frozen into the file `path`, with the request's `record`."""

    lease: int
    path: Path
    record: str


@dataclass(frozen=True, slots=True)
class Release(Mail[None]):
    """Sequence to memory manager, once for every lease: its memory is free."""

    lease: int


@dataclass(frozen=True, slots=True)
class Prefill(Mail[Verdict]):
    """Sequence to target decoder, once a chunk of the prompt, or as many as are computed at once: compute `tokens` from `position`, and if
    `is_kept` take a checkpoint after them. The verdict holds the choice after the prompt's last row, and is empty for the chunks before."""

    lease: int
    position: int
    tokens: tuple[int, ...]
    choosing: Choosing
    is_last: bool
    is_kept: bool


@dataclass(frozen=True, slots=True)
class Verify(Mail[Verdict]):
    """Sequence to target decoder, once a round: rows [last token, drafts...] from `position`; rolls back to it first. One that
    `is_suspect`, since the target died working on it, is computed in a batch of its own. As soon as it is known which drafts are right,
    the MTP head drafts `next_limit` tokens at most for the round after, as for a Propose with `next_floor`: without a question, where the
    sequence knows already what it will ask. If it `goes_on`, the round after verifies these drafts, or with a limit of 0 none, as far as is
    known: a device may begin with it early. With `num_right`, so many drafts count as right, whatever the target chooses."""

    lease: int
    position: int
    tokens: tuple[int, ...]
    choosing: Choosing
    is_suspect: bool
    next_limit: int = 0
    next_floor: float = 0.0
    goes_on: bool = False
    num_right: int | None = None


@dataclass(frozen=True, slots=True)
class Freeze(Mail[None]):
    """Sequence to target decoder, between rounds, when it is to be saved: copy all of it as it is at `position`. After an answer, not
    `is_whole`: take a checkpoint there."""

    lease: int
    position: int
    is_whole: bool = True


@dataclass(frozen=True, slots=True)
class Observe(Mail[None]):
    """Sequence to each drafter, once a prompt chunk, after its Prefill: `tokens` stand at `position` and the target has computed
    them. Answered before the chunk after the next is asked for: memory keeps the hidden rows of two. What is learned of it may serve
    others with the same `salt` alone."""

    lease: int
    position: int
    tokens: tuple[int, ...]
    salt: str


@dataclass(frozen=True, slots=True)
class Propose(Mail[Draft]):
    """Sequence to a drafter, at most once a round, or twice, if no draft came with a verdict: what follows `ahead`, of which the first
    token stands at `position` and the others are drafted? At most `limit` tokens, chosen as the target will choose where the drafter has
    logits of its own; it may stop where all it has drafted is less likely to be right than `floor`. `since` are the tokens before
    `position` of which the drafter has not been told, as by a Commit."""

    lease: int
    position: int
    since: tuple[int, ...]
    ahead: tuple[int, ...]
    limit: int
    floor: float
    choosing: Choosing
    when_full = WhenFull.NEWEST_WINS


@dataclass(frozen=True, slots=True)
class Commit(Mail[tuple[bool, ...]]):
    """Sequence to a drafter that has not been asked for long: `tokens` stand for good at `position`, computed by the target, whoever
    drafted them. A drafter that falls behind by more rows than memory keeps hidden rows for loses them, and drafts worse. Answered with
    what costs little to say by then: of some of the newest tokens, whether the drafter would have drafted each, chosen as `choosing` says,
    after those before it. None wants to know nothing."""

    lease: int
    position: int
    tokens: tuple[int, ...]
    choosing: Choosing | None


@dataclass(frozen=True, slots=True)
class Resume(Mail[None]):
    """Sequence to a drafter that was restarted, or has a lease with something in it, once: `tokens` stand from position 0, computed
    by the target long ago."""

    lease: int
    tokens: tuple[int, ...]
    salt: str


@dataclass(frozen=True, slots=True)
class Forget(Mail[None]):
    """Sequence to target decoder and each drafter, once for every lease, before Release: drop what is known of it. Once it is
    answered, nobody works on the lease's memory any more; a device may, before all that it is told from then on. Unless the sequence
    `is_over`, it takes another lease, and all is told again."""

    lease: int
    is_over: bool = True
