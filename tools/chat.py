"""forerun chat: a conversation in the terminal."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio

from .. import Chat, DeadlineExceeded, InvalidRequest, Message, RequestFailed, Result, Stream
from . import flags


def add_parser(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser("chat", help="talk with a model", allow_abbrev=False)
    flags.add_model(parser)
    flags.add_sampling(parser)
    flags.add_speculation(parser)
    flags.option(parser, "--system", help="what the model is told before the conversation")
    flags.add_template(parser)


async def chat(args: argparse.Namespace, write: Callable[[str], Any], figures: Callable[[Result], str]) -> None:
    """A line from standard input is one thing said, until its end; `/clear` begins anew, and Ctrl-C ends an answer. What is known of the
    conversation is not computed again. What cannot be answered is said, and forgotten."""
    beginning: list[Message] = [Message(role="system", content=args.system)] if args.system else []
    messages = list(beginning)
    is_terminal = sys.stdin.isatty()
    async with flags.engine(args) as engine:
        while True:
            if is_terminal:  # a thread that reads would have to be waited for at the end
                write("> ")
                await anyio.wait_readable(sys.stdin)
            line = sys.stdin.readline()
            if not line:
                return
            said = line.rstrip("\n")
            if said == "/clear":
                messages = list(beginning)
            elif said.strip():
                messages.append(Message(role="user", content=said))
                try:
                    stream = engine.generate(Chat(messages, (), args.chat_template_kwargs), **flags.options(args))
                    async with stream, _interruptible(stream):
                        async for delta in stream:
                            write(delta.text)
                except (InvalidRequest, DeadlineExceeded, RequestFailed) as error:
                    messages.pop()
                    sys.stderr.write(f"forerun: {error} (/clear begins anew)\n")
                    continue
                write("\n")
                messages.append(Message(role="assistant", content=stream.result.text))
                if is_terminal:
                    sys.stderr.write(figures(stream.result) + "\n")


@asynccontextmanager
async def _interruptible(stream: Stream) -> AsyncGenerator[None]:
    """Inside the block Ctrl-C ends the answer, and not the program."""

    async def wait() -> None:
        with anyio.open_signal_receiver(signal.SIGINT) as signals:
            async for _ in signals:
                stream.cancel()

    failure: BaseException | None = None
    async with anyio.create_task_group() as group:
        group.start_soon(wait)
        try:
            yield
        except anyio.get_cancelled_exc_class():
            raise
        except BaseException as error:  # carried out of the task group by hand, which would wrap it
            failure = error
        group.cancel_scope.cancel()
    if failure is not None:
        raise failure
