"""The protocol alone: every path ends once, a refused call changes nothing, rounds do the bookkeeping they say."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from forerun.core.errors import InternalBug
from forerun.core.protocol import CHUNK, TRANSITIONS, Event, SequenceProtocol, State
from forerun.core.vocabulary import Draft, FinishReason, Request, SamplingParams, Verdict

STOP = 99


def protocol(num_prompt: int = 3, max_tokens: int = 10) -> SequenceProtocol:
    request = Request("r", tuple(range(num_prompt)), max_tokens, SamplingParams(), frozenset({STOP}))
    return SequenceProtocol(request)


def started(**options: int) -> SequenceProtocol:
    p = protocol(**options)
    p.admitted()
    while p.state is State.PREFILLING:
        p.chunk_computed(Verdict((50,)) if p.position + len(p.next_chunk()) == len(p.request.prompt_ids) else Verdict(()))
    return p


def test_chunks_start_at_multiples_and_cover_the_prompt() -> None:
    p = protocol(num_prompt=2 * CHUNK + 2)
    p.admitted()
    seen: list[int] = []
    for position in (0, CHUNK, 2 * CHUNK):
        assert p.position == position
        seen += p.next_chunk()
        new = p.chunk_computed(Verdict((7,) if position == 2 * CHUNK else ()))
    assert tuple(seen) == p.request.prompt_ids
    assert new == (7,)
    assert (p.state, p.position, p.last_token) == (State.DRAFTING, 2 * CHUNK + 2, 7)


def test_a_round_keeps_what_equals_the_targets_choices() -> None:
    p = started()
    assert p.drafted(Draft("draft-mtp", (1, 2, 3))) == (50, 1, 2, 3)
    done = p.verified(Verdict((1, 2, 8, 9)))
    assert (done.position, done.computed, done.num_accepted, done.tokens) == (3, (50, 1, 2), 2, (1, 2, 8))
    assert (p.output, p.position, p.last_token) == ([50, 1, 2, 8], 6, 8)


def test_a_stop_token_ends_the_text_and_is_not_part_of_it() -> None:
    p = started()
    p.drafted(Draft("draft-mtp", (1, STOP, 3)))
    assert p.verified(Verdict((1, STOP, 3, 4))).tokens == (1,)
    assert (p.state, p.finish_reason, p.output) == (State.FINISHED, FinishReason.STOP, [50, 1])


def test_never_more_than_max_tokens() -> None:
    p = started(max_tokens=4)
    assert p.draft_limit == 2
    assert p.drafted(Draft("draft-mtp", (1, 2, 3, 4, 5))) == (50, 1, 2)
    assert p.verified(Verdict((1, 2, 3))).tokens == (1, 2, 3)
    assert (p.state, p.finish_reason, len(p.output)) == (State.FINISHED, FinishReason.LENGTH, 4)
    assert started(max_tokens=1).state is State.FINISHED


def test_what_is_not_in_the_table_is_refused_and_changes_nothing() -> None:
    calls: dict[Event, Callable[[SequenceProtocol], object]] = {
        Event.ADMITTED: lambda p: p.admitted(),
        Event.DRAFTED: lambda p: p.drafted(None),
        Event.VERIFIED: lambda p: p.verified(Verdict((1,))),
        Event.CANCEL: lambda p: p.cancel(),
        Event.FAIL: lambda p: p.fail(),
    }
    for state in State:
        for event, call in calls.items():
            if (state, event) not in TRANSITIONS:
                p = started()
                p.state = state
                before = (list(p.output), p.position, p.finish_reason)
                with pytest.raises(InternalBug):
                    call(p)
                assert (p.state, (p.output, p.position, p.finish_reason)) == (state, before)


def test_any_drafts_give_the_tokens_of_no_drafts() -> None:
    text = [random.Random(3).randrange(90) for _ in range(60)]
    for seed in range(50):
        rng = random.Random(seed)
        p = started(max_tokens=40)
        p.output[0] = text[0]
        while p.state is not State.FINISHED:
            at = len(p.output)
            guess = [token if rng.random() < 0.7 else 91 for token in text[at : at + rng.randrange(6)]]
            rows = p.drafted(Draft("draft-mtp", tuple(guess)) if guess else None)
            p.verified(Verdict(tuple(text[at : at + len(rows)])))
        assert p.output == text[:40]
