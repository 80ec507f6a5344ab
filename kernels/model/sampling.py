"""Token choice: a pure function of (logits, parameters, position, and with penalties the tokens before), so that no draft,
batch or retry can change a text.

    argmax(filtered logits / temperature + Gumbel noise(seed, position, token))

is a draw from the softmax (Gumbel 1954; Maddison et al. 2014). The noise comes from Philox (Salmon et al. 2011), keyed
by the seed, its counter starting at the position: any (position, token) can be computed alone, in any order.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from ...core.vocabulary import Choosing, History, SamplingParams, TokenLogprob
from ..backend import F32

F64 = npt.NDArray[np.float64]
Places = npt.NDArray[np.intp]
#: Up to so many tokens, noise is simply computed for all of them.
FEW = 4096


def uniform(seed: int, position: int, size: int) -> F64:
    """What the noise for the token at `position` is made of, one value from [0, 1) for each of `size` vocabulary entries."""
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, position, 0, 0])).random(size)


def gumbel(uniforms: F64) -> F64:
    """Noise; random() may return 0, once in 2^53 draws."""
    return -np.log(np.maximum(-np.log1p(-uniforms), 1e-300))


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
    kept: Places | None = None
    if 0 < params.top_k < len(x):
        kept = _highest(x, params.top_k)
    if params.top_p < 1:
        kept = _nucleus(x, kept, params.top_p)
    if params.min_p > 0:
        kept = np.flatnonzero(x >= np.log(params.min_p)) if kept is None else kept[x[kept] >= np.log(params.min_p)]
    uniforms = uniform(params.seed, position, len(x))
    if kept is None:
        kept = np.arange(len(x))
    if len(kept) > FEW:
        kept = kept[_contenders(x[kept], uniforms[kept])]
    return int(kept[(x[kept] + gumbel(uniforms[kept])).argmax()])


def _nucleus(x: F64, kept: Places | None, top_p: float) -> Places:
    """The likeliest of the `kept` places (None: of all) that together reach a share, in ascending order. Few are sorted, where few do."""
    places = np.arange(len(x)) if kept is None else kept
    values = x[places]
    shares, num_sorted = _softmax(values), 256
    while True:
        some = _highest(values, num_sorted)
        order = some[np.argsort(-values[some], kind="stable")]
        reached = np.cumsum(shares[order])
        if num_sorted >= len(values) or reached[-1] >= top_p:
            return np.sort(places[order[: 1 + np.count_nonzero(reached[:-1] < top_p)]])
        num_sorted *= 16


def _contenders(x: F64, uniforms: F64) -> Places:
    """The places that may win once there is noise, from x with its highest at 0. That one has so much with its noise; who is to have more
    needs noise of which -log(1 - u) < exp(x - so much), and u is less than -log(1 - u)."""
    so_much = gumbel(uniforms[x.argmax()][None])[0]
    return np.flatnonzero(uniforms <= np.exp(np.minimum(x - so_much, 1.0).astype(np.float32)) * np.float32(1 + 1e-5))


class HasChoices(Protocol):
    """Logits of a device, which knows the highest of each row."""

    @property
    def choices(self) -> list[int]: ...


def choose_rows(logits: F32 | HasChoices, how: Choosing, position: int, ahead: tuple[int, ...] = ()) -> list[int]:
    """The tokens at `position`... from logits [R, V], of which each row but the first follows one token more of `ahead`."""
    is_plain = how.sampling.temperature == 0 and not how.sampling.logit_bias and not how.sampling.needs_history
    if is_plain and not isinstance(logits, np.ndarray):
        return logits.choices
    rows = np.asarray(logits)
    return [
        choose(row, how.sampling, position + i, how.history.then(ahead[:i]) if how.history is not None else None)
        for i, row in enumerate(rows)
    ]


def logprobs(logits: F32, token: int, num_top: int) -> TokenLogprob:
    """Of logits [V], as the model has them."""
    x = logits.astype(np.float64)
    x -= x.max() + np.log(np.exp(x - x.max()).sum())
    some = _highest(x, num_top) if num_top else np.zeros(0, np.intp)
    top = some[np.argsort(-x[some], kind="stable")[:num_top]]
    return TokenLogprob(float(x[token]), tuple((int(each), float(x[each])) for each in top))


def _highest(x: F32 | F64, number: int) -> Places:
    """The places of so many of the highest values, and of all that equal the lowest of these; in order of place."""
    return np.flatnonzero(x >= (np.partition(x, -number)[-number] if number < len(x) else -np.inf))


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
        seen = seen[seen >= 0]  # embedding rows are no tokens
        seen = seen[seen < len(x)]  # a draft's logits may be of fewer tokens
        x[seen] = np.where(x[seen] > 0, x[seen] / np.float32(params.repetition_penalty), x[seen] * np.float32(params.repetition_penalty))
        tokens, counts = np.unique(np.array(history.tokens[history.num_prompt :], np.int64), return_counts=True)
        is_there = tokens < len(x)
        penalty = np.float32(params.presence_penalty) + np.float32(params.frequency_penalty) * counts.astype(np.float32)
        x[tokens[is_there]] -= penalty[is_there]
    return x


def _softmax(x: F64) -> F64:
    e = np.exp(x - x.max())
    return e / e.sum()
