"""Which draft is worth verifying, and how much of it: by expected tokens per second.

    rate(K) = E(K) / (V(K + 1) + seconds of drafting + overhead),    E(K) = 1 + sum over i <= K of a_1 ... a_i

V is what verifies of so many rows have taken lately, a_i how often the drafter was right lately where it was as sure as
now. All drafters are compared with what came, also those whose drafts were not verified: who was not listened to can
still convince. Length 0 is a draft like any other, so speculation that does not pay turns itself off; the head, whose
drafts cost something, is then asked now and then for one token, more seldom the longer that is for nothing.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from ..core.speculation import Draft

#: Of a new measurement; old ones fade.
NEWEST_SHARE = 0.1
#: A measurement more than so many times the mean is an accident of the machine, and counts as that much.
OUTLIER = 2.0
#: Measurements of other sizes after which one is forgotten: what was once slow must be tried again.
FORGOTTEN_AFTER = 300
#: Rounds without a draft of which one is measured: most are alike.
MEASURED_EVERY = 4
#: The share by which a mean moves before the curve is drawn anew.
NOTABLE = 0.02
#: How much cheaper than its only measurement a size may be.
HOPE = 0.3
#: What one row more costs, in verifies of one row, before two sizes have been measured. Low, so that drafts are tried.
HOPED_SLOPE = 0.25
#: By how much the head must promise more than what is there already, before it is asked.
HEAD_MARGIN = 1.05
#: Trials that a belief remembers, one about the head's guesses in a row, and what a word of the drafter's own weighs against them.
MEMORY, SHORT_MEMORY, WORD = 12.0, 6.0, 1.5
#: How sure a drafter is, in classes.
CLASSES = (0.2, 0.4, 0.6, 0.75, 0.9, 0.97)
#: Rounds between two questions to a head that is not worth it: at first, and at last, unless asking would then take more than a share of
#: the time. After a right answer it is asked again at once, if being right would make it worth it.
FIRST_PAUSE, LAST_PAUSE, ASKING_SHARE = 4, 16, 0.01
#: Questions in a row, to those who look up, that the answers of late were not worth, after which one more round goes by without a question;
#: at most so many rounds, and no more than keep questions below a share of the time.
USELESS_ANSWERS, LOOK_PAUSE, LOOKING_SHARE = 8, 8, 0.02
#: Drafts in a row that were wrong from the start where most were right: the text has changed its nature, and whoever was not worth it
#: may be.
NUM_MISSES = 2
#: Tokens that another sequence in the batch gains by each of its rows, about.
OTHERS_GAIN = 0.7


class Costs:
    """Seconds by size, as measured; between sizes and beyond by straight lines, and never less for more. A size that was measured a few
    times only is taken for somewhat cheaper than it seemed, so that an accident is not believed for long."""

    def __init__(self) -> None:
        self._means: dict[int, tuple[float, int, int]] = {}  # size -> mean, measurements, the clock at the last
        self._clock = 0
        self._curve: tuple[list[int], list[float]] = [], []
        self._drawn: dict[int, float] = {}  # the means it was made of
        self._table: list[float] = []  # what `__call__` has said of sizes 0, 1, ... since the curve was drawn

    def saw(self, size: int, seconds: float) -> None:
        if seconds <= 0:
            return
        self._clock += 1
        mean, number, _ = self._means.get(size, (seconds, 0, 0))
        mean += (min(seconds, OUTLIER * mean) - mean) * max(1 / (number + 1), NEWEST_SHARE)
        self._means[size] = mean, number + 1, self._clock
        if self._clock % FORGOTTEN_AFTER == 0:
            self._means = {size: each for size, each in self._means.items() if self._clock - each[2] < FORGOTTEN_AFTER}
            self._table.clear()
        drawn = self._drawn.get(size, 0.0)
        if abs(mean - drawn) > NOTABLE * drawn or number < 1 / NOTABLE:
            self._table.clear()

    def _draw(self) -> None:
        """Makes the curve of what was measured."""
        sizes = sorted(self._means)
        self._drawn = {size: mean for size, (mean, _, _) in self._means.items()}
        # Where more seemed to cost less, neighbours are averaged (pool adjacent violators).
        pools: list[tuple[float, int, int]] = []  # mean, measurements, sizes
        for each in sizes:
            mean, number, _ = self._means[each]
            pools.append((mean * (1 - HOPE / number), number, 1))
            while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
                (one, n, k), (other, m, j) = pools[-2:]
                pools[-2:] = [((one * n + other * m) / (n + m), n + m, k + j)]
        self._curve = sizes, [mean for mean, _, count in pools for _ in range(count)]

    @property
    def reach(self) -> int:
        """The largest size that may be tried: twice the largest that was, so that the curve is measured from its beginning."""
        return 2 * max(self._means, default=0) or 1

    def __call__(self, size: int) -> float:
        """0 before anything was measured."""
        if not self._table:
            self._draw()
        while len(self._table) <= size:
            self._table.append(self._estimate(len(self._table)))
        return self._table[size]

    def _estimate(self, size: int) -> float:
        sizes, seconds = self._curve
        if not sizes:
            return 0.0
        at = bisect_left(sizes, size)
        if at < len(sizes) and sizes[at] == size:
            return seconds[at]
        if at == 0:
            return seconds[0] * (1 + HOPED_SLOPE * (size - 1)) / (1 + HOPED_SLOPE * (sizes[0] - 1))
        if at < len(sizes):
            share = (size - sizes[at - 1]) / (sizes[at] - sizes[at - 1])
            return seconds[at - 1] + share * (seconds[at] - seconds[at - 1])
        slope = HOPED_SLOPE * seconds[-1] / (1 + HOPED_SLOPE * (sizes[-1] - 1))
        if len(sizes) > 1:
            slope = (seconds[-1] - seconds[-2]) / (sizes[-1] - sizes[-2])
        return seconds[-1] + slope * (size - sizes[-1])


@dataclass(slots=True)
class _Belief:
    num_right: float = 0.0
    num_trials: float = 0.0

    def saw(self, is_right: float, memory: float = MEMORY) -> None:
        fading = 1 - 1 / memory
        self.num_right, self.num_trials = self.num_right * fading + is_right, self.num_trials * fading + 1

    def share(self, before: float) -> float:
        return (self.num_right + WORD * before) / (self.num_trials + WORD)


NEVER = _Belief()


class Experience:
    """What all sequences of an engine have seen: what verifying and looking up take, and drafting and the rest of a round, alone and in
    company, where one waits for others; and how often drafters were right."""

    def __init__(self) -> None:
        self.verify, self.looking = Costs(), Costs()
        self.drafting, self.overhead = (Costs(), Costs()), (Costs(), Costs())
        self.beliefs: dict[tuple[str, int, int], _Belief] = {}
        self.first_guesses = [_Belief() for _ in range(64)]


@dataclass(frozen=True, slots=True)
class Plan:
    """What to verify: a draft, and perhaps another drafter's that goes on where it ends. `rate` is in tokens per second."""

    parts: tuple[Draft, ...]
    rate: float

    @property
    def tokens(self) -> tuple[int, ...]:
        return tuple(token for part in self.parts for token in part.tokens)


