"""A sequence's side of its drafters: asks them, chooses, tells them what stands, and counts. A drafter that is gone or late costs
its draft alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from ..core.channel import Mailbox, Reply
from ..core.errors import ForerunError
from ..core.messages import Commit, Forget, Observe, Propose, Resume
from ..core.protocol import CHUNK
from ..core.speculation import Draft, DrafterName, DrafterStatistics, SpeculationParams
from ..core.trace import Flow, Trace
from ..core.vocabulary import Choosing, Verdict
from .chooser import Chooser, Experience, Plan

HEAD: DrafterName = "draft-mtp"
#: Tokens after which a drafter is told what stands though it is not asked: while the head can still read their hidden rows.
TOLD_AFTER = CHUNK


@dataclass(slots=True)
class _Drafter:
    """A drafter as this sequence sees it: `life` is the one it has told of its lease; it has not been told yet of `untold`, and that these
    tokens stand after it, for one message before the next question costs less than one every round."""

    mailbox: Mailbox
    life: int
    untold: Commit | None = None
    then: list[int] = field(default_factory=list[int])


@dataclass(frozen=True, slots=True)
class Question:
    """What a draft is wanted for: it goes on after `last_token`, which stands at `position`, with `room` tokens at most."""

    flow: Flow
    lease: int
    position: int
    last_token: int
    room: int
    choosing: Choosing


NOTHING = Plan((), 0.0)


class Drafting:
    """`computed` tells a drafter that was restarted all that stands; `overlap` lets drafters work side by side."""

    def __init__(
        self,
        mailboxes: dict[DrafterName, Mailbox],
        params: SpeculationParams,
        experience: Experience,
        salt: str,
        trace: Trace,
        overlap: bool,
        computed: Callable[[], tuple[int, ...]],
    ) -> None:
        self._drafters: dict[DrafterName, _Drafter] = {name: _Drafter(mailbox, mailbox.life) for name, mailbox in mailboxes.items()}
        self._params, self._experience, self._salt, self._trace, self._overlap = params, experience, salt, trace, overlap
        self._computed = computed
        self._chooser = Chooser(experience)
        self._observed: list[Reply[None]] = []  # of the last chunk, where drafters still read it
        self._drafts: list[Draft] = []  # of this round
        self._plan = NOTHING
        self._round_began = 0
        self.statistics: dict[DrafterName, DrafterStatistics] = {name: DrafterStatistics() for name in mailboxes}

    # A round

    async def propose(self, question: Question) -> Plan:
        """What to verify this round."""
        is_first_best = self._params.choose == "first"
        look_ups: list[DrafterName] = [name for name in self._drafters if name != HEAD]
        if not is_first_best:
            if look_ups and not self._chooser.looks():
                look_ups = []
            if not look_ups and self._chooser.rests():
                self._drafts, self._plan, self._round_began = [], NOTHING, 0
                return NOTHING
        now = self._trace.clock()
        if self._round_began and self._experience.verify(1):
            spent = (now - self._round_began) / 1e9
            self._chooser.overhead.saw(1, min(spent, self._experience.verify(1)))
        self._drafts, self._plan = [], NOTHING
        if look_ups:
            self._drafts += await self._ask(look_ups, question, (question.last_token,), question.room, 0.0)
            self._chooser.looked((self._trace.clock() - now) / 1e9)
        if is_first_best:
            if not self._drafts and HEAD in self._drafters:
                self._drafts += await self._ask([HEAD], question, (question.last_token,), question.room, 0.0)
            self._plan = Plan((self._drafts[0].cut(question.room),), 0.0) if self._drafts else self._plan
        else:
            self._plan = await self._choose(question, look_ups)
        if self._trace.is_on:
            self._trace.count("drafted " + " + ".join(part.drafter for part in self._plan.parts), len(self._plan.tokens), question.flow)
            self._trace.count("expected tokens/s", round(self._plan.rate), question.flow)
        return self._plan

    async def _choose(self, question: Question, look_ups: Sequence[DrafterName]) -> Plan:
        chooser, room = self._chooser, question.room
        plan = chooser.best(self._drafts, 0, room)
        if HEAD not in self._drafters:
            return plan
        limit, floor = chooser.head_limit(plan, min(room, self._params.draft_n_max))
        if question.choosing.sampling.temperature > 0:
            floor = 0.0  # drawn with the target's noise, an unlikely token is as often right as a likely one
        if not limit:
            return plan
        began = self._trace.clock()
        (head,) = await self._ask([HEAD], question, (question.last_token,), limit, floor) or (None,)
        seconds = (self._trace.clock() - began) / 1e9
        if head is None:
            return plan
        self._chooser.drafting.saw(len(head.tokens), seconds)
        num_head = len(head.tokens)
        self._drafts.append(head)
        plan = chooser.best(self._drafts, num_head, room)
        is_whole_head = len(plan.parts) == 1 and plan.parts[0].tokens == head.tokens and plan.parts[0].drafter == HEAD
        if look_ups and is_whole_head and num_head < room and chooser.is_likely(plan):
            ahead = (question.last_token, *head.tokens)
            plan = chooser.extended(plan, await self._ask(look_ups, question, ahead, room - num_head, 0.0), num_head, room)
        return plan

    async def _ask(self, names: Sequence[DrafterName], question: Question, ahead: tuple[int, ...], room: int, floor: float) -> list[Draft]:
        """The drafts with anything in them, in order of asking."""
        replies: list[Reply[Draft]] = []
        drafts: list[Draft] = []
        try:
            for name in names:
                drafter, limit = self._drafters[name], min(self._params.limit(name), room)
                if limit <= 0 or drafter.mailbox.is_closed:
                    continue
                message = Propose(question.flow, question.lease, question.position, ahead, limit, floor, question.choosing)
                with suppress(ForerunError):
                    await self._tell(drafter)
                    await self._resume(drafter, question.flow, question.lease)
                    replies.append(await drafter.mailbox.post(message))
                if not self._overlap:
                    drafts += await self._hear(replies)
            return drafts + await self._hear(replies)
        finally:
            for reply in replies:
                reply.abandon()

    @staticmethod
    async def _hear(replies: list[Reply[Draft]]) -> list[Draft]:
        drafts: list[Draft] = []
        while replies:
            with suppress(ForerunError):  # a drafter that has died costs its draft alone
                draft = await replies.pop(0).wait()
                if draft.tokens:
                    drafts.append(draft)  # which may be anything, and longer than asked for
        return drafts

    def settle(self, num_drafted: int, num_accepted: int, tokens: tuple[int, ...], verdict: Verdict) -> None:
        """The round brought `tokens`; of `num_drafted` draft tokens that were verified, `num_accepted` were right."""
        left, right = num_drafted, num_accepted
        for part in self._plan.parts:
            drafted, accepted = min(left, len(part.tokens)), min(right, len(part.tokens))
            if drafted:
                self.statistics[part.drafter] = self.statistics[part.drafter].after(drafted, accepted)
            left, right = left - drafted, right - accepted
        if self._params.choose == "rate":
            self._chooser.came(tokens, self._drafts, self._plan, verdict.num_rows, verdict.seconds)
        self._round_began = self._trace.clock()

    # What stands

    async def observe(self, message: Observe, is_last: bool) -> None:
        """A chunk of the prompt stands. Returns while drafters still read it, unless it is the last; `hear` waits for them."""
        for drafter in self._drafters.values():
            reply = await self._inform(drafter, message)
            if reply is not None:
                self._observed.append(reply)
        if not self._overlap or is_last:
            await self.hear()

    async def hear(self) -> None:
        for reply in self._observed:
            with suppress(ForerunError):
                await reply.wait()
        self._observed.clear()

    async def commit(self, message: Commit) -> None:
        for drafter in self._drafters.values():
            if drafter.untold is None:
                drafter.untold = message
            else:
                drafter.then += message.tokens
            if len(drafter.untold.tokens) + len(drafter.then) >= TOLD_AFTER:
                await self._tell(drafter)

    async def _tell(self, drafter: _Drafter) -> None:
        if drafter.untold is not None:
            message = replace(drafter.untold, tokens=(*drafter.untold.tokens, *drafter.then))
            drafter.untold, drafter.then = None, []
            await self._settled(await self._inform(drafter, message))

    async def _settled(self, reply: Reply[None] | None) -> None:
        """Waits for an answer where one thing is done at a time."""
        if reply is not None and not self._overlap:
            with suppress(ForerunError):
                await reply.wait()

    async def resume(self, flow: Flow, lease: int) -> None:
        """The lease holds something already."""
        for drafter in self._drafters.values():
            with suppress(ForerunError):
                await self._tell_all(drafter, flow, lease)

    async def forget(self, flow: Flow, lease: int) -> None:
        """Returns when no drafter works on the lease any more."""
        for reply in self._observed:
            reply.abandon()
        self._observed.clear()
        for name, drafter in self._drafters.items():
            if name == HEAD:
                drafter.untold, drafter.then = None, []  # it learns nothing for others
            await self._tell(drafter)
            with suppress(ForerunError):
                await drafter.mailbox.ask(Forget(flow, lease))

    async def _resume(self, drafter: _Drafter, flow: Flow, lease: int) -> bool:
        """Tells a drafter that was restarted all it has to know. Whether that was needed."""
        if drafter.life == drafter.mailbox.life:
            return False
        await self._tell_all(drafter, flow, lease)
        return True

    async def _tell_all(self, drafter: _Drafter, flow: Flow, lease: int) -> None:
        drafter.life = drafter.mailbox.life
        await drafter.mailbox.tell(Resume(flow, lease, self._computed(), self._salt))

    async def _inform(self, drafter: _Drafter, message: Observe | Commit) -> Reply[None] | None:
        """Nothing to wait for when the drafter is gone, or had to be told everything."""
        with suppress(ForerunError):
            if not drafter.mailbox.is_closed and not await self._resume(drafter, message.flow, message.lease):
                return await drafter.mailbox.post(message)
        return None
