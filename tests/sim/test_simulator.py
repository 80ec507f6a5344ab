"""The simulator over 200 seeds, and that a seed decides everything."""

from __future__ import annotations

import pytest

from tests.sim.mutants import MUTANTS, ROOT
from tests.sim.simulator import run


@pytest.mark.parametrize("start", range(0, 200, 20))
def test_seeds(start: int) -> None:
    for seed in range(start, start + 20):
        run(seed)


def test_a_seed_replays_alike() -> None:
    logs = [run(seed).log for seed in range(5)]
    assert sum(map(len, logs)) > 1000
    assert [run(seed).log for seed in range(5)] == logs


def test_every_mutant_still_fits() -> None:
    for mutant in MUTANTS:  # python -m tests.sim.mutants runs them
        assert (ROOT / mutant.file).read_text().count(mutant.code) == 1, mutant.bug
