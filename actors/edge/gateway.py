"""An OpenAI-compatible HTTP gateway, for the many tools that speak that already: a thin door to the same engine. Needs the extra `http`."""

from __future__ import annotations

import asyncio
import json
import logging
import ssl
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import aclosing, contextmanager
from typing import Any
from urllib.parse import urlsplit

import anyio
import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ...core.errors import ForerunError, InvalidRequest
from ...core.vocabulary import Delta, Result, Started
from .home import ended
from .openai import Asked, Words, asked
from .rpc import BUG, is_one_of
from .served import Served
from .server import ServerParams, is_local
from .statuses import Stalled, Status, status_of

logger = logging.getLogger("forerun")

#: gRPC status name -> HTTP status, and OpenAI's type of error
HTTP = {
    "INVALID_ARGUMENT": (400, "invalid_request_error"),
    "UNAUTHENTICATED": (401, "invalid_request_error"),
    "NOT_FOUND": (404, "invalid_request_error"),
    "RESOURCE_EXHAUSTED": (429, "rate_limit_error"),
    "UNAVAILABLE": (503, "server_error"),
    "DEADLINE_EXCEEDED": (504, "server_error"),
}
#: Deltas that wait for the network before the request does.
WAITING = 4


class HttpReader:
    """Hands an answer over to whoever writes the response, in asyncio."""

    def __init__(self, served: Served, headers: Headers, stall_seconds: float) -> None:
        self.owner, self.traceparent = headers.get("authorization", ""), headers.get("traceparent", "")
        self._served, self._stall_seconds = served, stall_seconds
        self._sender, self.pieces = anyio.create_memory_object_stream[Started | Delta | Result](WAITING)

    async def started(self, started: Started) -> None:
        await self._put(started)

    async def delta(self, delta: Delta) -> None:
        await self._put(delta)

    async def finished(self, result: Result) -> None:
        await self._put(result)

    async def _put(self, piece: Started | Delta | Result) -> None:
        async def put() -> None:
            with anyio.move_on_after(self._stall_seconds):
                await self._sender.send(piece)
                return
            raise Stalled("a stream was not read")

        await self._served.home.leave(put)

    def end(self) -> None:
        """No more comes."""
        self._sender.close()


