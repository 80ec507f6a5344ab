"""The one place that renders chat templates. They come from model files and are not trusted: see chat_template_worker.py."""

from __future__ import annotations

import json
import re
import secrets
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import anyio

from ..core.chat import Chat
from ..core.errors import InvalidRequest, RequestFailed

TEMPLATE_CHARACTERS = 1_000_000
DEADLINE_SECONDS = 10.0


async def render(template: str, chat: Chat, specials: list[str]) -> list[tuple[bool, str]]:
    """The rendered chat, whose form was checked, as parts: (True, text in which `specials` are special) and (False, user text that only
    looks like one).
    Raises InvalidRequest when the template refuses, fails or exceeds its limits. Cancelled: the process is killed."""
    if len(template) > TEMPLATE_CHARACTERS:
        raise InvalidRequest([("chat_template", f"is longer than {TEMPLATE_CHARACTERS} characters")])
    # User text that spells a special token travels as a mark nobody can guess, and comes back as plain text.
    nonce, found = secrets.token_hex(8), list[str]()

    def hide(match: re.Match[str]) -> str:
        found.append(match[0])
        return f"\ue000{nonce}-{len(found) - 1}\ue001"

    lookalike = re.compile("|".join(map(re.escape, specials)) or r"(?!)")
    given = {"messages": chat.messages, **({"tools": chat.tools} if chat.tools else {}), **chat.template_kwargs}
    variables = _mapped(given, lambda text: lookalike.sub(hide, text))
    job = {"template": template, "variables": {**variables, "add_generation_prompt": True}}
    worker = str(Path(__file__).with_name("chat_template_worker.py"))
    text: str | None = None
    problem = "exceeded its time or memory"
    with anyio.move_on_after(DEADLINE_SECONDS):
        try:
            done = await anyio.run_process([sys.executable, "-P", worker], input=json.dumps(job).encode(), check=False)
        except (OSError, anyio.BrokenResourceError) as error:
            raise RequestFailed("the chat template's process could not be run") from error
        if done.returncode == 0:
            answer: dict[str, str] = json.loads(done.stdout)
            text, problem = answer.get("text"), answer.get("error", problem)
        elif done.returncode > 0 and b"MemoryError" not in done.stderr:  # below zero: killed by a limit
            raise RequestFailed(f"the chat template's process failed: {done.stderr.decode(errors='replace')[-500:]}")
    mark = re.compile(f"\ue000{nonce}-(\\d+)\ue001")
    if text is not None and nonce in mark.sub("", text).lower():
        text, problem = None, "changes text that looks like a special token"
    if text is None:
        raise InvalidRequest([("chat_template", problem)])
    parts = mark.split(text)
    return [(i % 2 == 0, found[int(part)] if i % 2 else part) for i, part in enumerate(parts) if part]


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """A JSON value with all its texts changed, names too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(name): _mapped(each, change) for name, each in cast("dict[str, Any]", value).items()}
    if isinstance(value, list | tuple):
        return [_mapped(each, change) for each in cast("list[Any]", value)]
    return value
