"""What the actor layer costs: real engine and actors on a model that answers at once, beside one bare ask and reply.

python -m tests.sim.overhead
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import anyio
import numpy as np
from forerun.actors.engine import run_engine
from forerun.actors.tree import EngineParams
from forerun.core.begun import Begun
from forerun.core.speculation import SpeculationParams, parse_spec_type
from forerun.kernels.model.drafts import Drafted, Following, MtpRows, Wanted
from forerun.kernels.model.memory import MemoryParams, SequenceMemory
from forerun.kernels.model.pages import Arena
from forerun.kernels.model.recurrent import StoreName
from forerun.kernels.sampling import Choices

from tests.sim.fakes import NUM_TOKEN_IDS, FakeMaker, FakeModel

ZEROS = np.zeros((64, NUM_TOKEN_IDS), np.float32)
NUM_TOKENS = 2000


class InstantMemory(SequenceMemory):
    def __init__(self, table: list[int]) -> None:
        self.hidden: Any = self
        self.table, self.checkpoints, self.first = table, [], 0

    def check(self, position: int, num_rows: int, *, is_chunk: bool) -> None:
        pass

    def before(self, position: int, num_rows: int) -> Any:
        return ZEROS[:num_rows, :1]


class Instant:
    """Target and draft head in one: token 0 for ever, so that every draft is right."""

    hidden, num_prepared, marker = 1, 0, None

    def verify(self, batch: Sequence[Any]) -> Any:
        return ZEROS[: sum(len(rows.tokens) for rows in batch)], None

    def verify_next(self, *_: object) -> None:
        """Nothing is to be gained where one takes no time."""

    def prefill(self, rows: Any, is_last: bool) -> Any:
        return ZEROS[:1] if is_last else None

    def begin(self, batch: Sequence[MtpRows], wanted: Sequence[Wanted]) -> Begun[list[Drafted]]:
        return Begun(None, lambda: [Drafted((0,) * each.limit, (1.0,) * each.limit) for each in wanted])

    def draft_after(self, batch: Sequence[Following], choices: Choices) -> Begun[list[Drafted]]:
        return self.begin((), [each.wanted for each in batch])

    def mark(self, rows: Any, num_marked: int, choosing: Any) -> tuple[bool, ...]:
        return (True,) * num_marked

    def seconds(self, num_rows: int) -> float:
        return 0.0


class InstantMaker(FakeMaker):
    max_together = 0

    def memory(self, arena: Arena, table: list[int], capacity: int, max_rows: int, store: StoreName) -> SequenceMemory:
        return InstantMemory(table)


class InstantModel(FakeModel):
    def memory(self) -> FakeMaker:
        return InstantMaker()

    def target(self) -> Any:
        return Instant()

    draft_head = target


async def bare() -> float:
    """Microseconds of one ask and reply over two anyio channels."""
    there, here = anyio.create_memory_object_stream[int](1), anyio.create_memory_object_stream[int](1)

    async def echo() -> None:
        async with there[1], here[0]:
            async for n in there[1]:
                await here[0].send(n)

    begin = time.perf_counter()
    async with anyio.create_task_group() as group:
        group.start_soon(echo)
        async with there[0], here[1]:
            for n in range(NUM_TOKENS):
                await there[0].send(n)
                await here[1].receive()
    return (time.perf_counter() - begin) / NUM_TOKENS * 1e6


async def layer(spec_type: str, at_once: int, overlap: bool, watched: bool) -> float:
    """Microseconds a round and sequence; with a draft, of one token."""
    # A chooser would not draft where a verify takes nothing.
    params = SpeculationParams(parse_spec_type(spec_type), choose="first", draft_n_max=1, ngram_simple_size_n=64, ngram_simple_size_m=1)
    engine_params = EngineParams(params, MemoryParams(at_once, at_once * 40, 0, "log"), 100, overlap)
    async with run_engine(InstantModel(), engine_params) as engine:

        async def one() -> int:
            speculation = (await engine.complete([1], max_tokens=NUM_TOKENS // at_once, ignore_eos=True)).speculation
            drafted = sum(each.num_draft_tokens for each in speculation.drafters.values())
            if bool(drafted) != (spec_type != "none"):
                raise SystemExit(f"{spec_type}: {drafted} tokens were drafted")
            return speculation.num_rounds

        await one()
        num_rounds = 0

        async def counted() -> None:
            nonlocal num_rounds
            mine = await one()
            num_rounds += mine

        subscription = engine.trace()
        if watched:
            subscription.__enter__()
        begin = time.perf_counter()
        async with anyio.create_task_group() as group:
            for _ in range(at_once):
                group.start_soon(counted)
        seconds = time.perf_counter() - begin
        subscription.close()
    return seconds / num_rounds * 1e6


def main() -> None:
    cases = [
        (spec_type, at_once, overlap, watched)
        for spec_type in ("none", "draft-mtp", "draft-mtp,ngram-simple")
        for at_once in (1, 8)
        for overlap, watched in ((True, False), (False, False), (True, True))
    ]
    for backend in ("asyncio", "trio"):
        figures: dict[str, list[float]] = {}
        for _ in range(5):  # in turn
            figures.setdefault("one bare ask and reply", []).append(anyio.run(bare, backend=backend))
            for spec_type, at_once, overlap, watched in cases:
                name = f"{spec_type}, {at_once} at once, {'overlapped' if overlap else 'plain'}{', watched' if watched else ''}"
                microseconds = anyio.run(layer, spec_type, at_once, overlap, watched, backend=backend)
                figures.setdefault(name, []).append(microseconds)
        for name, times in figures.items():
            print(f"{backend:8} {name:55} {statistics.median(times):7.1f} us  ({min(times):.1f} to {max(times):.1f})")


if __name__ == "__main__":
    main()
