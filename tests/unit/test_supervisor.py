"""Supervision: who lives and dies together, what a restart ends, when it gives up, and the watchdog. In virtual time on trio."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import anyio
import pytest
import trio
from forerun.core.actor import Actor, Executor, InPlace
from forerun.core.channel import Envelope, Mailbox
from forerun.core.errors import ActorRestarted, ActorStopped, ActorStuck, ForerunError, InternalBug
from forerun.core.messages import Mail
from forerun.core.supervisor import ChildSpec, Group, Supervisor, WhenExhausted
from forerun.core.trace import Flow, Trace
from trio.testing import MockClock

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Do(Mail[int]):
    what: str


class Worker(Actor):
    """Does as it is told; its answer is how many messages this life has handled."""

    def __init__(self, mailbox: Mailbox, executor: Executor) -> None:
        super().__init__(mailbox, executor)
        self._num_handled = 0

    async def handle(self, batch: list[Envelope]) -> None:
        for envelope in batch:
            assert isinstance(envelope.message, Do)
            self._num_handled += 1
            match envelope.message.what:
                case "fail":
                    raise ZeroDivisionError
                case "bug":
                    raise InternalBug
                case "wait":
                    await anyio.sleep_forever()
                case "compute":
                    await self.compute(lambda: 0, 1.0)
                case _:
                    pass
            envelope.answer(self._num_handled)


class After(InPlace):
    """Works after so many virtual seconds."""

    def __init__(self, delay: float) -> None:
        self._delay = delay

    def is_inline(self, seconds: float) -> bool:
        return False

    async def __call__(self, work: Callable[[], T], seconds: float) -> T:
        await anyio.sleep(self._delay)
        return work()


class House:
    """A and B in one group, C in another that may be switched off."""

    def __init__(self) -> None:
        self.boxes = {name: Mailbox(name, 10) for name in "abc"}
        self.deaths: list[tuple[str, Exception]] = []
        self.num_resets = 0
        self.executor: Executor = InPlace()
        a, b, c = (ChildSpec(self.boxes[name], lambda name=name: Worker(self.boxes[name], self.executor)) for name in "abc")
        groups = [
            Group((a, b), 2, 60.0, WhenExhausted.ESCALATE, self.reset),
            Group((c,), 2, 60.0, WhenExhausted.SWITCH_OFF),
        ]
        self.supervisor = Supervisor(groups, Trace(1), lambda name, error: self.deaths.append((name, error)))

    def reset(self) -> None:
        self.num_resets += 1

    async def ask(self, name: str, what: str = "") -> int | type[ForerunError]:
        try:
            return await self.boxes[name].ask(Do(Flow("test", 0), what))
        except ForerunError as error:
            return type(error)


def in_house(test: Callable[[House], Any]) -> Any:
    def run(caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.CRITICAL)

        async def main() -> None:
            house = House()
            with anyio.fail_after(10_000):
                async with anyio.create_task_group() as group:
                    group.start_soon(house.supervisor.run)
                    await test(house)
                    group.cancel_scope.cancel()

        trio.run(main, clock=MockClock(autojump_threshold=0))

    return run


@in_house
async def test_one_group_dies_together_and_others_live_on(house: House) -> None:
    for name in "abc":
        assert await house.ask(name) == 1
    waiting: list[object] = []

    async def wait() -> None:
        waiting.append(await house.ask("b", "wait"))

    async with anyio.create_task_group() as group:
        group.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        assert await house.ask("a", "fail") is ActorRestarted
    assert waiting == [ActorRestarted]  # of a, whose death was its own too
    assert [await house.ask(name) for name in "abc"] == [1, 1, 2]
    assert house.num_resets == 1
    assert house.supervisor.num_restarts == {"a": 1, "b": 1, "c": 0}


@in_house
async def test_too_many_deaths_in_a_period_end_the_engine_and_as_many_over_time_do_not(house: House) -> None:
    for _ in range(6):
        assert await house.ask("a", "fail") is ActorRestarted
        await anyio.sleep(31)
    assert not house.deaths
    for _ in range(3):
        with anyio.move_on_after(1):
            await house.ask("b", "fail")
    ((name, error),) = house.deaths
    assert (name, type(error)) == ("b", ZeroDivisionError)
    assert await house.ask("c") == 1


@in_house
async def test_a_group_that_one_can_do_without_is_switched_off(house: House) -> None:
    assert [await house.ask("c", "fail") for _ in range(3)] == [ActorRestarted, ActorRestarted, ActorStopped]
    assert await house.ask("c") is ActorStopped
    assert house.supervisor.switched_off == {"c"}
    assert not house.deaths
    assert await house.ask("a") == 1


@in_house
async def test_a_bug_of_ours_is_never_restarted(house: House) -> None:
    with anyio.move_on_after(1):
        await house.ask("c", "bug")
    ((name, error),) = house.deaths
    assert (name, type(error)) == ("c", InternalBug)


@in_house
async def test_the_watchdog_restarts_who_is_stuck_and_leaves_who_is_idle_or_slow_as_announced(house: House) -> None:
    start = anyio.current_time()
    assert await house.ask("c", "wait") is ActorRestarted
    assert Worker.patience_seconds <= anyio.current_time() - start < 2 * Worker.patience_seconds
    await anyio.sleep(10 * Worker.patience_seconds)
    assert house.supervisor.num_restarts["c"] == 1

    house.executor = After(40)  # begun after a long idle time
    await house.ask("c", "fail")
    assert await house.ask("c", "compute") == 1  # 40 s of work, announced as 1 s


@in_house
async def test_work_that_never_ends_is_left_behind(house: House) -> None:
    house.executor = After(math.inf)
    await house.ask("a", "fail")
    assert await house.ask("a", "compute") is ActorRestarted
    assert house.supervisor.num_restarts["a"] == 2


@in_house
async def test_a_kill_is_a_death_like_any_other(house: House) -> None:
    await anyio.wait_all_tasks_blocked()
    house.supervisor.kill("c", ActorStuck("by a test"))
    await anyio.wait_all_tasks_blocked()
    assert house.supervisor.num_restarts["c"] == 1
    assert await house.ask("c") == 1
    with pytest.raises(KeyError):
        house.supervisor.kill("nobody", ActorStuck())
