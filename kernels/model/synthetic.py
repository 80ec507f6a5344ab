"""Weights at random, of any published size and stored type: a model without a file, to measure what sizes cost. What it says is noise."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from ...core.errors import InvalidRequest
from ..backend import F32
from ..formats.stored import BY_NAME, Stored, quantise
from .config import ModelConfig
from .sizes import PUBLISHED

#: Random values that are made, in turns of which every matrix consists: drawing billions would take longer than measuring.
NUM_RANDOM = 2**20
KINDS = ("F32", "F16", "BF16", "Q8_0")


def size_of(text: str) -> tuple[ModelConfig, str]:
    """Of NAME:TYPE, as 0.8B:Q8_0. InvalidRequest when there is no such size, or no weights of it can be made."""
    name, _, kind = text.partition(":")
    sizes = [each for each, config in PUBLISHED.items() if config.intermediate > 1]
    if name not in sizes or kind.upper() not in KINDS:
        known = f"{', '.join(sizes)}, then : and one of {', '.join(KINDS)}"
        raise InvalidRequest([("--size", f"{text!r:.50} is unknown; expected one of {known}")])
    return PUBLISHED[name], kind.upper()


class SyntheticCheckpoint:
    """As weights.Checkpoint. Matrices have values of about inputs ** -0.5, so that rows keep their size from layer to layer."""

    has_fused_experts, has_mtp = True, True

    def __init__(self, config: ModelConfig, kind: str) -> None:
        self.folder, self.has_head, self._kind = Path("synthetic"), not config.is_tied, kind
        self._rng, self._shapes = np.random.default_rng(1), dict[str, tuple[int, ...]]()

    def check(self, expected: dict[str, tuple[int, ...]]) -> None:
        self._shapes = expected

    def read(self, name: str) -> F32:
        """Convolutions and what decays: the rest of what is no matrix is a norm, or a bias."""
        shape = self._shapes[name]
        if name.endswith("conv1d.weight"):
            return self._rng.uniform(-0.5, 0.5, shape).astype(np.float32)
        return np.zeros(shape, np.float32) if not name.endswith("linear_attn.norm.weight") else np.ones(shape, np.float32)

    def stored(self, name: str) -> Stored:
        *outer, inputs = self._shapes[name]
        type_ = BY_NAME[self._kind if inputs % 32 == 0 else "F32"]
        row = inputs // type_.block * type_.size
        values = self._rng.standard_normal(max(NUM_RANDOM // inputs, 1) * inputs).astype(np.float32) * np.float32(inputs**-0.5)
        return Stored(type_.name, inputs, np.resize(quantise(values, type_.name), (math.prod(outer), row)).reshape(*outer, row))

    def gate_up(self, name: str) -> tuple[Stored, Stored]:
        both = self.stored(name)
        half = both.shape[1] // 2
        return both[:, :half], both[:, half:]

    def norm(self, name: str) -> F32:
        return 1 + self.read(name)

    def log_decay(self, name: str) -> F32:
        return -np.exp(self._rng.uniform(0, 2, self._shapes[name]).astype(np.float32))

    def fingerprint(self, config: ModelConfig, backend: str) -> str:
        return "0" * 64
