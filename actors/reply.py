"""What an answer to a chat says, told apart while it comes: thoughts, content, and calls of tools.

They are marked as the family's chat templates ask for: `<think>...</think>` first, and any number of `<tool_call>...</tool_call>`, which
hold `<function=NAME><parameter=KEY>value</parameter>...</function>` (Qwen3-Coder, Qwen3.5), or a JSON object of name and arguments
(Qwen3-Next).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from ..core.chat import Message

THINK, END_THINK = "<think>", "</think>"
CALL, END_CALL = "<tool_call>", "</tool_call>"
FUNCTION, END_FUNCTION = "<function=", "</function>"
PARAMETER, END_PARAMETER = "<parameter=", "</parameter>"
#: how a call ends whose last text the model has not closed
UNCLOSED = "\n</function>\n</tool_call>"


_DECODER = json.JSONDecoder()


@dataclass(frozen=True, slots=True)
class Reasoning:
    """More of what the model thinks before it answers."""

    text: str


@dataclass(frozen=True, slots=True)
class Content:
    """More of the answer itself."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegun:
    """The answer's call number `index`, from 0, is one of this tool."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of a call's arguments, which together are the text of a JSON object; a part of one if the answer ends in their midst."""

    index: int
    text: str


ReplyPiece = Reasoning | Content | CallBegun | CallArguments


