"""Bounded mailboxes with tell and ask.

A full mailbox makes tell and ask wait: back-pressure is the only policy so far. An ask ends when it is answered, when
its caller is cancelled (the answer is then dropped without harm), or when the mailbox closes.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import anyio
from anyio.lowlevel import checkpoint

from .errors import ActorStopped, ForerunError, InternalBug
from .messages import Ask, Tell

R = TypeVar("R")


class Reply(Generic[R]):
    """The place where one ask's answer appears, once."""

    __slots__ = ("_error", "_event", "_value")

    def __init__(self) -> None:
        self._event = anyio.Event()
        self._value: R | None = None
        self._error: ForerunError | None = None

    def set(self, value: R) -> None:
        if self._event.is_set():
            raise InternalBug("a message was answered twice")
        self._value = value
        self._event.set()

    def fail(self, error: ForerunError) -> None:
        """Answers with an error, unless the question is answered already."""
        if not self._event.is_set():
            self._error = error
            self._event.set()

    @property
    def is_set(self) -> bool:
        return self._event.is_set()

    async def wait(self) -> R:
        """The answer, or the error it ended with. Cancelled: the asker is gone, the answer will be dropped."""
        await self._event.wait()
        if self._error is not None:
            raise self._error
        return cast(R, self._value)


@dataclass(frozen=True, slots=True)
class Envelope:
    """A message on its way, with its reply when it is an Ask."""

    message: Ask[Any] | Tell
    reply: Reply[Any] | None

    def answer(self, value: object) -> None:
        if self.reply is not None:
            self.reply.set(value)


@dataclass(frozen=True, slots=True)
class MailboxStatistics:
    """A snapshot: messages waiting now, the most there ever were, the bound, and messages taken in so far."""

    num_waiting: int
    num_waiting_peak: int
    capacity: int
    num_received: int


class Mailbox:
    """One actor's inbox: many senders, one receiver, at most `capacity` messages waiting."""

    def __init__(self, name: str, capacity: int) -> None:
        self.name = name
        self._capacity = capacity
        self._waiting: deque[Envelope] = deque()
        self._in_hand: list[Envelope] = []
        self._arrived = anyio.Event()
        self._room = anyio.Event()
        self._closed: ForerunError | None = None
        self._num_received = 0
        self._peak = 0

    async def tell(self, message: Tell) -> None:
        """Delivers; waits while the mailbox is full. Cancelled: nothing was delivered."""
        await self._put(Envelope(message, None))

    async def ask(self, message: Ask[R]) -> R:
        """Delivers and waits for the answer. Cancelled: the message may still be handled, its answer is dropped."""
        reply: Reply[R] = Reply()
        await self._put(Envelope(message, reply))
        return await reply.wait()

    def tell_nowait(self, message: Tell) -> None:
        """Delivers even beyond the bound: for giving resources back while being cancelled, which must neither wait nor fail.
        Bounded all the same, because each sender has at most one lease to give back. A closed mailbox ignores it."""
        if self._closed is None:
            self._deliver(Envelope(message, None))

    async def _put(self, envelope: Envelope) -> None:
        while True:
            if self._closed is not None:
                raise self._closed
            if len(self._waiting) < self._capacity:
                break
            if self._room.is_set():
                self._room = anyio.Event()
            await self._room.wait()
        self._deliver(envelope)

    def _deliver(self, envelope: Envelope) -> None:
        self._waiting.append(envelope)
        self._num_received += 1
        self._peak = max(self._peak, len(self._waiting))
        self._arrived.set()

    async def receive_all(self) -> list[Envelope]:
        """Waits for a message, lets every task that is ready run once, and takes all that waits. Cancelled: nothing was taken.
        What was taken before counts as handled: unanswered asks of it fail if the mailbox closes."""
        while not self._waiting:
            self._arrived = anyio.Event()
            await self._arrived.wait()
        await checkpoint()
        self._in_hand = list(self._waiting)
        self._waiting.clear()
        self._room.set()
        return self._in_hand

    def close(self, error: ForerunError | None = None) -> None:
        """Fails every ask that is not answered, and all later ones, with `error`."""
        if self._closed is None:
            self._closed = error or ActorStopped(f"{self.name} has stopped")
            for envelope in (*self._in_hand, *self._waiting):
                if envelope.reply is not None:
                    envelope.reply.fail(self._closed)
            self._waiting.clear()
            self._room.set()

    def statistics(self) -> MailboxStatistics:
        return MailboxStatistics(len(self._waiting), self._peak, self._capacity, self._num_received)
