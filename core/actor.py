"""An actor: one task, one mailbox, `handle` for what arrived. Its channel ends are constructor arguments; no globals."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Protocol, TypeVar

import anyio
from anyio.to_thread import run_sync

from .channel import Envelope, Mailbox
from .errors import ActorStuck

T = TypeVar("T")

#: Estimated seconds of arithmetic above which work leaves the event loop for a worker thread. A thread hop costs as much as
#: two channel hops, so shorter work is faster, and fairer to others, in place (measured in kernels/EXPERIMENTS.md).
INLINE_SECONDS = 0.005

#: Seconds an actor may go without progress before the watchdog restarts it, and how many times its own estimate, if that
#: is more: estimates are rough, and a machine may be busy.
PATIENCE_SECONDS = 30.0
PATIENCE_FACTOR = 50.0


class Executor(Protocol):
    """Where work is done: on the device, in a thread, or in a simulation."""

    async def __call__(self, work: Callable[[], T], seconds: float) -> T: ...


async def in_thread(work: Callable[[], T], seconds: float) -> T:
    """Runs `work` in place when its estimate in `seconds` is short, in a worker thread otherwise. Cancelled: the thread goes on
    alone, and what it returns is lost."""
    if seconds <= INLINE_SECONDS:
        return work()
    return await run_sync(work, abandon_on_cancel=True)


async def in_place(work: Callable[[], T], seconds: float) -> T:
    """Runs `work` where it is: the plain loop, in which nothing overlaps."""
    return work()


class Actor(ABC):
    """Takes all waiting messages as one batch. What is wrong with one message is answered to that one; an exception that
    leaves `handle` ends this life of the actor, and its supervisor begins another."""

    def __init__(self, mailbox: Mailbox, executor: Executor = in_thread) -> None:
        self.mailbox = mailbox
        self._executor = executor
        self._batch_due = math.inf
        self._work: dict[anyio.CancelScope, float] = {}  # under way at the executor, and when it is due

    @property
    def name(self) -> str:
        return self.mailbox.name

    @property
    def due(self) -> float:
        """When, in anyio.current_time, the watchdog loses patience; never while idle."""
        return min(self._batch_due, *self._work.values()) if self._work else self._batch_due

    async def run(self) -> None:
        """Serves until cancelled."""
        while True:
            batch = await self.mailbox.receive_all()
            self._batch_due = anyio.current_time() + PATIENCE_SECONDS
            await self.handle(batch)
            self._batch_due = math.inf
            for envelope in batch:
                if envelope.reply is None:
                    envelope.finish("ok")

    @abstractmethod
    async def handle(self, batch: list[Envelope]) -> None:
        """Answers every ask in `batch`, now or later, but those that are abandoned."""

    async def compute(self, work: Callable[[], T], seconds: float) -> T:
        """Has `work` done by the executor, which `seconds` tells how long it may take. Cancelled: the work is finished first, so
        that an owner never sees its memory half written; only the watchdog leaves it behind, with all the memory it had."""
        with anyio.CancelScope(shield=True) as scope:
            is_batch = self._batch_due < math.inf
            self._batch_due = math.inf
            self._work[scope] = anyio.current_time() + max(PATIENCE_SECONDS, PATIENCE_FACTOR * seconds)
            try:
                return await self._executor(work, seconds)
            finally:
                del self._work[scope]
                if is_batch:
                    self._batch_due = anyio.current_time() + PATIENCE_SECONDS
        raise ActorStuck(f"the {self.name} left work behind")

    def leave_work(self) -> None:
        """Ends the wait for work under way, which may never end. For the supervisor; the actor must not run on."""
        for scope in self._work:
            scope.cancel()
