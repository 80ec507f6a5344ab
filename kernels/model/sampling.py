"""Token choice: a pure function of (logits, parameters, position, and with penalties the tokens before), so that no draft,
batch or retry can change a text.

    argmax(filtered logits / temperature + Gumbel noise(seed, position, token))

is a draw from the softmax (Gumbel 1954; Maddison et al. 2014). The noise comes from Philox (Salmon et al. 2011), keyed
by the seed, its counter starting at the position: any (position, token) can be computed alone, in any order.
"""

from __future__ import annotations

import numpy as np

from ...core.vocabulary import Choosing, History, SamplingParams, TokenLogprob
from ..backend import F32


def gumbel(seed: int, position: int, size: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Noise for the token at `position`, one value for each of `size` vocabulary entries."""
    generator = np.random.Generator(np.random.Philox(key=seed, counter=[0, position, 0, 0]))
    exponential = -np.log1p(-generator.random(size))
    return -np.log(np.maximum(exponential, 1e-300))  # random() may return 0, once in 2^53 draws


def choose(logits: F32, params: SamplingParams, position: int, history: History | None = None) -> int:
    """The token at `position`, from logits [V]. Ties go to the lowest id. The filters follow transformers'
    `generation/logits_process.py`: bias, repetition penalty, temperature, top-k (ties with the k-th stay), top-p (at least one stays),
    min-p. `history` is what stands before `position`, and needed by penalties alone."""
    if params.logit_bias or params.needs_history:
        logits = _penalised(logits, params, history)
    if params.temperature == 0:
        return int(logits.argmax())
    x = logits.astype(np.float64)
    x = (x - x.max()) / max(params.temperature, 1e-6)  # which is greedy but for ties, and does not overflow
    if 0 < params.top_k < len(x):
        x[x < np.partition(x, -params.top_k)[-params.top_k]] = -np.inf
    if params.top_p < 1:
        order = np.argsort(-x, kind="stable")
        before = np.cumsum(_softmax(x[order]))
        outside = np.concatenate([[False], before[:-1] >= params.top_p])
        x[order[outside]] = -np.inf
    if params.min_p > 0:
        x[x < x.max() + np.log(params.min_p)] = -np.inf
    return int((x + gumbel(params.seed, position, len(x))).argmax())


def choose_rows(logits: F32, how: Choosing, position: int, ahead: tuple[int, ...] = ()) -> list[int]:
    """The tokens at `position`... from logits [R, V], of which each row but the first follows one token more of `ahead`."""
    return [
        choose(row, how.sampling, position + i, how.history.then(ahead[:i]) if how.history is not None else None)
        for i, row in enumerate(logits)
    ]


def logprobs(logits: F32, token: int, num_top: int) -> TokenLogprob:
    """Of logits [V], as the model has them."""
    x = logits.astype(np.float64)
    x -= x.max() + np.log(np.exp(x - x.max()).sum())
    top = np.argsort(-x, kind="stable")[:num_top]
    return TokenLogprob(float(x[token]), tuple((int(each), float(x[each])) for each in top))


def share(logits: F32, token: int) -> float:
    """The probability of a token, from logits [V] at temperature 1."""
    highest = logits.max()
    return float(np.exp(logits[token] - highest) / np.exp(logits - highest).sum())


def _penalised(logits: F32, params: SamplingParams, history: History | None) -> F32:
    x = logits.copy()
    for token, bias in params.logit_bias:
        if token < len(x):
            x[token] += np.float32(bias)
    if history is not None:
        seen = np.unique(history.tokens)
        seen = seen[seen < len(x)]  # a draft's logits may be of fewer tokens
        x[seen] = np.where(x[seen] > 0, x[seen] / np.float32(params.repetition_penalty), x[seen] * np.float32(params.repetition_penalty))
        tokens, counts = np.unique(np.array(history.tokens[history.num_prompt :], np.int64), return_counts=True)
        is_there = tokens < len(x)
        penalty = np.float32(params.presence_penalty) + np.float32(params.frequency_penalty) * counts.astype(np.float32)
        x[tokens[is_there]] -= penalty[is_there]
    return x


def _softmax(x: np.ndarray[tuple[int], np.dtype[np.float64]]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    e = np.exp(x - x.max())
    return e / e.sum()
