"""Exact rollback, of both stores and every layout: whatever was drafted and rejected, the rows that follow have the bits of a
run that never drafted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from forerun.core.errors import PositionLost
from forerun.core.protocol import CHUNK
from forerun.kernels.backends import AnyBackend, make_memory, make_trunk
from forerun.kernels.cpu.program import Program
from forerun.kernels.model.memory import alone
from forerun.kernels.model.recurrent import STORES, StoreName
from forerun.kernels.model.trunk import Rows
from forerun.kernels.model.weights import ModelWeights
from forerun.kernels.reference import ReferenceBackend

from tests.checkpoints import LAYOUTS, prompt
from tests.conftest import ALL_BACKENDS

PROMPT = prompt(70)
TEXT = prompt(40)
WRONG = [(token + 1) % 250 for token in TEXT]
MAX_ROWS = 9

pytestmark = pytest.mark.parametrize("backend", ALL_BACKENDS, indirect=True)


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest) -> StoreName:
    return request.param


class Run:
    """One sequence after its prompt, verified step by step."""

    def __init__(self, weights: ModelWeights, store: StoreName, backend: AnyBackend) -> None:
        self.trunk = make_trunk(weights, backend)
        self.memory = alone(make_memory(weights.config, backend), len(PROMPT) + len(TEXT) + MAX_ROWS, MAX_ROWS, store)
        for start in range(0, len(PROMPT), CHUNK):
            self.trunk.prefill(Rows(self.memory, start, tuple(PROMPT[start : start + CHUNK])), is_last=False)

    def verify(self, at: int, tokens: list[int]) -> Any:
        """Logits of `tokens` from `at` positions after the prompt."""
        return np.asarray(self.trunk.verify([Rows(self.memory, len(PROMPT) + at, tuple(tokens))])[0])


@pytest.fixture
def plain(weights: ModelWeights, backend: AnyBackend) -> Any:
    """Logits of every row of TEXT, computed one row at a time: the truth."""
    run = Run(weights, "log", backend)
    return np.concatenate([run.verify(i, TEXT[i : i + 1]) for i in range(len(TEXT))])


@pytest.mark.parametrize("length", range(1, MAX_ROWS + 1))
def test_every_length_and_every_number_accepted(
    weights: ModelWeights, backend: AnyBackend, store: StoreName, plain: Any, length: int
) -> None:
    for accepted in range(length + 1):
        run = Run(weights, store, backend)
        run.verify(0, TEXT[:3])
        rows = TEXT[3 : 3 + accepted] + WRONG[3 + accepted : 3 + length]
        logits = run.verify(3, rows)
        np.testing.assert_array_equal(logits[:accepted], plain[3 : 3 + accepted])
        after = run.verify(3 + accepted, TEXT[3 + accepted : 6 + accepted])
        np.testing.assert_array_equal(after, plain[3 + accepted : 6 + accepted])


def test_the_whole_batch_twice_and_after_a_short_one(weights: ModelWeights, backend: AnyBackend, store: StoreName, plain: Any) -> None:
    run = Run(weights, store, backend)
    run.verify(0, TEXT[:5])
    for rows in (WRONG[5:9], WRONG[5:14], WRONG[5:6]):  # each rolled back whole; the last one is short
        run.verify(5, rows)
    np.testing.assert_array_equal(run.verify(5, TEXT[5:8]), plain[5:8])


def test_200_random_operations(weights: ModelWeights, backend: AnyBackend, store: StoreName, plain: Any) -> None:
    rng, run, at = np.random.default_rng(7), Run(weights, store, backend), 0
    for _ in range(200):
        length = int(rng.integers(1, MAX_ROWS + 1))
        right = int(rng.integers(0, length + 1))
        rows = (TEXT[at : at + right] + WRONG[at + right :])[:length]
        logits = run.verify(at, rows)
        right = min(right, len(rows))
        np.testing.assert_array_equal(logits[:right], plain[at : at + right])
        at += int(rng.integers(0, right + 1))  # any held position, not only the furthest
        if at > len(TEXT) - MAX_ROWS:
            run, at = Run(weights, store, backend), 0


def fail(*_: Any) -> Any:
    raise MemoryError


def test_a_decode_that_fails_leaves_its_start(
    weights: ModelWeights, backend: AnyBackend, store: StoreName, plain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(weights, store, backend)
    run.verify(0, TEXT[:4])
    with monkeypatch.context() as patch:
        patch.setattr(*((backend, "swiglu") if isinstance(backend, ReferenceBackend) else (Program, "run")), fail)
        with pytest.raises(MemoryError):
            run.verify(2, WRONG[2:6])
    np.testing.assert_array_equal(run.verify(2, TEXT[2:6]), plain[2:6])


def test_a_position_that_is_gone_is_refused(weights: ModelWeights, backend: AnyBackend, store: StoreName) -> None:
    run = Run(weights, store, backend)
    run.verify(0, TEXT[:4])
    run.verify(3, TEXT[3:5])
    first = len(PROMPT) + 3
    for at in (2, 6):
        with pytest.raises(PositionLost, match=f"held: {first} to {first + 2}"):
            run.verify(at, TEXT[:1])
    with pytest.raises(PositionLost):
        run.verify(5, TEXT * 2)


def test_rows_have_the_same_bits_in_any_company(weights: ModelWeights, backend: AnyBackend, store: StoreName, plain: Any) -> None:
    runs = [Run(weights, store, backend) for _ in range(5)]
    rows = [Rows(run.memory, len(PROMPT), tuple(TEXT[: i + 1] + WRONG[i + 1 : i + 3])) for i, run in enumerate(runs)]
    logits = runs[0].trunk.verify(rows)[0]
    start = 0
    for i, each in enumerate(rows):
        np.testing.assert_array_equal(logits[start : start + i + 1], plain[: i + 1])
        start += len(each.tokens)


def test_a_rollback_that_fails_half_way_says_so_ever_after(
    weights: ModelWeights, backend: AnyBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(weights, "log", backend)
    run.verify(0, TEXT[:4])
    with monkeypatch.context() as patch:
        patch.setattr(run.trunk, "replay", fail)
        with pytest.raises(MemoryError):
            run.trunk.freeze(run.memory, len(PROMPT) + 2, is_whole=True)
    with pytest.raises(PositionLost, match="failed half way"):
        run.verify(2, TEXT[2:6])


def test_a_checkpoint_goes_on_in_any_memory_used_or_not(weights: ModelWeights, backend: AnyBackend, store: StoreName, plain: Any) -> None:
    run, other = Run(weights, store, backend), Run(weights, store, backend)
    other.verify(0, WRONG[:7])
    run.verify(0, TEXT[:4])
    run.verify(2, TEXT[2:3])
    run.trunk.freeze(run.memory, len(PROMPT) + 3, is_whole=True)
    assert run.memory.frozen is not None
    other.memory.restore_snapshot(run.memory.frozen)
    np.testing.assert_array_equal(other.verify(3, TEXT[3:8]), plain[3:8])
    np.testing.assert_array_equal(other.verify(5, TEXT[5:8]), plain[5:8])
