"""forerun trace: watches a running server, or runs prompts here, or reads a file; shows what happens, and writes it down."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any, cast

import anyio

from ... import Event, Flow, ForerunError, InvalidRequest, Notice, Span, Stage
from ...core.trace import is_about
from .. import client_command, flags
from .perfetto import read, write
from .timeline import summary
from .view import View

Write = Callable[[str], Any]

#: Seconds between two pictures in a terminal.
REDRAW_SECONDS = 0.25
#: Events that are kept, unless said otherwise: some 100 bytes each.
MAX_EVENTS = 2_000_000
HOME, CLEAR_LINE, CLEAR_BELOW = "\x1b[H", "\x1b[K", "\x1b[J"


def add_parser(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser("trace", help="show what happens inside an engine", allow_abbrev=False)
    parser.add_argument("file", nargs="?", type=Path, help="a trace that was written before (default: watch a server)")
    parser.add_argument("-p", "--prompt", action="append", help="run this text here, and trace it; given again, they run at once")
    parser.add_argument("-o", "--out", type=Path, help="write a file that ui.perfetto.dev opens")
    parser.add_argument("--summary", action="store_true", help="say where each request's time went, in ten lines")
    parser.add_argument("--lines", action="store_true", help="a line an event, as they come")
    parser.add_argument("--actor", action="append", default=[], help="events of this actor alone; may be given again")
    parser.add_argument("--request", default="", help="events of this request alone")
    parser.add_argument("--events", type=int, default=MAX_EVENTS, help=f"end after so many (default: {MAX_EVENTS})")
    parser.add_argument("--seconds", type=float, help="watch a server for so long (default: until Ctrl-C)")
    client_command.add_connection(parser)
    flags.add_model(parser)
    flags.add_sampling(parser)
    flags.add_speculation(parser)


class _Recorder:
    """Takes events in, and shows them as they come: a picture in a terminal, lines where they are wanted."""

    def __init__(self, args: argparse.Namespace, show: Write) -> None:
        self._args, self._show = args, show
        self.events: list[Event] = []
        self.view = View()
        self._is_picture = sys.stdout.isatty() and not args.lines
        self._has_drawn, self._drawn_at = False, 0.0

    def take(self, events: Sequence[Event]) -> bool:
        """Whether there is room for more."""
        wanted = [event for event in events if is_about(event, self._args.actor, self._args.request)]
        wanted = wanted[: self._args.events - len(self.events)]
        self.events += wanted
        self.view.see(wanted)
        if self._args.lines:
            self._show("".join(map(line, wanted)))
        elif self._is_picture and anyio.current_time() > self._drawn_at + REDRAW_SECONDS:
            self._draw()
        return len(self.events) < self._args.events

    def _draw(self) -> None:
        self._drawn_at = anyio.current_time()
        text = self.view.render().replace("\n", CLEAR_LINE + "\n")
        self._show(("" if self._has_drawn else "\x1b[2J") + HOME + text + CLEAR_LINE + CLEAR_BELOW + "\n")
        self._has_drawn = True

    def finish(self) -> None:
        """Writes what was asked for."""
        if self._args.out is not None:
            write(self._args.out, self.events)
        if self._args.summary:
            self._show(summary(self.events) + "\n")
        elif not self._args.lines:
            self._show((HOME if self._has_drawn else "") + self.view.render() + (CLEAR_BELOW if self._has_drawn else "") + "\n")


def line(event: Event) -> str:
    """An event: how long a message waited and took, in milliseconds, or what a figure is now."""
    match event:
        case Span(actor, message, Flow(request, number), enqueued, started, finished, outcome, computed):
            times = f"waited {(started - enqueued) / 1e6:8.3f} took {(finished - started) / 1e6:8.3f} device {computed / 1e6:8.3f}"
            return f"{request} round {number:4} {times}  {actor}: {message} {outcome}\n"
        case Stage(Flow(request, number), state, started, finished):
            return f"{request} round {number:4} {state} for {(finished - started) / 1e6:.3f}\n"
        case Notice(actor, _, text):
            return f"{actor}: {text}\n"
        case _:
            return f"{event.flow.request if event.flow is not None else '-'} {event.name} = {event.value}\n"


async def trace(args: argparse.Namespace, show: Write) -> None:
    """Does what `forerun trace` was told. Interrupted: what was seen until then is written and shown."""
    if args.file is not None and args.prompt:
        raise InvalidRequest([("--prompt", "is run, and a file is read: give one of them")])
    recorder = _Recorder(args, show)
    try:
        if args.file is not None:
            recorder.take(read(args.file))
        elif args.prompt:
            await _run(args, recorder)
        else:
            with anyio.move_on_after(args.seconds):
                await _watch(args, recorder)
    finally:
        recorder.finish()


async def _run(args: argparse.Namespace, recorder: _Recorder) -> None:
    failures: list[ForerunError] = []

    async def one(prompt: str) -> None:
        try:
            await engine.complete(prompt, **flags.options(args))
        except ForerunError as error:
            failures.append(error)

    async with flags.engine(args) as engine:
        with engine.trace() as events:
            async with anyio.create_task_group() as group:
                group.start_soon(_listen, events, recorder)
                async with anyio.create_task_group() as requests:
                    for prompt in args.prompt:
                        requests.start_soon(one, prompt)
                events.close()
    if failures:
        raise failures[0]


async def _listen(events: Any, recorder: _Recorder) -> None:
    while taken := await events.take():
        recorder.view.num_missed = events.num_missed
        if not recorder.take(taken):
            events.close()


async def _watch(args: argparse.Namespace, recorder: _Recorder) -> None:
    from forerun.client.messages import event_of

    actors = tuple(args.actor)
    async with client_command.connect(args) as client, aclosing(client.watch(actors=actors, request_id=args.request)) as responses:
        async for response in responses:
            recorder.view.num_missed = response.num_missed
            if not recorder.take(cast("list[Event]", [event_of(event) for event in response.events])):
                return
