"""From what a caller asks for to what is to be done: prompts and options, or a file, checked against the model."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

from ..core.chat import Chat
from ..core.embeddings import Encoded
from ..core.errors import InvalidRequest, SavedSequenceError
from ..core.vocabulary import Request, SamplingParams, SavedFile
from ..kernels.model import saved
from ..kernels.model.inputs import violations_of
from ..kernels.model.prefix import Snapshot
from .model import Model
from .sequence import Origin
from .stream import DEFAULT_CHAT_TOKENS, DEFAULT_MAX_TOKENS, Job, Options


def stops_of(stop: str | list[str] | None) -> list[str]:
    """Stop strings as a list."""
    return [] if stop is None else [stop] if isinstance(stop, str) else stop


def sampling_of(options: Options, model: Model) -> SamplingParams:
    """What was given, else what the model asks for; a seed at random."""
    chosen: dict[str, Any] = {**model.defaults.sampling, "seed": secrets.randbits(63)}
    given = options | {"logit_bias": tuple((options.get("logit_bias") or {}).items())}
    chosen |= {name: given[name] for name in SamplingParams.__slots__ if given.get(name) is not None}
    return SamplingParams(**chosen)


def request_of(job: Job, prompt: Encoded, model: Model, num_positions: int) -> Request:
    """Everything that is to be done for a job, where memory has room for so many positions. InvalidRequest when the model cannot do it."""
    max_tokens, context, ids = job.options.get("max_tokens"), model.context, prompt.ids
    room = context - len(ids)
    vocabulary = model.num_token_ids
    check_encoded(prompt, model)
    if room < 1:
        raise InvalidRequest([("prompt", f"{len(ids)} tokens leave no room in a context of {context}")])
    if max_tokens is not None and max_tokens > room:
        raise InvalidRequest([("max_tokens", f"{max_tokens} after a prompt of {len(ids)} exceed the context of {context}")])
    more_stop_ids = job.options.get("stop_ids") or []
    if bad := [token for token in more_stop_ids if not 0 <= token < vocabulary]:
        raise InvalidRequest([("stop_ids", f"{bad[0]!r:.50} is not a token id below the vocabulary's {vocabulary}")])
    stops = tuple(stops_of(job.options.get("stop")))
    if stops and model.vocabulary is None:
        raise InvalidRequest([("stop", "this model has no tokenizer.json, so its answers have no text")])
    stop_ids = (frozenset[int]() if job.options.get("ignore_eos") else model.defaults.stop_ids) | frozenset(more_stop_ids)
    boundary_ids = model.defaults.stop_ids
    default = DEFAULT_CHAT_TOKENS if isinstance(job.prompt, Chat) else DEFAULT_MAX_TOKENS
    max_tokens = max_tokens or min(room, default, max(num_positions - len(ids), 1))
    salt = job.options.get("cache_salt") or ""
    num_logprobs = job.options.get("num_logprobs")
    rest = boundary_ids, salt, stops, num_logprobs, prompt.embeddings, prompt.opens_reasoning, job.grammar
    return Request(job.request_id, ids, max_tokens, job.sampling, stop_ids, vocabulary, *rest)


def check_encoded(prompt: Encoded, model: Model) -> None:
    """InvalidRequest unless a prompt's tokens and rows are what they must be, whatever is to be done with them."""
    vocabulary, context, ids = model.num_token_ids, model.context, prompt.ids
    if not ids:
        raise InvalidRequest([("prompt", "must not be empty")])
    if bad := [token for token in prompt.token_ids if not 0 <= token < vocabulary]:
        raise InvalidRequest([("prompt", f"token id {bad[0]} is not below the vocabulary's {vocabulary}")])
    if len(ids) > context:
        raise InvalidRequest([("prompt", f"{len(ids)} tokens exceed the context of {context}")])
    if violations := violations_of(prompt.embeddings, model.hidden):
        raise InvalidRequest(violations)


def request_in(path: Path, request_id: str, model: Model, blank: Snapshot) -> tuple[Request, Origin]:
    """The request of a file, which was found to be whole and of this model. SavedSequenceError."""
    position, record, checksum, num_bytes, rows = saved.check(path, model.fingerprint, blank)
    request, output = saved.parse_record(record, rows, request_id, model.num_token_ids, model.context)
    if position != len(request.prompt_ids) + len(output) - 1:
        raise SavedSequenceError(f"{path}: its request does not fit its position {position}")
    return request, Origin(SavedFile(path, checksum, num_bytes), output)
