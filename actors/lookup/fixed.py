"""Look-ups of n-grams of one fixed size: ngram-simple, ngram-map-k and ngram-map-k4v of llama.cpp (docs/speculative.md), whose
defaults are kept and whose faults are not: a key whose drafts fail recovers, and `min_hits` counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from .base import NOTHING, Lookup, Proposal

#: How sure a look-up of a fixed size says it is; what came decides what that is worth.
CONFIDENCE = 0.7
#: Continuations that ngram-map-k4v keeps of one n-gram.
NUM_CONTINUATIONS = 4


def copied(tokens: list[int], start: int, ahead: tuple[int, ...], limit: int) -> Proposal:
    """What followed `start`; where the history ends, `ahead` follows."""
    found = (*tokens[start : start + limit], *ahead)[:limit]
    return found, (CONFIDENCE,) * len(found)


class Simple(Lookup):
    """What followed the newest earlier occurrence of the last `size_n` tokens; nothing if fewer than `size_n` followed."""

    def __init__(self, size_n: int) -> None:
        super().__init__()
        self._size_n = size_n
        self._ends: dict[int, int] = {}  # hash of an n-gram -> where its newest occurrence ends

    def extend(self, tokens: Sequence[int]) -> None:
        size = self._size_n
        for token in tokens:
            self.tokens.append(token)
            if len(self.tokens) >= size:
                self._ends[hash(tuple(self.tokens[-size:]))] = len(self.tokens)

    def propose(self, ahead: tuple[int, ...], limit: int) -> Proposal:
        key = self.newest(self._size_n, ahead)
        end = self._ends.get(hash(key)) if len(key) == self._size_n else None
        if end is None or tuple(self.tokens[end - self._size_n : end]) != key:
            return NOTHING
        if len(self.tokens) + len(ahead) - end < self._size_n:
            return NOTHING
        return copied(self.tokens, end, ahead, limit)


@dataclass(slots=True)
class _Key:
    end: int  # of the newest occurrence
    num_hits: int = 0
    reach: int = 1_000_000  # how long its drafts may be


class MapK(Lookup):
    """What followed the newest occurrence of the last `size_n` tokens, if there were `min_hits`. A draft that failed makes the key's next
    one as long as what was right of it, one more at least; one that was right to its end doubles it."""

    def __init__(self, size_n: int, min_hits: int) -> None:
        super().__init__()
        self._size_n, self._min_hits = size_n, min_hits
        self._keys: dict[int, _Key] = {}
        self._asked: _Key | None = None

    def extend(self, tokens: Sequence[int]) -> None:
        size = self._size_n
        for token in tokens:
            self.tokens.append(token)
            if len(self.tokens) >= size:
                key = self._keys.setdefault(hash(tuple(self.tokens[-size:])), _Key(0))
                key.end, key.num_hits = len(self.tokens), key.num_hits + 1

    def propose(self, ahead: tuple[int, ...], limit: int) -> Proposal:
        wanted = self.newest(self._size_n, ahead)
        key = self._keys.get(hash(wanted)) if len(wanted) == self._size_n else None
        if key is not None and (key.num_hits < self._min_hits or tuple(self.tokens[key.end - self._size_n : key.end]) != wanted):
            key = None
        if len(ahead) == 1:
            self._asked = key
        if key is None:
            return NOTHING
        return copied(self.tokens, key.end, ahead, min(limit, key.reach))

    def heard(self, num_tested: int, num_right: int) -> None:
        if self._asked is not None and num_tested:
            is_whole = num_right == num_tested
            self._asked.reach = max(self._asked.reach, 2 * num_right) if is_whole else max(1, num_right)


@dataclass(slots=True)
class _Continuations:
    key: tuple[int, ...]
    tokens: dict[int, list[int]] = field(default_factory=dict[int, list[int]])  # next token -> [count, where it newest stood]


class MapK4V(Lookup):
    """Counts up to NUM_CONTINUATIONS tokens that followed the last `size_n`, the rarest giving way, and copies from the newest place of the
    most frequent, if it came `min_hits` times and at least twice as often as the others together."""

    def __init__(self, size_n: int, min_hits: int) -> None:
        super().__init__()
        self._size_n, self._min_hits = size_n, min_hits
        self._keys: dict[int, _Continuations] = {}

    def extend(self, tokens: Sequence[int]) -> None:
        size = self._size_n
        for token in tokens:
            if len(self.tokens) >= size:
                key = tuple(self.tokens[-size:])
                known = self._keys.get(hash(key))
                if known is None or known.key != key:
                    known = self._keys[hash(key)] = _Continuations(key)
                count = known.tokens.get(token)
                if count is None:
                    if len(known.tokens) == NUM_CONTINUATIONS:
                        (rarest, _) = min(known.tokens.items(), key=lambda item: item[1])
                        del known.tokens[rarest]
                    count = known.tokens[token] = [0, 0]
                count[0], count[1] = count[0] + 1, len(self.tokens)
            self.tokens.append(token)

    def propose(self, ahead: tuple[int, ...], limit: int) -> Proposal:
        key = self.newest(self._size_n, ahead)
        known = self._keys.get(hash(key))
        if known is None or known.key != key:
            return NOTHING
        best, place = max(known.tokens.values())
        if best < self._min_hits or best < 2 * (sum(count for count, _ in known.tokens.values()) - best):
            return NOTHING
        return copied(self.tokens, place, ahead, limit)
