"""Services as gRPC handlers: one place carries calls to the engine's loop, bounds how long a reader may stall, answers errors with
statuses, and lets nobody in without a token."""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol, cast

import grpc
import grpc.aio
from google.protobuf import message_factory
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError

from ...core.errors import ForerunError, InvalidRequest
from ...core.vocabulary import check_request_id
from . import wire
from .served import Served
from .statuses import Left, Stalled, Status, status_of

logger = logging.getLogger("forerun")

HEALTH = "/grpc.health.v1.Health/"
ADMIN = "/forerun.v1.AdminService/"
BUG = Status(grpc.StatusCode.INTERNAL, "a fault in the server", "BUG")
DENIED = Status(grpc.StatusCode.UNAUTHENTICATED, "a bearer token is needed", "NO_TOKEN")


class Service(Protocol):
    """Has one method for every method of its descriptor, in lower case with underscores."""

    descriptor: Any


class RpcCall:
    """A call of gRPC."""

    def __init__(self, context: grpc.aio.ServicerContext[Any, Any], served: Served, stall_seconds: float) -> None:
        self._context, self._served, self._stall_seconds = context, served, stall_seconds
        metadata = context.invocation_metadata()
        self.owner, self.traceparent = _metadata(metadata, "authorization"), _metadata(metadata, "traceparent")

    @property
    def time_left(self) -> float | None:
        left = cast("float | None", self._context.time_remaining())  # below 0 when it has passed
        return None if left is None else max(0.0, left)

    async def write(self, message: Any) -> None:
        await self._served.home.leave(lambda: self._write(message))

    async def _write(self, message: Any) -> None:
        try:
            async with asyncio.timeout(self._stall_seconds):
                await self._context.write(message)
        except TimeoutError:
            raise Stalled("a stream was not read") from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise Left("the caller has left") from None  # so says gRPC


def handlers(service: Service, served: Served, stall_seconds: float) -> grpc.GenericRpcHandler:
    """The handlers of one service."""
    descriptor = cast(ServiceDescriptor, service.descriptor)
    methods: dict[str, Any] = {}
    for method in descriptor.methods:
        work = getattr(service, re.sub(r"(?<!^)(?=[A-Z])", "_", method.name).lower())
        methods[method.name] = _handler(method, work, served, stall_seconds)
    return grpc.method_handlers_generic_handler(descriptor.full_name, methods)


def _handler(method: MethodDescriptor, work: Callable[[Any, Any], Awaitable[Any]], served: Served, stall_seconds: float) -> Any:
    make = grpc.unary_stream_rpc_method_handler if method.server_streaming else grpc.unary_unary_rpc_method_handler
    of: type[Any] = message_factory.GetMessageClass(method.input_type)

    async def handle(raw: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        name = _metadata(context.invocation_metadata(), "x-request-id")
        if not check_request_id(name):
            await context.send_initial_metadata((("x-request-id", name),))
        call = RpcCall(context, served, stall_seconds)
        try:
            request = of.FromString(raw)
            return await served.home.enter(lambda: work(request, call))
        except DecodeError:
            answer = status_of(InvalidRequest([("request", f"is not a {method.input_type.full_name}")]))
        except InvalidRequest as error:
            answer = status_of(wire.with_paths(error))
        except ForerunError as error:
            answer = status_of(error)
            if answer.code is grpc.StatusCode.INTERNAL:
                logger.warning("%s failed: %r", method.full_name, error, exc_info=error.__cause__)
        except grpc.aio.UsageError:  # the call has ended already
            raise asyncio.CancelledError from None
        except Exception:
            logger.exception("%s failed", method.full_name)
            answer = BUG
        return await abort(context, answer)

    # Without a deserializer: gRPC would log what is no message, and answer UNKNOWN.
    return cast(Any, make)(handle, response_serializer=_serialize)


def _serialize(message: Any) -> bytes:
    return message.SerializeToString()


async def abort(context: grpc.aio.ServicerContext[Any, Any], status: Status) -> None:
    """Ends the call with a status and its details."""
    try:
        await context.abort(status.code, status.message, (("grpc-status-details-bin", status.details),))
    except grpc.aio.InternalError:  # there is no call any more
        raise asyncio.CancelledError from None


def _metadata(metadata: Any, key: str) -> str:
    """The first text that came under `key`, or none."""
    pairs: Sequence[tuple[str, str | bytes]] = metadata or ()
    return next((value for name, value in pairs if name == key and isinstance(value, str)), "")


class Gate(grpc.aio.ServerInterceptor):
    """Asks for a bearer token with every call but health's. `tokens` open all but AdminService, which has its own."""

    def __init__(self, tokens: Sequence[str], admin_token: str | None) -> None:
        self._tokens, self._admin = tuple(tokens), (admin_token,) if admin_token else ()

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: grpc.HandlerCallDetails) -> Any:
        method = handler_call_details.method
        given = _metadata(cast(Any, handler_call_details.invocation_metadata), "authorization")
        if method.startswith(ADMIN):
            is_let_in = bears_one_of(given, self._admin)
        else:
            is_let_in = method.startswith(HEALTH) or not self._tokens or bears_one_of(given, self._tokens + self._admin)
        if is_let_in:
            return await continuation(handler_call_details)

        async def deny(_: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
            await abort(context, DENIED)

        return cast(Any, grpc.stream_stream_rpc_method_handler)(deny)  # which waits for no message


def bears_one_of(authorization: str, tokens: Sequence[str]) -> bool:
    """Whether that header has one of the tokens; in a time that says nothing about them."""
    scheme, _, given = authorization.partition(" ")
    raw = given.encode(errors="replace")
    return scheme.lower() == "bearer" and sum(hmac.compare_digest(raw, token.encode()) for token in tokens) > 0
