"""The MTP drafter: drafts with the MTP head, all sequences that ask together as one batch. Where they need not ask, the target decoder
does, with a head of its own over the same weights and caches.

A sequence's cache rows are exact once the target's hidden row and the token have gone in. Drafting runs ahead with the
head's own outputs; what is accepted of it is computed again with the target's hidden rows, in the same pass as the next
draft's first step. Hidden rows are read by (lease, position), never by place in a batch.

Above temperature 0 a draft is drawn with the target's own noise for its position, and so agrees with the target more
often than a draw of its own would: coupled noise (figures in kernels/EXPERIMENTS.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol

from ..core.actor import Actor, Executor
from ..core.begun import Begun
from ..core.channel import Envelope, Mailbox
from ..core.errors import InternalBug, LeaseLost, PositionLost
from ..core.messages import Commit, Forget, Mail, Observe, Propose, Resume
from ..core.protocol import CHUNK
from ..core.speculation import DRAFTER_PATIENCE_SECONDS, Draft, SpeculationParams
from ..core.vocabulary import Choosing, SamplingParams
from ..kernels.model.drafts import Drafted, Following, MtpRows, Wanted
from ..kernels.model.memory import SequenceMemory, SequencePool
from ..kernels.sampling import Choices

GREEDY = Choosing(SamplingParams())
#: Of so many tokens that it catches up on without having drafted them, the head says whether it would have.
NUM_MARKED = 6


class DraftHead(Protocol):
    """What drafts: an MtpHead, or a simulated one. `hidden` is the width of a hidden row."""

    hidden: int

    @property
    def num_prepared(self) -> int: ...

    def mark(self, rows: MtpRows, num_marked: int, choosing: Choosing) -> tuple[bool, ...]: ...

    def begin(self, batch: Sequence[MtpRows], wanted: Sequence[Wanted]) -> Begun[list[Drafted]]: ...

    def draft_after(self, batch: Sequence[Following], choices: Choices) -> Begun[list[Drafted]]: ...

    def seconds(self, num_rows: int) -> float:
        """About how long so many rows take."""
        ...


class HeadDrafts:
    """Drafts of an MTP head, as SpeculationParams want them."""

    def __init__(self, head: DraftHead, params: SpeculationParams) -> None:
        self.head, self._params = head, params

    def how(self, choosing: Choosing) -> Choosing:
        """How drafts are chosen where the target chooses as said."""
        return GREEDY if self._params.draft_sampling == "greedy" else choosing

    def wanted(self, choosing: Choosing, limit: int, floor: float) -> Wanted:
        """A draft of `limit` tokens at most, chosen as the target chooses, unless all together are less likely than `floor`."""
        return Wanted(self.how(choosing), limit, floor, self._params.draft_p_min)

    def of(self, batch: Sequence[MtpRows], wanted: Sequence[Wanted]) -> Begun[list[Draft]]:
        """Each one's after its rows."""
        return self._following(lambda: self.head.begin(batch, wanted))

    def after(self, batch: Sequence[Following], choices: Choices) -> Begun[list[Draft]]:
        """Each one's after what a verify brings; see HeadBase.draft_after."""
        return self._following(lambda: self.head.draft_after(batch, choices))

    def _following(self, begin: Callable[[], Begun[list[Drafted]]]) -> Begun[list[Draft]]:
        num_prepared, begun = self.head.num_prepared, begin()
        return Begun(begun.mark, lambda: self._drafts(begun.finish(), num_prepared), on_device=begun.on_device)

    def _drafts(self, drafted: Sequence[Drafted], num_prepared: int) -> list[Draft]:
        is_typical, least = self.head.num_prepared == num_prepared, self._params.draft_n_min
        return [
            Draft("draft-mtp", *((each.tokens, each.shares) if len(each.tokens) >= least else ((), ())), is_typical) for each in drafted
        ]


