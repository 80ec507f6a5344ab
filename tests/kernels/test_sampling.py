"""Token choice: the filters against obvious twins, the draws against their distribution."""

from __future__ import annotations

import numpy as np
import pytest
from forerun.core.errors import InvalidRequest
from forerun.core.vocabulary import SamplingParams
from forerun.kernels.model.sampling import choose

LOGITS = np.array([2.0, 1.0, 0.5, 0.5, -1.0, -3.0], np.float32)


def shares(params: SamplingParams) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """The distribution after the filters, by the definition of each."""
    p = np.exp(LOGITS.astype(np.float64) / params.temperature)
    p /= p.sum()
    if params.top_k:
        p[p < np.sort(p)[-params.top_k]] = 0
    if params.top_p < 1:
        q, total = np.zeros_like(p), 0.0
        for token in sorted(range(len(p)), key=lambda t: -p[t]):
            if total < params.top_p * p.sum():
                q[token] = p[token]
            total += p[token]
        p = q
    p[p < params.min_p * p.max()] = 0
    return p / p.sum()


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(1.0),
        SamplingParams(0.5),
        SamplingParams(3.0, top_k=3),
        SamplingParams(1.0, top_k=2),
        SamplingParams(1.0, top_p=0.6),
        SamplingParams(1.0, top_p=0.95),
        SamplingParams(1.0, min_p=0.2),
        SamplingParams(0.8, top_k=4, top_p=0.9, min_p=0.1),
    ],
)
def test_draws_follow_the_filtered_distribution(params: SamplingParams) -> None:
    num_draws = 20_000
    counts = np.bincount([choose(LOGITS, params, position) for position in range(num_draws)], minlength=len(LOGITS))
    expected = shares(params) * num_draws
    assert (counts[expected == 0] == 0).all()
    kept = expected > 0
    chi_squared = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    assert chi_squared < 22.5  # p = 0.0004 at 5 degrees of freedom, the most there are


def test_greedy_takes_the_lowest_of_ties() -> None:
    assert choose(np.array([1, 3, 3], np.float32), SamplingParams(), 5) == 1


def test_the_smallest_temperature_is_greedy() -> None:
    assert choose(LOGITS[::-1].copy(), SamplingParams(1e-310), 0) == len(LOGITS) - 1


def test_a_choice_depends_on_seed_and_position_alone() -> None:
    flat = np.zeros(1000, np.float32)
    first = [choose(flat, SamplingParams(1.0, seed=1), p) for p in range(50)]
    assert [choose(flat, SamplingParams(1.0, seed=1), p) for p in reversed(range(50))] == first[::-1]
    assert [choose(flat, SamplingParams(1.0, seed=2), p) for p in range(50)] != first
    assert len(set(first)) > 40


@pytest.mark.parametrize(
    "bad", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 1.1}, {"top_k": -1}, {"seed": 2**64}, {"min_p": float("inf")}]
)
def test_values_out_of_range_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**bad)  # pyright: ignore[reportArgumentType]
    assert caught.value.violations[0][0] == next(iter(bad))
