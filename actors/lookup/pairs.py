"""Whether anything can be found, without asking: a look-up that matches two tokens or more finds nothing where the newest two
have not stood before, and the more tokens in a row were what had followed before, the more there is to find (figures in
kernels/EXPERIMENTS.md).
"""

from __future__ import annotations

from itertools import pairwise

#: Newest tokens of a piece of text that are looked at one by one, so that `run` is known: up to so many.
LOOKED_AT = 24


class Pairs:
    """The neighbouring tokens of one text, of which the first `num_tokens` are known. `is_repeated`: the newest two stood before.
    `run`: so many newest tokens, in a row, were what had followed the two before them."""

    def __init__(self) -> None:
        self._following: dict[tuple[int, int], int] = {}  # what followed a pair, the last time
        self._before: int | None = None  # the newest two tokens, or fewer
        self._newest: int | None = None
        self._expected: int | None = None  # what followed the newest two, the last time
        self.num_tokens, self.run = 0, 0

    @property
    def is_repeated(self) -> bool:
        return self._expected is not None

    def extend(self, tokens: tuple[int, ...]) -> None:
        """These follow."""
        before, looked_at = tokens[:-LOOKED_AT], tokens[-LOOKED_AT:]
        if before:
            text = [token for token in (self._before, self._newest, *before) if token is not None]
            self._following.update(zip(pairwise(text), text[2:], strict=False))
            self._before, self._newest, self._expected = text[-2] if len(text) > 1 else None, text[-1], None
            self.num_tokens += len(before)
        for token in looked_at:
            self.add(token)

    def add(self, token: int) -> None:
        """This one follows."""
        before, newest = self._before, self._newest
        self.run = self.run + 1 if token == self._expected else 0
        if newest is not None:
            if before is not None:
                self._following[before, newest] = token
            self._expected = self._following.get((newest, token))
        self._before, self._newest = newest, token
        self.num_tokens += 1

    def has(self, pair: tuple[int, ...]) -> bool:
        """Whether two tokens have stood side by side, and something came after them."""
        return pair in self._following
