"""One task per request. Drives core/protocol.py, one function for each of its states, until the end is decided.

Two loops do the same: the plain one asks, waits and asks again; the overlapped one lets drafters read a chunk while the
target computes the next, and does not wait until they have heard of a round. The tokens are the same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import anyio
from anyio.lowlevel import checkpoint

from ..core.channel import Mailbox, Reply
from ..core.embeddings import Encoded
from ..core.errors import ActorRestarted, ForerunError, InternalBug, LeaseLost, RequestFailed, SavedSequenceError, WorkFailed
from ..core.messages import Admit, Forget, Freeze, Observe, Prefill, Publish, Release, Save, Verify
from ..core.outbox import Outbox
from ..core.protocol import MIN_CHUNK, SequenceProtocol, State
from ..core.speculation import DrafterName, Speculation, SpeculationParams
from ..core.trace import Flow, Stage, Trace
from ..core.vocabulary import (
    Choosing,
    Delta,
    FinishReason,
    History,
    Lease,
    Limits,
    Request,
    Result,
    SavedFile,
    Started,
    Timings,
    TokenLogprob,
    Usage,
    Verdict,
)
from ..kernels.model.saved import record_of
from .drafting import NOTHING, Drafting, Question
from .experience import Experience
from .synthetic import num_right
from .writer import Writer

logger = logging.getLogger("forerun")

#: called with (prompt tokens computed, prompt tokens in all)
PrefillProgress = Callable[[int, int], None]

#: Times in a row that the target may die working on a request, without one new token in between, and it is tried once more.
MAX_FRUITLESS_REPLAYS = 3
#: Requests in a row that may be found to kill the target before it is held to be the target's own fault.
MAX_CONVICTED = 8


@dataclass(slots=True)
class Blame:
    """Deaths of the target that requests were found to have caused: they are forgiven as soon as anything is computed for another, so that
    such requests do not end the engine; a target that lets no request end well still does."""

    forgive: Callable[[int], None]
    num_deaths: int = 0
    num_in_a_row: int = 0  # requests found so, since one ended well

    def convict(self, num_deaths: int) -> None:
        self.num_deaths += num_deaths
        self.num_in_a_row += 1

    def settle(self) -> None:
        if self.num_deaths and self.num_in_a_row <= MAX_CONVICTED:
            self.forgive(self.num_deaths)
            self.num_deaths = 0


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What all sequences of an engine share: the mailboxes they talk to, drafters in the order they are asked, and how they go about it."""

    memory: Mailbox
    target: Mailbox
    drafters: dict[DrafterName, Mailbox]
    speculation: SpeculationParams
    experience: Experience
    overlap: bool
    keeps_prefixes: bool
    keeps_answers: bool
    max_together: int
    blame: Blame
    trace: Trace


@dataclass(slots=True, eq=False)
class SaveOrder:
    """Somebody wants a request put into the file `path`, and waits for `done`."""

    path: Path
    done: anyio.Event = field(default_factory=anyio.Event)
    error: ForerunError | None = None

    def finish(self, error: ForerunError | None = None) -> None:
        self.error = error
        self.done.set()


@dataclass(frozen=True, slots=True)
class Origin:
    """A request that goes on from a file, and what it had produced."""

    file: SavedFile
    output: tuple[int, ...]


@dataclass(slots=True)
class _Clock:
    """anyio times, in seconds, at which a request passed from one phase to the next."""

    begun: float
    admitted: float | None = None
    first_token: float | None = None
    last_token: float | None = None

    def timings(self, now: float) -> Timings:
        admitted = self.admitted if self.admitted is not None else now
        first = self.first_token if self.first_token is not None else now
        last = self.last_token if self.last_token is not None else first
        return Timings(admitted - self.begun, first - admitted, last - first)


