"""The MTP drafter: owns the MTP head and drafts with it, all sequences that ask together as one batch.

A sequence's cache rows are exact once the target's hidden row and the token have gone in. Drafting runs ahead with the
head's own outputs; what is accepted of it is computed again with the target's hidden rows, in the same pass as the next
draft's first step. Hidden rows are read by (lease, position), never by place in a batch.

Above temperature 0 a draft is drawn with the target's own noise for its position, and so agrees with the target more
often than a draw of its own would: coupled noise (figures in kernels/EXPERIMENTS.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..core.actor import Actor, Executor
from ..core.channel import Envelope, Mailbox
from ..core.errors import InternalBug, LeaseLost, PositionLost
from ..core.messages import Commit, Forget, Mail, Observe, Propose, Resume
from ..core.protocol import CHUNK
from ..core.speculation import DRAFTER_PATIENCE_SECONDS, Draft, SpeculationParams
from ..core.vocabulary import Choosing, SamplingParams
from ..kernels.model.drafts import Drafted, MtpRows, Wanted
from ..kernels.model.memory import SequencePool

GREEDY = Choosing(SamplingParams())
#: Of so many tokens that it catches up on without having drafted them, the head says whether it would have.
NUM_MARKED = 6


class DraftHead(Protocol):
    """What drafts: an MtpHead, or a simulated one. `hidden` is the width of a hidden row."""

    hidden: int

    @property
    def num_prepared(self) -> int: ...

    def mark(self, rows: MtpRows, num_marked: int, choosing: Choosing) -> tuple[bool, ...]: ...

    def draft(self, batch: Sequence[MtpRows], wanted: Sequence[Wanted]) -> list[Drafted]: ...

    def seconds(self, num_rows: int) -> float:
        """About how long so many rows take."""
        ...


@dataclass(slots=True)
class _Sequence:
    """Rows below `num_exact` are done with; `behind` holds the tokens at `num_exact`... that the target has computed since."""

    num_exact: int = 0
    behind: list[int] = field(default_factory=list[int])

    @property
    def num_known(self) -> int:
        return self.num_exact + len(self.behind)

    def skip(self) -> None:
        """Leaves the rows behind as they are in the cache: worse drafts, no harm."""
        self.num_exact, self.behind = self.num_known, []


class MtpDrafter(Actor):
    """Of a lease whose beginning it has not heard of (it was restarted meanwhile) it knows nothing, until Resume tells it; the cache
    is the lease's, and holds what was computed before."""

    patience_seconds = DRAFTER_PATIENCE_SECONDS

    def __init__(self, mailbox: Mailbox, executor: Executor, head: DraftHead, pool: SequencePool, params: SpeculationParams) -> None:
        super().__init__(mailbox, executor)
        self._head, self._pool, self._params = head, pool, params
        self._sequences: dict[int, _Sequence] = {}

    @property
    def enough(self) -> float:
        """Never: while others send, a quicker drafter may make this one's draft needless."""
        return math.inf

    def is_quick(self, message: Mail[Any]) -> bool:
        if not isinstance(message, Propose | Commit):
            return False
        tokens = message.tokens if isinstance(message, Commit) else message.since
        sequence = self._sequences.get(message.lease)
        num_behind = len(tokens) + (len(sequence.behind) if sequence is not None else 0)
        if isinstance(message, Commit) or num_behind >= CHUNK:
            return num_behind < CHUNK
        return self._pool.num_used == 1 and self._executor.is_inline(self._head.seconds(num_behind + message.limit))

    async def handle(self, batch: list[Envelope]) -> None:
        proposals: list[tuple[Envelope, Propose]] = []
        for envelope in batch:
            match envelope.message:
                case Observe(_, lease, position, tokens):
                    await self._learn(lease, position, tokens, is_chunk=True)
                    envelope.answer(None)
                case Commit(_, lease, position, tokens, choosing):
                    envelope.answer(await self._learn(lease, position, tokens, choosing=choosing))
                case Propose() as message:
                    await self._learn(message.lease, message.position - len(message.since), message.since)
                    proposals.append((envelope, message))
                case Resume(_, lease, tokens, _):
                    self._sequences[lease] = _Sequence(len(tokens))
                    envelope.answer(None)
                case Forget(_, lease):
                    self._sequences.pop(lease, None)
                    envelope.answer(None)
                case other:
                    raise InternalBug(f"MTP drafter got {other!r}")
        wanted: list[tuple[Envelope, Propose, MtpRows]] = []
        for envelope, message in proposals:
            if envelope.is_abandoned:
                continue
            envelope.start()
            rows = self._catch_up(message.lease, message.position, message.ahead)
            if rows is None:
                envelope.answer(Draft("draft-mtp", ()))
            else:
                wanted.append((envelope, message, rows))
        if wanted:
            num_rows = sum(message.limit - 1 + len(rows.tokens) for _, message, rows in wanted)
            drafts = await self.compute(lambda: self._draft([each[1:] for each in wanted]), self._head.seconds(num_rows))
            for (envelope, _, _), draft in zip(wanted, drafts, strict=True):
                envelope.answer(draft)

    async def _learn(
        self, lease: int, position: int, tokens: tuple[int, ...], *, is_chunk: bool = False, choosing: Choosing | None = None
    ) -> tuple[bool, ...]:
        """Says what Commit wants to hear, if these tokens are computed now."""
        if is_chunk and position == 0:
            self._sequences[lease] = _Sequence()
        sequence = self._sequences.get(lease)
        if sequence is None or not tokens:
            return ()
        # The first of a round's tokens is known already when a draft was asked for that round.
        num_known = sequence.num_known - position
        if not 0 <= num_known <= len(tokens):
            raise InternalBug(f"tokens at {position}, but {sequence.num_known} are known")
        sequence.behind += tokens[num_known:]
        # A round's few tokens wait for the next draft, to share its pass; a chunk's hidden rows do not last.
        if (is_chunk or len(sequence.behind) >= CHUNK) and (rows := self._catch_up(lease, sequence.num_known, ())) is not None:
            num_marked = min(NUM_MARKED, len(rows.tokens) - 1) if choosing is not None else 0
            how = self._how(choosing) if choosing is not None else GREEDY
            return await self.compute(lambda: self._head.mark(rows, num_marked, how), self._head.seconds(len(rows.tokens)))
        return ()

    def _how(self, choosing: Choosing) -> Choosing:
        """How drafts are chosen where the target chooses as said."""
        return GREEDY if self._params.draft_sampling == "greedy" else choosing

    def _catch_up(self, lease: int, position: int, next_token: tuple[int, ...]) -> MtpRows | None:
        """The rows that make the cache exact up to `position`, all that the target has computed, then `next_token`, whose row has exact
        inputs though the target has not computed it. None when they cannot be had."""
        sequence = self._sequences.get(lease)
        if sequence is None:
            return None
        if sequence.num_known != position:
            raise InternalBug(f"asked to draft from {position}, but {sequence.num_known} are known")
        start, tokens = sequence.num_exact, (*sequence.behind, *next_token)
        try:
            memory = self._pool[lease]
            hidden = memory.hidden.before(start, len(tokens))
        except LeaseLost:
            del self._sequences[lease]
            return None
        except PositionLost:
            sequence.skip()
            return None
        sequence.num_exact, sequence.behind = start + len(tokens), []
        return MtpRows(memory, start, tokens, hidden)

    def _draft(self, wanted: list[tuple[Propose, MtpRows]]) -> list[Draft]:
        p = self._params
        asked = [Wanted(self._how(message.choosing), message.limit, message.floor, p.draft_p_min) for message, _ in wanted]
        num_prepared = self._head.num_prepared
        drafted = self._head.draft([rows for _, rows in wanted], asked)
        is_typical = self._head.num_prepared == num_prepared
        return [
            Draft("draft-mtp", *((each.tokens, each.shares) if len(each.tokens) >= p.draft_n_min else ((), ())), is_typical)
            for each in drafted
        ]