class ReplyParser:
    """Takes the text of an answer in pieces, cut anywhere, and says what they are. `tools` are those of the chat: without any, calls are
    content; their JSON schemas say which arguments are texts. `opens_reasoning` is what `Stream.started` says. Blanks around thoughts and
    calls are nobody's; what looks like a call and is none is content. After `most_calls` nothing is heard any more."""

    def __init__(self, tools: Iterable[Mapping[str, Any]] = (), opens_reasoning: bool = False, most_calls: int | None = None) -> None:
        functions = [cast("Mapping[str, Any]", tool["function"]) for tool in tools]
        self._schemas = {str(function["name"]): function.get("parameters") for function in functions}
        self._held, self._is_last, self._most_calls = "", False, most_calls
        self._pieces: list[ReplyPiece] = []
        self._step: Callable[[], bool] = self._reasoning if opens_reasoning else self._content
        self._may_think = not opens_reasoning  # nothing but blanks has come
        self._skips_blanks = opens_reasoning  # those that come next
        self._if_no_call = ""  # what belongs to the content if no call follows it
        self._num_parameters, self._types = 0, set[str]()
        self._reasoning_text, self._content_text = "", ""
        self._calls: list[tuple[str, str]] = []

    def push(self, text: str) -> list[ReplyPiece]:
        """What this text says, as far as that is certain."""
        self._held += text
        while self._step():
            pass
        pieces, self._pieces = self._pieces, []
        return pieces

    def end(self) -> list[ReplyPiece]:
        """What is left to say, when nothing follows."""
        self._is_last = True
        return self.push("")

    @property
    def is_over(self) -> bool:
        """Whether all calls that are heard have ended."""
        return len(self._calls) == self._most_calls and self._step in (self._content, self._called)

    @property
    def num_calls(self) -> int:
        """Calls that have begun."""
        return len(self._calls)

    def message(self, call_ids: Sequence[str] = ()) -> Message:
        """All that was said, as a chat goes on from it. Calls that `call_ids` has no names for are numbered."""
        message = Message(role="assistant", content=self._content_text)
        if self._reasoning_text:
            message["reasoning_content"] = self._reasoning_text
        if self._calls:
            ids = [*call_ids, *(f"call_{i}" for i in range(len(call_ids), len(self._calls)))]
            message["tool_calls"] = [
                {"id": each, "type": "function", "function": {"name": name, "arguments": arguments}}
                for each, (name, arguments) in zip(ids, self._calls, strict=False)
            ]
        return message

    # One function for each place in an answer: it takes what it can of what is held, and returns whether the next may go on

    def _reasoning(self) -> bool:
        found, text = self._until((END_THINK,), str.rstrip)
        self._say(Reasoning, text.rstrip() if found or self._is_last else text)
        if found:
            self._step, self._skips_blanks = self._content, True
        return bool(found)

    def _content(self) -> bool:
        if len(self._calls) == self._most_calls:
            self._held = ""
            return False
        markers = ((THINK,) if self._may_think else ()) + ((CALL,) if self._schemas else ())
        found, text = self._until(markers, str.rstrip)
        if found == THINK and text.strip():  # a thought would have been first
            found, text = "", text + THINK
            self._say(Content, text)
            return True
        said = text.rstrip() if found else text
        self._say(Content, said)
        if found == THINK:
            self._step, self._skips_blanks, self._may_think = self._reasoning, True, False
        elif found:
            self._step, self._if_no_call = self._call, text[len(said) :] + CALL
        return bool(found)

    def _call(self) -> bool:
        held = self._held.lstrip()
        name, end, rest = held.removeprefix(FUNCTION).partition(">")
        if held.startswith(FUNCTION) and end and name == name.strip() and "\n" not in name and name:
            self._begin(name)
            self._held, self._step = rest, self._parameters
        elif held.startswith("{"):
            self._step = self._json
        elif self._is_last or not (FUNCTION.startswith(held) or (held.startswith(FUNCTION) and not end and "\n" not in name)):
            return self._no_call()
        else:
            return False
        return True

    def _no_call(self) -> bool:
        """What stands after the marker is content, and so is the marker."""
        self._say(Content, self._if_no_call)
        self._step = self._content
        return True

    def _json(self) -> bool:
        held = self._held.lstrip()
        if END_CALL not in held:
            return self._no_call() if self._is_last else False
        try:
            call, end = _DECODER.raw_decode(held)
            name, arguments, rest = call["name"], call.get("arguments", {}), held[end:].lstrip()
            if END_CALL.startswith(rest) and rest != END_CALL and not self._is_last:
                return False
            if not isinstance(name, str) or not isinstance(arguments, dict) or not rest.startswith(END_CALL):
                raise TypeError
            written, _ = _json_text(cast(object, arguments)), _json_text(name)
        except json.JSONDecodeError as error:
            # A text in it may have that marker as well.
            return False if _is_cut(error) and not self._is_last else self._no_call()
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return self._no_call()
        self._begin(name)
        self._argue(written)
        self._held, self._step, self._skips_blanks = rest.removeprefix(END_CALL), self._content, True
        return True

    def _parameters(self) -> bool:
        found, _ = self._until((PARAMETER, END_FUNCTION, END_CALL), str.rstrip)
        if found == PARAMETER:
            self._step = self._named
        elif found:
            self._argue("}" if self._num_parameters else "{}")
            self._step, self._skips_blanks = (self._called if found == END_FUNCTION else self._content), True
        return bool(found)

    def _named(self) -> bool:
        key, end, rest = self._held.partition(">")
        if end:
            self._types = types_of(self._schemas.get(self._calls[-1][0]), key)
            self._argue(("{" if not self._num_parameters else ", ") + json.dumps(key, ensure_ascii=False) + ": ")
            self._num_parameters += 1
            if self._types == {"string"}:
                self._argue('"')
            self._held, self._step = rest, self._first_line
        return bool(end)

    def _first_line(self) -> bool:
        if self._held:
            self._held, self._step = self._held.removeprefix("\n"), self._value
        return bool(self._held)

    def _value(self) -> bool:
        if self._types == {"string"}:  # it can be told before it is whole
            found, text = self._until((END_PARAMETER, UNCLOSED), lambda text: text.removesuffix("\n"))
            self._argue(json.dumps(text.removesuffix("\n") if found else text, ensure_ascii=False)[1:-1] + ('"' if found else ""))
        else:
            ends = [(at, marker) for marker in (END_PARAMETER, PARAMETER, END_FUNCTION) if (at := self._held.find(marker)) >= 0]
            at, found = min(ends, default=(0, ""))
            if found and (whole := _json_length(self._held, self._is_last)) > at:  # a text in it has a marker
                at = self._held.find(END_PARAMETER, whole)
                found = END_PARAMETER if at >= 0 else ""
            if found:
                self._argue(_value_of(self._held[:at].removesuffix("\n"), self._types))
                self._held = self._held[at + len(found) :]
        if found:
            self._held = ("" if found == END_PARAMETER else found) + self._held  # what else it ends with is still to be seen
            self._step = self._parameters
        return bool(found)

    def _called(self) -> bool:
        """After a function's end: that of the call, or, though nobody asked for it, one more function."""
        held = self._held.lstrip()
        if held.startswith(END_CALL):
            self._held, self._step = held.removeprefix(END_CALL), self._content
        elif held.startswith(FUNCTION) and len(self._calls) != self._most_calls:
            self._step, self._if_no_call = self._call, ""
        elif self._is_last or not (END_CALL.startswith(held) or FUNCTION.startswith(held)):
            self._step = self._content
        else:
            return False
        return True

    # What they share

    def _until(self, markers: tuple[str, ...], trimmed: Callable[[str], str]) -> tuple[str, str]:
        """The first of `markers` in what is held, or none, and the text before it. Without one, what may be the beginning of one stays
        held, and so does what `trimmed` takes off the text before that, until nothing follows."""
        found = [(at, marker) for marker in markers if (at := self._held.find(marker)) >= 0]
        if found:
            at, marker = min(found)
            text, self._held = self._held[:at], self._held[at + len(marker) :]
            return marker, text
        size = len(self._held)
        if not self._is_last:
            longest = max(map(len, markers), default=1) - 1
            size -= next((n for n in range(min(longest, size), 0, -1) if any(each.startswith(self._held[-n:]) for each in markers)), 0)
            size = len(trimmed(self._held[:size])) if markers else size
        text, self._held = self._held[:size], self._held[size:]
        return "", text

    def _say(self, kind: type[Reasoning] | type[Content], text: str) -> None:
        if self._skips_blanks:
            text = text.lstrip()
        if not text:
            return
        self._skips_blanks = False
        if text.strip():
            self._may_think = False
        if kind is Reasoning:
            self._reasoning_text += text
        else:
            self._content_text += text
        before = self._pieces[-1] if self._pieces else None
        if isinstance(before, Reasoning | Content) and isinstance(before, kind):
            self._pieces[-1] = kind(before.text + text)
        else:
            self._pieces.append(kind(text))

    def _begin(self, name: str) -> None:
        self._may_think, self._num_parameters = False, 0
        self._pieces.append(CallBegun(len(self._calls), name))
        self._calls.append((name, ""))

    def _argue(self, text: str) -> None:
        if not text:
            return
        name, arguments = self._calls[-1]
        self._calls[-1] = name, arguments + text
        before = self._pieces[-1] if self._pieces else None
        if isinstance(before, CallArguments):
            self._pieces[-1] = CallArguments(before.index, before.text + text)
        else:
            self._pieces.append(CallArguments(len(self._calls) - 1, text))


