"""Puts the actors together under their supervisor, and is the in-process API: open_engine, generate, complete.
Works the same on trio and asyncio."""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import anyio
from anyio.abc import TaskGroup

from ..core.actor import Actor, Executor, InPlace, Threads
from ..core.channel import Mailbox, MailboxStatistics
from ..core.checks import RANGES, check_logit_bias, check_ranges, check_stop
from ..core.embeddings import Encoded
from ..core.errors import (
    ActorRestarted,
    DeadlineExceeded,
    EngineClosed,
    EngineDead,
    ForerunError,
    InvalidRequest,
    PositionLost,
    RequestFailed,
    SavedSequenceError,
)
from ..core.messages import Encode
from ..core.outbox import CAPACITY, MERGED_TOKENS, Outbox
from ..core.speculation import DrafterName, Speculation, SpeculationOptions, SpeculationParams, parse_spec_type
from ..core.supervisor import ChildSpec, Group, Supervisor, WhenExhausted
from ..core.trace import Flow, Stage, Subscription, Trace
from ..core.vocabulary import (
    FinishReason,
    Prompt,
    Request,
    Result,
    SamplingParams,
    SavedFile,
    Timings,
    Usage,
    check_prompt,
    check_request_id,
    check_salt,
)
from ..kernels.model import saved
from ..kernels.model.inputs import violations_of
from ..kernels.model.memory import MemoryParams, SequencePool
from ..kernels.model.memory import num_pages as pages_of
from ..kernels.model.prefix import PrefixStatistics
from ..kernels.model.recurrent import STORES, StoreName
from ..kernels.model.saved import PrefixFolder
from ..kernels.model.weights import Progress
from .embedding import Embedding
from .experience import Experience
from .lookup.family import CountsFamily, family
from .memory_manager import MemoryManager
from .model import Model, load_model
from .mtp_drafter import HeadDrafts, MtpDrafter
from .ngram_drafter import NgramDrafter
from .sequence import Origin, Sequence, Surroundings
from .stream import DEFAULT_MAX_TOKENS, Job, Options, Stream
from .target_decoder import TargetDecoder
from .tokenizer import Detokenizer, TokenizerActor
from .writer import Writer

logger = logging.getLogger("forerun")

#: More than every sequence of a full engine can have outstanding at one actor (at most 1024 slots, two messages each). The tokenizer
#: hears from those who will queue for memory as well.
MAILBOX = 2048
#: Positions that each slot has pages for by default, when the context is longer.
PAGED_CONTEXT = 8192
#: Tokens that the prompts of those who wait may have by default.
QUEUE_TOKENS = 4_000_000
#: Bytes of checkpoints kept by default.
PREFIX_BYTES = 256 * 2**20
#: Bytes of checkpoints kept in files by default, where a folder is given.
FOLDER_BYTES = 8 * 2**30
#: Seconds a request waits for memory before others are pre-empted for it, by default.
PREEMPT_AFTER_SECONDS = 20.0
#: Seconds a saved request's file may take to be read.
FILE_SECONDS = 120.0
#: Restarts a group is allowed, and within how many seconds. More than a sequence's MAX_FRUITLESS_REPLAYS, so that a request
#: which kills the target whenever it is worked on is found out before the engine gives up.
RESTARTS, PERIOD_SECONDS = 5, 60.0


@dataclass(frozen=True, slots=True)
class ActorStatistics:
    """One actor: its mailbox, how often it was restarted, whether it was switched off for failing too often."""

    mailbox: MailboxStatistics
    num_restarts: int
    is_switched_off: bool


@dataclass(frozen=True, slots=True)
class EngineStatistics:
    """A snapshot. Nothing runs, waits or is used when no request is there, but for the pages of `prefixes`."""

    num_requests_running: int
    num_requests_waiting: int  # for memory
    num_preemptions: int
    num_slots_used: int
    num_slots: int
    num_pages_used: int
    num_pages: int
    prefixes: PrefixStatistics
    actors: dict[str, ActorStatistics]


