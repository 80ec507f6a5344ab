"""Drafts that an MTP head makes behind a verify, before anybody has read what it chose, are those it makes when asked afterwards."""

from __future__ import annotations

from dataclasses import replace

import pytest
from forerun.core.speculation import num_alike
from forerun.core.vocabulary import Choosing, History, SamplingParams
from forerun.kernels.backends import AnyBackend, make_head, make_memory, make_trunk
from forerun.kernels.model.drafts import Drafted, Following, MtpRows, Wanted
from forerun.kernels.model.memory import SequenceMemory, alone
from forerun.kernels.model.trunk import Rows
from forerun.kernels.model.weights import ModelWeights
from forerun.kernels.sampling import Ask, Choices

from tests.checkpoints import prompt
from tests.conftest import ALL_BACKENDS

GREEDY, DRAWN = SamplingParams(), SamplingParams(temperature=0.9, seed=7, top_k=30)
PENALISED = SamplingParams(temperature=0.0, presence_penalty=0.5, logit_bias=((11, 100.0), (12, 99.8)))


@pytest.fixture
def layout() -> str:
    return "dense"


@pytest.mark.parametrize("backend", [*ALL_BACKENDS, "cuda"], indirect=True)
@pytest.mark.parametrize(
    ("hows", "is_greedy"),
    [
        ((GREEDY,) * 4, False),
        ((DRAWN,) * 4, True),
        ((DRAWN,) * 4, False),
        ((GREEDY, DRAWN, PENALISED, DRAWN), True),
        ((PENALISED, DRAWN, GREEDY, DRAWN), False),
    ],
    ids=["greedy", "drawn, greedy drafts", "drawn", "mixed, greedy drafts", "penalised"],
)
def test_drafts_behind_a_verify(weights: ModelWeights, backend: AnyBackend, hows: tuple[SamplingParams, ...], is_greedy: bool) -> None:
    """Of four sequences one wants no draft; of the others two drafts of three are right, none, and as many as it is said. `is_greedy`: the
    drafts are the likeliest tokens, however the target chooses."""
    trunk, head, lengths = make_trunk(weights, backend), make_head(weights, backend), (20, 23, 26, 29)

    def begin() -> list[SequenceMemory]:
        memories = [alone(make_memory(weights.config, backend), 60, 4) for _ in lengths]
        for memory, length in zip(memories, lengths, strict=True):
            tokens = tuple(prompt(length))
            trunk.prefill(Rows(memory, 0, tokens[:-1]), is_last=False)
            head.last([MtpRows(memory, 0, tokens[:-1], memory.hidden.before(0, length - 1))])
            head.last([MtpRows(memory, length - 1, tokens[-1:], memory.hidden.before(length - 1, 1))])
        return memories

    def choosing(i: int) -> Choosing:
        history = History(tuple(prompt(lengths[i])), lengths[i]) if hows[i].needs_history else None
        return Choosing(hows[i], history)

    def verify(memories: list[SequenceMemory], drafts: list[tuple[int, ...]], forced: int | None) -> Choices:
        rows = [
            Rows(memory, length - 1, (prompt(length)[-1], *ahead)) for memory, length, ahead in zip(memories, lengths, drafts, strict=True)
        ]
        asks = [
            Ask(choosing(i), length, ahead, forced if i == 3 else None)
            for i, (length, ahead) in enumerate(zip(lengths, drafts, strict=True))
        ]
        return Choices(trunk.verify(rows)[0], asks)

    memories, others, right = begin(), begin(), [list[int]() for _ in lengths]  # each verify goes back to where they begin
    for _ in range(3):  # what they choose
        chosen = verify(memories, [tuple(each) for each in right], None).read()
        right = [[*each, found[-1]] for each, found in zip(right, chosen, strict=True)]
    drafts = [(*right[0][:2], right[0][2] + 1), (right[1][0] + 1, 5), (7,), (right[3][0] + 1, right[3][1], 9)]
    wanted = [Wanted(Choosing(GREEDY) if is_greedy else choosing(i), 3) for i in range(4)]
    for forced in (None, 1, 3):
        choices = verify(memories, drafts, forced)
        following = [Following(memories[i], i, wanted[i]) for i in (0, 1, 3)]
        found = head.draft_after(following, choices).finish()
        numbers = [num_alike(ahead, chosen) for ahead, chosen in zip(drafts, choices.read(), strict=True)]
        assert [numbers[i] for i in (0, 1, 3)] == [2, 0, forced or 0]

        expected = list[Drafted]()
        again = verify(others, drafts, forced).read()
        assert again == choices.read()
        for i in (0, 1, 3):
            tokens = tuple(again[i][: numbers[i] + 1])
            rows = MtpRows(others[i], lengths[i], tokens, others[i].hidden.before(lengths[i], len(tokens)))
            expected += head.draft([rows], [replace(wanted[i], choosing=wanted[i].choosing.then(tokens))])
        assert [each.tokens for each in found] == [each.tokens for each in expected]
        for one, other in zip(found, expected, strict=True):
            assert one.shares == pytest.approx(other.shares, rel=1e-3)
