"""The MTP drafter alone, with a simulated head: which rows it computes after it has not been told of a text for long."""

from __future__ import annotations

from collections.abc import Sequence

import anyio
import numpy as np
import pytest
from forerun.actors.mtp_drafter import MtpDrafter
from forerun.core.actor import InPlace
from forerun.core.channel import Mailbox
from forerun.core.embeddings import Encoded
from forerun.core.messages import Commit, Observe, Propose
from forerun.core.speculation import SpeculationParams
from forerun.core.trace import Flow
from forerun.core.vocabulary import Choosing, SamplingParams
from forerun.kernels.backend import F32
from forerun.kernels.model.drafts import MtpRows
from forerun.kernels.model.memory import MemoryParams, SequencePool

from tests.sim.fakes import FakeHead, FakeMaker

pytestmark = pytest.mark.anyio

FLOW, HOW, NUM_PROMPT = Flow("a", 0), Choosing(SamplingParams()), 10


class Recorder(FakeHead):
    """Remembers the first position and the number of rows it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = list[tuple[int, int]]()

    def last(self, batch: Sequence[MtpRows]) -> F32:
        self.seen += [(rows.position, len(rows.tokens)) for rows in batch]
        return super().last(batch)

    def mark(self, rows: MtpRows, num_marked: int, choosing: Choosing) -> tuple[bool, ...]:
        self.seen.append((rows.position, len(rows.tokens)))
        return ()


@pytest.mark.parametrize("is_told", [False, True])
@pytest.mark.parametrize("num_behind", [1, 40, 130, 131, 500])
async def test_it_catches_up_with_what_memory_still_has(num_behind: int, is_told: bool) -> None:
    pool, head, mailbox = SequencePool(FakeMaker(), MemoryParams(1, 16, 0, "log")), Recorder(), Mailbox("MTP drafter", 8)
    found = pool.lease("a", Encoded(()), (), 900, 4)
    assert found is not None
    lease, _ = found
    memory, drafter = pool[lease.number], MtpDrafter(mailbox, InPlace(), head, pool, SpeculationParams(types=("draft-mtp",)))
    tokens, end = tuple(range(3)) * 300, NUM_PROMPT + num_behind
    async with anyio.create_task_group() as group:
        group.start_soon(drafter.run)
        memory.hidden.write(0, np.ones((NUM_PROMPT, 2), np.float32))
        await mailbox.ask(Observe(FLOW, lease.number, 0, tokens[:NUM_PROMPT], ""))
        for position in range(NUM_PROMPT, end):
            memory.hidden.write(position, np.ones((1, 2), np.float32))
        head.seen.clear()
        since = tokens[NUM_PROMPT:end]
        if is_told:
            await mailbox.ask(Commit(FLOW, lease.number, NUM_PROMPT, since, None))
            since = ()
        draft = await mailbox.ask(Propose(FLOW, lease.number, end, since, tokens[end : end + 1], 2, 0.0, HOW))
        assert len(draft.tokens) == 2
        group.cancel_scope.cancel()
    first = max(NUM_PROMPT, memory.hidden.first + 1)  # the row after the oldest that there is
    rows = [position + i for position, count in head.seen for i in range(count)]
    assert rows == list(range(first, end + 2))  # each once, the newest token's, and one of the draft
    assert memory.num_head_rows == end + 1
