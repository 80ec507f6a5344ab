"""The words of OpenAI's API (platform.openai.com/docs/api-reference: chat, completions) as ours, and back."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, cast

from ...core.chat import MAX_MESSAGES, Chat, Message
from ...core.errors import InvalidRequest
from ...core.vocabulary import Delta, FinishReason, Prompt, Result, Started, TokenLogprob
from ..reply import CallArguments, CallBegun, Content, Reasoning, ReplyParser, ReplyPiece
from ..stream import Options
from ..tokenizer import Vocabulary

#: fields that are an option of ours by the same name
SAME = ("temperature", "top_p", "top_k", "min_p", "seed", "presence_penalty", "frequency_penalty", "repetition_penalty", "stop",
        "ignore_eos", "cache_salt", "json_schema", "regex", "grammar")  # fmt: skip
#: fields that say nothing to this server: who asks, and what is kept
IGNORED = ("model", "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "stream", "stream_options")
#: fields that are refused unless they have one of these values, since another would not be heeded
ONLY: dict[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "echo": (False,), "suffix": ("",), "tool_choice": ("none", "auto"), "functions": ([],),
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
)
#: fields of a message that are told the chat template, if they are there
MESSAGE = ("reasoning_content", "tool_calls", "tool_call_id", "name")
#: vLLM's word for what the Abort method ended
REASONS = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length", FinishReason.CANCELLED: "abort"}
#: fields that may be -1, for what is so unless it is said
UNLIMITED = ("max_tokens", "max_completion_tokens", "top_k", "seed")


@dataclass(frozen=True, slots=True)
class Asked:
    """A request as it was understood. `wants_usage`: a stream ends with what it took."""

    prompt: Prompt
    options: Options
    is_chat: bool
    is_streamed: bool
    wants_usage: bool
    most_calls: int | None  # of tools
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
    known = {*SAME, *IGNORED, *own, "max_tokens", "logprobs", "logit_bias", "stop_token_ids"}
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
    if is_chat:
        if (schema := _schema(fields.get("response_format", {"type": "text"}), violations)) is not None:
            violations += [("response_format", "does not go with json_schema")] if "json_schema" in options else []
            options["json_schema"], names["json_schema"] = schema, "response_format"
        options["num_logprobs"] = fields.get("top_logprobs", 0) if fields.get("logprobs") else None
        tools: Any = fields.get("tools", []) if fields.get("tool_choice") != "none" else []
        told: Any = fields.get("chat_template_kwargs", {})
        if "reasoning_effort" in fields and isinstance(told, dict):  # templates that know it heed it
            told = {"reasoning_effort": fields["reasoning_effort"], **cast("dict[str, Any]", told)}
        prompt = Chat(_messages(fields.get("messages"), violations), tools, told)
    else:
        options["num_logprobs"] = fields.get("logprobs")
        prompt = _prompt(fields.get("prompt"), violations)
    streaming = fields.get("stream_options", {})
    if not isinstance(streaming, dict):
        violations.append(("stream_options", "must be an object"))
        streaming = {}
    if violations:
        raise InvalidRequest(sorted(violations))
    most_calls = 1 if fields.get("parallel_tool_calls") is False else None
    wants_usage = cast("dict[str, Any]", streaming).get("include_usage") is True
    return Asked(prompt, cast(Options, options), is_chat, bool(fields.get("stream")), wants_usage, most_calls, names)


def with_names(error: InvalidRequest, asked: Asked) -> InvalidRequest:
    """The same violations, by the names that fields have here."""
    violations: list[tuple[str, str]] = []
    for field, why in error.violations:
        name = re.split(r"\W", field, maxsplit=1)[0]
        violations.append((asked.names.get(name, name) + field[len(name) :], why))
    return InvalidRequest(violations)


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


def _prompt(given: object, violations: list[tuple[str, str]]) -> Prompt:
    if isinstance(given, list):
        several = cast("list[Any]", given)
        if not any(isinstance(each, str | list) for each in several):
            return several
        if len(several) == 1:
            return cast(Prompt, several[0])
        violations.append(("prompt", "must be one; ask for several in calls of their own"))
        return []
    if not isinstance(given, str):
        violations.append(("prompt", "must be one text, or one list of token ids"))
        return []
    return given


class Words:
    """Makes the answers to one request."""

    def __init__(self, asked: Asked, request_id: str, model_name: str, vocabulary: Vocabulary | None) -> None:
        self._asked, self._request_id, self._vocabulary = asked, request_id, vocabulary
        kind = "chat.completion" if asked.is_chat else "text_completion"
        self._head = {"id": ("chatcmpl-" if asked.is_chat else "cmpl-") + request_id, "created": int(time.time()), "model": model_name}
        self._whole, self._chunk = {**self._head, "object": kind}, {**self._head, "object": kind + (".chunk" if asked.is_chat else "")}
        self._reply = ReplyParser()
        self._num_characters = 0  # of tokens that were named
        self._untold: list[tuple[int, TokenLogprob]] = []  # tokens whose text is held back, or was nobody's

    def started(self, started: Started) -> None:
        """It has memory. Comes first, if at all."""
        if isinstance(self._asked.prompt, Chat):
            self._reply = ReplyParser(self._asked.prompt.tools, started.opens_reasoning, self._asked.most_calls)

    def first(self) -> list[dict[str, Any]]:
        """What a stream begins with."""
        return [self._piece({"role": "assistant", "content": ""}, None, None)] if self._asked.is_chat else []

    def delta(self, delta: Delta) -> list[dict[str, Any]]:
        if not self._asked.is_chat:
            return [self._piece({}, delta.text, self._logprobs(delta.token_ids, delta.logprobs))]
        self._untold += zip(delta.token_ids, delta.logprobs, strict=True) if delta.logprobs else ()
        return self._told(self._reply.push(delta.text))

    def last(self, result: Result) -> list[dict[str, Any]]:
        told = self._told(self._reply.end()) if self._asked.is_chat else []
        if self._untold:
            told.append(self._piece({}, None, self._taken()))
        return [*told, self._piece({}, "", None, self._reason(result))]

    def usage(self, result: Result) -> dict[str, Any]:
        """What a stream ends with if that was wanted."""
        return {**self._chunk, "choices": [], "usage": self._usage(result)}

    def whole(self, result: Result) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "logprobs": self._logprobs(result.token_ids, result.logprobs)}
        if self._asked.is_chat:
            self._reply.push(result.text)
            self._reply.end()
            message = self._reply.message([self._call_id(i) for i in range(self._reply.num_calls)])
            is_silent = self._reply.num_calls and not message["content"]
            choice["message"] = {**message, "refusal": None} | ({"content": None} if is_silent else {})
        else:
            choice["text"] = result.text
        return {**self._whole, "choices": [choice | {"finish_reason": self._reason(result)}], "usage": self._usage(result)}

    def _reason(self, result: Result) -> str:
        reason = REASONS[result.finish_reason]
        return "tool_calls" if self._reply.is_over or (reason == "stop" and self._reply.num_calls) else reason

    def _told(self, pieces: list[ReplyPiece]) -> list[dict[str, Any]]:
        return [self._piece(self._said(piece), None, self._taken()) for piece in pieces]

    def _said(self, piece: ReplyPiece) -> dict[str, Any]:
        match piece:
            case Reasoning():
                return {"reasoning_content": piece.text}
            case Content():
                return {"content": piece.text}
            case CallBegun():
                call: dict[str, Any] = {"id": self._call_id(piece.index), "type": "function"}
                return {"tool_calls": [{"index": piece.index, **call, "function": {"name": piece.name, "arguments": ""}}]}
            case CallArguments():
                return {"tool_calls": [{"index": piece.index, "function": {"arguments": piece.text}}]}

    def _call_id(self, index: int) -> str:
        return f"call_{self._request_id}_{index}"

    def _taken(self) -> dict[str, Any] | None:
        """The log probabilities that have not been told."""
        untold, self._untold = self._untold, []
        return self._logprobs(tuple(token for token, _ in untold), tuple(each for _, each in untold))

    def _piece(self, delta: dict[str, Any], text: str | None, logprobs: Any, reason: str | None = None) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "finish_reason": reason, "logprobs": logprobs}
        choice |= {"delta": delta} if self._asked.is_chat else {"text": text}
        return {**self._chunk, "choices": [choice]} | ({"usage": None} if self._asked.wants_usage else {})

    @staticmethod
    def _usage(result: Result) -> dict[str, Any]:
        usage, drafters = result.usage, result.speculation.drafters.values()
        accepted, drafted = sum(each.num_accepted_tokens for each in drafters), sum(each.num_draft_tokens for each in drafters)
        return {
            "prompt_tokens": usage.num_prompt_tokens,
            "completion_tokens": usage.num_completion_tokens,
            "total_tokens": usage.num_prompt_tokens + usage.num_completion_tokens,
            "prompt_tokens_details": {"cached_tokens": usage.num_cached_tokens},
            "completion_tokens_details": {"accepted_prediction_tokens": accepted, "rejected_prediction_tokens": drafted - accepted},
        }

    def _logprobs(self, tokens: tuple[int, ...], logprobs: tuple[TokenLogprob, ...]) -> dict[str, Any] | None:
        if not logprobs:
            return None
        if self._asked.is_chat:
            content = [
                self._named(token, each.logprob) | {"top_logprobs": [self._named(*top) for top in each.top]}
                for token, each in zip(tokens, logprobs, strict=True)
            ]
            return {"content": content, "refusal": None}
        names = [self._text(token) for token in tokens]
        offsets = list(accumulate(map(len, names), initial=self._num_characters))
        self._num_characters = offsets.pop()
        # Of tokens with one name the likeliest counts; the chosen one is always there.
        tops = [
            {self._text(other): value for other, value in (*reversed(each.top), (token, each.logprob))}
            for token, each in zip(tokens, logprobs, strict=True)
        ]
        return {"tokens": names, "token_logprobs": [each.logprob for each in logprobs], "top_logprobs": tops, "text_offset": offsets}

    def _named(self, token: int, logprob: float) -> dict[str, Any]:
        raw = self._vocabulary.token_bytes(token) if self._vocabulary is not None else b""
        return {"token": self._text(token), "logprob": logprob, "bytes": list(raw)}

    def _text(self, token: int) -> str:
        """The text of a token, or where it has none of its own, its name."""
        if self._vocabulary is None:
            return str(token)
        raw = self._vocabulary.token_bytes(token)
        try:
            return raw.decode() or self._vocabulary.name(token)
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
