"""Bounded mailboxes with tell and ask. What happens when one is full is said by each message's class (`when_full`):

    WAIT         the sender waits for room, in order of arrival                       (control: the default)
    REFUSE       the sender gets Overloaded at once                                   (admission)
    NEWEST_WINS  the oldest such message that still waits is answered Superseded      (drafts)

Deltas to a reader travel in an Outbox (outbox.py), which merges; trace events in a ring (trace.py), which drops the oldest.

An ask ends when it is answered, when its caller is cancelled (a deadline is a cancel scope's), or when the actor dies; an
answer that nobody waits for any more is dropped without harm. A mailbox outlives the actor that reads it: `restart` ends
what the dead one had, and those who wait for room send to its successor.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import anyio
from anyio.lowlevel import checkpoint

from .errors import ActorStopped, ForerunError, InternalBug, Overloaded, Superseded
from .messages import Mail, WhenFull
from .trace import Span, Trace

R = TypeVar("R")

#: What a sender refused by a full mailbox is told to wait: some rounds of a busy engine.
RETRY_AFTER_SECONDS = 1.0


class Reply(Generic[R]):
    """The place where one ask's answer appears, once."""

    __slots__ = ("_error", "_is_set", "_new_event", "_owed", "_undo", "_value", "_waiter", "is_abandoned")

    def __init__(self, owed: dict[Reply[Any], Envelope], undo: Callable[[R], None] | None, new_event: Callable[[], anyio.Event]) -> None:
        self._new_event = new_event
        self._owed = owed  # the mailbox's replies not yet given, in order of arrival; this one once it is delivered
        self._undo = undo
        self._is_set = False
        self._value: R | None = None
        self._error: ForerunError | None = None
        self._waiter: anyio.Event | None = None
        self.is_abandoned = False

    @property
    def is_there(self) -> bool:
        """Whether the answer, or an error, has come."""
        return self._is_set

    @property
    def is_wanted(self) -> bool:
        """Whether an answer would still reach somebody."""
        return not (self.is_abandoned or self._is_set)

    def delivered(self, envelope: Envelope) -> None:
        self._owed[self] = envelope

    def _settle(self) -> None:
        self._is_set = True
        self._owed.pop(self, None)
        if self._waiter is not None:
            self._waiter.set()

    def set(self, value: R) -> None:
        if self._error is not None:
            return  # ended meanwhile by a restart, a close or a newer message
        if self._is_set:
            raise InternalBug("a message was answered twice")
        self._value = value
        self._settle()

    def fail(self, error: ForerunError) -> None:
        """Answers with an error, unless the question is answered already."""
        if not self._is_set:
            self._error = error
            self._settle()

    def abandon(self) -> None:
        """Nobody waits any more: an answer that had come is handed to `undo`, a later one is dropped."""
        self.is_abandoned = True
        self._owed.pop(self, None)
        if self._is_set and self._error is None and self._undo is not None:
            self._undo(cast(R, self._value))

    async def wait(self) -> R:
        """The answer, or the error it ended with. Once. Cancelled: abandoned."""
        if not self._is_set:
            self._waiter = self._new_event()
            try:
                await self._waiter.wait()
            except BaseException:
                self.abandon()
                raise
        if self._error is not None:
            raise self._error.with_traceback(None)  # one error may end many asks; none keeps another's frames
        return cast(R, self._value)


