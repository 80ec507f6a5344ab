"""An actor: one task, one mailbox, `handle` for what arrived. Its channel ends are constructor arguments; no globals."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TypeVar

from anyio.to_thread import run_sync

from .channel import Envelope, Mailbox

T = TypeVar("T")

#: Estimated seconds of arithmetic above which work leaves the event loop for a worker thread. A thread hop costs 60 to
#: 120 microseconds here (two channel hops cost as much), so shorter work is faster, and fairer to others, in place.
INLINE_SECONDS = 0.005


async def compute(work: Callable[[], T], seconds: float) -> T:
    """Runs `work` in place when its estimate in `seconds` is short, in a worker thread otherwise.
    Cancelled: a thread's work is finished first, so that an owner never sees its memory half written."""
    if seconds <= INLINE_SECONDS:
        return work()
    return await run_sync(work)


class Actor(ABC):
    """Takes all waiting messages as one batch. What is wrong with one message is answered to that one; an exception that
    leaves `handle` is a bug of ours and ends `run`, and with it the engine."""

    #: More than every sequence of a full engine can have outstanding at one actor (one ask each, at most 1024 slots).
    mailbox_capacity = 2048

    def __init__(self, name: str) -> None:
        self.name = name
        self.mailbox = Mailbox(name, self.mailbox_capacity)

    async def run(self) -> None:
        """Serves until cancelled. Whoever runs it closes the mailbox after it, with the reason."""
        while True:
            await self.handle(await self.mailbox.receive_all())

    @abstractmethod
    async def handle(self, batch: list[Envelope]) -> None:
        """Answers every ask in `batch`, now or later, but those that are abandoned."""
