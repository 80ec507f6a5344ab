"""Token choice: a pure function of (logits, parameters, position, and with penalties the tokens before), so that no draft,
batch or retry can change a text.

    argmax(filtered logits / temperature + Gumbel noise(seed, position, token))

is a draw from the softmax (Gumbel 1954; Maddison et al. 2014). The noise comes from Philox (Salmon et al. 2011), keyed
by the seed, its counter starting at the position: any (position, token) can be computed alone, in any order. On a device
where logits are there (cuda/sampling.cu), in C where there are C kernels (cpu/draw.c); in NumPy else, and to compare with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ..core.vocabulary import Choosing, History, Limits, SamplingParams, TokenLogprob
from .backend import F32
from .cpu.library import library

F64 = npt.NDArray[np.float64]
Places = npt.NDArray[np.intp]


@cache
def _draw() -> Callable[[F32, Sequence[SamplingParams], Sequence[int]], list[int]]:
    """The token of each row of logits [R, V] at its position, with noise and filters."""
    try:
        return library().draw
    except (OSError, ImportError):
        return draw


def uniform(seed: int, position: int, size: int) -> F64:
    """What the noise for the token at `position` is made of, one value from [0, 1) for each of `size` vocabulary entries."""
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, position, 0, 0])).random(size)


def gumbel(uniforms: F64) -> F64:
    """Noise; random() may return 0, once in 2^53 draws."""
    return -np.log(np.maximum(-np.log1p(-uniforms), 1e-300))


def choose(logits: F32, params: SamplingParams, position: int, history: History | None = None, limits: Limits | None = None) -> int:
    """The token at `position`, from logits [V]. Ties go to the lowest id. The filters follow transformers'
    `generation/logits_process.py`: bias, repetition penalty, limits, temperature, top-k (ties with the k-th stay), top-p (at least one
    stays), min-p. `history` is what stands before `position`, and needed by penalties and limits alone."""
    if params.logit_bias or params.needs_history:
        logits = _penalised(logits, params, history)
    if limits is not None and history is not None:
        logits = _limited(logits, limits.allowed(history.tokens[history.num_prompt :]))
    return int(logits.argmax()) if params.temperature == 0 else _draw()(logits[None], [params], [position])[0]


def draw(logits: F32, how: Sequence[SamplingParams], positions: Sequence[int]) -> list[int]:
    """What cpu/draw.c does, in NumPy."""
    return [_drawn(*each) for each in zip(logits, how, positions, strict=True)]


def _drawn(logits: F32, params: SamplingParams, position: int) -> int:
    if params.temperature == 0:
        return int(logits.argmax())
    x = logits.astype(np.float64)
    x = (x - x.max()) / max(params.temperature, 1e-6)  # which is greedy but for ties, and does not overflow
    kept = _highest(logits, params.top_k) if 0 < params.top_k < len(x) else np.arange(len(x))
    if params.top_p < 1:
        order = kept[np.argsort(-x[kept], kind="stable")]
        reached = np.cumsum(np.exp(x[order])) / np.exp(x[kept]).sum()
        kept = np.sort(order[: 1 + np.count_nonzero(reached[:-1] < params.top_p)])
    if params.min_p > 0:
        kept = kept[x[kept] >= np.log(params.min_p)]
    return int(kept[(x[kept] + gumbel(uniform(params.seed, position, len(x))[kept])).argmax()])


class DeviceChoices(Protocol):
    """Tokens that a device has chosen, or is about to: one for each row."""

    def read(self) -> list[int]: ...


class DeviceLogits(Protocol):
    """Logits [R, V] that a device has, and chooses from itself."""

    def choose_tokens(self, how: Sequence[SamplingParams] | None, positions: Sequence[int]) -> DeviceChoices:
        """The token of each row at its position, biases and penalties left out; with None the highest of each row."""
        ...

    def __getitem__(self, at: slice) -> DeviceLogits: ...

    def __array__(self) -> F32: ...


@dataclass(frozen=True, slots=True)
class Ask:
    """The tokens at `position`... of one sequence, from 1 + len(ahead) rows, each but the first after one token more of `ahead`. With
    `num_right`, so many of `ahead` are chosen whatever the logits say, and the one after them is not."""

    how: Choosing
    position: int
    ahead: tuple[int, ...] = ()
    num_right: int | None = None

    @property
    def num_rows(self) -> int:
        return 1 + len(self.ahead)


class Choices:
    """The tokens of each sequence, from the rows of all [R, V] in the order of `asks`: begun at once where a device has the logits."""

    def __init__(self, logits: F32 | DeviceLogits, asks: Sequence[Ask]) -> None:
        self.asks, self._logits = asks, logits
        self._chosen: list[list[int]] | None = None
        self.on_device: DeviceChoices | None = None  # of all rows, right for those asks that need no host
        if not isinstance(logits, np.ndarray) and not all(ask.how.needs_host for ask in asks):
            self.on_device = logits.choose_tokens(*_drawn_how(asks))

    def read(self) -> list[list[int]]:
        if self._chosen is None:
            self._chosen = self._choose()
        return self._chosen

    def _choose(self) -> list[list[int]]:
        logits, asks = self._logits, self.asks
        ends = list(accumulate(ask.num_rows for ask in asks))
        parts = [slice(end - ask.num_rows, end) for ask, end in zip(asks, ends, strict=True)]
        if self.on_device is not None:
            tokens = self.on_device.read()
        elif all(ask.how.needs_host for ask in asks):
            tokens = list[int]()
        else:
            assert isinstance(logits, np.ndarray)
            how, positions = _drawn_how(asks)
            tokens = logits.argmax(-1).tolist() if how is None else _draw()(logits, how, positions)
        found = list[list[int]]()
        for ask, part in zip(asks, parts, strict=True):
            each = _choose_here(np.asarray(logits[part]), ask) if ask.how.needs_host else tokens[part]
            found.append(each if ask.num_right is None else _synthetic(each, ask.ahead, ask.num_right))
        return found


def choose_rows(logits: F32 | DeviceLogits, asks: Sequence[Ask]) -> list[list[int]]:
    """The tokens of each sequence, from the rows of all [R, V] in their order."""
    return Choices(logits, asks).read()


def _drawn_how(asks: Sequence[Ask]) -> tuple[list[SamplingParams] | None, list[int]]:
    """How each row's token is drawn, at which positions; None where all are the highest."""
    if all(ask.how.sampling.temperature == 0 for ask in asks if not ask.how.needs_host):
        return None, []
    return [ask.how.sampling for ask in asks for _ in range(ask.num_rows)], [ask.position + i for ask in asks for i in range(ask.num_rows)]


