"""The trace bus: nothing when nobody watches, everything in order, bounded and lossy streams that count, observers that raise."""

from __future__ import annotations

from pathlib import Path

import anyio
import forerun
import pytest
from forerun.core.trace import Counter, Event, Trace

from tests.checkpoints import prompt

pytestmark = pytest.mark.anyio


async def test_a_slow_subscription_is_bounded_and_counts_what_it_missed() -> None:
    trace = Trace(8)
    with trace.subscribe() as slow, trace.subscribe() as fast:
        seen: list[int] = []
        for i in range(20):
            trace.count("x", i)
            event = await anext(fast)
            assert isinstance(event, Counter)
            seen.append(event.value)
    assert (seen, fast.num_missed) == (list(range(20)), 0)
    kept = [event.value async for event in slow if isinstance(event, Counter)]
    assert (kept, slow.num_missed) == (list(range(12, 20)), 12)


async def test_a_subscription_closed_half_read_keeps_its_order() -> None:
    trace = Trace(8)
    with trace.subscribe() as events:
        for i in range(3):
            trace.count("x", i)
        first = await anext(events)
        for i in range(3, 6):
            trace.count("x", i)
    assert [event.value async for event in events if isinstance(event, Counter)] == list(range(1, 6))
    assert isinstance(first, Counter)


async def test_a_subscription_ends_with_its_engine(checkpoints: dict[str, Path]) -> None:
    async with anyio.create_task_group() as group:

        async def read(events: forerun.Subscription) -> None:
            with events:
                assert [event async for event in events]

        async with forerun.open_engine(str(checkpoints["dense"])) as engine:
            group.start_soon(read, engine.trace())
            await anyio.wait_all_tasks_blocked()
            await engine.complete([1], max_tokens=3)


async def test_a_subscription_waits_for_what_comes() -> None:
    trace = Trace(8)
    seen: list[Event] = []

    async with anyio.create_task_group() as group:
        with trace.subscribe() as events:

            async def read() -> None:
                seen.extend([event async for event in events])

            group.start_soon(read)
            for i in range(5):
                await anyio.wait_all_tasks_blocked()
                trace.count("x", i)
    assert [event.value for event in seen if isinstance(event, Counter)] == list(range(5))


def test_nothing_is_recorded_while_nobody_watches() -> None:
    trace = Trace(8)
    trace.count("x", 1)
    trace.notice("x", "y")
    assert (trace.is_on, trace.read(0)) == (False, ([], 0, 0))


def test_an_observer_that_raises_is_dropped_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    trace = Trace(8)
    seen: list[Event] = []
    trace.attach(lambda event: 1 / 0)  # type: ignore[arg-type, return-value]
    trace.attach(seen.append)
    for i in range(3):
        trace.count("x", i)
    assert len(seen) == 3
    assert len(caplog.records) == 1
    trace.detach(seen.append)
    assert not trace.is_on


async def test_every_message_of_a_request_has_a_span_and_its_rounds_tie_them_together(checkpoints: dict[str, Path]) -> None:
    async with forerun.open_engine(str(checkpoints["dense"]), draft_n_max=2) as engine:
        with engine.trace() as events:
            result = await engine.complete(prompt(70), max_tokens=30, ignore_eos=True)
        spans = [event async for event in events if isinstance(event, forerun.Span)]
        assert events.num_missed == 0
        after = engine.statistics().actors
        assert sum(actor.mailbox.num_received for actor in after.values()) == sum(span.message != "Delta" for span in spans)
    by_message: dict[str, list[forerun.Span]] = {}
    for span in spans:
        assert span.enqueued_ns <= span.started_ns <= span.finished_ns
        assert (span.flow.request, span.outcome) == (result.request_id, "ok")
        by_message.setdefault(span.message, []).append(span)
    num_rounds = result.speculation.num_rounds
    assert {name: len(found) for name, found in by_message.items() if name not in ("Propose", "Commit", "Delta")} == {
        "Encode": 1, "Admit": 1, "Prefill": 2, "Observe": 5, "Verify": num_rounds, "Forget": 3, "Release": 1, "Publish": 2, "Freeze": 1,
    }  # fmt: skip
    # A drafter hears with a question what stands since the last one; who learns for others hears the rest at the end.
    for drafter in ("ngram-suffix drafter", "MTP drafter"):
        heard = [span.message for span in spans if span.actor == drafter and span.message != "Observe"]
        assert heard[-1] == "Forget"
        assert heard.count("Commit") == heard[:-1].count("Commit") == (drafter == "ngram-suffix drafter")
    for round_number in range(1, num_rounds + 1):
        drafted, verified, committed, delivered = (
            [span for span in by_message.get(name, ()) if span.flow.round == round_number]
            for name in ("Propose", "Verify", "Commit", "Delta")
        )
        assert len(verified) == len(delivered) == 1
        assert all(span.finished_ns <= verified[0].enqueued_ns for span in drafted)
        assert all(span.enqueued_ns >= verified[0].finished_ns for span in [*committed, *delivered])
