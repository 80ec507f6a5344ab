"""The messages of forerun.v1 from and to the words of core/vocabulary.py, as a client needs them."""

from __future__ import annotations

import json
from typing import Any, cast

from forerun.core.chat import Chat, Message
from forerun.core.embeddings import EmbeddingRows, Part
from forerun.core.speculation import DrafterName, DrafterStatistics, Speculation
from forerun.core.trace import Counter, Event, Flow, Notice, Span, Stage
from forerun.core.vocabulary import (
    SAMPLING_NUMBERS,
    Delta,
    FinishReason,
    Prompt,
    Result,
    SamplingParams,
    Started,
    Timings,
    TokenLogprob,
    Usage,
    check_prompt,
    grammar_of,
)
from forerun.v1 import generation_service_pb2 as pb
from forerun.v1 import trace_service_pb2

FINISH_REASONS = {
    pb.FINISH_REASON_STOP: FinishReason.STOP,
    pb.FINISH_REASON_LENGTH: FinishReason.LENGTH,
    pb.FINISH_REASON_CANCELLED: FinishReason.CANCELLED,
}


def prompt_message(prompt: Prompt) -> pb.Prompt:
    """InvalidRequest when it is no prompt."""
    prompt = check_prompt(prompt, 2**32)
    if isinstance(prompt, str):
        return pb.Prompt(text=prompt)
    if isinstance(prompt, Chat):
        tools, told = [json.dumps(tool) for tool in prompt.tools], json.dumps(prompt.template_kwargs) if prompt.template_kwargs else ""
        return pb.Prompt(chat=pb.Chat(messages=map(_chat_message, prompt.messages), tools=tools, template_kwargs=told))
    if isinstance(prompt[0], int):
        return pb.Prompt(token_ids=pb.TokenIds(ids=cast("list[int]", prompt)))
    return pb.Prompt(parts=pb.PromptParts(parts=map(_part_message, cast("list[Part]", prompt))))


def _chat_message(message: Message) -> pb.ChatMessage:
    calls = [
        pb.ToolCall(id=call.get("id", ""), name=call["function"]["name"], arguments=json.dumps(call["function"]["arguments"]))
        for call in message.get("tool_calls", [])
    ]
    texts = {name: message.get(name, "") for name in ("role", "content", "reasoning_content", "tool_call_id", "name")}
    return pb.ChatMessage(**cast("dict[str, Any]", texts), tool_calls=calls)


def _part_message(part: Part) -> pb.PromptPart:
    if isinstance(part, EmbeddingRows):
        coordinates = [number for each in part.coordinates or () for number in each]
        return pb.PromptPart(rows=pb.EmbeddingRows(data=part.data, width=part.width, coordinates=coordinates))
    return pb.PromptPart(token_ids=pb.TokenIds(ids=part))


def generate_message(prompt: Prompt, options: dict[str, Any]) -> pb.GenerateRequest:
    """ValueError or TypeError from protobuf when a number does not fit its field."""
    given = {name: value for name, value in options.items() if value is not None}
    sampling = pb.SamplingParams(**{name: given.pop(name) for name in SAMPLING_NUMBERS if name in given})
    for token, bias in given.pop("logit_bias", {}).items():
        sampling.logit_bias[token] = bias
    stop = given.pop("stop", [])
    grammar = grammar_of(given)
    given = {name: value for name, value in given.items() if grammar is None or name != grammar.kind}
    given |= {grammar.kind: grammar.text} if grammar is not None else {}
    return pb.GenerateRequest(prompt=prompt_message(prompt), sampling=sampling, stop=[stop] if isinstance(stop, str) else stop, **given)


def event_of(message: trace_service_pb2.TraceEvent) -> Event:
    match message.WhichOneof("kind"):
        case "span":
            each = message.span
            times = each.enqueued_ns, each.started_ns, each.finished_ns
            return Span(each.actor, each.message, Flow(each.request_id, each.round), *times, each.outcome, each.computed_ns)
        case "stage":
            stage = message.stage
            return Stage(Flow(stage.request_id, stage.round), stage.state, stage.started_ns, stage.finished_ns)
        case "counter":
            counter = message.counter
            flow = Flow(counter.request_id, counter.round) if counter.request_id else None
            return Counter(counter.name, flow, counter.at_ns, counter.value)
        case _:
            return Notice(message.notice.actor, message.notice.at_ns, message.notice.text)


def started_of(message: pb.Started) -> Started:
    numbers = {name: getattr(message.sampling, name) for name in SAMPLING_NUMBERS}
    return Started(
        message.request_id,
        SamplingParams(**numbers, logit_bias=tuple(message.sampling.logit_bias.items())),
        message.max_tokens,
        message.num_prompt_tokens,
        message.num_cached_tokens,
        message.queue_seconds,
        message.opens_reasoning,
    )


def delta_of(message: pb.Delta) -> Delta:
    logprobs = tuple(TokenLogprob(each.logprob, tuple((top.token_id, top.logprob) for top in each.top)) for each in message.logprobs)
    return Delta(message.text, tuple(message.token_ids), cast("DrafterName | None", message.source or None), logprobs)


def result_of(message: pb.Finished, request_id: str, sampling: SamplingParams, deltas: list[Delta]) -> Result:
    usage, timings = message.usage, message.timings
    matched = message.WhichOneof("matched")
    drafters: dict[DrafterName, DrafterStatistics] = {
        cast(DrafterName, each.drafter): DrafterStatistics(
            each.num_drafts, each.num_draft_tokens, each.num_accepted_tokens, tuple(each.num_accepted_tokens_per_pos)
        )
        for each in message.speculation.drafters
    }
    return Result(
        request_id,
        "".join(delta.text for delta in deltas),
        tuple(token for delta in deltas for token in delta.token_ids),
        FINISH_REASONS[message.reason],
        None if matched is None else getattr(message, matched),
        sampling,
        Usage(usage.num_prompt_tokens, usage.num_completion_tokens, usage.num_cached_tokens),
        Timings(timings.queue_seconds, timings.prefill_seconds, timings.decode_seconds),
        Speculation(message.speculation.num_rounds, drafters, message.speculation.is_synthetic),
        tuple(logprob for delta in deltas for logprob in delta.logprobs),
    )