@dataclass(frozen=True, slots=True)
class EngineParams:
    """What open_engine was given; what it sets no value for is how simulations get in. `instrument` sees every actor as it is made."""

    speculation: SpeculationParams
    memory: MemoryParams
    queue_size: int
    overlap: bool
    preempt_after_seconds: float = math.inf
    queue_tokens: float = math.inf
    folder: PrefixFolder | None = None
    executor: Executor = field(default_factory=Threads)
    instrument: Callable[[Actor], None] = lambda actor: None
    trace: Trace | None = None
    mailbox_capacity: int = MAILBOX
    outbox_capacity: int = CAPACITY
    merged_tokens: int = MERGED_TOKENS


class Engine:
    """A running model. Made by open_engine."""

    def __init__(self, model: Model, params: EngineParams) -> None:
        """Private: use open_engine."""
        self.model = model
        self.speculation = params.speculation
        self._params = params
        self._trace = params.trace or Trace()
        self._pool = SequencePool(model.memory(), params.memory)
        self._memory: MemoryManager | None = None  # in its present life
        self._jobs: dict[Job, None] = {}
        self._embeddings: set[Embedding] = set()  # that are open
        self._num_started = 0
        self._reading = anyio.Semaphore(1)
        self._end: ForerunError | None = None
        self._is_draining = False
        self._idle, self._ended = anyio.Event(), anyio.Event()
        self._group: TaskGroup | None = None
        self._call_soon = _call_soon()
        self._mailboxes: dict[str, Mailbox] = {}
        groups = self._groups()
        self.supervisor = Supervisor(groups, self._trace, self._die)

    # What runs

    def _groups(self) -> list[Group]:
        """The supervision tree. Target and memory live and die together: what one knows of memory is worth nothing without the other."""
        model, params, pool, trace = self.model, self._params, self._pool, self._trace

        def child(name: str, make: Callable[[Mailbox], Actor]) -> ChildSpec:
            capacity = params.mailbox_capacity + (params.queue_size if name == "tokenizer" else 0)
            mailbox = self._mailboxes[name] = Mailbox(name, capacity, trace)

            def begin() -> Actor:
                actor = make(mailbox)
                params.instrument(actor)
                return actor

            return ChildSpec(mailbox, begin)

        executor = params.executor if params.overlap else InPlace()

        def memory_manager(mailbox: Mailbox) -> Actor:
            limits = params.queue_size, params.queue_tokens, params.preempt_after_seconds
            self._memory = MemoryManager(mailbox, executor, pool, model.fingerprint, params.folder, *limits, trace)
            return self._memory

        tokenizer = child("tokenizer", lambda mailbox: TokenizerActor(mailbox, executor, model.vocabulary))
        memory = child("memory manager", memory_manager)
        speculation = params.speculation
        types = speculation.types

        def target_decoder(mailbox: Mailbox) -> Actor:
            # Each life has graphs of its own: work that was left behind may still run in the former one's.
            drafts = HeadDrafts(model.draft_head(), speculation) if "draft-mtp" in types else None
            return TargetDecoder(mailbox, executor, model.target(), pool, trace, drafts)

        target = child("target decoder", target_decoder)
        drafters: dict[DrafterName, ChildSpec] = {}
        for name in types:
            if name == "draft-mtp":
                drafters[name] = child("MTP drafter", lambda mailbox: MtpDrafter(mailbox, executor, model.draft_head(), pool, speculation))
            else:
                make = partial(family, name, speculation, model.num_token_ids)
                drafters[name] = child(f"{name} drafter", lambda mailbox, make=make: NgramDrafter(mailbox, executor, make()))
        mailboxes: dict[DrafterName, Mailbox] = {name: spec.mailbox for name, spec in drafters.items()}
        keeps_prefixes = params.memory.prefix_bytes > 0
        self._surroundings = Surroundings(
            memory.mailbox, target.mailbox, mailboxes, speculation, Experience(), params.overlap, keeps_prefixes, pool.max_together, trace
        )
        limits = RESTARTS, PERIOD_SECONDS
        return [
            Group((tokenizer,), *limits, WhenExhausted.ESCALATE),
            Group((memory, target), *limits, WhenExhausted.ESCALATE, reset=pool.reset),
            *(Group((drafter,), *limits, WhenExhausted.SWITCH_OFF) for drafter in drafters.values()),
        ]

    def _start(self, group: TaskGroup) -> None:
        self._group = group
        group.start_soon(self._supervise, name="forerun supervisor")

    async def _supervise(self) -> None:
        try:
            await self.supervisor.run()
        except Exception as error:
            self._die("supervisor", error)
        finally:
            # Also when cancelled from outside: nobody may wait for an actor that is gone.
            self._stop(EngineClosed("the engine is closed"))

    def _die(self, who: str, error: Exception) -> None:
        """What cannot be put right in `who`: told to everybody, and raised by open_engine at its end."""
        dead = EngineDead(f"the {who} failed")
        dead.__cause__ = error
        logger.error("the %s failed, and the engine with it", who, exc_info=error)
        self._stop(dead)

    def _stop(self, why: ForerunError) -> None:
        """Ends every request with `why` and refuses new ones. The first reason stays."""
        if self._end is None:
            self._end = why
            self._ended.set()
            for mailbox in self._mailboxes.values():
                mailbox.close(why)
            self._pool.reset()
            self._trace.end()

    async def _finish(self) -> None:
        prefixes, is_whole = self._pool.prefixes, self._end is None
        self._stop(EngineClosed("the engine is closed"))
        with anyio.CancelScope(shield=True):
            for job in list(self._jobs):
                job.scope.cancel()
                await job.done.wait()
            folder = self._params.folder
            if folder is not None and is_whole:
                await anyio.to_thread.run_sync(lambda: folder.store_all(prefixes))

    # Requests

    def generate(self, prompt: Prompt, **options: Unpack[Options]) -> Stream:
        """Starts a request and returns its stream. The prompt is text, token ids, or a list of chat messages.

        InvalidRequest (every violation listed) and EngineClosed or EngineDead are raised here; everything that needs the
        prompt's tokens, Overloaded and DeadlineExceeded, by the stream."""
        if unknown := options.keys() - Options.__annotations__.keys():
            raise TypeError(f"generate() got an unexpected keyword argument {min(unknown)!r}")
        numbers = {name: value for name, value in options.items() if name in RANGES}
        violations = check_ranges(numbers) + check_salt(options.get("cache_salt")) + self._check_id(options.get("request_id"))
        violations += check_stop(_stops(options.get("stop"))) + check_logit_bias(tuple((options.get("logit_bias") or {}).items()))
        if violations:
            raise InvalidRequest(violations)
        return self._begin(check_prompt(prompt, self.model.context), options, None)

    def restore(self, path: str | Path, *, timeout_seconds: float | None = None, request_id: str | None = None) -> Stream:
        """Goes on with a request that `Stream.save` put into a file, under its own options, and with the tokens it would have had. The
        stream has what was not yet delivered then; its result has everything.

        InvalidRequest, EngineClosed and EngineDead are raised here; SavedSequenceError, if the file is damaged or another model's, by
        the stream, and so are Overloaded and DeadlineExceeded."""
        if violations := check_ranges({"timeout_seconds": timeout_seconds}) + self._check_id(request_id):
            raise InvalidRequest(violations)
        return self._begin([], {"timeout_seconds": timeout_seconds, "request_id": request_id}, Path(path))

    def _begin(self, prompt: Prompt, options: Options, saved: Path | None) -> Stream:
        self._check_open()
        assert self._group is not None
        request_id, timeout = options.get("request_id") or self._new_id(), options.get("timeout_seconds")
        deadline = math.inf if timeout is None else anyio.current_time() + timeout
        outbox = Outbox(request_id, self._trace, self._params.outbox_capacity, self._params.merged_tokens)
        job = Job(request_id, prompt, options, self._sampling(options), outbox, anyio.CancelScope(deadline=deadline), saved)
        self._jobs[job] = None
        self._group.start_soon(self._run, job, name=f"forerun {request_id}")
        return Stream(job, self._call_soon)

    def _check_open(self) -> None:
        if self._end is not None:
            raise self._end.with_traceback(None)
        if self._is_draining:
            raise EngineClosed("the engine is draining: what runs is finished, nothing new begins")

    def _wake_if_idle(self) -> None:
        if not self._jobs and not self._embeddings:
            self._idle.set()

    def _new_id(self) -> str:
        self._num_started += 1
        name = f"request-{self._num_started}"
        return name if not self._check_id(name) else self._new_id()

    def _check_id(self, request_id: object) -> list[tuple[str, str]]:
        if any(each.request_id == request_id for each in (*self._jobs, *self._embeddings)):
            return [("request_id", "is another's that runs")]
        return check_request_id(request_id)

    async def complete(self, prompt: Prompt, **options: Unpack[Options]) -> Result:
        """`generate`, read to its end. Cancelled: the request is cancelled too."""
        async with self.generate(prompt, **options) as stream:
            async for _ in stream:
                pass
        return stream.result

    def embed(self, prompt: Prompt, *, timeout_seconds: float | None = None, request_id: str | None = None) -> Embedding:
        """The hidden rows of a prompt, after the trunk's last norm, for `async with`: see Embedding. Raises as `generate` does."""
        if violations := check_ranges({"timeout_seconds": timeout_seconds}) + self._check_id(request_id):
            raise InvalidRequest(violations)
        self._check_open()
        prompt, name, stop_ids = check_prompt(prompt, self.model.context), request_id or self._new_id(), self.model.defaults.stop_ids

        async def encode() -> Encoded:
            encoded = await self._encode(name, prompt)
            self._check_encoded(encoded)
            return encoded

        def tell(embedding: Embedding, is_open: bool) -> None:
            if is_open:
                self._check_open()
                self._embeddings.add(embedding)
            else:
                self._embeddings.discard(embedding)
                self._wake_if_idle()

        mailboxes = self._mailboxes["memory manager"], self._mailboxes["target decoder"]
        return Embedding(name, encode, stop_ids, mailboxes, self._pool, timeout_seconds, tell)

    async def drain(self) -> None:
        """Refuses new requests with EngineClosed from now on, and waits until those that run have ended. Cancelled: goes on refusing."""
        self._is_draining = True
        while self._jobs or self._embeddings:
            if self._idle.is_set():
                self._idle = anyio.Event()
            await self._idle.wait()

    async def ended(self) -> None:
        """Waits until the engine is closed or dead; leaving its block raises EngineDead if it is. Cancelled: nothing is left behind."""
        await self._ended.wait()

    def _sampling(self, options: Options) -> SamplingParams:
        chosen: dict[str, Any] = {**self.model.defaults.sampling, "seed": secrets.randbits(63)}
        given = options | {"logit_bias": tuple((options.get("logit_bias") or {}).items())}
        chosen |= {name: given[name] for name in SamplingParams.__slots__ if given.get(name) is not None}
        return SamplingParams(**chosen)

    async def _run(self, job: Job) -> None:
        is_delivered, began = False, self._trace.clock()
        try:
            with job.scope:
                origin: Origin | None = None
                if job.saved is not None:
                    request, origin = await self._look_into(job.saved, job.request_id)
                else:
                    request = self._request(job, await self._encode(job.request_id, job.prompt))
                if self._trace.is_on:
                    self._trace.record(Stage(Flow(job.request_id, 0), "encoding", began, self._trace.clock()))
                writer, progress = Writer(Detokenizer(self.model.vocabulary), request.stop), job.options.get("prefill_progress")
                job.sequence = Sequence(request, self._surroundings, writer, job.outbox, job.saves, origin, progress, job.start)
                await job.sequence.run()
                is_delivered = True
        except PositionLost as error:  # our fault, and of no use to the caller
            job.error = RequestFailed("the request's memory was lost")
            job.error.__cause__ = error
        except ForerunError as error:
            job.error = error
        except Exception as error:
            self._die(f"sequence of {job.request_id}", error)
        finally:
            if job.sequence is not None:
                job.result = job.sequence.result()
            else:
                nothing = Usage(0, 0), Timings(0, 0, 0), Speculation()
                job.result = Result(job.request_id, "", (), FinishReason.CANCELLED, None, job.sampling, *nothing)
            if job.error is None and not is_delivered:
                job.error = self._end or self._why_cancelled(job)
            job.outbox.end()
            job.has_started.set()
            for order in job.saves:
                order.finish(SavedSequenceError("the request ended before it could be saved"))
            del self._jobs[job]
            self._wake_if_idle()
            job.done.set()

    def _why_cancelled(self, job: Job) -> ForerunError | None:
        """None when it was the reader's wish."""
        if job.is_left:
            return None
        if anyio.current_time() >= job.scope.deadline:
            return DeadlineExceeded(f"not finished after {job.options.get('timeout_seconds')} s")
        return EngineClosed("the engine is closed")

    async def _look_into(self, path: Path, request_id: str) -> tuple[Request, Origin]:
        """The request in a file, which was found to be whole and of this model. One file at a time."""
        fingerprint, blank, num_ids, context = self.model.fingerprint, self._pool.blank, self.model.num_token_ids, self.model.context

        def work() -> tuple[Request, tuple[int, ...], str]:
            position, record, checksum, rows = saved.check(path, fingerprint, blank)
            request, output = saved.parse_record(record, rows, request_id, num_ids, context)
            if position != len(request.prompt_ids) + len(output) - 1:
                raise SavedSequenceError(f"{path}: its request does not fit its position {position}")
            return request, output, checksum

        async with self._reading:
            try:
                with anyio.fail_after(FILE_SECONDS):
                    request, output, checksum = await self._params.executor(work, 1.0)
            except ForerunError:
                raise
            except Exception as error:
                raise SavedSequenceError(f"{path}: could not be read: {error!r:.100}") from error
        return request, Origin(SavedFile(path, checksum), output)

    async def tokenize(self, prompt: Prompt) -> tuple[int, ...]:
        """The ids that `generate` takes a prompt for, below 0 for embedding rows. InvalidRequest if it cannot be a prompt; RequestFailed,
        EngineClosed, EngineDead. Cancelled: nothing is left behind."""
        return (await self._encode("tokenize", check_prompt(prompt, self.model.context))).ids

    async def detokenize(self, token_ids: list[int]) -> str:
        """The text of at most as many ids as the context has positions; special tokens have none, and bytes that are no text become
        U+FFFD. InvalidRequest when there are more, an id is not in the vocabulary, or the model has no tokenizer. Cancelled: the work is
        finished all the same."""
        vocabulary = self.model.vocabulary
        if vocabulary is None:
            raise InvalidRequest([("ids", "this model has no tokenizer")])
        if len(token_ids) > self.model.context:
            raise InvalidRequest([("ids", f"must be at most {self.model.context}")])
        if bad := [token for token in token_ids if not 0 <= token < self.model.num_token_ids]:
            raise InvalidRequest([("ids", f"token id {bad[0]} is not below the vocabulary's {self.model.num_token_ids}")])
        return await anyio.to_thread.run_sync(lambda: Detokenizer(vocabulary).push(tuple(token_ids), is_last=True))

    async def _encode(self, request_id: str, prompt: Prompt) -> Encoded:
        """A tokenizer that dies is asked once more; twice may be this prompt's doing."""
        mailbox, message = self._mailboxes["tokenizer"], Encode(Flow(request_id, 0), prompt)
        try:
            return await mailbox.ask(message)
        except ActorRestarted:
            pass
        try:
            return await mailbox.ask(message)
        except ActorRestarted as error:
            raise RequestFailed("the tokenizer failed twice on this request") from error

    def _request(self, job: Job, prompt: Encoded) -> Request:
        max_tokens, context, ids = job.options.get("max_tokens"), self.model.context, prompt.ids
        room = context - len(ids)
        vocabulary = self.model.num_token_ids
        self._check_encoded(prompt)
        if room < 1:
            raise InvalidRequest([("prompt", f"{len(ids)} tokens leave no room in a context of {context}")])
        if max_tokens is not None and max_tokens > room:
            raise InvalidRequest([("max_tokens", f"{max_tokens} after a prompt of {len(ids)} exceed the context of {context}")])
        more_stop_ids = job.options.get("stop_ids") or []
        if bad := [token for token in more_stop_ids if not 0 <= token < vocabulary]:
            raise InvalidRequest([("stop_ids", f"{bad[0]!r:.50} is not a token id below the vocabulary's {vocabulary}")])
        stops = tuple(_stops(job.options.get("stop")))
        if stops and self.model.vocabulary is None:
            raise InvalidRequest([("stop", "this model has no tokenizer.json, so its answers have no text")])
        stop_ids = (frozenset[int]() if job.options.get("ignore_eos") else self.model.defaults.stop_ids) | frozenset(more_stop_ids)
        boundary_ids = self.model.defaults.stop_ids
        max_tokens = max_tokens or min(room, DEFAULT_MAX_TOKENS)
        salt = job.options.get("cache_salt") or ""
        num_logprobs = job.options.get("num_logprobs")
        rest = boundary_ids, salt, stops, num_logprobs, prompt.embeddings
        return Request(job.request_id, ids, max_tokens, job.sampling, stop_ids, vocabulary, *rest)

    def _check_encoded(self, prompt: Encoded) -> None:
        """What a prompt's tokens and rows must be, whatever is to be done with them."""
        vocabulary, context, ids = self.model.num_token_ids, self.model.context, prompt.ids
        if not ids:
            raise InvalidRequest([("prompt", "must not be empty")])
        if bad := [token for token in prompt.token_ids if not 0 <= token < vocabulary]:
            raise InvalidRequest([("prompt", f"token id {bad[0]} is not below the vocabulary's {vocabulary}")])
        if len(ids) > context:
            raise InvalidRequest([("prompt", f"{len(ids)} tokens exceed the context of {context}")])
        if violations := violations_of(prompt.embeddings, self.model.hidden):
            raise InvalidRequest(violations)

    # Observation

    def trace(self) -> Subscription:
        """What happens from now on: `with engine.trace() as events: async for event in events`. Bounded and lossy: what is not read
        in time is counted in `num_missed`."""
        return self._trace.subscribe()

    def statistics(self) -> EngineStatistics:
        """A snapshot of what runs, waits and is in use now."""
        num_waiting = self._memory.num_waiting if self._memory is not None else 0
        actors = {
            name: ActorStatistics(mailbox.statistics(), self.supervisor.num_restarts[name], name in self.supervisor.switched_off)
            for name, mailbox in self._mailboxes.items()
        }
        pool, prefixes = self._pool, self._pool.prefixes.statistics(len(self._params.folder or ()))
        num_pages_used = pool.num_pages - pool.num_pages_free
        return EngineStatistics(
            len(self._jobs) + len(self._embeddings) - num_waiting,
            num_waiting,
            pool.num_revoked,
            pool.num_used,
            pool.num_slots,
            num_pages_used,
            pool.num_pages,
            prefixes,
            actors,
        )


