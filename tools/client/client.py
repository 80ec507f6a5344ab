"""The client: one channel, our words in and out, our errors raised."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, cast

import anyio
import grpc
import grpc.aio
import numpy as np
import numpy.typing as npt
from forerun.core.errors import DeadlineExceeded, ForerunError, InvalidRequest, Overloaded, RequestFailed
from forerun.core.vocabulary import Delta, Prompt, Result, SamplingParams, Started
from forerun.v1 import generation_service_pb2 as pb
from forerun.v1 import generation_service_pb2_grpc as generation
from forerun.v1 import model_service_pb2, model_service_pb2_grpc, trace_service_pb2, trace_service_pb2_grpc
from google.rpc import error_details_pb2, status_pb2  # pyright: ignore[reportMissingTypeStubs]

from . import messages

T = TypeVar("T")

#: What a call that has changed nothing is tried again after, if the server says that it may be.
NUM_RETRIES = 3
#: Seconds before such a try, where the server does not say how many.
RETRY_SECONDS = 0.5
#: The server's clock and ours may see a deadline pass by this much apart.
DEADLINE_SLACK_SECONDS = 0.1
CHANNEL_OPTIONS = (
    ("grpc.keepalive_time_ms", 20_000),  # while a long prompt is computed nothing comes
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", 64 * 2**20),
    ("grpc.enable_retries", 0),  # what is safe to try again is decided here
)


class ServerError(ForerunError):
    """The server, or the way to it, failed. `code` is the gRPC status' name, `reason` the server's word for it (google.rpc.ErrorInfo)."""

    def __init__(self, message: str, code: str, reason: str, retry_after_seconds: float | None = None) -> None:
        super().__init__(f"{code}: {message}")
        self.code, self.reason, self.retry_after_seconds = code, reason, retry_after_seconds


class Client:
    """A server at `address` (`host:port` or `unix:PATH`), for use in asyncio, `async with` or until `aclose`. With `tls`, or with `ca_file`
    if no public authority vouches for the server, the way is TLS, and with `certificate_file` and `key_file` the client says who it is.
    Every call takes `timeout_seconds`, and ends with DeadlineExceeded by then; the deadline of an anyio scope around it is sent along, and
    cancels as ever. Errors are those of the in-process API, and ServerError."""

    def __init__(
        self,
        address: str = "127.0.0.1:50051",
        *,
        token: str | None = None,
        tls: bool = False,
        ca_file: str | Path | None = None,
        certificate_file: str | Path | None = None,
        key_file: str | Path | None = None,
    ) -> None:
        """InvalidRequest when files cannot be read, or do not go together."""
        self._metadata = (("authorization", f"Bearer {token}"),) if token is not None else ()
        is_tls = tls or ca_file is not None
        if (certificate_file is None) != (key_file is None) or (key_file is not None and not is_tls):
            raise InvalidRequest([("tls", "a client's certificate goes with its key, and both with TLS")])
        if not is_tls:
            self._channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        else:
            try:
                files = ca_file, key_file, certificate_file
                ca, key, certificate = (Path(file).read_bytes() if file is not None else None for file in files)
            except OSError as error:
                raise InvalidRequest([("tls", f"{error.filename}: {error.strerror}")]) from error
            self._channel = grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(ca, key, certificate), options=CHANNEL_OPTIONS)
        self._generation: Any = generation.GenerationServiceStub(self._channel)
        self._model: Any = model_service_pb2_grpc.ModelServiceStub(self._channel)
        self._trace: Any = trace_service_pb2_grpc.TraceServiceStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Ends what runs, and the connection."""
        await self._channel.close()

    def generate(self, prompt: Prompt, *, timeout_seconds: float | None = None, **options: Any) -> AnswerStream:
        """Starts a request, for `async with`. Takes the options of Engine.generate but `prefill_progress` and `request_id`. Nothing is
        sent before the block is entered; until the server has started, it is tried again when the server is about to have room."""
        try:
            message = messages.generate_message(prompt, options)
        except (TypeError, ValueError) as error:
            raise InvalidRequest([("options", str(error))]) from None
        return AnswerStream(self, message, timeout_seconds)

    async def complete(self, prompt: Prompt, *, timeout_seconds: float | None = None, **options: Any) -> Result:
        """`generate`, read to its end."""
        async with self.generate(prompt, timeout_seconds=timeout_seconds, **options) as stream:
            async for _ in stream:
                pass
        return stream.result

    async def abort(self, request_id: str, *, timeout_seconds: float | None = None) -> None:
        """Ends one's own request: its stream ends with FinishReason.CANCELLED. ServerError NOT_FOUND if it does not run."""
        await self._ask(self._generation.Abort, pb.AbortRequest(request_id=request_id), timeout_seconds, num_retries=0)

    async def tokenize(self, prompt: Prompt, *, timeout_seconds: float | None = None) -> tuple[int, ...]:
        """The ids the server takes a prompt for."""
        request = pb.TokenizeRequest(prompt=messages.prompt_message(prompt))
        return tuple((await self._ask(self._generation.Tokenize, request, timeout_seconds)).ids)

    async def detokenize(self, token_ids: list[int], *, timeout_seconds: float | None = None) -> str:
        """The text of ids."""
        try:
            request = pb.DetokenizeRequest(ids=token_ids)
        except (TypeError, ValueError) as error:
            raise InvalidRequest([("ids", str(error))]) from None
        return (await self._ask(self._generation.Detokenize, request, timeout_seconds)).text

    async def embed(self, prompt: Prompt, *, is_half: bool = False, timeout_seconds: float | None = None) -> npt.NDArray[Any]:
        """The hidden rows of a prompt, [tokens, hidden], float32, or float16 with `is_half`."""
        number_format, kind = (pb.NUMBER_FORMAT_F16, "<f2") if is_half else (pb.NUMBER_FORMAT_F32, "<f4")
        call = self.start(
            self._generation.Embed, pb.EmbedRequest(prompt=messages.prompt_message(prompt), format=number_format), timeout_seconds
        )
        parts: list[npt.NDArray[Any]] = []
        try:
            while (part := await heard(call.read())) is not grpc.aio.EOF:
                parts.append(np.frombuffer(part.rows, kind).reshape(part.num_rows, part.row_size))
        finally:
            call.cancel()
        return np.concatenate(parts)

    async def model_info(self, *, timeout_seconds: float | None = None) -> model_service_pb2.GetModelInfoResponse:
        """What the model is."""
        return await self._ask(self._model.GetModelInfo, model_service_pb2.GetModelInfoRequest(), timeout_seconds)

    async def server_info(self, *, timeout_seconds: float | None = None) -> model_service_pb2.GetServerInfoResponse:
        """What serves it."""
        return await self._ask(self._model.GetServerInfo, model_service_pb2.GetServerInfoRequest(), timeout_seconds)

    async def loads(self, *, timeout_seconds: float | None = None) -> model_service_pb2.GetLoadsResponse:
        """How busy it is."""
        return await self._ask(self._model.GetLoads, model_service_pb2.GetLoadsRequest(), timeout_seconds)

    async def watch(self, *, actors: tuple[str, ...] = (), request_id: str = "") -> AsyncGenerator[trace_service_pb2.WatchResponse]:
        """What happens inside the server from now on, until the iteration is left; close it with contextlib.aclosing."""
        call = self.start(self._trace.Watch, trace_service_pb2.WatchRequest(actors=actors, request_id=request_id), None)
        try:
            while (response := await heard(call.read())) is not grpc.aio.EOF:
                yield response
        finally:
            call.cancel()

    # For AnswerStream and the above

    def start(self, method: Callable[..., Any], request: Any, timeout_seconds: float | None) -> Any:
        """A call of `method`, with whatever deadline is nearest."""
        left = anyio.current_effective_deadline() - anyio.current_time()
        left = min(left, math.inf if timeout_seconds is None else timeout_seconds)
        return method(request, timeout=None if left == math.inf else max(0.0, left), metadata=self._metadata)

    def start_generate(self, request: pb.GenerateRequest, timeout_seconds: float | None) -> Any:
        return self.start(self._generation.Generate, request, timeout_seconds)

    async def _ask(self, method: Callable[..., Any], request: object, timeout_seconds: float | None, num_retries: int = NUM_RETRIES) -> Any:
        deadline = math.inf if timeout_seconds is None else anyio.current_time() + timeout_seconds

        async def once() -> Any:
            left = None if deadline == math.inf else deadline - anyio.current_time()
            return await self.start(method, request, left)

        return await retried(once, deadline, num_retries)


