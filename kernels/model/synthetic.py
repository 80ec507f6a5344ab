"""Weights at random, of any published size and stored type: a model without a file, to measure what sizes cost. What it says is noise."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from ...core.errors import InvalidRequest
from ..backend import F32
from ..formats.stored import BY_NAME, CODES, U8, WRITTEN, Stored, put_half, quantise
from .config import ModelConfig
from .sizes import PUBLISHED
from .weights import HubLayout

#: Random values that are made, in turns of which every matrix consists: drawing billions would take longer than measuring.
NUM_RANDOM = 2**20


def size_of(text: str) -> tuple[ModelConfig, str]:
    """Of NAME:TYPE, as 0.8B:Q8_0. InvalidRequest when there is no such size, or no weights of it can be made."""
    name, _, kind = text.partition(":")
    if name not in PUBLISHED or kind.upper() not in BY_NAME:
        known = f"{', '.join(PUBLISHED)}, then : and one of {', '.join(BY_NAME)}"
        raise InvalidRequest([("--size", f"{text!r:.50} is unknown; expected one of {known}")])
    return PUBLISHED[name], kind.upper()


class SyntheticCheckpoint(HubLayout):
    """As weights.Checkpoint. Matrices have values of about inputs ** -0.5, so that rows keep their size from layer to layer."""

    has_fused_experts, has_mtp = True, True

    def __init__(self, config: ModelConfig, kind: str) -> None:
        self.folder, self.has_head, self._kind = Path("synthetic"), not config.is_tied, kind
        self._rng, self._shapes = np.random.default_rng(1), dict[str, tuple[int, ...]]()

    def check(self, expected: dict[str, tuple[int, ...]]) -> None:
        self._shapes = expected

    def read(self, name: str) -> F32:
        """What is no matrix: convolutions, what decays, and norms and biases that do nothing."""
        shape = self._shapes[name]
        if name.endswith(("conv1d.weight", "A_log")):
            low, high = (-0.5, 0.5) if name.endswith("weight") else (0, 2)
            return self._rng.uniform(low, high, shape).astype(np.float32)
        return np.zeros(shape, np.float32) if not name.endswith("linear_attn.norm.weight") else np.ones(shape, np.float32)

    def stored(self, name: str) -> Stored:
        *outer, inputs = self._shapes[name]
        kind = self._kind if inputs % BY_NAME[self._kind].block == 0 else "F16"
        row = inputs // BY_NAME[kind].block * BY_NAME[kind].size
        num_rows = min(math.prod(outer), max(NUM_RANDOM // inputs, 1))
        made = random_values(kind, num_rows * inputs, inputs**-0.5, self._rng)
        return Stored(kind, inputs, np.resize(made, (math.prod(outer), row)).reshape(*outer, row))

    def fingerprint(self, config: ModelConfig, backend: str) -> str:
        return "0" * 64


def random_values(kind: str, count: int, deviation: float, rng: np.random.Generator) -> U8:
    """So many values of a type, in bytes, with about no mean: normal where it is one that is written, else of random quants."""
    type_ = BY_NAME[kind]
    if kind in WRITTEN:
        return quantise(rng.standard_normal(count).astype(np.float32) * np.float32(deviation), kind)
    blocks = rng.integers(0, 256, (count // type_.block, type_.size), np.uint8)
    if kind == "MXFP4":
        blocks[:, 0] = 128 + round(math.log2(deviation / float(np.std(CODES[kind]))))
        return blocks.reshape(-1)

    def scaled(*by: float) -> F32:
        for which, value in enumerate(by):
            put_half(kind, blocks, which, value)
        return type_.read(blocks)

    others = (0.0,) * (len(type_.halves) - 1)
    of_scales = scaled(1, *others)
    ratio = tuple(-float(of_scales.mean()) / float(scaled(0, *(1.0 for _ in others)).mean()) for _ in others)
    by = deviation / float(scaled(1, *ratio).std())
    scaled(by, *(by * each for each in ratio))
    return blocks.reshape(-1)
