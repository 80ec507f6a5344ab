"""What the sequences of an engine have seen of its drafters, and of what things take; each begins with what the others know."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .costs import Costs

#: Trials that a belief remembers, one about the head's guesses in a row, and what a word of the drafter's own weighs against them.
MEMORY, SHORT_MEMORY, WORD = 12.0, 12.0, 1.5
#: What the word of other texts weighs, at first.
OTHERS_WORD = 4.0
#: Measurements of whole rounds that count: an accident of the machine changes nothing.
WINDOW = 15
#: Rounds between two questions to a head that is not worth it, at first.
FIRST_PAUSE = 4


@dataclass(slots=True)
class Belief:
    """How often something was right, lately."""

    num_right: float = 0.0
    num_trials: float = 0.0

    def saw(self, is_right: float, memory: float = MEMORY, number: int = 1) -> None:
        """So many times in a row."""
        fading = (1 - 1 / memory) ** number
        seen = (1 - fading) * memory
        self.num_right, self.num_trials = self.num_right * fading + is_right * seen, self.num_trials * fading + seen

    def share(self, before: float, word: float = WORD) -> float:
        return (self.num_right + word * before) / (self.num_trials + word)


UNTRIED = Belief()


@dataclass(slots=True)
class Surprise:
    """How many tokens were right, and how many were expected to be: what a text is like shows here first, before each belief has been
    put to the test."""

    num_right: float = 0.0
    num_expected: float = 0.0

    def saw(self, is_right: bool, expected: float, number: int) -> None:
        """So many times in a row."""
        fading = (1 - 1 / MEMORY) ** number
        seen = (1 - fading) * MEMORY
        self.num_right, self.num_expected = self.num_right * fading + is_right * seen, self.num_expected * fading + expected * seen

    def factor(self, before: float) -> float:
        """By which to trust less than before."""
        return min(1.0, (self.num_right + WORD * before) / (self.num_expected + WORD))


UNSURPRISED = Surprise()


#: Runs of repeated tokens are held apart by length: 0, 1, 2, 4, 8, 16 and more.
NUM_RUN_CLASSES = 6


def run_class(run: int) -> int:
    return min(run.bit_length(), NUM_RUN_CLASSES - 1)


def beliefs_by_run() -> list[Belief]:
    return [Belief() for _ in range(NUM_RUN_CLASSES)]


class Times:
    """What things take in seconds, by size: drafting so many tokens, round after round and after a rest, when it takes half as much again,
    for nothing it needs is in the caches; all else in a round with questions; a whole round in which nobody is asked, soon after another
    one and later. In such rounds, just before: a whole one in which the head drafts so many tokens, one of many."""

    def __init__(self) -> None:
        self.drafting, self.waking = Costs(), Costs()
        # What goes by without a choice is tried often enough: hope would make rest look better than what it is compared with.
        self.overhead = Costs(hope=0.0)
        self.after, self.resting, self.steady = (Costs(hope=0.0, window=WINDOW) for _ in range(3))
        # What a round of rest took lately, rounds since, and after how many it wants to be measured again.
        self.newest_rest, self.num_unmeasured, self.rest_age = 0.0, math.inf, 0.0


class OfHead:
    """How often its guesses were right, by their place in a draft; rounds between two questions while it is not worth it, and rounds since
    the last one."""

    def __init__(self) -> None:
        self.first_guesses = [Belief() for _ in range(64)]
        self.pause, self.num_unasked = float(FIRST_PAUSE), 0


class Experience:
    """What all sequences of an engine have seen: what verifying and looking up take; `times` in company, where one waits for others, or
    alone, and where each token is drawn or not; how often drafters were right, also the head where tokens are drawn or not, and what
    looking up brought."""

    def __init__(self) -> None:
        self.verify, self.looking = Costs(), Costs()
        self.times = {(has_company, is_drawn): Times() for has_company in (False, True) for is_drawn in (False, True)}
        self.num_others = 0.0  # beside one sequence in a batch, as somebody has seen last
        self.beliefs: dict[tuple[str, int, int], Belief] = {}
        self.head = {is_drawn: OfHead() for is_drawn in (False, True)}
        # Of whole sequences, for long repetitions bring many tokens and say nothing of other texts: what a question to look-ups saved, and
        # how far drafters could be trusted.
        self.found, self.trust = beliefs_by_run(), dict[str, Belief]()
