"""The memory manager: lends memory, and makes who cannot have any wait, in order, in a bounded queue."""

from __future__ import annotations

from collections import deque

from ..core.actor import Actor, Executor
from ..core.channel import RETRY_AFTER_SECONDS, Envelope, Mailbox
from ..core.errors import InternalBug, InvalidRequest, Overloaded
from ..core.messages import Admit, Publish, Release
from ..core.trace import Trace
from ..kernels.model.memory import SequencePool
from ..kernels.model.pages import PAGE


class MemoryManager(Actor):
    def __init__(self, mailbox: Mailbox, executor: Executor, pool: SequencePool, queue_size: int, trace: Trace) -> None:
        super().__init__(mailbox, executor)
        self._pool, self._trace = pool, trace
        self._queue: deque[Envelope] = deque()
        self._queue_size = queue_size

    @property
    def num_waiting(self) -> int:
        return sum(not envelope.is_abandoned for envelope in self._queue)

    async def handle(self, batch: list[Envelope]) -> None:
        for envelope in batch:
            match envelope.message:
                case Release(_, lease):
                    self._pool.release(lease)
                    envelope.answer(None)
                case Publish(_, lease, prompt, salt):
                    self._pool.publish(lease, prompt, salt)
                    envelope.answer(None)
                case Admit(is_replay=True):  # admitted before: ahead of those who never were, behind its like
                    num_before = sum(isinstance(each.message, Admit) and each.message.is_replay for each in self._queue)
                    self._queue.insert(num_before, envelope)
                case Admit():
                    self._queue.append(envelope)
                case other:
                    raise InternalBug(f"memory manager got {other!r}")
        # Who gave up waiting must not keep its place, nor be lent memory nobody would give back.
        for envelope in [envelope for envelope in self._queue if envelope.is_abandoned]:
            self._queue.remove(envelope)
            envelope.finish("abandoned")
        while self._queue and self._admit(self._queue[0]):
            self._queue.popleft()
        waiting = [envelope for envelope in self._queue if isinstance(envelope.message, Admit) and not envelope.message.is_replay]
        for envelope in waiting[self._queue_size :]:
            self._queue.remove(envelope)
            envelope.fail(Overloaded(f"{self._queue_size} requests are waiting already", RETRY_AFTER_SECONDS))
        self._trace.count("slots used", self._pool.num_used)
        self._trace.count("pages used", self._pool.num_pages - self._pool.num_pages_free)
        if not self._pool.num_used:
            self._pool.check_integrity()

    def _admit(self, envelope: Envelope) -> bool:
        message = envelope.message
        assert isinstance(message, Admit)
        if not self._pool.can_ever_lease(message.num_tokens):
            problem = f"prompt and answer, {message.num_tokens} positions, do not fit into {self._pool.num_pages} pages of {PAGE}"
            envelope.fail(InvalidRequest([("max_tokens", problem)]))
            return True
        try:
            lease = self._pool.lease(message.flow.request, message.prompt, message.ends, message.num_tokens, message.max_rows, message.salt)
        except MemoryError:
            envelope.fail(Overloaded(f"no memory for {message.num_tokens} positions", RETRY_AFTER_SECONDS))
            return True
        if lease is None:
            return False
        envelope.answer(lease)
        return True
