"""The memory manager: lends memory, and makes who cannot have any wait, in order, in a bounded queue.

A lease has all the memory it can need, so nobody is ever out of it in mid-text; but who runs long may keep others waiting
for long. When the first in the queue has waited `preempt_after_seconds`, the newest of those that have run as long are
pre-empted: their leases are revoked, they queue behind the one they made room for, and compute again what they had, with
the same tokens. It happens to a request once at most, so that everybody gets on.
"""

from __future__ import annotations

import math
from collections import deque

import anyio

from ..core.actor import Actor, Executor
from ..core.channel import RETRY_AFTER_SECONDS, Envelope, Mailbox
from ..core.errors import InternalBug, InvalidRequest, Overloaded
from ..core.messages import Admit, Publish, Release
from ..core.trace import Trace
from ..kernels.model.memory import SequencePool
from ..kernels.model.pages import PAGE


class MemoryManager(Actor):
    def __init__(
        self, mailbox: Mailbox, executor: Executor, pool: SequencePool, queue_size: int, preempt_after_seconds: float, trace: Trace
    ) -> None:
        super().__init__(mailbox, executor)
        self._pool, self._trace = pool, trace
        self._queue: deque[tuple[Envelope, Admit, float]] = deque()  # and since when
        self._queue_size, self._patience = queue_size, preempt_after_seconds
        self._lent: dict[int, float] = {}  # to those that may be pre-empted, and since when; the newest last
        self._pressing: Envelope | None = None  # the one that others were last pre-empted for

    @property
    def num_waiting(self) -> int:
        return sum(not envelope.is_abandoned for envelope, _, _ in self._queue)

    async def handle(self, batch: list[Envelope]) -> None:
        now = anyio.current_time()
        for envelope in batch:
            match envelope.message:
                case Release(_, lease):
                    self._pool.release(lease)
                    self._lent.pop(lease, None)
                    envelope.answer(None)
                case Publish(_, lease, prompt, salt):
                    self._pool.publish(lease, prompt, salt)
                    envelope.answer(None)
                case Admit(is_replay=True) as message:  # admitted before: ahead of those who never were, behind its like
                    ahead = [i for i, (other, admit, _) in enumerate(self._queue) if admit.is_replay or other is self._pressing]
                    self._queue.insert(ahead[-1] + 1 if ahead else 0, (envelope, message, now))
                case Admit() as message:
                    self._queue.append((envelope, message, now))
                case other:
                    raise InternalBug(f"memory manager got {other!r}")
        # Who gave up waiting must not keep its place, nor be lent memory nobody would give back.
        for each in [each for each in self._queue if each[0].is_abandoned]:
            self._queue.remove(each)
            each[0].finish("abandoned")
        while self._queue and self._admit(*self._queue[0]):
            self._queue.popleft()
        for each in [each for each in self._queue if not each[1].is_replay][self._queue_size :]:
            self._queue.remove(each)
            each[0].fail(Overloaded(f"{self._queue_size} requests are waiting already", RETRY_AFTER_SECONDS))
        self.wake_at = self._preempt(now)
        self._trace.count("slots used", self._pool.num_used)
        self._trace.count("pages used", self._pool.num_pages - self._pool.num_pages_free)
        if not self._pool.num_used:
            self._pool.check_integrity()

    def _preempt(self, now: float) -> float:
        """Makes room for the first in the queue if its time has come. Returns when to look again, if nothing happens before."""
        if not self._queue or self._queue[0][1].is_replay or self._pool.is_yielding:
            return math.inf
        envelope, message, since = self._queue[0]
        due = since + self._patience
        victims: list[int] = []
        for lease, lent in reversed(self._lent.items()):
            due = max(due, lent + self._patience)
            victims.append(lease)
            if self._pool.would_fit(message.num_tokens, victims):
                break
        else:
            return math.inf
        if now < due:
            return due
        for lease in victims:
            del self._lent[lease]
            self._pool.revoke(lease)
        self._pressing = envelope
        self._trace.notice(self.name, f"pre-empted {len(victims)} for {message.flow.request}")
        return math.inf

    def _admit(self, envelope: Envelope, message: Admit, _since: float) -> bool:
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
        if not message.is_replay:
            self._lent[lease.number] = anyio.current_time()
        envelope.answer(lease)
        return True
