"""The messages of forerun.v1 as the words of core/vocabulary.py, and back."""

from __future__ import annotations

import re
from typing import Any, cast

from forerun.v1 import generation_service_pb2 as pb
from forerun.v1 import trace_service_pb2

from ...core.chat import MAX_MESSAGES, MAX_TOOLS, Chat, Message
from ...core.checks import json_of
from ...core.embeddings import EmbeddingRows, Part
from ...core.errors import InvalidRequest
from ...core.trace import Counter, Event, Span, Stage
from ...core.vocabulary import (
    SAMPLING_NUMBERS,
    Delta,
    FinishReason,
    Prompt,
    Result,
    SamplingParams,
    Started,
    TokenLogprob,
)
from ..stream import Options

#: what our checks call a field -> where it is in a GenerateRequest, where that differs
PATHS = {name: f"sampling.{name}" for name in (*SAMPLING_NUMBERS, "logit_bias")}
FINISH_REASONS = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: pb.FINISH_REASON_CANCELLED,
}


def prompt_of(prompt: pb.Prompt) -> Prompt:
    """InvalidRequest when it is none of the kinds."""
    match prompt.WhichOneof("kind"):
        case "text":
            return prompt.text
        case "token_ids":
            return list(prompt.token_ids.ids)
        case "chat":
            if len(prompt.chat.messages) > MAX_MESSAGES:
                raise InvalidRequest([("prompt.chat.messages", f"must be at most {MAX_MESSAGES}")])
            if len(prompt.chat.tools) > MAX_TOOLS:
                raise InvalidRequest([("prompt.chat.tools", f"must be at most {MAX_TOOLS}")])
            tools, told = [json_of(tool) for tool in prompt.chat.tools], json_of(prompt.chat.template_kwargs or "{}")
            return Chat([_message_of(message) for message in prompt.chat.messages], cast(Any, tools), cast(Any, told))
        case "parts":
            return [_part_of(part, f"prompt[{i}]") for i, part in enumerate(prompt.parts.parts)]
        case _:
            raise InvalidRequest([("prompt", "must be text, token_ids, chat or parts")])


def _message_of(message: pb.ChatMessage) -> Message:
    found = Message(role=message.role, content=message.content)
    if message.reasoning_content:
        found["reasoning_content"] = message.reasoning_content
    if message.tool_calls:
        found["tool_calls"] = [{"id": call.id, "function": {"name": call.name, "arguments": call.arguments}} for call in message.tool_calls]
    if message.tool_call_id:
        found["tool_call_id"] = message.tool_call_id
    if message.name:
        found["name"] = message.name
    return found


def _part_of(part: pb.PromptPart, field: str) -> Part:
    if part.WhichOneof("kind") != "rows":
        return list(part.token_ids.ids)
    rows, flat = part.rows, part.rows.coordinates
    if len(flat) % 3:
        raise InvalidRequest([(f"{field}.coordinates", "must be three numbers for each row")])
    triples = [(flat[i], flat[i + 1], flat[i + 2]) for i in range(0, len(flat), 3)]
    return EmbeddingRows(rows.data, rows.width, triples or None)


def options_of(request: pb.GenerateRequest) -> Options:
    """What a request asks for; the engine checks it."""
    sampling = request.sampling
    options: dict[str, Any] = {name: getattr(sampling, name) for name in SAMPLING_NUMBERS if sampling.HasField(cast(Any, name))}
    options |= {name: getattr(request, name) for name in ("max_tokens", "num_logprobs") if request.HasField(cast(Any, name))}
    options |= {"stop": list(request.stop), "stop_ids": list(request.stop_ids), "ignore_eos": request.ignore_eos}
    if kind := request.WhichOneof("limits"):
        options[kind] = getattr(request, kind)
    return cast(Options, options | {"logit_bias": dict(sampling.logit_bias), "cache_salt": request.cache_salt})


def with_paths(error: InvalidRequest) -> InvalidRequest:
    """The same violations, each with the path of its field in the message."""
    return InvalidRequest([(_path_of(field), problem) for field, problem in error.violations])


