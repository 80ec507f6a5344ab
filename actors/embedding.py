"""The hidden rows of a prompt, for who asks: computed chunk by chunk as the reader takes them, which is all the back-pressure there is."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from contextlib import suppress
from types import TracebackType

import anyio

from ..core.channel import Mailbox
from ..core.embeddings import Encoded
from ..core.errors import ActorRestarted, DeadlineExceeded, ForerunError, LeaseLost, PositionLost, RequestFailed
from ..core.messages import Admit, Forget, Prefill, Release
from ..core.protocol import chunk_ends, together
from ..core.trace import Flow
from ..core.vocabulary import Choosing, Lease, SamplingParams
from ..kernels.backend import F32
from ..kernels.model.memory import SequencePool

#: Times memory may be lost before a request is given up.
MAX_LOSSES = 3


class Embedding:
    """`async with engine.embed(...) as embedding: async for position, rows in embedding`. Each piece is (position of its first row, rows
    [R, hidden] float32), in order; together they are one row a prompt token, after the trunk's last norm. Leaving the block has
    returned the memory."""

    def __init__(
        self,
        request_id: str,
        encode: Callable[[], Awaitable[Encoded]],
        boundary_ids: frozenset[int],
        mailboxes: tuple[Mailbox, Mailbox],
        pool: SequencePool,
        timeout_seconds: float | None,
        tell: Callable[[Embedding, bool], None],
    ) -> None:
        """Private: use Engine.embed. `mailboxes` are the memory manager's and the target decoder's; `tell` hears of opening and closing."""
        self.request_id = request_id
        self._encode, self._boundary_ids, self._pool, self._tell = encode, boundary_ids, pool, tell
        self._memory, self._target = mailboxes
        self._timeout_seconds, self._deadline = timeout_seconds, math.inf
        self._flow = Flow(request_id, 0)
        self._prompt = Encoded(())
        self._ends: tuple[int, ...] = ()
        self._lease: Lease | None = None
        self._num_computed = self._num_given = self._num_losses = 0
        self._is_open = self._was_preempted = False
        self._is_asked = False  # the next chunk, by a call that was cancelled since
        self._memory_life = 0  # in which the lease was lent

    @property
    def num_prompt_tokens(self) -> int:
        """Rows there will be in all; known once the first have come."""
        return len(self._prompt.ids)

    async def __aenter__(self) -> Embedding:
        if self._timeout_seconds is not None:
            self._deadline = anyio.current_time() + self._timeout_seconds
        self._tell(self, True)
        self._is_open = True
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._is_open = False
        try:
            await self._give_back()
        finally:
            self._tell(self, False)

    def __aiter__(self) -> Embedding:
        return self

    async def __anext__(self) -> tuple[int, F32]:
        """The next rows. Raises what `Stream` does, at the same faults. Cancelled: the same rows come next time."""
        if not self._is_open:
            raise RuntimeError("use `async with`")
        with anyio.CancelScope(deadline=self._deadline) as scope:
            try:
                return await self._next()
            except PositionLost as error:  # our fault, and of no use to the caller
                raise RequestFailed("the request's memory was lost") from error
        assert scope.cancelled_caught
        raise DeadlineExceeded(f"not finished after {self._timeout_seconds} s")

    async def _next(self) -> tuple[int, F32]:
        if not self._prompt.ids:
            self._prompt = await self._encode()
            self._ends = together(chunk_ends(self._prompt.ids, self._boundary_ids), self._pool.max_together)
        if self._num_given == len(self._prompt.ids):
            raise StopAsyncIteration
        while True:
            try:
                position, rows = await self._compute()
            except (ActorRestarted, LeaseLost) as error:
                if isinstance(error, LeaseLost) and self._memory_life == self._memory.life:
                    self._was_preempted = True  # which happens once
                else:
                    self._num_losses += 1
                    if self._num_losses > MAX_LOSSES:
                        raise RequestFailed("memory was lost again and again") from error
                await self._give_back()
            else:
                if position == self._num_given:  # else it was given before memory was lost
                    self._num_given += len(rows)
                    return position, rows

    async def _compute(self) -> tuple[int, F32]:
        """The chunk after those that memory has. Cancelled: it may have been computed."""
        if self._lease is None:
            self._num_computed, self._is_asked = 0, False

            def keep(lease: Lease) -> None:
                self._lease = lease

            # No ends: with nothing in it, for the rows of what is cached are gone.
            is_replay = self._was_preempted or self._num_losses > 0
            admit = Admit(self._flow, self._prompt, (), "", len(self._prompt.ids), 1, is_replay, self._was_preempted)
            self._memory_life = self._memory.life
            keep(await self._memory.ask(admit, undo=keep))
        assert self._lease is not None
        lease, position = self._lease.number, self._num_computed
        end = next(end for end in self._ends if end > position)
        chunk = self._prompt.ids[position:end]
        choosing = Choosing(SamplingParams())
        was_asked, self._is_asked = self._is_asked, True
        try:
            await self._target.ask(Prefill(self._flow, lease, position, chunk, choosing, is_last=False, is_kept=False))
        except PositionLost:
            if not was_asked:
                raise
        rows = self._pool[lease].hidden.read(position, len(chunk))
        self._num_computed, self._is_asked = end, False
        return position, rows

    async def _give_back(self) -> None:
        if self._lease is not None:
            lease, self._lease = self._lease.number, None
            with anyio.CancelScope(shield=True):
                for mailbox, message in ((self._target, Forget(self._flow, lease)), (self._memory, Release(self._flow, lease))):
                    with suppress(ForerunError):
                        await mailbox.ask(message)
