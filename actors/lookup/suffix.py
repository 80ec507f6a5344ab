"""ngram-suffix: the longest suffix of a text that stood in it before, however long, and what followed it how often.

A suffix automaton (Blumer et al. 1985) grows by a token in amortised constant time, and its state after the text names the
longest suffix with an earlier occurrence. Each state counts what followed it. A draft walks the states: the likeliest
continuation of the longest match, then of what is the longest match by then.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...core.speculation import SUFFIX_MIN_MATCH
from .base import NOTHING, Lookup, Proposal

#: States whose counts a new token is added to, those of the longest suffixes: in a text of one repeated token there are as many as
#: tokens, in others a handful.
MAX_DEPTH = 32
#: Tokens of all shared automata, beyond which the longest unused is forgotten.
MAX_SHARED = 500_000
#: Stands between two sequences in a shared automaton, and is never drafted.
SEPARATOR = -1


class Automaton:
    """Of all that was `add`ed. State 0 is empty; `length` is that of a state's longest string, `link` its longest proper suffix that is
    another state, `counts` says how often which token followed, newest last."""

    def __init__(self) -> None:
        self.length, self.link = [0], [-1]
        self.next: list[dict[int, int]] = [{}]
        self.counts: list[dict[int, int]] = [{}]
        self.last = 0

    @property
    def num_tokens(self) -> int:
        """That were added."""
        return self.length[self.last]

    def add(self, token: int) -> None:
        length, link, following, counts = self.length, self.link, self.next, self.counts
        # What the text's suffixes were followed by, before the text grows.
        state, depth = self.last, 0
        while state > 0 and depth < MAX_DEPTH:
            counts[state][token] = counts[state].pop(token, 0) + 1
            state, depth = link[state], depth + 1
        new = len(length)
        length.append(length[self.last] + 1)
        link.append(0)
        following.append({})
        counts.append({})
        state = self.last
        while state >= 0 and token not in following[state]:
            following[state][token] = new
            state = link[state]
        if state >= 0:
            target = following[state][token]
            if length[state] + 1 == length[target]:
                link[new] = target
            else:
                clone = len(length)
                length.append(length[state] + 1)
                link.append(link[target])
                following.append(dict(following[target]))
                counts.append(dict(counts[target]))  # where the shorter string stood so far, the longer one did
                while state >= 0 and following[state].get(token) == target:
                    following[state][token] = clone
                    state = link[state]
                link[target] = link[new] = clone
        self.last = new

    def follow(self, state: int, matched: int, token: int) -> tuple[int, int]:
        """The longest match after one more token, and how long it is."""
        while state > 0 and token not in self.next[state]:
            state = self.link[state]
            matched = self.length[state]
        target = self.next[state].get(token)
        return (target, matched + 1) if target is not None else (0, 0)

    def followed(self, state: int, matched: int) -> tuple[int, int]:
        """The longest suffix of a match that something followed: the text's own end is followed by nothing yet."""
        while state > 0 and not self.counts[state]:
            state = self.link[state]
            matched = self.length[state]
        return state, matched

    def likeliest(self, state: int) -> tuple[int, float]:
        """The token that followed a state most often, the newest of equals, and its share; (-1, 0) when nothing did."""
        best, most, total = -1, 0, 0
        for token, count in self.counts[state].items():
            total += count
            if count >= most:
                best, most = token, count
        return best, most / (total + 1) if total else 0.0


class Suffix(Lookup):
    def __init__(self, shared: Automaton | None = None) -> None:
        super().__init__()
        self._own, self._shared = Automaton(), shared
        self._in_shared = (0, 0)  # state and length of the match there

    def extend(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            self.tokens.append(token)
            self._own.add(token)
            if self._shared is not None:
                self._in_shared = self._shared.follow(*self._in_shared, token)

    def propose(self, ahead: tuple[int, ...], limit: int) -> Proposal:
        own = self._own
        start = own.link[own.last] if own.last else 0
        matches = [(own, start, own.length[start])]
        if self._shared is not None:
            matches.append((self._shared, self._in_shared[0], self._in_shared[1]))
        best, state, matched = own, 0, 0
        for automaton, at, length in matches:
            for token in ahead:
                at, length = automaton.follow(at, length, token)
            at, length = automaton.followed(at, length)
            if length > matched:
                best, state, matched = automaton, at, length
        found, sure = list[int](), list[float]()
        while matched >= SUFFIX_MIN_MATCH and len(found) < limit:
            token, share = best.likeliest(state)
            if token < 0:
                break
            found.append(token)
            sure.append(share * matched / (matched + 2))
            state, matched = best.followed(*best.follow(state, matched, token))
        return (tuple(found), tuple(sure)) if found else NOTHING
