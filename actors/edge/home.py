"""Where an engine lives: in the loop of the edge, or in trio as a guest of it.

gRPC for Python and HTTP servers know asyncio alone. Under trio an asyncio loop is the host, and trio runs in the same thread
as its guest: a call that comes in is carried into trio, and what it writes is carried out again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, Protocol, Self, TypeVar

import anyio

from ...core.errors import EngineClosed

T = TypeVar("T")


class Home(Protocol):
    """The way into the engine's event loop, and out of it."""

    name: str

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *_: object) -> None: ...

    async def enter(self, work: Callable[[], Awaitable[T]]) -> T:
        """Called in asyncio: does `work` where the engine lives. Cancelled: the work is cancelled, and has ended when this returns."""
        ...

    async def leave(self, work: Callable[[], Awaitable[T]]) -> T:
        """Called where the engine lives: does `work` in asyncio. Cancelled: the same."""
        ...


class AsyncioHome:
    """The engine runs in the edge's own loop."""

    name = "asyncio"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        return None

    async def enter(self, work: Callable[[], Awaitable[T]]) -> T:
        # Cancelled by a scope, as work of anyio has to be: a task that is cancelled natively is in what it shields as well.
        scope = anyio.CancelScope()

        async def scoped() -> T:
            with scope:
                return await work()
            raise asyncio.CancelledError

        task = asyncio.create_task(scoped())
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            scope.cancel()
            await ended(task)
            raise

    async def leave(self, work: Callable[[], Awaitable[T]]) -> T:
        return await work()


class TrioHome:
    """The engine runs in trio, a guest of the edge's loop inside `async with`."""

    name = "trio"
    _host: asyncio.AbstractEventLoop
    _nursery: Any
    _token: Any

    async def __aenter__(self) -> Self:
        import trio

        self._host = asyncio.get_running_loop()
        ready: asyncio.Future[None] = self._host.create_future()
        self._ended: asyncio.Future[None] = self._host.create_future()
        self._scope = trio.CancelScope()

        async def main() -> None:
            async with trio.open_nursery() as self._nursery:
                with self._scope:
                    self._token = trio.lowlevel.current_trio_token()
                    ready.set_result(None)
                    await trio.sleep_forever()

        def done(outcome: Any) -> None:
            for future in (ready, self._ended):
                if not future.done():
                    future.set_exception(outcome.error) if hasattr(outcome, "error") else future.set_result(None)

        trio.lowlevel.start_guest_run(
            main,
            run_sync_soon_threadsafe=self._host.call_soon_threadsafe,
            run_sync_soon_not_threadsafe=self._host.call_soon,
            done_callback=done,
            host_uses_signal_set_wakeup_fd=True,
        )
        await ready
        return self

    async def __aexit__(self, *_: object) -> None:
        self._token.run_sync_soon(self._scope.cancel)
        await self._ended

    async def enter(self, work: Callable[[], Awaitable[T]]) -> T:
        import trio

        future: asyncio.Future[T] = self._host.create_future()
        scope = trio.CancelScope()

        async def task() -> None:
            try:
                with scope:
                    result = await work()
                    future.set_result(result)
            except Exception as error:
                future.set_exception(error)
            finally:  # cancelled, by whom ever
                if not future.done():
                    future.cancel()

        try:
            self._token.run_sync_soon(self._nursery.start_soon, task)
        except trio.RunFinishedError:
            raise EngineClosed("the engine is closed") from None
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            with suppress(trio.RunFinishedError):
                self._token.run_sync_soon(scope.cancel)
            await ended(future)
            raise

    async def leave(self, work: Callable[[], Awaitable[T]]) -> T:
        done = anyio.Event()
        outcome: list[asyncio.Task[T]] = []

        def begin() -> None:
            task = self._host.create_task(_awaited(work))
            outcome.append(task)
            task.add_done_callback(lambda _: self._token.run_sync_soon(done.set))

        self._host.call_soon(begin)
        try:
            await done.wait()
        except anyio.get_cancelled_exc_class():
            self._host.call_soon(lambda: outcome[0].cancel())
            with anyio.CancelScope(shield=True):
                await done.wait()
            if not outcome[0].cancelled():
                outcome[0].exception()
            raise
        return outcome[0].result()


async def ended(future: asyncio.Future[Any]) -> None:
    """Waits for the end of what nobody wants to hear of any more."""
    with anyio.CancelScope(shield=True):
        await asyncio.wait([future])
    if not future.cancelled():
        future.exception()


async def _awaited(work: Callable[[], Awaitable[T]]) -> T:
    return await work()
