"""Acceptance drawn at random, to measure speed at any acceptance there may be: the text it gives means nothing."""

from __future__ import annotations

from hashlib import blake2b
from struct import pack


def num_right(num_drafts: int, rates: tuple[float, ...], seed: int, position: int) -> int:
    """How many of a draft's tokens count as right: the i-th with probability `rates[i]`, the last rate for all beyond, if those before it
    do. The same for the same seed and position."""
    for i in range(num_drafts):
        number = int.from_bytes(blake2b(pack("<QQQ", seed, position, i), digest_size=8).digest(), "little")
        if number >= rates[min(i, len(rates) - 1)] * 2**64:
            return i
    return num_drafts
