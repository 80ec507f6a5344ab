"""How an actor waits for work that goes on elsewhere. In virtual time on trio."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass

import anyio
import pytest
import trio
from forerun.core.actor import LEFT, LOOK_SECONDS, Actor, Threads, Watch
from forerun.core.begun import Begun
from forerun.core.channel import Envelope, Mailbox
from forerun.core.errors import ActorStuck
from trio.testing import MockClock


@dataclass
class Until:
    """Work that is done at a time; counts who looks."""

    end: float
    num_looks: int = 0

    def is_done(self) -> bool:
        self.num_looks += 1
        return anyio.current_time() >= self.end

    def wait(self) -> None:
        raise AssertionError("this blocks the loop")


def until(end: float) -> Callable[[], Begun[None]]:
    return lambda: Begun(Until(end), lambda: None)


class Nobody(Actor):
    async def handle(self, batch: list[Envelope]) -> None:
        raise NotImplementedError


def actor() -> Nobody:
    """Who looks ten times in the time that it does not sleep."""
    found = Nobody(Mailbox("nobody", 1), Threads())
    found._watch.look = lambda: anyio.sleep(LOOK_SECONDS / 10)  # pyright: ignore[reportPrivateUsage]
    return found


def in_virtual_time(test: Callable[[], object]) -> None:
    trio.run(test, clock=MockClock(autojump_threshold=0))  # type: ignore[arg-type]


def test_it_sleeps_for_what_the_last_took_and_looks_when_the_end_is_near() -> None:
    async def main() -> None:
        nobody = actor()
        for seconds, late, most in [
            (0.1, LOOK_SECONDS, 70),
            (0.1, LOOK_SECONDS / 5, 14),
            (0.101, LOOK_SECONDS / 5, 24),
            (0.1, LOOK_SECONDS / 5, 14),
        ]:
            end = anyio.current_time() + seconds
            mark = Until(end)
            assert await nobody.follow(lambda mark=mark: Begun(mark, lambda: 7), 1.0, "work") == 7
            assert end <= anyio.current_time() <= end + late
            assert mark.num_looks <= most

    in_virtual_time(main)


def test_one_that_takes_long_does_not_let_the_next_be_found_late() -> None:
    async def main() -> None:
        watch, lateness = Watch(), list[float]()
        watch.look = lambda: anyio.sleep(LOOK_SECONDS / 10)
        for seconds in (0.01, 0.01, 5.0, 0.01, 0.01, 0.002, 0.002, 0.002, 0.002):
            end = anyio.current_time() + seconds
            await watch(Until(end), "work")
            lateness.append(anyio.current_time() - end)
        assert lateness[3] < LOOK_SECONDS
        assert lateness[4] < LOOK_SECONDS
        assert lateness[5] > 2 * LOOK_SECONDS  # nobody could know
        assert lateness[7] < LOOK_SECONDS / 5

    in_virtual_time(main)


def test_work_that_was_nearly_done_before_is_not_slept_through_when_it_is_not() -> None:
    """What is left of a verify that has begun early is as long as others let it be."""

    async def main() -> None:
        watch = Watch()
        watch.look = lambda: anyio.sleep(LOOK_SECONDS / 10)
        for seconds in (0.0002, 0.0012, 0.0002, 0.0018):
            end = anyio.current_time() + seconds
            await watch(Until(end), "rest of a verify")
            assert anyio.current_time() - end < LOOK_SECONDS / 5

    in_virtual_time(main)


def test_others_have_their_turns_meanwhile_and_kinds_are_told_apart() -> None:
    async def main() -> None:
        nobody, turns = actor(), 0

        async def other() -> None:
            nonlocal turns
            while True:
                turns += 1
                await anyio.sleep(0.0001)

        async with anyio.create_task_group() as group:
            group.start_soon(other)
            for kind, seconds in (("short", 0.01), ("long", 1.0), ("short", 0.01)):
                end = anyio.current_time() + seconds
                await nobody.follow(until(end), 1.0, kind)
                late = max(2 * LOOK_SECONDS, seconds / 16)  # the first of a kind is not looked for all the time
                assert anyio.current_time() - end < late
            group.cancel_scope.cancel()
        assert turns > 10_000

    in_virtual_time(main)


def test_a_result_that_takes_long_is_another_threads() -> None:
    async def main() -> None:
        for is_long in (False, True):
            begun = Begun(Until(anyio.current_time() + 0.1), threading.get_ident, is_long)
            assert (await actor().follow(lambda begun=begun: begun, 1.0, "work") != threading.get_ident()) == is_long

    in_virtual_time(main)


def test_who_is_to_end_begins_nothing() -> None:
    async def main() -> None:
        num_begun = 0

        def begin() -> Begun[None]:
            nonlocal num_begun
            num_begun += 1
            return Begun(Until(math.inf), lambda: None)

        with anyio.CancelScope() as scope:
            scope.cancel()
            await actor().follow(begin, 1.0, "work")
        assert scope.cancelled_caught
        assert num_begun == 0

    in_virtual_time(main)


def test_a_cancelled_owner_waits_and_one_that_is_left_gives_up() -> None:
    async def main() -> None:
        nobody, end = actor(), anyio.current_time() + 1.0
        with anyio.move_on_after(0.1):
            await nobody.follow(until(end), 1.0, "work")
        assert anyio.current_time() >= end  # nobody sees its memory half written

        async def leave() -> None:
            await anyio.sleep(1.0)
            nobody.leave_work()

        async with anyio.create_task_group() as group:
            group.start_soon(leave)
            stuck = until(math.inf)()
            with pytest.raises(ActorStuck):
                await nobody.follow(lambda: stuck, 1.0, "stuck")
            assert stuck in LEFT  # and its memory is nobody else's

    in_virtual_time(main)


def test_what_an_ended_life_leaves_behind_is_kept() -> None:
    """A supervisor cancels an actor, and leaves its work."""

    async def main() -> None:
        nobody, stuck = actor(), until(math.inf)()
        async with anyio.create_task_group() as group:
            group.start_soon(nobody.follow, lambda: stuck, 1.0, "stuck")
            await anyio.sleep(0.1)
            group.cancel_scope.cancel()
            nobody.leave_work()
        assert stuck in LEFT

    in_virtual_time(main)
