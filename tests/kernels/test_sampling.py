"""Token choice: the filters against obvious twins, the draws against their distribution."""

from __future__ import annotations

import numpy as np
import pytest
from forerun.core.errors import InvalidRequest
from forerun.core.vocabulary import Choosing, History, SamplingParams
from forerun.kernels.cpu.library import library
from forerun.kernels.cpu.matrices import CpuBackend
from forerun.kernels.formats.stored import Stored
from forerun.kernels.sampling import Ask, _penalised, choose, choose_rows, draw, logprobs, share  # pyright: ignore[reportPrivateUsage]

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


@pytest.mark.parametrize("seed", range(5))
def test_c_draws_what_numpy_draws(seed: int) -> None:
    """With every filter, ties, tokens ruled out, any temperature, and on as many threads as the program before."""
    try:
        draw_in_c, backend = library().draw, CpuBackend(1 + seed)
    except OSError:
        pytest.skip("there are no C kernels")
    backend.matrix(Stored("Q8_0", 32, np.zeros((64, 34), np.uint8)))
    rng = np.random.default_rng(seed)
    for _ in range(100):
        size = int(rng.choice([1, 2, 3, 5, 17, 64, 100, 1000, 4099]))
        logits = rng.normal(0, rng.choice([0.1, 1, 3, 10]), size)
        kind = int(rng.integers(3))
        if kind == 0:
            logits = np.round(logits)
        if kind == 1:
            logits[1:][rng.random(size - 1) < 0.3] = -np.inf
        rows = np.stack([logits, np.roll(logits, 1), logits]).astype(np.float32)
        how = [
            SamplingParams(
                float(rng.choice([0, 1e-310, 0.05, 0.3, 0.8, 1, 1.5, 3])), int(rng.choice([0, 1, 2, 20, size, max(1, size - 1)])),
                float(rng.choice([1, 1, 0.99, 0.9, 0.5, 0.01])), float(rng.choice([0, 0, 0.05, 0.3, 1])), seed * (2**62 - 1),
            )
            for _ in rows
        ]  # fmt: skip
        positions = rng.integers(10**6, size=len(rows)).tolist()
        assert draw_in_c(rows, how, positions) == draw(rows, how, positions), how


def test_c_keeps_the_last_of_a_nucleus_whose_logit_is_zero() -> None:
    """Where what is left of it after rounding is less than what it is made of."""
    try:
        draw_in_c = library().draw
    except OSError:
        pytest.skip("there are no C kernels")
    logits = np.full((1, 64), -30, np.float32)
    logits[0, [7, 40]] = 0, -9
    for seed in range(1500):  # 44 of them round so, and 8 of these draw that token
        logits[0, 5] = 0.01 + seed % 100 / 50
        params = SamplingParams(0.3 + seed // 100 / 40, top_p=0.99999, seed=seed)
        assert draw_in_c(logits, [params], [seed]) == draw(logits, [params], [seed]), seed


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


def test_penalties_and_biases_are_transformers_and_vllms() -> None:
    logits = np.array([2.0, -1.0, 0.5, 3.0, 0.0], np.float32)
    history = History((0, 1, 1, 3, 3, 3), 2)  # prompt 0, 1; answer 1, 3, 3, 3
    params = SamplingParams(
        repetition_penalty=1.5, presence_penalty=0.25, frequency_penalty=0.5, logit_bias=((4, 2.0), (1, 0.5), (99, 1.0))
    )
    expected = logits.copy()
    expected[4] += 2
    expected[1] += 0.5
    for token in (0, 1, 3):
        expected[token] = expected[token] / 1.5 if expected[token] > 0 else expected[token] * 1.5
    expected[1] -= 0.25 + 0.5
    expected[3] -= 0.25 + 3 * 0.5
    np.testing.assert_allclose(_penalised(logits, params, history), expected, rtol=1e-6)
    assert choose(logits, params, 0, history) == expected.argmax()
    rows = choose_rows(np.stack([logits] * 3), [Ask(Choosing(params, history), 5, (3, 4))])
    assert rows[0] == [choose(logits, params, 5 + i, history.then((3, 4)[:i])) for i in range(3)]


def test_log_probabilities_are_of_the_models_own_distribution() -> None:
    found = logprobs(LOGITS, 4, 3)
    expected = LOGITS - np.log(np.exp(LOGITS.astype(np.float64)).sum())
    assert found.logprob == pytest.approx(expected[4])
    assert [token for token, _ in found.top] == [0, 1, 2]
    assert [each for _, each in found.top] == pytest.approx(expected[:3])
    assert share(LOGITS, 4) == pytest.approx(np.exp(expected[4]), rel=1e-5)


@pytest.mark.parametrize("seed", range(22))
def test_draws_of_random_distributions(seed: int) -> None:
    """With the eight above, thirty."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, int(rng.integers(3, 40))).astype(np.float32)
    size = len(logits)
    params = SamplingParams(
        float(rng.choice([0.3, 0.8, 1.0, 1.5, 3.0])), int(rng.choice([0, 2, size])), float(rng.choice([1.0, 0.9, 0.5])),
        float(rng.choice([0.0, 0.05])), seed, float(rng.choice([1.0, 1.3])), float(rng.choice([0.0, 0.5])),
    )  # fmt: skip
    history, num_draws = History((0, 1, 1), 1), 20_000
    x = _penalised(logits, params, history).astype(np.float64) / params.temperature
    order = sorted(range(size), key=lambda token: (-x[token], token))
    kept = [token for token in order if not params.top_k or x[token] >= x[order[min(params.top_k, size) - 1]]]
    p = np.zeros(size)
    p[kept] = np.exp(x[kept] - x.max())
    p /= p.sum()
    before, nucleus = 0.0, list[int]()
    for token in kept:
        if before < params.top_p:
            nucleus.append(token)
        before += p[token]
    p[[token for token in range(size) if token not in nucleus or p[token] < params.min_p * p.max()]] = 0
    p /= p.sum()
    counts = np.bincount([choose(logits, params, position, history) for position in range(num_draws)], minlength=size)
    assert (counts[p == 0] == 0).all()
    rare = (p > 0) & (p * num_draws < 5)
    expected = np.append(p[(p > 0) & ~rare], p[rare].sum()) * num_draws
    seen = np.append(counts[(p > 0) & ~rare], counts[rare].sum())
    seen, expected = seen[expected > 0], expected[expected > 0]
    freedom = max(1, len(expected) - 1)
    limit = freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3  # p = 0.001 (Wilson and Hilferty 1931)
    assert ((seen - expected) ** 2 / expected).sum() < max(limit, 10.83)
