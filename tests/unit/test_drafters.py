"""Every look-up against an obvious twin that searches the whole history anew, and all of them against what every drafter must do."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from forerun.actors.lookup import counts
from forerun.actors.lookup.base import Lookup
from forerun.actors.lookup.counts import Cached
from forerun.actors.lookup.family import SuffixFamily, family
from forerun.actors.lookup.fixed import NUM_CONTINUATIONS, MapK, MapK4V, Simple
from forerun.actors.lookup.mod import Mod, Table
from forerun.actors.lookup.suffix import Suffix
from forerun.core.errors import ModelFileError
from forerun.core.speculation import DRAFTERS, SUFFIX_MIN_MATCH, DrafterName, SpeculationParams

Twin = Callable[[list[int], Sequence[int], int], list[int]]


def simple(text: list[int], ahead: Sequence[int], limit: int, n: int = 2) -> list[int]:
    whole = [*text, *ahead]
    for end in range(len(text), n - 1, -1):
        if whole[-n:] == text[end - n : end] and len(whole) >= n:
            return whole[end : end + limit] if len(whole) - end >= n else []
    return []


def map_k(text: list[int], ahead: Sequence[int], limit: int, n: int = 2, min_hits: int = 2) -> list[int]:
    whole = [*text, *ahead]
    ends = [end for end in range(n, len(text) + 1) if text[end - n : end] == whole[-n:]]
    return whole[ends[-1] : ends[-1] + limit] if len(ends) >= min_hits else []


def map_k4v(text: list[int], ahead: Sequence[int], limit: int, n: int = 2) -> list[int]:
    whole = [*text, *ahead]
    seen: dict[int, list[int]] = {}
    for place in range(n, len(text)):
        if text[place - n : place] == whole[-n:]:
            if text[place] not in seen and len(seen) == NUM_CONTINUATIONS:
                del seen[min(seen, key=lambda token: (len(seen[token]), seen[token][-1]))]
            seen.setdefault(text[place], []).append(place)
    if not seen:
        return []
    most = max(seen.values(), key=lambda places: (len(places), places[-1]))
    others = sum(map(len, seen.values())) - len(most)
    return whole[most[-1] : most[-1] + limit] if len(most) >= 2 * others else []


def mod(text: list[int], ahead: Sequence[int], limit: int, n: int = 3, n_min: int = 2) -> list[int]:
    newest: dict[tuple[int, ...], int] = {}
    for place in range(n, len(text)):
        newest[tuple(text[place - n : place])] = text[place]
    whole, found = [*text, *ahead], list[int]()
    while len(whole) >= n and len(found) < limit and tuple(whole[-n:]) in newest:
        found.append(newest[tuple(whole[-n:])])
        whole.append(found[-1])
    return found if len(found) >= n_min else []


def cache(text: list[int], ahead: Sequence[int], limit: int) -> list[int]:
    whole, found = [*text, *ahead], list[int]()
    while len(found) < limit:
        best = None
        for n, (samples, percent) in ((4, (1, 50)), (3, (1, 50)), (2, (2, 50)), (1, (2, 66))):
            after = [text[i + n] for i in range(len(text) - n) if text[i : i + n] == whole[-n:]] if len(whole) >= n else []
            firsts = list(dict.fromkeys(after))  # of equals, the one seen first
            if best is None and len(after) >= samples:
                most = max(firsts, key=after.count)
                best = most if 100 * after.count(most) >= percent * len(after) else None
        if best is None:
            break
        found.append(best)
        whole.append(best)
    return found


def suffix(text: list[int], ahead: Sequence[int], limit: int) -> list[int]:
    whole, found = [*text, *ahead], list[int]()
    while len(found) < limit:
        after: list[int] = []
        for n in range(len(whole) - 1, SUFFIX_MIN_MATCH - 1, -1):
            after = [text[i + n] for i in range(len(text) - n) if text[i : i + n] == whole[-n:]]
            if after:
                break
        if not after:
            break
        found.append(max(reversed(after), key=after.count))  # of equals, the newest
        whole.append(found[-1])
    return found


LOOKUPS: dict[str, tuple[Callable[[], Lookup], Twin]] = {
    "ngram-simple": (lambda: Simple(2), simple),
    "ngram-map-k": (lambda: MapK(2, 2), map_k),
    "ngram-map-k4v": (lambda: MapK4V(2, 1), map_k4v),
    "ngram-mod": (lambda: Mod(Table(2**16), 3, 2, ""), mod),
    "ngram-cache": (lambda: Cached({}, {}), cache),
    "ngram-suffix": (Suffix, suffix),
}


def history(rng: random.Random) -> list[int]:
    """Tokens with repetitions of all lengths."""
    text = [rng.randrange(rng.choice([3, 8, 30])) for _ in range(rng.randrange(1, 30))]
    for _ in range(rng.randrange(4)):
        start = rng.randrange(len(text))
        text += [*text[start : start + rng.randrange(20)], rng.randrange(8)]
    return text


@pytest.mark.parametrize("name", LOOKUPS)
def test_500_histories_give_the_twins_drafts(name: str) -> None:
    make, twin = LOOKUPS[name]
    num_drafts = 0
    for seed in range(500):
        rng = random.Random(seed)
        text, lookup, at = history(rng), make(), 0
        while at < len(text):
            step = rng.randrange(1, 9)
            lookup.extend(text[at : at + step])
            at = min(at + step, len(text))
            ahead = tuple(text[at : at + 1] or [0]) + tuple(rng.randrange(5) for _ in range(rng.choice([0, 0, 2])))
            limit = rng.randrange(1, 12)
            found, sure = lookup.propose(ahead, limit)
            assert list(found) == twin(text[:at], ahead, limit), (seed, at)
            assert len(found) == len(sure) <= limit
            assert all(0 <= each <= 1 for each in sure)
            num_drafts += bool(found)
    assert num_drafts > 200


@pytest.mark.parametrize("name", LOOKUPS)
def test_a_proposal_is_not_learned_and_a_history_told_at_once_says_the_same(name: str) -> None:
    make, _ = LOOKUPS[name]
    rng = random.Random(1)
    for _ in range(20):
        text, piece, whole = history(rng), make(), make()
        for token in text:
            piece.extend([token])
            piece.propose((9, 1, 2), 5)
        whole.extend(text)
        for last in range(5):
            assert piece.propose((last,), 20) == whole.propose((last,), 20)


def test_a_key_that_failed_drafts_less_and_recovers() -> None:
    lookup = MapK(2, 1)
    lookup.extend([1, 2, 3, 4, 5, 6, 7, 8, 9, 1])
    assert lookup.propose((2,), 6)[0] == (3, 4, 5, 6, 7, 8)
    lookup.heard(3, 2)
    assert lookup.propose((2,), 6)[0] == (3, 4)
    lookup.heard(1, 0)
    assert lookup.propose((2,), 6)[0] == (3,)
    for length in (2, 4, 6):
        lookup.heard(length // 2, length // 2)
        assert len(lookup.propose((2,), 6)[0]) == length


def test_the_shared_table_keeps_tenants_apart_and_forgets_what_fails() -> None:
    table = Table(64)
    mine, other = Mod(table, 2, 1, "a"), Mod(table, 2, 1, "b")
    mine.extend([1, 2, 3, 4])
    other.extend([9, 9, 1])
    assert other.propose((2,), 3) == ((), ())
    same = Mod(table, 2, 1, "a")
    same.extend([5, 1])
    assert same.propose((2,), 3)[0] == (3, 4)
    for _ in range(5):
        same.propose((2,), 3)
        same.heard(2, 0)
    assert same.propose((2,), 3) == ((), ())
    mine.extend(range(100, 200))
    assert table.num_used <= 16


def test_finished_requests_serve_later_ones_of_the_same_tenant_where_that_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = SuffixFamily(is_shared=True)
    first = shared.make("a")
    first.extend([1, 2, 3, 4, 5])
    shared.ended(first, "a")
    for salt, expected in (("a", (3, 4, 5)), ("b", ())):
        later = shared.make(salt)
        later.extend([7, 1])
        assert later.propose((2,), 9)[0] == expected
    shared.ended(shared.make("c"), "c")
    monkeypatch.setattr("forerun.actors.lookup.family.MAX_SHARED", 6)
    shared.ended(shared.make("c"), "c")  # a's six and c's two are too many, and a's the longest unused
    later = shared.make("a")
    later.extend([7, 1])
    assert later.propose((2,), 9)[0] == ()
    alone = SuffixFamily(is_shared=False)
    alone.ended(first, "a")
    assert alone.make("a").propose((2,), 9)[0] == ()


@pytest.mark.parametrize("name", [name for name in DRAFTERS if name != "draft-mtp"])
def test_texts_with_rows_in_place_of_tokens(name: DrafterName, tmp_path: Path) -> None:
    """They stand for ids below 0, of 63 bits, which a sequence drafts no further than; files are of tokens alone."""
    params = SpeculationParams((name,), lookup_cache_dynamic=str(tmp_path / "counts"), ngram_suffix_shared=True)
    kind = family(name, params, 100)
    for _ in range(2):
        lookup = kind.make("")
        for token in [*range(30), -(2**62) - 1, -5, *range(30)]:
            lookup.propose((token,), 8)
            lookup.extend([token])
        found, _ = lookup.propose((30,), 8)
        assert found[:1] in ((), (-(2**62) - 1,))
        kind.ended(lookup, "")
    kind.close()
    assert name != "ngram-cache" or counts.load(tmp_path / "counts", 30)


def test_files_of_counts_come_back_and_weigh(tmp_path: Path) -> None:
    known: counts.Counts = {}
    counts.count(known, [1, 2, 3, 1, 2, 3, 1, 2, 4], 0)
    counts.save(tmp_path / "counts", known)
    assert counts.load(tmp_path / "counts", 10) == known
    assert [path.name for path in tmp_path.iterdir()] == ["counts"]
    lookup = Cached(known, {})
    assert lookup.propose((1, 2), 2)[0] == (3, 1)  # from the dynamic file alone
    assert Cached({}, known).propose((1, 2), 1)[0] == (3,)
    tied = Cached({}, {(7, 2): {4: 1}})
    tied.extend([7, 2, 3, 7, 2, 4])
    assert tied.propose((7, 2), 1)[0] == (4,)  # the static file decides between equals


def test_damaged_files_of_counts_are_refused(tmp_path: Path) -> None:
    known: counts.Counts = {}
    counts.count(known, [1, 2, 3, 1, 2, 3, 4], 0)
    path = tmp_path / "counts"
    counts.save(path, known)
    good = path.read_bytes()
    for size in range(1, len(good)):
        path.write_bytes(good[:size])
        try:
            part = counts.load(path, 10)
        except ModelFileError:
            continue
        assert part.items() <= known.items()  # cut between two n-grams
    for at in range(0, len(good), 4):
        for value in (-2, 10, 2**31 - 1):
            path.write_bytes(good[:at] + value.to_bytes(4, "little", signed=True) + good[at + 4 :])
            try:
                for gram, followers in counts.load(path, 10).items():
                    assert all(0 <= token < 10 for token in (*gram, *followers))
            except ModelFileError:
                continue
    with pytest.raises(ModelFileError, match="cannot be read"):
        counts.load(tmp_path / "missing", 10)
