"""Whether anything can be found, without asking: a look-up that matches two tokens or more finds nothing where the newest two
have not stood before (what either costs: kernels/EXPERIMENTS.md).
"""

from __future__ import annotations

from itertools import pairwise


class Pairs:
    """The neighbouring tokens of one text, of which the first `num_tokens` are known. `is_repeated`: the newest two stood before."""

    def __init__(self) -> None:
        self._known: set[tuple[int, int]] = set()
        self._last: int | None = None
        self.num_tokens, self.is_repeated = 0, False

    def extend(self, tokens: tuple[int, ...]) -> None:
        """These follow, at least one."""
        *before, newest = tokens
        if before:
            self._known.update(pairwise(before if self._last is None else (self._last, *before)))
            self._last = before[-1]
        if self._last is not None:
            pair = self._last, newest
            self.is_repeated = pair in self._known
            self._known.add(pair)
        self._last = newest
        self.num_tokens += len(tokens)

    def has(self, pair: tuple[int, ...]) -> bool:
        """Whether two tokens have stood side by side."""
        return pair in self._known
