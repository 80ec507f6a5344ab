"""The draft-verify-commit life of one sequence, as a pure state machine: no I/O, no clock, no arrays.

Rules. A prompt is prefilled in chunks that start at multiples of CHUNK, so that what a chunk computes depends on the
prompt alone. The choice after the prompt's last row is the first token. From then on the newest token is always one
the target has chosen but not yet computed; a round verifies [that token, drafts...] from its position, and drafts stand
while they equal the target's own choices. So the tokens are those the target would have chosen alone, and a round
always brings at least one. A draft is never longer than what may still be produced less one.
What is not in TRANSITIONS is refused, and a refused call changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from .errors import InternalBug
from .vocabulary import Draft, FinishReason, Request, Verdict

#: Positions a prefill chunk spans; chunks start at its multiples. The length of the WY blocks of gated delta net kernels.
CHUNK = 64


class State(Enum):
    WAITING = auto()
    PREFILLING = auto()
    DRAFTING = auto()
    VERIFYING = auto()
    FINISHED = auto()
    CANCELLED = auto()
    FAILED = auto()


class Event(Enum):
    ADMITTED = auto()
    CHUNK_COMPUTED = auto()
    DRAFTED = auto()
    VERIFIED = auto()
    CANCEL = auto()
    FAIL = auto()


#: (state, event) -> the states it may lead to
TRANSITIONS: dict[tuple[State, Event], frozenset[State]] = {
    (State.WAITING, Event.ADMITTED): frozenset({State.PREFILLING}),
    (State.PREFILLING, Event.CHUNK_COMPUTED): frozenset({State.PREFILLING, State.DRAFTING, State.FINISHED}),
    (State.DRAFTING, Event.DRAFTED): frozenset({State.VERIFYING}),
    (State.VERIFYING, Event.VERIFIED): frozenset({State.DRAFTING, State.FINISHED}),
} | {
    (state, event): frozenset({end})
    for state in (State.WAITING, State.PREFILLING, State.DRAFTING, State.VERIFYING)
    for event, end in ((Event.CANCEL, State.CANCELLED), (Event.FAIL, State.FAILED))
}


@dataclass(frozen=True, slots=True)
class Round:
    """What one verify settled: `computed` tokens now stand at `position` (last round's newest token and the accepted
    drafts), `num_accepted` drafts were right, `tokens` are new for the reader (without a stop token)."""

    position: int
    computed: tuple[int, ...]
    num_accepted: int
    tokens: tuple[int, ...]


class SequenceProtocol:
    """One request from admission to its end. `finish_reason` is set in FINISHED and CANCELLED."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.state = State.WAITING
        self.finish_reason: FinishReason | None = None
        self.output: list[int] = []
        self._num_computed = 0  # positions the target has computed for good
        self._draft: tuple[int, ...] = ()

    def _move(self, event: Event, target: State) -> None:
        if target not in TRANSITIONS.get((self.state, event), ()):
            raise InternalBug(f"{event.name} may not lead from {self.state.name} to {target.name}")
        self.state = target

    @property
    def is_over(self) -> bool:
        return self.state in (State.FINISHED, State.CANCELLED, State.FAILED)

    @property
    def position(self) -> int:
        """Where the next chunk or round starts."""
        return self._num_computed

    @property
    def last_token(self) -> int:
        """The newest token, chosen and not yet computed. Only once the prompt is computed."""
        return self.output[-1]

    @property
    def draft_limit(self) -> int:
        """The most draft tokens the next round can use: a verify brings one token more than it accepts."""
        return self.request.max_tokens - len(self.output) - 1

    def admitted(self) -> None:
        self._move(Event.ADMITTED, State.PREFILLING)

    def next_chunk(self) -> tuple[int, ...]:
        """The prompt's tokens from `position` to the chunk's end."""
        return self.request.prompt_ids[self._num_computed : self._num_computed + CHUNK]

    def chunk_computed(self, verdict: Verdict) -> tuple[int, ...]:
        """The chunk stands. Returns the first token when it was the last chunk (nothing if that token ends the text)."""
        end = self._num_computed + len(self.next_chunk())
        if end < len(self.request.prompt_ids):
            self._move(Event.CHUNK_COMPUTED, State.PREFILLING)
            self._num_computed = end
            return ()
        tokens, reason = self._take(verdict.choices)
        self._move(Event.CHUNK_COMPUTED, State.FINISHED if reason else State.DRAFTING)
        self._num_computed = end
        return self._append(tokens, reason)

    def drafted(self, draft: Draft | None) -> tuple[int, ...]:
        """Takes as much of the draft as may be used; returns the rows to verify from `position`."""
        self._move(Event.DRAFTED, State.VERIFYING)
        self._draft = draft.tokens[: self.draft_limit] if draft is not None else ()
        return (self.last_token, *self._draft)

    def verified(self, verdict: Verdict) -> Round:
        drafts = self._draft
        if len(verdict.choices) != len(drafts) + 1:
            raise InternalBug(f"{len(verdict.choices)} choices for {len(drafts) + 1} rows")
        num_accepted = 0
        while num_accepted < len(drafts) and drafts[num_accepted] == verdict.choices[num_accepted]:
            num_accepted += 1
        tokens, reason = self._take(verdict.choices[: num_accepted + 1])
        num_accepted = min(num_accepted, len(tokens))  # what lies beyond a stop token helped nobody
        self._move(Event.VERIFIED, State.FINISHED if reason else State.DRAFTING)
        position, computed = self._num_computed, (self.last_token, *drafts[:num_accepted])
        self._num_computed += num_accepted + 1
        return Round(position, computed, num_accepted, self._append(tokens, reason))

    def cancel(self) -> None:
        self._move(Event.CANCEL, State.CANCELLED)
        self.finish_reason = FinishReason.CANCELLED

    def fail(self) -> None:
        self._move(Event.FAIL, State.FAILED)

    def _take(self, choices: tuple[int, ...]) -> tuple[tuple[int, ...], FinishReason | None]:
        """The part of `choices` that belongs to the text, and why it ends there if it does."""
        room = self.request.max_tokens - len(self.output)
        for i, token in enumerate(choices[:room]):
            if token in self.request.stop_ids:
                return choices[:i], FinishReason.STOP
        return choices[:room], FinishReason.LENGTH if len(choices) >= room else None

    def _append(self, tokens: tuple[int, ...], reason: FinishReason | None) -> tuple[int, ...]:
        self.output += tokens
        self.finish_reason = reason
        return tokens