class Sequence:
    def __init__(
        self,
        request: Request,
        surroundings: Surroundings,
        writer: Writer,
        outbox: Outbox,
        saves: list[SaveOrder],
        origin: Origin | None = None,
        progress: PrefillProgress | None = None,
        started: Callable[[Started], None] = lambda started: None,
        limits: Limits | None = None,
    ) -> None:
        self._request, self._to, self._origin, self._saves = request, surroundings, origin, saves
        self._params, self._overlap, self._trace = surroundings.speculation, surroundings.overlap, surroundings.trace
        output = origin.output if origin is not None else ()
        self.protocol = SequenceProtocol(
            request,
            output,
            writer.push,
            max_together=surroundings.max_together,
            keeps_prefixes=surroundings.keeps_prefixes,
            is_by_chunks=not surroundings.keeps_answers,
        )
        self._writer, self._outbox, self._progress, self._started = writer, outbox, progress, started
        self._drafting = Drafting(
            surroundings.drafters,
            self._params,
            surroundings.experience,
            request.cache_salt,
            request.sampling,
            self._trace,
            self._overlap,
            self.protocol.computed,
        )
        self._plain_choosing, self._limits = Choosing(request.sampling, None, request.num_logprobs), limits
        self._num_cached = 0
        self._has_queued = self._was_preempted = False
        self._stage_began = self._trace.clock() if self._trace.is_on else 0
        self._memory_life = 0  # in which the lease was lent
        self._lease: Lease | None = None
        self._flow = Flow(request.request_id, 0)
        self._plan = NOTHING
        self._verdict = Verdict(())
        self._clock = _Clock(anyio.current_time())
        self._text: list[str] = []
        if origin is not None:
            writer.push(origin.output)
            self._text.append(writer.take())
        self._logprobs: list[TokenLogprob] = []
        self._num_rounds = 0
        self._num_tokens_at_death, self._num_deaths = -1, 0  # of the target, working on this
        self._kept: Reply[None] | None = None  # of a checkpoint after the answer

    async def run(self) -> None:
        """From admission to the last delta. Cancelled or failed: the lease is given back before this returns."""
        protocol = self.protocol
        states = {
            State.WAITING: self._admit, State.PREFILLING: self._prefill, State.REPLAYING: self._replay,
            State.DRAFTING: self._propose, State.VERIFYING: self._verify, State.COMMITTING: self._commit,
        }  # fmt: skip
        try:
            while not protocol.is_over:
                state = protocol.state
                try:
                    await states[state]()
                    if self._limits is not None and (why := self._limits.error(protocol.output)) is not None:
                        raise RequestFailed(f"the grammar cannot be followed any further: {why}")
                except (ActorRestarted, LeaseLost) as error:
                    await self._lose_memory(error)
                self._tell_stage(state)
            self._to.blame.num_in_a_row = 0
            await self._keep_answer()
        except BaseException as error:
            if not protocol.is_over:
                protocol.fail() if isinstance(error, Exception) else protocol.cancel()
            raise
        finally:
            await self._give_back(is_over=True)
            protocol.released()
            self._tell_stage(State.FINISHING)

    def _tell_stage(self, state: State) -> None:
        """The stage that begins where the last one ended is over."""
        if self._trace.is_on:
            now = self._trace.clock()
            if self._stage_began:
                self._trace.record(Stage(self._flow, state.name.lower(), self._stage_began, now))
            self._stage_began = now
        else:
            self._stage_began = 0

    # One function for each state

    async def _admit(self) -> None:
        request, is_replay = self._request, self._clock.admitted is not None or self._has_queued
        max_rows = 1 + max((self._params.limit(name) for name in self._to.drafters), default=0)
        prompt, ends = request.prompt_ids, self.protocol.chunk_ends
        saved = self._origin.file if self._origin is not None and not is_replay else None
        num_tokens = len(prompt) + request.max_tokens
        encoded = Encoded(prompt, request.embeddings)
        admit = Admit(self._flow, encoded, ends, request.cache_salt, num_tokens, max_rows, is_replay, self._was_preempted, saved)
        self._memory_life = self._to.memory.life

        def keep(lease: Lease) -> None:
            self._lease = lease

        keep(lease := await self._to.memory.ask(admit, undo=keep))
        if self._clock.admitted is None:
            self._clock.admitted = anyio.current_time()
            self._num_cached = min(lease.num_cached, len(prompt))
            waited = self._clock.admitted - self._clock.begun
            counts = request.max_tokens, len(prompt), self._num_cached
            self._started(Started(request.request_id, request.sampling, *counts, waited, request.opens_reasoning))
        if saved is not None:
            self.protocol.restored()
            self._clock.first_token = self._clock.admitted
        else:
            self.protocol.admitted(lease.num_cached)
        if lease.num_cached:
            await self._drafting.resume(self._flow, lease.number)

    async def _prefill(self) -> None:
        protocol, prompt, lease = self.protocol, self._request.prompt_ids, self._held
        position, chunk = protocol.position, protocol.next_chunk()
        end = position + len(chunk)
        is_last, is_kept = end == len(prompt), end in protocol.kept_ends
        verdict = await self._to.target.ask(Prefill(self._flow, lease, position, chunk, self._choosing(len(prompt)), is_last, is_kept))
        self._to.blame.settle()
        await self._drafting.hear()
        self._verdict = verdict
        protocol.chunk_computed(verdict)
        await self._drafting.observe(Observe(self._flow, lease, position, chunk, self._request.cache_salt), is_last)
        if is_last and self._to.keeps_prefixes:
            await self._to.memory.tell(Publish(self._flow, lease, prompt, protocol.chunk_ends, self._request.cache_salt))
        if self._clock.first_token is None:
            self._report(end)
            if is_last:
                self._clock.first_token = anyio.current_time()

    async def _replay(self) -> None:
        assert self._lease is not None
        protocol, lease = self.protocol, self._lease.number
        position, tokens = protocol.position, protocol.next_replay(self._lease.max_rows)
        verify = Verify(self._flow, lease, position, tokens, self._choosing(position + 1), self._is_suspect)
        verdict = await self._computed(verify)
        protocol.replayed(verdict)
        await self._drafting.stands(self._flow, lease, protocol.position)

    async def _propose(self) -> None:
        protocol = self.protocol
        await self._save()
        await self._drafting.hear_next()
        self._flow = Flow(self._request.request_id, self._num_rounds + 1)
        if self._drafting.rests(protocol.position, protocol.last_token):
            self._plan = NOTHING
        else:
            room = min(protocol.draft_limit, self._max_drafts)
            question = Question(self._flow, self._held, protocol.position, protocol.last_token, room, self._choosing())
            self._plan = await self._drafting.propose(question)
        protocol.drafted(self._plan.tokens)

    async def _verify(self) -> None:
        protocol = self.protocol
        position, rows, rates, num_synthetic = protocol.position, protocol.rows, self._params.synth_rates, None
        if rates and self._plan.parts:
            num_synthetic = num_right(len(rows) - 1, rates, self._request.sampling.seed, position)
        ahead = self._drafting.ahead(position, min(protocol.draft_limit - len(rows), self._max_drafts))
        verify = Verify(self._flow, self._held, position, rows, self._choosing(), self._is_suspect, *ahead, num_synthetic)
        verdict = await self._computed(verify)
        protocol.verified(verdict)
        self._num_rounds += 1
        self._verdict, done = verdict, protocol.round
        self._drafting.settle(done.num_drafted, done.num_accepted, done.tokens, verdict)
        self._trace.count("accepted", done.num_accepted, self._flow)

    async def _computed(self, verify: Verify) -> Verdict:
        reply = await self._to.target.post(verify)
        if reply.is_there:  # computed in this task, without a turn for others
            await checkpoint()
        verdict = await reply.wait()
        self._to.blame.settle()
        return verdict

    def _choosing(self, num_before: int | None = None) -> Choosing:
        """How tokens are chosen, the first of them after `num_before` of prompt and answer; after all of them if None."""
        request = self._request
        if not request.sampling.needs_history and self._limits is None:
            return self._plain_choosing
        history = History((*request.prompt_ids, *self.protocol.output)[:num_before], len(request.prompt_ids))
        return Choosing(request.sampling, history, request.num_logprobs, self._limits)

    async def _commit(self) -> None:
        """Hands the round's tokens to the reader, waiting while it is slow, which holds up this sequence alone; then tells the drafters."""
        protocol, done = self.protocol, self.protocol.round
        text = self._writer.take(is_last=protocol.finish_reason is not None)
        self._text.append(text)
        if done.tokens or text:
            source = self._plan.parts[0].drafter if self._plan.parts and done.num_accepted else None
            logprobs = self._verdict.logprobs[: len(done.tokens)]
            self._logprobs += logprobs
            began = self._trace.clock()
            await self._outbox.send(Delta(text, done.tokens, source, logprobs), self._flow)
            self._drafting.waited(self._trace.clock() - began)
        if self._drafting.owes(protocol.position):
            await self._drafting.stands(self._flow, self._held, protocol.position)
        self._clock.last_token = anyio.current_time()
        protocol.committed()

    async def _save(self) -> None:
        """Does what is ordered. An order outlives the loss of memory."""
        while self._saves:
            order = self._saves[0]
            try:
                await self._to.target.ask(Freeze(self._flow, self._held, self.protocol.position))
                record = record_of(self._request, self.protocol.output)
                await self._to.memory.ask(Save(self._flow, self._held, order.path, record))
            except SavedSequenceError as error:
                order.error = error
            except WorkFailed:  # of this order, it may be: once is enough
                self._saves.remove(order)
                order.finish(SavedSequenceError(f"{order.path}: the request could not be saved"))
                raise
            if order in self._saves:  # else nobody waits for it any more
                self._saves.remove(order)
                order.finish(order.error)

    # Memory that is lost or revoked, and given back

    async def _keep_answer(self) -> None:
        """What is computed of a conversation is where its next turn goes on from."""
        # What a file holds may have been computed with other instructions.
        if not self._to.keeps_answers or self._lease is None or self._origin is not None or len(self.protocol.output) < MIN_CHUNK:
            return
        with anyio.CancelScope(shield=True), suppress(ForerunError):  # the answer is there, whatever becomes of its memory
            self._kept = await self._to.target.post(Freeze(self._flow, self._held, self.protocol.position, is_whole=False))
            await self._drafting.complete(self._flow, self._held)

    async def _publish_answer(self) -> None:
        if self._kept is not None:  # asked for together with Forget: the target is waited for once
            tokens = self.protocol.computed()
            with suppress(ForerunError):
                await self._kept.wait()
                await self._to.memory.tell(Publish(self._flow, self._held, tokens, (len(tokens),), self._request.cache_salt))

    @property
    def _is_suspect(self) -> bool:
        """Whether the target died working on this, and has not got beyond since."""
        return self._num_deaths > 0 and len(self.protocol.output) == self._num_tokens_at_death

    @property
    def _max_drafts(self) -> int:
        assert self._lease is not None
        return self._lease.max_rows - 1

    @property
    def _held(self) -> int:
        assert self._lease is not None
        return self._lease.number

    async def _lose_memory(self, error: ForerunError) -> None:
        """Back to waiting for memory. RequestFailed when the target has died of this request again and again."""
        if not self.protocol.holds_lease:
            self._has_queued = True  # and must not lose its place
            return
        if isinstance(error, WorkFailed):
            self._num_deaths = self._num_deaths + 1 if self._is_suspect else 1
            self._num_tokens_at_death = len(self.protocol.output)
            if self._num_deaths > MAX_FRUITLESS_REPLAYS:
                self._to.blame.convict(self._num_deaths)
                raise RequestFailed("the target failed each time it worked on this request") from error
        self._was_preempted |= isinstance(error, LeaseLost) and self._memory_life == self._to.memory.life
        await self._give_back(is_over=False)
        self.protocol.memory_lost()

    async def _forget(self, is_over: bool) -> None:
        """Nobody may work on memory that is another's: returns when nobody does."""
        await self._drafting.forget(self._flow, self._held, is_over)
        with suppress(ForerunError):
            await self._to.target.ask(Forget(self._flow, self._held, is_over))

    async def _give_back(self, is_over: bool) -> None:
        if self._lease is not None:
            with anyio.CancelScope(shield=True):
                try:
                    await self._forget(is_over)
                except Exception as error:
                    raise InternalBug(f"the lease of {self._request.request_id} cannot be given back") from error
                finally:
                    await self._publish_answer()
                    # Memory that has stopped lends nothing; of a former life's leases it wants to know nothing.
                    with suppress(ForerunError):
                        await self._to.memory.ask(Release(self._flow, self._held))
                    self._lease = None

    # The reader

    def _report(self, num_computed: int) -> None:
        if self._progress is not None:
            try:
                self._progress(num_computed, len(self._request.prompt_ids))
            except Exception:  # the caller's code; it is told no more, and the request goes on
                logger.exception("prefill_progress of %s failed", self._request.request_id)
                self._progress = None

    def result(self) -> Result:
        """What has come out so far; after `run`, all of it."""
        protocol, request = self.protocol, self._request
        return Result(
            request.request_id,
            "".join(self._text),
            tuple(protocol.output),
            protocol.finish_reason or FinishReason.CANCELLED,
            self._writer.matched if self._writer.matched is not None else protocol.matched_stop_id,
            request.sampling,
            Usage(len(request.prompt_ids), len(protocol.output), self._num_cached),
            self._clock.timings(anyio.current_time()),
            Speculation(self._num_rounds, dict(self._drafting.statistics), bool(self._params.synth_rates)),
            tuple(self._logprobs),
        )
