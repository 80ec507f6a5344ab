"""Random weights of every type that files have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from forerun.kernels.formats.stored import BY_NAME, Stored, put_half, quantise

Draw = Callable[[np.random.Generator, int], npt.NDArray[Any]]


def normal(rng: np.random.Generator, count: int) -> npt.NDArray[Any]:
    return rng.normal(0, 1, count)


def random_blocks(kind: str, count: int, rng: np.random.Generator, draw: Draw = normal) -> npt.NDArray[np.uint8]:
    """[count, bytes of a block], of all the values that the type can have (MXFP4: with scales near 1)."""
    if kind in ("F32", "F16", "BF16"):
        return quantise(rng.normal(0, 1, count).astype(np.float32), kind).reshape(count, -1)
    blocks = rng.integers(0, 256, (count, BY_NAME[kind].size), np.uint8)  # any will do, but for halves
    for which in range(len(BY_NAME[kind].halves)):
        put_half(kind, blocks, which, draw(rng, count))
    if kind == "MXFP4":
        blocks[:, 0] = rng.integers(118, 132, count)
    return blocks


def random_weights(kind: str, outputs: int, inputs: int, rng: np.random.Generator, draw: Draw = normal) -> Stored:
    """A matrix [outputs, inputs] of a type."""
    blocks = random_blocks(kind, outputs * inputs // BY_NAME[kind].block, rng, draw)
    return Stored(kind, inputs, blocks.reshape(outputs, -1))
