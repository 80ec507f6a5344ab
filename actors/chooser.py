"""Which draft is worth verifying, and how much of it: by expected tokens per second.

    rate(K) = E(K) / (V(K + 1) + seconds of drafting + overhead),    E(K) = 1 + sum over i <= K of a_1 ... a_i

V is what verifies of so many rows have taken lately, a_i how often the drafter was right lately where it was as sure as
now. All drafters are compared with what came, also those whose drafts were not verified: who was not listened to can
still convince. Length 0 is a draft like any other, so speculation that does not pay turns itself off: rounds then go by
without a thought of it. Those who look up are asked as seldom as their answers of late were worth after so long a repetition.

The head's rounds are measured whole, beside rounds of rest just before them, for what things take alone is not what they take
together. Once it is worth it, it is asked for a stretch of rounds without another thought. Until then it is tried for a short
stretch, if it may be worth it in this text, and if that is out of the question asked for one token, more seldom the longer that is
for nothing. Where it is not asked at all, it says now and then whether it would have been right.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

from ..core.speculation import Draft, num_alike
from .costs import usual
from .experience import (
    FIRST_PAUSE,
    MEMORY,
    NUM_RUN_CLASSES,
    OTHERS_WORD,
    SHORT_MEMORY,
    Belief,
    Experience,
    beliefs_by_run,
    run_class,
)
from .pace import AFTER, Pace
from .trust import Trust

#: By how much the head must promise more than what is there already, before it is asked.
HEAD_MARGIN = 1.03
#: Rounds between two questions to a head that is not worth it, at last, unless asking would then take more than a share of the time, or
#: trying. After a right answer that is a surprise it is asked again at once, if being right would make it worth it; where nothing would, it
#: is asked only to measure it again, so many times more seldom.
LAST_PAUSE, ASKING_SHARE, TRYING_SHARE, HOPELESS = 16, 0.005, 0.01, 4
#: How much longer the pause of new sequences is for every question that was for nothing, and shorter for every other.
LONGER = 2.0
#: Times it is told something in between, at last, before it must say whether it would have been right.
LAST_MARK_PAUSE = 7
#: Rounds that go by without a question to those who look up, at most, and no more than keep what is lost by it below a share of the time.
LOOK_PAUSE, LOOKING_SHARE = 64, 0.015
#: Rounds for which the head is asked as in the one before, without another thought: to think takes as long as half a token of a small
#: model. After so many, so many times at most, a stretch ends if less than a share of the drafted tokens that it needs were right, of
#: which it needs some a round, however little its rounds are held to take.
STRETCH, NUM_STRETCHES, TOO_FEW, LEAST_NEEDED = 8, 8, 0.6, 0.2
#: Rounds of a new sequence in which the head is not asked where others look up: a repetition, if there is one, often begins after one or
#: two tokens, and what the head drafts beyond them is had for less.
FIRST_SILENT = 2
#: The class of a run of repeated tokens that ends it.
LONG_RUN = 3
#: A head that is not worth it is tried for a stretch, if it would be were its rounds as short as may be hoped, and its tokens so many
#: standard deviations more often right than in other texts: only rounds in a row say both.
SPREAD = 0.2
#: Some rounds of rest are measured, though the head seems to be worth it, where it is not known what they take and what is done besides
#: verifying is more than a share of it; and again after so many others, or, where the head brings more than so many times as much, after up
#: to so many times as many, the fewer measurements say so the sooner.
UNSURE, REST_AGE, CLEARLY, OLD = 0.05, 500, 1.25, 4
#: Rounds after which they say nothing of a stretch: a machine has its moods.
REST_FRESH = 32
#: Another number of tokens that seems to bring more than such a share of the best one's is tried, after so many measurements of others.
DOUBT, RARELY = 0.93, 4
#: Rounds of rest that are measured together, at most.
NUM_MEASURED = 64
#: Rounds for which it is remembered what a head that is always right would bring.
CEILING_ROUNDS = 8
#: Drafts in a row that were wrong from the start where most were right: the text has changed its nature, and whoever was not worth it
#: may be.
NUM_MISSES = 2
#: How likely it is to do so, in one round.
CHANGE = 0.02


@dataclass(frozen=True, slots=True)
class Plan:
    """What to verify: a draft, perhaps continued by another drafter's. `rate`: tokens per second expected; `expected`: tokens expected;
    `reach`: the probability that all of it is accepted."""

    parts: tuple[Draft, ...]
    rate: float
    expected: float = 1.0
    reach: float = 1.0

    @property
    def tokens(self) -> tuple[int, ...]:
        return tuple(token for part in self.parts for token in part.tokens)


class Asking(Enum):
    """Why the head is asked in a round."""

    NOTHING = "nothing"
    SIGN = "one token, to see whether it has become worth it"
    TRIAL = "what may be worth it"
    DRAFT = "what is worth it"


class Chooser:
    """Decides for one sequence, round by round, which drafters to ask, how much of whose draft to verify, and when not to draft.

    Calls in a round: `rests()`: no drafter is asked, and the round ends with `took()`. `goes_on`: the head's draft is verified as in
    the last round, then `went_on()`. Otherwise `looks()` and `best()` of the look-ups' drafts, `head_limit()`, `whole()` or `best()`, and
    `came()`. Every round: `took()`."""

    def __init__(self, experience: Experience, has_look_ups: bool = True, has_head: bool = True, is_drawn: bool = False) -> None:
        self._experience, self._has_head, self._is_drawn = experience, has_head, is_drawn
        self._of_head = experience.head[is_drawn]
        self.pace, self._trust = Pace(experience, is_drawn), Trust(experience)
        self._first_guesses = [Belief() for _ in range(64)]  # of the head, by position, however sure it was
        self._pause = round(self._of_head.pause)
        # The round this is, those until which the head is not asked, and need not be thought of, and those from which look-ups are asked,
        # and it is for a sign, or for a trial, should there be hope.
        self._round, self._silent_until = 0, FIRST_SILENT if has_look_ups else 0
        self._wake_at: float = self._silent_until if has_head else math.inf
        self._look_at = [0 if has_look_ups else math.inf] * NUM_RUN_CLASSES
        self._sign_at: float = max(FIRST_PAUSE, self._pause - self._of_head.num_unasked) if has_head else math.inf
        self._trial_at: float = 0
        self._is_hopeful = has_head
        self._is_looking, self._is_promising = False, False  # this round; the head, by its last sign
        self._asking, self._asked_at = Asking.NOTHING, -2  # in this round; the round in which it was, last
        self._wanted = 0, 0.0  # what the head is asked for this round, as `head_limit` has said
        self._is_worth_it = False  # it was, when it was asked last
        # Of a stretch: what the head is asked for, rounds left, tokens that STRETCH of them must bring, and those which lack; what came of
        # the rounds that are over, and the seconds they took.
        self._stretch, self._num_left, self._needed, self._lacking = (0, 0.0), 0, 0.0, 0.0
        self._came = list[tuple[Draft | None, tuple[int, ...]]]()
        self._took = list[float]()  # or rounds of rest, of which there have been so many in a row:
        self.num_rests = 0
        self._mark_pause = self._num_unmarked = 0  # times it is told something without having to say of it whether it would have been right
        self._ceiling = 0, 0, 0.0  # the last round for which it holds, the limit, and tokens per second
        # Of what was verified: misses in a row, hits, and their share before those misses; whether they say that the text has changed.
        self._num_misses, self._hits, self._usual, self._has_changed = 0, Belief(), 0.5, False
        self._run = 0  # the class of the run of repeated tokens that looking up would go on
        self._found = beliefs_by_run()  # of each question to those who look up: the rounds it saved

    # What is expected

    @property
    def _last_pause(self) -> int:
        asking = (self.pace.times.waking(1) or self.pace.drafting(1)) + self.pace.aftermath
        return max(LAST_PAUSE, round(asking / (ASKING_SHARE * max(self.pace.resting, 1e-9))))

    def best(self, drafts: Sequence[Draft], num_head: int, room: int) -> Plan:
        """The draft and the length of it with the highest expected rate, at most `room` tokens; None if verifying none is better.
        `num_head`: tokens the head has drafted already this round."""
        if not drafts and not num_head:
            return Plan((), self.pace.rate_at_rest)
        plan = Plan((), self.pace.rate(1.0, self.pace.seconds(0, num_head)))
        for draft in drafts:
            other = self._cut((draft,), self._trust.probabilities(draft, room), num_head, room)
            plan = other if other.rate > plan.rate else plan
        return plan

    def whole(self, head: Draft) -> Plan | None:
        """The head's draft as `head_limit` asked for it, if no look-up has one and it was not asked as a sign; saves weighing it again."""
        if self._asking not in (Asking.DRAFT, Asking.TRIAL):
            return None
        reach = math.prod(self._first_guess(i) for i in range(len(head.tokens)))
        *_, (rate, _) = self._rates_of_head(len(head.tokens))
        return Plan((head,), rate, reach=reach)

    def extended(self, plan: Plan, tails: Sequence[Draft], num_head: int, room: int) -> Plan:
        """`plan`, or if that is better, with a look-up's draft that continues it."""
        start = self._trust.probabilities(plan.parts[0], room)
        for tail in tails:
            longer = self._cut((plan.parts[0], tail), start + self._trust.probabilities(tail, room - len(start), " tail"), num_head, room)
            plan = max(plan, longer, key=lambda each: each.rate)
        return plan

    def _cut(self, parts: tuple[Draft, ...], probabilities: list[float], num_head: int, room: int) -> Plan:
        verify, others = self._experience.verify, round(self.pace.num_other_rows)
        fixed, gain = self.pace.seconds(0, num_head) - verify(others + 1), self.pace.others_gain
        expected, reach, best, length, most, whole = 1.0, 1.0, 0.0, 0, 1.0, 1.0
        tried = probabilities[: max(0, min(room, verify.reach - 1 - others))]
        for i, (probability, taken) in enumerate(zip(tried, verify.curve(others + 2, others + 2 + len(tried)), strict=True), 1):
            reach *= probability
            expected += reach
            seconds = fixed + taken
            rate = (expected + gain) / seconds if seconds > 0 else expected
            if rate > best:
                best, length, most, whole = rate, i, expected, reach
            elif rate < 0.7 * best or reach < 0.01:
                break
        first = parts[0].cut(length)
        rest = parts[1].cut(length - len(parts[0].tokens)) if length > len(parts[0].tokens) else None
        return Plan((first, rest) if rest is not None else (first,), best, most, whole)

    def rests(self, run: int | None = 0) -> bool:
        """Whether no drafter is asked this round. `run`: how long the newest tokens repeat an earlier place; look-ups are asked by what
        they found after such runs. `came` need not be called for such a round."""
        self._run = run_class(run or 0)
        is_open = run is not None and (not self._num_left or self._run >= LONG_RUN)
        self._is_looking = is_open and self._round >= self._look_at[self._run]
        if self.goes_on is not None:
            return False
        if self._came:
            self._learn()
        if self._is_looking or self._round >= self._wake_at:
            if self._took:
                self._measure_rest()
            self.num_rests = 0
            return False
        self.num_rests += 1
        self._round += 1
        self._of_head.num_unasked += 1
        return True

    @property
    def will_rest(self) -> bool:
        """Whether the round after a resting one is expected to rest too."""
        return self._round < min(self._wake_at, self._look_at[self._run])

    @property
    def goes_on(self) -> tuple[int, float] | None:
        """(tokens, floor) to ask the head for without weighing anything, while the decision of an earlier round holds (a stretch); else
        None."""
        return self._stretch if self._num_left and not self._is_looking else None

    @property
    def will_go_on(self) -> tuple[int, float] | None:
        """As `goes_on`, for the next round."""
        return self._stretch if self._num_left > 1 and self.goes_on is not None else None

    def went_on(self, head: Draft | None, tokens: tuple[int, ...], is_typical: bool) -> None:
        """A round of a stretch brought `tokens`. `is_typical` is false if its time says nothing; a trial is extended by such a round."""
        self._asked_at = self._round
        self._round += 1
        ends = head is None or not head.tokens or not (is_typical or self._asking is Asking.TRIAL)
        self._num_left = 0 if ends else self._num_left - 1
        self._came.append((head if is_typical else None, tokens))
        self._lacking -= len(tokens)
        if self._num_left % STRETCH == 0:
            self._num_left = self._num_left if self._lacking < 0 else 0
            self._lacking = self._needed

    def _learn(self) -> None:
        """Updates the statistics with the rounds of the stretch that has ended."""
        times, by_size = self.pace.times, defaultdict[int, list[float]](list)
        # In the first the head drafts for two rounds, in the last for none.
        for (head, _), seconds in [*zip(self._came, self._took, strict=False)][1:-1]:
            by_size[len(head.tokens) if head is not None else 0].append(seconds)
        for size, several in by_size.items():
            if size and times.num_unmeasured < REST_FRESH:
                times.steady.saw(size, usual(several) / times.newest_rest)
        times.num_unmeasured += len(self._came)
        self._compare_stretch([(head, tokens) for head, tokens in self._came if head is not None and head.tokens])
        self._came.clear()
        self._took.clear()

    def took(self, seconds: float, work: float) -> None:
        """The last round took so many seconds, waiting for the reader excluded; `work`: the part of it spent drafting and verifying, if
        drafters were asked."""
        if self.num_rests or self._came:
            self._took.append(seconds)
            if self.num_rests and (self.num_rests == AFTER or len(self._took) == NUM_MEASURED):
                self._measure_rest()
        else:
            verify = self._experience.verify(1 + round(self.pace.num_other_rows))
            self.pace.times.num_unmeasured += 1
            self.pace.times.overhead.saw(1, min(seconds - work, verify) if verify else seconds - work)

    def _measure_rest(self) -> None:
        """Records the mean time of the resting rounds that have just ended, apart for those right after a drafted round."""
        times, seconds = self.pace.times, usual(self._took)
        if self.num_rests <= AFTER:
            times.after.saw(1, seconds)
        elif len(self._took) >= AFTER // 2 and seconds > 0:
            times.resting.saw(1, seconds)
            times.newest_rest, times.num_unmeasured, times.rest_age = seconds, 0, REST_AGE
        self._took.clear()

    def looks(self) -> bool:
        """Whether look-ups are asked this round, as found by `rests`."""
        return self._is_looking

    def looked(self, seconds: float) -> None:
        """Look-ups took so many seconds to answer."""
        self._experience.looking.saw(1, seconds)

    def drafted(self, num_tokens: int, seconds: float | None) -> None:
        """The head took `seconds` for `num_tokens`; None if its draft came with a verdict. Rounds after a rest are counted apart: the
        head has rows to catch up on, and its weights have left the caches."""
        is_steady, self._asked_at = self._round == self._asked_at + 1, self._round
        if seconds is None:
            return
        if not is_steady:
            self.pace.times.waking.saw(num_tokens, seconds)
        if is_steady or seconds < self.pace.drafting(num_tokens):  # an accident is not believed until the head is asked twice in a row
            self.pace.drafting.saw(num_tokens, seconds)

    def head_limit(self, plan: Plan, limit: int) -> tuple[int, float]:
        """(tokens, floor) the head should draft, if `plan` is the best without it, and the joint probability below which a further token
        does not pay. Now and then one token, to see whether the head has begun to pay (a sign)."""
        self._asking = Asking.NOTHING
        if self._round < self._silent_until:
            return 0, 0.0
        without = max(self.pace.rate_together(plan.expected, len(plan.tokens), 0), self.pace.rate_at_rest)
        ceiling, wanted, floor = self._best_of_head(limit), 0, 0.0
        if ceiling > HEAD_MARGIN * without:
            wanted, floor = self._best_limit(HEAD_MARGIN * without, limit)
            if wanted and self._is_rest_unsure(wanted):
                wanted, self._trial_at = 0, self._round + 2 * AFTER
                self._sign_at = self._trial_at
            elif wanted:
                other = self._doubtful(wanted, limit)
                self._asking = Asking.TRIAL if other else Asking.DRAFT
                wanted, floor = (other, 0.0) if other else (wanted, floor)
            elif self._round >= self._trial_at and not self._is_looking:
                wanted, floor = self._best_limit(without, limit, is_hoping=True)
                self._is_hopeful = wanted > 0
                if wanted:
                    self._asking = Asking.TRIAL
                    self._begin_trial(wanted)
        elif ceiling <= HEAD_MARGIN * self.pace.rate_at_rest:
            self._is_hopeful = False
        if not wanted and limit > 0 and self._must_see(without, ceiling):
            self._asking, wanted = Asking.SIGN, 1
        self._is_promising = False
        # Drawn with the target's noise, an unlikely token is as often right as a likely one.
        self._wanted = wanted, 0.0 if self._is_drawn else min(floor, 0.5)
        return self._wanted

    def _is_rest_unsure(self, num_tokens: int) -> bool:
        """Whether resting rounds should be measured again before the head drafts `num_tokens` tokens: the gain may come from an error in
        their time."""
        times = self.pace.times
        if times.num_unmeasured <= times.rest_age:
            return False
        if times.resting(1):
            *_, (rate, _) = self._rates_of_head(num_tokens)
            is_old = times.num_unmeasured > REST_AGE * min(times.resting.num_measured(1), OLD)
            is_clear = rate > CLEARLY * self.pace.rate_at_rest and not is_old
        else:
            is_clear = self.pace.overhead(1) <= UNSURE * self._experience.verify(1)
        if not is_clear:
            times.rest_age = times.num_unmeasured + REST_AGE  # whether they come to be measured or not
        return not is_clear

    def _doubtful(self, wanted: int, limit: int) -> int:
        """A number of tokens that may be as good as the best and has not been measured lately, 0 if there is none. Without it a number
        that was once measured too slow would never be tried again."""
        times = self.pace.times
        if times.num_unmeasured >= REST_FRESH // 2:
            return 0
        rates = [rate for rate, _ in self._rates_of_head(limit)]
        least = DOUBT * rates[wanted - 1]
        others = [i for i, rate in enumerate(rates, 1) if i != wanted and rate > least and times.steady.num_since(i) >= RARELY]
        return max(others, key=lambda i: rates[i - 1], default=0)

    def _begin_trial(self, num_tokens: int) -> None:
        """Begins a trial of `num_tokens` tokens for some rounds; the more it is expected to cost, the later the next one."""
        *_, (rate, taken) = self._rates_of_head(num_tokens)
        lost = STRETCH * taken * max(0.0, 1 - rate / self.pace.rate_at_rest) + self.pace.aftermath
        self._trial_at = self._round + max(LAST_PAUSE, round(lost / (TRYING_SHARE * max(self.pace.resting, 1e-9))))

    def _best_limit(self, least: float, limit: int, is_hoping: bool = False) -> tuple[int, float]:
        """(tokens, floor) with the highest expected rate of the head, if that exceeds `least` tokens per second."""
        best, wanted, more, before = least, 0, 0.0, 0.0
        for i, (rate, taken) in enumerate(self._rates_of_head(limit, is_hoping), 1):
            if rate > best:
                best, wanted, more = rate, i, taken - before
            before = taken
        return wanted, best * more / self.pace.num_sequences if wanted > 1 else 0.0

    def _rates_of_head(self, limit: int, is_hoping: bool = False) -> Iterator[tuple[float, float]]:
        """By number of tokens drafted: expected tokens per second and seconds of a round; with `is_hoping`, by optimistic estimates."""
        expected, reach, num_sequences = 1.0, 1.0, self.pace.num_sequences
        for i in range(1, limit + 1):
            reach *= self._first_guess(i - 1, is_hoping)
            expected += reach
            taken = self.pace.hoped(i) if is_hoping else self.pace.steady(i)
            yield num_sequences * expected / taken if taken > 0 else expected, taken

    def _first_guess(self, i: int, is_hoping: bool = False) -> float:
        """The probability that the head's token at a place in its draft is right, if those before it are."""
        others, mine = self._of_head.first_guesses[i], self._first_guesses[i]
        share = mine.share(others.share(0.6), max(1.0, OTHERS_WORD * (1 - mine.num_trials / SHORT_MEMORY)))
        if is_hoping:
            spread = max(SPREAD / (1 + mine.num_trials / OTHERS_WORD), 1 / math.sqrt(1 + others.num_trials))
            share += math.sqrt(share * (1 - share)) * spread
        return min(1.0, share)

    def _guessed(self, i: int, is_right: float, number: int = 1) -> None:
        """Counts `number` drafts in which the head's token at place `i` was right with the share `is_right`."""
        self._first_guesses[i].saw(is_right, SHORT_MEMORY, number)
        self._of_head.first_guesses[i].saw(is_right, 8 * MEMORY, number)

    def _must_see(self, without: float, ceiling: float) -> bool:
        is_due = self._round >= self._sign_at
        if is_due and self._is_hopeful and not self._is_looking and self._trial_at < self._round + self._last_pause:  # that says more
            is_due, self._sign_at = False, self._trial_at
        if not is_due and not self._is_promising:
            return False
        alone = self.pace.rate_at_rest
        if is_due and ceiling <= HEAD_MARGIN * alone:
            if self._pause >= HOPELESS * self._last_pause:
                return True
            self._pause = min(2 * self._pause, HOPELESS * self._last_pause)
            self._sign_at = self._round + self._pause
        return ceiling > HEAD_MARGIN * (alone if self._has_changed else without)

    def _best_of_head(self, limit: int) -> float:
        """Tokens per second if every token that the head can draft were accepted: an upper bound."""
        until, former, ceiling = self._ceiling
        if self._round >= until or limit != former:
            steady = [self.pace.steady(i + 1) for i in range(limit)]
            ceiling = max((self.pace.num_sequences * (i + 2) / s if s > 0 else i + 2.0 for i, s in enumerate(steady)), default=0.0)
            self._ceiling = self._round + (CEILING_ROUNDS if self._experience.verify(1) else 0), limit, ceiling
        return ceiling

    # What came

    def came(
        self, tokens: Sequence[int], drafts: Sequence[Draft], plan: Plan, num_rows: int, seconds: float, num_sequences: int = 1
    ) -> None:
        """A round brought `tokens`. `drafts`: all that had been proposed; `plan`: what was verified, in a batch of `num_rows` rows of
        `num_sequences` sequences, in `seconds` (0: its time says nothing)."""
        self._round += 1
        self._of_head.num_unasked += 1
        if num_rows:
            num_other_rows = max(0, num_rows - len(plan.tokens) - 1)  # of a plan that is no sense not all was verified
            self.pace.was_beside(num_other_rows, num_sequences - 1)
            self._experience.verify.saw(num_rows, seconds)
        num_looked_up = _num_looked_up(plan, tokens)
        if self._is_looking:
            saved = float(num_looked_up)
            if saved and self.pace.resting:
                saved -= (self.pace.seconds(len(plan.tokens), 0) - self.pace.seconds(0, 0)) / self.pace.resting
            self._found[self._run].saw(saved, 2 * MEMORY)
            self._look_at[self._run] = self._round + self._look_pause
        self._compare_all(tokens, drafts, plan)
        if not self._is_looking or self._asking in (Asking.TRIAL, Asking.DRAFT) or num_looked_up > self._stretch[0]:
            self._num_left = 0  # else a stretch goes on, that was interrupted for little
        if self._asking is not Asking.NOTHING:
            self._asked([draft for draft in drafts if draft.drafter == "draft-mtp"], plan, bool(seconds))
        else:
            self._is_worth_it &= self._is_looking  # what was looked up for this round does not change that
            self._wake_at = self._round if self._is_promising or self._is_worth_it else self._next_question

    @property
    def _next_question(self) -> float:
        """The round in which the head is asked next; a question that is due waits while look-ups are being asked."""
        due = min(self._sign_at, self._trial_at) if self._is_hopeful else self._sign_at
        return max(due, self._round + FIRST_PAUSE)

    def _asked(self, of_head: list[Draft], plan: Plan, is_typical: bool) -> None:
        """The head was asked this round: updates when it is asked again."""
        asking, of_all = self._asking, self._of_head
        if not of_head:
            self._first_guesses[0].saw(False, SHORT_MEMORY)
        is_worth_it = asking is not Asking.SIGN and bool(of_head)
        if is_worth_it:
            if is_typical and plan.parts == tuple(of_head):
                self._num_left, self._stretch = STRETCH * (NUM_STRETCHES if asking is Asking.DRAFT else 1), self._wanted
                needed = self.pace.steady(self._wanted[0]) / max(self.pace.resting, 1e-9) - 1  # right ones, a round, to be as good as rest
                needed = max(needed, LEAST_NEEDED)  # what it takes may have been guessed too low
                self._needed = self._lacking = STRETCH * (1 + TOO_FEW * needed)
            if asking is Asking.DRAFT:
                of_all.pause = max(of_all.pause / LONGER, FIRST_PAUSE)
        elif asking is not Asking.TRIAL and not self._is_promising:
            self._pause = max(self._pause, min(2 * self._pause, self._last_pause))
            of_all.pause = max(of_all.pause, min(LONGER * of_all.pause, self._last_pause))
        of_all.num_unasked, self._sign_at = 0, self._round + self._pause
        if not (asking is Asking.SIGN and self._is_looking):  # beside what was looked up
            self._is_worth_it = is_worth_it and asking is Asking.DRAFT
        self._wake_at = self._round if is_worth_it or self._is_worth_it or self._is_promising else self._next_question

    @property
    def _look_pause(self) -> int:
        """Rounds until look-ups are asked again, after questions that did not pay."""
        e, resting = self._experience, self.pace.resting
        cost = max(e.looking(1), e.verify(1) + self.pace.overhead(1) - resting) + self.pace.aftermath
        lost = cost - self._found[self._run].share(e.found[self._run].share(1.0)) * resting
        return round(min(LOOK_PAUSE, lost / (LOOKING_SHARE * resting))) if lost > 0 and resting else 0

    def wants_marks(self) -> bool:
        """Whether the head, when told the newest tokens, should also say if it would have drafted them; the more seldom the longer it was
        always wrong."""
        self._num_unmarked -= 1
        return self._num_unmarked < 0

    def marked(self, marks: Sequence[bool], limit: int) -> None:
        """The head says of tokens it was not asked for whether it would have drafted each; `limit` is the most it drafts. It is asked if
        that shows it pays."""
        if marks:
            self._mark_pause = 0 if any(marks) else min(2 * self._mark_pause + 1, LAST_MARK_PAUSE)
            self._num_unmarked = self._mark_pause
        for is_right in marks:
            self._guessed(0, is_right)
        if marks and self._best_limit(HEAD_MARGIN * self.pace.rate_at_rest, limit)[0]:
            self._wake_at = self._round

    def ended(self) -> None:
        """Hands what was learned to `Experience`; called when the sequence ends or loses its memory."""
        for found, before in zip(self._found, self._experience.found, strict=True):
            if found.num_trials:
                before.saw(found.num_right / found.num_trials)
        self._trust.ended()
        self._found = beliefs_by_run()  # should it go on, in other memory, that is not counted twice
        if self._came:
            self._learn()
        self._num_left = self.num_rests = 0
        self._took.clear()

    def _compare_all(self, tokens: Sequence[int], drafts: Sequence[Draft], plan: Plan) -> None:
        if not drafts:
            self._num_misses = 0
            return
        likely = self._first_guess(0)
        for draft in drafts:
            num_right = self._trust.compare(draft, tokens)
            for i in range(min(num_right + 1, len(draft.tokens), len(tokens)) if draft.drafter == "draft-mtp" else 0):
                self._guessed(i, i < num_right)
            if draft.drafter == "draft-mtp" and self._asking is Asking.SIGN:
                self._is_promising = draft.tokens[:1] == tuple(tokens[:1]) and (self._has_changed or likely < 0.5)
                self._has_changed &= self._is_promising
        is_miss = bool(plan.tokens) and plan.tokens[:1] != tuple(tokens[:1])
        self._num_misses = self._num_misses + 1 if is_miss else 0
        by_chance = (1 - self._usual) ** NUM_MISSES
        if self._num_misses == NUM_MISSES and by_chance < CHANGE:
            self._pause, self._is_promising, self._has_changed = FIRST_PAUSE, self._has_head, True
            kept = by_chance / (by_chance + CHANGE)
            self._trust.doubt(plan.parts[0].drafter, kept)
            for belief in self._first_guesses:  # the head may have become better than it was known to be
                belief.num_right, belief.num_trials = belief.num_right * kept, belief.num_trials * kept
            self._sign_at = min(self._sign_at, self._round + FIRST_PAUSE) if self._has_head else math.inf
        if plan.tokens:
            self._hits.saw(not is_miss)
            self._has_changed &= is_miss
            self._usual = self._usual if is_miss else self._hits.share(0.5)
        if len(plan.parts) > 1 and tuple(tokens[: len(plan.parts[0].tokens)]) == plan.parts[0].tokens:
            self._trust.compare(plan.parts[1], tokens[len(plan.parts[0].tokens) :], " tail")

    def _compare_stretch(self, came: list[tuple[Draft, tuple[int, ...]]]) -> None:
        """As `_compare`, for all rounds of a stretch at once."""
        if not came:
            return
        num_right = [max(0, min(len(tokens) - 1, len(head.tokens))) for head, tokens in came]
        for i in range(max(len(head.tokens) for head, _ in came)):
            reached = sum(1 for (head, _), right in zip(came, num_right, strict=True) if right >= i < len(head.tokens))
            if reached:
                self._guessed(i, sum(1 for right in num_right if right > i) / reached, reached)
        for head, tokens in came[::STRETCH]:
            self._trust.compare(head, tokens)
        self._hits.saw(sum(1 for right in num_right if right) / len(came), number=len(came))
        self._usual, self._num_misses, self._has_changed = self._hits.share(0.5), 0, False


def _num_looked_up(plan: Plan, tokens: Sequence[int]) -> int:
    """How many of the accepted tokens a look-up had proposed."""
    left, found = list(tokens), 0
    for part in plan.parts:
        right = num_alike(part.tokens, left)
        found += right if part.drafter != "draft-mtp" else 0
        left = left[len(part.tokens) :] if right == len(part.tokens) else []
    return found