class Chooser:
    """For one sequence. The order of a round: `best` of what was looked up, `head_limit`, `best` again, and `came`."""

    def __init__(self, experience: Experience) -> None:
        self._experience = experience
        self._beliefs: dict[tuple[str, int, int], _Belief] = {}
        self._first_guesses = [_Belief() for _ in range(64)]  # of the head, by position, however sure it was
        self._num_other_rows, self._num_rounds = 0.0, 0
        self._pause, self._num_unasked = FIRST_PAUSE, 0
        self._is_probing = self._is_promising = False  # of the head
        self._is_resting = False
        self._num_misses, self._hits, self._has_changed = 0, _Belief(), False  # of what was verified; lately missed, where most was hit
        self._num_useless, self._num_unlooked, self._is_looking = 0, 0, False
        self._found = _Belief()  # tokens that were right of what was looked up and verified, for each question

    # What is expected

    def _seconds(self, num_drafts: int, num_head: int) -> float:
        """Of a round that verifies so many drafts, of which the head made so many."""
        verify = self._experience.verify(round(self._num_other_rows) + num_drafts + 1)
        return verify + (self.drafting(num_head) if num_head else 0.0) + self.overhead(1)

    @property
    def drafting(self) -> Costs:
        """Of so many tokens of the head, in such company as there is."""
        return self._experience.drafting[self._num_other_rows >= 0.5]

    @property
    def overhead(self) -> Costs:
        """Of a round, besides drafting and verifying."""
        return self._experience.overhead[self._num_other_rows >= 0.5]

    @property
    def _last_pause(self) -> int:
        e = self._experience
        return max(LAST_PAUSE, round(self.drafting(1) / (ASKING_SHARE * max(e.verify(1), 1e-9))))

    def _rate(self, expected: float, seconds: float) -> float:
        return (expected + OTHERS_GAIN * self._num_other_rows) / seconds if seconds > 0 else expected

    @staticmethod
    def _key(name: str, i: int, confidence: float) -> tuple[str, int, int]:
        return name, min(i, 2), bisect_left(CLASSES, confidence)

    def _probabilities(self, draft: Draft, suffix: str = "") -> list[float]:
        """How likely each token is right once those before it are."""
        found, known, name = list[float](), dict[tuple[int, float], float](), draft.drafter + suffix
        for i, confidence in enumerate(_confidences(draft)):
            place = min(i, 2), confidence
            if place not in known:
                key = self._key(name, i, confidence)
                before = self._experience.beliefs.get(key, NEVER).share(confidence)
                known[place] = self._beliefs.get(key, NEVER).share(before)
            found.append(known[place])
        return found

    def best(self, drafts: Sequence[Draft], num_head: int, room: int) -> Plan:
        """The best beginning of the best draft, of `room` tokens at most, or none. The head has drafted `num_head` tokens already."""
        plan = Plan((), self._rate(1.0, self._seconds(0, num_head)))
        for draft in drafts:
            plan = max(plan, self._cut((draft,), self._probabilities(draft), num_head, room), key=lambda each: each.rate)
        return plan

    def extended(self, plan: Plan, tails: Sequence[Draft], num_head: int, room: int) -> Plan:
        """`plan`, or better, with one of the drafts that go on where it ends."""
        start = self._probabilities(plan.parts[0])
        for tail in tails:
            longer = self._cut((plan.parts[0], tail), start + self._probabilities(tail, " tail"), num_head, room)
            plan = max(plan, longer, key=lambda each: each.rate)
        return plan

    def _cut(self, parts: tuple[Draft, ...], probabilities: list[float], num_head: int, room: int) -> Plan:
        e, others = self._experience, round(self._num_other_rows)
        fixed, gain = self._seconds(0, num_head) - e.verify(others + 1), OTHERS_GAIN * self._num_other_rows
        expected, reach, best, length = 1.0, 1.0, 0.0, 0
        for i, probability in enumerate(probabilities[: max(0, min(room, e.verify.reach - 1 - others))], 1):
            reach *= probability
            expected += reach
            seconds = fixed + e.verify(others + i + 1)
            rate = (expected + gain) / seconds if seconds > 0 else expected
            if rate > best:
                best, length = rate, i
            elif rate < 0.7 * best or reach < 0.01:
                break
        first = parts[0].cut(length)
        rest = parts[1].cut(length - len(parts[0].tokens)) if length > len(parts[0].tokens) else None
        return Plan((first, rest) if rest is not None else (first,), best)

    def is_likely(self, plan: Plan) -> bool:
        """Whether all of a plan of one draft is more likely right than not."""
        reach = 1.0
        for probability in self._probabilities(plan.parts[0]):
            reach *= probability
        return reach > 0.5

    def looks(self) -> bool:
        """Whether to ask those who look up this round."""
        e = self._experience
        pause = min(self._num_useless // USELESS_ANSWERS, LOOK_PAUSE, round(e.looking(1) / (LOOKING_SHARE * max(e.verify(1), 1e-9))))
        self._num_unlooked = self._num_unlooked + 1 if self._num_unlooked < pause else 0
        self._is_looking = self._num_unlooked == 0
        return self._is_looking

    def looked(self, seconds: float) -> None:
        """They took so long to answer."""
        self._experience.looking.saw(1, seconds)

    def rests(self) -> bool:
        """Whether, with nothing looked up, the head need not be thought of this round: it was not worth it, and nothing has been heard
        of it since."""
        if not self._is_resting or self._is_promising or self._num_unasked + 1 >= self._pause:
            return False
        self._num_unasked += 1
        return True

    def head_limit(self, plan: Plan, limit: int) -> tuple[int, float]:
        """How many tokens the head should be asked for, when without it `plan` is the best, and the likelihood below which another is not
        worth it. One token, now and then, to see whether it has become worth it."""
        self._num_unasked += 1
        best, wanted, expected, reach, floor, may_pay = HEAD_MARGIN * plan.rate, 0, 1.0, 1.0, 0.0, False
        alone = self._rate(1.0, self._seconds(0, 0))
        for i in range(limit):
            reach *= self._first_guesses[i].share(self._experience.first_guesses[i].share(0.6))
            expected += reach
            seconds = self._seconds(i + 1, i + 1)
            may_pay |= self._rate(i + 2.0, seconds) > HEAD_MARGIN * (alone if self._has_changed else plan.rate)
            rate = self._rate(expected, seconds)
            if rate > best:
                best, wanted = rate, i + 1
        self._is_resting = not wanted and not plan.parts
        is_due = self._num_unasked >= self._pause or (self._is_promising and may_pay)
        self._is_probing, self._is_promising = not wanted and limit > 0 and is_due, False
        if wanted:
            floor = best * (self._seconds(wanted, wanted) - self._seconds(wanted - 1, wanted - 1))
        if wanted or self._is_probing:
            self._num_unasked = 0
        return wanted or int(self._is_probing), min(floor, 0.5)

    # What came

    def came(self, tokens: Sequence[int], drafts: Sequence[Draft], plan: Plan, num_rows: int, seconds: float) -> None:
        """A round brought `tokens`; `drafts` had been made for it, and the best of them was verified in a batch of `num_rows`."""
        self._num_rounds += 1
        if num_rows and (plan.parts or self._num_rounds % MEASURED_EVERY == 1):
            # Of a plan that is no sense not all was verified.
            self._num_other_rows += 0.3 * (max(0, num_rows - len(plan.tokens) - 1) - self._num_other_rows)
            self._experience.verify.saw(num_rows, seconds)
        if self._is_looking:
            self._found.saw(_num_looked_up(plan, tokens))
            is_worth_it = self._found.share(1.0) * self._experience.verify(1) > self._experience.looking(1)
            self._num_useless = 0 if is_worth_it else self._num_useless + 1
        if not drafts:
            self._num_misses = 0
            return
        for draft in drafts:
            self._compare(draft, tokens)
            if draft.drafter == "draft-mtp" and self._is_probing:
                self._is_promising = draft.tokens[:1] == tuple(tokens[:1])
                self._has_changed &= self._is_promising
                if not self._is_promising:
                    self._pause = min(2 * self._pause, self._last_pause)
        is_miss = bool(plan.tokens) and plan.tokens[:1] != tuple(tokens[:1])
        self._num_misses = self._num_misses + 1 if is_miss else 0
        if self._num_misses == NUM_MISSES and self._hits.share(0.5) > 0.5:
            self._pause, self._is_promising, self._has_changed = FIRST_PAUSE, True, True
        if plan.tokens:
            self._hits.saw(not is_miss)
            self._has_changed &= is_miss
        if len(plan.parts) > 1 and tuple(tokens[: len(plan.parts[0].tokens)]) == plan.parts[0].tokens:
            self._compare(plan.parts[1], tokens[len(plan.parts[0].tokens) :], " tail")

    def _compare(self, draft: Draft, tokens: Sequence[int], suffix: str = "") -> None:
        for i, (confidence, token, right) in enumerate(zip(_confidences(draft), draft.tokens, tokens, strict=False)):
            key = self._key(draft.drafter + suffix, i, confidence)
            self._beliefs.setdefault(key, _Belief()).saw(token == right)
            self._experience.beliefs.setdefault(key, _Belief()).saw(token == right, 8 * MEMORY)
            if draft.drafter == "draft-mtp":
                self._first_guesses[i].saw(token == right, SHORT_MEMORY)
                self._experience.first_guesses[i].saw(token == right, 8 * MEMORY)
            if token != right:
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
