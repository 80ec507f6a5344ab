"""What rounds take, in such company as a sequence has, and how many tokens a second that makes."""

from __future__ import annotations

from .costs import Costs
from .experience import Experience, Times

#: Rounds for which one with questions may make others slower.
AFTER = 8
#: Tokens that another sequence in the batch gains by each of its rows, about.
OTHERS_GAIN = 0.7
#: By how much shorter than they are held to be the head's rounds may be, at first and at last.
TRIAL_SHARE, SLACK = 0.25, 0.05


class Pace:
    """Predicts how long rounds of one sequence take, from what was measured (`Experience`), in seconds."""

    def __init__(self, experience: Experience, is_drawn: bool) -> None:
        self._experience, self._is_drawn = experience, is_drawn
        self.num_other_rows = self.num_others = experience.num_others  # of late, in a batch
        self._is_company_known = False

    def seconds(self, num_drafts: int, num_head: int) -> float:
        """Of a round that verifies `num_drafts` draft tokens, `num_head` of which the head had drafted."""
        verify = self._experience.verify(round(self.num_other_rows) + num_drafts + 1)
        return verify + (self.drafting(num_head) if num_head else 0.0) + self.overhead(1)

    @property
    def has_company(self) -> bool:
        return self.num_other_rows >= 0.5

    @property
    def num_sequences(self) -> int:
        """Sequences in this one's batches, itself among them."""
        return 1 + round(self.num_others)

    @property
    def times(self) -> Times:
        return self._experience.times[self.has_company, self._is_drawn]

    @property
    def drafting(self) -> Costs:
        """Seconds the head takes for n tokens, in batches like these."""
        return self.times.drafting

    @property
    def overhead(self) -> Costs:
        """Seconds of a round besides drafting and verifying."""
        return self.times.overhead

    @property
    def resting(self) -> float:
        """Seconds of a round without drafts in which no drafter is asked."""
        return self.times.resting(1) or self.times.after(1) or self.seconds_together(0, 0)

    @property
    def aftermath(self) -> float:
        """Additional seconds, in all, of the undrafted rounds that follow a drafted one: drafting evicts the trunk's weights from the
        caches (measured in kernels/EXPERIMENTS.md)."""
        after, resting = self.times.after(1), self.times.resting(1)
        return AFTER * max(0.0, after - resting) if resting else 0.0

    @property
    def others_gain(self) -> float:
        """Tokens that the other sequences of the batch gain in a round."""
        return OTHERS_GAIN * self.num_other_rows

    def rate(self, expected: float, seconds: float) -> float:
        """Tokens per second of a round that takes `seconds` and is expected to bring `expected` tokens, other sequences' included."""
        return (expected + self.others_gain) / seconds if seconds > 0 else expected

    def steady(self, num_tokens: int) -> float:
        """Seconds of a round among many in which the head drafts `num_tokens` each time."""
        steady = self.times.steady(num_tokens)
        return steady * self.resting if steady else self.seconds_together(num_tokens, num_tokens)

    def hoped(self, num_tokens: int) -> float:
        """An optimistic estimate of `steady`: the less often it was measured, the more optimistic."""
        return self.steady(num_tokens) * (1 - max(SLACK, TRIAL_SHARE / (1 + self.times.steady.num_measured(num_tokens))))

    def seconds_together(self, num_drafts: int, num_head: int) -> float:
        """As `seconds`, if every sequence of the batch drafts as many tokens: the head drafts for all of them in one pass, whose cost
        they share. A sequence that counted the whole cost as its own would never be the first to draft."""
        verify = self._experience.verify(self.num_sequences * (1 + num_drafts))
        return verify + (self.drafting(num_head) if num_head else 0.0) + self.overhead(1)

    def rate_together(self, expected: float, num_drafts: int, num_head: int) -> float:
        """Tokens per second of the whole batch in such a round."""
        seconds = self.seconds_together(num_drafts, num_head)
        return self.num_sequences * expected / seconds if seconds > 0 else expected

    @property
    def rate_at_rest(self) -> float:
        """Tokens per second of the whole batch in rounds without drafts."""
        resting = self.resting
        return self.num_sequences / resting if resting else 1.0

    def was_beside(self, num_other_rows: int, num_others: int) -> None:
        """Tells with how many rows of how many other sequences the last round was verified."""
        newest, self._is_company_known = 0.3 if self._is_company_known else 1.0, True
        self.num_other_rows += newest * (num_other_rows - self.num_other_rows)
        self.num_others += newest * (num_others - self.num_others)
        self._experience.num_others = self.num_others if self.num_others > 0.01 else 0.0
