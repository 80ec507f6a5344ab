"""The target decoder: owns the trunk. Takes all that waits in its mailbox as one batch of rows; prefill chunks go one by one.

Where a sequence knows already what it will ask the MTP head after its verify, the head drafts at once, while the sequence takes up
the verdict: one question a round instead of two. The head's weights are shared with the MTP drafter, which everybody else asks.

Where all sequences know what they will have verified after that, a device begins with it at once: it works on the next round while the last
one's tokens are on their way. Should a sequence ask for something else, that is computed as if nothing had been begun.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

from ..core.actor import Actor, Executor
from ..core.begun import Begun, Mark
from ..core.channel import Envelope, Mailbox, Reply
from ..core.errors import InternalBug, LeaseLost, PositionLost, WorkFailed
from ..core.messages import Forget, Freeze, Mail, Prefill, Verify
from ..core.speculation import Draft
from ..core.trace import Flow, Span, Trace
from ..core.vocabulary import TokenLogprob, Verdict
from ..kernels.backend import F32
from ..kernels.model.drafts import Following, NextRows, brought
from ..kernels.model.memory import SequenceMemory, SequencePool
from ..kernels.model.trunk import Rows
from ..kernels.sampling import Ask, Choices, logprobs
from .mtp_drafter import GREEDY, HeadDrafts

logger = logging.getLogger("forerun")

R = TypeVar("R")

#: What a copy of a sequence takes at least: its memory comes to the host, after all that a device has been told before.
FREEZE_SECONDS = 0.01
#: What is chosen for a sequence's rows, from the logits [R, V] of all, and the log probabilities that are wanted of it.
Chosen = tuple[tuple[int, ...], tuple[TokenLogprob, ...]]
#: Drafts behind a verify.
LaterDrafts = Begun[list[Draft | None]]


class Target(Protocol):
    """What decodes: a Trunk, or a simulated one."""

    @property
    def num_prepared(self) -> int: ...

    @property
    def marker(self) -> Callable[[], Mark] | None:
        """What marks all that was begun on a device; None where all is done when a call returns."""
        ...

    def verify(self, batch: Sequence[Rows]) -> tuple[F32, F32]: ...

    def verify_next(self, batch: Sequence[NextRows], choices: Choices, drafts: object) -> F32 | None: ...

    def settle(self, memory: SequenceMemory, position: int, num_rows: int) -> None: ...

    def prefill(self, rows: Rows, is_last: bool) -> F32 | None: ...

    def freeze(self, memory: SequenceMemory, position: int, *, is_whole: bool) -> None: ...

    def seconds(self, num_rows: int) -> float:
        """About how long so many rows take."""
        ...


@dataclass(slots=True)
class _Ahead:
    """A verify that has been begun before anybody asked for it: `logits` of the rows of several leases, of each so many. What was begun
    before it had been done at `began_ns`."""

    logits: F32
    mark: Mark | None
    leases: tuple[int, ...]
    num_rows: tuple[int, ...]
    #: By lease: where its tokens stand, and they, once they are known and until it has asked.
    tokens: dict[int, tuple[int, tuple[int, ...]]] = field(default_factory=dict[int, tuple[int, tuple[int, ...]]])
    began_ns: int = 0

    @property
    def is_done(self) -> bool:
        return self.mark is None or self.mark.is_done()

    def drafted(self, lease: int, tokens: tuple[int, ...]) -> None:
        position, last = self.tokens[lease]
        self.tokens[lease] = position, (*last, *tokens)

    def is_of(self, message: Verify) -> bool:
        """Whether it computes what is asked: there may be fewer drafts than were made."""
        position, tokens = self.tokens.get(message.lease, (-1, ()))
        return not message.is_suspect and (message.position, message.tokens) == (position, tokens[: len(message.tokens)])


class TargetDecoder(Actor):
    def __init__(
        self, mailbox: Mailbox, executor: Executor, target: Target, pool: SequencePool, trace: Trace, drafts: HeadDrafts | None = None
    ) -> None:
        """`drafts` of a head that nobody else computes with."""
        super().__init__(mailbox, executor)
        self._target, self._pool, self._trace, self._drafts = target, pool, trace, drafts
        self._ahead: _Ahead | None = None
        self._prefills = deque[tuple[Envelope, Prefill]]()  # of them one between two verifies, so that texts go on
        self._took: dict[int, float] = {}  # seconds of the newest verify of so many rows that was waited for from its beginning to its end

    @property
    def enough(self) -> float:
        """Every sequence there is, but those that have asked."""
        return self._pool.num_used - len(self._prefills)

    def is_quick(self, message: Mail[Any]) -> bool:
        if not isinstance(message, Verify) or self._pool.num_used > 1:
            return False
        num_rows = len(message.tokens)
        return self.is_short(self._target.seconds(num_rows)) and self.is_short(self._drafting_seconds(num_rows, message.next_limit))

    def _drafting_seconds(self, num_rows: int, num_drafts: int) -> float:
        return self._drafts.head.seconds(num_rows + num_drafts) if self._drafts is not None and num_drafts else 0.0

    async def handle(self, batch: list[Envelope]) -> None:
        verifies: list[tuple[Envelope, Verify, Rows]] = []
        freezes: list[tuple[Envelope, Freeze]] = []
        forgets: list[tuple[Envelope, Forget]] = []
        for envelope in batch:
            message = envelope.message
            if isinstance(message, Forget):
                forgets.append((envelope, message))
                continue
            if isinstance(message, Freeze):
                freezes.append((envelope, message))
                continue
            if isinstance(message, Prefill):
                self._prefills.append((envelope, message))
            elif not isinstance(message, Verify):
                raise InternalBug(f"target decoder got {message!r}")
            elif (rows := self._rows(envelope, message)) is not None:
                verifies.append((envelope, message, rows))
        if verifies:
            await self._verify_all(verifies)
        for envelope, message in freezes:
            if not envelope.is_abandoned:
                await self._freeze(envelope, message)
        for envelope, message in forgets:  # what was asked before has been computed, or nobody waits for it and it is passed over
            self._drop(message.lease)
            envelope.answer(None)
        is_one_done = False
        while self._prefills and not is_one_done:
            envelope, message = self._prefills.popleft()
            if (rows := self._rows(envelope, message)) is not None:
                await self._prefill(envelope, message, rows)
                is_one_done = True
            elif envelope.is_abandoned:
                envelope.finish("abandoned")
        self.is_behind = bool(self._prefills)

    def _rows(self, envelope: Envelope, message: Verify | Prefill) -> Rows | None:
        """What to compute, or None when the sender has gone away or its memory cannot go there."""
        if envelope.is_abandoned:
            return None
        try:
            memory = self._pool[message.lease]
            memory.check(message.position, len(message.tokens), is_chunk=isinstance(message, Prefill))
        except (LeaseLost, PositionLost) as error:
            envelope.fail(error)
            return None
        return Rows(memory, message.position, message.tokens)

    async def _verify_all(self, verifies: list[tuple[Envelope, Verify, Rows]]) -> None:
        """What has been begun, then the others together, then the suspect ones one by one."""
        ahead, begun, others = self._ahead, list[tuple[Envelope, Verify, Rows]](), list[tuple[Envelope, Verify, Rows]]()
        for each in verifies:
            message = each[1]
            is_begun = ahead is not None and ahead.is_of(message)
            if ahead is not None and message.lease in ahead.tokens:
                self._trace.count("begun early", int(is_begun), message.flow)
            (begun if is_begun else others).append(each)
            self._drop(message.lease)
        if begun:
            await self._verify(begun, ahead)
        together = [each for each in others if not each[1].is_suspect]
        for group in [together, *([each] for each in others if each[1].is_suspect)]:
            if group:
                await self._verify(group, None, is_free=ahead is None or ahead.is_done)

    def _drop(self, lease: int) -> None:
        """Whatever has been begun for a lease is not what is computed next."""
        if self._ahead is not None:
            self._ahead.tokens.pop(lease, None)
            if not self._ahead.tokens:
                self._ahead = None

    async def _verify(self, verifies: list[tuple[Envelope, Verify, Rows]], ahead: _Ahead | None, *, is_free: bool = True) -> None:
        """Of `ahead`, if there is one, those that were begun. Not `is_free`: something else is before it on the device."""
        envelopes, messages, batch = zip(*verifies, strict=True)
        asks, at = _asks(messages, ahead)
        following = self._following(messages, batch, at)
        # Where logits come to the host, a device would have made the drafts before.
        is_early = not any(map(_needs_host, asks))

        def verify() -> Begun[tuple[list[Chosen], LaterDrafts, _Ahead | None]]:
            logits = ahead.logits if ahead is not None else self._target.verify(batch)[0]
            choices, mark = Choices(logits, asks), self._mark()
            later = [*following.values()]
            drafts = self._begin_drafts(later, choices) if is_early else None
            begun = self._begin_next(messages, batch, at, following, choices, drafts) if drafts is not None else None

            def read() -> tuple[list[Chosen], LaterDrafts, _Ahead | None]:
                chosen = _chosen(logits, choices)
                if begun is not None:
                    self._settle(begun, choices, batch, at)
                    self._ahead = begun
                return [chosen[i] for i in at], drafts or self._begin_drafts(later, choices), begun

            return Begun(mark, read, not is_early)

        num_rows, clock = sum(len(rows.tokens) for rows in batch), self._trace.clock
        is_late, began = ahead is not None and ahead.is_done, ahead.began_ns if ahead is not None else clock()
        num_prepared = self._target.num_prepared
        kind = "verify" if ahead is None else "rest of a verify", num_rows
        chosen, draft, begun = await self._do(verify, self._target.seconds(num_rows), kind, envelopes)
        seconds, is_typical = (clock() - began) / 1e9, is_free and self._target.num_prepared == num_prepared
        if is_late:  # since when, nobody knows
            seconds, is_typical = min(seconds, self._took.get(num_rows, seconds)), is_typical and num_rows in self._took
        elif is_typical:
            self._took[num_rows] = seconds
        said = num_rows, seconds, len(batch), is_typical
        coming: dict[int, Reply[Draft | None]] = {i: envelopes[i].promise() for i in following}
        for i, envelope in enumerate(envelopes):
            envelope.answer(Verdict(*chosen[i], *said, coming.get(i)))
        if following:
            began, computed, num_drafts = clock(), self.mailbox.computed_ns, sum(each.wanted.limit for each in following.values())
            seconds, kind = self._drafting_seconds(num_rows, num_drafts), ("drafts", num_rows, num_drafts)
            drafts = await self._do(lambda: draft, seconds, kind, [*coming.values()])
            ended, computed = clock(), self.mailbox.computed_ns - computed
            for (i, reply), one in zip(coming.items(), drafts, strict=True):
                request, number = messages[i].flow
                self._trace.count("drafting us", (ended - began) // 1000, messages[i].flow)
                if self._trace.is_on:  # as if the round that it is for had asked
                    self._trace.record(Span(self.name, "Draft", Flow(request, number + 1), began, began, ended, "ok", computed))
                if begun is not None and one is not None:
                    begun.drafted(messages[i].lease, one.tokens)
                reply.set(replace(one, seconds=(ended - began) / 1e9) if one is not None else None)
        if begun is not None:
            begun.began_ns = clock()

    def _following(self, messages: Sequence[Verify], batch: Sequence[Rows], at: Sequence[int]) -> dict[int, Following]:
        """The drafts that are to be made behind these verifies, by number of the verify: none where the head is elsewhere. `at` says
        where the choices of each will be."""
        drafts = self._drafts
        if drafts is None:
            return {}
        return {
            i: Following(rows.memory, at[i], drafts.wanted(message.choosing, message.next_limit, message.next_floor))
            for i, (message, rows) in enumerate(zip(messages, batch, strict=True))
            if message.next_limit and rows.memory.num_head_rows == message.position + 1
        }

    def _begin_next(
        self, messages: Sequence[Verify], batch: Sequence[Rows], at: Sequence[int], following: dict[int, Following], choices: Choices,
        drafts: LaterDrafts,
    ) -> _Ahead | None:  # fmt: skip
        """The verify after one, where everybody knows what that will be; others would have been computed with it."""
        is_known = all(message.goes_on and (i in following or not message.next_limit) for i, message in enumerate(messages))
        if not is_known or self._pool.num_used > len(messages) or (following and drafts.on_device is None):
            return None
        order = {i: number for number, i in enumerate(following)}
        rows = [
            NextRows(rows.memory, at[i], order.get(i, 0), message.next_limit)
            for i, (message, rows) in enumerate(zip(messages, batch, strict=True))
        ]
        logits = self._target.verify_next(rows, choices, drafts.on_device)
        if logits is None:
            return None
        mark = self._mark()
        leases, counts = tuple(message.lease for message in messages), tuple(1 + each.num_drafts for each in rows)
        return _Ahead(logits, _Quiet(mark) if mark is not None else None, leases, counts)

    def _settle(self, begun: _Ahead, choices: Choices, batch: Sequence[Rows], at: Sequence[int]) -> None:
        """It is known now what the verify before it brings."""
        for lease, num_rows, rows, index in zip(begun.leases, begun.num_rows, batch, at, strict=True):
            position, tokens = brought(choices, index)
            position += len(tokens) - 1
            begun.tokens[lease] = position, tokens[-1:]
            self._target.settle(rows.memory, position, num_rows)

    def _begin_drafts(self, following: Sequence[Following], choices: Choices) -> LaterDrafts:
        """A head that fails costs its drafts alone, and is asked no more."""
        drafts, nothing = self._drafts, list[Draft | None]([None] * len(following))
        if drafts is None or not following:
            return Begun(None, lambda: nothing)

        def guarded(work: Callable[[], R]) -> R | None:
            try:
                return work()
            except (InternalBug, AssertionError):
                raise
            except Exception:  # of a drafter, of which any costs its drafts alone; a bug of ours is none
                logger.exception("the target decoder's MTP head failed")
                self._drafts = None
                return None

        begun = guarded(lambda: drafts.after(following, choices))

        def draft() -> list[Draft | None]:
            found = guarded(begun.finish) if begun is not None else None
            if found is None:
                return nothing
            for each in following:
                position, tokens = brought(choices, each.index)
                each.memory.num_head_rows = position + len(tokens)
            return [*found]

        if begun is None or begun.mark is None:
            return Begun(None, draft)
        return Begun(_Quiet(begun.mark), draft, on_device=begun.on_device)

    async def _prefill(self, envelope: Envelope, message: Prefill, rows: Rows) -> None:
        ask = Ask(message.choosing, message.position + len(message.tokens))

        def prefill() -> Begun[Verdict]:
            logits = self._target.prefill(rows, message.is_last)
            choices = Choices(logits, [ask]) if logits is not None else None

            def verdict() -> Verdict:
                if message.is_kept:
                    rows.memory.keep()
                return Verdict(*_chosen(logits, choices)[0]) if logits is not None and choices is not None else Verdict(())

            return Begun(self._mark(), verdict, message.is_kept or _needs_host(ask))

        envelope.start()
        seconds, kind = self._target.seconds(len(rows.tokens)), ("prefill", len(rows.tokens))
        envelope.answer(await self._do(prefill, seconds, kind, [envelope]))

    async def _freeze(self, envelope: Envelope, message: Freeze) -> None:
        def freeze() -> None:
            try:
                self._target.freeze(memory, message.position, is_whole=message.is_whole)
            except MemoryError:
                if message.is_whole:
                    raise

        try:
            memory = self._pool[message.lease]
            memory.check(message.position, 0, is_chunk=False)
            self._drop(message.lease)  # memory goes back to the position, without rows after it
            await self._do(lambda: Begun(None, freeze), max(self._target.seconds(message.position), FREEZE_SECONDS), "freeze", [envelope])
        except (LeaseLost, PositionLost) as error:
            envelope.fail(error)
        else:
            envelope.answer(None)

    def _mark(self) -> Mark | None:
        return self._target.marker() if self._target.marker is not None else None

    async def _do(self, begin: Callable[[], Begun[R]], seconds: float, kind: Hashable, owed: Sequence[Envelope | Reply[Any]]) -> R:
        """Computes, all of it at the executor where no device does it; should this actor die of it, those whose work it was are told so."""
        try:
            if self._target.marker is None:
                return await self.compute(lambda: begin().finish(), seconds)
            return await self.follow(begin, seconds, kind, is_alone=self._pool.num_used <= 1)
        except Exception:
            for each in owed:
                each.fail(WorkFailed("the target decoder failed working on this request"))
            raise


@dataclass(frozen=True, slots=True)
class _Quiet:
    """A mark that says nothing of a failure: whoever reads what it marks sees it."""

    mark: Mark

    def is_done(self) -> bool:
        try:
            return self.mark.is_done()
        except Exception:
            return True

    def wait(self) -> None:
        with suppress(Exception):
            self.mark.wait()


def _asks(messages: Sequence[Verify], ahead: _Ahead | None) -> tuple[list[Ask], list[int]]:
    """What is chosen from the rows of a verify, and which of it each message is to hear. One that was begun before it was asked for may
    have rows in between of which nobody wants to hear."""
    asks = {message.lease: Ask(message.choosing, message.position + 1, message.tokens[1:], message.num_right) for message in messages}
    if ahead is None:
        return [*asks.values()], [*range(len(messages))]
    found, at = list[Ask](), dict[int, int]()
    for lease, num_rows in zip(ahead.leases, ahead.num_rows, strict=True):
        ask, num_asked = asks.get(lease), 0
        if ask is not None:
            at[lease], num_asked = len(found), ask.num_rows
            found.append(ask)
        if num_rows > num_asked:
            found.append(Ask(GREEDY, 0, (0,) * (num_rows - num_asked - 1)))
    return found, [at[message.lease] for message in messages]


def _needs_host(ask: Ask) -> bool:
    """Whether logits come to the host, which has much to do with them."""
    return ask.how.needs_host or ask.how.num_logprobs is not None


def _chosen(logits: F32, choices: Choices) -> list[Chosen]:
    found, start = list[Chosen](), 0
    for ask, chosen in zip(choices.asks, choices.read(), strict=True):
        rows, num_top = logits[start : start + ask.num_rows], ask.how.num_logprobs
        start += ask.num_rows
        said = () if num_top is None else tuple(logprobs(row, token, num_top) for row, token in zip(rows, chosen, strict=True))
        found.append((tuple(chosen), said))
    return found
