"""The memory manager: lends slots, and makes who cannot have one wait, in order, in a bounded queue."""

from __future__ import annotations

from collections import deque

from ..core.actor import Actor
from ..core.channel import Envelope
from ..core.errors import InternalBug, Overloaded
from ..core.messages import Admit, Release
from ..core.vocabulary import Lease
from ..kernels.model.memory import SequencePool


class MemoryManager(Actor):
    def __init__(self, pool: SequencePool, queue_size: int) -> None:
        super().__init__("memory manager")
        self._pool = pool
        self._queue: deque[Envelope] = deque()
        self._queue_size = queue_size

    @property
    def num_waiting(self) -> int:
        return sum(not envelope.is_abandoned for envelope in self._queue)

    async def handle(self, batch: list[Envelope]) -> None:
        for envelope in batch:
            if isinstance(envelope.message, Release):
                self._pool.release(envelope.message.slot)
                envelope.answer(None)
            elif isinstance(envelope.message, Admit):
                self._queue.append(envelope)
            else:
                raise InternalBug(f"memory manager got {envelope.message!r}")
        # Who gave up waiting must not keep its place, nor be lent a slot nobody would give back.
        self._queue = deque(envelope for envelope in self._queue if not envelope.is_abandoned)
        while self._queue and self._admit(self._queue[0]):
            self._queue.popleft()
        while len(self._queue) > self._queue_size:
            error = Overloaded(f"{self._queue_size} requests are waiting already", retry_after_seconds=1.0)
            self._queue.pop().fail(error)

    def _admit(self, envelope: Envelope) -> bool:
        message = envelope.message
        assert isinstance(message, Admit)
        try:
            slot = self._pool.lease(message.num_tokens, message.max_rows)
        except MemoryError:
            envelope.fail(Overloaded(f"no memory for {message.num_tokens} positions", retry_after_seconds=1.0))
            return True
        if slot is None:
            return False
        envelope.answer(Lease(slot, message.num_tokens, message.max_rows))
        return True
