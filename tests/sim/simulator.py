"""One seed decides everything: the workload, the schedule, the device's latencies, and every fault.

The real engine and actors run on trio, in virtual time, on the model of fakes.py. Faults: readers that leave, stall or are
cancelled at any message; deadlines; actors that die before, within or after any message; a device that fails or never
returns; drafts that are garbage, late, or another round's; draining and closing in the middle of it all.

After every step of every task: nobody but a running request holds memory, and none holds it twice; every channel is within
its bound. A request ends once; what was delivered is at all times a prefix of the reference; an error is one that this
seed can explain. At rest nothing is left anywhere. A failing seed is printed, and replays alike:

    python -m tests.sim.simulator 4711        # one seed, with what happened
    python -m tests.sim.simulator 0 5000      # a range
"""

from __future__ import annotations

import argparse
import logging
import math
import random
import sys
import traceback
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import anyio
import trio
from forerun.actors.engine import Engine, run_engine
from forerun.actors.mtp_drafter import MtpDrafter
from forerun.actors.ngram_drafter import NgramDrafter
from forerun.actors.sequence import MAX_FRUITLESS_REPLAYS
from forerun.actors.tree import PERIOD_SECONDS, RESTARTS
from forerun.core.actor import Actor
from forerun.core.channel import Envelope
from forerun.core.errors import (
    DeadlineExceeded,
    EngineClosed,
    EngineDead,
    ForerunError,
    InternalBug,
    InvalidRequest,
    Overloaded,
    RequestFailed,
    SavedSequenceError,
)
from forerun.core.messages import Mail, Propose, Verify
from forerun.core.protocol import ENDS
from forerun.core.trace import Event, Notice, Subscription, Trace
from forerun.core.vocabulary import FinishReason
from trio.testing import MockClock

from tests.sim.fakes import FakeModel, reference
from tests.sim.faults import Crash, DeviceError, SimulatedMark, Spoilt, raising
from tests.sim.plans import RequestPlan, make_plan

T = TypeVar("T")

#: Virtual seconds after which whatever still runs hangs. Watchdogs and late drafts take some minutes at most.
HANG_SECONDS = 3000.0
#: Of the device, in one run: each costs half a minute, and too many of them leave no time for anything else.
MAX_HANGS = 8


