"""Puts the actors together, and is the in-process API: open_engine, generate, complete. Works the same on trio and asyncio."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack, cast

import anyio
from anyio.abc import TaskGroup
from anyio.streams.memory import MemoryObjectSendStream

from ..core.actor import Actor
from ..core.channel import MailboxStatistics
from ..core.errors import EngineClosed, EngineDead, ForerunError, InvalidRequest, ModelFileError, PositionLost, RequestFailed
from ..core.messages import Encode
from ..core.vocabulary import (
    RANGES,
    Delta,
    DrafterName,
    FinishReason,
    Prompt,
    Request,
    Result,
    SamplingParams,
    Speculation,
    SpeculationParams,
    Timings,
    Usage,
    check_prompt,
    check_ranges,
    parse_spec_type,
)
from ..kernels.model.config import ModelConfig, load_config, read_json
from ..kernels.model.memory import SequencePool
from ..kernels.model.mtp import MtpHead
from ..kernels.model.trunk import Trunk
from ..kernels.model.weights import ModelWeights, Progress, load_weights
from ..kernels.reference import ReferenceBackend
from .memory_manager import MemoryManager
from .mtp_drafter import MtpDrafter
from .ngram_drafter import NgramDrafter
from .sequence import Neighbours, Sequence
from .stream import DEFAULT_MAX_TOKENS, Job, Options, Stream
from .target_decoder import TargetDecoder
from .tokenizer import Detokenizer, TokenizerActor, Vocabulary

logger = logging.getLogger("forerun")

#: Deltas a reader may be behind before its sequence waits for it.
OUTBOX = 16
SHIPPED = {"demo": Path(__file__).parents[1] / "kernels" / "model" / "demo"}


@dataclass(frozen=True, slots=True)
class Defaults:
    """What a request gets where it says nothing: the model's generation_config.json, else greedy."""

    stop_ids: frozenset[int]
    sampling: dict[str, float]

    @staticmethod
    def load(folder: Path) -> Defaults:
        path = folder / "generation_config.json"
        values = read_json(path) if path.exists() else {}
        config = read_json(folder / "config.json")
        found: list[Any] = [source.get("eos_token_id") for source in (values, config, config.get("text_config") or {})]
        stop: Any = next((each for each in found if each is not None), None)
        stop = cast("list[Any]", [] if stop is None else stop if isinstance(stop, list) else [stop])
        if not all(type(token) is int for token in stop):
            raise ModelFileError(f"{path}: eos_token_id: expected token ids, got {stop!r}")
        sampling: dict[str, float] = {"temperature": 0.0}
        if values.get("do_sample") is True:
            sampling = {"temperature": 1.0} | {k: v for k in ("temperature", "top_k", "top_p", "min_p") if (v := values.get(k)) is not None}
        if violations := check_ranges(sampling):
            raise ModelFileError(f"{path}: {violations[0][0]}: {violations[0][1]}")
        return Defaults(frozenset[int](stop), sampling)


@dataclass(frozen=True, slots=True)
class Model:
    """A loaded model: weights, vocabulary (None without a tokenizer.json) and defaults."""

    folder: Path
    weights: ModelWeights
    vocabulary: Vocabulary | None
    defaults: Defaults

    @property
    def config(self) -> ModelConfig:
        return self.weights.config


def find_model(name: str) -> Path:
    """The folder of a model: the name of a shipped one, or a path."""
    folder = SHIPPED.get(name) or Path(name)
    if not folder.is_dir():
        raise ModelFileError(f"{name}: no such model; expected {', '.join(SHIPPED)} or a Hugging Face folder")
    return folder


def load_model(name: str, progress: Progress | None = None) -> Model:
    """Loads a model. ModelFileError names the file and what was expected."""
    folder = find_model(name)
    weights = load_weights(folder, load_config(folder), ReferenceBackend(), progress)
    vocabulary = Vocabulary(folder) if (folder / "tokenizer.json").exists() else None
    return Model(folder, weights, vocabulary, Defaults.load(folder))


@dataclass(frozen=True, slots=True)
class EngineStatistics:
    """A snapshot. Everything but the mailboxes' totals is zero when nothing runs."""

    num_requests_running: int
    num_requests_waiting: int  # for a slot
    num_slots_used: int
    num_slots: int
    mailboxes: dict[str, MailboxStatistics]


