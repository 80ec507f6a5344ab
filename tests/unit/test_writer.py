"""Text up to a stop string, however the tokens and the rounds cut it."""

from __future__ import annotations

import random

from forerun.actors.tokenizer import Detokenizer
from forerun.actors.writer import Writer

from tests.sim.fakes import FakeVocabulary


def tokens_of(text: str) -> tuple[int, ...]:
    return tuple(ord(character) - ord("a") for character in text)


def test_every_split_gives_the_text_before_the_first_stop() -> None:
    rng = random.Random(5)
    num_stopped = 0
    for _ in range(500):
        text = "".join(rng.choice("abc") for _ in range(rng.randrange(1, 30)))
        stops = tuple("".join(rng.choice("abc") for _ in range(rng.randrange(1, 5))) for _ in range(rng.randrange(4)))
        ends = [(end, stop) for end in range(1, len(text) + 1) for stop in stops if text[:end].endswith(stop)]
        first = min((end for end, _ in ends), default=None)
        begin = min(first - len(stop) for end, stop in ends if end == first) if first is not None else len(text)
        writer, pieces, at, found = Writer(Detokenizer(FakeVocabulary()), stops), list[str](), 0, None
        while at < len(text) and found is None:
            part = text[at : at + rng.randrange(1, 6)]
            used = writer.push(tokens_of(part))
            found = at + used if used is not None else None
            at += len(part)
            pieces.append(writer.take(is_last=found is not None or at >= len(text)))
            if found is None and at < len(text):  # what was given out can be no part of a stop
                assert text.startswith("".join(pieces))
                assert first is None or len("".join(pieces)) <= begin
        assert (found, "".join(pieces)) == (first, text[:begin])
        assert (writer.matched is not None) == (first is not None)
        num_stopped += first is not None
    assert num_stopped > 100
