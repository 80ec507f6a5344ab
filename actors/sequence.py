"""One task per request. Drives core/protocol.py: asks for memory, prefills, then draft - verify - commit until the end."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import anyio
from anyio.abc import ObjectSendStream

from ..core.channel import Mailbox
from ..core.errors import ForerunError
from ..core.messages import Admit, Commit, Forget, Observe, Prefill, Propose, Release, Verify
from ..core.protocol import SequenceProtocol
from ..core.vocabulary import (
    Delta,
    Draft,
    DrafterName,
    DrafterStatistics,
    FinishReason,
    Lease,
    Request,
    Result,
    Speculation,
    SpeculationParams,
    Timings,
    Usage,
)
from .tokenizer import Detokenizer

logger = logging.getLogger("forerun")

#: called with (prompt tokens computed, prompt tokens in all)
PrefillProgress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Neighbours:
    """The mailboxes a sequence talks to. Drafters in the order they are asked."""

    memory: Mailbox
    target: Mailbox
    drafters: dict[DrafterName, Mailbox]


@dataclass(slots=True)
class _Clock:
    """anyio times, in seconds, at which a request passed from one phase to the next."""

    begun: float
    admitted: float | None = None
    first_token: float | None = None

    def timings(self, now: float) -> Timings:
        admitted = self.admitted if self.admitted is not None else now
        first = self.first_token if self.first_token is not None else now
        return Timings(admitted - self.begun, first - admitted, now - first)


class Sequence:
    def __init__(
        self,
        request: Request,
        neighbours: Neighbours,
        speculation: SpeculationParams,
        detokenizer: Detokenizer,
        output: ObjectSendStream[Delta],
        progress: PrefillProgress | None,
    ) -> None:
        self._request, self._to, self._params = request, neighbours, speculation
        self._protocol = SequenceProtocol(request)
        self._detokenizer, self._output, self._progress = detokenizer, output, progress
        self._clock = _Clock(anyio.current_time())
        self._text: list[str] = []
        self._num_rounds = 0
        # How long a looked-up draft may be now. Twelve rows cost five times one here, and a match says little about how far
        # it reaches: so twice as far after a draft accepted whole, and just beyond the miss after one that was not.
        self._ngram_reach = speculation.ngram_size_n
        self._statistics: dict[DrafterName, DrafterStatistics] = {name: DrafterStatistics() for name in neighbours.drafters}

    async def run(self) -> None:
        """From admission to the last delta. Cancelled or failed: the lease is given back before this returns."""
        request = self._request
        max_rows = 1 + max((self._params.limit(name) for name in self._to.drafters), default=0)
        admit = Admit(len(request.prompt_ids) + request.max_tokens, max_rows)
        leases: list[Lease] = []
        try:
            lease = await self._to.memory.ask(admit, undo=leases.append)
            leases.append(lease)
            self._clock.admitted = anyio.current_time()
            self._protocol.admitted()
            await self._prefill(lease)
            while not self._protocol.is_over:
                await self._round(lease)
        except BaseException as error:
            if not self._protocol.is_over:
                # What is no error of ours is a cancellation, or a reader that has gone.
                self._protocol.fail() if isinstance(error, ForerunError) else self._protocol.cancel()
            raise
        finally:
            for lease in leases:
                await self._give_back(lease)

    async def _prefill(self, lease: Lease) -> None:
        protocol, prompt = self._protocol, self._request.prompt_ids
        while self._clock.first_token is None:
            position, chunk = protocol.position, protocol.next_chunk()
            end = position + len(chunk)
            verdict = await self._to.target.ask(Prefill(lease.slot, position, chunk, self._request.sampling, end == len(prompt)))
            for drafter in self._to.drafters.values():
                await drafter.ask(Observe(lease.slot, position, chunk))
            tokens = protocol.chunk_computed(verdict)
            self._report(end)
            if end == len(prompt):
                self._clock.first_token = anyio.current_time()
                await self._deliver(tokens, None)

    def _report(self, num_computed: int) -> None:
        if self._progress is not None:
            try:
                self._progress(num_computed, len(self._request.prompt_ids))
            except Exception:  # the caller's code; it is told no more, and the request goes on
                logger.exception("prefill_progress of %s failed", self._request.request_id)
                self._progress = None

    async def _round(self, lease: Lease) -> None:
        protocol = self._protocol
        draft = await self._draft(lease)
        rows = protocol.drafted(draft)
        verdict = await self._to.target.ask(Verify(lease.slot, protocol.position, rows, self._request.sampling))
        done = protocol.verified(verdict)
        self._num_rounds += 1
        if draft is not None:
            num_drafted = len(rows) - 1
            self._statistics[draft.drafter] = self._statistics[draft.drafter].after(num_drafted, done.num_accepted)
            if draft.drafter == "ngram-simple":
                self._ngram_reach = 2 * num_drafted if done.num_accepted == num_drafted else done.num_accepted + 1
        for drafter in self._to.drafters.values():
            await drafter.ask(Commit(lease.slot, done.position, done.computed))
        await self._deliver(done.tokens, draft.drafter if draft is not None and done.num_accepted else None)

    async def _draft(self, lease: Lease) -> Draft | None:
        """The first draft with anything in it, or None. Twelve matching tokens say more than a head's guess, and asking
        the n-gram drafter first saves the head's work when they match."""
        for name, drafter in self._to.drafters.items():
            limit = min(self._params.limit(name), self._protocol.draft_limit)
            limit = min(limit, self._ngram_reach) if name == "ngram-simple" else limit
            if limit > 0:
                last_token, sampling = self._protocol.last_token, self._request.sampling
                draft = await drafter.ask(Propose(lease.slot, self._protocol.position, last_token, limit, sampling))
                if draft.tokens:
                    return draft
        return None

    async def _deliver(self, tokens: tuple[int, ...], source: DrafterName | None) -> None:
        """Hands tokens to the reader; waits while it is slow, which holds up this sequence alone."""
        text = self._detokenizer.push(tokens, is_last=self._protocol.is_over)
        self._text.append(text)
        if tokens or text:
            await self._output.send(Delta(text, tokens, source))

    async def _give_back(self, lease: Lease) -> None:
        # Drafters first: one that still had this slot's messages waiting would otherwise act on its next owner's memory.
        with anyio.CancelScope(shield=True):
            for drafter in self._to.drafters.values():
                with suppress(ForerunError):  # a drafter that has stopped remembers nothing
                    await drafter.ask(Forget(lease.slot))
            with suppress(ForerunError):  # a memory manager that has stopped lends nothing
                await self._to.memory.ask(Release(lease.slot))

    def result(self) -> Result:
        """What has come out so far; after `run`, all of it."""
        protocol, request = self._protocol, self._request
        return Result(
            request.request_id,
            "".join(self._text),
            tuple(protocol.output),
            protocol.finish_reason or FinishReason.CANCELLED,
            request.sampling,
            Usage(len(request.prompt_ids), len(protocol.output)),
            self._clock.timings(anyio.current_time()),
            Speculation(self._num_rounds, dict(self._statistics)),
        )
