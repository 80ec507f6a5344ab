"""What all doors of a server share: the engine once it is loaded, the requests that run, and who has been told what."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, cast

from ...core.channel import RETRY_AFTER_SECONDS
from ...core.chat import Chat
from ...core.errors import EngineClosed, Overloaded
from ...core.vocabulary import Delta, Prompt, Result, Started
from ..engine import Engine
from ..stream import Stream
from .home import Home
from .statuses import NotFound, Starting


class Watch(Protocol):
    """Watches one request of the edge."""

    def started(self, started: Started) -> None: ...

    def delta(self, delta: Delta, seconds: float, is_first: bool) -> None:
        """`seconds` after the one before, or after the request came."""
        ...

    def finished(self, result: Result, seconds: float) -> None: ...

    def failed(self, error: BaseException) -> None:
        """Instead of finished; also when the reader has left."""
        ...


class Meter(Protocol):
    """Watches all of them; see metrics.py and telemetry.py."""

    def begun(self, request_id: str, traceparent: str) -> Watch:
        """A request came, within the caller's trace if it named one (W3C Trace Context)."""
        ...


class Reader(Protocol):
    """Who gets an answer. Each method returns once it is handed over, Stalled if that takes too long. Cancelled: it may have been."""

    owner: str  # the token it came with
    traceparent: str

    async def started(self, started: Started) -> None: ...

    async def delta(self, delta: Delta) -> None: ...

    async def finished(self, result: Result) -> None: ...


class Places:
    """Of those who watch something, for each costs the others: `most` at once."""

    def __init__(self, most: int) -> None:
        self._most, self._num_taken = most, 0

    @contextmanager
    def taken(self) -> Generator[None]:
        """One of them, inside the block. Overloaded when there is none."""
        if self._num_taken == self._most:
            raise Overloaded(f"{self._most} watch already", RETRY_AFTER_SECONDS)
        self._num_taken += 1
        try:
            yield
        finally:
            self._num_taken -= 1


@dataclass(slots=True)
class Served:
    """`home` is where the engine lives. `drains` are called once, when nothing new is to begin."""

    home: Home
    model_name: str
    state_folder: Path | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    started_at: float = field(default_factory=time.time)
    meters: list[Meter] = field(default_factory=list[Meter])
    on_drain: list[Callable[[], None]] = field(default_factory=list[Callable[[], None]])
    is_draining: bool = False
    _engine: Engine | None = None
    _running: dict[str, tuple[str, Stream]] = field(default_factory=dict[str, tuple[str, Stream]])

    @property
    def engine(self) -> Engine:
        """Starting until there is one."""
        if self._engine is None:
            raise Starting("the model is being loaded")
        return self._engine

    def loaded(self, engine: Engine) -> None:
        self._engine = engine

    def told(self, prompt: Prompt) -> Prompt:
        """The prompt as it is put to the engine: what this server tells chat templates is in it, where the request says nothing else."""
        if not isinstance(prompt, Chat) or not isinstance(cast(object, prompt.template_kwargs), Mapping):
            return prompt
        return replace(prompt, template_kwargs={**self.template_kwargs, **prompt.template_kwargs})

    def begin(self) -> Engine:
        """The engine, for a request that is to begin; Starting, or EngineClosed while draining."""
        if self.is_draining:
            raise EngineClosed("the server is draining")
        return self.engine

    @property
    def is_drained(self) -> bool:
        """Nothing runs, nor will."""
        return self.is_draining and not self._running

    def refuse(self) -> None:
        """Nothing new begins from now on."""
        if not self.is_draining:
            self.is_draining = True
            for tell in self.on_drain:
                tell()

    @staticmethod
    def new_id() -> str:
        """Of a request. Whoever knows it may end the request, so it cannot be guessed."""
        return secrets.token_hex(12)

    @contextmanager
    def running(self, request_id: str, owner: str, stream: Stream) -> Generator[None]:
        """Makes the request known, inside the block."""
        self._running[request_id] = owner, stream
        try:
            yield
        finally:
            del self._running[request_id]

    async def relay(self, stream: Stream, reader: Reader) -> None:
        """Hands an answer to its reader. Cancelled or failed: the request is cancelled, and its memory free when this returns."""
        watches = [meter.begun(stream.request_id, reader.traceparent) for meter in self.meters]
        before = begun = time.perf_counter()
        try:
            async with stream:
                with self.running(stream.request_id, reader.owner, stream):
                    started = await stream.started()
                    if started is not None:
                        for watch in watches:
                            watch.started(started)
                        await reader.started(started)
                    is_first = True
                    async for delta in stream:
                        now = time.perf_counter()
                        for watch in watches:
                            watch.delta(delta, now - before, is_first)
                        before, is_first = now, False
                        await reader.delta(delta)
                    for watch in watches:
                        watch.finished(stream.result, time.perf_counter() - begun)
                    watches.clear()
                    await reader.finished(stream.result)
        except BaseException as error:
            for watch in watches:
                watch.failed(error)
            raise

    def find(self, request_id: str, owner: str | None) -> Stream:
        """A request of `owner`, or of anybody if None. NotFound if there is none."""
        found = self._running.get(request_id)
        if found is None or owner not in (None, found[0]):
            raise NotFound(request_id)
        return found[1]