class Engine:
    """A running model. Made by open_engine."""

    def __init__(self, model: Model, speculation: SpeculationParams, num_slots: int, queue_size: int) -> None:
        """Private: use open_engine."""
        self.model = model
        self.speculation = speculation
        self._pool = SequencePool(model.config, num_slots)
        self._memory = MemoryManager(self._pool, queue_size)
        self._tokenizer = TokenizerActor(model.vocabulary)
        trunk = Trunk(model.weights, ReferenceBackend())
        target = TargetDecoder(trunk, self._pool)
        drafters: dict[DrafterName, Actor] = {}
        for name in speculation.types:
            if name == "draft-mtp":
                drafters[name] = MtpDrafter(MtpHead(model.weights, ReferenceBackend()), self._pool)
            else:
                drafters[name] = NgramDrafter(speculation.ngram_size_n)
        self._actors: list[Actor] = [self._tokenizer, self._memory, target, *drafters.values()]
        self._neighbours = Neighbours(self._memory.mailbox, target.mailbox, {name: a.mailbox for name, a in drafters.items()})
        self._jobs: set[Job] = set()
        self._num_started = 0
        self._end: ForerunError | None = None
        self._group: TaskGroup | None = None
        self._call_soon = _call_soon()

    # Life

    def _start(self, group: TaskGroup) -> None:
        self._group = group
        for actor in self._actors:
            group.start_soon(self._run_actor, actor, name=f"forerun {actor.name}")

    async def _run_actor(self, actor: Actor) -> None:
        try:
            await actor.run()
        except Exception as error:
            self._die(actor.name, error)
        finally:
            # Also when cancelled from outside: nobody may wait for an actor that is gone.
            self._stop(EngineClosed("the engine is closed"))

    def _die(self, who: str, error: Exception) -> None:
        """A bug of ours in `who`: told to everybody, and raised by open_engine at its end."""
        dead = EngineDead(f"the {who} failed")
        dead.__cause__ = error
        logger.error("the %s failed", who, exc_info=error)
        self._stop(dead)

    def _stop(self, why: ForerunError) -> None:
        """Ends every request with `why` and refuses new ones. The first reason stays."""
        if self._end is None:
            self._end = why
            for actor in self._actors:
                actor.mailbox.close(why)

    async def _finish(self) -> None:
        self._stop(EngineClosed("the engine is closed"))
        with anyio.CancelScope(shield=True):
            for job in list(self._jobs):
                job.scope.cancel()
                await job.done.wait()

    # Requests

    def generate(self, prompt: Prompt, **options: Unpack[Options]) -> Stream:
        """Starts a request and returns its stream. The prompt is text, token ids, or a list of chat messages.

        InvalidRequest (every violation listed) and EngineClosed or EngineDead are raised here; everything that needs the
        prompt's tokens, and Overloaded, by the stream."""
        if unknown := options.keys() - Options.__annotations__.keys():
            raise TypeError(f"generate() got an unexpected keyword argument {min(unknown)!r}")
        numbers = {name: value for name, value in options.items() if name in RANGES}
        if violations := check_ranges(cast("dict[str, float | int | None]", numbers)):
            raise InvalidRequest(violations)
        prompt = check_prompt(prompt)
        if self._end is not None:
            raise self._end.with_traceback(None)
        assert self._group is not None
        self._num_started += 1
        job = Job(f"request-{self._num_started}", prompt, options, self._sampling(options), anyio.CancelScope())
        send, receive = anyio.create_memory_object_stream[Delta](OUTBOX)
        self._jobs.add(job)
        self._group.start_soon(self._run, job, send)
        return Stream(job, receive, self._call_soon)

    async def complete(self, prompt: Prompt, **options: Unpack[Options]) -> Result:
        """`generate`, read to its end. Cancelled: the request is cancelled too."""
        async with self.generate(prompt, **options) as stream:
            async for _ in stream:
                pass
        return stream.result

    def _sampling(self, options: Options) -> SamplingParams:
        chosen: dict[str, Any] = {**self.model.defaults.sampling, "seed": secrets.randbits(63)}
        for name in ("temperature", "top_k", "top_p", "min_p", "seed"):
            if options.get(name) is not None:
                chosen[name] = options.get(name)
        return SamplingParams(**chosen)

    async def _run(self, job: Job, send: MemoryObjectSendStream[Delta]) -> None:
        sequence: Sequence | None = None
        is_delivered = False
        try:
            with job.scope, send:
                ids = await self._tokenizer.mailbox.ask(Encode(job.prompt))
                sequence = Sequence(
                    self._request(job, ids),
                    self._neighbours,
                    self.speculation,
                    Detokenizer(self.model.vocabulary),
                    send,
                    job.options.get("prefill_progress"),
                )
                await sequence.run()
                is_delivered = True
        except (anyio.BrokenResourceError, anyio.ClosedResourceError):
            pass  # the reader has gone: a normal end
        except PositionLost as error:  # our fault, and of no use to the caller
            job.error = RequestFailed("the request's memory was lost")
            job.error.__cause__ = error
        except ForerunError as error:
            job.error = error
        except Exception as error:
            self._die(f"sequence of {job.request_id}", error)
        finally:
            if sequence is not None:
                job.result = sequence.result()
            else:
                nothing = Usage(0, 0), Timings(0, 0, 0), Speculation()
                job.result = Result(job.request_id, "", (), FinishReason.CANCELLED, job.sampling, *nothing)
            if job.error is None and not is_delivered:
                job.error = self._end  # None when only this request was cancelled
            self._jobs.discard(job)
            job.done.set()

    def _request(self, job: Job, ids: tuple[int, ...]) -> Request:
        max_tokens, context = job.options.get("max_tokens"), self.model.config.context
        room = context - len(ids)
        vocabulary = self.model.config.vocabulary
        if not ids:
            raise InvalidRequest([("prompt", "must not be empty")])
        if bad := [token for token in ids if not 0 <= token < vocabulary]:
            raise InvalidRequest([("prompt", f"token id {bad[0]} is not below the vocabulary's {vocabulary}")])
        if room < 1:
            raise InvalidRequest([("prompt", f"{len(ids)} tokens leave no room in a context of {context}")])
        if max_tokens is not None and max_tokens > room:
            raise InvalidRequest([("max_tokens", f"{max_tokens} after a prompt of {len(ids)} exceed the context of {context}")])
        stop_ids = frozenset[int]() if job.options.get("ignore_eos") else self.model.defaults.stop_ids
        return Request(job.request_id, ids, max_tokens or min(room, DEFAULT_MAX_TOKENS), job.sampling, stop_ids)

    # Observation

    def statistics(self) -> EngineStatistics:
        """A snapshot of what runs, waits and is in use now."""
        used = self._pool.num_slots - self._pool.num_free
        return EngineStatistics(
            num_requests_running=len(self._jobs) - self._memory.num_waiting,
            num_requests_waiting=self._memory.num_waiting,
            num_slots_used=used,
            num_slots=self._pool.num_slots,
            mailboxes={actor.name: actor.mailbox.statistics() for actor in self._actors},
        )


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
    draft_n_max: int = 3,
    ngram_size_n: int = 12,
    ngram_size_m: int = 48,
    num_slots: int = 8,
    queue_size: int = 256,
    load_progress: Progress | None = None,
) -> AsyncGenerator[Engine]:
    """A running engine for a shipped model's name, a Hugging Face folder, or a model already loaded.

    `spec_type` is `none` or a comma list of `draft-mtp` and `ngram-simple`; by default all that the model can do.
    `num_slots` requests run at once, `queue_size` more wait. Leaving the block ends what still runs with EngineClosed.
    Raises ModelFileError, InvalidRequest; at the end, EngineDead if an actor failed and the block did not raise."""
    sizes: dict[str, object] = {"num_slots": num_slots, "queue_size": queue_size}
    if violations := check_ranges(sizes) or [(name, "must be given") for name, size in sizes.items() if size is None]:
        raise InvalidRequest(violations)
    types = None if spec_type is None else parse_spec_type(spec_type)
    if isinstance(model, str | Path):
        name = str(model)
        model = await anyio.to_thread.run_sync(lambda: load_model(name, load_progress))
    if types is None:
        types = parse_spec_type("draft-mtp,ngram-simple" if model.weights.mtp is not None else "ngram-simple")
    if "draft-mtp" in types and model.weights.mtp is None:
        raise InvalidRequest([("spec_type", f"{model.folder} has no MTP head")])
    engine = Engine(model, SpeculationParams(types, draft_n_max, ngram_size_n, ngram_size_m), num_slots, queue_size)
    problem: BaseException | None = None
    async with anyio.create_task_group() as group:
        engine._start(group)  # pyright: ignore[reportPrivateUsage] - open_engine is Engine's constructor
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