async def retried(once: Callable[[], Awaitable[T]], deadline: float, num_retries: int) -> T:
    """What `once` returns, done again while the server is about to have room, and there is time. Raises our errors."""
    while True:
        try:
            return await heard(once())
        except ForerunError as ours:
            pause = getattr(ours, "retry_after_seconds", None)
            if isinstance(ours, ServerError) and ours.code == "UNAVAILABLE" and pause is None:
                pause = RETRY_SECONDS  # nobody listens
            if pause is None or num_retries == 0 or anyio.current_time() + pause >= deadline:
                raise
            num_retries -= 1
        await anyio.sleep(pause)


class AnswerStream:
    """The answer to one request, as it comes, inside `async with`. Leaving the block cancels what is left."""

    def __init__(self, client: Client, request: pb.GenerateRequest, timeout_seconds: float | None) -> None:
        """Private: use Client.generate."""
        self._client, self._request, self._timeout_seconds = client, request, timeout_seconds
        self._call: Any = None
        self._deltas: list[Delta] = []
        self._first: list[pb.GenerateResponse] = []
        self.started: Started | None = None
        self._result: Result | None = None

    async def __aenter__(self) -> Self:
        """Returns once the request has started, or has ended without."""
        timeout = self._timeout_seconds
        deadline = math.inf if timeout is None else anyio.current_time() + timeout

        async def once() -> pb.GenerateResponse | None:
            left = None if deadline == math.inf else deadline - anyio.current_time()
            self._call = self._client.start_generate(self._request, left)
            first = await self._call.read()
            return None if first is grpc.aio.EOF else first

        first = await retried(once, deadline, NUM_RETRIES)
        if first is not None and first.WhichOneof("event") == "started":
            self.started = messages.started_of(first.started)
        elif first is not None:
            self._first.append(first)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._call is not None:
            self._call.cancel()

    def __aiter__(self) -> AnswerStream:
        return self

    async def __anext__(self) -> Delta:
        """The next piece; raises the request's error if it ended with one."""
        if self._result is not None:
            raise StopAsyncIteration
        if self._call is None:
            raise RuntimeError("use `async with`")
        response = self._first.pop() if self._first else await heard(self._call.read())
        if response is grpc.aio.EOF:
            raise ServerError("the stream ended early", "UNKNOWN", "")
        if response.WhichOneof("event") == "finished":
            sampling, request_id = (self.started.sampling, self.started.request_id) if self.started is not None else (SamplingParams(), "")
            self._result = messages.result_of(response.finished, request_id, sampling, self._deltas)
            raise StopAsyncIteration
        delta = messages.delta_of(response.delta)
        self._deltas.append(delta)
        return delta

    @property
    def result(self) -> Result:
        """The finished request. RuntimeError before the end."""
        if self._result is None:
            raise RuntimeError("the stream has not ended")
        return self._result