@dataclass
class Simulation:
    """One seed's run. `log` is all that was traced, and equal whenever the seed is."""

    seed: int
    log: list[str] = field(default_factory=list[str])
    problem: str | None = None  # found in passing, where an error would be lost
    num_messages: int = 0
    num_terminal: dict[int, int] = field(default_factory=dict[int, int])
    engine: Engine | None = None

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.plan = make_plan(self.rng)
        self._seen: dict[str, int] = {}
        self._scopes: dict[int, anyio.CancelScope] = {}
        self._actors: dict[str, Actor] = {}
        self._former: list[tuple[int, ...]] = []
        self._restarts: dict[str, list[float]] = {}
        self._num_hangs = self._num_skips = 0
        self.folder = TemporaryDirectory()
        self._drafts = [0, 0]  # of the head; how many had a right first token

    # How the seed gets in

    def is_inline(self, seconds: float) -> bool:
        return seconds <= self.plan.inline_seconds

    async def __call__(self, work: Callable[[], T], seconds: float) -> T:
        """Virtual latency before or after the work, and faults."""
        is_early, fault = self.rng.random() < 0.5, self.rng.random()
        early = work() if is_early else None
        await anyio.sleep(self._latency())
        if fault < self.plan.device_errors:
            raise DeviceError
        if self._hangs(fault):
            await anyio.sleep(HANG_SECONDS * 3)
        return early if is_early else work()  # type: ignore[return-value]

    def _latency(self) -> float:
        return min(self.rng.expovariate(1 / self.plan.latency), 4.0)  # within every actor's patience

    def _hangs(self, fault: float) -> bool:
        is_one = fault > 1 - self.plan.device_hangs and self._num_hangs < MAX_HANGS
        self._num_hangs += is_one
        return is_one

    def mark(self) -> SimulatedMark:
        """Of what a device that goes on elsewhere has begun; what is looked at fails or hangs like what is called."""
        fault = self.rng.random()
        return SimulatedMark(math.inf if self._hangs(fault) else anyio.current_time() + self._latency(), fault < self.plan.device_errors)

    def instrument(self, actor: Actor) -> None:
        handle = actor.handle
        self._actors[actor.name] = actor
        actor._watch.look = lambda: anyio.sleep(self.plan.latency / 2)  # pyright: ignore[reportPrivateUsage]  # in virtual time looking takes none

        async def faulty(batch: list[Envelope]) -> None:
            for i in range(len(batch)):
                how = self._count(actor.name)
                if isinstance(batch[i].message, Propose | Verify) and self.rng.random() < self.plan.spoilt_drafts:
                    batch[i] = Spoilt(batch[i], self.rng, self._former)
                if isinstance(batch[i].message, Propose) and self.rng.random() < self.plan.late_drafts:
                    await anyio.sleep(self.rng.random() * 10)
                if how == "before":
                    raise Crash
                if how == "stuck":
                    await anyio.sleep_forever()
                if how == "within":
                    await handle(batch[:i])
                    raise Crash
                if how == "after":
                    await handle(batch)
                    raise Crash
            await handle(batch)

        setattr(actor, "handle", faulty)  # noqa: B010
        is_quick, waits = actor.is_quick, bool(self.plan.late_drafts) or "stuck" in self.plan.crashes.values()

        def sometimes(message: Mail[Any]) -> bool:
            return not waits and is_quick(message) and self.rng.random() < 0.7

        setattr(actor, "is_quick", sometimes)  # noqa: B010
        if isinstance(actor, MtpDrafter):
            catch_up = actor._catch_up  # pyright: ignore[reportPrivateUsage]

            def counted(lease: int, position: int, next_token: tuple[int, ...]) -> Any:
                rows = catch_up(lease, position, next_token)
                pool: Any = self.engine and self.engine.tree.pool
                self._num_skips += rows is None and lease not in pool._revoked
                return rows

            setattr(actor, "_catch_up", counted)  # noqa: B010

    def _count(self, actor: str) -> str | None:
        self.num_messages += 1
        for i, scope in self._scopes.items():
            if self.num_messages >= self.plan.requests[i].cancel_at_message:
                scope.cancel()
        self._seen[actor] = self._seen.get(actor, 0) + 1
        if actor == self.plan.storm and self.rng.random() < 0.3:
            return self.rng.choice(["before", "within", "after"])
        return self.plan.crashes.get((actor, self._seen[actor]))

    def observe(self, event: Event) -> None:
        self.log.append(repr(event))
        if isinstance(event, Notice) and event.text.startswith("restarted"):
            times = self._restarts.setdefault(event.actor, [])
            times.append(event.at_ns / 1e9)
            if len(times) > RESTARTS and times[-1] - times[-1 - RESTARTS] < PERIOD_SECONDS:
                self.problem = f"the {event.actor} was restarted too often: {times}"

    # One request

    async def request(self, i: int) -> None:
        plan, engine = self.plan.requests[i], self.engine
        assert engine is not None
        await anyio.sleep(plan.arrival)
        self.num_terminal[i] = 0
        expected = reference(plan.prompt, plan.max_tokens, plan.sampling, is_like_steps=self.plan.is_like_steps)
        tokens: list[int] = []
        s = plan.sampling
        is_draining = engine._is_draining  # pyright: ignore[reportPrivateUsage]
        try:
            stream = engine.generate(
                "".join(chr(ord("a") + token) for token in plan.prompt) if plan.is_text else plan.prompt,
                max_tokens=plan.max_tokens,
                temperature=s.temperature,
                seed=s.seed,
                timeout_seconds=plan.timeout,
            )
        except EngineClosed:
            assert min(self.plan.drain_at, self.plan.close_at) < math.inf
            return
        except EngineDead as error:
            self._explain(plan, error)
            return
        assert not is_draining, "begun while draining"
        num_deltas, is_saved = 0, False
        with anyio.CancelScope() as scope:
            self._scopes[i] = scope
            try:
                async with stream:
                    async for delta in stream:
                        tokens += delta.token_ids
                        assert tuple(tokens) == expected[: len(tokens)], f"request {i} got {tokens}, expected {expected}"
                        assert delta.text == "".join(chr(ord("a") + token) for token in delta.token_ids)
                        num_deltas += 1
                        if num_deltas > plan.leave_after:
                            break
                        if num_deltas == plan.save_at:
                            with suppress(SavedSequenceError):  # it may end before
                                await stream.save(self._file(i))
                                is_saved = True
                        await anyio.sleep(100 if num_deltas == plan.stall_at else plan.pause * self.rng.random())
                    else:
                        self.num_terminal[i] += 1
            except ForerunError as error:
                self.num_terminal[i] += 1
                self._explain(plan, error)
        del self._scopes[i]
        job: Any = stream._job  # pyright: ignore[reportPrivateUsage]
        assert job.done.is_set(), "a closed stream's work goes on"
        if job.sequence is not None:
            assert job.sequence.protocol.state in ENDS
        if job.error is None:
            result = stream.result
            if "draft-mtp" in result.speculation.drafters:
                drafter = result.speculation.drafters["draft-mtp"]
                self._drafts[0] += drafter.num_drafts
                self._drafts[1] += (*drafter.num_accepted_tokens_per_pos, 0)[0]
            assert result.token_ids == expected[: len(result.token_ids)]
            assert tuple(tokens) == result.token_ids[: len(tokens)]
            if result.finish_reason is not FinishReason.CANCELLED:
                assert result.token_ids == expected
                assert len(tokens) == len(expected) or scope.cancel_called or num_deltas > plan.leave_after
            else:
                assert scope.cancel_called or num_deltas > plan.leave_after, "cancelled by nobody"
        if is_saved:
            await self._restore(i, expected)

    def _file(self, i: int) -> Path:
        return Path(self.folder.name) / f"{i}"

    async def _restore(self, i: int, expected: tuple[int, ...]) -> None:
        """Goes on from a request's file."""
        plan, engine, tokens = self.plan.requests[i], self.engine, list[int]()
        assert engine is not None
        try:
            async with engine.restore(self._file(i)) as stream:
                async for delta in stream:
                    tokens += delta.token_ids
        except ForerunError as error:
            if not (isinstance(error, EngineClosed) and engine._is_draining):  # pyright: ignore[reportPrivateUsage]
                self._explain(plan, error)
        else:
            assert stream.result.token_ids == expected
            assert tuple(tokens) == expected[len(expected) - len(tokens) :]

    def _explain(self, plan: RequestPlan, error: ForerunError) -> None:
        """An error is one that this seed can explain."""
        assert self.engine is not None
        restarts = self.engine.tree.supervisor.num_restarts
        match error:
            case DeadlineExceeded():
                assert plan.timeout is not None
            case InvalidRequest():
                assert "do not fit" in str(error)
                assert len(plan.prompt) + plan.max_tokens + 1 > 64 * self.plan.params.memory.num_pages
            case Overloaded():
                assert self.plan.params.queue_size < len(self.plan.requests) or self.plan.params.mailbox_capacity < 2048
            case EngineDead():
                assert max(restarts.values()) >= RESTARTS
                assert not isinstance(error.__cause__, InternalBug)
            case EngineClosed():
                assert self.plan.close_at < math.inf
            case SavedSequenceError():
                assert self.plan.device_errors + self.plan.device_hangs > 0
            case RequestFailed():
                is_encoding_failed = plan.is_text and self.plan.device_errors > 0
                assert is_encoding_failed or restarts["target decoder"] > MAX_FRUITLESS_REPLAYS or restarts["tokenizer"] >= 2
            case _:
                raise AssertionError(f"nobody may see {error!r}")

    # The run

    async def run(self) -> None:
        plan = self.plan
        trace = Trace(256, clock=lambda: round(trio.current_time() * 1e9))
        trace.attach(self.observe)
        if plan.has_raising_observer:
            trace.attach(raising)
        params = replace(plan.params, executor=self, instrument=self.instrument, trace=trace)
        model = FakeModel(marker=self.mark if plan.is_elsewhere else None, is_like_steps=plan.is_like_steps)
        try:
            with anyio.fail_after(HANG_SECONDS):
                with anyio.CancelScope() as scope:
                    async with run_engine(model, params) as self.engine, anyio.create_task_group() as group:
                        group.start_soon(self._watch, self.engine.trace())
                        for i in range(len(plan.requests)):
                            group.start_soon(self.request, i)
                        if plan.drain_at < math.inf:
                            group.start_soon(self._at, plan.drain_at, self.engine.drain)
                        if plan.close_at < math.inf:
                            await anyio.sleep(plan.close_at)
                            scope.cancel() if plan.is_cancelled else self.engine._stop(EngineClosed("closed by the seed"))  # pyright: ignore[reportPrivateUsage]
                        else:
                            await self._rest(self.engine)
                            self.engine._stop(EngineClosed("at rest"))  # pyright: ignore[reportPrivateUsage]
                assert not scope.cancelled_caught or plan.is_cancelled
        except TimeoutError:
            raise AssertionError(f"hangs: {self.engine and self.engine.statistics()}") from None
        except EngineDead:
            assert self.engine is not None
            assert max(self.engine.tree.supervisor.num_restarts.values()) >= RESTARTS
        assert all(count <= 1 for count in self.num_terminal.values())

    @staticmethod
    async def _watch(events: Subscription) -> None:
        """Reads as fast as it can, and must come to an end with the engine."""
        with events:
            async for _ in events:
                pass

    @staticmethod
    async def _at(seconds: float, do: Callable[[], Awaitable[None]]) -> None:
        await anyio.sleep(seconds)
        await do()

    async def _rest(self, engine: Engine) -> None:
        """Waits until all requests have ended; nothing may be left of them."""
        await anyio.sleep(101)  # the last have begun
        await engine.drain()
        while any(actor.allowed_seconds < math.inf and not actor.mailbox.is_closed for actor in self._actors.values()):
            await anyio.sleep(1)  # a drafter may still be at work that nobody waits for
        if engine._end is not None:  # pyright: ignore[reportPrivateUsage]
            return
        statistics = engine.statistics()
        if not self.plan.loses_actors:
            assert not any(actor.num_restarts for actor in statistics.actors.values())
            assert not self._num_skips, "the head found hidden rows gone"
            if not self.plan.spoilt_drafts and self._drafts[0] >= 20:
                assert self._drafts[1] > 0.25 * self._drafts[0], f"the head's first drafts are mostly wrong: {self._drafts}"
        assert (statistics.num_requests_running, statistics.num_requests_waiting, statistics.num_slots_used) == (0, 0, 0)
        assert statistics.num_pages_used == statistics.prefixes.num_pages
        engine.tree.pool.check_integrity()
        for name, actor in statistics.actors.items():
            assert (actor.mailbox.num_waiting, actor.mailbox.num_unanswered) == (0, 0), f"{name}: {actor}"
        for actor in self._actors.values():
            if isinstance(actor, NgramDrafter):
                assert not actor._sequences or statistics.actors[actor.name].is_switched_off  # pyright: ignore[reportPrivateUsage]
            if isinstance(actor, MtpDrafter):
                assert not actor._behind or statistics.actors[actor.name].is_switched_off  # pyright: ignore[reportPrivateUsage]