class Envelope:
    """A message on its way, with its reply when it was asked, and its times when somebody watches."""

    __slots__ = ("_computed_before_ns", "_mailbox", "_trace", "enqueued_ns", "message", "reply", "started_ns")

    def __init__(self, message: Mail[Any], reply: Reply[Any] | None, mailbox: Mailbox, trace: Trace) -> None:
        self.message, self.reply = message, reply
        self._mailbox, self._trace = mailbox, trace
        self.enqueued_ns = trace.clock() if trace.is_on else 0
        self.started_ns = self._computed_before_ns = 0

    @property
    def is_abandoned(self) -> bool:
        """Whether it was asked, and nobody waits for the answer any more."""
        return self.reply is not None and not self.reply.is_wanted

    def start(self, now_ns: int = 0) -> None:
        """The actor takes this message up: said of all of a batch when it is taken, again by an actor that works one by one."""
        if self.enqueued_ns:
            self.started_ns, self._computed_before_ns = now_ns or self._trace.clock(), self._mailbox.computed_ns

    def answer(self, value: object) -> None:
        if self.reply is not None:
            self.reply.set(value)
            self.finish("ok")

    def promise(self) -> Reply[Any]:
        """The place of a further answer, which the actor that answers this message now still works on."""
        reply: Reply[Any] = self._mailbox.new_reply()
        reply.delivered(self)
        return reply

    def fail(self, error: ForerunError) -> None:
        if self.reply is not None:
            self.reply.fail(error)
        self.finish(type(error).__name__)

    def finish(self, outcome: str) -> None:
        """Records the span, once."""
        if self.enqueued_ns and self._trace.is_on:
            now, message, mailbox = self._trace.clock(), self.message, self._mailbox
            start = self.started_ns or now
            computed = mailbox.computed_ns - self._computed_before_ns if self.started_ns else 0
            self._trace.record(Span(mailbox.name, type(message).__name__, message.flow, self.enqueued_ns, start, now, outcome, computed))
        self.enqueued_ns = 0


@dataclass(frozen=True, slots=True)
class MailboxStatistics:
    """A snapshot: messages waiting now, the most there ever were, the bound; messages taken in, refused and superseded so
    far; asks not yet answered."""

    num_waiting: int
    num_waiting_peak: int
    capacity: int
    num_received: int
    num_refused: int
    num_superseded: int
    num_unanswered: int


