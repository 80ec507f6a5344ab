"""What every look-up is: the history of one sequence, and what it says about what follows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

#: Tokens, and for each how sure the look-up is of it once all before it have come, from 0 to 1.
Proposal = tuple[tuple[int, ...], tuple[float, ...]]
NOTHING: Proposal = ((), ())


class Lookup(ABC):
    """One sequence. It is told every token that stands, in order, whoever drafted it; a history that was cut is told anew, to another."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    @abstractmethod
    def extend(self, tokens: Sequence[int]) -> None:
        """These follow."""

    @abstractmethod
    def propose(self, ahead: tuple[int, ...], limit: int) -> Proposal:
        """At most `limit` tokens that may follow the history and `ahead`, which is at least one token and is not learned. With more than
        one, which another drafted, `heard` will not be told of the proposal."""

    def heard(self, num_tested: int, num_right: int) -> None:  # noqa: B027 - most have no use for it
        """Of the last proposal so many tokens have been tested by what came, and so many were right before the first wrong one."""

    def newest(self, size: int, ahead: tuple[int, ...]) -> tuple[int, ...]:
        """The last `size` tokens of the history and `ahead`; fewer when there are no more."""
        missing = size - len(ahead)
        if missing <= 0:
            return ahead[-size:]
        return (*self.tokens[max(0, len(self.tokens) - missing) :], *ahead)