class Checker(trio.abc.Instrument):
    """What must hold after every step of every task."""

    def __init__(self, simulation: Simulation) -> None:
        self._simulation = simulation
        self._start = math.inf

    def before_run(self) -> None:
        self._start = trio.current_time()

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        engine: Any = self._simulation.engine
        if engine is not None and self._simulation.problem is None:
            try:
                self._simulation.problem = self._problem(engine)
            except Exception as error:  # trio would drop this instrument, and nobody would look any more
                self._simulation.problem = f"the checker failed: {error!r}"

    def _problem(self, engine: Any) -> str | None:
        jobs = {job.request_id: job for job in engine._jobs}
        owners = list(engine.tree.pool.owners.values())
        if len(owners) > engine.tree.pool.num_slots or len(set(owners)) < len(owners):
            return f"memory is held twice: {owners}"
        # It may be filling memory from a file, for who has left meanwhile.
        is_filling = engine.tree.memory is not None and engine.tree.memory.allowed_seconds < math.inf
        if lost := [owner for owner in owners if owner not in jobs and engine._end is None and not is_filling]:
            return f"memory of {lost} is lost: they have ended"
        for mailbox in engine.tree.mailboxes.values():
            if len(mailbox._waiting) > mailbox.capacity:
                return f"the {mailbox.name} has {len(mailbox._waiting)} messages waiting"
        for job in jobs.values():
            if job.outbox.num_waiting > engine._params.outbox_capacity:
                return f"{job.request_id} has {job.outbox.num_waiting} deltas waiting"
        if trio.current_time() > self._start + 2 * HANG_SECONDS:
            engine._stop(EngineDead("hangs, even when cancelled"))
            return "hangs, even when cancelled"
        return None


