"""The memory manager: lends memory, and makes who cannot have any wait, in order, in a bounded queue.

A lease has all the memory it can need, so nobody is ever out of it in mid-text; but who runs long may keep others waiting
for long. When the first in the queue has waited `preempt_after_seconds`, the newest of those that have run as long are
pre-empted: their leases are revoked, they queue behind the one they made room for, and compute again what they had, with
the same tokens. It happens to a request once at most, so that everybody gets on.

It owns the files of memory as well, saved sequences and checkpoints of prefixes: no file's name or content reaches the
actors that compute.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TypeVar

import anyio

from ..core.actor import Actor, Executor
from ..core.channel import RETRY_AFTER_SECONDS, Envelope, Mailbox
from ..core.errors import InternalBug, InvalidRequest, LeaseLost, Overloaded, SavedSequenceError, WorkFailed
from ..core.messages import Admit, Publish, Release, Save
from ..core.trace import Trace
from ..core.vocabulary import Lease, SavedFile
from ..kernels.model import saved
from ..kernels.model.memory import SequencePool
from ..kernels.model.pages import PAGE
from ..kernels.model.prefix import Entry
from ..kernels.model.saved import PrefixFolder

logger = logging.getLogger("forerun")

T = TypeVar("T")

#: About what a file takes, and its bytes to be checked and copied.
FILE_SECONDS, BYTES_PER_SECOND = 0.1, 5e8
#: Memory that is cleared or copied; new memory comes in small pages, at less than half the speed of that in use.
COPIED_PER_SECOND = 2e9
#: How often the queue is looked through for those who have given up waiting.
LOOK_SECONDS = 1.0


class MemoryManager(Actor):
    def __init__(
        self,
        mailbox: Mailbox,
        executor: Executor,
        pool: SequencePool,
        fingerprint: str,
        folder: PrefixFolder | None,
        queue_size: int,
        queue_tokens: float,
        preempt_after_seconds: float,
        trace: Trace,
    ) -> None:
        super().__init__(mailbox, executor)
        self._pool, self._fingerprint, self._folder, self._trace = pool, fingerprint, folder, trace
        self._looked_up: Envelope | None = None  # the last whose prompt was looked for in the folder
        self._queue: deque[tuple[Envelope, Admit, float]] = deque()  # and since when
        self._queue_size, self._queue_tokens, self._patience = queue_size, queue_tokens, preempt_after_seconds
        self._lent: dict[int, float] = {}  # to those that may be pre-empted, and since when; the newest last
        self._pressing: Envelope | None = None  # the one that others were last pre-empted for
        self._preempted_at = -math.inf

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
                case Publish(_, lease, tokens, ends, salt):
                    self._pool.publish(lease, tokens, ends, salt)
                    envelope.answer(None)
                case Save() as message:
                    await self._save(envelope, message)
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
        while True:
            while self._queue and await self._admit(*self._queue[0]):
                self._queue.popleft()
            if self._folder is None or (entry := self._pool.prefixes.overdue()) is None:
                break
            await self._archive(self._folder, entry)
        self._refuse()
        self.wake_at = min(self._preempt(now), now + LOOK_SECONDS if self._queue else math.inf)
        self._trace.count("slots used", self._pool.num_used)
        self._trace.count("pages used", self._pool.num_pages - self._pool.num_pages_free)
        if not self._pool.num_used:
            self._pool.check_integrity()

    def _refuse(self) -> None:
        """Those for whom there is no room behind the others that wait."""
        num_waiting = num_tokens = 0
        for each in [each for each in self._queue if not each[1].is_replay]:
            size = len(each[1].prompt.ids)
            if num_waiting < self._queue_size and num_tokens + size <= self._queue_tokens:
                num_waiting, num_tokens = num_waiting + 1, num_tokens + size
            else:
                self._queue.remove(each)
                problem = f"{num_waiting} requests are waiting already, with prompts of {num_tokens} tokens"
                each[0].fail(Overloaded(problem, RETRY_AFTER_SECONDS))

    def _preempt(self, now: float) -> float:
        """Makes room for the first in the queue if its time has come. Returns when to look again, if nothing happens before."""
        if not self._queue or self._queue[0][1].was_preempted:
            return math.inf
        if self._pool.is_yielding and now < self._preempted_at + self._patience:  # whoever waits for a slow reader yields late
            return self._preempted_at + self._patience
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
        self._pressing, self._preempted_at = envelope, now
        self._trace.notice(self.name, f"pre-empted {len(victims)} for {message.flow.request}")
        return math.inf

    async def _admit(self, envelope: Envelope, message: Admit, _since: float) -> bool:
        """Whether the first in the queue has been dealt with."""
        if not self._pool.can_ever_lease(message.num_tokens):
            problem = f"prompt and answer, {message.num_tokens} positions, do not fit into {self._pool.num_pages} pages of {PAGE}"
            envelope.fail(InvalidRequest([("max_tokens", problem)]))
            return True
        if message.saved is None:
            await self._look_up(envelope, message)
        ends = message.ends if message.saved is None else ()
        lease: Lease | None = None
        try:
            found = self._pool.lease(message.flow.request, message.prompt, ends, message.num_tokens, message.max_rows, message.salt)
            if found is None:
                if num_moving := self._pool.prefixes.num_moving:
                    await self.compute(self._pool.prefixes.finish_moves, num_moving * self._pool.page_bytes / COPIED_PER_SECOND)
                return False
            lease, filling = found
            if filling.num_bytes:
                await self.compute(filling.do, filling.num_bytes / COPIED_PER_SECOND)
        except MemoryError:
            if lease is not None:
                self._pool.release(lease.number)
            envelope.fail(Overloaded(f"no memory for {message.num_tokens} positions", RETRY_AFTER_SECONDS))
            return True
        if message.saved is not None:
            try:
                lease = await self._restore(lease, message.saved)
            except SavedSequenceError as error:
                self._pool.release(lease.number)
                envelope.fail(error)
                return True
        if envelope.is_abandoned:  # while a file was read
            self._pool.release(lease.number)
            envelope.finish("abandoned")
            return True
        if not message.was_preempted:
            self._lent[lease.number] = anyio.current_time()
        envelope.answer(lease)
        return True

    # Files. What is wrong with one, or with the disk it is on, is the matter of its request alone.

    async def _save(self, envelope: Envelope, message: Save) -> None:
        try:
            memory = self._pool[message.lease]
        except LeaseLost as error:
            envelope.fail(error)
            return
        snapshot, memory.frozen = memory.frozen, None
        if snapshot is None:
            raise InternalBug(f"lease {message.lease} is to be saved, but was not frozen")
        work = partial(saved.write, message.path, self._fingerprint, message.record, snapshot)
        try:
            await self._do(work, snapshot.num_bytes)
        except SavedSequenceError as error:
            envelope.fail(error)
        except Exception:
            envelope.fail(WorkFailed("the memory manager failed saving this request"))
            raise
        else:
            envelope.answer(None)

    async def _restore(self, lease: Lease, file: SavedFile) -> Lease:
        memory, blank = self._pool[lease.number], self._pool.blank

        def work() -> int:
            _, snapshot = saved.read(file.path, self._fingerprint, blank, file.checksum)
            memory.restore_snapshot(snapshot)
            return snapshot.checkpoint.position

        return replace(lease, num_cached=await self._do(work, file.num_bytes))

    async def _look_up(self, envelope: Envelope, message: Admit) -> None:
        """Brings back the longest checkpoint that the folder has of a prompt, once, if memory does not have as much, and can."""
        folder, prefixes = self._folder, self._pool.prefixes
        if folder is None or not len(folder) or self._looked_up is envelope or self._pool.num_used == self._pool.num_slots:
            return
        self._looked_up = envelope
        found = prefixes.find(message.prompt.ids, message.ends, message.salt)
        start = found.checkpoint.position if found is not None else 0
        there = [
            (end, key)
            for end, key in prefixes.keys(message.prompt.ids, message.ends, message.salt, folder.positions)
            if end > start and key in folder and folder.size(key) <= prefixes.max_bytes
        ]
        if not there:
            return
        (end, key), blank = there[-1], self._pool.blank
        try:
            snapshot = await self._do(lambda: folder.load(key, end, blank), folder.size(key))
        except SavedSequenceError as error:
            logger.warning("a checkpoint is forgotten: %s", error)
            return
        while (entry := prefixes.overdue(prefixes.size_of(snapshot))) is not None:
            await self._archive(folder, entry)
        prefixes.adopt(key, snapshot)

    async def _archive(self, folder: PrefixFolder, entry: Entry) -> None:
        """Puts a checkpoint into the folder, and forgets it."""
        prefixes = self._pool.prefixes
        if entry.key not in folder:
            try:
                await self._do(lambda: folder.store(entry.key, prefixes.snapshot(entry)), prefixes.num_bytes(entry))
            except SavedSequenceError as error:
                logger.warning("a checkpoint is forgotten: %s", error)
        prefixes.forget(entry)

    async def _do(self, work: Callable[[], T], num_bytes: int) -> T:
        """Has a file written or read, never in place: it may have to wait for the disk."""
        return await self.compute(work, FILE_SECONDS + num_bytes / BYTES_PER_SECOND)
