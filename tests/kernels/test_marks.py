"""An MTP head says of tokens that it catches up on whether it would have drafted them."""

from __future__ import annotations

import pytest
from forerun.core.vocabulary import Choosing, SamplingParams
from forerun.kernels.backends import AnyBackend, make_head, make_memory, make_trunk
from forerun.kernels.model.drafts import MtpRows
from forerun.kernels.model.memory import alone
from forerun.kernels.model.trunk import Rows
from forerun.kernels.model.weights import ModelWeights
from forerun.kernels.sampling import Ask, choose_rows

from tests.checkpoints import prompt
from tests.conftest import ALL_BACKENDS

NUM_BEFORE, NUM_MARKED = 20, 8


@pytest.fixture
def layout() -> str:
    return "dense"


@pytest.mark.parametrize("backend", [*ALL_BACKENDS, "cuda"], indirect=True)
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_marks_are_what_drafts_would_have_been(weights: ModelWeights, backend: AnyBackend, temperature: float) -> None:
    trunk, head, how = make_trunk(weights, backend), make_head(weights, backend), Choosing(SamplingParams(temperature=temperature, seed=7))
    first, second = (alone(make_memory(weights.config, backend), 40, 1) for _ in range(2))
    tokens, expected = prompt(NUM_BEFORE), list[bool]()
    trunk.prefill(Rows(first, 0, tuple(tokens)), is_last=False)
    head.last([MtpRows(first, 0, tuple(tokens[:-1]), first.hidden.before(0, NUM_BEFORE - 1))])
    for i in range(NUM_MARKED):  # a text of which every third token is not what the head says
        position = len(tokens)
        _, logits = head.guess([MtpRows(first, position - 1, (tokens[-1],), first.hidden.before(position - 1, 1))])
        ((drafted,),) = choose_rows(logits, [Ask(how, position)])
        expected.append(i % 3 > 0)
        tokens.append(drafted if expected[-1] else drafted + 1)
        trunk.verify([Rows(first, position, (tokens[-1],))])
    ids = tuple(tokens)
    trunk.prefill(Rows(second, 0, ids), is_last=False)
    rows = MtpRows(second, 0, ids, second.hidden.before(0, len(ids)))
    assert list(head.mark(rows, NUM_MARKED, how)) == expected
    end = len(ids)
    nexts = MtpRows(first, end - 1, (ids[-1], 1), first.hidden.before(end - 1, 2)), MtpRows(second, end, (1,), second.hidden.before(end, 1))
    one, other = (choose_rows(head.guess([rows])[1], [Ask(how, end + 1)]) for rows in nexts)
    assert one == other  # the cache holds the same
    assert head.mark(MtpRows(second, 0, ids[:3], second.hidden.before(0, 3)), 0, how) == ()
