"""Traces as files that https://ui.perfetto.dev opens, and back.

A file is JSON in the Trace Event Format. Process `actors` has a track for each actor, and a second where one works on several
messages at once; a message is a slice from when it was taken up (messages of one batch and kind are one slice), with what
the device did of it inside, at its end. Process `requests` has two tracks for each request: its stages, and its deltas, from sent to
read. Arrows join the messages of one round of one request, in order: draft, verify, commit, delta. Under the key `forerun` are the
events themselves, for `read`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from ... import Counter, Event, Flow, ForerunError, Notice, Span, Stage

FORMAT = 1
ACTORS, REQUESTS = 1, 2


@dataclass(frozen=True, slots=True)
class Slice:
    """What an actor did from `start` to `end`, for these messages."""

    spans: tuple[Span, ...]
    start: int
    end: int

    @property
    def name(self) -> str:
        return self.spans[0].message + (f" x{len(self.spans)}" if len(self.spans) > 1 else "")

    @property
    def device_ns(self) -> int:
        """Less than all of it, so that an arrow which begins with the slice is not taken for the device's."""
        return min(max(span.computed_ns for span in self.spans), max(0, self.end - self.start - 1))


def slices(spans: Iterable[Span]) -> list[Slice]:
    """Of one actor, by when they begin. Messages of one kind that were taken up at once are one; of other kinds one begins where the one
    before it ended."""
    found: list[Slice] = []
    for _, group in groupby(sorted(spans, key=lambda span: (span.started_ns, span.finished_ns)), lambda span: span.started_ns):
        by_kind: dict[str, list[Span]] = {}
        for span in group:
            by_kind.setdefault(span.message, []).append(span)
        end = 0
        for kind in by_kind.values():
            start, last = max(end, kind[0].started_ns), max(span.finished_ns for span in kind)
            end = max(end, last)
            found.append(Slice(tuple(kind), min(start, last), last))
    return sorted(found, key=lambda each: (each.start, each.end))


def lanes(slices: Sequence[Slice]) -> list[list[Slice]]:
    """The same, on as few tracks as it takes for none to overlap."""
    found: list[list[Slice]] = []
    for each in slices:
        lane = next((lane for lane in found if lane[-1].end <= each.start), None)
        if lane is None:
            found.append(lane := [])
        lane.append(each)
    return found


class _Writer:
    """Trace events, with times in microseconds from the first one."""

    def __init__(self, events: Sequence[Event]) -> None:
        self._origin = min((_first(event) for event in events), default=0)
        self._tracks: dict[tuple[int, str], int] = {}
        names = {ACTORS: "actors", REQUESTS: "requests"}
        self.out: list[dict[str, Any]] = [
            {"ph": "M", "pid": pid, "name": "process_name", "args": {"name": name}} for pid, name in names.items()
        ]

    def track(self, pid: int, name: str) -> int:
        if (pid, name) not in self._tracks:
            tid = self._tracks[pid, name] = len(self._tracks) + 1
            self.out.append({"ph": "M", "pid": pid, "tid": tid, "name": "thread_name", "args": {"name": name}})
            self.out.append({"ph": "M", "pid": pid, "tid": tid, "name": "thread_sort_index", "args": {"sort_index": tid}})
        return self._tracks[pid, name]

    def at(self, ns: int) -> float:
        return (ns - self._origin) / 1e3

    def slice(self, pid: int, track: int, name: str, start: int, end: int, args: dict[str, Any]) -> None:
        times = {"ts": self.at(start), "dur": (end - start) / 1e3}
        self.out.append({"ph": "X", "pid": pid, "tid": track, "name": name, "cat": "forerun", "args": args} | times)

    def arrows(self, number: int, name: str, ends: Sequence[tuple[int, int, int]]) -> None:
        """From slice to slice, each (process, track, time in it)."""
        for i, (pid, track, ns) in enumerate(ends):
            kind = "s" if i == 0 else "f" if i == len(ends) - 1 else "t"
            arrow = {"ph": kind, "pid": pid, "tid": track, "id": number, "name": name, "cat": "round", "ts": self.at(ns)}
            self.out.append(arrow | ({"bp": "e"} if kind == "f" else {}))


