"""The services of forerun.v1. Each method takes its request and a Call, runs where the engine lives, and raises our errors; rpc.py makes
gRPC handlers of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import anyio
from forerun.v1 import admin_service_pb2, generation_service_pb2, model_service_pb2, trace_service_pb2

from ...core.errors import InvalidRequest, SavedSequenceError
from ...core.trace import Event, Span, is_about
from ...core.vocabulary import Delta, Result, Started
from . import wire
from .served import Places, Served
from .statuses import NoState

#: Calls of Watch at once: each costs the engine's loop something for every event.
MAX_WATCHERS = 16
#: Seconds events are gathered for before they are sent: many small messages cost more than few.
WATCH_SECONDS = 0.05
#: How often it is looked whether a draining server has nothing left to watch.
DRAIN_LOOK_SECONDS = 0.5
STATE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}")


class Call(Protocol):
    """One call, as a service sees it."""

    owner: str  # who calls: the token, or nobody's name
    traceparent: str  # of the caller's trace, if it names one

    @property
    def time_left(self) -> float | None:
        """Seconds until the caller's deadline."""
        ...

    async def write(self, message: Any) -> None:
        """Sends one message of a stream; Stalled if it is not read for too long. Cancelled: it may have been sent."""
        ...


class Answer:
    """Reads an answer for a call: each piece is one `response` message."""

    def __init__(self, call: Call, model_name: str, response: Callable[..., Any]) -> None:
        self.owner, self.traceparent = call.owner, call.traceparent
        self._call, self._model_name, self._response = call, model_name, response

    async def started(self, started: Started) -> None:
        await self._call.write(self._response(started=wire.started_message(started, self._model_name)))

    async def delta(self, delta: Delta) -> None:
        await self._call.write(self._response(delta=wire.delta_message(delta)))

    async def finished(self, result: Result) -> None:
        await self._call.write(self._response(finished=wire.finished_message(result)))


class GenerationService:
    descriptor = generation_service_pb2.DESCRIPTOR.services_by_name["GenerationService"]

    def __init__(self, served: Served) -> None:
        self._served = served

    async def generate(self, request: generation_service_pb2.GenerateRequest, call: Call) -> None:
        engine, options = self._served.begin(), wire.options_of(request)
        options["request_id"], options["timeout_seconds"] = self._served.new_id(), call.time_left
        stream = engine.generate(self._served.told(wire.prompt_of(request.prompt)), **options)
        await self._served.relay(stream, Answer(call, self._served.model_name, generation_service_pb2.GenerateResponse))

    async def abort(self, request: generation_service_pb2.AbortRequest, call: Call) -> generation_service_pb2.AbortResponse:
        self._served.find(request.request_id, call.owner).cancel()
        return generation_service_pb2.AbortResponse()

    async def tokenize(self, request: generation_service_pb2.TokenizeRequest, call: Call) -> generation_service_pb2.TokenizeResponse:
        ids = await self._served.begin().tokenize(self._served.told(wire.prompt_of(request.prompt)))
        return generation_service_pb2.TokenizeResponse(ids=ids)

    async def detokenize(self, request: generation_service_pb2.DetokenizeRequest, call: Call) -> generation_service_pb2.DetokenizeResponse:
        return generation_service_pb2.DetokenizeResponse(text=await self._served.begin().detokenize(list(request.ids)))

    async def embed(self, request: generation_service_pb2.EmbedRequest, call: Call) -> None:
        engine = self._served.begin()
        is_half = request.format == generation_service_pb2.NUMBER_FORMAT_F16
        if request.format not in generation_service_pb2.NumberFormat.values():
            raise InvalidRequest([("format", "must be one of NumberFormat")])
        async with engine.embed(
            self._served.told(wire.prompt_of(request.prompt)), request_id=self._served.new_id(), timeout_seconds=call.time_left
        ) as embedding:
            async for position, rows in embedding:
                await call.write(
                    generation_service_pb2.EmbedResponse(
                        position=position,
                        num_rows=len(rows),
                        row_size=rows.shape[1],
                        rows=rows.astype("<f2" if is_half else "<f4").tobytes(),
                        format=generation_service_pb2.NUMBER_FORMAT_F16 if is_half else generation_service_pb2.NUMBER_FORMAT_F32,
                        num_prompt_tokens=embedding.num_prompt_tokens,
                    )
                )


