"""Prompts with rows in place of tokens: what an encoder made of an image, say. A row goes in where a token's embedding would.

Everything that works by token ids works by them here too: a row stands for an id below 0, made of what it holds and of where
it lies, so that prefixes with the same rows are found, and others never are.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

Coordinates = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class EmbeddingRows:
    """Rows [n, width], little-endian float32, one after another in `data`. `coordinates` are each row's (t, h, w) for the rotary
    embedding, counted from where these rows begin, as Qwen-VL's get_rope_index counts the patches of an image; None: those of text,
    (i, i, i). What follows goes on after the highest of them. None may be above the row's number here."""

    data: bytes
    width: int
    coordinates: Sequence[Coordinates] | None = None

    @staticmethod
    def of(rows: Any, coordinates: Sequence[Coordinates] | None = None) -> EmbeddingRows:
        """Of an array [n, width] of float32: whatever has a buffer. TypeError when it is not that."""
        view = memoryview(rows)
        if view.ndim != 2 or view.format != "f":
            raise TypeError(f"expected two dimensions of float32, got {view.ndim} of {view.format!r}")
        assert view.shape is not None
        return EmbeddingRows(view.tobytes(), view.shape[1], coordinates)

    def __len__(self) -> int:
        return len(self.data) // (4 * self.width)

    def check(self, field: str) -> list[tuple[str, str]]:
        """What is wrong with the form of them."""
        data, width, coordinates = cast("tuple[object, object, object]", (self.data, self.width, self.coordinates))
        if type(width) is not int or width < 1:
            return [(f"{field}.width", "must be a positive whole number")]
        if not isinstance(data, bytes) or not data or len(data) % (4 * width):
            return [(f"{field}.data", f"must be the bytes of one or more rows of {width} float32 numbers")]
        if coordinates is None:
            return []
        given = _sequence(coordinates)
        if len(given) != len(self):
            return [(f"{field}.coordinates", f"must be {len(self)}, one (t, h, w) for each row")]
        for i, each in enumerate(given):
            numbers = _sequence(each)
            if len(numbers) != 3 or not all(type(number) is int and 0 <= number <= i for number in numbers):
                return [(f"{field}.coordinates[{i}]", f"must be three whole numbers from 0 to {i}, got {each!r:.50}")]
        return []

    def placed(self, start: int) -> Iterator[Coordinates]:
        """Each row's coordinates, when the first that is free is `start`."""
        given = self.coordinates if self.coordinates is not None else ((i, i, i) for i in range(len(self)))
        return ((start + t, start + h, start + w) for t, h, w in given)


def _sequence(value: object) -> Sequence[object]:
    return cast("Sequence[object]", value) if isinstance(value, Sequence) else ()


#: One piece of a prompt in parts.
Part = list[int] | EmbeddingRows


@dataclass(frozen=True, slots=True)
class Encoded:
    """A prompt as the model takes it: an id for every position, and the rows that stand from some of them on, in order. Where it
    `opens_reasoning`, it ends in the beginning of a thought."""

    ids: tuple[int, ...]
    embeddings: tuple[tuple[int, EmbeddingRows], ...] = ()
    opens_reasoning: bool = False

    @property
    def token_ids(self) -> Iterator[int]:
        """The ids of tokens only."""
        position = 0
        for start, rows in self.embeddings:
            yield from self.ids[position:start]
            position = start + len(rows)
        yield from self.ids[position:]


def coordinates_of(embeddings: Sequence[tuple[int, EmbeddingRows]]) -> tuple[list[Coordinates], int]:
    """(t, h, w) of all positions up to the last row's, and what those after it go on from, by one."""
    found: list[Coordinates] = []
    free = 0  # the first coordinate that nothing has
    for start, rows in embeddings:
        text = start - len(found)
        found += [(free + i, free + i, free + i) for i in range(text)]
        places = list(rows.placed(free + text))
        found += places
        free = max(map(max, places)) + 1
    return found, free


def lay_out(parts: Sequence[Part]) -> Encoded:
    """Parts, whose form was found right, one after another. Takes some milliseconds a megabyte."""
    ids: list[int] = []
    embeddings: list[tuple[int, EmbeddingRows]] = []
    for part in parts:
        if isinstance(part, EmbeddingRows):
            embeddings.append((len(ids), part))
            ids += [0] * len(part)
        else:
            ids += part
    places, _ = coordinates_of(embeddings)
    for start, rows in embeddings:
        size = 4 * rows.width
        for i, place in enumerate(places[start : start + len(rows)]):
            digest = hashlib.blake2b(rows.data[size * i : size * (i + 1)] + struct.pack("<3q", *place), digest_size=8).digest()
            ids[start + i] = -1 - (int.from_bytes(digest, "little") >> 1)
    return Encoded(tuple(ids), tuple(embeddings))
