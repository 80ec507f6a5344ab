"""The protocol alone: every path ends once with all given back, a refused call changes nothing, rounds do the bookkeeping they say."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from forerun.core.errors import InternalBug
from forerun.core.protocol import CHUNK, ENDS, TRANSITIONS, Event, SequenceProtocol, State, diagram
from forerun.core.vocabulary import FinishReason, Request, SamplingParams, Verdict

STOP, VOCABULARY = 99, 100


def protocol(num_prompt: int = 3, max_tokens: int = 10) -> SequenceProtocol:
    request = Request("r", tuple(range(num_prompt)), max_tokens, SamplingParams(), frozenset({STOP}), VOCABULARY)
    return SequenceProtocol(request)


def is_last_chunk(p: SequenceProtocol) -> bool:
    return p.position + len(p.next_chunk()) == len(p.request.prompt_ids)


def started(num_prompt: int = 3, max_tokens: int = 10, first: int = 50) -> SequenceProtocol:
    p = protocol(num_prompt, max_tokens)
    p.admitted()
    while p.state is State.PREFILLING:
        p.chunk_computed(Verdict((first,) if is_last_chunk(p) else ()))
    p.committed()
    return p


def test_chunks_start_at_multiples_and_cover_the_prompt() -> None:
    p = protocol(num_prompt=2 * CHUNK + 2)
    p.admitted()
    seen: list[int] = []
    for position in (0, CHUNK, 2 * CHUNK):
        assert p.position == position
        seen += p.next_chunk()
        p.chunk_computed(Verdict((7,) if position == 2 * CHUNK else ()))
    assert tuple(seen) == p.request.prompt_ids
    assert (p.state, p.position, p.last_token, p.round.tokens) == (State.COMMITTING, 2 * CHUNK + 2, 7, (7,))
    p.committed()
    assert p.state is State.DRAFTING


def test_a_round_keeps_what_equals_the_targets_choices() -> None:
    p = started()
    assert p.drafted((1, 2, 3)) == (50, 1, 2, 3)
    p.verified(Verdict((1, 2, 8, 9)))
    done = p.round
    assert (done.num_drafted, done.num_accepted, done.tokens) == (3, 2, (1, 2, 8))
    assert (p.output, p.position, p.last_token) == ([50, 1, 2, 8], 6, 8)
    assert (p.computed(), p.computed(2), p.computed(4), p.computed(6)) == ((0, 1, 2, 50, 1, 2), (2, 50, 1, 2), (1, 2), ())


def test_a_draft_is_used_up_to_the_first_token_there_is_not() -> None:
    assert started().drafted((1, 2, VOCABULARY, 3)) == (50, 1, 2)
    assert started().drafted((-1,)) == (50,)


def test_a_stop_token_ends_the_text_and_is_not_part_of_it() -> None:
    p = started()
    p.drafted((1, STOP, 3))
    p.verified(Verdict((1, STOP, 3, 4)))
    assert p.round.tokens == (1,)
    p.committed()
    assert (p.state, p.finish_reason, p.output) == (State.FINISHING, FinishReason.STOP, [50, 1])


def test_never_more_than_max_tokens() -> None:
    p = started(max_tokens=4)
    assert p.draft_limit == 2
    assert p.drafted((1, 2, 3, 4, 5)) == (50, 1, 2)
    p.verified(Verdict((1, 2, 3)))
    assert p.round.tokens == (1, 2, 3)
    p.committed()
    assert (p.state, p.finish_reason, len(p.output)) == (State.FINISHING, FinishReason.LENGTH, 4)
    assert started(max_tokens=1).state is State.FINISHING


def test_lost_memory_is_replayed_by_chunks_then_by_steps_and_must_choose_the_same() -> None:
    p = started(num_prompt=CHUNK + 2)
    p.drafted((1, 2))
    p.verified(Verdict((1, 2, 3)))
    p.committed()
    p.drafted(())
    p.memory_lost()
    assert (p.state, p.holds_lease, p.output) == (State.WAITING, False, [50, 1, 2, 3])
    p.admitted()
    assert p.position == 0
    p.chunk_computed(Verdict(()))
    with pytest.raises(InternalBug, match="replay"):
        copy.deepcopy(p).chunk_computed(Verdict((51,)))
    p.chunk_computed(Verdict((50,)))
    assert p.state is State.REPLAYING
    assert p.next_replay(2) == (50, 1)
    p.replayed(Verdict((1, 2)))
    assert p.next_replay(2) == (2,)
    with pytest.raises(InternalBug, match="replay"):
        copy.deepcopy(p).replayed(Verdict((4,)))
    p.replayed(Verdict((3,)))
    assert (p.state, p.position, p.last_token) == (State.DRAFTING, CHUNK + 5, 3)


CALLS: dict[Event, Callable[[SequenceProtocol], object]] = {
    Event.ADMITTED: lambda p: p.admitted(),
    Event.CHUNK_COMPUTED: lambda p: p.chunk_computed(Verdict((1,))),
    Event.REPLAYED: lambda p: p.replayed(Verdict(())),
    Event.DRAFTED: lambda p: p.drafted(()),
    Event.VERIFIED: lambda p: p.verified(Verdict((1,))),
    Event.COMMITTED: lambda p: p.committed(),
    Event.MEMORY_LOST: lambda p: p.memory_lost(),
    Event.CANCEL: lambda p: p.cancel(),
    Event.FAIL: lambda p: p.fail(),
    Event.RELEASED: lambda p: p.released(),
}


@pytest.mark.parametrize("state", State)
def test_what_is_not_in_the_table_is_refused_and_changes_nothing(state: State) -> None:
    assert set(CALLS) == set(Event)
    for event, call in CALLS.items():
        if (state, event) not in TRANSITIONS:
            p = started()
            p.state = state
            before = {name: copy.copy(value) for name, value in vars(p).items()}
            with pytest.raises(InternalBug):
                call(p)
            assert vars(p) == before


def successors(p: SequenceProtocol) -> Iterator[tuple[Event, SequenceProtocol]]:
    """Every message that may come next, in every form that matters: right, half right and wrong drafts, stop tokens, losses."""
    plain = (Event.CANCEL, Event.FAIL, Event.MEMORY_LOST, Event.ADMITTED, Event.COMMITTED, Event.RELEASED)
    moves: list[tuple[Event, Callable[[SequenceProtocol], object]]] = [(event, CALLS[event]) for event in plain]
    if p.state is State.WAITING and p.output:
        moves.append((Event.ADMITTED, SequenceProtocol.restored))
    if p.state is State.PREFILLING:
        firsts = ((p.output[0],) if p.output else (50, STOP)) if is_last_chunk(p) else (None,)
        verdicts = [Verdict(() if first is None else (first,)) for first in firsts]
        moves += [(Event.CHUNK_COMPUTED, partial(SequenceProtocol.chunk_computed, verdict=verdict)) for verdict in verdicts]
    if p.state is State.REPLAYING:
        rows = p.next_replay(1)
        start = p.output.index(rows[0]) + 1  # the tokens of this text are all different
        moves.append((Event.REPLAYED, partial(SequenceProtocol.replayed, verdict=Verdict(tuple(p.output[start : start + len(rows)])))))
    if p.state is State.DRAFTING:
        drafts = ((), (60,), (60, 61))
        moves += [(Event.DRAFTED, partial(SequenceProtocol.drafted, draft=draft)) for draft in drafts]
    if p.state is State.VERIFYING:
        rows = p.rows
        newest = max(p.output)
        for right in range(len(rows)):
            choices = (*rows[1 : right + 1], *(newest + 20 + i for i in range(len(rows) - right)))
            for verdict in (Verdict(choices), Verdict((*choices[:right], STOP, *choices[right + 1 :]))):
                moves.append((Event.VERIFIED, partial(SequenceProtocol.verified, verdict=verdict)))
    for event, move in moves:
        if (p.state, event) in TRANSITIONS:
            following = copy.deepcopy(p)
            move(following)
            yield event, following


def key(p: SequenceProtocol) -> object:
    return tuple(repr(value) for name, value in vars(p).items() if name != "request")


def test_every_reachable_state_and_message_leads_to_exactly_one_end_with_all_given_back() -> None:
    start = protocol(num_prompt=CHUNK + 1, max_tokens=4)
    saved = SequenceProtocol(start.request, (50, 51))
    seen, todo, taken = {key(start), key(saved)}, [start, saved], set[tuple[State, Event, State]]()
    leads_to: dict[object, list[object]] = {}
    ends: set[object] = set()
    while todo:
        p = todo.pop()
        following = list(successors(p))
        leads_to[key(p)] = [key(q) for _, q in following]
        if p.state in ENDS:
            assert not following
            assert not p.holds_lease
            assert (p.finish_reason is None) == (p.state is State.FAILED)
            ends.add(key(p))
        else:
            assert following, p.state
        for event, q in following:
            taken.add((p.state, event, q.state))
            assert q.holds_lease or q.state not in (State.PREFILLING, State.REPLAYING, State.DRAFTING, State.VERIFYING, State.COMMITTING)
            assert list(p.output) == q.output[: len(p.output)]  # what was said is never taken back
            if key(q) not in seen:
                seen.add(key(q))
                todo.append(q)
    assert taken == {(state, event, target) for (state, event), targets in TRANSITIONS.items() for target in targets}
    # From everywhere an end can be reached: walk back from the ends.
    comes_from: dict[object, set[object]] = {}
    for one, others in leads_to.items():
        for other in others:
            comes_from.setdefault(other, set()).add(one)
    reaching, front = set(ends), list(ends)
    while front:
        for one in comes_from.get(front.pop(), ()):
            if one not in reaching:
                reaching.add(one)
                front.append(one)
    assert reaching == seen


def test_what_was_saved_goes_on_where_it_was() -> None:
    p = SequenceProtocol(protocol().request, (50, 1))
    p.restored()
    assert (p.state, p.position, p.last_token, p.computed()) == (State.DRAFTING, 4, 1, (0, 1, 2, 50))
    with pytest.raises(InternalBug, match="nothing was saved"):
        protocol().restored()


def test_any_drafts_give_the_tokens_of_no_drafts() -> None:
    text = [random.Random(3).randrange(90) for _ in range(60)]
    for seed in range(50):
        rng = random.Random(seed)
        p = started(max_tokens=40, first=text[0])
        while p.state is not State.FINISHING:
            at = len(p.output)
            guess = [token if rng.random() < 0.7 else 91 for token in text[at : at + rng.randrange(6)]]
            rows = p.drafted(tuple(guess))
            p.verified(Verdict(tuple(text[at : at + len(rows)])))
            p.committed()
        assert p.output == text[:40]


def test_the_readmes_diagram_is_the_table() -> None:
    readme = (Path(__file__).parents[2] / "core" / "README.md").read_text()
    (shown,) = re.findall(r"```mermaid\n(.*?)\n```", readme, re.DOTALL)
    assert shown == diagram(), "run: python -c 'from forerun.core.protocol import diagram; print(diagram())'"
