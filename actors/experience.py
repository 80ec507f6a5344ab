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
    """An exponentially fading acceptance rate."""

    num_right: float = 0.0
    num_trials: float = 0.0

    def saw(self, is_right: float, memory: float = MEMORY, number: int = 1) -> None:
        """Counts `number` observations in a row, each right with the share `is_right`; older ones fade with a memory of `memory` trials."""
        fading = (1 - 1 / memory) ** number
        seen = (1 - fading) * memory
        self.num_right, self.num_trials = self.num_right * fading + is_right * seen, self.num_trials * fading + seen

    def share(self, before: float, word: float = WORD) -> float:
        return (self.num_right + word * before) / (self.num_trials + word)


UNTRIED = Belief()


@dataclass(slots=True)
class Surprise:
    """Accepted tokens against expected ones, fading: a text that is harder than others shows here before the single rates have adapted."""

    num_right: float = 0.0
    num_expected: float = 0.0

    def saw(self, is_right: bool, expected: float, number: int) -> None:
        """Counts `number` observations in a row, each of which had been expected to be right with probability `expected`."""
        fading = (1 - 1 / MEMORY) ** number
        seen = (1 - fading) * MEMORY
        self.num_right, self.num_expected = self.num_right * fading + is_right * seen, self.num_expected * fading + expected * seen

    def factor(self, before: float) -> float:
        """The factor, at most 1, by which acceptance probabilities should be lowered; `before` is the value to begin with."""
        return min(1.0, (self.num_right + WORD * before) / (self.num_expected + WORD))


UNSURPRISED = Surprise()


#: Runs of repeated tokens are held apart by length: 0, 1, 2, 4, 8, 16 and more.
NUM_RUN_CLASSES = 6


def run_class(run: int) -> int:
    return min(run.bit_length(), NUM_RUN_CLASSES - 1)


def beliefs_by_run() -> list[Belief]:
    return [Belief() for _ in range(NUM_RUN_CLASSES)]


class Times:
    """Measured seconds, by size. `drafting` and `waking`: the head drafting n tokens in consecutive rounds, and after a rest (half as
    long again: its weights have left the caches); `overhead`: the rest of a round with questions; `resting` and `after`: whole rounds
    without questions, later and right after one with; `steady`: rounds in which the head drafts n tokens, as a multiple of a resting
    round."""

    def __init__(self) -> None:
        self.drafting, self.waking = Costs(), Costs()
        # What goes by without a choice is tried often enough: hope would make rest look better than what it is compared with.
        self.overhead = Costs(hope=0.0)
        self.after, self.resting, self.steady = (Costs(hope=0.0, window=WINDOW) for _ in range(3))
        # What a round of rest took lately, rounds since, and after how many it wants to be measured again.
        self.newest_rest, self.num_unmeasured, self.rest_age = 0.0, math.inf, 0.0


class OfHead:
    """Acceptance rates of the MTP head by place in its draft, the pause in rounds between two questions while it does not pay, and the
    rounds since the last question."""

    def __init__(self) -> None:
        self.first_guesses = [Belief() for _ in range(64)]
        self.pause, self.num_unasked = float(FIRST_PAUSE), 0


class Experience:
    """What all sequences of an engine have measured together: costs of verifying and of look-ups; `times` by (in a batch with others,
    tokens are sampled); acceptance of each drafter; acceptance of the head by (tokens are sampled); what look-ups brought."""

    def __init__(self) -> None:
        self.verify, self.looking = Costs(), Costs()
        self.times = {(has_company, is_drawn): Times() for has_company in (False, True) for is_drawn in (False, True)}
        self.num_others = 0.0  # beside one sequence in a batch, as somebody has seen last
        self.beliefs: dict[tuple[str, int, int], Belief] = {}
        self.head = {is_drawn: OfHead() for is_drawn in (False, True)}
        # Of whole sequences, for long repetitions bring many tokens and say nothing of other texts: what a question to look-ups saved, and
        # how far drafters could be trusted.
        self.found, self.trust = beliefs_by_run(), dict[str, Belief]()