class Mailbox:
    """One actor's inbox: many senders, one receiver, at most `capacity` messages waiting. `life` counts the actor's restarts."""

    def __init__(self, name: str, capacity: int, trace: Trace | None = None) -> None:
        self.name = name
        self.capacity = capacity
        self.life = 0
        self.computed_ns = 0  # that its actor's executor was at work, while somebody watched
        self._trace = trace or Trace(1)
        self._waiting: deque[Envelope] = deque()
        self._unanswered: dict[Reply[Any], Envelope] = {}
        self._arrived = anyio.Event()
        self._new_event = type(self._arrived)  # the running library's own: anyio.Event() asks each time which one runs
        self._queue: deque[tuple[Envelope, anyio.Event]] = deque()  # what waits for room, first come first served
        self._at_once: Callable[[Envelope], bool] | None = None  # of an actor that has nothing to do
        self._struck: Exception | None = None  # what that raised
        self._closed: ForerunError | None = None
        self._num_received = self._num_refused = self._num_superseded = self._peak = 0

    @property
    def is_closed(self) -> bool:
        return self._closed is not None

    @property
    def clock(self) -> Callable[[], int] | None:
        """The trace's, while somebody watches."""
        return self._trace.clock if self._trace.is_on else None

    async def tell(self, message: Mail[Any]) -> None:
        """Delivers; nobody hears an answer. Cancelled: not delivered, unless the actor took it at that very moment."""
        await self._put(Envelope(message, None, self, self._trace))

    async def post(self, message: Mail[R], undo: Callable[[R], None] | None = None) -> Reply[R]:
        """Delivers, and returns where the answer will appear; who does not wait for it abandons it. Cancelled: as `tell`, and abandoned."""
        reply: Reply[R] = self.new_reply(undo)
        try:
            await self._put(Envelope(message, reply, self, self._trace))
        except BaseException:
            reply.abandon()
            raise
        return reply

    def new_reply(self, undo: Callable[[R], None] | None = None) -> Reply[R]:
        return Reply(self._unanswered, undo, self._new_event)

    async def ask(self, message: Mail[R], undo: Callable[[R], None] | None = None) -> R:
        """Delivers and waits for the answer. Cancelled: the message may still be handled, and its envelope says `is_abandoned`; an
        answer that had come already is handed to `undo`, so that what it lends is not lost."""
        return await (await self.post(message, undo)).wait()

    async def _put(self, envelope: Envelope) -> None:
        if self._closed is not None:
            raise self._closed.with_traceback(None)
        if self._at_once is not None and not self._waiting and self._is_handled(envelope, self._at_once):
            return
        if len(self._waiting) >= self.capacity:
            policy = envelope.message.when_full
            if policy is WhenFull.REFUSE:
                self._num_refused += 1
                raise Overloaded(f"the {self.name} has {self.capacity} messages waiting", RETRY_AFTER_SECONDS)
            if policy is WhenFull.WAIT or not self._supersede(type(envelope.message)):
                await self._wait_for_room(envelope)
                return
        self._deliver(envelope)

    def _is_handled(self, envelope: Envelope, at_once: Callable[[Envelope], bool]) -> bool:
        """Whether the idle actor has handled a message in the sender's task. What it raises ends the actor, not the sender."""
        try:
            is_handled = at_once(envelope)
        except Exception as error:
            self._struck, self._at_once, is_handled = error, None, True
            if envelope.reply is not None and not envelope.reply.is_there:
                envelope.reply.delivered(envelope)
            self._arrived.set()
        self._num_received += is_handled
        return is_handled

    def _deliver(self, envelope: Envelope) -> None:
        self._waiting.append(envelope)
        if envelope.reply is not None:
            envelope.reply.delivered(envelope)
        self._num_received += 1
        self._peak = max(self._peak, len(self._waiting))
        if self._trace.is_on:
            self._trace.count(self.name + " depth", len(self._waiting))
        self._arrived.set()

    def _supersede(self, kind: type[Mail[Any]]) -> bool:
        """Whether the oldest waiting message of a kind could be thrown out."""
        for i, envelope in enumerate(self._waiting):
            if type(envelope.message) is kind:
                del self._waiting[i]
                envelope.fail(Superseded("a newer message took its place"))
                self._num_superseded += 1
                return True
        return False

    async def _wait_for_room(self, envelope: Envelope) -> None:
        turn = anyio.Event()
        self._queue.append((envelope, turn))
        try:
            await turn.wait()
        except BaseException:
            with suppress(ValueError):
                self._queue.remove((envelope, turn))
            with suppress(ValueError):
                self._waiting.remove(envelope)
                self._call_senders()
            raise
        if self._closed is not None:
            raise self._closed.with_traceback(None)

    def _call_senders(self) -> None:
        while self._queue and len(self._waiting) < self.capacity:
            envelope, turn = self._queue.popleft()
            self._deliver(envelope)
            turn.set()

    async def receive_all(
        self, enough: float = math.inf, at_once: Callable[[Envelope], bool] | None = None, *, is_patient: bool = True
    ) -> list[Envelope]:
        """Waits for a message, if `is_patient`, lets every task that is ready run once while fewer than `enough` wait, and takes all there
        is. Cancelled: nothing was taken. While nothing waits, messages go to `at_once` first, which may handle them in their senders'
        tasks, without two turns of the event loop; what it raises is raised here."""
        self._at_once = at_once
        try:
            while is_patient and self._struck is None and not self._waiting:
                self._arrived = self._new_event()
                await self._arrived.wait()
        finally:
            self._at_once = None
        if self._struck is not None:
            error, self._struck = self._struck, None
            raise error
        if len(self._waiting) < enough:
            await checkpoint()
        taken = list(self._waiting)
        self._waiting.clear()
        self._call_senders()
        if self._trace.is_on:
            now = self._trace.clock()
            for envelope in taken:
                envelope.start(now)
        return taken

    def restart(self, error: ForerunError) -> None:
        """The actor has died and another will read this mailbox: all that it had ends with `error`."""
        self.life += 1
        self._struck = None
        self._fail_all(error)
        self._call_senders()

    def close(self, error: ForerunError | None = None) -> None:
        """Fails every ask that is not answered, and all later ones, with `error`."""
        if self._closed is None:
            self._closed = error or ActorStopped(f"the {self.name} has stopped")
            self._fail_all(self._closed)
            for _, turn in self._queue:
                turn.set()
            self._queue.clear()

    def _fail_all(self, error: ForerunError) -> None:
        for envelope in self._waiting:
            envelope.fail(error)
        self._waiting.clear()
        for reply, envelope in list(self._unanswered.items()):
            reply.fail(error)
            envelope.finish(type(error).__name__)

    def statistics(self) -> MailboxStatistics:
        return MailboxStatistics(
            num_waiting=len(self._waiting),
            num_waiting_peak=self._peak,
            capacity=self.capacity,
            num_received=self._num_received,
            num_refused=self._num_refused,
            num_superseded=self._num_superseded,
            num_unanswered=len(self._unanswered),
        )
