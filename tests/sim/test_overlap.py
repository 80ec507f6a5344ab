"""What overlaps, in virtual time: one sequence drafts while another is verified; tokenizing and delivery wait for no arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import anyio
import pytest
import trio
from forerun.actors.drafting import Drafting
from forerun.actors.engine import Engine, run_engine
from forerun.actors.tree import EngineParams
from forerun.core.speculation import SpeculationParams
from forerun.kernels.model.memory import MemoryParams
from trio.testing import MockClock

from tests.sim.fakes import FakeModel, FakeTarget

T = TypeVar("T")

WORK_SECONDS = 1.0


class Device:
    """Every piece of a model's work takes one virtual second. `spans` are the beginnings and ends."""

    def __init__(self) -> None:
        self.spans: list[tuple[float, float]] = []

    def is_inline(self, seconds: float) -> bool:
        return seconds < FakeTarget().seconds(1)

    async def __call__(self, work: Callable[[], T], seconds: float) -> T:
        begin = anyio.current_time()
        await anyio.sleep(WORK_SECONDS)
        self.spans.append((begin, anyio.current_time()))
        return work()


def run(test: Callable[[Engine, Device], object], spec_type: str = "draft-mtp", overlap: bool = True) -> Device:
    device = Device()

    async def main() -> None:
        types = ("draft-mtp",) if spec_type == "draft-mtp" else ()
        params = EngineParams(
            SpeculationParams(types, draft_n_max=1, choose="first"), MemoryParams(4, 40, 0, "log"), 10, overlap, executor=device
        )
        async with run_engine(FakeModel(), params) as engine:
            await test(engine, device)  # type: ignore[misc]

    trio.run(main, clock=MockClock(autojump_threshold=0))
    return device


def test_one_sequence_drafts_while_another_is_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the head is asked; drafts behind a verify are part of the batch."""
    monkeypatch.setattr(Drafting, "ahead", lambda *_: (0, 0.0))  # pyright: ignore[reportUnknownLambdaType, reportUnknownArgumentType]
    ends: list[float] = []

    async def two(engine: Engine, device: Device) -> None:
        async def one(delay: float) -> None:
            await anyio.sleep(delay)
            await engine.complete([1, 2], max_tokens=12, ignore_eos=True)
            ends.append(anyio.current_time())

        begin = anyio.current_time()
        async with anyio.create_task_group() as group:
            group.start_soon(one, 0.0)
            group.start_soon(one, 0.5)
        ends.append(begin)

    spans = run(two).spans
    begin, busy = ends.pop(), sum(end - start for start, end in spans)
    assert max(ends) - begin < 0.7 * busy  # two pieces of work at a time, mostly


def test_a_chunk_is_read_by_the_drafter_while_the_next_is_computed() -> None:
    seconds: list[float] = []

    async def one(engine: Engine, device: Device) -> None:
        begin = anyio.current_time()
        await engine.complete([1] * 64 * 5, max_tokens=1)
        seconds.append(anyio.current_time() - begin)

    assert len(run(one).spans) >= 10  # five chunks, each computed and then read
    assert seconds[0] < 7.5 * WORK_SECONDS


def test_tokenizing_and_delivery_wait_for_no_arithmetic() -> None:
    async def several(engine: Engine, device: Device) -> None:
        async with engine.generate([1, 2], max_tokens=50, ignore_eos=True) as stream:
            await anext(stream)
            await anyio.sleep(WORK_SECONDS / 2)  # the next round is being computed
            async with engine.generate("abc" * 5, max_tokens=1):
                await anyio.sleep(WORK_SECONDS / 4)
                assert engine.statistics().actors["tokenizer"].mailbox.num_unanswered == 0
                assert engine.statistics().actors["target decoder"].mailbox.num_waiting == 1  # its prompt

    run(several, "none")