def _path_of(field: str) -> str:
    if part := re.fullmatch(r"prompt\[(\d+)\]\.((?:data|width|coordinates).*)", field):
        return f"prompt.parts.parts[{part[1]}].rows.{part[2]}"
    if re.match(r"tools\[|template_kwargs", field):
        return f"prompt.chat.{field}"
    return PATHS.get(field, field.replace("prompt[", "prompt.chat.messages["))


def sampling_message(sampling: SamplingParams) -> pb.SamplingParams:
    numbers: dict[str, Any] = {name: getattr(sampling, name) for name in SAMPLING_NUMBERS}
    return pb.SamplingParams(**numbers, logit_bias=dict(sampling.logit_bias))


def started_message(started: Started, model: str) -> pb.Started:
    return pb.Started(
        request_id=started.request_id,
        model=model,
        sampling=sampling_message(started.sampling),
        max_tokens=started.max_tokens,
        num_prompt_tokens=started.num_prompt_tokens,
        num_cached_tokens=started.num_cached_tokens,
        queue_seconds=started.queue_seconds,
        opens_reasoning=started.opens_reasoning,
    )


def delta_message(delta: Delta) -> pb.Delta:
    message = pb.Delta(text=delta.text, token_ids=delta.token_ids, source=delta.source or "")
    for logprob in delta.logprobs:
        message.logprobs.append(_logprob_message(logprob))
    return message


def _logprob_message(logprob: TokenLogprob) -> pb.TokenLogprob:
    top = [pb.TopLogprob(token_id=token, logprob=value) for token, value in logprob.top]
    return pb.TokenLogprob(logprob=logprob.logprob, top=top)


def finished_message(result: Result) -> pb.Finished:
    usage, timings, speculation = result.usage, result.timings, result.speculation
    message = pb.Finished(
        reason=FINISH_REASONS[result.finish_reason],
        usage=pb.Usage(
            num_prompt_tokens=usage.num_prompt_tokens,
            num_completion_tokens=usage.num_completion_tokens,
            num_cached_tokens=usage.num_cached_tokens,
        ),
        timings=pb.Timings(
            queue_seconds=timings.queue_seconds, prefill_seconds=timings.prefill_seconds, decode_seconds=timings.decode_seconds
        ),
        speculation=pb.Speculation(
            num_rounds=speculation.num_rounds,
            mean_acceptance_length=speculation.mean_acceptance_length,
            is_synthetic=speculation.is_synthetic,
            drafters=[
                pb.DrafterStatistics(
                    drafter=name,
                    num_drafts=each.num_drafts,
                    num_draft_tokens=each.num_draft_tokens,
                    num_accepted_tokens=each.num_accepted_tokens,
                    num_accepted_tokens_per_pos=each.num_accepted_tokens_per_pos,
                )
                for name, each in speculation.drafters.items()
            ],
        ),
    )
    if isinstance(result.matched_stop, str):
        message.stop = result.matched_stop
    elif result.matched_stop is not None:
        message.stop_id = result.matched_stop
    return message


def event_message(event: Event) -> trace_service_pb2.TraceEvent:
    if isinstance(event, Span):
        return trace_service_pb2.TraceEvent(
            span=trace_service_pb2.Span(
                actor=event.actor,
                message=event.message,
                request_id=event.flow.request,
                round=event.flow.round,
                enqueued_ns=event.enqueued_ns,
                started_ns=event.started_ns,
                finished_ns=event.finished_ns,
                outcome=event.outcome,
                computed_ns=event.computed_ns,
            )
        )
    if isinstance(event, Stage):
        return trace_service_pb2.TraceEvent(
            stage=trace_service_pb2.Stage(
                request_id=event.flow.request,
                round=event.flow.round,
                state=event.state,
                started_ns=event.started_ns,
                finished_ns=event.finished_ns,
            )
        )
    if isinstance(event, Counter):
        flow = event.flow
        return trace_service_pb2.TraceEvent(
            counter=trace_service_pb2.Counter(
                name=event.name,
                request_id=flow.request if flow is not None else "",
                round=flow.round if flow is not None else 0,
                at_ns=event.at_ns,
                value=event.value,
            )
        )
    return trace_service_pb2.TraceEvent(notice=trace_service_pb2.Notice(actor=event.actor, at_ns=event.at_ns, text=event.text))