async def heard(answer: Awaitable[T]) -> T:
    """What comes; raises our errors. A call that somebody else has ended, by closing the client, is one of them, and cancels nobody.
    A deadline that was a block's around this (see Client.start) ends that block as if nothing had been sent: by cancelling."""
    try:
        return await answer
    except grpc.aio.AioRpcError as error:
        ours = our_error(error)
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        ours = ServerError("the call was ended here", "CANCELLED", "")
    if isinstance(ours, DeadlineExceeded) and anyio.current_effective_deadline() - anyio.current_time() < DEADLINE_SLACK_SECONDS:
        await anyio.sleep(2 * DEADLINE_SLACK_SECONDS)
    raise ours


def our_error(error: grpc.aio.AioRpcError) -> ForerunError:
    """The error of ours that a status stands for."""
    code, message = error.code(), error.details() or ""
    reason, violations, retry_after = "", list[tuple[str, str]](), cast("float | None", None)
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            for packed in status_pb2.Status.FromString(cast(bytes, value)).details:
                info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
                if packed.Unpack(info):
                    reason = info.reason
                elif packed.Unpack(bad):
                    violations = [(each.field, each.description) for each in bad.field_violations]
                elif packed.Unpack(retry):
                    retry_after = retry.retry_delay.ToMilliseconds() / 1000
    if code is grpc.StatusCode.INVALID_ARGUMENT and violations:
        return InvalidRequest(violations)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and retry_after is not None:
        return Overloaded(message, retry_after)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceeded(message)
    if code is grpc.StatusCode.INTERNAL and reason:
        return RequestFailed(message)
    return ServerError(message, code.name, reason, retry_after)
