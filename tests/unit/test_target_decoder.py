"""The target decoder alone, with a simulated target on a device that is done at once: verifies that it begins before they are asked for."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import anyio
import pytest
from forerun.actors.mtp_drafter import HeadDrafts
from forerun.actors.target_decoder import TargetDecoder
from forerun.core.actor import InPlace
from forerun.core.channel import Mailbox
from forerun.core.embeddings import Encoded
from forerun.core.messages import Forget, Freeze, Prefill, Verify
from forerun.core.speculation import SpeculationParams
from forerun.core.trace import Flow, Trace
from forerun.core.vocabulary import Choosing, SamplingParams, Verdict
from forerun.kernels.backend import F32
from forerun.kernels.model.drafts import NextRows
from forerun.kernels.model.memory import MemoryParams, SequencePool
from forerun.kernels.model.trunk import Rows
from forerun.kernels.sampling import Choices

from tests.sim.fakes import FakeHead, FakeMaker, FakeTarget, reference

pytestmark = pytest.mark.anyio

FLOW, HOW, PROMPT = Flow("a", 0), Choosing(SamplingParams()), (1, 2, 3)


class Clock:
    """Of a trace, in nanoseconds; a verify takes a millisecond."""

    now = 0

    def __call__(self) -> int:
        return self.now


class Done:
    def is_done(self) -> bool:
        return True

    def wait(self) -> None:
        pass


class Counting(FakeTarget):
    """Counts the verifies that were asked for."""

    num_asked = 0

    def __init__(self, clock: Clock) -> None:
        super().__init__(Done)
        self._clock = clock

    def verify(self, batch: Sequence[Rows]) -> tuple[F32, F32]:
        self.num_asked += 1
        self._clock.now += 1_000_000
        return super().verify(batch)

    def verify_next(self, batch: Sequence[NextRows], choices: Choices, drafts: Any) -> F32 | None:
        self.num_asked -= 1  # it verifies, here
        return super().verify_next(batch, choices, drafts)


@dataclass
class Decoder:
    """One that runs, and its sequences: each a lease and the tokens that stand, of which all but the last have been computed."""

    mailbox: Mailbox
    target: Counting
    pool: SequencePool
    clock: Clock
    texts: dict[int, list[int]] = field(default_factory=dict[int, list[int]])

    def lease(self) -> int:
        found = self.pool.lease("a", Encoded(()), (), 200, 8)
        assert found is not None
        return found[0].number

    async def begin(self, prompt: tuple[int, ...] = PROMPT) -> int:
        lease = self.lease()
        self.pool[lease].num_head_rows = len(prompt) + 1  # as if the head had been asked already
        verdict = await self.mailbox.ask(Prefill(FLOW, lease, 0, prompt, HOW, is_last=True, is_kept=False))
        self.texts[lease] = [*prompt, *verdict.choices]
        return lease

    async def verify(self, lease: int, drafts: Sequence[int] = (), limit: int = 0) -> tuple[Verdict, tuple[int, ...]]:
        """What a round brings, and what has been drafted behind it."""
        text = self.texts[lease]
        rows, position = (text[-1], *drafts), len(text) - 1
        verdict = await self.mailbox.ask(Verify(FLOW, lease, position, rows, HOW, False, limit, goes_on=True))
        right = 0
        while right < len(drafts) and drafts[right] == verdict.choices[right]:
            right += 1
        text += verdict.choices[: right + 1]
        draft = await verdict.draft.wait() if verdict.draft is not None else None
        return verdict, draft.tokens if draft is not None else ()

    def is_right(self, lease: int, prompt: tuple[int, ...] = PROMPT) -> bool:
        text = self.texts[lease][len(prompt) :]
        return tuple(text) == reference(prompt, len(text), SamplingParams())


@asynccontextmanager
async def decoder(num_slots: int = 1) -> AsyncGenerator[Decoder]:
    pool, mailbox, clock = SequencePool(FakeMaker(), MemoryParams(num_slots, 16, 0, "log")), Mailbox("target decoder", 8), Clock()
    drafts, target = HeadDrafts(FakeHead(Done), SpeculationParams(types=("draft-mtp",))), Counting(clock)
    actor = TargetDecoder(mailbox, InPlace(), target, pool, Trace(clock=clock), drafts)
    async with anyio.create_task_group() as group:
        group.start_soon(actor.run)
        yield Decoder(mailbox, target, pool, clock)
        group.cancel_scope.cancel()


async def test_it_begins_the_next_round_while_nobody_asks() -> None:
    async with decoder() as it:
        lease = await it.begin()
        for _ in range(8):
            await it.verify(lease)
        assert it.is_right(lease)
        assert it.target.num_asked == 1


async def test_drafts_are_verified_where_they_are_made() -> None:
    async with decoder() as it:
        lease = await it.begin()
        drafts: tuple[int, ...] = ()
        for limit in (3, 2, 3, 0, 0):
            _, drafts = await it.verify(lease, drafts, limit)
        assert it.is_right(lease)
        assert it.target.num_asked == 1


async def test_less_than_was_begun() -> None:
    """Whoever verifies fewer drafts than were made is told of no others."""
    async with decoder() as it:
        lease = await it.begin()
        _, drafts = await it.verify(lease, limit=3)
        verdict, _ = await it.verify(lease, drafts[:1])
        assert len(verdict.choices) == 2
        assert it.target.num_asked == 1
        await it.verify(lease)
        assert it.is_right(lease)


async def test_something_else_than_was_begun() -> None:
    async with decoder() as it:
        lease = await it.begin()
        expected = reference(PROMPT, 60, SamplingParams())
        for number in range(1, 6):
            _, drafts = await it.verify(lease, limit=2)
            done = len(it.texts[lease]) - len(PROMPT)
            right = expected[done : done + 2]
            assert it.target.num_asked == number
            await it.verify(lease, (right[0], *right) if drafts[:1] != right[:1] else (right[0] + 1, 0))
            assert it.is_right(lease)
            it.pool[lease].num_head_rows = len(it.texts[lease])  # as if the head had been told
            assert it.target.num_asked == number + 1


async def test_some_of_a_batch_have_ended() -> None:
    async with decoder(3) as it:
        prompts = [PROMPT, (4, 5), (6,)]
        leases = [await it.begin(prompt) for prompt in prompts]

        async def round_of(some: list[int]) -> None:
            async with anyio.create_task_group() as group:
                for lease in some:
                    group.start_soon(it.verify, lease)

        for _ in range(3):
            await round_of(leases)
        assert it.target.num_asked == 1
        await it.mailbox.ask(Forget(FLOW, leases[1]))
        it.pool.release(leases[1])
        for _ in range(3):
            await round_of([leases[2], leases[0]])
        assert it.target.num_asked == 1
        assert all(it.is_right(lease, prompt) for lease, prompt in zip(leases, prompts, strict=True))


async def test_a_frozen_sequence_goes_on() -> None:
    async with decoder() as it:
        lease = await it.begin()
        await it.verify(lease)
        await it.mailbox.ask(Freeze(FLOW, lease, len(it.texts[lease]) - 1))
        for _ in range(3):
            await it.verify(lease)
        assert it.is_right(lease)


async def test_what_a_reader_takes_is_no_part_of_a_verify() -> None:
    """Whoever comes long after a device was done hears what such a verify took when somebody waited for it."""
    async with decoder() as it:
        lease = await it.begin()
        verdict, _ = await it.verify(lease)
        assert verdict.is_typical
        seconds = verdict.seconds
        assert seconds > 0
        it.clock.now += 10**9
        verdict, _ = await it.verify(lease)
        assert (verdict.seconds, verdict.is_typical) == (seconds, True)


async def test_one_of_two_comes_late() -> None:
    """What was begun for it is still there; and for a sequence that comes when all have ended, there is nothing."""
    async with decoder(2) as it:
        leases = [await it.begin(), await it.begin((4, 5))]
        async with anyio.create_task_group() as group:
            for lease in leases:
                group.start_soon(it.verify, lease)
        for _ in range(3):
            await it.verify(leases[0])
        assert it.target.num_asked == 3  # together, then two alone
        await it.verify(leases[1])
        assert it.target.num_asked == 3
        assert it.is_right(leases[0])
        assert it.is_right(leases[1], (4, 5))
        for lease in leases:
            await it.mailbox.ask(Forget(FLOW, lease))
            it.pool.release(lease)
        lease = await it.begin()
        verdict, _ = await it.verify(lease)
        assert verdict.is_typical


async def test_texts_go_on_between_the_chunks_of_prompts() -> None:
    """However many prompts come at once, their chunks come one by one, and in turn."""
    steps = list[str]()

    async def read(decoder: Decoder, name: str, lease: int) -> None:
        for start in range(0, 12, 3):
            await decoder.mailbox.ask(Prefill(FLOW, lease, start, PROMPT, HOW, is_last=False, is_kept=False))
            steps.append(name)

    async with decoder(num_slots=4) as it:
        lease, others = await it.begin(), [it.lease() for _ in range(3)]
        async with anyio.create_task_group() as group:
            for i, other in enumerate(others):
                group.start_soon(read, it, str(i), other)
            while len([step for step in steps if step != "-"]) < 12:
                await it.verify(lease)
                steps.append("-")
        assert it.is_right(lease)
    chunks = "".join(steps).replace("-", "")
    assert [sorted(chunks[i : i + 3]) for i in range(0, 12, 3)] == [["0", "1", "2"]] * 4
    assert max(map(len, "".join(steps).split("-"))) <= 2, steps  # one, but for whoever asks again a turn of the loop late
