"""forerun chat: a conversation in the terminal."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import anyio

from .. import Chat, InvalidRequest, Message, Result
from . import flags


def add_parser(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser("chat", help="talk with a model", allow_abbrev=False)
    flags.add_model(parser)
    flags.add_sampling(parser)
    flags.add_speculation(parser)
    flags.option(parser, "--system", help="what the model is told before the conversation")
    flags.add_template(parser)


async def chat(args: argparse.Namespace, write: Callable[[str], Any], figures: Callable[[Result], str]) -> None:
    """A line from standard input is one thing said, until its end; `/clear` begins anew. What is known of the conversation is not computed
    again. What cannot be answered is said, and forgotten."""
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
                    async with engine.generate(Chat(messages, (), args.chat_template_kwargs), **flags.options(args)) as stream:
                        async for delta in stream:
                            write(delta.text)
                except InvalidRequest as error:
                    messages.pop()
                    sys.stderr.write(f"forerun: {error} (/clear begins anew)\n")
                    continue
                write("\n")
                messages.append(Message(role="assistant", content=stream.result.text))
                if is_terminal:
                    sys.stderr.write(figures(stream.result) + "\n")