def run(seed: int) -> Simulation:
    """Runs one seed. AssertionError, or whatever else went wrong, with the seed in a note."""
    run_module: Any = trio._core._run  # pyright: ignore
    run_module._ALLOW_DETERMINISTIC_SCHEDULING = True
    run_module._r = random.Random(seed)
    simulation = Simulation(seed)
    try:
        trio.run(simulation.run, clock=MockClock(autojump_threshold=0), instruments=[Checker(simulation)])
        assert simulation.problem is None, simulation.problem
    except BaseException as error:
        error.add_note(f"replay with: python -m tests.sim.simulator {seed}")
        raise
    finally:
        simulation.folder.cleanup()
    return simulation


def main() -> None:
    parser = argparse.ArgumentParser(description="Runs seeds of the simulator.")
    parser.add_argument("start", type=int)
    parser.add_argument("end", type=int, nargs="?", help="runs start to end - 1; without it one seed, and prints what happened")
    parser.add_argument("--first", action="store_true", help="stop at the first that fails")
    args = parser.parse_args()
    logging.disable()
    failed: list[int] = []
    for seed in range(args.start, args.end if args.end is not None else args.start + 1):
        try:
            simulation = run(seed)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            failed.append(seed)
            print(f"seed {seed} failed", flush=True)
            if args.end is None:
                traceback.print_exc()
            if args.first:
                break
        else:
            if args.end is None:
                print(*simulation.log, simulation.plan, sep="\n")
    print(f"{len(failed)} failed: {failed}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