def _stops(stop: str | list[str] | None) -> list[str]:
    return [] if stop is None else [stop] if isinstance(stop, str) else stop


def _call_soon() -> Callable[[Callable[[], Any]], Any]:
    """The running loop's thread-safe way to be called."""
    if anyio.get_cancelled_exc_class() is asyncio.CancelledError:
        return asyncio.get_running_loop().call_soon_threadsafe
    import trio

    return trio.lowlevel.current_trio_token().run_sync_soon


@asynccontextmanager
async def open_engine(
    model: str | Path | Model = "demo",
    *,
    spec_type: str | None = None,
    num_slots: int = 8,
    num_pages: int | None = None,
    queue_size: int = 256,
    queue_tokens: int = QUEUE_TOKENS,
    prefix_bytes: int = PREFIX_BYTES,
    prefix_folder: str | Path | None = None,
    folder_bytes: int = FOLDER_BYTES,
    recurrent_store: StoreName = "log",
    preempt_after_seconds: float | None = PREEMPT_AFTER_SECONDS,
    overlap: bool = True,
    backend: str | None = None,
    num_threads: int | None = None,
    load_progress: Progress | None = None,
    **speculation: Unpack[SpeculationOptions],
) -> AsyncGenerator[Engine]:
    """A running engine for a shipped model's name, a Hugging Face folder, or a model already loaded.

    `spec_type` is `none` or a comma list of DRAFTERS; by default `ngram-suffix`, and `draft-mtp` if the model has that head. What else
    can be said of speculation: SpeculationParams.
    `num_slots` requests run at once, `queue_size` more wait, with prompts of `queue_tokens` in all. They share `num_pages` pages of 64
    positions, by default as many as all of them need for the context, or for PAGED_CONTEXT positions if that is less. `prefix_bytes` of
    checkpoints let requests go on from what others with the same beginning have computed (and the same `cache_salt`); 0 keeps none. What
    does not fit goes into at most `folder_bytes` of files in `prefix_folder`, if there is one, and so does everything at the end.
    `recurrent_store` is `log`, or `snapshots`: the same tokens, more memory for a draft. For a request that has waited
    `preempt_after_seconds` (None: however long) the newest that have run as long are pre-empted, once each, and go on later with the same
    tokens. `overlap=False` does one thing at a time, in the event loop: the same tokens, for comparison. A model loaded here computes on
    `backend` with `num_threads`: see load_model.
    Leaving the block ends what still runs with EngineClosed.
    Raises ModelFileError, InvalidRequest, SavedSequenceError if `prefix_folder` cannot be used; at the end, EngineDead if an actor
    failed beyond repair and the block did not raise."""
    sizes: dict[str, object] = {
        "num_slots": num_slots, "queue_size": queue_size, "queue_tokens": queue_tokens, "prefix_bytes": prefix_bytes,
        "folder_bytes": folder_bytes,
    }  # fmt: skip
    if violations := check_ranges(sizes | {"num_pages": num_pages, "preempt_after_seconds": preempt_after_seconds}) or [
        (name, "must be given") for name in sizes if sizes[name] is None
    ]:
        raise InvalidRequest(violations)
    if recurrent_store not in STORES:
        raise InvalidRequest([("recurrent_store", f"must be one of {', '.join(STORES)}, got {recurrent_store!r:.50}")])
    types = None if spec_type is None else parse_spec_type(spec_type)
    if unknown := speculation.keys() - SpeculationOptions.__annotations__.keys():
        raise TypeError(f"open_engine() got an unexpected keyword argument {min(unknown)!r}")
    params = SpeculationParams(**speculation)  # pyright: ignore[reportArgumentType] - checked there
    if isinstance(model, str | Path):
        name = str(model)
        model = await anyio.to_thread.run_sync(lambda: load_model(name, load_progress, backend=backend, num_threads=num_threads))
    if types is None:
        types = parse_spec_type("draft-mtp,ngram-suffix" if model.has_mtp else "ngram-suffix")
    if "draft-mtp" in types and not model.has_mtp:
        raise InvalidRequest([("spec_type", f"{model.name} has no MTP head")])
    if "ngram-cache" in types:  # ModelFileError now, rather than in an actor
        await anyio.to_thread.run_sync(CountsFamily, params, model.num_token_ids)
    if num_pages is None:
        max_rows = 1 + max(map(params.limit, types), default=0)
        num_pages = num_slots * pages_of(min(model.context, PAGED_CONTEXT), max_rows)
    memory = MemoryParams(num_slots, num_pages, prefix_bytes, recurrent_store, is_archived=prefix_folder is not None)
    folder: PrefixFolder | None = None
    if prefix_folder is not None:
        folder = await anyio.to_thread.run_sync(PrefixFolder, Path(prefix_folder), model.fingerprint, folder_bytes)
    patience = math.inf if preempt_after_seconds is None else preempt_after_seconds
    every = EngineParams(replace(params, types=types), memory, queue_size, overlap, patience, queue_tokens, folder)
    async with run_engine(model, every) as engine:
        yield engine


def run_engine(model: Model, params: EngineParams) -> AbstractAsyncContextManager[Engine]:
    """open_engine without its checks: for those who bring their own parts."""
    return _running(Engine(model, params))


@asynccontextmanager
async def _running(engine: Engine) -> AsyncGenerator[Engine]:
    problem: BaseException | None = None
    async with anyio.create_task_group() as group:
        engine._start(group)  # pyright: ignore[reportPrivateUsage] - this is Engine's other half
        try:
            yield engine
        except anyio.get_cancelled_exc_class():
            raise
        except BaseException as error:  # carried out of the task group by hand, which would wrap it
            problem = error
        finally:
            await engine._finish()  # pyright: ignore[reportPrivateUsage]
            group.cancel_scope.cancel()
    if problem is not None:
        raise problem
    if isinstance(engine._end, EngineDead):  # pyright: ignore[reportPrivateUsage]
        raise engine._end  # pyright: ignore[reportPrivateUsage]
