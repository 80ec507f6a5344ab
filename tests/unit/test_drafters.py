"""ngram-simple against an obvious twin."""

from __future__ import annotations

import random

from forerun.actors.ngram_drafter import History


def obvious(tokens: list[int], n: int, m: int) -> tuple[int, ...]:
    """Scan back for the newest earlier occurrence of the last n tokens."""
    if len(tokens) < n:
        return ()
    for start in range(len(tokens) - n - 1, -1, -1):
        if tokens[start : start + n] == tokens[-n:]:
            followed = tokens[start + n :]
            return tuple(followed[:m]) if len(followed) >= n else ()
    return ()


def test_500_random_histories() -> None:
    num_drafts = 0
    for seed in range(500):
        rng = random.Random(seed)
        n, m = rng.choice([1, 2, 3, 5]), rng.choice([1, 4, 16])
        tokens = [rng.randrange(rng.choice([2, 3, 6])) for _ in range(rng.randrange(1, 60))]
        history = History(n)
        for i in range(0, len(tokens) - 1, 3):
            history.extend(tuple(tokens[i : min(i + 3, len(tokens) - 1)]))
        draft = history.continuation(tokens[-1], m)
        assert draft == obvious(tokens, n, m), (seed, tokens)
        num_drafts += bool(draft)
    assert num_drafts > 100
