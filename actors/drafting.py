"""A sequence's side of its drafters: asks them, chooses, tells them what stands, and counts. A drafter that is gone or late costs
its draft alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

from ..core.channel import Mailbox, Reply
from ..core.errors import ForerunError, Superseded
from ..core.messages import Commit, Forget, Mail, Observe, Propose, Resume
from ..core.protocol import CHUNK
from ..core.speculation import Draft, DrafterName, DrafterStatistics, SpeculationParams
from ..core.trace import Flow, Trace
from ..core.vocabulary import Choosing, Promise, SamplingParams, Verdict
from .chooser import Chooser, Plan
from .experience import Experience
from .lookup.pairs import Pairs
from .pace import AFTER

R = TypeVar("R")

HEAD: DrafterName = "draft-mtp"
#: Tokens after which a drafter is told what stands though it is not asked, at most: while the head can still read their hidden rows, of
#: which there are two chunks and the longest round, and one more round may be computed before it does. The head is told while rounds rest.
TOLD_AFTER = CHUNK * 3 // 2


@dataclass(slots=True)
class _Drafter:
    """A drafter as this sequence sees it. `life`: the life of the actor that was told of the lease. `num_told`: how many tokens it has
    been told; the others go with the next question, since one message costs less than one a round. None: unknown, because an answer
    was not waited for, and it is told no more."""

    mailbox: Mailbox
    life: int
    num_told: int | None = 0


@dataclass(frozen=True, slots=True)
class Question:
    """What a draft is wanted for: it continues after `last_token` at `position`, with at most `room` tokens."""

    flow: Flow
    lease: int
    position: int
    last_token: int
    room: int
    choosing: Choosing


NOTHING = Plan((), 0.0)


class Drafting:
    """The drafters of one sequence. `computed`: callable that gives the committed tokens from a position on; `overlap`: whether drafters
    work concurrently."""

    def __init__(
        self,
        mailboxes: dict[DrafterName, Mailbox],
        params: SpeculationParams,
        experience: Experience,
        salt: str,
        sampling: SamplingParams,
        trace: Trace,
        overlap: bool,
        computed: Callable[[int], tuple[int, ...]],
    ) -> None:
        self._drafters: dict[DrafterName, _Drafter] = {name: _Drafter(mailbox, mailbox.life) for name, mailbox in mailboxes.items()}
        self._params, self._experience, self._salt, self._trace, self._overlap = params, experience, salt, trace, overlap
        self._computed = computed
        # How tokens that the head catches up on were chosen; acceptance that is made up says nothing of the head.
        self._marked = None if params.synth_rates or params.choose == "first" else Choosing(sampling)
        self._is_first_best = params.choose == "first"
        has_look_ups, is_drawn = bool(mailboxes.keys() - {HEAD}), sampling.temperature > 0
        self._chooser = Chooser(experience, has_look_ups, HEAD in mailboxes, is_drawn)
        self._is_resting = False
        # Those who find nothing where the newest two tokens have not stood before, the others who look up, and what has stood.
        self._matching = [name for name in mailboxes if params.num_matched(name) > 1]
        self._looking: list[DrafterName] = [name for name in mailboxes if name != HEAD and name not in self._matching]
        self._pairs = Pairs()
        self._observed: list[Reply[None]] = []  # of the last chunk, where drafters still read it
        longest = 1 + max((params.limit(name) for name in mailboxes), default=0)
        self._told_after = max(CHUNK, min(TOLD_AFTER, 2 * CHUNK - longest))
        self._tell_at = 0  # no drafter has to be told of anything before this position
        self._told: list[Reply[tuple[bool, ...]]] = []  # what the head will say of tokens that it has been told of
        self._drafts: list[Draft] = []  # of this round
        self._plan = NOTHING
        self._next: Draft | None = None  # of the head for this round, made behind the last verify
        self._coming: Promise[Draft | None] | None = None  # the same while it is made, for the next round
        self._untold = self._waited = 0  # tokens that the head is held to know of meanwhile; nanoseconds that the reader was waited for
        self._is_wary = False  # the target died of a draft behind a verify of this sequence
        self._began, self._seconds = 0, 0.0  # when this round did, and, where there are questions, the seconds of drafting and verifying
        self.statistics: dict[DrafterName, DrafterStatistics] = {name: DrafterStatistics() for name in mailboxes}

    # A round

    async def hear_next(self) -> None:
        """Receives the draft made behind the last verify. Called first in every round."""
        self._next = None
        if self._coming is not None:
            coming, self._coming = self._coming, None
            try:
                self._next = await coming.wait()
            except ForerunError:
                self._is_wary = True
                raise
            head, seconds = self._drafters[HEAD], self._next.seconds if self._next is not None else 0.0
            if self._began:
                self._began += max(0, self._waited - round(1e9 * seconds))
            self._waited = 0
            if self._next is None and head.num_told is not None and head.life == head.mailbox.life:
                head.num_told -= self._untold

    def rests(self, position: int, last_token: int) -> bool:
        """Whether no drafter is asked and nothing is drafted in the round that continues from `last_token` at `position`."""
        if self._is_first_best or not self._drafters:
            self._is_resting = not self._drafters
            return self._is_resting
        pairs = self._pairs
        if self._matching and (missing := position + 1 - pairs.num_tokens) > 0:
            if missing > 1:
                pairs.extend(self._computed(pairs.num_tokens))
            pairs.add(last_token)
        now = self._trace.clock()
        if self._began:
            self._chooser.took((now - self._began) / 1e9, self._seconds)
        self._began, self._seconds = now, 0.0
        self._is_resting = self._chooser.rests(pairs.run if self._looking or pairs.is_repeated else None)
        return self._is_resting

    async def propose(self, question: Question) -> Plan:
        """Asks drafters and returns what to verify in a round that does not rest."""
        self._drafts, wanted = [], self._chooser.goes_on
        if self._is_first_best:
            self._plan = await self._first(question)
        elif wanted is not None:
            self._plan = await self._as_before(question, *wanted)
        else:
            self._plan = await self._choose(question)
        if self._trace.is_on:
            self._trace.count("drafted " + " + ".join(part.drafter for part in self._plan.parts), len(self._plan.tokens), question.flow)
            self._trace.count("expected tokens/s", round(self._plan.rate), question.flow)
        return self._plan

    def ahead(self, position: int, room: int) -> tuple[int, float, bool]:
        """(limit, floor, goes_on) for `Verify`: how many tokens the head drafts as soon as this round's outcome is known, and whether the
        next round verifies exactly these drafts (none with a limit of 0). Only if the head is certain to be asked. `room`: draft
        tokens the next round has at least; below 0 there may be no next round."""
        head = self._drafters.get(HEAD)
        if self._is_resting:
            return 0, 0.0, room >= 0 and (not self._drafters or self._chooser.will_rest)
        if self._is_wary or head is None or head.num_told != position or head.life != head.mailbox.life or head.mailbox.is_closed:
            return 0, 0.0, False
        if self._is_first_best:
            limit, floor = self._params.limit(HEAD) if len(self._drafters) == 1 else 0, 0.0
        else:
            limit, floor = self._chooser.will_go_on or (0, 0.0)
        return (limit, floor, limit > 0) if limit <= room else (0, 0.0, False)

    def _look_ups(self, is_repeated: bool) -> list[DrafterName]:
        """The look-up drafters to be asked, in order; those that know this text only, only after two tokens that have occurred before."""
        return [name for name in self._drafters if name != HEAD] if is_repeated else self._looking

    async def _first(self, question: Question) -> Plan:
        look_ups = self._look_ups(is_repeated=True)
        found = await self._found(look_ups, question, (question.last_token,), question.room)
        if not found and HEAD in self._drafters and (head := await self._asked_head(question, question.room, 0.0)) and head.tokens:
            found = [head]
        return Plan((found[0].cut(question.room),), 0.0) if found else NOTHING

    async def _as_before(self, question: Question, limit: int, floor: float) -> Plan:
        head = await self._asked_head(question, min(limit, question.room), floor)
        self._drafts = [head] if head is not None else []
        return Plan(tuple(self._drafts), self._plan.rate)

    async def _choose(self, question: Question) -> Plan:
        chooser, room = self._chooser, question.room
        if chooser.looks() and (look_ups := self._look_ups(self._pairs.is_repeated)):
            began = self._trace.clock()
            self._drafts += await self._found(look_ups, question, (question.last_token,), room)
            chooser.looked((self._trace.clock() - began) / 1e9)
        plan = chooser.best(self._drafts, 0, room)
        if HEAD not in self._drafters:
            return plan
        limit, floor = chooser.head_limit(plan, min(room, self._params.draft_n_max))
        if not limit:
            return plan
        began, is_there = self._trace.clock(), self._next is not None
        head = await self._asked_head(question, limit, floor)
        if head is not None and head.is_typical:
            chooser.drafted(max(1, len(head.tokens)), None if is_there else (self._trace.clock() - began) / 1e9)
        if head is not None and head.tokens:
            plan = await self._with_head(head, question)
        self._seconds = (self._trace.clock() - began) / 1e9
        return plan

    async def _asked_head(self, question: Question, limit: int, floor: float) -> Draft | None:
        """The head's draft of at most `limit` tokens."""
        head = self._next
        if head is None:
            (head,) = await self._ask([HEAD], question, (question.last_token,), limit, floor) or (None,)
        return head.cut(limit) if head is not None else None

    async def _with_head(self, head: Draft, question: Question) -> Plan:
        chooser, room, num_head, is_alone = self._chooser, question.room, len(head.tokens), not self._drafts
        self._drafts.append(head)
        plan = (chooser.whole(head) if is_alone else None) or chooser.best(self._drafts, num_head, room)
        if plan.parts == (head,) and num_head < room and plan.reach > 0.5:
            ahead = (question.last_token, *head.tokens)
            look_ups = self._look_ups(self._pairs.has(ahead[-2:]))
            if look_ups and (tails := await self._found(look_ups, question, ahead, room - num_head)):
                best = chooser.best(self._drafts, num_head, room)
                plan = chooser.extended(best, tails, num_head, room) if best.parts == (head,) else best
        return plan

    async def _found(self, names: Sequence[DrafterName], question: Question, ahead: tuple[int, ...], room: int) -> list[Draft]:
        """The drafts that are not empty."""
        return [draft for draft in await self._ask(names, question, ahead, room, 0.0) if draft.tokens]

    async def _ask(self, names: Sequence[DrafterName], question: Question, ahead: tuple[int, ...], room: int, floor: float) -> list[Draft]:
        """Asks drafters for their drafts, and returns the answers in the order of asking."""
        self._tell_at = 0
        replies: list[tuple[Reply[Draft], _Drafter, int, int]] = []  # how much had been told before, and has been with the question
        drafts: list[Draft] = []
        try:
            for name in names:
                drafter, limit = self._drafters[name], min(self._params.limit(name), room)
                if limit <= 0 or drafter.mailbox.is_closed:
                    continue
                with suppress(ForerunError):
                    await self._resume(drafter, question.flow, question.lease)
                    if (told := drafter.num_told) is None:
                        continue
                    since, drafter.num_told = self._computed(told), None
                    flow, lease, position = question.flow, question.lease, question.position
                    message = Propose(flow, lease, position, since, ahead, limit, floor, question.choosing)
                    replies.append((await drafter.mailbox.post(message), drafter, told, told + len(since)))
                if not self._overlap:
                    drafts += await self._hear(replies)
            return drafts + await self._hear(replies)
        finally:
            for reply, *_ in replies:
                reply.abandon()

    @staticmethod
    async def _hear(replies: list[tuple[Reply[Draft], _Drafter, int, int]]) -> list[Draft]:
        drafts: list[Draft] = []
        while replies:
            reply, drafter, before, after = replies.pop(0)
            try:
                draft = await reply.wait()
            except Superseded:
                drafter.num_told = before
            except ForerunError:  # a drafter that has died costs its draft alone, and is told everything
                pass
            else:
                drafter.num_told = after
                drafts.append(draft)  # which may be anything, and longer than asked for
        return drafts

    def settle(self, num_drafted: int, num_accepted: int, tokens: tuple[int, ...], verdict: Verdict) -> None:
        """The round committed `tokens`; of `num_drafted` verified draft tokens `num_accepted` were right."""
        self._coming = verdict.draft
        if self._coming is not None and (told := self._drafters[HEAD].num_told) is not None:
            self._untold = num_accepted + 1
            self._drafters[HEAD].num_told = told + self._untold
        if self._is_resting:
            if verdict.num_rows > 1 or self._experience.num_others:
                self._chooser.pace.was_beside(verdict.num_rows - 1, verdict.num_sequences - 1)
            if self._chooser.num_rests == AFTER and verdict.is_typical:
                self._experience.verify.saw(verdict.num_rows, verdict.seconds)
            return
        left, right = num_drafted, num_accepted
        for part in self._plan.parts:
            drafted, accepted = min(left, len(part.tokens)), min(right, len(part.tokens))
            if drafted:
                self.statistics[part.drafter] = self.statistics[part.drafter].after(drafted, accepted)
            left, right = left - drafted, right - accepted
        if self._is_first_best:
            return
        if self._chooser.goes_on is not None:
            (head,) = self._drafts or (None,)
            self._chooser.went_on(head, tokens, verdict.is_typical and (head is None or head.is_typical))
            if (num_other_rows := max(0, verdict.num_rows - num_drafted - 1)) or self._experience.num_others:
                self._chooser.pace.was_beside(num_other_rows, verdict.num_sequences - 1)
        else:
            seconds = verdict.seconds if verdict.is_typical else 0.0  # is not known
            self._chooser.came(tokens, self._drafts, self._plan, verdict.num_rows, seconds, verdict.num_sequences)
            self._seconds += verdict.seconds

    def waited(self, nanoseconds: int) -> None:
        """This round waited so many nanoseconds for the reader, which is not part of its cost."""
        if self._coming is not None:  # and is drafted meanwhile
            self._waited = nanoseconds
        elif self._began:
            self._began += nanoseconds

    # What stands

    async def observe(self, message: Observe, is_last: bool) -> None:
        """Tells drafters of a computed chunk of the prompt. Returns while they still read it, unless it is the last; `hear` waits for
        them."""
        for drafter in self._drafters.values():
            drafter.num_told = message.position + len(message.tokens)
            reply = await self._inform(drafter, message, message.lease)
            if reply is not None:
                self._observed.append(reply)
        if not self._overlap or is_last:
            await self.hear()

    async def hear(self) -> None:
        for reply in self._observed:
            with suppress(ForerunError):
                await reply.wait()
        self._observed.clear()

    def owes(self, position: int) -> bool:
        """Whether `stands` has something to tell."""
        return position >= self._tell_at or bool(self._told)

    async def stands(self, flow: Flow, lease: int, position: int) -> None:
        """Tells drafters that the tokens before `position` are committed."""
        if self._told:
            await self._hear_marks()
        told = list[int]()
        for name, drafter in self._drafters.items():
            if name == HEAD and not self._is_resting:  # others draft: it would learn for nothing, and does what it can when it is asked
                continue
            if drafter.num_told is not None and position - drafter.num_told >= self._told_after:
                wants_marks = name == HEAD and self._chooser.wants_marks()
                await self._tell(drafter, flow, lease, self._marked if wants_marks else None)
            if drafter.num_told is not None:
                told.append(drafter.num_told)
        self._tell_at = min(told, default=position) + self._told_after

    async def _hear_marks(self, is_late: bool = False) -> None:
        """Receives which told tokens the head would have drafted; with `is_late` waits for it."""
        while self._told and (is_late or self._told[0].is_there):
            with suppress(ForerunError):
                self._chooser.marked(await self._told.pop(0).wait(), self._params.draft_n_max)

    async def _tell(self, drafter: _Drafter, flow: Flow, lease: int, choosing: Choosing | None = None) -> None:
        position = drafter.num_told
        if position is not None and (tokens := self._computed(position)):
            drafter.num_told = position + len(tokens)
            reply = await self._inform(drafter, Commit(flow, lease, position, tokens, choosing), lease)
            if reply is not None and (choosing is not None or not self._overlap):
                self._told.append(reply)
                await self._hear_marks(is_late=not self._overlap)

    async def complete(self, flow: Flow, lease: int) -> None:
        """Tells the head all that it has not been told, so that whoever goes on from here has its newest rows. Where others drafted for
        long, hidden rows are gone, and some of its rows with them: somewhat worse drafts."""
        head = self._drafters.get(HEAD)
        if head is not None and (position := head.num_told) is not None and (tokens := self._computed(position)):
            head.num_told = position + len(tokens)
            await self._inform(head, Observe(flow, lease, position, tokens, self._salt), lease)

    async def resume(self, flow: Flow, lease: int) -> None:
        """The lease holds a beginning already: drafters are told of it as a whole."""
        self._began = 0
        for drafter in self._drafters.values():
            with suppress(ForerunError):
                await self._tell_all(drafter, flow, lease)

    async def forget(self, flow: Flow, lease: int, is_over: bool) -> None:
        """Returns when no drafter works on the lease any more."""
        self._chooser.ended()
        self._began, self._waited, self._tell_at, self._next, self._coming = 0, 0, 0, None, None
        for reply in (*self._observed, *self._told):
            reply.abandon()
        self._observed.clear()
        self._told.clear()
        for name, drafter in self._drafters.items():
            if is_over and name != HEAD:  # which learns nothing for others
                await self._tell(drafter, flow, lease)
            with suppress(ForerunError):
                await drafter.mailbox.ask(Forget(flow, lease, is_over))

    async def _resume(self, drafter: _Drafter, flow: Flow, lease: int) -> bool:
        """Tells a restarted drafter everything it must know. Returns whether that was necessary."""
        if drafter.life == drafter.mailbox.life:
            return False
        await self._tell_all(drafter, flow, lease)
        return True

    async def _tell_all(self, drafter: _Drafter, flow: Flow, lease: int) -> None:
        tokens = self._computed(0)
        drafter.life, drafter.num_told = drafter.mailbox.life, len(tokens)
        await drafter.mailbox.tell(Resume(flow, lease, tokens, self._salt))

    async def _inform(self, drafter: _Drafter, message: Mail[R], lease: int) -> Reply[R] | None:
        """Tells a drafter the newest tokens. Returns what to wait for; None if it is gone or was told everything."""
        with suppress(ForerunError):
            if not drafter.mailbox.is_closed and not await self._resume(drafter, message.flow, lease):
                return await drafter.mailbox.post(message)
        return None
