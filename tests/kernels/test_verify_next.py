"""A verify that is begun behind another, before anybody has read what that one chose, has the bits of one that is asked for afterwards."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from forerun.core.vocabulary import Choosing, SamplingParams
from forerun.kernels.backend import F32
from forerun.kernels.backends import AnyBackend, make_head, make_memory, make_trunk
from forerun.kernels.cuda.matrices import CudaBackend
from forerun.kernels.model.drafts import Following, MtpRows, NextRows, Wanted, brought
from forerun.kernels.model.memory import SequenceMemory, alone
from forerun.kernels.model.recurrent import StoreName
from forerun.kernels.model.trunk import Rows
from forerun.kernels.model.weights import ModelWeights
from forerun.kernels.sampling import Ask, Choices

from tests.checkpoints import prompt

LENGTHS = (20, 23, 26)
GREEDY, DRAWN = SamplingParams(), SamplingParams(temperature=0.9, seed=7, top_k=30)


@pytest.fixture
def layout() -> str:
    return "dense"


#: A position, and the tokens from there on.
Place = tuple[int, tuple[int, ...]]


class Run:
    """Three sequences on one trunk, each with a prompt of its own; all but its last token has been computed."""

    def __init__(self, weights: ModelWeights, backend: AnyBackend, store: StoreName, sampling: SamplingParams = GREEDY) -> None:
        self.trunk, self.choosing = make_trunk(weights, backend), Choosing(sampling)
        self.memories: list[SequenceMemory] = [alone(make_memory(weights.config, backend), 60, 8, store) for _ in LENGTHS]
        for memory, length in zip(self.memories, LENGTHS, strict=True):
            self.trunk.prefill(Rows(memory, 0, tuple(prompt(length)[:-1])), is_last=False)

    def verify(self, places: Sequence[Place]) -> F32:
        return self.trunk.verify([Rows(memory, *place) for memory, place in zip(self.memories, places, strict=True)])[0]

    def choices(self, logits: F32, places: Sequence[Place], num_right: int | None) -> Choices:
        return Choices(logits, [Ask(self.choosing, position + 1, tokens[1:], num_right) for position, tokens in places])


FIRST: list[Place] = [(length - 1, tuple(prompt(length)[-1:])) for length in LENGTHS]


@pytest.mark.parametrize("backend", ["cuda"], indirect=True)
@pytest.mark.parametrize(("store", "sampling"), [("log", DRAWN), ("snapshots", GREEDY)])
def test_rounds_begun_behind_one_another(weights: ModelWeights, backend: AnyBackend, store: StoreName, sampling: SamplingParams) -> None:
    """After a verify of which some drafts are right, the head drafts for some sequences, and the next verify begins, all before anybody
    reads; then the same again. In one round as many drafts as is said count as right, in another all verify something else in the end."""
    head, run, other = make_head(weights, backend), Run(weights, backend, store, sampling), Run(weights, backend, store, sampling)
    for memory, length in zip(run.memories, LENGTHS, strict=True):
        head.last([MtpRows(memory, 0, tuple(prompt(length)), memory.hidden.before(0, length))])
    right = [found[0] for found in other.choices(other.verify(FIRST), FIRST, None).read()]
    places: list[Place] = [
        (position, (*tokens, right[i] + (i == 1), 5)) for i, (position, tokens) in enumerate(FIRST)
    ]  # one is right, none is, one is
    logits, num_right = run.verify(places), None
    for number, limits in enumerate([(2, 0, 3), (0, 0, 0), (3, 0, 1), (2, 2, 2), (0, 3, 0), (1, 0, 0)]):
        choices = run.choices(logits, places, num_right)
        following = [Following(run.memories[i], i, Wanted(run.choosing, limit)) for i, limit in enumerate(limits) if limit]
        begun = head.draft_after(following, choices) if following else None
        order = [each.index for each in following]
        batch = [NextRows(run.memories[i], i, order.index(i) if limit else 0, limit) for i, limit in enumerate(limits)]
        found = run.trunk.verify_next(batch, choices, begun.on_device if begun is not None else None)
        assert found is not None
        assert choices.read() == other.choices(other.verify(places), places, num_right).read()

        drafts = dict(zip(order, begun.finish(), strict=True)) if begun is not None else {}
        for i, limit in enumerate(limits):
            position, tokens = brought(choices, i)
            places[i] = position + len(tokens) - 1, (tokens[-1], *(drafts[i].tokens if limit else ()))
            run.trunk.settle(run.memories[i], places[i][0], 1 + limit)
        assert np.array_equal(np.asarray(found), np.asarray(other.verify(places)))
        if number == 2:
            places = [(position, (tokens[0], 9, 8)) for position, tokens in places]
            found = run.verify(places)
        logits, num_right = found, 1 if number == 3 else None


@pytest.mark.parametrize("backend", ["cuda"], indirect=True)
@pytest.mark.parametrize("full", ["buffers", "graphs"])
def test_without_room_the_next_is_not_begun(
    weights: ModelWeights, backend: CudaBackend, full: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device that is full computes one verify after another."""
    run = Run(weights, backend, "log")
    choices = run.choices(run.verify(FIRST), FIRST, None)
    found = choices.read()
    batch = [NextRows(memory, i, 0, 0) for i, memory in enumerate(run.memories)]

    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    where, name = (backend.device, "zeros") if full == "buffers" else (backend.kernels(weights.config), "record")
    with monkeypatch.context() as patch:
        patch.setattr(where, name, fail)
        for _ in range(3):
            assert run.trunk.verify_next(batch, choices, None) is None
            choices = run.choices(run.verify(FIRST), FIRST, None)
            assert choices.read() == found
