"""Acceptance drawn at random, to measure speed at any acceptance there may be: the text it gives means nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ..core.vocabulary import Verdict


def synthetic(verdict: Verdict, drafts: tuple[int, ...], rates: tuple[float, ...], seed: int, position: int) -> Verdict:
    """A verdict that accepts the i-th draft token with probability `rates[i]`, the last rate for all beyond, if those before it were
    accepted. The same for the same seed and position."""
    draws = np.random.Generator(np.random.Philox(key=seed, counter=[1, position, 0, 0])).random(len(drafts))
    choices = list(verdict.choices)
    for i, draft in enumerate(drafts):
        if draws[i] < rates[min(i, len(rates) - 1)]:
            choices[i] = draft
        else:
            choices[i] = choices[i] if choices[i] != draft else draft - 1 if draft else 1
            break
    return replace(verdict, choices=tuple(choices))
