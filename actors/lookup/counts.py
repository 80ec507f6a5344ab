"""ngram-cache: how often which token followed the last 1 to 4, in this context, in a dynamic file and in a static one (llama.cpp,
common/ngram-cache.cpp, whose thresholds and files these are).

A file is a sequence of records of int32, little endian: an n-gram's 4 tokens, the missing ones -1 at its end, the number of
tokens that followed it, and for each of them the token and its count.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ...core.errors import ModelFileError
from ...core.files import in_place_of
from .base import NOTHING, Lookup, Proposal

MAX_N = 4
#: For n = 1 to 4: the samples there must be, and the share in percent the likeliest must have.
CONTEXT = ((2, 66), (2, 50), (1, 50), (1, 50))
DYNAMIC = ((4, 75), (3, 66), (2, 66), (2, 66))
STATIC_N = 2
STATIC = (2, 50)
#: How much more a token counts that the static file knows here.
STATIC_WEIGHT = 100

Counts = dict[tuple[int, ...], dict[int, int]]


def count(counts: Counts, tokens: Sequence[int], start: int) -> None:
    """Counts what follows each n-gram that ends before tokens[start], tokens[start + 1]..."""
    for i in range(max(start, 1), len(tokens)):
        for n in range(1, min(MAX_N, i) + 1):
            followers = counts.setdefault(tuple(tokens[i - n : i]), {})
            followers[tokens[i]] = followers.get(tokens[i], 0) + 1


class Cached(Lookup):
    """The files' counts are shared by all sequences, and not changed by them; `dynamic` is brought up to date when a sequence ends."""

    def __init__(self, dynamic: Counts, static: Counts) -> None:
        super().__init__()
        self.context: Counts = {}
        self._dynamic, self._static = dynamic, static

    def extend(self, tokens: Sequence[int]) -> None:
        start = len(self.tokens)
        self.tokens.extend(tokens)
        count(self.context, self.tokens, start)

    def propose(self, ahead: tuple[int, ...], limit: int) -> Proposal:
        newest, found, sure = list(self.newest(MAX_N, ahead)), list[int](), list[float]()
        while len(found) < limit:
            token, share = self._next(newest[-MAX_N:])
            if token is None:
                break
            newest.append(token)
            found.append(token)
            sure.append(share)
        return (tuple(found), tuple(sure)) if found else NOTHING

    def _next(self, newest: list[int]) -> tuple[int | None, float]:
        grams = [tuple(newest[len(newest) - n :]) for n in range(1, len(newest) + 1)]
        static = self._static.get(grams[STATIC_N - 1], {}) if len(grams) >= STATIC_N else {}
        for counts, thresholds in ((self.context, CONTEXT), (self._dynamic, DYNAMIC)):
            for gram, (samples, percent) in reversed(list(zip(grams, thresholds, strict=False))):
                followers = counts.get(gram, {})
                total = sum(followers.values())
                if total < samples:
                    continue
                token = max(followers, key=lambda t: followers[t] * (STATIC_WEIGHT * static[t] if t in static else 1))
                if 100 * followers[token] >= percent * total:
                    return token, followers[token] / total
        total, (samples, percent) = sum(static.values()), STATIC
        if static and total >= samples:
            token = max(static, key=static.__getitem__)
            if 100 * static[token] >= percent * total:
                return token, static[token] / total
        return None, 0.0


def merge(into: Counts, other: Counts) -> None:
    """Adds up what is of tokens alone: an embedding row has an id below 0."""
    for gram, followers in other.items():
        tokens = {token: number for token, number in followers.items() if token >= 0}
        if tokens and min(gram) >= 0:
            known = into.setdefault(gram, {})
            for token, number in tokens.items():
                known[token] = known.get(token, 0) + number


def load(path: Path, vocabulary: int) -> Counts:
    """The counts of a file. ModelFileError unless all of it makes sense for token ids below `vocabulary`."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read: {error.strerror}") from error
    if len(raw) % 4:
        raise ModelFileError(f"{path}: truncated: {len(raw)} bytes are no whole number of int32")
    words = np.frombuffer(raw, "<i4").tolist()
    counts: Counts = {}
    at = 0
    while at < len(words):
        where = f"{path}: the n-gram at byte {4 * at}"
        head, at = words[at : at + MAX_N + 1], at + MAX_N + 1
        if len(head) < MAX_N + 1 or not 0 < head[MAX_N] <= (len(words) - at) // 2:
            raise ModelFileError(f"{where} is truncated, or says that nothing follows it")
        gram = tuple(token for token in head[:MAX_N] if token != -1)
        pairs, at = words[at : at + 2 * head[MAX_N]], at + 2 * head[MAX_N]
        followers = dict(zip(pairs[::2], pairs[1::2], strict=True))
        if not gram or tuple(head[: len(gram)]) != gram or gram in counts or len(followers) < head[MAX_N]:
            raise ModelFileError(f"{where} is empty, has gaps, or appears twice")
        if not all(0 <= token < vocabulary for token in (*gram, *followers)) or not all(n > 0 for n in followers.values()):
            raise ModelFileError(f"{where} has tokens beyond the vocabulary's {vocabulary}, or counts below 1")
        counts[gram] = followers
    return counts


def save(path: Path, counts: Counts) -> None:
    """Puts counts in place of whatever `path` held, at once or not at all. OSError when the system does not let us."""

    def words() -> Iterator[int]:
        for gram, followers in counts.items():
            yield from (*gram, *(-1,) * (MAX_N - len(gram)), len(followers))
            for token, number in followers.items():
                yield from (token, min(number, 2**31 - 1))

    with in_place_of(path) as file:
        file.write(np.fromiter(words(), "<i4").tobytes())
