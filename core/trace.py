"""The trace bus: what every message waited for and how long it took, and counters, for whoever watches.

One preallocated ring holds the newest events. A subscription is a cursor into it: bounded by the ring, and when it falls
behind it skips what was overwritten and counts it. With nobody watching nothing is recorded, and a sender pays for
reading `is_on`. All of it lives in the event loop's thread.

A span's `flow` ties together what belongs to one request and round: draft -> verify -> commit -> delta.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Collection
from typing import NamedTuple

import anyio

logger = logging.getLogger("forerun")

#: Events the ring holds: some seconds of a busy engine (about 15 a round and sequence), 128 KiB of references.
RING_EVENTS = 16_384


class Flow(NamedTuple):
    """Whose message: the request's id, and its round; 0 is all that comes before the first draft."""

    request: str
    round: int


class Span(NamedTuple):
    """One message: put into `actor`'s mailbox, taken up, done with. Times from the trace's clock, in nanoseconds; for `computed_ns` of
    them, while it was handled, the actor's executor was at work: the device. `outcome` is "ok", or the class of the error it ended with."""

    actor: str
    message: str
    flow: Flow
    enqueued_ns: int
    started_ns: int
    finished_ns: int
    outcome: str
    computed_ns: int = 0


class Stage(NamedTuple):
    """A request was in one state of its protocol, from then until then. The stages of a request follow each other without gaps."""

    flow: Flow
    state: str
    started_ns: int
    finished_ns: int


class Counter(NamedTuple):
    """A figure at a time: "<actor> depth" (messages waiting), "slots used", "accepted" (drafts, by request and round),
    "drafting us" (of drafts behind the round's verify), "begun early" (1 if a device was at work on a verify before it was asked for, 0 if
    it was at work on something else)."""

    name: str
    flow: Flow | None
    at_ns: int
    value: int


class Notice(NamedTuple):
    """Something that happens seldom: an actor was restarted or switched off."""

    actor: str
    at_ns: int
    text: str


Event = Span | Stage | Counter | Notice


def is_about(event: Event, actors: Collection[str], request: str) -> bool:
    """Whether it concerns one of these actors, and this request; nothing given: any."""
    of = event.name.removesuffix(" depth") if isinstance(event, Counter) else "" if isinstance(event, Stage) else event.actor
    flow = None if isinstance(event, Notice) else event.flow
    return (not actors or of in actors) and (not request or (flow is not None and flow.request == request))


Observer = Callable[[Event], None]


class Trace:
    """`capacity` events; `clock` gives nanoseconds, and is virtual in simulations."""

    def __init__(self, capacity: int = RING_EVENTS, clock: Callable[[], int] = time.perf_counter_ns) -> None:
        self.clock = clock
        self.is_on = False
        self._capacity = capacity
        self._ring: list[Event | None] = [None] * capacity
        self._num_recorded = 0
        self._observers: list[Observer] = []
        self._subscriptions: list[Subscription] = []
        self._asleep: set[anyio.Event] = set()  # what subscriptions wait for

    def record(self, event: Event) -> None:
        """Callers ask `is_on` first, and so build no event that nobody wants."""
        self._ring[self._num_recorded % self._capacity] = event
        self._num_recorded += 1
        if self._asleep:
            for arrived in self._asleep:
                arrived.set()
            self._asleep.clear()
        if self._observers:
            self._tell_observers(event)

    def _tell_observers(self, event: Event) -> None:
        for observer in tuple(self._observers):
            try:
                observer(event)
            except Exception:  # the observer's code; it is told no more, and the engine goes on
                logger.exception("the trace observer %r failed and is dropped", observer)
                self.detach(observer)

    def count(self, name: str, value: int, flow: Flow | None = None) -> None:
        if self.is_on:
            self.record(Counter(name, flow, self.clock(), value))

    def notice(self, actor: str, text: str) -> None:
        if self.is_on:
            self.record(Notice(actor, self.clock(), text))

    def attach(self, observer: Observer) -> None:
        """Calls `observer` with every event, in the event loop. One that raises is dropped and logged once."""
        self._observers.append(observer)
        self._switch()

    def detach(self, observer: Observer) -> None:
        if observer in self._observers:
            self._observers.remove(observer)
        self._switch()

    def subscribe(self) -> Subscription:
        """A stream of the events from now on: `with trace.subscribe() as events: async for event in events`."""
        return Subscription(self)

    def end(self) -> None:
        """Nothing more will come: ends every subscription after what it has."""
        for subscription in tuple(self._subscriptions):
            subscription.close()

    def _switch(self) -> None:
        self.is_on = bool(self._observers or self._subscriptions)

    # What a subscription needs

    def open(self, subscription: Subscription) -> int:
        self._subscriptions.append(subscription)
        self._switch()
        return self._num_recorded

    async def next_event(self, arrived: anyio.Event) -> None:
        """Waits until an event comes, or somebody else sets `arrived`. Cancelled: nothing is left behind."""
        self._asleep.add(arrived)
        try:
            await arrived.wait()
        finally:
            self._asleep.discard(arrived)

    def close(self, subscription: Subscription) -> None:
        if subscription in self._subscriptions:
            self._subscriptions.remove(subscription)
        self._switch()

    def read(self, cursor: int) -> tuple[list[Event], int, int]:
        """Events from `cursor` on that are still held, how many before them are gone, and the next cursor."""
        first = max(cursor, self._num_recorded - len(self._ring))
        events = [event for i in range(first, self._num_recorded) if (event := self._ring[i % len(self._ring)]) is not None]
        return events, first - cursor, self._num_recorded


class Subscription:
    """Events as they come, without holding anybody up. `num_missed` counts those overwritten before they were read."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._cursor = 0
        self._pending: deque[Event] = deque()
        self._is_open = False
        self._arrived = anyio.Event()
        self.num_missed = 0

    def __enter__(self) -> Subscription:
        self._cursor = self._trace.open(self)
        self._is_open = True
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the iteration after what has been recorded until now."""
        if self._is_open:
            self._fetch()
            self._is_open = False
            self._trace.close(self)
            self._arrived.set()

    def _fetch(self) -> None:
        events, num_missed, self._cursor = self._trace.read(self._cursor)
        self._pending.extend(events)
        self.num_missed += num_missed

    def __aiter__(self) -> Subscription:
        return self

    async def __anext__(self) -> Event:
        """The next event. Cancelled: none is lost. StopAsyncIteration once closed."""
        if not await self._wait():
            raise StopAsyncIteration
        return self._pending.popleft()

    async def take(self) -> list[Event]:
        """All events there are, at least one; none once closed. Cancelled: none is lost."""
        await self._wait()
        if self._is_open:
            self._fetch()
        events = list(self._pending)
        self._pending.clear()
        return events

    async def _wait(self) -> bool:
        """Whether there is an event; waits for one unless closed."""
        while not self._pending:
            if not self._is_open:
                return False
            self._arrived = anyio.Event()
            self._fetch()
            if not self._pending:
                await self._trace.next_event(self._arrived)
        return True
