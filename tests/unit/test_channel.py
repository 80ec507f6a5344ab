"""Mailboxes: bounds, policies, answers, deadlines, cancellation, restart and closing, on both async libraries."""

from __future__ import annotations

from dataclasses import dataclass

import anyio
import pytest
from forerun.core.channel import Envelope, Mailbox
from forerun.core.errors import ActorRestarted, ActorStopped, InternalBug, Overloaded, Superseded
from forerun.core.messages import Mail, WhenFull
from forerun.core.trace import Flow

pytestmark = pytest.mark.anyio

NOBODY = Flow("nobody", 0)


@dataclass(frozen=True, slots=True)
class Question(Mail[int]):
    n: int


@dataclass(frozen=True, slots=True)
class Request(Mail[int]):
    when_full = WhenFull.REFUSE


@dataclass(frozen=True, slots=True)
class Guess(Mail[int]):
    n: int
    when_full = WhenFull.NEWEST_WINS


async def echo(mailbox: Mailbox) -> None:
    while True:
        for envelope in await mailbox.receive_all():
            if isinstance(envelope.message, Question):
                envelope.answer(envelope.message.n)


async def test_every_ask_gets_its_own_answer() -> None:
    mailbox = Mailbox("test", 4)
    answers: list[int] = []

    async def ask(n: int) -> None:
        assert await mailbox.ask(Question(NOBODY, n)) == n
        answers.append(n)

    async with anyio.create_task_group() as group:
        group.start_soon(echo, mailbox)
        async with anyio.create_task_group() as askers:
            for n in range(100):
                askers.start_soon(ask, n)
        group.cancel_scope.cancel()
    assert sorted(answers) == list(range(100))
    statistics = mailbox.statistics()
    assert (statistics.num_waiting, statistics.num_received) == (0, 100)
    assert statistics.num_waiting_peak <= 4


async def test_an_idle_actor_answers_in_the_senders_task_and_others_messages_wait_their_turn() -> None:
    """What `at_once` does not take goes into the mailbox, and what comes after that waits behind it."""
    mailbox, order = Mailbox("test", 8), list[str]()

    def at_once(envelope: Envelope) -> bool:
        assert isinstance(envelope.message, Question)
        if envelope.message.n == 0:
            return False
        order.append(f"at once {envelope.message.n}")
        envelope.answer(envelope.message.n)
        return True

    async def actor() -> None:
        while True:
            for envelope in await mailbox.receive_all(at_once=at_once):
                assert isinstance(envelope.message, Question)
                order.append(f"later {envelope.message.n}")
                envelope.answer(envelope.message.n)

    async with anyio.create_task_group() as group:
        first = await mailbox.post(Question(NOBODY, 1))  # nobody is there yet
        assert not first.is_there
        group.start_soon(actor)
        assert await first.wait() == 1
        await anyio.wait_all_tasks_blocked()
        second, third, fourth = [await mailbox.post(Question(NOBODY, n)) for n in (2, 0, 3)]
        assert [reply.is_there for reply in (second, third, fourth)] == [True, False, False]
        assert [await reply.wait() for reply in (second, third, fourth)] == [2, 0, 3]
        group.cancel_scope.cancel()
    assert order == ["later 1", "at once 2", "later 0", "later 3"]
    assert mailbox.statistics().num_received == 4


async def test_what_an_actor_raises_in_the_senders_task_ends_the_actor() -> None:
    mailbox = Mailbox("test", 8)

    def at_once(envelope: Envelope) -> bool:
        raise ZeroDivisionError

    async def actor() -> None:
        with pytest.raises(ZeroDivisionError):
            await mailbox.receive_all(at_once=at_once)
        mailbox.restart(ActorRestarted("test"))

    async with anyio.create_task_group() as group:
        group.start_soon(actor)
        await anyio.wait_all_tasks_blocked()
        with pytest.raises(ActorRestarted):
            await mailbox.ask(Question(NOBODY, 1))
    later = await mailbox.post(Question(NOBODY, 2))  # of the dead actor nobody asks anything
    assert [envelope.message for envelope in await mailbox.receive_all()] == [Question(NOBODY, 2)]
    later.abandon()


async def test_tell_waits_while_the_mailbox_is_full() -> None:
    mailbox = Mailbox("test", 2)
    await mailbox.tell(Question(NOBODY, 1))
    await mailbox.tell(Question(NOBODY, 2))
    with anyio.move_on_after(0.02) as scope:
        await mailbox.tell(Question(NOBODY, 3))
    assert scope.cancelled_caught
    assert [envelope.message for envelope in await mailbox.receive_all()] == [Question(NOBODY, 1), Question(NOBODY, 2)]
    await mailbox.tell(Question(NOBODY, 4))


async def test_closing_ends_every_ask_waiting_taken_or_to_come() -> None:
    mailbox = Mailbox("test", 1)
    failed: list[int] = []

    async def ask(n: int) -> None:
        with pytest.raises(ActorStopped):
            await mailbox.ask(Question(NOBODY, n))
        failed.append(n)

    async with anyio.create_task_group() as group:
        group.start_soon(ask, 1)
        await anyio.wait_all_tasks_blocked()
        await mailbox.receive_all()  # 1 is taken and never answered
        group.start_soon(ask, 2)  # waits in the mailbox
        group.start_soon(ask, 3)  # waits for room
        await anyio.wait_all_tasks_blocked()
        mailbox.close()
    await ask(4)
    assert sorted(failed) == [1, 2, 3, 4]


