"""A conversation, as a chat template lays it out: messages, tools that may be called, and what else the template is told.

Messages and tools have the form of OpenAI's API (platform.openai.com/docs/api-reference/chat), which chat templates are written for
(transformers, `utils/chat_template_utils.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NotRequired, TypedDict, cast

from .checks import check_text, json_of
from .errors import InvalidRequest

#: who may speak in a chat
ROLES = ("system", "user", "assistant", "tool")
#: messages a chat may have, tools it may offer, and violations that are looked for: what somebody else sends must not keep others waiting
MAX_MESSAGES, MAX_TOOLS, MAX_VIOLATIONS = 4096, 512, 32
#: JSON values that a chat's tools, arguments and template variables may have in all, and how deep they may lie in each other
MAX_VALUES, MAX_DEPTH = 50_000, 32
#: what a template is told by us
RESERVED = ("messages", "tools", "add_generation_prompt")


class Function(TypedDict):
    """What a tool call names. `arguments` is a JSON object, or its text."""

    name: str
    arguments: str | dict[str, Any]


class ToolCall(TypedDict):
    """A call that the model asked for."""

    id: NotRequired[str]
    type: NotRequired[str]  # "function"
    function: Function


class Message(TypedDict):
    """One message of a chat."""

    role: str
    content: str
    reasoning_content: NotRequired[str]  # what an assistant thought before it said that
    tool_calls: NotRequired[list[ToolCall]]  # and whom it asked
    tool_call_id: NotRequired[str]  # what a tool's answer is to
    name: NotRequired[str]  # whose it is


@dataclass(frozen=True, slots=True)
class Chat:
    """Messages to answer. `tools` are JSON objects like {"type": "function", "function": {"name": ..., "description": ..., "parameters":
    JSON schema}}; `template_kwargs` are variables that the model's template knows, as {"enable_thinking": False}."""

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] = ()
    template_kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])


def check_chat(chat: Chat) -> Chat:
    """The same, arguments of tool calls as objects; InvalidRequest lists what is wrong with its form, under the names that a prompt's
    messages have."""
    messages, tools, variables = cast("tuple[object, object, object]", (chat.messages, chat.tools, chat.template_kwargs))
    look = _Look()
    found: list[Message] = []
    for i, message in enumerate(look.several("prompt", messages, MAX_MESSAGES)):
        found.append(cast(Message, look.message(f"prompt[{i}]", message)))
        if len(look.violations) > MAX_VIOLATIONS:
            break
    if not found:
        look.violations.append(("prompt", "must have messages"))
    offered = [look.tool(f"tools[{i}]", tool) for i, tool in enumerate(look.several("tools", tools, MAX_TOOLS))]
    told = look.object("template_kwargs", variables)
    look.violations += [(f"template_kwargs.{name}", "cannot be set") for name in RESERVED if name in told]
    if look.violations:
        raise InvalidRequest(look.violations[: MAX_VIOLATIONS + 1])
    return Chat(found, offered, told)


class _Look:
    """Looks at one chat, and counts what there is."""

    def __init__(self) -> None:
        self.violations: list[tuple[str, str]] = []
        self._num_values = 0

    def several(self, name: str, given: object, most: int) -> Sequence[object]:
        if not isinstance(given, Sequence) or isinstance(given, str | bytes | bytearray):
            self.violations.append((name, "must be a list"))
            return ()
        several = cast("Sequence[object]", given)
        if len(several) > most:
            self.violations.append((name, f"must be at most {most}"))
            return ()
        return several

    def message(self, path: str, given: object) -> dict[str, Any]:
        if not isinstance(given, Mapping):
            self.violations.append((path, "must be a message"))
            return {}
        message = cast("Mapping[str, object]", given)
        if message.get("role") not in ROLES:
            self.violations.append((f"{path}.role", f"must be one of {', '.join(ROLES)}"))
        unknown = [key for key in message if key not in Message.__annotations__]
        self.violations += [(f"{path}.{key}"[:200], "is not part of a message") for key in unknown[:MAX_VIOLATIONS]]
        texts = [key for key in message if key not in ("tool_calls", *unknown)]
        for key in dict.fromkeys(["content", *texts]):
            self.violations += check_text(f"{path}.{key}", message.get(key))
        found: dict[str, Any] = {key: message[key] for key in texts}
        if "tool_calls" in message:
            calls = enumerate(self.several(f"{path}.tool_calls", message["tool_calls"], MAX_TOOLS))
            found["tool_calls"] = [self._call(f"{path}.tool_calls[{i}]", call) for i, call in calls]
        return found

    def tool(self, path: str, given: object) -> dict[str, Any]:
        tool = self.object(path, given)
        function: object = tool.get("function")
        if tool.get("type") != "function" or not isinstance(function, dict):
            self.violations.append((path, 'must be {"type": "function", "function": {...}}'))
        elif not isinstance(cast("dict[str, Any]", function).get("name"), str):
            self.violations.append((f"{path}.function.name", "must be text"))
        return tool

    def _call(self, path: str, given: object) -> dict[str, Any]:
        call = self.object(path, given)
        function: object = call.get("function")
        if not isinstance(function, dict):
            self.violations.append((f"{path}.function", "must be an object with a name and arguments"))
            return call
        name, arguments = (cast("dict[str, object]", function).get(key) for key in ("name", "arguments"))
        self.violations += check_text(f"{path}.function.name", name)
        if isinstance(arguments, str):
            arguments = json_of(arguments or "{}")
        return call | {"type": "function", "function": {"name": name, "arguments": self.object(f"{path}.function.arguments", arguments)}}

    def object(self, path: str, given: object) -> dict[str, Any]:
        """A JSON object, as plain dictionaries and lists; empty if it is none."""
        if not isinstance(given, Mapping):
            self.violations.append((path, "must be an object"))
            return {}
        try:
            return self._value(cast("Mapping[str, object]", given), MAX_DEPTH)
        except ValueError as error:
            self.violations.append((path, str(error)))
            return {}

    def _value(self, given: object, depth: int) -> Any:
        self._num_values += 1
        if self._num_values > MAX_VALUES:
            raise ValueError(f"must have, with all else in the chat, at most {MAX_VALUES} values")
        if depth == 0:
            raise ValueError(f"must be at most {MAX_DEPTH} deep")
        if given is None or isinstance(given, bool | int):
            return given
        if isinstance(given, float) and given - given == 0:  # neither infinite nor NaN
            return given
        if isinstance(given, str):
            if wrong := check_text("", given):
                raise ValueError(wrong[0][1])
            return given
        if isinstance(given, Mapping):
            items = cast("Mapping[object, object]", given).items()
            if not all(isinstance(key, str) for key, _ in items):
                raise ValueError("must have keys that are text")
            return {self._value(key, depth): self._value(value, depth - 1) for key, value in items}
        if isinstance(given, list | tuple):
            return [self._value(value, depth - 1) for value in cast("Sequence[object]", given)]
        raise ValueError("must hold JSON values only")
