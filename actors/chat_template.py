"""The one place that renders chat templates. They come from model files and are not trusted: see chat_template_worker.py."""

from __future__ import annotations

import json
import re
import secrets
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import anyio
from anyio.abc import Process
from anyio.streams.buffered import BufferedByteReceiveStream

from ..core.chat import Chat
from ..core.errors import InvalidRequest, RequestFailed

TEMPLATE_CHARACTERS = 1_000_000
DEADLINE_SECONDS = 10.0
#: More than a line of the worker's OUTPUT_CHARACTERS can have.
ANSWER_BYTES = 2**27
WORKER = str(Path(__file__).with_name("chat_template_worker.py"))
#: With which it ends that had too little memory.
OUT_OF_MEMORY = 3


class Renderers:
    """Processes that render, as many as are asked at once, kept for the next chat: to start one takes longer than all it does."""

    def __init__(self) -> None:
        self._idle = list[Process]()

    async def close(self) -> None:
        with anyio.CancelScope(shield=True):
            for process in self._idle:
                await _end(process)
        self._idle.clear()

    async def render(self, template: str, chat: Chat, specials: list[str]) -> list[tuple[bool, str]]:
        """The rendered chat, whose form was checked, as parts: (True, text in which `specials` are special) and (False, user text that only
        looks like one). Raises InvalidRequest when the template refuses, fails or exceeds its limits, RequestFailed when no process could
        be had. Cancelled: the process is killed."""
        asked = _Question(template, chat, specials)
        return asked.parts(await self._ask(asked.job))

    async def _ask(self, job: dict[str, Any]) -> dict[str, str]:
        while self._idle and self._idle[-1].returncode is not None:
            await _end(self._idle.pop())
        try:
            process = (
                self._idle.pop() if self._idle else await anyio.open_process([sys.executable, "-P", WORKER], stderr=subprocess.DEVNULL)
            )
        except OSError as error:
            raise RequestFailed("the chat template's process could not be run") from error
        assert process.stdin is not None
        assert process.stdout is not None
        answer: dict[str, str] | None = None
        try:
            with anyio.move_on_after(DEADLINE_SECONDS):
                try:
                    await process.stdin.send(json.dumps(job).encode() + b"\n")
                    answer = json.loads(await BufferedByteReceiveStream(process.stdout).receive_until(b"\n", ANSWER_BYTES))
                except (anyio.BrokenResourceError, anyio.IncompleteRead):
                    if (code := await process.wait()) > 0 and code != OUT_OF_MEMORY:  # below zero: killed by a limit
                        raise RequestFailed(f"the chat template's process ended with {code}") from None
                except anyio.DelimiterNotFound:
                    pass
        finally:
            if answer is not None:
                self._idle.append(process)
            else:
                with anyio.CancelScope(shield=True):
                    await _end(process)
        return answer or {"error": "exceeded its time or memory"}


async def _end(process: Process) -> None:
    with suppress(ProcessLookupError):
        process.kill()
    await process.aclose()


class _Question:
    """What a process is told, and what its answer means."""

    def __init__(self, template: str, chat: Chat, specials: list[str]) -> None:
        if len(template) > TEMPLATE_CHARACTERS:
            raise InvalidRequest([("chat_template", f"is longer than {TEMPLATE_CHARACTERS} characters")])
        # User text that spells a special token travels as a mark nobody can guess, and comes back as plain text.
        self._nonce, self._found = secrets.token_hex(8), list[str]()
        lookalike = re.compile("|".join(map(re.escape, specials)) or r"(?!)")
        given = {"messages": chat.messages, **({"tools": chat.tools} if chat.tools else {}), **chat.template_kwargs}
        variables = _mapped(given, lambda text: lookalike.sub(self._hide, text))
        self.job: dict[str, Any] = {"template": template, "variables": {**variables, "add_generation_prompt": True}}

    def _hide(self, match: re.Match[str]) -> str:
        self._found.append(match[0])
        return f"\ue000{self._nonce}-{len(self._found) - 1}\ue001"

    def parts(self, answer: dict[str, str]) -> list[tuple[bool, str]]:
        text, problem = answer.get("text"), answer.get("error", "")
        mark = re.compile(f"\ue000{self._nonce}-(\\d+)\ue001")
        if text is not None and self._nonce in mark.sub("", text).lower():
            text, problem = None, "changes text that looks like a special token"
        if text is None:
            raise InvalidRequest([("chat_template", problem)])
        parts = mark.split(text)
        return [(i % 2 == 0, self._found[int(part)] if i % 2 else part) for i, part in enumerate(parts) if part]


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """A JSON value with all its texts changed, names too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(name): _mapped(each, change) for name, each in cast("dict[str, Any]", value).items()}
    if isinstance(value, list | tuple):
        return [_mapped(each, change) for each in cast("list[Any]", value)]
    return value
