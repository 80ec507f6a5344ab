"""The gRPC server: binds, listens, says how it is, drains."""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc  # pyright: ignore[reportMissingTypeStubs]
from grpc_reflection.v1alpha import reflection  # pyright: ignore[reportMissingTypeStubs]

from ...core.chat import Chat, Message, check_chat
from ...core.checks import check_ranges
from ...core.errors import InvalidRequest, Overloaded
from .rpc import Gate, Service, abort, handlers
from .served import Places, Served
from .services import AdminService, GenerationService, ModelService, TraceService
from .statuses import status_of

logger = logging.getLogger("forerun")

DEFAULT_PORT = 50051
#: Bytes a request may have.
MESSAGE_BYTES = 4 * 2**20
#: Calls at once.
MAX_CALLS = 4096
#: Of them, those that watch the server's health.
MAX_HEALTH_WATCHERS = 64
#: Seconds that streams may take to send what the engine has finished already, once it is to stop.
GRACE_SECONDS = 5.0
#: Seconds a stream may wait for its reader.
STALL_SECONDS = 30.0
CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.so_reuseport", 0),  # two servers on one port are a mistake
    ("grpc.keepalive_time_ms", 60_000),  # a client that has gone without a word is found out
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),  # clients ping every 10 s while a long prompt is computed
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.max_concurrent_streams", 1024),  # of one connection; more wait
)


@dataclass(frozen=True, slots=True)
class Tls:
    """PEM files, read again when they change. With `client_ca`, clients need a certificate of it."""

    certificate: Path
    key: Path
    client_ca: Path | None = None

    def read(self) -> tuple[bytes, bytes, bytes | None]:
        """InvalidRequest names the file that cannot be read."""
        found: list[bytes | None] = []
        for path in (self.key, self.certificate, self.client_ca):
            try:
                found.append(path.read_bytes() if path is not None else None)
            except OSError as error:
                raise InvalidRequest([("tls", f"{path}: {error.strerror}")]) from error
        key, certificate, client_ca = found
        assert key is not None
        assert certificate is not None
        return key, certificate, client_ca


@dataclass(frozen=True, slots=True)
class ServerParams:
    """Where a server listens, and whom it lets in. `host` is an address, or `unix:PATH`."""

    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    tokens: tuple[str, ...] = ()
    admin_token: str | None = None
    tls: Tls | None = None
    is_insecure: bool = False
    stall_seconds: float = STALL_SECONDS
    message_bytes: int = MESSAGE_BYTES
    template_kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])  # what chat templates are told, unless a request says else

    def __post_init__(self) -> None:
        violations: list[tuple[str, str]] = []
        if not 0 <= self.port <= 65535:
            violations.append(("port", f"must be between 0 and 65535, got {self.port}"))
        violations += check_ranges({"stall_seconds": self.stall_seconds})
        if self.admin_token == "":
            violations.append(("admin_key", "was given, but there is no key in it"))
        if any(
            not token or not token.isascii() or not token.isprintable() or " " in token for token in (*self.tokens, self.admin_token or "x")
        ):
            violations.append(("api_key", "must be printable ASCII without blanks"))
        if not (is_local(self.host) or self.tls or self.tokens or self.is_insecure):
            problem = f"{self.host} can be reached from other machines: give TLS files or an API key, or say --insecure"
            violations.append(("host", problem))
        try:
            check_chat(Chat([Message(role="user", content="")], (), self.template_kwargs))
        except InvalidRequest as error:
            violations += error.violations
        if violations:
            raise InvalidRequest(violations)

    @property
    def address(self) -> str:
        if self.host.startswith("unix:"):
            return self.host
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def is_local(host: str) -> bool:
    """Whether nobody on another machine can reach it."""
    if host.startswith("unix:") or host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def within(places: Places, watch: Callable[[Any, Any], Awaitable[None]]) -> Callable[[Any, Any], Awaitable[None]]:
    """A stream's handler, for as many calls as there are places."""

    async def watched(request: Any, context: Any) -> None:
        try:
            with places.taken():
                await watch(request, context)
        except Overloaded as error:
            await abort(context, status_of(error))

    return watched


class GrpcServer:
    """Made and used in asyncio."""

    def __init__(self, served: Served, params: ServerParams) -> None:
        """InvalidRequest when TLS files cannot be read, or the address cannot be had."""
        self._served = served
        options = [*CHANNEL_OPTIONS, ("grpc.max_receive_message_length", params.message_bytes)]
        gate = Gate(params.tokens, params.admin_token)
        self._server = grpc.aio.server(interceptors=[gate], options=options, maximum_concurrent_rpcs=MAX_CALLS)
        services: list[Service] = [GenerationService(served), ModelService(served), TraceService(served)]
        if params.admin_token:
            services.append(AdminService(served))
        self._server.add_generic_rpc_handlers(tuple(handlers(service, served, params.stall_seconds) for service in services))
        self._names = [service.descriptor.full_name for service in services]
        self._health = cast(Any, health).aio.HealthServicer()
        self._health.Watch = within(Places(MAX_HEALTH_WATCHERS), self._health.Watch)  # who needs no token must not keep others out
        cast(Any, health_pb2_grpc).add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection([*self._names, health.SERVICE_NAME, reflection.SERVICE_NAME], self._server)
        try:
            if params.tls is None:
                port = self._server.add_insecure_port(params.address)
            else:
                port = self._server.add_secure_port(params.address, credentials(params.tls))
            self.address = replace(params, port=port).address
        except RuntimeError as error:
            raise InvalidRequest([("host", f"cannot listen on {params.address}")]) from error

    async def start(self) -> None:
        """Listens. Health says NOT_SERVING until `is_serving(True)`."""
        await self.is_serving(False)
        await self._server.start()

    async def is_serving(self, is_it: bool) -> None:
        """Tells those who ask for the server's health."""
        kind = health_pb2.HealthCheckResponse
        for name in ("", *self._names):
            await self._health.set(name, kind.SERVING if is_it else kind.NOT_SERVING)

    async def stop(self, grace_seconds: float) -> None:
        """Takes no more calls; those that have not ended after `grace_seconds` are cancelled, and have ended when this returns."""
        await self._server.stop(grace_seconds)


def credentials(tls: Tls) -> grpc.ServerCredentials:
    """Reads the files again with a handshake after they changed. A pair that cannot be read leaves the one before in use."""

    def configuration(files: tuple[bytes, bytes, bytes | None]) -> Any:
        key, certificate, client_ca = files
        return grpc.ssl_server_certificate_configuration([(key, certificate)], client_ca)

    current = [tls.read()]

    def fetch() -> Any:
        try:
            files = tls.read()
        except InvalidRequest as error:
            logger.warning("%s", error)
            return None
        if files == current[0]:
            return None
        current[0] = files
        return configuration(files)

    return grpc.dynamic_ssl_server_credentials(configuration(current[0]), fetch, tls.client_ca is not None)
