"""The outbox: bounds, merging, ends and cancellation, on both async libraries."""

from __future__ import annotations

import anyio
import pytest
from forerun.core.outbox import Outbox
from forerun.core.trace import Flow, Trace
from forerun.core.vocabulary import Delta

pytestmark = pytest.mark.anyio

FLOW = Flow("r", 1)


def delta(n: int) -> Delta:
    return Delta(chr(97 + n), (n,), "draft-mtp")


async def read(outbox: Outbox) -> list[Delta]:
    deltas: list[Delta] = []
    while (each := await outbox.receive()) is not None:
        deltas.append(each)
    return deltas


async def test_what_a_slow_reader_gets_is_merged_and_whole() -> None:
    outbox = Outbox("r", Trace(1), capacity=3, max_tokens=4)
    for n in range(6):
        await outbox.send(delta(n), FLOW)
    outbox.end()
    assert await read(outbox) == [delta(0), delta(1), Delta("cdef", (2, 3, 4, 5), "draft-mtp")]
    assert await outbox.receive() is None


async def test_beyond_that_the_sender_waits_and_is_woken() -> None:
    outbox = Outbox("r", Trace(1), capacity=1, max_tokens=2)
    seen: list[int] = []

    async def send() -> None:
        for n in range(20):
            await outbox.send(delta(n), FLOW)
        outbox.end()

    async with anyio.create_task_group() as group:
        group.start_soon(send)
        await anyio.wait_all_tasks_blocked()
        assert outbox.num_waiting == 1
        with anyio.fail_after(1):
            for each in await read(outbox):
                assert len(each.token_ids) <= 2
                seen += each.token_ids
    assert seen == list(range(20))


async def test_a_cancelled_send_was_not_handed_over_and_a_cancelled_read_loses_nothing() -> None:
    outbox = Outbox("r", Trace(1), capacity=1, max_tokens=1)
    with anyio.move_on_after(0.01):
        await outbox.receive()
    await outbox.send(delta(0), FLOW)
    with anyio.move_on_after(0.01) as scope:
        await outbox.send(delta(1), FLOW)
    assert scope.cancelled_caught
    with anyio.CancelScope() as scope:
        scope.cancel()
        await outbox.receive()
    outbox.end()
    assert await read(outbox) == [delta(0)]


def test_merged_deltas_of_two_drafters_have_no_source() -> None:
    assert Delta("a", (1,), "draft-mtp").merged(Delta("b", (2,), None)) == Delta("ab", (1, 2), None)