class Gateway:
    """Made and used in asyncio, beside the gRPC server."""

    def __init__(self, served: Served, params: ServerParams, port: int, metrics: Callable[[], bytes] | None) -> None:
        self._served, self._params, self._metrics = served, params, metrics
        self._tokens = [f"Bearer {token}".encode() for token in params.tokens]
        host = params.host if not params.host.startswith("unix:") else "127.0.0.1"
        self._checks_host = is_local(host) and not self._tokens
        app = Starlette(
            routes=[
                Route("/v1/chat/completions", self._guarded(lambda request: self._complete(request, is_chat=True)), methods=["POST"]),
                Route("/v1/completions", self._guarded(lambda request: self._complete(request, is_chat=False)), methods=["POST"]),
                Route("/v1/models", self._guarded(self._models)),
                Route("/metrics", self._guarded(self._show_metrics)),
                Route("/health", self._health),
            ]
        )
        tls: dict[str, Any] = {}
        if params.tls is not None:
            tls = {"ssl_certfile": params.tls.certificate, "ssl_keyfile": params.tls.key}
            if params.tls.client_ca is not None:
                tls |= {"ssl_ca_certs": str(params.tls.client_ca), "ssl_cert_reqs": ssl.CERT_REQUIRED}
        config = uvicorn.Config(app, host, port, log_config=None, access_log=False, lifespan="off", server_header=False, **tls)
        self._server = _Uvicorn(config)
        self._task: asyncio.Task[None] | None = None
        self.address = f"{'https' if tls else 'http'}://{host}:{port}"

    async def start(self) -> None:
        """Listens. InvalidRequest when the address cannot be had."""
        try:
            sockets = [self._server.config.bind_socket()]
        except SystemExit:  # uvicorn has logged why
            raise InvalidRequest([("http", f"cannot listen on {self.address}")]) from None
        self.address = f"{self.address.rpartition(':')[0]}:{sockets[0].getsockname()[1]}"
        self._task = asyncio.create_task(self._server.serve(sockets))

    async def stop(self) -> None:
        """Takes no more requests; what was answered already is sent."""
        self._server.should_exit = True
        if self._task is not None:
            await self._task

    # Who may come in

    def _guarded(self, answer: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        async def guarded(request: Request) -> Response:
            given = request.headers.get("authorization", "")
            if self._tokens and not is_one_of(given, self._tokens):
                return _error(401, "invalid_request_error", "a bearer token is needed", "invalid_api_key")
            # A page in a browser of this machine is somebody else: it cannot send JSON without asking, nor choose this Host.
            host = urlsplit("//" + request.headers.get("host", "")).hostname or ""
            if self._checks_host and not is_local(host):
                return _error(403, "invalid_request_error", "the Host header names another machine", "forbidden")
            try:
                return await answer(request)
            except ForerunError as error:
                return _refusal(status_of(error), error)
            except Exception:
                logger.exception("%s failed", request.url.path)
                return _refusal(BUG)

        return guarded

    # What there is

    async def _models(self, request: Request) -> Response:
        model = {"id": self._served.model_name, "object": "model", "created": int(self._served.started_at), "owned_by": "forerun"}
        return JSONResponse({"object": "list", "data": [model]})

    async def _health(self, request: Request) -> Response:
        try:
            self._served.begin()
        except ForerunError as error:
            return _refusal(status_of(error))
        return JSONResponse({"status": "ok"})

    async def _show_metrics(self, request: Request) -> Response:
        if self._metrics is None:
            return _error(404, "invalid_request_error", "install forerun[metrics]", "not_found")
        return Response(self._metrics(), media_type="text/plain; version=0.0.4")

    async def _complete(self, request: Request, is_chat: bool) -> Response:
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            return _error(415, "invalid_request_error", "the Content-Type must be application/json", "unsupported_media_type")
        raw = bytearray()
        async for part in request.stream():
            raw += part
            if len(raw) > self._params.message_bytes:
                return _error(413, "invalid_request_error", f"more than {self._params.message_bytes} bytes", "too_large")
        try:
            body = json.loads(raw)
        except (ValueError, RecursionError):
            raise InvalidRequest([("body", "must be JSON")]) from None
        wanted = asked(body, is_chat)
        engine, request_id = self._served.begin(), self._served.new_id()
        wanted.options["request_id"] = request_id
        words = Words(wanted, request_id, self._served.model_name, engine.model.vocabulary)
        reader = HttpReader(self._served, request.headers, self._params.stall_seconds)

        async def work() -> None:
            await self._served.relay(engine.generate(wanted.prompt, **wanted.options), reader)

        pieces = self._pieces(reader, work)
        first = await anext(pieces)  # errors of the request are its status, while that can still be said
        if wanted.is_streamed:
            events = _events(words, wanted, first, pieces)
            return StreamingResponse(events, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        async with aclosing(pieces):
            gone = asyncio.create_task(_disconnected(request))
            read = asyncio.create_task(_last(first, pieces))
            try:
                await asyncio.wait([gone, read], return_when=asyncio.FIRST_COMPLETED)
                return JSONResponse(words.whole(await read)) if read.done() else Response(status_code=499)
            finally:
                for task in (gone, read):
                    task.cancel()
                await asyncio.gather(gone, read, return_exceptions=True)

    async def _pieces(self, reader: HttpReader, work: Callable[[], Awaitable[None]]) -> AsyncGenerator[Started | Delta | Result]:
        """What `work` hands over, until the result. Closed or cancelled: the work has been cancelled and has ended."""
        working = asyncio.create_task(self._served.home.enter(work))
        working.add_done_callback(lambda _: reader.end())
        try:
            async for piece in reader.pieces:
                yield piece
            await working  # raises why it ended
        finally:
            working.cancel()
            await ended(working)
            reader.pieces.close()


async def _last(first: Started | Delta | Result, pieces: AsyncGenerator[Started | Delta | Result]) -> Result:
    if isinstance(first, Result):
        return first
    async for piece in pieces:
        if isinstance(piece, Result):
            return piece
    raise AssertionError("an answer ends with its result")


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _events(
    words: Words, wanted: Asked, first: Started | Delta | Result, pieces: AsyncGenerator[Started | Delta | Result]
) -> AsyncGenerator[str]:
    """Server-sent events."""
    async with aclosing(pieces):
        opening = words.first()
        if opening is not None:
            yield _event(opening)
        try:
            piece: Started | Delta | Result | None = first
            while piece is not None:
                if isinstance(piece, Delta):
                    yield _event(words.delta(piece))
                elif isinstance(piece, Result):
                    yield _event(words.last(piece))
                    if wanted.wants_usage:
                        yield _event(words.usage(piece))
                    yield "data: [DONE]\n\n"
                piece = await anext(pieces, None)
        except ForerunError as error:
            yield _event(_error_body(*_said(status_of(error), error)))
        except Exception:
            logger.exception("a stream failed")
            yield _event(_error_body(*_said(BUG)))


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, separators=(',', ':'))}\n\n"


def _said(status: Status, error: ForerunError | None = None) -> tuple[str, str, str | None, str]:
    """Type, message, param and code of OpenAI's error object."""
    _, kind = HTTP.get(status.code.name, (500, "server_error"))
    param = error.violations[0][0] if isinstance(error, InvalidRequest) else None
    return kind, status.message, param, status.reason.lower()


def _error_body(kind: str, message: str, param: str | None, code: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _refusal(status: Status, error: ForerunError | None = None) -> Response:
    number, _ = HTTP.get(status.code.name, (500, "server_error"))
    headers = {"retry-after": str(max(1, round(status.retry_after_seconds)))} if status.retry_after_seconds is not None else None
    return JSONResponse(_error_body(*_said(status, error)), number, headers)


def _error(number: int, kind: str, message: str, code: str) -> Response:
    return JSONResponse(_error_body(kind, message, None, code), number)


class _Uvicorn(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Generator[None]:
        """Signals are run.py's."""
        yield