async def test_an_answer_to_nobody_does_no_harm_and_one_that_came_is_handed_back() -> None:
    mailbox = Mailbox("test", 4)
    undone: list[int] = []
    kept: list[int] = []
    with anyio.move_on_after(0.02):
        await mailbox.ask(Question(NOBODY, 1), undo=undone.append)
    (envelope,) = await mailbox.receive_all()
    assert envelope.is_abandoned
    envelope.answer(1)
    assert undone == []

    async with anyio.create_task_group() as group:

        async def ask() -> None:
            kept.append(await mailbox.ask(Question(NOBODY, 2), undo=undone.append))

        group.start_soon(ask)
        await anyio.wait_all_tasks_blocked()
        (envelope,) = await mailbox.receive_all()
        envelope.answer(2)  # answered, and cancelled before the asker runs again
        group.cancel_scope.cancel()
    assert kept + undone == [2]  # the libraries differ in which; it is never lost


async def test_answering_twice_is_a_bug() -> None:
    mailbox = Mailbox("test", 1)
    async with anyio.create_task_group() as group:
        group.start_soon(mailbox.ask, Question(NOBODY, 1))
        await anyio.wait_all_tasks_blocked()
        (envelope,) = await mailbox.receive_all()
        envelope.answer(1)
        with pytest.raises(InternalBug):
            envelope.answer(1)


async def test_senders_get_room_in_the_order_they_came() -> None:
    mailbox = Mailbox("test", 2)
    order: list[int] = []

    async def tell(n: int) -> None:
        await mailbox.tell(Question(NOBODY, n))

    async with anyio.create_task_group() as group:
        for n in range(9):
            group.start_soon(tell, n)
            await anyio.wait_all_tasks_blocked()
        while len(order) < 9:
            taken = await mailbox.receive_all()
            assert len(taken) <= 2
            order += [envelope.message.n for envelope in taken if isinstance(envelope.message, Question)]
    assert order == list(range(9))


@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_sender_cancelled_while_it_waits_leaves_its_place_to_the_next(when: str) -> None:
    mailbox = Mailbox("test", 1)
    await mailbox.tell(Question(NOBODY, 0))
    seen: list[object] = []
    async with anyio.create_task_group() as group:
        async with anyio.create_task_group() as first:
            first.start_soon(mailbox.tell, Question(NOBODY, 1))
            await anyio.wait_all_tasks_blocked()
            group.start_soon(mailbox.tell, Question(NOBODY, 2))
            await anyio.wait_all_tasks_blocked()
            if when == "after":
                assert len(await mailbox.receive_all()) == 1  # the first has its place, and has not run yet
            first.cancel_scope.cancel()
        with anyio.fail_after(1):
            while Question(NOBODY, 2) not in seen:
                seen += [envelope.message for envelope in await mailbox.receive_all()]
    assert seen.count(Question(NOBODY, 1)) <= (when == "after")  # the libraries differ in who is first, cancellation or place


async def test_a_full_mailbox_refuses_admission_at_once() -> None:
    mailbox = Mailbox("test", 1)
    await mailbox.tell(Request(NOBODY))
    with pytest.raises(Overloaded) as caught:
        await mailbox.ask(Request(NOBODY))
    assert caught.value.retry_after_seconds > 0
    assert mailbox.statistics().num_refused == 1


async def test_in_a_full_mailbox_the_newest_draft_wins_and_control_is_never_thrown_out() -> None:
    mailbox = Mailbox("test", 2)
    oldest = await mailbox.post(Guess(NOBODY, 1))
    await mailbox.tell(Question(NOBODY, 0))
    newest = await mailbox.post(Guess(NOBODY, 2))
    with pytest.raises(Superseded):
        await oldest.wait()
    assert [envelope.message for envelope in await mailbox.receive_all()] == [Question(NOBODY, 0), Guess(NOBODY, 2)]
    assert mailbox.statistics().num_superseded == 1
    newest.abandon()


async def test_an_ask_ends_at_its_callers_deadline_and_a_later_answer_does_no_harm() -> None:
    mailbox = Mailbox("test", 2)
    with anyio.move_on_after(0.01) as scope:
        await mailbox.ask(Question(NOBODY, 1))
    assert scope.cancelled_caught
    (envelope,) = await mailbox.receive_all()
    assert envelope.is_abandoned
    envelope.answer(1)
    assert mailbox.statistics().num_unanswered == 0


async def test_a_restart_ends_what_the_dead_actor_had_and_others_go_to_its_successor() -> None:
    mailbox = Mailbox("test", 1)
    answers: list[int] = []

    async def ask(n: int) -> None:
        try:
            answers.append(await mailbox.ask(Question(NOBODY, n)))
        except ActorRestarted:
            answers.append(-n)

    async with anyio.create_task_group() as group:
        for n in (1, 2, 3):  # taken, waiting, waiting for room
            group.start_soon(ask, n)
            await anyio.wait_all_tasks_blocked()
            if n == 1:
                await mailbox.receive_all()
        mailbox.restart(ActorRestarted("dead"))
        await anyio.wait_all_tasks_blocked()
        assert mailbox.life == 1
        for envelope in await mailbox.receive_all():
            envelope.answer(3)
    assert sorted(answers) == [-2, -1, 3]


async def test_a_late_answer_to_an_ask_that_a_restart_has_ended_lends_nothing() -> None:
    mailbox = Mailbox("test", 1)
    async with anyio.create_task_group() as group:

        async def ask() -> None:
            with pytest.raises(ActorRestarted):
                await mailbox.ask(Question(NOBODY, 1))

        group.start_soon(ask)
        await anyio.wait_all_tasks_blocked()
        (envelope,) = await mailbox.receive_all()
        mailbox.restart(ActorRestarted("dead"))
        assert envelope.is_abandoned  # so that nothing is lent to it
