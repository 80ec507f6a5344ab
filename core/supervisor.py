"""Supervision after Erlang/OTP (`supervisor`, Design Principles): child specifications, strategies, restart intensity, escalation.

Children of one group live and die together (one_for_all); groups are independent (one_for_one). When a child dies, its
group is ended, every ask its mailboxes held fails with ActorRestarted, and the group begins anew. A group that dies more
often than its intensity allows either takes the engine with it, or, where the engine can do without, is switched off.
An InternalBug is never answered by a restart: a state that cannot be must not be worked with.

The watchdog ends an actor that is alive but has made no progress for longer than it said. It cannot see one that blocks
the event loop itself: nothing in that thread can.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import cast

import anyio
from anyio.abc import TaskGroup

from .actor import Actor
from .channel import Mailbox
from .errors import ActorRestarted, ActorStopped, ActorStuck, InternalBug
from .trace import Trace

logger = logging.getLogger("forerun")

#: Between two looks of the watchdog: a small part of any actor's patience.
WATCHDOG_SECONDS = 1.0


class WhenExhausted(Enum):
    """What follows when a group dies too often."""

    ESCALATE = auto()  # the engine dies
    SWITCH_OFF = auto()  # the group stops for good, and the engine goes on without it


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """How to begin one actor. Its mailbox outlives it."""

    mailbox: Mailbox
    make: Callable[[], Actor]


@dataclass(frozen=True, slots=True)
class Group:
    """Children that live and die together. `num_restarts` within `period_seconds` are allowed, one more exhausts the group.
    `reset` runs between two lives, when no child is alive."""

    children: tuple[ChildSpec, ...]
    num_restarts: int
    period_seconds: float
    when_exhausted: WhenExhausted
    reset: Callable[[], None] | None = None


@dataclass(slots=True)
class _Life:
    """One group between two deaths."""

    tasks: TaskGroup
    actors: dict[str, Actor] = field(default_factory=dict[str, Actor])
    failure: tuple[str, Exception] | None = None

    def end(self, name: str, error: Exception) -> None:
        """The first reason stays."""
        if self.failure is None:
            self.failure = (name, error)
        self.tasks.cancel_scope.cancel()
        for actor in self.actors.values():
            actor.leave_work()


class Supervisor:
    """`die` is told, once, who failed and how when the engine cannot go on."""

    def __init__(self, groups: list[Group], trace: Trace, die: Callable[[str, Exception], None]) -> None:
        self._groups, self._trace, self._die = groups, trace, die
        self._lives: list[_Life] = []
        self._deaths = [deque[float]() for _ in groups]
        self.num_restarts = {child.mailbox.name: 0 for group in groups for child in group.children}
        self.switched_off: set[str] = set()

    async def run(self) -> None:
        """Keeps every group alive until cancelled."""
        async with anyio.create_task_group() as tasks:
            for group, deaths in zip(self._groups, self._deaths, strict=True):
                tasks.start_soon(self._keep, group, deaths)
            tasks.start_soon(self._watch)

    def kill(self, name: str, error: Exception) -> None:
        """Ends actor `name` as if `error` had left its `handle`, wherever it is. For tests."""
        for life in self._lives:
            if name in life.actors:
                life.end(name, error)
                return
        raise KeyError(name)

    def forgive(self, name: str, count: int) -> None:
        """The last `count` deaths of actor `name` and its group no longer count against it."""
        for group, deaths in zip(self._groups, self._deaths, strict=True):
            if any(child.mailbox.name == name for child in group.children):
                for _ in range(min(count, len(deaths))):
                    deaths.pop()

    async def _keep(self, group: Group, deaths: deque[float]) -> None:
        while True:
            name, error = await self._live(group)
            now = anyio.current_time()
            deaths.append(now)
            while deaths[0] < now - group.period_seconds:
                deaths.popleft()
            is_exhausted = len(deaths) > group.num_restarts
            if isinstance(error, InternalBug) or (is_exhausted and group.when_exhausted is WhenExhausted.ESCALATE):
                self._die(name, error)
                return
            if is_exhausted:
                logger.error("the %s failed %d times and is switched off", name, len(deaths), exc_info=error)
                self._trace.notice(name, "switched off")
                for child in group.children:
                    self.switched_off.add(child.mailbox.name)
                    child.mailbox.close(ActorStopped(f"the {child.mailbox.name} is switched off"))
                return
            logger.warning("the %s failed and is restarted", name, exc_info=error)
            if group.reset is not None:
                group.reset()
            for child in group.children:
                self.num_restarts[child.mailbox.name] += 1
                self._trace.notice(child.mailbox.name, f"restarted after {type(error).__name__}")
                child.mailbox.restart(ActorRestarted(f"the {name} failed"))

    async def _live(self, group: Group) -> tuple[str, Exception]:
        """One life of a group: who ended it, and how. All its children have ended when this returns."""
        tasks = anyio.create_task_group()
        life = _Life(tasks)
        async with tasks:
            self._lives.append(life)
            try:
                for child in group.children:
                    tasks.start_soon(self._child, life, child)
                await anyio.sleep_forever()
            finally:
                self._lives.remove(life)
                for actor in life.actors.values():  # whatever ends this life, nobody waits for its work
                    actor.leave_work()
        if life.failure is None:
            raise InternalBug("a group ended without a reason")
        return life.failure

    async def _child(self, life: _Life, child: ChildSpec) -> None:
        name = child.mailbox.name
        try:
            actor = life.actors[name] = child.make()
            await actor.run()
            raise InternalBug(f"the {name} returned")
        except Exception as error:
            life.end(name, _first(error))
        except BaseExceptionGroup as group:  # of an actor with tasks: some failed, others were cancelled
            cancelled, rest = group.split(anyio.get_cancelled_exc_class())
            if not isinstance(rest, ExceptionGroup):
                raise
            life.end(name, _first(cast("ExceptionGroup[Exception]", rest)))
            if cancelled is not None:
                raise cancelled from None

    async def _watch(self) -> None:
        """Patience is counted in looks, not by the clock: while something blocks the event loop, nobody can make progress."""
        seen: dict[Actor, tuple[int, int]] = {}  # what each was at, and at how many looks in a row
        while True:
            await anyio.sleep(WATCHDOG_SECONDS)
            before, seen = seen, {}
            for life in list(self._lives):
                for name, actor in life.actors.items():
                    step, num_looks = before.get(actor, (-1, 0))
                    is_waiting = step == actor.num_steps and actor.allowed_seconds < math.inf
                    seen[actor] = (actor.num_steps, num_looks + 1 if is_waiting else 0)
                    if seen[actor][1] * WATCHDOG_SECONDS > actor.allowed_seconds:
                        life.end(name, ActorStuck(f"the {name} has made no progress for {actor.allowed_seconds:.0f} s"))
                        break


def _first(error: Exception) -> Exception:
    """An actor with tasks of its own fails with a group of errors; the first says enough, a bug of ours most."""
    if not isinstance(error, ExceptionGroup):
        return error
    inner = [_first(each) for each in cast("ExceptionGroup[Exception]", error).exceptions]
    return next((each for each in inner if isinstance(each, InternalBug)), inner[0])
