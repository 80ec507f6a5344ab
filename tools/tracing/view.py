"""What an engine does, as text: actors and their queues, who drafts and how well, tokens a second, memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from ... import Counter, Event, Flow, Notice, Span, Stage

#: Notices that are shown, the newest.
NUM_NOTICES = 3


@dataclass(slots=True)
class _Actor:
    depth: int = 0
    num_messages: int = 0
    queued_ns: int = 0
    handled_ns: int = 0
    device_ns: int = 0
    busy_until_ns: int = 0  # time that several messages share counts once
    busy_ns: int = 0


@dataclass(slots=True)
class _Drafter:
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0


@dataclass(slots=True)
class View:
    """Everything that was `see`n so far."""

    num_missed: int = 0
    _actors: dict[str, _Actor] = field(default_factory=dict[str, _Actor])
    _drafters: dict[str, _Drafter] = field(default_factory=dict[str, _Drafter])
    _drafted: dict[Flow, tuple[str, int]] = field(default_factory=dict[Flow, tuple[str, int]])
    _requests: dict[str, None] = field(default_factory=dict[str, None])
    _running: set[str] = field(default_factory=set[str])
    _levels: dict[str, int] = field(default_factory=dict[str, int])
    _notices: list[str] = field(default_factory=list[str])
    _num_rounds: int = 0
    _num_tokens: int = 0
    _first_ns: int = 0
    _last_ns: int = 0

    def see(self, events: Iterable[Event]) -> None:
        for event in events:
            match event:
                case Span():
                    self._span(event)
                case Stage():
                    self._stage(event)
                case Counter():
                    self._counter(event)
                case Notice():
                    self._notices = [*self._notices, f"{event.actor}: {event.text}"][-NUM_NOTICES:]
                    self._moment(event.at_ns, event.at_ns)

    def _moment(self, start: int, end: int) -> None:
        self._first_ns = min(self._first_ns or start, start)
        self._last_ns = max(self._last_ns, end)

    def _span(self, span: Span) -> None:
        self._moment(span.enqueued_ns, span.finished_ns)
        self._requests[span.flow.request] = None
        if span.message == "Delta":
            return
        actor = self._actors.setdefault(span.actor, _Actor())
        actor.num_messages += 1
        actor.queued_ns += span.started_ns - span.enqueued_ns
        actor.handled_ns += span.finished_ns - span.started_ns
        new = span.finished_ns - max(span.started_ns, min(actor.busy_until_ns, span.finished_ns))
        actor.busy_ns += new
        actor.device_ns += min(span.computed_ns, new)
        actor.busy_until_ns = max(actor.busy_until_ns, span.finished_ns)

    def _stage(self, stage: Stage) -> None:
        self._moment(stage.started_ns, stage.finished_ns)
        self._requests[stage.flow.request] = None
        if stage.state == "finishing":
            self._running.discard(stage.flow.request)
        else:
            self._running.add(stage.flow.request)

    def _counter(self, counter: Counter) -> None:
        self._moment(counter.at_ns, counter.at_ns)
        flow = counter.flow
        if counter.name.endswith(" depth"):
            self._actors.setdefault(counter.name.removesuffix(" depth"), _Actor()).depth = counter.value
        elif flow is None:
            self._levels[counter.name] = counter.value
        elif counter.name.startswith("drafted "):
            self._drafted[flow] = counter.name.removeprefix("drafted "), counter.value
        elif counter.name == "accepted":
            self._num_rounds += 1
            self._num_tokens += counter.value + 1 + (flow.round == 1)  # one came with the prompt
            name, num_drafted = self._drafted.pop(flow, ("", 0))
            if num_drafted:
                drafter = self._drafters.setdefault(name, _Drafter())
                drafter.num_drafts += 1
                drafter.num_draft_tokens += num_drafted
                drafter.num_accepted_tokens += counter.value

    def render(self) -> str:
        seconds = (self._last_ns - self._first_ns) / 1e9
        rate = self._num_tokens / seconds if seconds else 0.0
        lines = [
            f"{seconds:.1f} s   {len(self._requests)} requests, {len(self._running)} running   {self._num_tokens} tokens in "
            f"{self._num_rounds} rounds   {rate:.1f} tokens/s" + (f"   {self.num_missed} events missed" if self.num_missed else ""),
            "",
            f"{'actor':24}{'waiting':>8}{'messages':>10}{'queued':>12}{'handled':>12}{'busy':>7}{'device':>8}",
        ]
        for name, actor in sorted(self._actors.items()):
            count, share = max(actor.num_messages, 1), 1e9 * seconds or 1.0
            queued, handled = actor.queued_ns / count / 1e6, actor.handled_ns / count / 1e6
            lines.append(
                f"{name:24}{actor.depth:8}{actor.num_messages:10}{queued:9.3f} ms{handled:9.3f} ms"
                f"{actor.busy_ns / share:7.0%}{actor.device_ns / share:8.0%}"
            )
        if self._drafters:
            lines += ["", f"{'drafted by':32}{'drafts':>8}{'tokens':>10}{'accepted':>10}{'share':>8}"]
            for name, drafter in sorted(self._drafters.items(), key=lambda each: -each[1].num_accepted_tokens):
                share = drafter.num_accepted_tokens / drafter.num_draft_tokens
                lines.append(f"{name:32}{drafter.num_drafts:8}{drafter.num_draft_tokens:10}{drafter.num_accepted_tokens:10}{share:8.0%}")
        if self._levels:
            lines += ["", "   ".join(f"{name} {value}" for name, value in sorted(self._levels.items()))]
        return "\n".join([*lines, *self._notices])
