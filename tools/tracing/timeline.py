"""Where a request's time went: each moment of it belongs to the innermost thing that was done for it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ... import Counter, Event, Span, Stage

#: What a moment belongs to, the innermost first: a device at work, an actor that handles a message, a message that waits for an actor,
#: the request's own task.
DEVICE, HANDLED, QUEUED, TASK = range(4)
LAYERS = ("device", "host", "queued", "own")
#: Lines of a summary.
NUM_LINES = 10


@dataclass(frozen=True, slots=True)
class Timeline:
    """One request: nanoseconds in all, and of them what belongs to (whom, layer); what belongs to nothing is missing."""

    request: str
    wall_ns: int
    parts: dict[tuple[str, int], int]
    num_rounds: int
    num_tokens: int

    @property
    def explained(self) -> float:
        """The share that belongs to something."""
        return sum(self.parts.values()) / self.wall_ns if self.wall_ns else 1.0


def requests(events: Iterable[Event]) -> list[str]:
    """In order of appearance."""
    return list(dict.fromkeys(event.flow.request for event in events if isinstance(event, Span | Stage)))


def timeline(events: Iterable[Event], request: str) -> Timeline:
    """From the first thing known of a request to its last message."""
    intervals: list[tuple[int, int, int, str]] = []  # start, end, layer, whom
    num_rounds = num_tokens = 0
    for event in events:
        if isinstance(event, Counter):
            if event.name == "accepted" and event.flow is not None and event.flow.request == request:
                num_rounds, num_tokens = num_rounds + 1, max(num_tokens, 1) + 1 + event.value  # one came with the prompt
        elif isinstance(event, Stage):
            if event.flow.request == request:
                intervals.append((event.started_ns, event.finished_ns, TASK, event.state))
        elif isinstance(event, Span) and event.flow.request == request and event.message != "Delta":
            device = event.finished_ns - min(event.computed_ns, event.finished_ns - event.started_ns)
            what = f"{event.actor}: {event.message}"
            intervals.append((event.enqueued_ns, event.started_ns, QUEUED, what))
            intervals.append((event.started_ns, device, HANDLED, what))
            intervals.append((device, event.finished_ns, DEVICE, what))
    if not intervals:
        return Timeline(request, 0, {}, num_rounds, num_tokens)
    first, last = min(each[0] for each in intervals), max(each[1] for each in intervals)
    return Timeline(request, last - first, _sweep(intervals), num_rounds, num_tokens)


def _sweep(intervals: Sequence[tuple[int, int, int, str]]) -> dict[tuple[str, int], int]:
    marks = sorted({time for start, end, _, _ in intervals for time in (start, end)})
    begins: dict[int, list[tuple[int, int, int, str]]] = {}
    for each in intervals:
        if each[0] < each[1]:
            begins.setdefault(each[0], []).append(each)
    parts: dict[tuple[str, int], int] = {}
    active: list[tuple[int, int, int, str]] = []
    for start, end in pairwise(marks):
        active = [each for each in active if each[1] > start] + begins.get(start, [])
        if active:
            _, _, layer, whom = min(active, key=lambda each: (each[2], each[0]))
            parts[whom, layer] = parts.get((whom, layer), 0) + end - start
    return parts


def summary(events: Sequence[Event]) -> str:
    """NUM_LINES lines for each request, at most: the largest parts first."""
    texts: list[str] = []
    for request in requests(events):
        found = timeline(events, request)
        if not found.wall_ns:
            continue
        about = f"{found.num_tokens} tokens in {found.num_rounds} rounds" if found.num_rounds else "no round"
        lines = [f"{request}: {found.wall_ns / 1e6:.1f} ms, {about}"]
        parts = sorted(found.parts.items(), key=lambda part: -part[1])
        shown = parts[: NUM_LINES - 2]
        rest = found.wall_ns - sum(ns for _, ns in shown)
        rows = [(f"{LAYERS[layer]:7}{whom}", ns) for (whom, layer), ns in shown] + [("everything else", rest)]
        lines += [f"  {ns / 1e6:10.2f} ms {ns / found.wall_ns:6.1%}  {name}" for name, ns in rows]
        texts.append("\n".join(lines))
    return "\n".join(texts)
