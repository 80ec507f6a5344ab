"""Acceptance probabilities of draft tokens, estimated for one sequence: how often each drafter was right in this text, beginning from
what other texts showed."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from ..core.speculation import Draft, DrafterName, num_alike
from .experience import MEMORY, UNSURPRISED, UNTRIED, Belief, Experience, Surprise

#: How sure a drafter is, in classes.
CLASSES = (0.2, 0.4, 0.6, 0.75, 0.9, 0.97)
#: A drafter, the place in its draft, and how sure it was, in classes.
Key = tuple[str, int, int]


class Trust:
    """The acceptance statistics of one sequence, by drafter, place in the draft and the drafter's own confidence."""

    def __init__(self, experience: Experience) -> None:
        self._experience = experience
        self._beliefs: dict[Key, Belief] = {}
        self._surprises: dict[str, Surprise] = {}  # of each drafter, of late

    def probabilities(self, draft: Draft, room: int, suffix: str = "") -> list[float]:
        """For each of the first `room` draft tokens, the probability that it is accepted given that those before it were."""
        name, known = draft.drafter + suffix, dict[Key, float]()
        factor = self._surprises.get(name, UNSURPRISED).factor(self._experience.trust.get(name, UNTRIED).share(1.0))
        probabilities = list[float]()
        for key, confidence in _keys(name, draft, room):
            if (probability := known.get(key)) is None:
                probability = known[key] = factor * self._probability(key, confidence)
            probabilities.append(probability)
        return probabilities

    def _probability(self, key: Key, confidence: float) -> float:
        before = self._experience.beliefs.get(key, UNTRIED).share(confidence)
        return self._beliefs.get(key, UNTRIED).share(before)

    def compare(self, draft: Draft, tokens: Sequence[int], suffix: str = "") -> int:
        """Compares a draft with the `tokens` the target chose, updates the statistics, and returns how many draft tokens were right."""
        name = draft.drafter + suffix
        mine, all_beliefs = self._beliefs, self._experience.beliefs
        if (surprise := self._surprises.get(name)) is None:
            surprise = self._surprises[name] = Surprise()
        num_judged, num_right = min(len(draft.tokens), len(tokens)), num_alike(draft.tokens, tokens)
        keys, i = _keys(name, draft, min(num_right + 1, num_judged)), 0
        while i < len(keys):
            key, confidence = keys[i]
            is_right, start, i = i < num_right, i, i + 1
            while i < num_right and keys[i][0] == key:
                i += 1
            surprise.saw(is_right, self._probability(key, confidence), i - start)
            if key not in mine:
                mine[key] = Belief()
                all_beliefs.setdefault(key, Belief())
            mine[key].saw(is_right, number=i - start)
            all_beliefs[key].saw(is_right, 8 * MEMORY, i - start)
        return num_right

    def doubt(self, drafter: DrafterName, kept: float) -> None:
        """Keeps only the share `kept` of the accepted counts of `drafter`: the text has changed."""
        for (name, _, _), belief in self._beliefs.items():
            if name == drafter:
                belief.num_right *= kept

    def ended(self) -> None:
        """Hands what this sequence learned to `Experience`; called when it ends or loses its memory."""
        for name, surprise in self._surprises.items():
            self._experience.trust.setdefault(name, Belief()).saw(surprise.factor(1.0))
        self._surprises = {}  # should it go on, in other memory, that is not counted twice


def _keys(name: str, draft: Draft, number: int) -> list[tuple[Key, float]]:
    """(key under which acceptance is counted, the drafter's confidence) of the first `number` tokens of a draft."""
    number = min(number, len(draft.tokens))
    sure = draft.confidences[:number] + (0.5,) * (number - len(draft.confidences))  # of a draft that may be anything
    return [((name, i if i < 2 else 2, bisect_left(CLASSES, confidence)), confidence) for i, confidence in enumerate(sure)]
