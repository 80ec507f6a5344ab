"""The in-process API: generate, complete, embed, restore. Works the same on trio and asyncio."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import anyio
from anyio.abc import TaskGroup

from ..core.checks import RANGES, check_logit_bias, check_ranges, check_stop, check_stop_ids
from ..core.embeddings import Encoded
from ..core.errors import (
    ActorRestarted,
    DeadlineExceeded,
    EngineClosed,
    EngineDead,
    ForerunError,
    InternalBug,
    InvalidRequest,
    PositionLost,
    RequestFailed,
    SavedSequenceError,
)
from ..core.messages import Encode
from ..core.outbox import Outbox
from ..core.speculation import Speculation
from ..core.trace import Flow, Stage, Subscription, Trace
from ..core.vocabulary import (
    CheckedPrompt,
    FinishReason,
    Grammar,
    Prompt,
    Request,
    Result,
    Timings,
    Usage,
    check_prompt,
    check_request_id,
    check_salt,
    grammar_of,
)
from ..kernels.model.prefix import PrefixStatistics
from .embedding import Embedding
from .grammar import Grammars, TokenLimits
from .model import Model
from .requests import check_encoded, request_in, request_of, sampling_of, stops_of
from .sequence import Origin, Sequence
from .stream import Job, Options, Stream
from .tokenizer import Detokenizer
from .tree import ActorStatistics, EngineParams, SupervisionTree
from .writer import Writer

logger = logging.getLogger("forerun")

#: Requests in a row that may fail of what nobody foresaw before the engine does.
MAX_UNFORESEEN = 8

#: Seconds a saved request's file may take to be read.
FILE_SECONDS = 120.0
#: About what a grammar takes to be made ready: too long for the event loop.
GRAMMAR_SECONDS = 1.0


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


class Engine:
    """A running model. Made by open_engine."""

    def __init__(self, model: Model, params: EngineParams) -> None:
        """Private: use open_engine."""
        self.model = model
        self.speculation = params.speculation
        self._params = params
        self._trace = params.trace or Trace()
        self.tree = SupervisionTree(model, params, self._trace, self._die)
        self._jobs: dict[Job, None] = {}
        self._embeddings: set[Embedding] = set()  # that are open
        self._num_started = 0
        self._reading, self._compiling = anyio.Semaphore(1), anyio.Semaphore(1)
        self._grammars = Grammars(model.vocabulary, model.num_token_ids, model.defaults.stop_ids)
        self._end: ForerunError | None = None
        self._is_draining, self._num_unforeseen = False, 0
        self._idle, self._ended = anyio.Event(), anyio.Event()
        self._group: TaskGroup | None = None
        self._supervision, self._unsupervised = anyio.CancelScope(), anyio.Event()
        self._call_soon = _call_soon()

    # What runs

    def _start(self, group: TaskGroup) -> None:
        self._group = group
        group.start_soon(self._supervise, name="forerun supervisor")

    async def _supervise(self) -> None:
        try:
            with self._supervision:
                await self.tree.supervisor.run()
        except Exception as error:
            self._die("supervisor", error)
        finally:
            # Also when cancelled from outside: nobody may wait for an actor that is gone.
            self._stop(EngineClosed("the engine is closed"))
            self._unsupervised.set()

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
            self.tree.close(why)
            self._trace.end()

    async def _finish(self) -> None:
        prefixes, is_whole = self.tree.pool.prefixes, self._end is None
        self._stop(EngineClosed("the engine is closed"))
        with anyio.CancelScope(shield=True):
            for job in list(self._jobs):
                job.scope.cancel()
                await job.done.wait()
            self._supervision.cancel()  # what actors have is theirs until they have ended
            await self._unsupervised.wait()
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
        violations += check_stop(stops_of(options.get("stop"))) + check_logit_bias(tuple((options.get("logit_bias") or {}).items()))
        violations += check_stop_ids(options.get("stop_ids"))
        if violations:
            raise InvalidRequest(violations)
        return self._begin(check_prompt(prompt, self.model.context), options, grammar_of(options))

    def restore(self, path: str | Path, *, timeout_seconds: float | None = None, request_id: str | None = None) -> Stream:
        """Goes on with a request that `Stream.save` put into a file, under its own options, and with the tokens it would have had. The
        stream has what was not yet delivered then; its result has everything, but log probabilities of what came since alone.

        InvalidRequest, EngineClosed and EngineDead are raised here; SavedSequenceError, if the file is damaged or another model's, by
        the stream, and so are Overloaded and DeadlineExceeded."""
        if violations := check_ranges({"timeout_seconds": timeout_seconds}) + self._check_id(request_id):
            raise InvalidRequest(violations)
        return self._begin([], {"timeout_seconds": timeout_seconds, "request_id": request_id}, saved=Path(path))

    def _begin(self, prompt: CheckedPrompt, options: Options, grammar: Grammar | None = None, saved: Path | None = None) -> Stream:
        self._check_open()
        assert self._group is not None
        request_id, timeout = options.get("request_id") or self._new_id(), options.get("timeout_seconds")
        deadline = math.inf if timeout is None else anyio.current_time() + timeout
        outbox = Outbox(request_id, self._trace, self._params.outbox_capacity, self._params.merged_tokens)
        sampling, scope = sampling_of(options, self.model), anyio.CancelScope(deadline=deadline)
        job = Job(request_id, prompt, options, sampling, outbox, scope, grammar, saved)
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
        checked, name, stop_ids = check_prompt(prompt, self.model.context), request_id or self._new_id(), self.model.defaults.stop_ids

        async def encode() -> Encoded:
            encoded = await self._encode(name, checked)
            check_encoded(encoded, self.model)
            return encoded

        def tell(embedding: Embedding, is_open: bool) -> None:
            if is_open:
                self._check_open()
                if violations := self._check_id(name):
                    raise InvalidRequest(violations)
                self._embeddings.add(embedding)
            else:
                self._embeddings.discard(embedding)
                self._wake_if_idle()

        mailboxes = self.tree.mailboxes["memory manager"], self.tree.mailboxes["target decoder"]
        return Embedding(name, encode, stop_ids, mailboxes, self.tree.pool, timeout_seconds, tell)

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

    async def _run(self, job: Job) -> None:
        is_delivered, began = False, self._trace.clock()
        try:
            with job.scope:
                origin: Origin | None = None
                if job.saved is not None:
                    request, origin = await self._look_into(job.saved, job.request_id)
                else:
                    request = request_of(job, await self._encode(job.request_id, job.prompt), self.model, self.tree.pool.num_positions)
                if self._trace.is_on:
                    self._trace.record(Stage(Flow(job.request_id, 0), "encoding", began, self._trace.clock()))
                limits = await self._limits(request) if request.grammar is not None else None
                writer, progress = Writer(Detokenizer(self.model.vocabulary), request.stop), job.options.get("prefill_progress")
                job.sequence = Sequence(request, self.tree.surroundings, writer, job.outbox, job.saves, origin, progress, job.start, limits)
                await job.sequence.run()
                is_delivered = True
            self._num_unforeseen = 0
        except PositionLost as error:  # our fault, and of no use to the caller
            job.error = RequestFailed("the request's memory was lost")
            job.error.__cause__ = error
        except ForerunError as error:
            job.error = error
        except InternalBug as error:
            self._die(f"sequence of {job.request_id}", error)
        except Exception as error:
            self._num_unforeseen += 1
            if self._num_unforeseen > MAX_UNFORESEEN:
                self._die(f"sequence of {job.request_id}", error)
            logger.exception("request %s failed", job.request_id)
            job.error = RequestFailed("something unexpected came up")
            job.error.__cause__ = error
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

    async def _limits(self, request: Request) -> TokenLimits:
        """What a request's grammar means, one at a time. InvalidRequest if it is none."""
        assert request.grammar is not None
        async with self._compiling:
            work = partial(self._grammars.limits, request.grammar, request.opens_reasoning)
            return await self._params.executor(work, GRAMMAR_SECONDS)

    async def _look_into(self, path: Path, request_id: str) -> tuple[Request, Origin]:
        """The request in a file, which was found to be whole and of this model. One file at a time."""
        async with self._reading:
            try:
                with anyio.fail_after(FILE_SECONDS):
                    return await self._params.executor(partial(request_in, path, request_id, self.model, self.tree.pool.blank), 1.0)
            except ForerunError:
                raise
            except Exception as error:
                raise SavedSequenceError(f"{path}: could not be read: {error!r:.100}") from error

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

    async def _encode(self, request_id: str, prompt: CheckedPrompt) -> Encoded:
        """A tokenizer that dies is asked once more; twice may be this prompt's doing."""
        mailbox, message = self.tree.mailboxes["tokenizer"], Encode(Flow(request_id, 0), prompt)
        try:
            return await mailbox.ask(message)
        except ActorRestarted:
            pass
        try:
            return await mailbox.ask(message)
        except ActorRestarted as error:
            raise RequestFailed("the tokenizer failed twice on this request") from error

    # Observation

    def trace(self) -> Subscription:
        """What happens from now on: `with engine.trace() as events: async for event in events`. Bounded and lossy: what is not read
        in time is counted in `num_missed`."""
        return self._trace.subscribe()

    def statistics(self) -> EngineStatistics:
        """A snapshot of what runs, waits and is in use now."""
        pool, memory = self.tree.pool, self.tree.memory
        num_waiting = memory.num_waiting if memory is not None else 0
        prefixes = pool.prefixes.statistics(len(self._params.folder or ()))
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
            self.tree.statistics(),
        )


def _call_soon() -> Callable[[Callable[[], Any]], Any]:
    """The running loop's thread-safe way to be called."""
    if anyio.get_cancelled_exc_class() is asyncio.CancelledError:
        return asyncio.get_running_loop().call_soon_threadsafe
    import trio

    return trio.lowlevel.current_trio_token().run_sync_soon


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
