"""Which draft is worth verifying, and how much of it: by expected tokens per second.

    rate(K) = E(K) / (V(K + 1) + seconds of drafting + overhead),    E(K) = 1 + sum over i <= K of a_1 ... a_i

V is what verifies of so many rows have taken lately, a_i how often the drafter was right lately where it was as sure as
now. All drafters are compared with what came, also those whose drafts were not verified: who was not listened to can
still convince. Length 0 is a draft like any other, so speculation that does not pay turns itself off: rounds then go by
without a thought of it. Those who look up are asked as seldom as their answers of late were worth after so long a repetition; the
head, whose drafts cost something, now and then for one token, more seldom the longer that is for nothing, and when it says
that it would have been right.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice, takewhile

from ..core.speculation import Draft, DrafterName
from .costs import Costs
from .experience import (
    FIRST_PAUSE,
    MEMORY,
    NUM_RUN_CLASSES,
    SHORT_MEMORY,
    UNSURPRISED,
    UNTRIED,
    Belief,
    Experience,
    Surprise,
    Times,
    beliefs_by_run,
    run_class,
)

#: By how much the head must promise more than what is there already, before it is asked.
HEAD_MARGIN = 1.05
#: How sure a drafter is, in classes.
CLASSES = (0.2, 0.4, 0.6, 0.75, 0.9, 0.97)
#: Rounds between two questions to a head that is not worth it, at last, unless asking would then take more than a share of the time. After
#: a right answer that is a surprise it is asked again at once, if being right would make it worth it; where nothing would, it is asked only
#: to measure it again, so many times more seldom.
LAST_PAUSE, ASKING_SHARE, HOPELESS = 16, 0.005, 4
#: How much longer the pause of new sequences is for every question that was for nothing, and shorter for every other.
LONGER = 2.0
#: Rounds that go by without a question to those who look up, at most, and no more than keep what is lost by it below a share of the time.
LOOK_PAUSE, LOOKING_SHARE = 64, 0.015
#: Rounds in a row for which a head that is not worth it is asked all the same, if it would be were its rounds as short as they have been
#: (that share of what they are held to take, if that was never measured): only rounds in a row say how long they are.
TRIAL_ROUNDS, TRIAL_SHARE = 5, 0.75
#: Rounds for which one with questions may make others slower.
AFTER = 8
#: Rounds for which it is remembered what a head that is always right would bring.
CEILING_ROUNDS = 8
#: Drafts in a row that were wrong from the start where most were right: the text has changed its nature, and whoever was not worth it
#: may be.
NUM_MISSES = 2
#: How likely it is to do so, in one round.
CHANGE = 0.02
#: Tokens that another sequence in the batch gains by each of its rows, about.
OTHERS_GAIN = 0.7


@dataclass(frozen=True, slots=True)
class Plan:
    """What to verify: a draft, and perhaps another drafter's that goes on where it ends. `rate` is in tokens per second, `expected` the
    tokens it brings; all of it is right as often as `reach` says."""

    parts: tuple[Draft, ...]
    rate: float
    expected: float = 1.0
    reach: float = 1.0

    @property
    def tokens(self) -> tuple[int, ...]:
        return tuple(token for part in self.parts for token in part.tokens)


class Chooser:
    """For one sequence, whose tokens are drawn or the likeliest ones. The order of a round: nothing more if it `rests`; else `best` of what
    was looked up if it `looks`, `head_limit`, `best` again, and `came`."""

    def __init__(self, experience: Experience, has_look_ups: bool = True, has_head: bool = True, is_drawn: bool = False) -> None:
        self._experience, self._has_head, self._is_drawn = experience, has_head, is_drawn
        self._of_head = experience.head[is_drawn]
        self._beliefs: dict[tuple[str, int, int], Belief] = {}
        self._surprises: dict[str, Surprise] = {}  # of each drafter, of late
        self._first_guesses = [Belief() for _ in range(64)]  # of the head, by position, however sure it was
        self._num_other_rows = self._num_others = experience.num_others  # of late, in a batch
        self._is_company_known = False
        self._pause = round(self._of_head.pause)
        # The round this is, the one until which the head need not be thought of, and those from which look-ups are asked and it must be.
        self._round = 0
        self._wake_at: float = 0 if has_head else math.inf
        self._look_at = [0 if has_look_ups else math.inf] * NUM_RUN_CLASSES
        self._head_at: float = max(FIRST_PAUSE, self._pause - self._of_head.num_unasked) if has_head else math.inf
        self._is_looking = self._is_asking = self._is_probing = self._is_promising = False  # the last three of the head
        # The round in which it was, last, and its tokens then, if it had been in the one before, too; the round at which a trial is over.
        self._asked_at, self._num_steady, self._tried_until = -2, 0, 0
        self._ceiling = 0, 0, 0.0  # the last round for which it holds, the limit, and tokens per second
        # Of what was verified: misses in a row, hits, and their share before those misses; whether they say that the text has changed.
        self._num_misses, self._hits, self._usual, self._has_changed = 0, Belief(), 0.5, False
        self._run = 0  # the class of the run of repeated tokens that looking up would go on
        self._found = beliefs_by_run()  # of each question to those who look up: the rounds it saved

    # What is expected

    def _seconds(self, num_drafts: int, num_head: int) -> float:
        """Of a round that verifies so many drafts, of which the head made so many."""
        verify = self._experience.verify(round(self._num_other_rows) + num_drafts + 1)
        return verify + (self.drafting(num_head) if num_head else 0.0) + self.overhead(1)

    @property
    def _has_company(self) -> bool:
        return self._num_other_rows >= 0.5

    @property
    def _num_sequences(self) -> int:
        """In a batch, this one among them."""
        return 1 + round(self._num_others)

    @property
    def _times(self) -> Times:
        return self._experience.times[self._has_company, self._is_drawn]

    @property
    def drafting(self) -> Costs:
        """Of so many tokens of the head, in such company as there is."""
        return self._times.drafting

    @property
    def overhead(self) -> Costs:
        """Of a round, besides drafting and verifying."""
        return self._times.overhead

    @property
    def _resting(self) -> float:
        """Seconds of a round in which nobody is asked."""
        return self._times.resting(1) or self._times.after(1) or self._seconds_together(0, 0)

    @property
    def _aftermath(self) -> float:
        """Seconds that rounds take more, together, because there was one with questions before: it has filled the caches with other things
        (figures in kernels/EXPERIMENTS.md)."""
        after, resting = self._times.after(1), self._times.resting(1)
        return AFTER * max(0.0, after - resting) if resting else 0.0

    @property
    def _last_pause(self) -> int:
        asking = (self._times.waking(1) or self.drafting(1)) + self._aftermath
        return max(LAST_PAUSE, round(asking / (ASKING_SHARE * max(self._resting, 1e-9))))

    def _rate(self, expected: float, seconds: float) -> float:
        return (expected + OTHERS_GAIN * self._num_other_rows) / seconds if seconds > 0 else expected

    def _steady(self, num_tokens: int) -> float:
        """Seconds of a round in which the head drafts so many tokens, one of many such rounds."""
        steady = self._times.steady(num_tokens)
        return steady * self._resting if steady else self._seconds_together(num_tokens, num_tokens)

    def _least(self, num_tokens: int) -> float:
        """As few as they may be."""
        least = self._times.least.get(num_tokens)
        return least * self._resting if least is not None else TRIAL_SHARE * self._steady(num_tokens)

    def _seconds_together(self, num_drafts: int, num_head: int) -> float:
        """As `_seconds`, of a round in which all sequences do the same. The head drafts for all of them at once, and what that takes they
        share: whoever reckons with it alone is never the first."""
        verify = self._experience.verify(self._num_sequences * (1 + num_drafts))
        return verify + (self.drafting(num_head) if num_head else 0.0) + self.overhead(1)

    def _rate_together(self, expected: float, num_drafts: int, num_head: int) -> float:
        """Tokens per second of all, then."""
        seconds = self._seconds_together(num_drafts, num_head)
        return self._num_sequences * expected / seconds if seconds > 0 else expected

    @property
    def _rate_at_rest(self) -> float:
        """The same in rounds in which nobody is asked."""
        resting = self._resting
        return self._num_sequences / resting if resting else 1.0

    @staticmethod
    def _key(name: str, i: int, confidence: float) -> tuple[str, int, int]:
        return name, min(i, 2), bisect_left(CLASSES, confidence)

    def _probabilities(self, draft: Draft, suffix: str = "") -> Iterator[float]:
        """How likely each token is right once those before it are."""
        name = draft.drafter + suffix
        factor = self._surprises.get(name, UNSURPRISED).factor(self._experience.trust.get(name, UNTRIED).share(1.0))
        for i, confidence in enumerate(_confidences(draft)):
            yield factor * self._probability(self._key(name, i, confidence), confidence)

    def _probability(self, key: tuple[str, int, int], confidence: float) -> float:
        before = self._experience.beliefs.get(key, UNTRIED).share(confidence)
        return self._beliefs.get(key, UNTRIED).share(before)

    def best(self, drafts: Sequence[Draft], num_head: int, room: int) -> Plan:
        """The best beginning of the best draft, of `room` tokens at most, or none. The head has drafted `num_head` tokens already."""
        plan = Plan((), self._rate(1.0, self._seconds(0, num_head)))
        for draft in drafts:
            other = self._cut((draft,), self._probabilities(draft), num_head, room)
            plan = other if other.rate > plan.rate else plan
        return plan

    def extended(self, plan: Plan, tails: Sequence[Draft], num_head: int, room: int) -> Plan:
        """`plan`, or better, with one of the drafts that go on where it ends."""
        start = list(self._probabilities(plan.parts[0]))
        for tail in tails:
            longer = self._cut((plan.parts[0], tail), chain(start, self._probabilities(tail, " tail")), num_head, room)
            plan = max(plan, longer, key=lambda each: each.rate)
        return plan

    def _cut(self, parts: tuple[Draft, ...], probabilities: Iterator[float], num_head: int, room: int) -> Plan:
        e, others = self._experience, round(self._num_other_rows)
        fixed, gain = self._seconds(0, num_head) - e.verify(others + 1), OTHERS_GAIN * self._num_other_rows
        expected, reach, best, length, most, whole = 1.0, 1.0, 0.0, 0, 1.0, 1.0
        for i, probability in enumerate(islice(probabilities, max(0, min(room, e.verify.reach - 1 - others))), 1):
            reach *= probability
            expected += reach
            seconds = fixed + e.verify(others + i + 1)
            rate = (expected + gain) / seconds if seconds > 0 else expected
            if rate > best:
                best, length, most, whole = rate, i, expected, reach
            elif rate < 0.7 * best or reach < 0.01:
                break
        first = parts[0].cut(length)
        rest = parts[1].cut(length - len(parts[0].tokens)) if length > len(parts[0].tokens) else None
        return Plan((first, rest) if rest is not None else (first,), best, most, whole)

    def rests(self, run: int | None = 0) -> bool:
        """Whether there is nobody to ask this round; those who look up only if they may find something, after a run of so many repeated
        tokens. `came` need not hear of it then."""
        self._is_looking = False
        if run is not None:
            self._run = run_class(run)
            self._is_looking = self._round >= self._look_at[self._run]
        if self._is_looking or self._round >= self._wake_at:
            return False
        self._round += 1
        self._of_head.num_unasked += 1
        return True

    def spent(self, num_rests: int, seconds: float, work: float = 0.0) -> None:
        """A round of rest took so long, the `num_rests`th in a row, or with 0 one with questions, besides `work`, its drafting and
        verifying. What is much longer than a verify was a wait for a reader."""
        times, verify = self._times, self._experience.verify(1 + round(self._num_other_rows))
        costs = times.overhead if num_rests == 0 else times.after if num_rests <= AFTER else times.resting
        seconds = min(seconds, verify * (2 if num_rests else 1)) if verify else seconds
        costs.saw(1, seconds)
        if num_rests == 0 and (size := self._num_steady) and self._resting:
            times.steady.saw(size, (work + seconds) / self._resting)
            times.least[size] = min(times.least.get(size, math.inf), times.steady(size))

    def rested(self, num_other_rows: int, num_others: int) -> None:
        """Beside so many rows of so many others."""
        newest, self._is_company_known = 0.3 if self._is_company_known else 1.0, True
        self._num_other_rows += newest * (num_other_rows - self._num_other_rows)
        self._num_others += newest * (num_others - self._num_others)
        self._experience.num_others = self._num_others if self._num_others > 0.01 else 0.0

    def looks(self) -> bool:
        """Whether to ask those who look up this round, as `rests` has found."""
        return self._is_looking

    def looked(self, seconds: float) -> None:
        """They took so long to answer."""
        self._experience.looking.saw(1, seconds)

    def drafted(self, num_tokens: int, seconds: float) -> None:
        """The head took so long for so many tokens. Only what it takes round after round says whether to ask it so: after a rest it has
        much to catch up on, and what it computes with is not in the caches."""
        is_steady, self._asked_at = self._round == self._asked_at + 1, self._round
        self._num_steady = num_tokens if is_steady and not self._is_looking else 0
        if not is_steady:
            self._times.waking.saw(num_tokens, seconds)
        if is_steady or seconds < self.drafting(num_tokens):  # an accident is not believed until the head is asked twice in a row
            self.drafting.saw(num_tokens, seconds)

    def head_limit(self, plan: Plan, limit: int) -> tuple[int, float]:
        """How many tokens the head should be asked for, when without it `plan` is the best, and the likelihood below which another is not
        worth it. One token, now and then, to see whether it has become worth it."""
        without = max(self._rate_together(plan.expected, len(plan.tokens), 0), self._rate_at_rest)
        ceiling, self._num_steady = self._best_of_head(limit), 0
        wanted, floor = self._best_limit(HEAD_MARGIN * without, limit, self._steady) if ceiling > HEAD_MARGIN * without else (0, 0.0)
        if not wanted and (self._is_trial or self._round >= self._head_at):
            wanted, floor = self._best_limit(without, limit, self._least)
            if wanted and not self._is_trial:
                self._begin_trial(wanted)
        self._is_probing = not wanted and limit > 0 and self._must_probe(without, ceiling)
        self._is_asking, self._is_promising = wanted > 0 or self._is_probing, False
        return wanted or int(self._is_probing), min(floor, 0.5)

    @property
    def _is_trial(self) -> bool:
        return self._round < self._tried_until

    def _begin_trial(self, num_tokens: int) -> None:
        """The more it will have lost, should its rounds take what they are held to take, the later is the next one."""
        *_, (rate, taken) = self._rates_of_head(num_tokens, self._steady)
        lost = TRIAL_ROUNDS * taken * max(0.0, 1 - rate / self._rate_at_rest) + self._aftermath
        self._tried_until = self._round + TRIAL_ROUNDS
        last = self._last_pause
        self._pause = max(last, min(HOPELESS * last, round(lost / (ASKING_SHARE * max(self._resting, 1e-9)))))
        self._of_head.pause = float(self._pause)

    def _best_limit(self, least: float, limit: int, seconds: Callable[[int], float]) -> tuple[int, float]:
        """The number of tokens that promises most, if more than `least` tokens per second, and how likely another must be; rounds take so
        many seconds."""
        best, wanted, more, before = least, 0, 0.0, 0.0
        for i, (rate, taken) in enumerate(self._rates_of_head(limit, seconds), 1):
            if rate > best:
                best, wanted, more = rate, i, taken - before
            before = taken
        return wanted, best * more / self._num_sequences if wanted > 1 else 0.0

    def _rates_of_head(self, limit: int, seconds: Callable[[int], float]) -> Iterator[tuple[float, float]]:
        """Tokens per second with so many tokens of the head, as they are likely to be right, and what those rounds take."""
        expected, reach, num_sequences = 1.0, 1.0, self._num_sequences
        for i in range(1, limit + 1):
            reach *= self._first_guess(i - 1)
            expected += reach
            taken = seconds(i)
            yield num_sequences * expected / taken if taken > 0 else expected, taken

    def _first_guess(self, i: int) -> float:
        """How likely the head's token at a place in its draft is right, once those before it are."""
        return self._first_guesses[i].share(self._of_head.first_guesses[i].share(0.6))

    def _guessed(self, i: int, is_right: bool) -> None:
        """Whether it was."""
        self._first_guesses[i].saw(is_right, SHORT_MEMORY)
        self._of_head.first_guesses[i].saw(is_right, 8 * MEMORY)

    def _must_probe(self, without: float, ceiling: float) -> bool:
        is_due = self._round >= self._head_at
        if not is_due and not self._is_promising:
            return False
        alone = self._rate_at_rest
        if is_due and ceiling <= HEAD_MARGIN * alone:
            if self._pause >= HOPELESS * self._last_pause:
                return True
            self._pause = min(2 * self._pause, HOPELESS * self._last_pause)
            self._head_at = self._round + self._pause
        return ceiling > HEAD_MARGIN * (alone if self._has_changed else without)

    def _best_of_head(self, limit: int) -> float:
        """Tokens per second, were all right that the head can draft."""
        until, former, ceiling = self._ceiling
        if self._round >= until or limit != former:
            steady = [self._steady(i + 1) for i in range(limit)]
            ceiling = max((self._num_sequences * (i + 2) / s if s > 0 else i + 2.0 for i, s in enumerate(steady)), default=0.0)
            self._ceiling = self._round + (CEILING_ROUNDS if self._experience.verify(1) else 0), limit, ceiling
        return ceiling

    # What came

    def came(
        self, tokens: Sequence[int], drafts: Sequence[Draft], plan: Plan, num_rows: int, seconds: float, num_sequences: int = 1
    ) -> None:
        """A round brought `tokens`; `drafts` had been made for it, and the best of them was verified in a batch of `num_rows` of so many
        sequences, in `seconds`; 0, if what that took says nothing."""
        self._round += 1
        self._of_head.num_unasked += 1
        if num_rows:
            self.rested(max(0, num_rows - len(plan.tokens) - 1), num_sequences - 1)  # of a plan that is no sense not all was verified
            self._experience.verify.saw(num_rows, seconds)
        if not seconds:
            self._num_steady = 0  # nor does what the round took
        if self._is_looking:
            saved = float(_num_looked_up(plan, tokens))
            if saved and self._resting:
                saved -= (self._seconds(len(plan.tokens), 0) - self._seconds(0, 0)) / self._resting
            self._found[self._run].saw(saved, 2 * MEMORY)
            self._look_at[self._run] = self._round + self._look_pause
        self._compare_all(tokens, drafts, plan)
        is_silent = self._is_asking and not any(draft.drafter == "draft-mtp" for draft in drafts)
        if self._is_asking:
            if is_silent:
                self._first_guesses[0].saw(False, SHORT_MEMORY)
            if self._is_trial:
                pass  # it has said when to ask again
            elif (self._is_probing or is_silent) and not self._is_promising:
                self._pause = max(self._pause, min(2 * self._pause, self._last_pause))
                self._of_head.pause = max(self._of_head.pause, min(LONGER * self._of_head.pause, self._last_pause))
            elif not self._is_probing:
                self._of_head.pause = max(self._of_head.pause / LONGER, FIRST_PAUSE)
            self._of_head.num_unasked, self._head_at = 0, self._round + self._pause
        is_idle = not self._is_promising and not self._is_trial and (self._is_probing or is_silent or not self._is_asking)
        self._wake_at = self._head_at if is_idle or not self._has_head else 0

    @property
    def _look_pause(self) -> int:
        """Rounds until the next question, when those of late have not been worth what they took."""
        e, resting = self._experience, self._resting
        cost = max(e.looking(1), e.verify(1) + self.overhead(1) - resting) + self._aftermath
        lost = cost - self._found[self._run].share(e.found[self._run].share(1.0)) * resting
        return round(min(LOOK_PAUSE, lost / (LOOKING_SHARE * resting))) if lost > 0 and resting else 0

    def marked(self, marks: Sequence[bool], limit: int) -> None:
        """Whether the head, which drafts `limit` tokens at most, would have been right about tokens that it had not been asked for. If that
        makes it worth asking, it is."""
        for is_right in marks:
            self._guessed(0, is_right)
        if marks and self._best_limit(HEAD_MARGIN * self._rate_at_rest, limit, self._steady)[0]:
            self._wake_at = self._round

    def ended(self) -> None:
        """The sequence has, or lost its memory."""
        for found, before in zip(self._found, self._experience.found, strict=True):
            if found.num_trials:
                before.saw(found.num_right / found.num_trials)
        for name, surprise in self._surprises.items():
            self._experience.trust.setdefault(name, Belief()).saw(surprise.factor(1.0))
        self._found, self._surprises = beliefs_by_run(), {}  # should it go on, in other memory, that is not counted twice

    def _compare_all(self, tokens: Sequence[int], drafts: Sequence[Draft], plan: Plan) -> None:
        if not drafts:
            self._num_misses = 0
            return
        likely = self._first_guess(0)
        for draft in drafts:
            self._compare(draft, tokens)
            if draft.drafter == "draft-mtp" and self._is_probing:
                self._is_promising = draft.tokens[:1] == tuple(tokens[:1]) and (self._has_changed or likely < 0.5)
                self._has_changed &= self._is_promising
        is_miss = bool(plan.tokens) and plan.tokens[:1] != tuple(tokens[:1])
        self._num_misses = self._num_misses + 1 if is_miss else 0
        by_chance = (1 - self._usual) ** NUM_MISSES
        if self._num_misses == NUM_MISSES and by_chance < CHANGE:
            self._pause, self._is_promising, self._has_changed = FIRST_PAUSE, True, True
            self._doubt(plan.parts[0].drafter, by_chance / (by_chance + CHANGE))
            self._head_at = min(self._head_at, self._round + FIRST_PAUSE) if self._has_head else math.inf
        if plan.tokens:
            self._hits.saw(not is_miss)
            self._has_changed &= is_miss
            self._usual = self._usual if is_miss else self._hits.share(0.5)
        if len(plan.parts) > 1 and tuple(tokens[: len(plan.parts[0].tokens)]) == plan.parts[0].tokens:
            self._compare(plan.parts[1], tokens[len(plan.parts[0].tokens) :], " tail")

    def _doubt(self, drafter: DrafterName, kept: float) -> None:
        """So much of what was known of a drafter is true still; the head may have become better than it was known to be."""
        for (name, _, _), belief in self._beliefs.items():
            if name == drafter:
                belief.num_right *= kept
        for belief in self._first_guesses:
            belief.num_right, belief.num_trials = belief.num_right * kept, belief.num_trials * kept

    def _compare(self, draft: Draft, tokens: Sequence[int], suffix: str = "") -> None:
        name = draft.drafter + suffix
        mine, all_beliefs = self._beliefs, self._experience.beliefs
        if (surprise := self._surprises.get(name)) is None:
            surprise = self._surprises[name] = Surprise()
        for i, (confidence, token, right) in enumerate(zip(_confidences(draft), draft.tokens, tokens, strict=False)):
            key, is_right = self._key(name, i, confidence), token == right
            surprise.saw(is_right, self._probability(key, confidence))
            if key not in mine:
                mine[key] = Belief()
                all_beliefs.setdefault(key, Belief())
            mine[key].saw(is_right)
            all_beliefs[key].saw(is_right, 8 * MEMORY)
            if draft.drafter == "draft-mtp":
                self._guessed(i, is_right)
            if not is_right:
                break


def _num_looked_up(plan: Plan, tokens: Sequence[int]) -> int:
    """How many of the tokens that came had been looked up, and verified."""
    left, found = list(tokens), 0
    for part in plan.parts:
        right = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(part.tokens, left, strict=False)))
        found += right if part.drafter != "draft-mtp" else 0
        left = left[len(part.tokens) :] if right == len(part.tokens) else []
    return found


def _confidences(draft: Draft) -> tuple[float, ...]:
    """Of a draft that may be anything."""
    missing = len(draft.tokens) - len(draft.confidences)
    return (*draft.confidences[: len(draft.tokens)], *(0.5,) * missing)
