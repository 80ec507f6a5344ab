"""The draft-verify-commit life of one sequence, as a pure state machine: no I/O, no clock, no arrays.

Rules. A prompt is prefilled in chunks that end at multiples of CHUNK, and where a message of a chat ends: where chunks
begin and end depends on the tokens before alone, and so does what a chunk computes. Where chunks leave no trace in what is
computed, several are computed at once. The choice after the prompt's last
row is the first token. From then on the newest token is always one the target has chosen but not yet computed; a round
verifies [that token, drafts...] from its position, and drafts stand while they equal the target's own choices. So the
tokens are those the target would have chosen alone, and a round always brings at least one. A draft is never longer than
what may still be produced less one.

Memory may be lost with the actor that lent it, or be revoked for others. The sequence then waits for a new lease, prefills
the same chunks, and replays by steps what it had computed by steps, so that every row has the bits it had; the target
must choose the very tokens that the reader has seen already. Whatever ends a sequence leads through FINISHING, where the lease is given
back, to exactly one of three ends.

What is not in TRANSITIONS is refused, and a refused call changes nothing.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto

from .errors import InternalBug, RequestFailed
from .vocabulary import FinishReason, Request, Verdict

#: Positions a prefill chunk spans at most; chunks end at its multiples. The length of the WY blocks of gated delta net kernels.
CHUNK = 64
#: Positions a chunk has to have before a message's end may end it: shorter ones cost more than they can save.
MIN_CHUNK = 16
#: Positions between two checkpoints of a long prompt: each costs as much memory as some hundred positions of keys and values.
CHECKPOINT_INTERVAL = 8 * CHUNK


def chunk_ends(tokens: tuple[int, ...], boundary_ids: frozenset[int]) -> tuple[int, ...]:
    """Where the prefill chunks of a prompt end: at multiples of CHUNK, after a boundary token that stands MIN_CHUNK or more
    positions into its chunk, and at the end of the prompt."""
    ends: list[int] = []
    start = 0
    for position, token in enumerate(tokens, 1):
        if position % CHUNK == 0 or position == len(tokens) or (token in boundary_ids and position - start >= MIN_CHUNK):
            ends.append(position)
            start = position
    return tuple(ends)


def kept_ends(ends: tuple[int, ...]) -> frozenset[int]:
    """Of a prompt's chunks, the ends that others may want to go on from: where a message ends, near the prompt's end, and now and then
    between."""
    return frozenset(end for end in ends[:-1] if end % CHUNK != 0 or end % CHECKPOINT_INTERVAL == 0 or end == ends[-2])


def together(ends: tuple[int, ...], max_rows: int, kept: frozenset[int] = frozenset()) -> tuple[int, ...]:
    """Of chunks, the ends that stay when as many as have at most `max_rows` positions are computed at once; those in `kept` do."""
    following = (*ends[1:], None)
    out, start = list[int](), 0
    for end, after in zip(ends, following, strict=True):
        if after is None or end in kept or after - start > max_rows:
            out.append(end)
            start = end
    return tuple(out)


class State(Enum):
    WAITING = auto()  # for memory
    PREFILLING = auto()
    REPLAYING = auto()  # known tokens, after memory was lost
    DRAFTING = auto()
    VERIFYING = auto()
    COMMITTING = auto()  # drafters and reader are told
    FINISHING = auto()  # the lease is given back
    FINISHED = auto()
    CANCELLED = auto()
    FAILED = auto()


class Event(Enum):
    ADMITTED = auto()
    CHUNK_COMPUTED = auto()
    REPLAYED = auto()
    DRAFTED = auto()
    VERIFIED = auto()
    COMMITTED = auto()
    MEMORY_LOST = auto()
    CANCEL = auto()
    FAIL = auto()
    RELEASED = auto()


S, E = State, Event
#: (state, event) -> the states it may lead to
TRANSITIONS: dict[tuple[State, Event], tuple[State, ...]] = {
    (S.WAITING, E.ADMITTED): (S.PREFILLING, S.DRAFTING),
    (S.PREFILLING, E.CHUNK_COMPUTED): (S.PREFILLING, S.COMMITTING, S.REPLAYING, S.DRAFTING),
    (S.REPLAYING, E.REPLAYED): (S.REPLAYING, S.DRAFTING),
    (S.DRAFTING, E.DRAFTED): (S.VERIFYING,),
    (S.VERIFYING, E.VERIFIED): (S.COMMITTING,),
    (S.COMMITTING, E.COMMITTED): (S.DRAFTING, S.FINISHING),
    (S.PREFILLING, E.MEMORY_LOST): (S.WAITING,),
    (S.REPLAYING, E.MEMORY_LOST): (S.WAITING,),
    (S.DRAFTING, E.MEMORY_LOST): (S.WAITING,),
    (S.VERIFYING, E.MEMORY_LOST): (S.WAITING,),
    (S.WAITING, E.CANCEL): (S.FINISHING,),
    (S.PREFILLING, E.CANCEL): (S.FINISHING,),
    (S.REPLAYING, E.CANCEL): (S.FINISHING,),
    (S.DRAFTING, E.CANCEL): (S.FINISHING,),
    (S.VERIFYING, E.CANCEL): (S.FINISHING,),
    (S.COMMITTING, E.CANCEL): (S.FINISHING,),
    (S.WAITING, E.FAIL): (S.FINISHING,),
    (S.PREFILLING, E.FAIL): (S.FINISHING,),
    (S.REPLAYING, E.FAIL): (S.FINISHING,),
    (S.DRAFTING, E.FAIL): (S.FINISHING,),
    (S.VERIFYING, E.FAIL): (S.FINISHING,),
    (S.COMMITTING, E.FAIL): (S.FINISHING,),
    (S.FINISHING, E.RELEASED): (S.FINISHED, S.CANCELLED, S.FAILED),
}
ENDS = (State.FINISHED, State.CANCELLED, State.FAILED)


def diagram() -> str:
    """TRANSITIONS as a Mermaid state diagram, the events of one pair of states on one arrow."""
    arrows: dict[tuple[State, State], list[str]] = {}
    for (state, event), targets in TRANSITIONS.items():
        for target in targets:
            arrows.setdefault((state, target), []).append(event.name.lower())
    lines = ["stateDiagram-v2", f"    [*] --> {State.WAITING.name}"]
    lines += [f"    {state.name} --> {target.name}: {', '.join(events)}" for (state, target), events in arrows.items()]
    return "\n".join([*lines, *(f"    {end.name} --> [*]" for end in ENDS)])


@dataclass(frozen=True, slots=True)
class Round:
    """What one verify settled: `num_drafted` draft tokens were verified and `num_accepted` right, `tokens` are new for the reader
    (without a stop token)."""

    num_drafted: int
    num_accepted: int
    tokens: tuple[int, ...]


class SequenceProtocol:
    """One request from admission to its end. `finish_reason` is set once the end is decided, but for failures."""

    def __init__(
        self,
        request: Request,
        output: tuple[int, ...] = (),
        find_stop: Callable[[tuple[int, ...]], int | None] = lambda tokens: None,
        *,
        max_together: int = 0,
        keeps_prefixes: bool = False,
        is_by_chunks: bool = True,
    ) -> None:
        """`output` is what a saved request had produced. `find_stop` is told all new tokens, once, and returns how many of them it takes
        until a stop text stands there. Chunks of at most `max_together` positions are computed at once; with `keeps_prefixes` not beyond
        where others may go on from. `is_by_chunks`: it goes on itself only where its chunks end."""
        self.request = request
        self.chunk_ends = chunk_ends(request.prompt_ids, request.boundary_ids)
        self.kept_ends = kept_ends(self.chunk_ends) if keeps_prefixes else frozenset[int]()
        self._prefill_ends = together(self.chunk_ends, max_together, self.kept_ends)
        self._is_by_chunks = is_by_chunks
        self.state = State.WAITING
        self.holds_lease = False
        self.finish_reason: FinishReason | None = None
        self.output = list(output)
        self._is_restored = bool(output)
        self.matched_stop_id: int | None = None
        self._find_stop = find_stop
        self._num_computed = 0  # positions the target's memory holds for good
        self._draft: tuple[int, ...] = ()
        self._round: Round | None = None  # in COMMITTING
        self._end = State.FINISHED  # where FINISHING leads

    def _move(self, event: Event, target: State) -> None:
        if target not in TRANSITIONS.get((self.state, event), ()):
            raise InternalBug(f"{event.name} may not lead from {self.state.name} to {target.name}")
        self.state = target

    @property
    def is_over(self) -> bool:
        """Whether the end is decided; what is left is giving back."""
        return self.state is State.FINISHING or self.state in ENDS

    @property
    def position(self) -> int:
        """Where the next chunk, replay or round starts."""
        return self._num_computed

    def computed(self, start: int = 0) -> tuple[int, ...]:
        """The tokens that memory holds for good, from a position on."""
        prompt = self.request.prompt_ids
        num_prompt = len(prompt)
        return prompt[start : self._num_computed] + tuple(self.output[max(0, start - num_prompt) : max(0, self._num_computed - num_prompt)])

    @property
    def last_token(self) -> int:
        """The newest token, chosen and not yet computed. Only once the prompt is computed."""
        return self.output[-1]

    @property
    def draft_limit(self) -> int:
        """The most draft tokens the next round can use: a verify brings one token more than it accepts."""
        return self.request.max_tokens - len(self.output) - 1

    @property
    def round(self) -> Round:
        """What is to be told in COMMITTING."""
        assert self._round is not None
        return self._round

    # Memory

    def admitted(self, num_cached: int = 0) -> None:
        """A lease was lent, which holds the prompt's first `num_cached` tokens, not all of them; by chunks, up to the end of one."""
        if not 0 <= num_cached < len(self.request.prompt_ids) or (self._is_by_chunks and num_cached not in (0, *self.chunk_ends)):
            raise InternalBug(f"memory holds {num_cached} tokens, but chunks end at {self.chunk_ends}")
        self._move(Event.ADMITTED, State.PREFILLING)
        self.holds_lease = True
        self._num_computed = num_cached

    def restored(self) -> None:
        """A lease was lent that holds all but the newest token, as it was saved between two rounds."""
        if not self.output:
            raise InternalBug("nothing was saved of this request")
        self._move(Event.ADMITTED, State.DRAFTING)
        self.holds_lease = True
        self._num_computed = len(self.request.prompt_ids) + len(self.output) - 1

    def memory_lost(self) -> None:
        """The lease is void: back to waiting for one. What the reader has is kept."""
        self._move(Event.MEMORY_LOST, State.WAITING)
        self.holds_lease = False

    # The prompt

    def next_chunk(self) -> tuple[int, ...]:
        """The prompt's tokens from `position` to the chunk's end, or to that of chunks computed at once."""
        following = self._prefill_ends[bisect_right(self._prefill_ends, self._num_computed) :]
        return self.request.prompt_ids[self._num_computed : following[0]] if following else ()

    def chunk_computed(self, verdict: Verdict) -> None:
        """The chunk stands; after the last one the verdict holds the first token."""
        end = self._num_computed + len(self.next_chunk())
        if end < len(self.request.prompt_ids):
            self._move(Event.CHUNK_COMPUTED, State.PREFILLING)
            self._num_computed = end
        elif self.output:
            self._check(verdict.choices, (self.output[0],))
            self._move(Event.CHUNK_COMPUTED, State.REPLAYING if len(self.output) > 1 else State.DRAFTING)
            self._num_computed = end
        else:
            self._move(Event.CHUNK_COMPUTED, State.COMMITTING)
            tokens, reason = self._take(verdict.choices)
            self._num_computed = end
            self._settle(Round(0, 0, tokens), reason)

    # Replay

    def next_replay(self, max_rows: int) -> tuple[int, ...]:
        """Known tokens from `position` that are to be computed again, `max_rows` at most: all but the newest one."""
        start = self._num_computed - len(self.request.prompt_ids)
        return tuple(self.output[start : min(start + max_rows, len(self.output) - 1)])

    def replayed(self, verdict: Verdict) -> None:
        """So many rows as the verdict has choices stand again. InternalBug when the target now chooses something else."""
        end = self._num_computed + len(verdict.choices)
        start = self._num_computed - len(self.request.prompt_ids) + 1
        self._check(verdict.choices, tuple(self.output[start : start + len(verdict.choices)]))
        is_done = end == len(self.request.prompt_ids) + len(self.output) - 1
        self._move(Event.REPLAYED, State.DRAFTING if is_done else State.REPLAYING)
        self._num_computed = end

    def _check(self, choices: tuple[int, ...], known: tuple[int, ...]) -> None:
        if choices == known:
            return
        problem = f"a replay of {self.request.request_id} chose {choices} where the text has {known}"
        raise RequestFailed(problem + ", as it was saved") if self._is_restored else InternalBug(problem)

    # Rounds

    def drafted(self, draft: tuple[int, ...]) -> tuple[int, ...]:
        """Takes as much of the draft as may be used, up to the first token there is not; returns the rows to verify from `position`."""
        self._move(Event.DRAFTED, State.VERIFYING)
        tokens = draft[: self.draft_limit]
        unknown = (i for i, token in enumerate(tokens) if not 0 <= token < self.request.vocabulary)
        self._draft = tokens[: next(unknown, None)]
        return self.rows

    @property
    def rows(self) -> tuple[int, ...]:
        """The rows to verify, in VERIFYING."""
        return (self.last_token, *self._draft)

    def verified(self, verdict: Verdict) -> None:
        drafts = self._draft
        if len(verdict.choices) != len(drafts) + 1:
            raise InternalBug(f"{len(verdict.choices)} choices for {len(drafts) + 1} rows")
        num_accepted = 0
        while num_accepted < len(drafts) and drafts[num_accepted] == verdict.choices[num_accepted]:
            num_accepted += 1
        self._move(Event.VERIFIED, State.COMMITTING)
        tokens, reason = self._take(verdict.choices[: num_accepted + 1])
        num_accepted = min(num_accepted, len(tokens))  # what lies beyond a stop token helped nobody
        self._num_computed += num_accepted + 1
        self._settle(Round(len(drafts), num_accepted, tokens), reason)

    def committed(self) -> None:
        """Everybody has been told of the round."""
        self._move(Event.COMMITTED, State.FINISHING if self.finish_reason else State.DRAFTING)
        self._round = None

    # The end

    def cancel(self) -> None:
        self._move(Event.CANCEL, State.FINISHING)
        self.finish_reason, self._end = FinishReason.CANCELLED, State.CANCELLED

    def fail(self) -> None:
        self._move(Event.FAIL, State.FINISHING)
        self.finish_reason, self._end = None, State.FAILED

    def released(self) -> None:
        """The lease, if there was one, is given back."""
        self._move(Event.RELEASED, self._end)
        self.holds_lease = False

    def _take(self, choices: tuple[int, ...]) -> tuple[tuple[int, ...], FinishReason | None]:
        """The part of `choices` that belongs to the text, and why it ends there if it does."""
        room = self.request.max_tokens - len(self.output)
        stop = next((i for i, token in enumerate(choices[:room]) if token in self.request.stop_ids), None)
        tokens = choices[:room] if stop is None else choices[:stop]
        if (length := self._find_stop(tokens)) is not None:
            return tokens[:length], FinishReason.STOP
        if stop is not None:
            self.matched_stop_id = choices[stop]
            return tokens, FinishReason.STOP
        return tokens, FinishReason.LENGTH if len(choices) >= room else None

    def _settle(self, done: Round, reason: FinishReason | None) -> None:
        self.output += done.tokens
        self._round, self.finish_reason = done, reason