def _synthetic(choices: list[int], ahead: tuple[int, ...], number: int) -> list[int]:
    chosen = choices[number]
    if number < len(ahead) and chosen == ahead[number]:
        chosen = chosen - 1 if chosen else 1
    return [*ahead[:number], chosen, *choices[number + 1 :]]


def _choose_here(logits: F32, ask: Ask) -> list[int]:
    """Row by row, with biases, penalties and limits."""
    hows = [ask.how.then(ask.ahead[:i]) for i in range(ask.num_rows)]
    return [
        choose(row, how.sampling, ask.position + i, how.history, how.limits) for i, (row, how) in enumerate(zip(logits, hows, strict=True))
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


def _limited(logits: F32, allowed: bytes | None) -> F32:
    """Those of tokens that may not follow are minus infinity."""
    if allowed is None:
        return logits
    may = np.zeros(len(logits), np.bool_)
    bits = np.unpackbits(np.frombuffer(allowed, np.uint8), bitorder="little")[: len(logits)]
    may[: len(bits)] = bits
    return np.where(may, logits, np.float32(-np.inf))


def _penalised(logits: F32, params: SamplingParams, history: History | None) -> F32:
    x = logits.copy()
    for token, bias in params.logit_bias:
        if token < len(x):
            x[token] += np.float32(bias)
    if history is not None:
        tokens = np.array(history.tokens, np.int64)
        is_there = (tokens >= 0) & (tokens < len(x))  # embedding rows are no tokens; a draft's logits may be of fewer
        if params.repetition_penalty != 1:
            seen, by = np.zeros(len(x), np.bool_), np.float32(params.repetition_penalty)
            seen[tokens[is_there]] = True
            x[seen] = np.where(x[seen] > 0, x[seen] / by, x[seen] * by)
        if params.presence_penalty or params.frequency_penalty:
            counts = np.bincount(tokens[history.num_prompt :][is_there[history.num_prompt :]], minlength=len(x))
            penalty = np.float32(params.presence_penalty) + np.float32(params.frequency_penalty) * counts.astype(np.float32)
            x[counts > 0] -= penalty[counts > 0]
    return x
