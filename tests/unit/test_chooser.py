"""The chooser on made-up texts and machines: it finds the best length, hears whoever is right, gives up what does not pay, and
comes back."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from forerun.actors.chooser import LOOK_PAUSE, STRETCH, Chooser, Plan
from forerun.actors.costs import Costs
from forerun.actors.experience import Experience
from forerun.actors.pace import AFTER
from forerun.core.speculation import Draft, DrafterName

Right = Callable[[int, int], float]  # (round, position in the draft) -> probability


def test_costs_are_what_was_measured_and_straight_between_and_beyond() -> None:
    costs = Costs()
    assert costs(3) == 0
    for _ in range(50):
        costs.saw(1, 1.0)
        costs.saw(5, 3.0)
        costs.saw(9, 2.0)  # more rows never cost less
    assert [costs(size) for size in (1, 3, 5, 9, 13)] == pytest.approx([1.0, 1.75, 2.5, 2.5, 3.25], rel=0.02)
    costs.saw(1, 100.0)
    assert costs(1) < 1.3
    for _ in range(4):  # then the curve is drawn anew
        costs.saw(1, 100.0)  # an accident counts little
        costs.saw(1, 0.0)
        assert costs(1) < 1.7
    assert costs(1) > 1.0


def test_one_accident_is_not_believed_for_long() -> None:
    costs = Costs()
    for _ in range(40):
        costs.saw(1, 1.0)
        costs.saw(2, 1.3)
    costs.saw(4, 9.0)
    costs.saw(8, 3.0)
    assert costs(4) < 6.0


class Text:
    """A text of random tokens, drafters that are right with given probabilities, and a machine. `head_cost` is a drafted token's, `thought`
    that of a round in which anybody is asked, unless it goes on as the one before."""

    def __init__(self, seed: int, verify: Callable[[int], float], head_cost: float = 0.2, thought: float = 0.0) -> None:
        self.rng, self.experience = random.Random(seed), Experience()
        self.chooser = Chooser(self.experience)
        self.verify, self.head_cost, self.thought = verify, head_cost, thought
        self.num_tokens, self.seconds = 0, 0.0
        self.num_rounds = self.num_head_asked = self.num_thoughts = 0
        self.num_stretched = 0  # rounds that went on as the one before, in a row

    def _draft(self, name: DrafterName, right: Right, length: int, future: list[int], confidence: float) -> Draft:
        is_right = [self.rng.random() < right(self.num_rounds, i) for i in range(length)]
        tokens = tuple(future[i] if ok else -1 for i, ok in enumerate(is_right))
        return Draft(name, tokens, (confidence,) * length)

    def round(self, look_up: Right | None, head: Right | None, run: int = 0) -> Plan:
        future, chooser = [self.rng.randrange(1000) for _ in range(64)], self.chooser
        is_resting = chooser.rests(run if look_up is not None else None)
        wanted, drafts, plan, num_head = chooser.goes_on, list[Draft](), Plan((), 0.0), 0
        if wanted is not None:
            assert head is not None
            drafts, num_head = [self._draft("draft-mtp", head, wanted[0], future, 0.7)], wanted[0]
            plan = Plan(tuple(drafts), 0.0)
        elif not is_resting:
            self.num_thoughts += 1
            if look_up is not None and chooser.looks():
                drafts.append(self._draft("ngram-suffix", look_up, 16, future, 0.7))
            plan = chooser.best(drafts, 0, 40)
            if head is not None and (num_head := chooser.head_limit(plan, 3)[0]):
                drafts.append(self._draft("draft-mtp", head, num_head, future, 0.7))
                chooser.drafted(num_head, self.head_cost * num_head)
                plan = (chooser.whole(drafts[0]) if len(drafts) == 1 else None) or chooser.best(drafts, num_head, 40)
        self.num_head_asked += num_head > 0
        self.num_stretched = self.num_stretched + 1 if wanted is not None else 0
        num_right = next((i for i, token in enumerate(plan.tokens) if token != future[i]), len(plan.tokens))
        tokens, rows, work = tuple(future[: num_right + 1]), len(plan.tokens) + 1, self.head_cost * num_head
        work += self.verify(rows)
        if wanted is not None:
            chooser.went_on(drafts[0], tokens, is_typical=True)
        elif not is_resting:
            chooser.came(tokens, drafts, plan, rows, self.verify(rows))
        elif chooser.num_rests == AFTER:
            self.experience.verify.saw(rows, self.verify(rows))
        seconds = work + (self.thought if wanted is None and not is_resting else 0.0)
        chooser.took(seconds, work)
        self.num_tokens += num_right + 1
        self.seconds += seconds
        self.num_rounds += 1
        return plan


def steep(rows: int) -> float:
    return 1 + 0.5 * (rows - 1)


def flat(rows: int) -> float:
    return 1 + 0.05 * (rows - 1)


def never(_: int, __: int) -> float:
    return 0.0


@pytest.mark.parametrize("seed", range(5))
def test_a_drafter_that_is_always_wrong_costs_little(seed: int) -> None:
    text = Text(seed, steep)
    for _ in range(50):
        text.round(never, never)
    text.num_tokens, text.seconds = 0, 0.0
    for _ in range(400):
        text.round(never, never)
    assert text.num_tokens / text.seconds > 0.95  # tokens a second; 1 without any draft


@pytest.mark.parametrize("seed", range(5))
def test_what_is_mostly_right_is_used_and_as_long_as_pays(seed: int) -> None:
    def often(_: int, i: int) -> float:
        return 0.9

    cheap, dear = Text(seed, flat), Text(seed, steep)
    long = [len(cheap.round(often, None).tokens) for _ in range(200)][100:]
    short = [len(dear.round(often, None).tokens) for _ in range(200)][100:]
    assert sum(long) / len(long) > 2 * sum(short) / len(short)
    assert cheap.num_tokens / cheap.seconds > 3


@pytest.mark.parametrize("seed", range(3))
def test_a_repetition_does_not_put_a_head_to_rest_that_was_worth_it_before(seed: int) -> None:
    def always(_: int, __: int) -> float:
        return 1.0

    def often(_: int, __: int) -> float:
        return 0.7

    text, rests = Text(seed, flat, head_cost=0.1), list[bool]()
    for number in range(800):
        is_repeated = number % 40 >= 36
        text.round(always if is_repeated else None, often, run=100 if is_repeated else 0)
        if number >= 400 and number % 40 < 4:
            rests.append(text.chooser.num_rests > 0)
    assert sum(rests) < 0.1 * len(rests)


@pytest.mark.parametrize("seed", range(5))
def test_it_turns_round_within_20_rounds_when_the_text_does(seed: int) -> None:
    def first(number: int, _: int) -> float:
        return 0.95 if number < 60 else 0.02

    def then(number: int, _: int) -> float:
        return 0.02 if number < 60 else 0.95

    text = Text(seed, flat)
    plans = [text.round(first, then) for _ in range(140)]
    by = ["".join(part.drafter for part in plan.parts) for plan in plans]
    assert by[30:60].count("ngram-suffix") > 25
    assert by[80:].count("draft-mtp") > 50


@pytest.mark.parametrize("seed", range(5))
def test_a_head_that_is_not_worth_it_is_asked_more_and_more_seldom(seed: int) -> None:
    text = Text(seed, steep)
    for _ in range(60):
        text.round(None, never)
    asked = text.num_head_asked
    for _ in range(400):
        text.round(None, never)
    assert 1 <= text.num_head_asked - asked <= 20


def test_look_ups_that_find_nothing_are_asked_seldom_and_at_once_when_they_do() -> None:
    experience = Experience()
    chooser = Chooser(experience, has_head=False)
    num_asked = 0
    for _ in range(300):
        if not chooser.rests():
            assert chooser.looks()
            chooser.looked(0.2)
            num_asked += 1
            chooser.came([1], [], Plan((), 0.0), 1, 1.0)
    assert 300 / (LOOK_PAUSE + 1) <= num_asked < 50
    while chooser.rests():
        pass
    draft = Draft("ngram-suffix", (1, 2, 3, 4), (0.9,) * 4)
    chooser.came((1, 2, 3, 4, 5), [draft], Plan((draft,), 0.0), 5, 1.2)
    assert chooser.rests(run=None)  # where the newest two tokens have not stood before
    assert not chooser.rests()


def test_a_new_sequence_begins_with_what_the_others_were_like() -> None:
    """Each counts once, however many tokens it had."""
    experience = Experience()
    for rows in range(1, 18):
        experience.verify.saw(rows, steep(rows))
    draft = Draft("ngram-suffix", (1,) * 16, (0.9,) * 16)
    before = len(Chooser(experience).best([draft], 0, 16).tokens)
    for _ in range(6):
        chooser = Chooser(experience)
        for _ in range(3):
            chooser.came([2], [draft], Plan((draft,), 0.0), 17, 9.0)
        chooser.ended()
    assert len(Chooser(experience).best([draft], 0, 16).tokens) < before


def test_a_head_that_says_nothing_is_not_asked_for_ever() -> None:
    chooser, num_asked = Chooser(Experience()), 0
    for _ in range(400):
        if chooser.rests(run=None):
            continue
        limit, _ = chooser.head_limit(chooser.best([], 0, 40), 3)
        if limit:
            num_asked += 1
            chooser.pace.drafting.saw(1, 0.05)
        chooser.came([1], [], Plan((), 0.0), 1, 1.0)
    assert num_asked < 60


def test_others_rows_make_short_drafts() -> None:
    """In a batch of many rows that costs what it has rows, one more row must earn more."""

    def often(_: int, i: int) -> float:
        return 0.8

    alone, among = Text(1, flat), Text(1, flat)
    for _ in range(30):
        alone.round(often, None)
        among.chooser.came([1], [], Plan((), 0.0), 30, 30.0)
    for rows in range(20, 60):
        among.experience.verify.saw(rows, float(rows))
    assert len(among.round(often, None).tokens) < len(alone.round(often, None).tokens)


def test_a_plan_that_was_not_verified_whole_is_no_harm() -> None:
    chooser = Chooser(Experience())
    plan = Plan((Draft("ngram-suffix", (-1,) * 40),), 0.0)
    for _ in range(10):
        chooser.came([1], [], plan, 1, 1.0)
    assert chooser.best([], 0, 10).rate > 0


def test_a_tail_lengthens_what_is_likely() -> None:
    text = Text(2, flat)
    head = Draft("draft-mtp", (1, 2, 3), (0.95, 0.95, 0.95))
    tail = Draft("ngram-suffix", (4, 5, 6), (0.9, 0.9, 0.9))
    for rows in range(1, 9):
        text.experience.verify.saw(rows, flat(rows))
    plan = text.chooser.best([head], 3, 10)
    assert plan.reach > 0.5
    assert text.chooser.extended(plan, [tail], 3, 10).tokens == (1, 2, 3, 4, 5, 6)
    assert text.chooser.extended(plan, [tail], 3, 4).tokens == (1, 2, 3, 4)
    for _ in range(20):
        text.chooser.came((1, 2, 3, 9), [head], Plan((head, tail), 1.0), 7, flat(7))
    assert text.chooser.extended(plan, [tail], 3, 10).tokens == (1, 2, 3)


def test_a_head_that_says_it_would_have_been_right_is_asked() -> None:
    text = Text(3, flat)
    for _ in range(200):
        text.round(None, never)
    chooser = text.chooser
    while not chooser.rests(run=None):
        text.round(None, never)
    chooser.marked((False,) * 8, 3)
    assert chooser.rests(run=None)
    chooser.marked((True,) * 8, 3)
    assert not chooser.rests(run=None)
    assert chooser.head_limit(chooser.best([], 0, 40), 3)[0] > 0


def test_what_waking_a_head_takes_is_not_what_drafting_does() -> None:
    chooser = Chooser(Experience())
    for round_number in range(12):
        is_asked = round_number not in (4, 5, 9)
        if is_asked:
            chooser.drafted(1, 9.0 if round_number in (0, 6, 10) else 1.0)
        chooser.came([1], [], Plan((), 0.0), 1, 1.0)
    assert chooser.pace.drafting(1) == pytest.approx(1.0, rel=0.1)


def test_an_accident_of_a_heads_is_not_believed_for_good() -> None:
    chooser = Chooser(Experience())
    for round_number in range(60):
        if round_number in (0, 1) or round_number % 10 == 5:
            chooser.drafted(1, 900.0 if round_number == 1 else 1.0)
        chooser.came([1], [], Plan((), 0.0), 1, 1.0)
    assert chooser.pace.drafting(1) < 600  # 900 at first; every question since has been one after a rest
    before = chooser.pace.drafting(1)
    for _ in range(60):
        chooser.came([1], [], Plan((), 0.0), 1, 1.0)
        chooser.came([1], [], Plan((), 0.0), 1, 1.0)
        chooser.drafted(1, 1.0)
    assert chooser.pace.drafting(1) < before / 20


def test_those_who_look_up_are_asked_after_long_runs_where_short_ones_are_not_worth_it() -> None:
    experience = Experience()
    experience.verify.saw(1, 1.0)
    chooser, draft = Chooser(experience, has_head=False), Draft("ngram-suffix", (1, 2, 3, 4), (0.9,) * 4)
    asked = {0: 0, 9: 0}
    for i in range(400):
        run = 9 if i % 4 == 0 else 0
        if chooser.rests(run):
            chooser.took(1.0, 0.0)
            continue
        asked[run] += 1
        tokens, plan = ((1, 2, 3, 4, 5), Plan((draft,), 0.0)) if run else ((9,), Plan((), 0.0))
        chooser.looked(0.2)
        chooser.came(tokens, [draft], plan, len(plan.tokens) + 1, 1.2 if run else 1.0)
        chooser.took(2.2 if run else 2.0, 1.2 if run else 1.0)
    assert asked[9] == 100
    assert asked[0] < 30


def test_what_the_head_takes_is_shared_by_those_in_a_batch() -> None:
    """All wait for it once: it is worth it in company as it is alone, unless each row more costs what it does alone."""

    def limit(num_sequences: int, slope: float) -> int:
        experience = Experience()
        chooser = Chooser(experience, has_look_ups=False)
        for _ in range(40):
            for rows in (num_sequences, 2 * num_sequences, 4 * num_sequences):
                experience.verify.saw(rows, 1 + slope * rows)
            chooser.pace.was_beside(num_sequences - 1, num_sequences - 1)
            chooser.pace.drafting.saw(3, 0.6)
            chooser.pace.drafting.saw(1, 0.2)
            chooser.took(1.01 + slope * num_sequences, 1 + slope * num_sequences)
        return chooser.head_limit(chooser.best([], 0, 40), 3)[0]

    assert limit(1, 0.01) == limit(16, 0.001) == 2
    assert limit(16, 2.0) == 0


def test_a_new_sequence_knows_what_company_there_is() -> None:
    experience = Experience()
    for _ in range(20):
        Chooser(experience).pace.was_beside(15, 15)
    costs = Chooser(experience).pace.overhead
    assert costs is experience.times[True, False].overhead


@pytest.mark.parametrize("seed", range(3))
def test_a_head_that_is_worth_it_is_asked_without_a_thought_until_it_is_not(seed: int) -> None:
    def until(last: int) -> Right:
        return lambda number, _: 0.9 if number < last else 0.0

    text = Text(seed, flat, thought=0.5)
    for _ in range(200):
        text.round(None, until(200))
    num_asked = text.num_head_asked
    assert num_asked > 150
    assert text.num_thoughts < 25
    for _ in range(200):
        text.round(None, until(200))
    assert text.num_head_asked - num_asked < 80  # the rest of a stretch, and trials


def test_a_stretch_ends_where_its_tokens_are_too_few() -> None:
    text = Text(0, flat)
    for _ in range(30):
        text.round(None, lambda _, __: 0.95)
    while text.num_stretched == 0:
        text.round(None, lambda _, __: 0.95)
    lengths = list[int]()
    for _ in range(2 * STRETCH):
        text.round(None, never)
        lengths.append(text.num_stretched)
    assert 0 in lengths


@pytest.mark.parametrize("thought", [0.0, 0.4])
def test_rest_is_measured_before_a_head_is_held_to_be_better(thought: float) -> None:
    """Where what it takes to think is no small part of a round: rest is none of those rounds that were thought about."""
    text = Text(1, flat, thought=thought)
    for _ in range(120):
        text.round(None, lambda _, __: 0.9)
    assert (text.experience.times[False, False].resting(1) > 0) == (thought > 0)
    assert text.num_head_asked > 80


@pytest.mark.parametrize("seed", range(5))
def test_what_a_head_gains_in_one_text_and_not_in_another_is_found_out_in_each(seed: int) -> None:
    """A head that is just worth it here and just not there, on a machine that takes its time to think."""
    gained, text = {0.8: 0.0, 0.45: 0.0}, Text(seed, lambda rows: 1 + 0.15 * (rows - 1), head_cost=0.3, thought=0.4)
    for number in range(40):
        share = 0.8 if number % 2 else 0.45
        text.chooser, text.num_tokens, text.seconds = Chooser(text.experience), 0, 0.0
        for _ in range(100):
            text.round(None, lambda _, __, share=share: share)
        text.chooser.ended()
        gained[share] += (text.num_tokens / text.seconds - 1) / 20 if number >= 10 else 0.0
    assert gained[0.8] > 0.06
    assert gained[0.45] > -0.06


def test_a_draft_may_say_more_or_less_of_how_sure_it_is_than_it_has_tokens() -> None:
    text = Text(4, flat)
    for rows in range(1, 9):
        text.experience.verify.saw(rows, flat(rows))
    for confidences in ((), (0.9,), (0.9,) * 5):
        draft = Draft("ngram-mod", (5, 6), confidences)
        assert text.chooser.best([draft], 0, 40).tokens == (5, 6)
        text.chooser.came((5, 7), [draft], Plan((draft,), 0.0), 3, 1.1)


def test_a_whole_stretch_is_no_rest() -> None:
    text = Text(5, flat)
    for _ in range(200):
        text.round(None, lambda _, __: 1.0)
    times = text.experience.times[False, False]
    assert times.after(1) in (0, 1)  # seconds of a round of rest, if there was one
    assert times.resting(1) in (0, 1)


def test_without_a_head_two_surprises_do_not_keep_it_awake() -> None:
    experience, found, num_rests = Experience(), Draft("ngram-suffix", (1, 2), (0.9, 0.9)), 0
    chooser = Chooser(experience, has_head=False)
    for i in range(400):
        if chooser.rests():
            num_rests += 1
        elif i < 20:
            chooser.came((1, 2, 3), [found], Plan((found,), 0.0), 3, 1.1)
        else:
            chooser.looked(0.2)
            chooser.came((9,), [found], Plan((found,), 0.0), 3, 1.1)
        chooser.took(1.2, 1.1)
    assert num_rests > 100


@pytest.mark.parametrize("seed", range(4))
def test_a_head_is_asked_now_and_then_while_look_ups_are_asked_every_round(seed: int) -> None:
    text, num_asked = Text(seed, flat), 0
    for _ in range(1500):
        text.round(lambda _, __: 0.7, lambda number, _: 0.97 if number > 500 else 0.0)
        num_asked = text.num_head_asked if text.num_rounds == 500 else num_asked
    assert text.num_head_asked > num_asked + 5


def test_marks_are_asked_for_more_seldom_while_they_are_all_wrong() -> None:
    chooser = Chooser(Experience())

    def num_marked(is_right: bool) -> int:
        number = 0
        for _ in range(40):
            if chooser.wants_marks():
                chooser.marked((is_right,) * 6, 3)
                number += 1
        return number

    assert num_marked(is_right=False) < 10
    assert num_marked(is_right=True) > 30
