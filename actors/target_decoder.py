"""The target decoder: owns the trunk. Takes all that waits in its mailbox as one batch of rows; prefill chunks go one by one.

Where a sequence knows already what it will ask the MTP head after its verify, the head drafts at once, while the sequence takes up
the verdict: one question a round instead of two. The head's weights are shared with the MTP drafter, which everybody else asks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
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
from ..kernels.model.drafts import Following
from ..kernels.model.memory import SequenceMemory, SequencePool
from ..kernels.model.trunk import Rows
from ..kernels.sampling import Ask, Choices, logprobs
from .mtp_drafter import HeadDrafts

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

    def prefill(self, rows: Rows, is_last: bool) -> F32 | None: ...

    def freeze(self, memory: SequenceMemory, position: int) -> None: ...

    def seconds(self, num_rows: int) -> float:
        """About how long so many rows take."""
        ...


class TargetDecoder(Actor):
    def __init__(
        self, mailbox: Mailbox, executor: Executor, target: Target, pool: SequencePool, trace: Trace, drafts: HeadDrafts | None = None
    ) -> None:
        """`drafts` of a head that nobody else computes with."""
        super().__init__(mailbox, executor)
        self._target, self._pool, self._trace, self._drafts = target, pool, trace, drafts

    @property
    def enough(self) -> float:
        """Every sequence there is."""
        return self._pool.num_used

    def is_quick(self, message: Mail[Any]) -> bool:
        if not isinstance(message, Verify) or self._pool.num_used > 1:
            return False
        num_rows = len(message.tokens)
        return self.is_short(self._target.seconds(num_rows)) and self.is_short(self._drafting_seconds(num_rows, message.next_limit))

    def _drafting_seconds(self, num_rows: int, num_drafts: int) -> float:
        return self._drafts.head.seconds(num_rows + num_drafts) if self._drafts is not None and num_drafts else 0.0

    async def handle(self, batch: list[Envelope]) -> None:
        verifies: list[tuple[Envelope, Verify, Rows]] = []
        prefills: list[tuple[Envelope, Prefill, Rows]] = []
        freezes: list[tuple[Envelope, Freeze]] = []
        forgets: list[Envelope] = []
        for envelope in batch:
            message = envelope.message
            if isinstance(message, Forget):
                forgets.append(envelope)
                continue
            if isinstance(message, Freeze):
                freezes.append((envelope, message))
                continue
            if not isinstance(message, Verify | Prefill):
                raise InternalBug(f"target decoder got {message!r}")
            rows = self._rows(envelope, message)
            if rows is None:
                continue
            if isinstance(message, Verify):
                verifies.append((envelope, message, rows))
            else:
                prefills.append((envelope, message, rows))
        together = [each for each in verifies if not each[1].is_suspect]
        for group in [together, *([each] for each in verifies if each[1].is_suspect)]:
            if group:
                await self._verify(group)
        for envelope, message, rows in prefills:
            if not envelope.is_abandoned:
                await self._prefill(envelope, message, rows)
        for envelope, message in freezes:
            if not envelope.is_abandoned:
                await self._freeze(envelope, message)
        for envelope in forgets:  # what was asked before has been computed or passed over
            envelope.answer(None)

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

    async def _verify(self, verifies: list[tuple[Envelope, Verify, Rows]]) -> None:
        envelopes, messages, batch = zip(*verifies, strict=True)
        asks = [Ask(message.choosing, message.position + 1, message.tokens[1:], message.num_right) for message in messages]
        following = self._following(messages, batch)
        # Where logits come to the host, a device would have made the drafts before.
        is_early = not any(map(_needs_host, asks))

        def verify() -> Begun[tuple[list[Chosen], LaterDrafts]]:
            logits = self._target.verify(batch)[0]
            choices, mark = Choices(logits, asks), self._mark()
            drafts = self._begin_drafts(following, choices) if is_early else None
            return Begun(mark, lambda: (_chosen(logits, choices), drafts or self._begin_drafts(following, choices)), not is_early)

        num_rows, clock = sum(len(rows.tokens) for rows in batch), self._trace.clock
        began, num_prepared = clock(), self._target.num_prepared
        chosen, draft = await self._do(verify, self._target.seconds(num_rows), ("verify", num_rows), envelopes)
        said = num_rows, (clock() - began) / 1e9, len(batch), self._target.num_prepared == num_prepared
        coming: dict[int, Reply[Draft | None]] = {each.index: envelopes[each.index].promise() for each in following}
        for i, envelope in enumerate(envelopes):
            envelope.answer(Verdict(*chosen[i], *said, coming.get(i)))
        if following:
            began, computed, num_drafts = clock(), self.mailbox.computed_ns, sum(each.wanted.limit for each in following)
            seconds, kind = self._drafting_seconds(num_rows, num_drafts), ("drafts", num_rows, num_drafts)
            drafts = await self._do(lambda: draft, seconds, kind, [*coming.values()])
            ended, computed = clock(), self.mailbox.computed_ns - computed
            for (i, reply), one in zip(coming.items(), drafts, strict=True):
                request, number = messages[i].flow
                self._trace.count("drafting us", (ended - began) // 1000, messages[i].flow)
                if self._trace.is_on:  # as if the round that it is for had asked
                    self._trace.record(Span(self.name, "Draft", Flow(request, number + 1), began, began, ended, "ok", computed))
                reply.set(replace(one, seconds=(ended - began) / 1e9) if one is not None else None)

    def _following(self, messages: Sequence[Verify], batch: Sequence[Rows]) -> list[Following]:
        """The drafts that are to be made behind these verifies: not where the head is elsewhere."""
        drafts = self._drafts
        if drafts is None:
            return []
        return [
            Following(rows.memory, i, drafts.wanted(message.choosing, message.next_limit, message.next_floor))
            for i, (message, rows) in enumerate(zip(messages, batch, strict=True))
            if message.next_limit and rows.memory.num_head_rows == message.position + 1
        ]

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
                position, tokens = each.brought(choices)
                each.memory.num_head_rows = position + len(tokens)
            return [*found]

        return Begun(_OfDrafts(begun.mark) if begun is not None and begun.mark is not None else None, draft)

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
        try:
            memory = self._pool[message.lease]
            memory.check(message.position, 0, is_chunk=False)
            freeze: Begun[None] = Begun(None, lambda: self._target.freeze(memory, message.position))
            await self._do(lambda: freeze, max(self._target.seconds(message.position), FREEZE_SECONDS), "freeze", [envelope])
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
class _OfDrafts:
    """A mark whose failure is that of the drafts, which show it when they are read."""

    mark: Mark

    def is_done(self) -> bool:
        try:
            return self.mark.is_done()
        except Exception:
            return True

    def wait(self) -> None:
        with suppress(Exception):
            self.mark.wait()


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
