"""A server from its start to its end: listens, loads, serves, drains at the first signal and stops at the second."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.errors import InvalidRequest
from ..engine import Engine
from .home import AsyncioHome, Home, TrioHome
from .served import Meter, Served
from .server import GRACE_SECONDS, GrpcServer, ServerParams

if TYPE_CHECKING:
    from .gateway import Gateway

EVENT_LOOPS = ("asyncio", "trio")


def run_server(
    open_engine: Callable[[], AbstractAsyncContextManager[Engine]],
    model_name: str,
    params: ServerParams,
    *,
    event_loop: str = "asyncio",
    state_folder: Path | None = None,
    http_port: int | None = None,
    is_traced: bool = False,
    announce: Callable[[str], None] = lambda text: None,
) -> None:
    """Serves what `open_engine` opens until SIGTERM or SIGINT: then what runs is finished and nothing new begins; a second signal cancels
    what runs. `http_port` is the gateway's, None for no gateway; `is_traced`
    exports OpenTelemetry spans. `announce` is told in a line each what is going on. InvalidRequest
    when the address cannot be had; EngineDead when the engine fails beyond repair; and what `open_engine` raises."""
    if event_loop not in EVENT_LOOPS:
        raise InvalidRequest([("event_loop", f"must be one of {', '.join(EVENT_LOOPS)}")])
    if state_folder is not None and not state_folder.is_dir():
        raise InvalidRequest([("state_folder", f"{state_folder} is no folder")])
    home = AsyncioHome() if event_loop == "asyncio" else TrioHome()
    served = Served(home, model_name, state_folder, params.template_kwargs)
    if is_traced:
        served.meters.append(_telemetry(model_name))
    asyncio.run(_serve(open_engine, served, params, http_port, announce))


@asynccontextmanager
async def serve(
    engine: Engine, params: ServerParams | None = None, *, state_folder: Path | None = None, meters: Sequence[Meter] = ()
) -> AsyncGenerator[str]:
    """Serves an engine that runs in asyncio, over gRPC, inside the block; yields the address. `meters` watch requests. InvalidRequest when
    the address cannot be had."""
    params = params or ServerParams()
    served = Served(AsyncioHome(), engine.model.name, state_folder, params.template_kwargs, meters=list(meters))
    served.loaded(engine)
    server = GrpcServer(served, params)
    await server.start()
    await server.is_serving(True)
    try:
        yield server.address
    finally:
        await server.stop(0)


async def _serve(
    open_engine: Callable[[], AbstractAsyncContextManager[Engine]],
    served: Served,
    params: ServerParams,
    http_port: int | None,
    announce: Callable[[str], None],
) -> None:
    drain, stop, loaded = asyncio.Event(), asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    async def live() -> None:
        async with open_engine() as engine:
            served.loaded(engine)
            loop.call_soon(loaded.set)
            await engine.ended()

    def signalled() -> None:
        if drain.is_set() and not loaded.is_set():
            os._exit(1)  # a model is read in a thread, which nothing else ends
        (stop if drain.is_set() else drain).set()

    def ordered() -> None:  # by AdminService
        loop.call_soon(drain.set)

    served.on_drain.append(ordered)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signalled)
    home: Home = served.home
    async with home:
        server = GrpcServer(served, params)
        gateway = _gateway(served, params, http_port) if http_port is not None else None
        life: asyncio.Task[None] | None = None
        try:
            await server.start()
            announce(f"listening on {server.address}")
            if gateway is not None:
                await gateway.start()
                announce(f"listening on {gateway.address}")
            life = asyncio.create_task(home.enter(live))
            await _first(life, loaded.wait(), drain.wait())
            if loaded.is_set() and not drain.is_set():
                await server.is_serving(True)
                announce(f"serving {served.model_name}")
                await _first(life, drain.wait())
            await server.is_serving(False)
            if loaded.is_set() and not life.done():
                announce("draining: what runs is finished; another signal stops it")
                served.refuse()
                await _first(life, home.enter(served.engine.drain), stop.wait())
            await server.stop(0 if stop.is_set() or life.done() else GRACE_SECONDS)
        finally:
            if life is not None:
                life.cancel()
            await server.stop(0)
            if gateway is not None:
                await gateway.stop(stop)
            if life is not None:
                with suppress(asyncio.CancelledError):
                    await life
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)


def _telemetry(model_name: str) -> Meter:
    try:
        from .telemetry import Telemetry, exporting
    except ImportError as error:
        raise InvalidRequest([("otel", f"needs {error.name}, of the extra `otel`")]) from None
    return Telemetry(model_name, exporting(metadata.version("forerun")))


def _gateway(served: Served, params: ServerParams, port: int) -> Gateway:
    try:
        from .gateway import Gateway
    except ImportError as error:
        raise InvalidRequest([("http", f"needs {error.name}, of the extra `http`")]) from None
    try:
        from .metrics import Metrics
    except ImportError:
        return Gateway(served, params, port, None)
    return Gateway(served, params, port, Metrics(served).text)


async def _first(life: asyncio.Task[None], *others: Coroutine[Any, Any, object]) -> None:
    """Returns when one of them has ended, and cancels the others but `life`."""
    tasks = [asyncio.create_task(other) for other in others]
    try:
        await asyncio.wait([life, *tasks], return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
