"""The words of OpenAI's API (platform.openai.com/docs/api-reference: chat, completions) as ours, and back."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from ...core.chat import MAX_MESSAGES, Chat, Message
from ...core.errors import InvalidRequest
from ...core.vocabulary import Prompt
from ..stream import Options

#: fields that are an option of ours by the same name
SAME = ("temperature", "top_p", "top_k", "min_p", "seed", "presence_penalty", "frequency_penalty", "repetition_penalty", "stop",
        "ignore_eos", "cache_salt", "json_schema", "regex", "grammar")  # fmt: skip
#: fields that say nothing to this server: who asks, and what is kept
IGNORED = ("model", "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "stream", "stream_options")
#: fields that are refused unless they have one of these values, since another would not be heeded
ONLY: dict[str, tuple[Any, ...]] = {
    "best_of": (1,), "echo": (False,), "suffix": ("",), "functions": ([],),
    "function_call": ("none", "auto"), "skip_special_tokens": (True,),
    "cache_prompt": (True,), "min_tokens": (0,), "modalities": (["text"],),
}  # fmt: skip
#: fields of a chat only
CHAT = (
    "messages",
    "max_completion_tokens",
    "top_logprobs",
    "tools",
    "parallel_tool_calls",
    "chat_template_kwargs",
    "reasoning_effort",
    "response_format",
    "tool_choice",
)
#: fields of a message that are told the chat template, if they are there
MESSAGE = ("reasoning_content", "tool_calls", "tool_call_id", "name")
#: fields that may be -1, for what is so unless it is said
UNLIMITED = ("max_tokens", "max_completion_tokens", "top_k", "seed")
#: answers that one call may have: as many as its prompts, `n` times
MAX_CHOICES = 128


@dataclass(frozen=True, slots=True)
class Asked:
    """A request as it was understood: `number` answers to each of `prompts`. `wants_usage`: a stream ends with what it took."""

    prompts: tuple[Prompt, ...]
    number: int
    options: Options
    is_chat: bool
    is_streamed: bool
    wants_usage: bool
    most_calls: int | None  # of tools
    must_call: str | None  # see _must_call
    names: Mapping[str, str]  # what our checks call a field -> the field


def asked(body: object, is_chat: bool) -> Asked:
    """InvalidRequest lists everything that is wrong with the form of a request; the engine checks values."""
    if not isinstance(body, dict):
        raise InvalidRequest([("body", "must be a JSON object")])
    fields = {
        name: value for name, value in cast("dict[str, Any]", body).items() if value is not None and not (name in UNLIMITED and value == -1)
    }
    options: dict[str, Any] = {name: fields[name] for name in SAME if name in fields}
    own = CHAT if is_chat else ("prompt",)
    known = {*SAME, *IGNORED, *own, "n", "max_tokens", "logprobs", "logit_bias", "stop_token_ids"}
    violations = [
        (name[:100], "is not supported" + (" with this value" if name in ONLY else ""))
        for name in fields.keys() - known
        if fields[name] not in ONLY.get(name, ())
    ]
    names = {"stop_ids": "stop_token_ids", "prompt": "messages" if is_chat else "prompt", "template_kwargs": "chat_template_kwargs"}
    names |= {"num_logprobs": "top_logprobs" if is_chat else "logprobs"}
    names |= {"max_tokens": "max_completion_tokens"} if "max_completion_tokens" in fields else {}
    options["max_tokens"] = fields.get("max_completion_tokens", fields.get("max_tokens"))
    options["stop_ids"] = _integers(fields, "stop_token_ids", violations)
    bias = fields.get("logit_bias", {})
    try:
        options["logit_bias"] = {int(token): value for token, value in bias.items()}
    except (AttributeError, TypeError, ValueError):
        violations.append(("logit_bias", "must be an object of token ids and biases"))
    switches = ("stream", "ignore_eos", "logprobs", "parallel_tool_calls") if is_chat else ("stream", "ignore_eos")
    violations += [(name, "must be true or false") for name in switches if not isinstance(fields.get(name, False), bool)]
    stop = fields.get("stop", [])
    if not isinstance(stop, str | list):
        violations.append(("stop", "must be a text, or a list of texts"))
    must_call: str | None = None
    if is_chat:
        chat, must_call = _chat(fields, options, names, violations)
        prompts: tuple[Prompt, ...] = (chat,)
    else:
        options["num_logprobs"] = fields.get("logprobs")
        prompts = _prompts(fields.get("prompt"), violations)
    number = fields.get("n", 1)
    if type(number) is not int or not 1 <= number * len(prompts) <= MAX_CHOICES:
        violations.append(("n", f"must be a whole number from 1 on, and with so many prompts at most {MAX_CHOICES} answers"))
    streaming = fields.get("stream_options", {})
    if not isinstance(streaming, dict):
        violations.append(("stream_options", "must be an object"))
        streaming = {}
    if violations:
        raise InvalidRequest(sorted(violations))
    most_calls = 1 if fields.get("parallel_tool_calls") is False else None
    wants_usage = cast("dict[str, Any]", streaming).get("include_usage") is True
    return Asked(prompts, number, cast(Options, options), is_chat, bool(fields.get("stream")), wants_usage, most_calls, must_call, names)


def _chat(
    fields: Mapping[str, Any], options: dict[str, Any], names: dict[str, str], violations: list[tuple[str, str]]
) -> tuple[Chat, str | None]:
    """The prompt of a chat, and what _must_call says; what else a chat says goes into `options`, and what is wrong into `violations`."""
    if (schema := _schema(fields.get("response_format", {"type": "text"}), violations)) is not None:
        violations += [("response_format", "does not go with json_schema")] if "json_schema" in options else []
        options["json_schema"], names["json_schema"] = schema, "response_format"
    options["num_logprobs"] = fields.get("top_logprobs", 0) if fields.get("logprobs") else None
    choice = fields.get("tool_choice", "auto")
    tools: Any = fields.get("tools", []) if choice != "none" else []
    must_call = _must_call(choice, violations)
    if must_call is not None:
        others = [name for name in ("json_schema", "regex", "grammar", "ignore_eos") if fields.get(name)]
        violations += [("tool_choice", f"does not go with {name}") for name in others]
        names["grammar"] = "tool_choice"
        options.pop("json_schema", None)  # a call has a form of its own
    told: Any = fields.get("chat_template_kwargs", {})
    if "reasoning_effort" in fields and isinstance(told, dict):  # templates that know it heed it
        told = {"reasoning_effort": fields["reasoning_effort"], **cast("dict[str, Any]", told)}
    return Chat(_messages(fields.get("messages"), violations), tools, told), must_call


def with_names(error: InvalidRequest, asked: Asked) -> InvalidRequest:
    """The same violations, by the names that fields have here."""
    violations: list[tuple[str, str]] = []
    for field, why in error.violations:
        name = re.split(r"\W", field, maxsplit=1)[0]
        violations.append((asked.names.get(name, name) + field[len(name) :], why))
    return InvalidRequest(violations)


def _must_call(choice: Any, violations: list[tuple[str, str]]) -> str | None:
    """The name of the tool that has to be called, nobody's for any; None if none has to be."""
    match cast("object", choice):
        case "none" | "auto":
            return None
        case "required":
            return ""
        case {"type": "function", "function": {"name": str(name)}} if name:
            return name
        case _:
            violations.append(("tool_choice", "must be none, auto, required, or a function"))
            return None


