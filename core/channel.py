"""Bounded mailboxes with tell and ask.

A full mailbox makes tell and ask wait: back-pressure is the only policy so far. An ask ends when it is answered, when
its caller is cancelled (the answer is then dropped without harm), or when the mailbox closes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import anyio
from anyio.lowlevel import checkpoint

from .errors import ActorStopped, ForerunError, InternalBug
from .messages import Ask, Tell

R = TypeVar("R")


class Reply(Generic[R]):
    """The place where one ask's answer appears, once. `unanswered` is the mailbox's set of replies still owed."""

    __slots__ = ("_error", "_event", "_unanswered", "_undo", "_value", "is_abandoned")

    def __init__(self, unanswered: set[Reply[Any]], undo: Callable[[R], None] | None) -> None:
        self._event = anyio.Event()
        self._value: R | None = None
        self._error: ForerunError | None = None
        self._undo = undo
        self._unanswered = unanswered
        self.is_abandoned = False

    def set(self, value: R) -> None:
        if self._error is not None:
            return  # the mailbox has closed meanwhile
        if self._event.is_set():
            raise InternalBug("a message was answered twice")
        self._value = value
        self._event.set()
        self._unanswered.discard(self)

    def fail(self, error: ForerunError) -> None:
        """Answers with an error, unless the question is answered already."""
        if not self._event.is_set():
            self._error = error
            self._event.set()
            self._unanswered.discard(self)

    async def wait(self) -> R:
        """The answer, or the error it ended with. Cancelled: an answer that had come is handed to `undo`, a later one dropped."""
        try:
            await self._event.wait()
        except anyio.get_cancelled_exc_class():
            self.is_abandoned = True
            self._unanswered.discard(self)
            if self._event.is_set() and self._error is None and self._undo is not None:
                self._undo(cast(R, self._value))
            raise
        if self._error is not None:
            raise self._error.with_traceback(None)  # one error may end many asks; none keeps another's frames
        return cast(R, self._value)


@dataclass(frozen=True, slots=True)
class Envelope:
    """A message on its way, with its reply when it is an Ask."""

    message: Ask[Any] | Tell
    reply: Reply[Any] | None

    @property
    def is_abandoned(self) -> bool:
        """Whether the asker has gone away."""
        return self.reply is not None and self.reply.is_abandoned

    def fail(self, error: ForerunError) -> None:
        if self.reply is not None:
            self.reply.fail(error)

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
        self._unanswered: set[Reply[Any]] = set()
        self._arrived = anyio.Event()
        self._room = anyio.Event()
        self._closed: ForerunError | None = None
        self._num_received = 0
        self._peak = 0

    async def tell(self, message: Tell) -> None:
        """Delivers; waits while the mailbox is full. Cancelled: nothing was delivered."""
        await self._put(Envelope(message, None))

    async def ask(self, message: Ask[R], undo: Callable[[R], None] | None = None) -> R:
        """Delivers and waits for the answer. Cancelled: the message may still be handled, and its reply says `is_abandoned`;
        an answer that had come already is handed to `undo`, so that what it lends is not lost."""
        reply: Reply[R] = Reply(self._unanswered, undo)
        await self._put(Envelope(message, reply))
        return await reply.wait()

    async def _put(self, envelope: Envelope) -> None:
        while True:
            if self._closed is not None:
                raise self._closed.with_traceback(None)
            if len(self._waiting) < self._capacity:
                break
            if self._room.is_set():
                self._room = anyio.Event()
            await self._room.wait()
        self._waiting.append(envelope)
        if envelope.reply is not None:
            self._unanswered.add(envelope.reply)
        self._num_received += 1
        self._peak = max(self._peak, len(self._waiting))
        self._arrived.set()

    async def receive_all(self) -> list[Envelope]:
        """Waits for a message, lets every task that is ready run once, and takes all that waits. Cancelled: nothing was taken."""
        while not self._waiting:
            self._arrived = anyio.Event()
            await self._arrived.wait()
        await checkpoint()
        taken = list(self._waiting)
        self._waiting.clear()
        self._room.set()
        return taken

    def close(self, error: ForerunError | None = None) -> None:
        """Fails every ask that is not answered, and all later ones, with `error`."""
        if self._closed is None:
            self._closed = error or ActorStopped(f"{self.name} has stopped")
            for reply in list(self._unanswered):
                reply.fail(self._closed)
            self._waiting.clear()
            self._room.set()

    def statistics(self) -> MailboxStatistics:
        return MailboxStatistics(len(self._waiting), self._peak, self._capacity, self._num_received)