class MtpDrafter(Actor):
    """Of a lease whose beginning it has not heard of (it was restarted meanwhile) it knows nothing, until Resume tells it; the cache
    is the lease's, and holds what was computed before."""

    patience_seconds = DRAFTER_PATIENCE_SECONDS

    def __init__(self, mailbox: Mailbox, executor: Executor, head: DraftHead, pool: SequencePool, params: SpeculationParams) -> None:
        super().__init__(mailbox, executor)
        self._drafts, self._pool = HeadDrafts(head, params), pool
        self._behind: dict[int, list[int]] = {}  # by lease: tokens that the target has computed, and the head has not

    @property
    def enough(self) -> float:
        """Never: while others send, a quicker drafter may make this one's draft needless."""
        return math.inf

    def is_quick(self, message: Mail[Any]) -> bool:
        if not isinstance(message, Propose | Commit):
            return False
        tokens = message.tokens if isinstance(message, Commit) else message.since
        num_behind = len(tokens) + len(self._behind.get(message.lease, ()))
        if isinstance(message, Commit) or num_behind >= CHUNK:
            return num_behind < CHUNK
        return self._pool.num_used == 1 and self.is_short(self._drafts.head.seconds(num_behind + message.limit))

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
                    self._begin(lease, len(tokens))
                    envelope.answer(None)
                case Forget(lease=lease):
                    self._behind.pop(lease, None)
                    envelope.answer(None)
                case other:
                    raise InternalBug(f"MTP drafter got {other!r}")
        envelopes, batch_rows, wanted = list[Envelope](), list[MtpRows](), list[Wanted]()
        for envelope, message in proposals:
            if envelope.is_abandoned:
                continue
            envelope.start()
            rows = self._catch_up(message.lease, message.position, message.ahead)
            if rows is None:
                envelope.answer(Draft("draft-mtp", ()))
            else:
                envelopes.append(envelope)
                batch_rows.append(rows)
                wanted.append(self._drafts.wanted(message.choosing, message.limit, message.floor))
        if envelopes:
            num_rows = sum(each.limit - 1 + len(rows.tokens) for rows, each in zip(batch_rows, wanted, strict=True))
            drafts = await self.follow(
                lambda: self._drafts.of(batch_rows, wanted),
                self._drafts.head.seconds(num_rows),
                num_rows,
                is_alone=self._pool.num_used <= 1,
            )
            for envelope, draft in zip(envelopes, drafts, strict=True):
                envelope.answer(draft)

    def _begin(self, lease: int, num_done: int) -> None:
        """Nothing is behind in a lease that holds so many rows."""
        with suppress(LeaseLost):
            self._pool[lease].num_head_rows, self._behind[lease] = num_done, []

    def _known(self, lease: int) -> tuple[SequenceMemory, list[int]] | None:
        """Memory and tokens behind of a lease whose beginning has been heard of, and that has not been lost."""
        if lease in self._behind:
            try:
                return self._pool[lease], self._behind[lease]
            except LeaseLost:
                del self._behind[lease]
        return None

    async def _learn(
        self, lease: int, position: int, tokens: tuple[int, ...], *, is_chunk: bool = False, choosing: Choosing | None = None
    ) -> tuple[bool, ...]:
        """Says what Commit wants to hear, if these tokens are computed now."""
        if is_chunk and position == 0:
            self._begin(lease, 0)
        if not tokens or (known := self._known(lease)) is None:
            return ()
        memory, behind = known
        # The first of a round's tokens is known already when a draft was asked for that round.
        end = memory.num_head_rows + len(behind)
        if not position <= end <= position + len(tokens):
            raise InternalBug(f"tokens at {position}, but {end} are known")
        behind += tokens[end - position :]
        # A round's few tokens wait for the next draft, to share its pass; a chunk's hidden rows do not last.
        if behind and (is_chunk or len(behind) >= CHUNK) and (rows := self._catch_up(lease, position + len(tokens), ())) is not None:
            num_marked = min(NUM_MARKED, len(rows.tokens) - 1) if choosing is not None else 0
            how = self._drafts.how(choosing) if choosing is not None else GREEDY
            return await self.compute(lambda: self._drafts.head.mark(rows, num_marked, how), self._drafts.head.seconds(len(rows.tokens)))
        return ()

    def _catch_up(self, lease: int, position: int, next_token: tuple[int, ...]) -> MtpRows | None:
        """The rows that make the cache exact up to `position`, all that the target has computed, then `next_token`, whose row has exact
        inputs though the target has not computed it. None when they cannot be had."""
        if (known := self._known(lease)) is None:
            return None
        memory, behind = known
        if not behind and next_token and memory.num_head_rows == position + 1:
            memory.num_head_rows = position  # that row is computed again
        start, tokens = memory.num_head_rows, (*behind, *next_token)
        if start + len(behind) != position:
            raise InternalBug(f"asked to draft from {position}, but {start + len(behind)} are known")
        behind.clear()
        # Rows whose hidden rows are gone stay as they are in the cache: somewhat worse drafts, no harm.
        num_lost = max(0, min(memory.hidden.first + 1, position) - start) if memory.hidden.first else 0
        start, tokens = start + num_lost, tokens[num_lost:]
        if tokens:
            with suppress(PositionLost):
                rows = MtpRows(memory, start, tokens, memory.hidden.before(start, len(tokens)))
                memory.num_head_rows = start + len(tokens)
                return rows
        memory.num_head_rows = position
        return None