def _schema(form: Any, violations: list[tuple[str, str]]) -> Any:
    """What an answer's form says of JSON, if it says anything; the engine checks the rest."""
    given = cast("dict[str, Any]", form) if isinstance(form, dict) else {}
    match given:
        case {"type": "text"}:
            return None
        case {"type": "json_object"}:
            return {"type": "object"}
        case {"type": "json_schema", "json_schema": {"schema": schema}} if isinstance(schema, dict):
            return cast("dict[str, Any]", schema)
        case _:
            violations.append(("response_format", 'must have the type "text", "json_object", or "json_schema" and a schema'))
            return None


def _integers(fields: Mapping[str, Any], name: str, violations: list[tuple[str, str]]) -> list[int]:
    value: Any = fields.get(name, [])
    if not isinstance(value, list) or not all(isinstance(each, int) and not isinstance(each, bool) for each in cast("list[Any]", value)):
        violations.append((name, "must be a list of token ids"))
        return []
    return cast("list[int]", value)


def _messages(messages: Any, violations: list[tuple[str, str]]) -> list[Message]:
    """Texts, and texts in parts, and what goes with them; the engine checks the rest."""
    if not isinstance(messages, list) or not messages:
        violations.append(("messages", "must be a list of messages, and not empty"))
        return []
    if len(cast("list[Any]", messages)) > MAX_MESSAGES:
        violations.append(("messages", f"must be at most {MAX_MESSAGES}"))
        return []
    found: list[Message] = []
    for i, message in enumerate(cast("list[Any]", messages)):
        fields = cast("dict[str, Any]", message) if isinstance(message, dict) else {}
        role, content = fields.get("role"), fields.get("content")
        if isinstance(content, list):
            texts = [_text_part(part) for part in cast("list[Any]", content)]
            content = None if None in texts else "".join(cast("list[str]", texts))
        elif content is None and role == "assistant":
            content = ""  # it answered nothing, or called a tool
        if not isinstance(content, str):
            violations.append((f"messages[{i}].content", "must be text, or parts that are text"))
            continue
        more = {name: fields[name] for name in MESSAGE if fields.get(name) is not None}
        found.append(cast(Message, {"role": "system" if role == "developer" else role, "content": content, **more}))
    return found


def _text_part(part: Any) -> str | None:
    """The text of a part of a message, if that is what it is."""
    fields = cast("dict[str, Any]", part) if isinstance(part, dict) else {}
    text = fields.get("text")
    return text if fields.get("type") == "text" and isinstance(text, str) else None


def _prompts(given: object, violations: list[tuple[str, str]]) -> tuple[Prompt, ...]:
    if isinstance(given, str):
        return (given,)
    if isinstance(given, list):
        several = cast("list[Any]", given)
        if not any(isinstance(each, str | list) for each in several):
            return (several,)
        if all(isinstance(each, str | list) for each in several):
            return tuple(several)
    violations.append(("prompt", "must be a text, a list of token ids, or a list of such"))
    return ([],)
