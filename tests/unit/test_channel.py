"""Mailboxes: bounds, answers, cancellation and closing, on both async libraries."""

from __future__ import annotations

from dataclasses import dataclass

import anyio
import pytest
from forerun.core.channel import Mailbox
from forerun.core.errors import ActorStopped, InternalBug
from forerun.core.messages import Ask, Tell

pytestmark = pytest.mark.anyio


@dataclass(frozen=True)
class Question(Ask[int]):
    n: int


@dataclass(frozen=True)
class Note(Tell):
    n: int


async def echo(mailbox: Mailbox) -> None:
    while True:
        for envelope in await mailbox.receive_all():
            if isinstance(envelope.message, Question):
                envelope.answer(envelope.message.n)


async def test_every_ask_gets_its_own_answer() -> None:
    mailbox = Mailbox("test", 4)
    answers: list[int] = []

    async def ask(n: int) -> None:
        assert await mailbox.ask(Question(n)) == n
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


async def test_tell_waits_while_the_mailbox_is_full() -> None:
    mailbox = Mailbox("test", 2)
    await mailbox.tell(Note(1))
    await mailbox.tell(Note(2))
    with anyio.move_on_after(0.02) as scope:
        await mailbox.tell(Note(3))
    assert scope.cancelled_caught
    assert [envelope.message for envelope in await mailbox.receive_all()] == [Note(1), Note(2)]
    await mailbox.tell(Note(4))


async def test_closing_ends_every_ask_waiting_taken_or_to_come() -> None:
    mailbox = Mailbox("test", 1)
    failed: list[int] = []

    async def ask(n: int) -> None:
        with pytest.raises(ActorStopped):
            await mailbox.ask(Question(n))
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
        await mailbox.ask(Question(1), undo=undone.append)
    (envelope,) = await mailbox.receive_all()
    assert envelope.reply is not None
    assert envelope.reply.is_abandoned
    envelope.answer(1)
    assert undone == []

    async with anyio.create_task_group() as group:

        async def ask() -> None:
            kept.append(await mailbox.ask(Question(2), undo=undone.append))

        group.start_soon(ask)
        await anyio.wait_all_tasks_blocked()
        (envelope,) = await mailbox.receive_all()
        envelope.answer(2)  # answered, and cancelled before the asker runs again
        group.cancel_scope.cancel()
    assert kept + undone == [2]  # the libraries differ in which; it is never lost


async def test_answering_twice_is_a_bug() -> None:
    mailbox = Mailbox("test", 1)
    async with anyio.create_task_group() as group:
        group.start_soon(mailbox.ask, Question(1))
        await anyio.wait_all_tasks_blocked()
        (envelope,) = await mailbox.receive_all()
        envelope.answer(1)
        with pytest.raises(InternalBug):
            envelope.answer(1)
