"""Traces: what Perfetto's own processor finds in a file, what comes back from it, where a request's time went, what is shown."""

from __future__ import annotations

import argparse
import gc
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import forerun
import pytest
from forerun import Flow, Span, Stage
from forerun.tools.tracing import perfetto
from forerun.tools.tracing.command import line, trace
from forerun.tools.tracing.timeline import NUM_LINES, requests, summary, timeline
from forerun.tools.tracing.view import View

from tests.trace_processor import Processor

pytestmark = pytest.mark.anyio
TEXTS = ("def main(", "import os", "class A:", "# a comment, and then the very same: # a comment")


async def record(num_tokens: int = 40) -> list[forerun.Event]:
    """What happens while four requests run at once."""
    found: list[forerun.Event] = []
    async with forerun.open_engine("demo") as engine:
        with engine.trace() as events:
            async with anyio.create_task_group() as group:
                for text in TEXTS:
                    group.start_soon(lambda text=text: engine.complete(text, max_tokens=num_tokens, ignore_eos=True))
            found += await events.take()
        assert events.num_missed == 0
    return found


@pytest.fixture(scope="module")
def events() -> Iterator[list[forerun.Event]]:
    gc.collect()
    gc.freeze()  # what other tests left would be looked through while a request runs: a tenth of a second that nothing explains
    yield anyio.run(record)
    gc.unfreeze()


@pytest.fixture(scope="module")
def processor(events: list[forerun.Event], tmp_path_factory: pytest.TempPathFactory) -> Processor:
    path = tmp_path_factory.mktemp("trace") / "run.json"
    perfetto.write(path, events)
    assert perfetto.read(path) == events
    return Processor(path.read_bytes())


def test_perfetto_finds_every_actor_request_and_message(processor: Processor, events: list[forerun.Event]) -> None:
    assert not processor.ask("select name, value from stats where severity = 'error' and value > 0")
    tracks = {name for (name,) in processor.ask("select distinct name from thread")}
    actors = {"MTP drafter", "memory manager", "ngram-suffix drafter", "target decoder", "tokenizer"}
    assert actors <= tracks
    assert {f"request-{i}" for i in range(1, 5)} | {f"request-{i} deltas" for i in range(1, 5)} <= tracks
    found = Counter[str]()
    for (name,) in processor.ask("select slice.name as name from slice"):
        kind, _, count = name.partition(" x")
        found[kind] += int(count or 1)
    expected = Counter(event.message if event.message != "Delta" else "delta" for event in events if isinstance(event, Span))
    expected += Counter(event.state for event in events if isinstance(event, Stage))
    assert {name: found[name] for name in expected} == expected
    assert found["device"] > 20
    (count,) = processor.ask("select count(*) as n from counter")
    assert count == (sum(isinstance(event, forerun.Counter) for event in events),)


def test_nothing_overlaps_on_a_track(processor: Processor) -> None:
    overlaps = (
        "select a.name as one, b.name as other from slice a join slice b on a.track_id = b.track_id and a.depth = b.depth and a.id < b.id "
        "and a.ts < b.ts + b.dur and b.ts < a.ts + a.dur"
    )
    assert not processor.ask(overlaps)
    assert processor.ask("select max(depth) as depth from slice") == [(1,)]  # the device within an actor's message, and nothing else


def test_arrows_lead_from_draft_to_verify_to_delta_in_every_round(processor: Processor, events: list[forerun.Event]) -> None:
    ways = processor.ask("select a.name as one, b.name as other from flow join slice a on slice_out = a.id join slice b on slice_in = b.id")
    kinds = Counter((one.partition(" x")[0], other.partition(" x")[0]) for one, other in ways)
    assert not any("device" in way for way in kinds)
    rounds = {event.flow for event in events if isinstance(event, Span) and event.message == "Verify"}
    asked = {event.flow for event in events if isinstance(event, Span) and event.message == "Propose"}
    assert kinds["Verify", "delta"] == len(rounds)
    assert kinds["Propose", "Verify"] == len(asked)
    behind = {event.flow for event in events if isinstance(event, Span) and event.message == "Draft"}
    assert behind
    assert kinds["Draft", "Verify"] + kinds["Draft", "Propose"] == len(behind & rounds)
    assert kinds["Encode", "Admit"] == kinds["Admit", "Prefill"] == 4
    alone = Counter(event.flow for event in events if isinstance(event, Span))
    assert len(ways) == sum(count - 1 for count in alone.values())  # every message has its place in a chain


def test_a_requests_time_is_explained(events: list[forerun.Event]) -> None:
    assert requests(events) == [f"request-{i}" for i in range(1, 5)]
    for request in requests(events):
        found = timeline(events, request)
        assert found.explained > 0.98
        assert found.num_tokens == 40
        assert any(name == "target decoder: Verify" for name, _ in found.parts)
    lines = summary(events).splitlines()
    assert len(lines) <= 4 * NUM_LINES
    shares = [float(share) for share in re.findall(r"([\d.]+)%", "\n".join(lines[1:NUM_LINES]))]
    assert sum(shares) == pytest.approx(100, abs=0.6)


def test_each_moment_belongs_to_the_innermost() -> None:
    flow = Flow("a", 1)
    events = [
        Stage(flow, "verifying", 0, 100), Span("target decoder", "Verify", flow, 10, 30, 90, "ok", 50),
        Span("drafter", "Propose", flow, 20, 35, 60, "ok"), Span("other", "Verify", Flow("b", 1), 0, 0, 1000, "ok", 1000),
    ]  # fmt: skip
    found = timeline(events, "a")
    assert (found.wall_ns, found.explained) == (100, 1.0)
    assert found.parts == {
        ("verifying", 3): 20, ("target decoder: Verify", 2): 20, ("target decoder: Verify", 1): 10, ("target decoder: Verify", 0): 50,
    }  # fmt: skip
    assert timeline(events, "nobody").wall_ns == 0


def test_what_is_shown(events: list[forerun.Event]) -> None:
    view = View()
    view.see(events)
    text = view.render()
    num_rounds = sum(isinstance(event, Span) and event.message == "Verify" for event in events)
    assert f"4 requests, 0 running   160 tokens in {num_rounds} rounds" in text
    (target,) = (each.split() for each in text.splitlines() if each.startswith("target decoder"))
    assert int(target[3]) == sum(isinstance(event, Span) and event.actor == "target decoder" for event in events)
    assert 0 < int(target[9].rstrip("%")) <= int(target[8].rstrip("%")) <= 100
    assert re.search(r"^ngram-suffix +\d+ +\d+ +\d+ +\d+%$", text, re.MULTILINE)
    assert all(line(event).endswith("\n") for event in events)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"forerun": {"format": 9}}', '{"forerun": {"format": 1, "events": [["span", 1]]}}', '{"forerun": 7}']
)
def test_files_that_are_no_traces_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "bad").write_text(text)
    with pytest.raises(forerun.ForerunError, match="bad"):
        perfetto.read(tmp_path / "bad")
    with pytest.raises(forerun.ForerunError, match="nowhere"):
        perfetto.write(tmp_path / "nowhere" / "x", [])


async def test_the_command_reads_what_it_wrote(events: list[forerun.Event], tmp_path: Path) -> None:
    path, shown = tmp_path / "run.json", list[str]()
    perfetto.write(path, events)
    common: dict[str, Any] = {"prompt": None, "out": None, "lines": False, "actor": [], "request": "request-2", "events": 10**6}
    await trace(argparse.Namespace(file=path, summary=True, **common), shown.append)
    assert shown[0].startswith("request-2: ")
    assert len(shown[0].splitlines()) <= NUM_LINES
