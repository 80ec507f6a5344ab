"""An actor: one task, one mailbox, `handle` for what arrived. Its channel ends are constructor arguments."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Hashable
from typing import Any, Protocol, TypeVar

import anyio
from anyio.lowlevel import checkpoint, checkpoint_if_cancelled
from anyio.to_thread import run_sync

from .begun import Begun, Mark
from .channel import Envelope, Mailbox
from .errors import ActorStuck, InternalBug
from .messages import Mail

T = TypeVar("T")

#: Estimated seconds of arithmetic above which work leaves the event loop for a worker thread. A thread hop costs as much as
#: two channel hops, so shorter work is faster, and fairer to others, in place (measured in kernels/EXPERIMENTS.md).
INLINE_SECONDS = 0.005

#: Seconds before the expected end of work elsewhere from which on an actor looks whether it is done. A loop that sleeps wakes up to a
#: millisecond late, and a thread that slept runs Python several times slower at first (measured in kernels/EXPERIMENTS.md).
LOOK_SECONDS = 0.002

#: What was left behind when an actor's life ended, and all the memory it has, until it is done: a device that comes to itself may still
#: write there, whatever has become of the engine.
LEFT: list[Begun[Any]] = []

#: More than the actors can use at a time, those included that a stuck device keeps.
MAX_THREADS = 64
#: How many times the estimate of its work an actor may take before the watchdog restarts it: estimates are rough, and a
#: machine may be busy.
ALLOWED_FACTOR = 50.0


class Executor(Protocol):
    """Where work is done: on the device, in a thread, or in a simulation."""

    def is_inline(self, seconds: float) -> bool:
        """Whether work that takes so long is done in place, without waiting."""
        ...

    async def __call__(self, work: Callable[[], T], seconds: float) -> T: ...


class Threads:
    """Short work in place, other work in a worker thread, of which the engine has its own. Cancelled: the thread goes on alone, and
    what it returns is lost."""

    def __init__(self) -> None:
        self._limiter: anyio.CapacityLimiter | None = None

    def is_inline(self, seconds: float) -> bool:
        return seconds <= INLINE_SECONDS

    async def __call__(self, work: Callable[[], T], seconds: float) -> T:
        if self._limiter is None:
            self._limiter = anyio.CapacityLimiter(MAX_THREADS)
        return await run_sync(work, abandon_on_cancel=True, limiter=self._limiter)


class InPlace:
    """All work in place: the plain loop, in which nothing overlaps."""

    def is_inline(self, seconds: float) -> bool:
        return True

    async def __call__(self, work: Callable[[], T], seconds: float) -> T:
        return work()


class Watch:
    """Waits for what goes on elsewhere: asleep for most of the time that the last work of its kind took, then looking again and again,
    while others have their turns, so that this thread is awake when it is done."""

    def __init__(self) -> None:
        self._took: dict[Hashable, tuple[float, float]] = {}  # the last two of a kind, of which one may be an accident
        self.look: Callable[[], Awaitable[None]] = checkpoint  # between two looks

    async def __call__(self, mark: Mark, kind: Hashable) -> None:
        before, began = self._took.get(kind), anyio.current_time()
        expected = min(before) if before is not None else 0.0
        asleep = max(0.0, expected - LOOK_SECONDS)
        await anyio.sleep(asleep)
        took, is_late = anyio.current_time() - began, mark.is_done()
        if is_late and took > asleep + LOOK_SECONDS:
            return  # this loop was busy, which says nothing of the work
        while not mark.is_done():
            took = anyio.current_time() - began
            # The first of a kind, or one that may take for ever, is not worth all of a core.
            await (self.look() if took < 2 * expected + LOOK_SECONDS else anyio.sleep(max(LOOK_SECONDS, took / 16)))
        took = 0.75 * took if is_late else anyio.current_time() - began
        self._took[kind] = (before[1], took) if before is not None else (took, took)


class Actor(ABC):
    """Takes all waiting messages as one batch. What is wrong with one message is answered to that one; an exception that
    leaves `handle` ends this life of the actor, and its supervisor begins another."""

    #: Seconds it may go without progress, more if it announces more, before the watchdog restarts it.
    patience_seconds = 30.0

    def __init__(self, mailbox: Mailbox, executor: Executor) -> None:
        self.mailbox = mailbox
        self._executor = executor
        self._work: dict[anyio.CancelScope, float] = {}  # under way at the executor, and the seconds it is allowed
        self._watch = Watch()
        self._is_handling = False
        self.is_behind = False  # whether `handle` is called again, with nothing if nothing has arrived
        self.wake_at = math.inf  # anyio time at which `handle` is called, with nothing, if nothing arrives before
        self.num_steps = 0  # of progress, counted for the watchdog, which reads the clock so that nobody else must

    @property
    def name(self) -> str:
        return self.mailbox.name

    @property
    def enough(self) -> float:
        """How many messages make a batch as large as it is worth waiting for: with fewer, every task that is ready may send first."""
        return 1

    @property
    def allowed_seconds(self) -> float:
        """How long the present step may take; inf while idle."""
        return max(self._work.values()) if self._work else self.patience_seconds if self._is_handling else math.inf

    async def run(self) -> None:
        """Serves until cancelled."""
        while True:
            batch: list[Envelope] = []
            if self.is_behind:
                batch = await self.mailbox.receive_all(self.enough, is_patient=False)
            elif self.wake_at == math.inf:
                batch = await self.mailbox.receive_all(self.enough, self._handles_at_once)
            else:
                with anyio.CancelScope(deadline=self.wake_at):
                    batch = await self.mailbox.receive_all(self.enough, self._handles_at_once)
            self._is_handling = True
            self.num_steps += 1
            await self.handle(batch)
            self._is_handling = False
            for envelope in batch:
                if envelope.reply is None:
                    envelope.finish("ok")
                elif envelope.is_abandoned:
                    envelope.finish("abandoned")

    def is_quick(self, message: Mail[Any]) -> bool:
        """Whether to handle this message, alone, waits for nothing, and there is nothing to gain from waiting for others."""
        return False

    def _handles_at_once(self, envelope: Envelope) -> bool:
        if not self.is_quick(envelope.message):
            return False
        envelope.start()
        handling = self.handle([envelope])
        try:
            handling.send(None)
        except StopIteration:
            if envelope.reply is None:
                envelope.finish("ok")
            return True
        handling.close()
        raise InternalBug(f"the {self.name} waited, handling {envelope.message!r}")

    @abstractmethod
    async def handle(self, batch: list[Envelope]) -> None:
        """Answers every ask in `batch`, now or later, but those that are abandoned. `batch` may be empty when `wake_at` has come, or it
        `is_behind`."""

    async def compute(self, work: Callable[[], T], seconds: float) -> T:
        """Has `work` done by the executor, which `seconds` tells how long it may take. Cancelled: the work is finished first, so
        that an owner never sees its memory half written; only a supervisor that ends the actor's life leaves it behind, with all
        the memory it had."""
        if self._executor.is_inline(seconds):
            return self._timed(work)
        await checkpoint_if_cancelled()  # an actor that is to end begins nothing that nobody would leave
        return await self._guarded(lambda: self._executor(work, seconds), seconds)

    async def follow(self, begin: Callable[[], Begun[T]], seconds: float, kind: Hashable, *, is_alone: bool = True) -> T:
        """The result of what `begin` lets go on elsewhere, once it is there; if it has begun nothing, `compute`. Work of a `kind` takes as
        long as the last of it did. `is_alone`: nobody else's is before it. Cancelled: as `compute`."""
        is_short = is_alone and self.is_short(seconds)
        if not is_short:
            await checkpoint_if_cancelled()
        begun = begin()
        mark = begun.mark
        if mark is None:
            return await self.compute(begun.finish, seconds)
        if is_short:
            self._timed(mark.wait)
            return begun.finish()
        try:
            await self._guarded(lambda: self._watch(mark, kind), seconds)
        except (ActorStuck, anyio.get_cancelled_exc_class()):  # cancelled, if its life was ended
            if not mark.is_done():
                LEFT[:] = [each for each in LEFT if each.mark is not None and not each.mark.is_done()]
                LEFT.append(begun)
            raise
        return await self.compute(begun.finish, seconds) if begun.is_long else begun.finish()

    def is_short(self, seconds: float) -> bool:
        """Whether work is waited for in place wherever it is done: elsewhere too, what takes less than one would look."""
        return self._executor.is_inline(seconds * INLINE_SECONDS / LOOK_SECONDS)

    def _timed(self, work: Callable[[], T]) -> T:
        clock = self.mailbox.clock
        began = clock() if clock is not None else 0
        try:
            return work()
        finally:
            if clock is not None:
                self.mailbox.computed_ns += clock() - began

    async def _guarded(self, wait: Callable[[], Awaitable[T]], seconds: float) -> T:
        """Waits, whoever cancels, until `leave_work`: ActorStuck."""
        clock = self.mailbox.clock
        began = clock() if clock is not None else 0
        self.num_steps += 1
        with anyio.CancelScope(shield=True) as scope:
            self._work[scope] = max(self.patience_seconds, ALLOWED_FACTOR * seconds)
            try:
                return await wait()
            finally:
                del self._work[scope]
                self.num_steps += 1
                if clock is not None:
                    self.mailbox.computed_ns += clock() - began
        await checkpoint_if_cancelled()  # a closing engine: nothing has failed
        raise ActorStuck(f"the {self.name} left work behind")

    def leave_work(self) -> None:
        """Ends the wait for work under way, which may never end. For the supervisor; the actor must not run on."""
        for scope in self._work:
            scope.cancel()
