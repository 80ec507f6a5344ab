"""What is known of a text without asking: against the obvious way to find it out."""

from __future__ import annotations

import random

import pytest
from forerun.actors.lookup.pairs import LOOKED_AT, Pairs


def obvious(text: list[int]) -> tuple[bool, int]:
    """Whether the newest two tokens stood before, and how many tokens in a row were what had followed."""

    def followed(end: int) -> int | None:
        return next((text[i + 2] for i in range(end - 3, -1, -1) if text[i : i + 2] == text[end - 2 : end]), None)

    run = 0
    while run < len(text) - 2 and followed(len(text) - 1 - run) == text[-1 - run]:
        run += 1
    return len(text) > 1 and followed(len(text)) is not None, run


@pytest.mark.parametrize("seed", range(20))
def test_pairs_and_runs_are_those_of_the_text(seed: int) -> None:
    rng, pairs, text = random.Random(seed), Pairs(), list[int]()
    while len(text) < 400:
        piece = text[-60:][: rng.choice([1, 3, 50])] if text and rng.random() < 0.5 else []
        piece += [rng.randrange(6) for _ in range(rng.choice([0, 1, 1, 1, 2, 70]))]
        if not piece:
            continue
        text += piece
        pairs.extend(tuple(piece))
        is_repeated, run = obvious(text)
        assert (pairs.num_tokens, pairs.is_repeated) == (len(text), is_repeated)
        assert pairs.run == run if run < LOOKED_AT else pairs.run >= LOOKED_AT
