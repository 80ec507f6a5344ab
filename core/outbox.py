"""The way of one request's deltas to its reader: bounded, and a slow reader's deltas are merged, never dropped.

While fewer than `capacity` wait, each is a delta of its own. Beyond that, new ones are merged into the newest that
waits, until it holds `max_tokens`; then the sequence waits, which slows it and no other.
"""

from __future__ import annotations

from collections import deque

import anyio
from anyio.lowlevel import checkpoint_if_cancelled

from .trace import Flow, Span, Trace
from .vocabulary import Delta

#: Deltas a reader may be behind before they are merged: a burst of a fast engine while its reader does something else.
CAPACITY = 16
#: Tokens one merged delta may hold before the sequence waits: a few rounds of the longest drafts.
MERGED_TOKENS = 256


class Outbox:
    """One sender, one receiver."""

    def __init__(self, name: str, trace: Trace, capacity: int = CAPACITY, max_tokens: int = MERGED_TOKENS) -> None:
        self._name, self._trace, self._capacity, self._max_tokens = name, trace, capacity, max_tokens
        self._waiting: deque[tuple[Delta, Flow, int]] = deque()
        self._arrived, self._room = anyio.Event(), anyio.Event()
        self._new_event = type(self._arrived)
        self._is_ended = self._is_hurried = False

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    async def send(self, delta: Delta, flow: Flow) -> None:
        """Hands over, merged with the newest when the reader is slow; waits when that is full too. Cancelled: not handed over."""
        while len(self._waiting) >= self._capacity and self._is_full(delta) and not self._is_hurried:
            if self._room.is_set():
                self._room = self._new_event()
            await self._room.wait()
        now = self._trace.clock() if self._trace.is_on else 0
        if len(self._waiting) >= self._capacity:
            newest, _, now = self._waiting.pop()
            delta = newest.merged(delta)
        self._waiting.append((delta, flow, now))
        self._arrived.set()

    def _is_full(self, delta: Delta) -> bool:
        return len(self._waiting[-1][0].token_ids) + len(delta.token_ids) > self._max_tokens

    async def receive(self) -> Delta | None:
        """The next delta; None after the last. Cancelled: none is lost."""
        await checkpoint_if_cancelled()
        while not self._waiting:
            if self._is_ended:
                return None
            if self._arrived.is_set():
                self._arrived = self._new_event()
            await self._arrived.wait()
        delta, flow, enqueued = self._waiting.popleft()
        self._room.set()
        if self._trace.is_on and enqueued:
            now = self._trace.clock()
            self._trace.record(Span(self._name, "Delta", flow, enqueued, now, now, "ok"))
        return delta

    def hurry(self, is_hurried: bool) -> None:
        """While hurried, the sequence does not wait for the reader: a reader may be waiting for it."""
        self._is_hurried = is_hurried
        self._room.set()

    def end(self) -> None:
        """No more will be sent. What waits can still be read."""
        self._is_ended = True
        self._arrived.set()
