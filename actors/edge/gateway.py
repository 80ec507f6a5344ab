"""An OpenAI-compatible HTTP gateway, for the many tools that speak that already: a thin door to the same engine. Needs the extra `http`."""

from __future__ import annotations

import asyncio
import json
import logging
import ssl
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import aclosing, contextmanager
from functools import partial
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit

import anyio
import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ...core.chat import Chat, check_chat
from ...core.errors import ForerunError, InvalidRequest
from ...core.vocabulary import Delta, Result, Started, check_request_id
from ..calls import call_grammar
from .home import ended
from .openai import Asked, asked, with_names
from .rpc import BUG, bears_one_of
from .served import Served
from .server import GRACE_SECONDS, MAX_CALLS, ServerParams, Tls, is_local
from .statuses import Stalled, Status, status_of
from .words import Words

logger = logging.getLogger("forerun")

T = TypeVar("T")
#: of which answer to a call, and a piece of it
Piece = tuple[int, Started | Delta | Result]

#: gRPC status name -> HTTP status, and OpenAI's type of error
HTTP = {
    "INVALID_ARGUMENT": (400, "invalid_request_error"),
    "UNAUTHENTICATED": (401, "invalid_request_error"),
    "NOT_FOUND": (404, "invalid_request_error"),
    "RESOURCE_EXHAUSTED": (429, "rate_limit_error"),
    "UNAVAILABLE": (503, "server_error"),
    "DEADLINE_EXCEEDED": (504, "server_error"),
}
#: Seconds between two looks at the TLS files.
RELOAD_SECONDS = 5.0
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
        host = params.host if not params.host.startswith("unix:") else "127.0.0.1"
        if host != params.host and not params.tokens and not params.is_insecure:
            problem = f"{host} can be reached by everybody on this machine, {params.host} need not: give an API key, or say --insecure"
            raise InvalidRequest([("http", problem)])
        if not 0 <= port <= 65535:
            raise InvalidRequest([("http", f"must be between 0 and 65535, got {port}")])
        self._checks_host = is_local(host) and not params.tokens
        app = Starlette(
            routes=[
                Route("/v1/chat/completions", self._guarded(self._with_body(partial(self._complete, is_chat=True))), methods=["POST"]),
                Route("/v1/completions", self._guarded(self._with_body(partial(self._complete, is_chat=False))), methods=["POST"]),
                Route("/tokenize", self._guarded(self._with_body(self._tokenize)), methods=["POST"]),
                Route("/detokenize", self._guarded(self._with_body(self._detokenize)), methods=["POST"]),
                Route("/v1/models", self._guarded(self._models)),
                Route("/v1/models/{name:path}", self._guarded(self._model)),
                Route("/metrics", self._guarded(self._show_metrics)),
                Route("/health", self._health),
            ],
            exception_handlers={404: _no_route, 405: _no_route},
        )
        config = uvicorn.Config(
            app, host, port, log_config=None, access_log=False, lifespan="off", server_header=False, limit_concurrency=MAX_CALLS,
            timeout_graceful_shutdown=round(GRACE_SECONDS),
        )  # fmt: skip
        config.load()
        if params.tls is not None:
            try:
                self._tls = config.ssl = context_of(params.tls)
            except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
                raise InvalidRequest([("tls", f"the files cannot be used: {error}")]) from error
            config.ssl.sni_callback = self._renew  # called with every handshake, whether a name was sent or not
        logging.getLogger("uvicorn").setLevel(logging.CRITICAL)  # what is to be said is said here; it tells of calls that it cancels itself
        self._server = _Uvicorn(config)
        self._tasks: list[asyncio.Task[None]] = []
        self.address = f"{'https' if params.tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"

    async def start(self) -> None:
        """Listens. InvalidRequest when the address cannot be had."""
        try:
            sockets = [self._server.config.bind_socket()]
        except SystemExit:  # uvicorn has logged why
            raise InvalidRequest([("http", f"cannot listen on {self.address}")]) from None
        self.address = f"{self.address.rpartition(':')[0]}:{sockets[0].getsockname()[1]}"
        self._tasks = [asyncio.create_task(self._server.serve(sockets))]
        if self._params.tls is not None:
            self._tasks.append(asyncio.create_task(self._reload(self._params.tls)))

    def _renew(self, connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        connection.context = self._tls

    async def _reload(self, tls: Tls) -> None:
        """Looks for files that have changed: unlike gRPC, nothing asks at a handshake."""
        before = tls.read()
        while True:
            await asyncio.sleep(RELOAD_SECONDS)
            try:
                found = await anyio.to_thread.run_sync(tls.read)
                if found != before:
                    self._tls, before = context_of(tls), found
            except (ForerunError, OSError) as error:
                logger.warning("the TLS files are not read again: %s", error)

    async def stop(self, at_once: asyncio.Event) -> None:
        """Takes no more requests; what was answered already is sent, for some seconds at most, or until it is to stop `at_once`."""
        self._server.should_exit = True
        if self._tasks:
            forcing = asyncio.create_task(at_once.wait())
            await asyncio.wait([self._tasks[0], forcing], return_when=asyncio.FIRST_COMPLETED)
            self._server.force_exit = True
            for task in (forcing, *self._tasks):
                task.cancel()
                await ended(task)

    # Who may come in

    def _guarded(self, answer: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        async def guarded(request: Request) -> Response:
            response = await self._let_in(request, answer)
            name = request.headers.get("x-request-id", "")
            own: str | None = getattr(request.state, "request_id", None)
            response.headers["x-request-id"] = name if not check_request_id(name) else own or self._served.new_id()
            return response

        return guarded

    async def _let_in(self, request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
        tokens = self._params.tokens
        if tokens and not bears_one_of(request.headers.get("authorization", ""), tokens):
            refused = _error(401, "invalid_request_error", "a bearer token is needed", "invalid_api_key")
            refused.headers["www-authenticate"] = "Bearer"
            return refused
        # A page in a browser of this machine is somebody else: it cannot send JSON without asking, nor choose this Host.
        if self._checks_host and not is_local(_host(request)):
            return _error(403, "invalid_request_error", "the Host header names another machine", "forbidden")
        try:
            return await answer(request)
        except ForerunError as error:
            return _refusal(status_of(error), error)
        except ClientDisconnect:
            return _gone()
        except Exception:
            logger.exception("%s failed", request.url.path)
            return _refusal(BUG)

    # What there is

    def _described(self) -> dict[str, Any]:
        return {"id": self._served.model_name, "object": "model", "created": int(self._served.started_at), "owned_by": "forerun"}

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._described()]})

    async def _model(self, request: Request) -> Response:
        if request.path_params["name"] != self._served.model_name:
            return _error(404, "invalid_request_error", "there is no such model", "model_not_found")
        return JSONResponse(self._described())

    async def _health(self, request: Request) -> Response:
        try:
            self._served.begin()
        except ForerunError as error:
            return _refusal(status_of(error))
        return JSONResponse({"status": "ok"})

    async def _show_metrics(self, request: Request) -> Response:
        if self._metrics is None:
            return _error(404, "invalid_request_error", "needs prometheus-client, of the extra `metrics`", "not_found")
        return Response(self._metrics(), media_type="text/plain; version=0.0.4")

    def _with_body(self, answer: Callable[[Request, Any], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """`answer` is told the JSON of a request as well."""

        async def answered(request: Request) -> Response:
            if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
                return _error(415, "invalid_request_error", "the Content-Type must be application/json", "unsupported_media_type")
            raw = bytearray()
            try:
                async with asyncio.timeout(self._params.stall_seconds):
                    async for part in request.stream():
                        raw += part
                        if len(raw) > self._params.message_bytes:
                            return _error(413, "invalid_request_error", f"more than {self._params.message_bytes} bytes", "too_large")
            except TimeoutError:
                return _error(408, "invalid_request_error", "the body did not come", "timeout")
            try:
                body = json.loads(raw)
            except (ValueError, RecursionError):
                raise InvalidRequest([("body", "must be JSON")]) from None
            return await answer(request, body)

        return answered

    # As vLLM's and llama-server's, which have it under the same names, but for the text's.

    async def _tokenize(self, _: Request, body: Any) -> Response:
        fields: dict[str, Any] = cast("dict[str, Any]", body) if isinstance(body, dict) else {}
        if is_chat := "messages" in fields:
            given = {name: fields[name] for name in ("messages", "tools", "chat_template_kwargs") if name in fields}
        else:
            given = {"prompt": fields.get("prompt", fields.get("content"))}
        engine, wanted = self._served.begin(), asked(given, is_chat)
        try:
            tokens = await self._served.home.enter(partial(engine.tokenize, self._served.told(wanted.prompts[0])))
        except InvalidRequest as error:
            raise with_names(error, wanted) from None
        return JSONResponse({"tokens": tokens, "count": len(tokens), "max_model_len": engine.model.context})

    async def _detokenize(self, _: Request, body: Any) -> Response:
        tokens: Any = cast("dict[str, Any]", body).get("tokens") if isinstance(body, dict) else None
        if not isinstance(tokens, list) or not all(type(token) is int for token in cast("list[Any]", tokens)):
            raise InvalidRequest([("tokens", "must be a list of token ids")])
        try:
            text = await self._served.home.enter(partial(self._served.begin().detokenize, cast("list[int]", tokens)))
        except InvalidRequest as error:
            raise InvalidRequest([("tokens", why) for _, why in error.violations]) from None
        return JSONResponse({"prompt": text, "content": text})

    async def _complete(self, request: Request, body: Any, is_chat: bool) -> Response:
        wanted = asked(body, is_chat)
        engine, request_id = self._served.begin(), self._served.new_id()
        request.state.request_id = request_id
        num_choices = len(wanted.prompts) * wanted.number
        words = [Words(wanted, request_id, i, self._served.model_name, engine.model.vocabulary) for i in range(num_choices)]
        readers = [HttpReader(self._served, request.headers, self._params.stall_seconds) for _ in words]

        async def work(i: int) -> None:
            options = wanted.options.copy()
            options["request_id"] = f"{request_id}-{i}" if i else request_id
            if type(seed := options.get("seed")) is int:  # anything else is refused as it is
                options["seed"] = seed + i % wanted.number
            try:
                prompt = self._served.told(wanted.prompts[i // wanted.number])
                if wanted.must_call is not None and isinstance(prompt, Chat):
                    prompt = check_chat(prompt)
                    tools = [tool for tool in prompt.tools if wanted.must_call in ("", tool["function"]["name"])]
                    options["grammar"] = call_grammar(tools, engine.model.vocabulary)
                await self._served.relay(engine.generate(prompt, **options), readers[i])
            except InvalidRequest as error:
                raise with_names(error, wanted) from None

        pieces = _together([self._pieces(reader, partial(work, i)) for i, reader in enumerate(readers)])
        gone = asyncio.create_task(_disconnected(request))
        try:
            # Errors of the request are its status, while that can still be said.
            first = await _unless(gone, anext(pieces))
            if first is not None and wanted.is_streamed:
                events = _events(words, wanted, first, pieces)
                return StreamingResponse(events, media_type="text/event-stream", headers={"cache-control": "no-cache"})
            async with aclosing(pieces):
                whole = await _unless(gone, _whole(words, first, pieces)) if first is not None else None
                return JSONResponse(whole) if whole is not None else _gone()
        finally:
            gone.cancel()
            await ended(gone)

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


async def _together(several: list[AsyncGenerator[Started | Delta | Result]]) -> AsyncGenerator[Piece]:
    """The pieces of several answers as they come, with the numbers of theirs, until all have ended or one has failed."""
    if len(several) == 1:
        async with aclosing(several[0]) as pieces:
            async for piece in pieces:
                yield 0, piece
        return
    queue = asyncio.Queue[tuple[int, Started | Delta | Result | Exception | None]](1)

    async def hear(i: int, pieces: AsyncGenerator[Started | Delta | Result]) -> None:
        try:
            async with aclosing(pieces):
                async for piece in pieces:
                    await queue.put((i, piece))
            await queue.put((i, None))
        except Exception as error:
            await queue.put((i, error))

    hearing, num_left = [asyncio.create_task(hear(i, pieces)) for i, pieces in enumerate(several)], len(several)
    try:
        while num_left:
            i, piece = await queue.get()
            if isinstance(piece, Exception):
                raise piece
            if piece is None:
                num_left -= 1
            else:
                yield i, piece
    finally:
        for task in hearing:
            task.cancel()
        for task in hearing:
            await ended(task)


async def _from(first: Piece, pieces: AsyncGenerator[Piece]) -> AsyncGenerator[Piece]:
    yield first
    async for piece in pieces:
        yield piece


async def _whole(words: list[Words], first: Piece, pieces: AsyncGenerator[Piece]) -> dict[str, Any]:
    results: dict[int, Result] = {}
    async for i, told in _from(first, pieces):
        if isinstance(told, Started):
            words[i].started(told)
        elif isinstance(told, Result):
            results[i] = told
    several = [results[i] for i in range(len(words))]
    return words[0].whole([each.choice(result) for each, result in zip(words, several, strict=True)], several)


async def _unless(gone: asyncio.Task[None], work: Awaitable[T]) -> T | None:
    """What `work` returns; None if the caller went away before. In any case neither is left to itself."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait([gone, task], return_when=asyncio.FIRST_COMPLETED)
        return await task if task.done() else None
    finally:
        task.cancel()
        await ended(task)


def _host(request: Request) -> str:
    """The host that a request names, without the port; none if that makes no sense."""
    try:
        return urlsplit("//" + request.headers.get("host", "")).hostname or ""
    except ValueError:
        return ""


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _events(words: list[Words], wanted: Asked, first: Piece, pieces: AsyncGenerator[Piece]) -> AsyncGenerator[str]:
    """Server-sent events."""
    async with aclosing(pieces):
        for each in [each for one in words for each in one.first()]:
            yield _event(each)
        results: dict[int, Result] = {}
        try:
            async for i, told in _from(first, pieces):
                if isinstance(told, Started):
                    words[i].started(told)
                    continue
                if isinstance(told, Result):
                    results[i] = told
                for each in words[i].delta(told) if isinstance(told, Delta) else words[i].last(told):
                    yield _event(each)
            if wanted.wants_usage:
                yield _event(words[0].usage([results[i] for i in range(len(words))]))
            yield "data: [DONE]\n\n"
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
    if not isinstance(error, InvalidRequest):
        return kind, status.message, None, status.reason.lower()
    return kind, "; ".join(f"{field} {problem}" for field, problem in status.violations), status.violations[0][0], status.reason.lower()


async def _no_route(request: Request, error: Exception) -> Response:
    number: int = getattr(error, "status_code", 404)
    return _error(number, "invalid_request_error", f"there is no {request.method} {request.url.path}", "not_found")


def context_of(tls: Tls) -> ssl.SSLContext:
    """OSError, ValueError when the files cannot be used."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tls.certificate, tls.key)
    if tls.client_ca is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(tls.client_ca)
    return context


def _error_body(kind: str, message: str, param: str | None, code: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _refusal(status: Status, error: ForerunError | None = None) -> Response:
    number, _ = HTTP.get(status.code.name, (500, "server_error"))
    headers = {"retry-after": str(max(1, round(status.retry_after_seconds)))} if status.retry_after_seconds is not None else None
    return JSONResponse(_error_body(*_said(status, error)), number, headers)


def _error(number: int, kind: str, message: str, code: str) -> Response:
    return JSONResponse(_error_body(kind, message, None, code), number)


def _gone() -> Response:
    """To whom nobody listens. A new one each time, for headers are added to it."""
    return Response(status_code=499)


class _Uvicorn(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Generator[None]:
        """Signals are run.py's."""
        yield