#: parts of a schema that are looked at
MAX_LOOKS = 1000
#: what a schema is made of, or may be instead
ALTERNATIVES = ("allOf", "anyOf", "oneOf")
#: the JSON type of a value
TYPES: dict[type, str] = {
    bool: "boolean", int: "integer", float: "number", type(None): "null", dict: "object", list: "array",
}  # fmt: skip


def types_of(schema: object, key: str) -> set[str]:
    """The JSON types that a schema allows for a property; a text if it does not say."""
    for part in _parts(schema, schema):
        properties = part.get("properties")
        if isinstance(properties, Mapping) and key in properties:
            return types_in(cast("Mapping[str, object]", properties)[key], schema) or {"string"}
    return {"string"}


def types_in(schema: object, root: object) -> set[str]:
    """The JSON types that a schema, a part of `root`, allows, as far as it says."""
    found = set[str]()
    for part in _parts(schema, root):
        kind = part.get("type")
        here = {name for name in (several(cast(object, kind)) if isinstance(kind, list) else [kind]) if isinstance(name, str)}
        if not here and not any(several(part.get(word)) for word in ALTERNATIVES):
            here = {TYPES.get(type(value), "string") for value in values_of(part)}
            here |= {name for word, name in (("properties", "object"), ("items", "array")) if word in part}
        found |= here
    return found


def _parts(schema: object, root: object) -> Iterator[Mapping[str, object]]:
    """A schema, what it refers to in `root`, once each, and what it is made of or may be instead, from the outside in."""
    found, seen = [schema], set[str]()
    for i in range(MAX_LOOKS):
        if i == len(found):
            return
        part = found[i]
        if not isinstance(part, Mapping):
            continue
        given = cast("Mapping[str, object]", part)
        yield given
        reference = given.get("$ref")
        if isinstance(reference, str) and reference.startswith("#/") and reference not in seen:
            seen.add(reference)
            found.append(at_path(root, reference.split("/")[1:]))
        found += [one for word in ALTERNATIVES for one in several(given.get(word))]


def values_of(schema: Mapping[str, object]) -> list[object]:
    """Those that a schema names, of which a value has to be one."""
    return several(schema.get("enum")) or ([schema["const"]] if "const" in schema else [])


def at_path(schema: object, path: Sequence[str]) -> object:
    """What lies in a schema along a path, if anything does."""
    for name in path:
        schema = cast("Mapping[str, object]", schema).get(name) if isinstance(schema, Mapping) else None
    return schema


def several(value: object) -> list[object]:
    return cast("list[object]", value) if isinstance(value, list) else []


def _value_of(text: str, types: set[str]) -> str:
    """The JSON text of a value as models write it: a JSON value if it can be one of the types, else a text."""
    plain = text.strip()
    if "boolean" in types and plain.lower() in ("true", "false"):
        return plain.lower()
    if "null" in types and plain.lower() in ("null", "none"):
        return "null"
    if "string" not in types:
        try:
            return _json_text(json.loads(plain))
        except (ValueError, RecursionError):
            pass
    return json.dumps(text, ensure_ascii=False)


def _json_length(text: str, is_whole: bool) -> int:
    """Up to where a text is a JSON value: 0 if it does not begin with one, and all of it if one may be cut off at its end."""
    try:
        return _DECODER.raw_decode(text, len(text) - len(text.lstrip()))[1]
    except json.JSONDecodeError as error:
        return 0 if is_whole or not _is_cut(error) else len(text)
    except (ValueError, RecursionError):  # a number of too many digits, or brackets without end
        return 0


def _is_cut(error: json.JSONDecodeError) -> bool:
    """Whether more text could make JSON of it."""
    return error.msg.startswith("Unterminated string") or error.pos == len(error.doc)


def _json_text(value: object) -> str:
    """ValueError where it has no such text that can be sent: for numbers that are none, and lone surrogates."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    text.encode()
    return text