def trace_events(events: Sequence[Event]) -> list[dict[str, Any]]:
    """Events in the Trace Event Format."""
    writer, ends = _Writer(events), dict[Flow, list[tuple[int, int, int]]]()
    spans = [event for event in events if isinstance(event, Span)]
    for actor in sorted({span.actor for span in spans if span.message != "Delta"}):
        for number, lane in enumerate(lanes(slices(span for span in spans if span.actor == actor and span.message != "Delta"))):
            track = writer.track(ACTORS, actor + (f" ({number + 1})" if number else ""))
            for each in lane:
                end = max(each.end, each.start + 1)
                writer.slice(ACTORS, track, each.name, each.start, end, _args(each))
                if each.device_ns:
                    writer.slice(ACTORS, track, "device", each.end - each.device_ns, each.end, {})
                for span in each.spans:
                    ends.setdefault(span.flow, []).append((ACTORS, track, each.start))
    for request in dict.fromkeys(flow.request for event in events if (flow := _flow(event)) is not None):
        stages, deltas = writer.track(REQUESTS, request), writer.track(REQUESTS, f"{request} deltas")
        for event in events:
            if isinstance(event, Stage) and event.flow.request == request:
                writer.slice(REQUESTS, stages, event.state, event.started_ns, event.finished_ns, {"round": event.flow.round})
        before = 0
        for span in spans:
            if span.message == "Delta" and span.flow.request == request:
                start, end = max(span.enqueued_ns, before), max(span.finished_ns, before + 1)
                writer.slice(REQUESTS, deltas, "delta", start, end, {"round": span.flow.round})
                ends.setdefault(span.flow, []).append((REQUESTS, deltas, start))
                before = end
    for number, (flow, places) in enumerate(ends.items(), 1):
        if len(places) > 1:
            writer.arrows(number, f"{flow.request} round {flow.round}", sorted(places, key=lambda place: place[2]))
    for event in events:
        if isinstance(event, Counter):
            name = event.name + (f" of {event.flow.request}" if event.flow is not None else "")
            pid = ACTORS if event.flow is None else REQUESTS
            writer.out.append({"ph": "C", "pid": pid, "name": name, "ts": writer.at(event.at_ns), "args": {"value": event.value}})
        elif isinstance(event, Notice):
            track = writer.track(ACTORS, event.actor)
            writer.out.append({"ph": "i", "s": "g", "pid": ACTORS, "tid": track, "name": event.text, "ts": writer.at(event.at_ns)})
    return writer.out


def _args(each: Slice) -> dict[str, Any]:
    queued = max(span.started_ns - span.enqueued_ns for span in each.spans)
    outcomes = {span.outcome for span in each.spans}
    return {
        "requests": ", ".join(span.flow.request for span in each.spans),
        "rounds": ", ".join(str(span.flow.round) for span in each.spans),
        "queued ms": queued / 1e6,
        "device ms": each.device_ns / 1e6,
        "outcome": ", ".join(sorted(outcomes)),
    }


def _flow(event: Event) -> Flow | None:
    return None if isinstance(event, Notice) else event.flow


def _first(event: Event) -> int:
    return event.enqueued_ns if isinstance(event, Span) else event.started_ns if isinstance(event, Stage) else event.at_ns


def write(path: Path, events: Sequence[Event]) -> None:
    """ForerunError when the system does not let us."""
    raw = [[_KINDS[type(event)], *_fields(event)] for event in events]
    try:
        with path.open("w") as file:
            file.write('{"displayTimeUnit": "ms", "traceEvents": [\n')
            file.write(",\n".join(json.dumps(each) for each in trace_events(events)))
            file.write(f'\n], "forerun": {{"format": {FORMAT}, "events": [\n')
            file.write(",\n".join(json.dumps(each) for each in raw))
            file.write("\n]}}\n")
    except OSError as error:
        raise ForerunError(f"{path}: cannot be written: {error.strerror}") from error


def read(path: Path) -> list[Event]:
    """What `write` wrote. ForerunError when the file is none of ours."""
    try:
        whole = json.loads(path.read_bytes())["forerun"]
        if whole["format"] != FORMAT:
            raise ForerunError(f"{path}: has format {whole['format']!r:.50}, expected {FORMAT}")
        return list(_events(whole["events"]))
    except OSError as error:
        raise ForerunError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ForerunError(f"{path}: is no trace of ours: {error!r:.100}") from None


_KINDS: dict[type, str] = {Span: "span", Stage: "stage", Counter: "counter", Notice: "notice"}


def _fields(event: Event) -> list[Any]:
    return list(event)


def _events(raw: Any) -> Iterator[Event]:
    for kind, *fields in raw:
        match kind, fields:
            case "span", [str(), str(), [str() as request, int() as number], int(), int(), int(), str(), int()]:
                yield Span(fields[0], fields[1], Flow(request, number), *fields[3:])
            case "stage", [[str() as request, int() as number], str(), int(), int()]:
                yield Stage(Flow(request, number), *fields[1:])
            case "counter", [str(), None, int(), int()]:
                yield Counter(fields[0], None, *fields[2:])
            case "counter", [str(), [str() as request, int() as number], int(), int()]:
                yield Counter(fields[0], Flow(request, number), *fields[2:])
            case "notice", [str(), int(), str()]:
                yield Notice(*fields)
            case _:
                raise ValueError(f"{kind!r:.20} {fields!r:.60}")
