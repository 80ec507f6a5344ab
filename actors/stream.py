"""The answer to one request, as its reader sees it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TypedDict

import anyio

from ..core.errors import ForerunError, SavedSequenceError
from ..core.outbox import Outbox
from ..core.vocabulary import CheckedPrompt, Delta, Grammar, Result, SamplingParams, Started
from .sequence import PrefillProgress, SaveOrder, Sequence

#: Tokens of an answer that nobody has limited: of a text, and of a chat, where thoughts come first.
DEFAULT_MAX_TOKENS, DEFAULT_CHAT_TOKENS = 256, 4096


class Options(TypedDict, total=False):
    """What a request may say. Left out or None: the model's generation_config.json decides, else the value in brackets."""

    max_tokens: int | None  # most tokens to generate [256, or 4096 after a chat, or what there is room for]
    temperature: float | None  # [0: greedy]
    top_k: int | None  # keep the k likeliest tokens [0: all]
    top_p: float | None  # keep the likeliest tokens up to this share [1]
    min_p: float | None  # drop tokens less likely than this times the likeliest [0]
    seed: int | None  # of the noise that chooses tokens [random]
    repetition_penalty: float | None  # of tokens in prompt or answer: logits above 0 are divided by it, others multiplied [1]
    presence_penalty: float | None  # subtracted from the logits of tokens in the answer [0]
    frequency_penalty: float | None  # subtracted each time a token stands in the answer [0]
    logit_bias: dict[int, float] | None  # token id -> added to its logit [none]
    stop: str | list[str] | None  # the answer ends where one of these texts begins [none]
    stop_ids: list[int] | None  # or where one of these tokens is chosen, the model's own apart [none]
    json_schema: dict[str, Any] | str | None  # the answer is such JSON; needs the extra `grammar`, as the next two do [none]
    regex: str | None  # or matches this
    grammar: str | None  # or is what a grammar, in Lark's notation or GBNF, says
    num_logprobs: int | None  # log probabilities of the chosen token and of so many of the likeliest, with every token [none]
    timeout_seconds: float | None  # DeadlineExceeded if it is not finished by then [none]
    cache_salt: str | None  # only requests with the same one share what is cached of prompts [none]
    ignore_eos: bool  # go on after an end-of-text token [False]
    request_id: str | None  # what traces and the result call it; no other that runs may have it [request-1, request-2...]
    prefill_progress: PrefillProgress | None  # called with (prompt tokens computed, prompt tokens in all)


@dataclass(slots=True, eq=False)
class Job:
    """What a request's task and its stream share."""

    request_id: str
    prompt: CheckedPrompt
    options: Options
    sampling: SamplingParams  # in effect
    outbox: Outbox
    scope: anyio.CancelScope  # its deadline is the request's
    grammar: Grammar | None = None  # that its answer follows
    saved: Path | None = None  # the file it goes on from
    saves: list[SaveOrder] = field(default_factory=list[SaveOrder])
    sequence: Sequence | None = None  # once the prompt is encoded
    is_left: bool = False  # the reader cancelled
    started: Started | None = None
    has_started: anyio.Event = field(default_factory=anyio.Event)  # or ended before it could
    done: anyio.Event = field(default_factory=anyio.Event)
    error: ForerunError | None = None
    result: Result | None = None

    def start(self, started: Started) -> None:
        self.started = started
        self.has_started.set()


class Stream:
    """The answer to one request, as it comes. Iterate it, inside `async with` or not; leaving the block has cancelled the
    work and returned the memory. A stream dropped half read raises ResourceWarning and is cancelled."""

    def __init__(self, job: Job, call_soon: Callable[[Callable[[], Any]], Any]) -> None:
        self._job, self._call_soon = job, call_soon

    @property
    def request_id(self) -> str:
        """What traces and the result call it."""
        return self._job.request_id

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Delta:
        """The next piece; raises the request's error, if it ended with one, after all that came before it.
        Cancelled: no piece is lost."""
        delta = await self._job.outbox.receive()
        if delta is not None:
            return delta
        await self._job.done.wait()
        if self._job.error is not None:
            raise self._job.error.with_traceback(None) from self._job.error.__cause__
        raise StopAsyncIteration

    async def started(self) -> Started | None:
        """Waits until the request has memory. None if it was cancelled before; raises its error if it ended with one.
        Cancelled: nothing is lost."""
        await self._job.has_started.wait()
        if self._job.started is None:
            await self._job.done.wait()
            _ = self.result  # its error
        return self._job.started

    async def __aenter__(self) -> Stream:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Cancels what is left of the work and waits until its memory is back, even when cancelled itself. What was not read can
        still be."""
        self.cancel()
        with anyio.CancelScope(shield=True):
            await self._job.done.wait()

    def cancel(self) -> None:
        """Ends the request soon, without waiting for it. What it has brought until then can still be read."""
        self._job.is_left = True
        self._job.scope.cancel()

    async def save(self, path: str | Path) -> None:
        """Puts the request as it is after the round under way, its memory and what it has produced, into a file from which `Engine.restore`
        goes on, and goes on itself. A file that was there is replaced, at once and only by a whole one. Waits until the prompt
        is computed. SavedSequenceError when it cannot be written, or the request ends before. Cancelled: it may have been saved."""
        job = self._job
        if job.done.is_set():
            raise SavedSequenceError("the request has ended, there is nothing to go on from")
        order = SaveOrder(Path(path))
        job.saves.append(order)
        job.outbox.hurry(True)  # the sequence must not wait for a reader who waits for it
        try:
            await order.done.wait()
        finally:
            if order in job.saves:
                job.saves.remove(order)
            job.outbox.hurry(bool(job.saves))
        if order.error is not None:
            raise order.error.with_traceback(None)

    @property
    def result(self) -> Result:
        """The finished request, cancelled ones included. RuntimeError before the end; the request's error if it failed."""
        if self._job.error is not None:
            raise self._job.error.with_traceback(None)
        if self._job.result is None:
            raise RuntimeError("the stream has not ended")
        return self._job.result

    def __del__(self) -> None:
        if not self._job.done.is_set():
            self._call_soon(self.cancel)  # the collector may run in any thread
            warnings.warn(f"unclosed {self!r}: use `async with`, or read it to its end", ResourceWarning, stacklevel=2, source=self)