class ModelService:
    descriptor = model_service_pb2.DESCRIPTOR.services_by_name["ModelService"]

    def __init__(self, served: Served) -> None:
        self._served = served

    async def get_model_info(self, request: model_service_pb2.GetModelInfoRequest, call: Call) -> model_service_pb2.GetModelInfoResponse:
        model = self._served.engine.model
        return model_service_pb2.GetModelInfoResponse(
            name=self._served.model_name,
            fingerprint=model.fingerprint,
            context_length=model.context,
            vocabulary_size=model.num_token_ids,
            stop_ids=sorted(model.defaults.stop_ids),
            has_mtp=model.has_mtp,
            has_tokenizer=model.vocabulary is not None,
            has_chat_template=model.vocabulary is not None and model.vocabulary.chat_template is not None,
        )

    async def get_server_info(self, request: model_service_pb2.GetServerInfoRequest, call: Call) -> model_service_pb2.GetServerInfoResponse:
        engine = self._served.engine
        return model_service_pb2.GetServerInfoResponse(
            version=metadata.version("forerun"),
            started_at_seconds=self._served.started_at,
            drafters=engine.speculation.types,
            event_loop=self._served.home.name,
            num_slots=engine.statistics().num_slots,
        )

    async def get_loads(self, request: model_service_pb2.GetLoadsRequest, call: Call) -> model_service_pb2.GetLoadsResponse:
        now = self._served.engine.statistics()
        return model_service_pb2.GetLoadsResponse(
            num_requests_running=now.num_requests_running,
            num_requests_waiting=now.num_requests_waiting,
            num_slots_used=now.num_slots_used,
            num_slots=now.num_slots,
            num_pages_used=now.num_pages_used,
            num_pages=now.num_pages,
            num_preemptions=now.num_preemptions,
            actors=[
                model_service_pb2.ActorLoad(
                    actor=name,
                    num_waiting=actor.mailbox.num_waiting,
                    num_received=actor.mailbox.num_received,
                    num_restarts=actor.num_restarts,
                    is_switched_off=actor.is_switched_off,
                )
                for name, actor in now.actors.items()
            ],
        )


class TraceService:
    descriptor = trace_service_pb2.DESCRIPTOR.services_by_name["TraceService"]

    def __init__(self, served: Served) -> None:
        self._served, self._places = served, Places(MAX_WATCHERS)

    async def watch(self, request: trace_service_pb2.WatchRequest, call: Call) -> None:
        actors = frozenset(request.actors)
        with self._places.taken(), self._served.engine.trace() as events:
            while not self._served.is_drained:
                taken: list[Event] = []
                with anyio.move_on_after(DRAIN_LOOK_SECONDS):
                    taken = await events.take()
                    if not taken:
                        break
                wanted = [wire.event_message(event) for event in taken if is_about(event, actors, request.request_id)]
                if wanted:
                    await call.write(trace_service_pb2.WatchResponse(events=wanted, num_missed=events.num_missed))
                await anyio.sleep(WATCH_SECONDS)


class AdminService:
    descriptor = admin_service_pb2.DESCRIPTOR.services_by_name["AdminService"]

    def __init__(self, served: Served) -> None:
        self._served = served

    def _path(self, name: str) -> Path:
        if not STATE_NAME.fullmatch(name):
            raise InvalidRequest([("name", "must be 1 to 100 letters, digits, dots, dashes and underscores, and not begin with a dot")])
        if self._served.state_folder is None:
            raise SavedSequenceError("the server was started without a state folder")
        return self._served.state_folder / f"{name}.safetensors"

    async def save_state(self, request: admin_service_pb2.SaveStateRequest, call: Call) -> admin_service_pb2.SaveStateResponse:
        path, stream = self._path(request.name), self._served.find(request.request_id, None)
        await stream.save(path)
        return admin_service_pb2.SaveStateResponse(num_bytes=(await anyio.Path(path).stat()).st_size)

    async def load_state(self, request: admin_service_pb2.LoadStateRequest, call: Call) -> None:
        path = self._path(request.name)
        if not await anyio.Path(path).exists():
            raise NoState(f"there is no state {request.name}")
        stream = self._served.begin().restore(path, timeout_seconds=call.time_left, request_id=self._served.new_id())
        await self._served.relay(stream, Answer(call, self._served.model_name, admin_service_pb2.LoadStateResponse))

    async def drain(self, request: admin_service_pb2.DrainRequest, call: Call) -> admin_service_pb2.DrainResponse:
        self._served.refuse()
        await self._served.engine.drain()
        return admin_service_pb2.DrainResponse()

    async def profile(self, request: admin_service_pb2.ProfileRequest, call: Call) -> admin_service_pb2.ProfileResponse:
        if not 0 < request.seconds <= 60:
            raise InvalidRequest([("seconds", "must be above 0 and at most 60")])
        found: dict[tuple[str, str], admin_service_pb2.ProfileEntry] = {}
        with self._served.engine.trace() as events:
            with anyio.move_on_after(request.seconds):
                async for event in events:
                    if isinstance(event, Span):
                        actor = event.actor if event.message != "Delta" else "reader"  # each request has a reader of its own
                        new = admin_service_pb2.ProfileEntry(actor=actor, message=event.message)
                        entry = found.setdefault((actor, event.message), new)
                        handled = (event.finished_ns - event.started_ns) / 1e9
                        entry.count += 1
                        entry.queued_seconds += (event.started_ns - event.enqueued_ns) / 1e9
                        entry.handled_seconds += handled
                        entry.longest_seconds = max(entry.longest_seconds, handled)
        entries = sorted(found.values(), key=lambda entry: -entry.handled_seconds)
        return admin_service_pb2.ProfileResponse(entries=entries, num_missed=events.num_missed)
