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
from .weights import HubLayout

#: Random values that are made, in turns of which every matrix consists: drawing billions would take longer than measuring.
NUM_RANDOM = 2**20
KINDS = ("F32", "F16", "BF16", "Q8_0")


def size_of(text: str) -> tuple[ModelConfig, str]:
    """Of NAME:TYPE, as 0.8B:Q8_0. InvalidRequest when there is no such size, or no weights of it can be made."""
    name, _, kind = text.partition(":")
    sizes = [each for each, config in PUBLISHED.items() if config.moe is None]
    if name not in sizes or kind.upper() not in KINDS:
        known = f"{', '.join(sizes)}, then : and one of {', '.join(KINDS)}"
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
        type_ = BY_NAME[self._kind if inputs % 32 == 0 else "F32"]
        row = inputs // type_.block * type_.size
        num_rows = min(math.prod(outer), max(NUM_RANDOM // inputs, 1))
        values = self._rng.standard_normal(num_rows * inputs).astype(np.float32) * np.float32(inputs**-0.5)
        return Stored(type_.name, inputs, np.resize(quantise(values, type_.name), (math.prod(outer), row)).reshape(*outer, row))

    def fingerprint(self, config: ModelConfig, backend: str) -> str:
        return "0" * 64
