"""Answers in the words of OpenAI's API."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from ...core.chat import Chat
from ...core.vocabulary import Delta, FinishReason, Result, Started, TokenLogprob
from ..reply import CallArguments, CallBegun, Content, Reasoning, ReplyParser, ReplyPiece
from ..tokenizer import Vocabulary
from .openai import Asked

#: vLLM's word for what the Abort method ended
REASONS = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length", FinishReason.CANCELLED: "abort"}


class Words:
    """Makes what is said of one of the answers to a call, the `index`-th."""

    def __init__(self, asked: Asked, request_id: str, index: int, model_name: str, vocabulary: Vocabulary | None) -> None:
        self._asked, self._request_id, self._index, self._vocabulary = asked, request_id, index, vocabulary
        kind = "chat.completion" if asked.is_chat else "text_completion"
        self._head = {"id": ("chatcmpl-" if asked.is_chat else "cmpl-") + request_id, "created": int(time.time()), "model": model_name}
        self._whole, self._chunk = {**self._head, "object": kind}, {**self._head, "object": kind + (".chunk" if asked.is_chat else "")}
        self._reply = ReplyParser()
        self._num_characters = 0  # of tokens that were named
        self._untold: list[tuple[int, TokenLogprob]] = []  # tokens whose text is held back, or was nobody's

    def started(self, started: Started) -> None:
        """It has memory. Comes first, if at all."""
        if isinstance(chat := self._asked.prompts[0], Chat):
            self._reply = ReplyParser(chat.tools, started.opens_reasoning, self._asked.most_calls)

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

    def usage(self, results: Sequence[Result]) -> dict[str, Any]:
        """What a stream of all `results` ends with if that was wanted."""
        return {**self._chunk, "choices": [], "usage": self._usage(results)}

    def whole(self, choices: Sequence[dict[str, Any]], results: Sequence[Result]) -> dict[str, Any]:
        """The answer to a call, of all its choices."""
        return {**self._whole, "choices": choices, "usage": self._usage(results)}

    def choice(self, result: Result) -> dict[str, Any]:
        """Of an answer that was not told in pieces."""
        choice: dict[str, Any] = {"index": self._index, "logprobs": self._logprobs(result.token_ids, result.logprobs)}
        if self._asked.is_chat:
            self._reply.push(result.text)
            self._reply.end()
            message = self._reply.message([self._call_id(i) for i in range(self._reply.num_calls)])
            is_silent = self._reply.num_calls and not message["content"]
            choice["message"] = {**message, "refusal": None} | ({"content": None} if is_silent else {})
        else:
            choice["text"] = result.text
        return choice | {"finish_reason": self._reason(result)}

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
        return f"call_{self._request_id}_{f'{self._index}_' if self._index else ''}{index}"

    def _taken(self) -> dict[str, Any] | None:
        """The log probabilities that have not been told."""
        untold, self._untold = self._untold, []
        return self._logprobs(tuple(token for token, _ in untold), tuple(each for _, each in untold))

    def _piece(self, delta: dict[str, Any], text: str | None, logprobs: Any, reason: str | None = None) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": self._index, "finish_reason": reason, "logprobs": logprobs}
        choice |= {"delta": delta} if self._asked.is_chat else {"text": text}
        return {**self._chunk, "choices": [choice]} | ({"usage": None} if self._asked.wants_usage else {})

    def _usage(self, results: Sequence[Result]) -> dict[str, Any]:
        """Of all answers to a call; each prompt counts once."""
        drafters = [each for result in results for each in result.speculation.drafters.values()]
        accepted, drafted = sum(each.num_accepted_tokens for each in drafters), sum(each.num_draft_tokens for each in drafters)
        num_prompt = sum(result.usage.num_prompt_tokens for result in results[:: self._asked.number])
        num_completion = sum(result.usage.num_completion_tokens for result in results)
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_completion,
            "total_tokens": num_prompt + num_completion,
            "prompt_tokens_details": {"cached_tokens": sum(result.usage.num_cached_tokens for result in results[:: self._asked.number])},
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
