"""What goes into a model at each position: a token's embedding, or a row that the prompt brought; and where the position lies for the
rotary embedding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from ...core.embeddings import EmbeddingRows, coordinates_of
from ..backend import F32

if TYPE_CHECKING:
    from .memory import SequenceMemory

I32 = npt.NDArray[np.int32]


class HasRows(Protocol):
    """Consecutive tokens of one sequence, from an absolute position: of the trunk or of the MTP head."""

    @property
    def memory(self) -> SequenceMemory: ...
    @property
    def position(self) -> int: ...
    @property
    def tokens(self) -> tuple[int, ...]: ...


def violations_of(embeddings: Sequence[tuple[int, EmbeddingRows]], hidden: int) -> list[tuple[str, str]]:
    """What is wrong with what rows hold, whose form is right, for a model of `hidden` dimensions."""
    for number, (_, rows) in enumerate(embeddings):
        if rows.width != hidden:
            return [("prompt", f"rows {number} have {rows.width} dimensions, the model has {hidden}")]
        if not np.isfinite(np.frombuffer(rows.data, "<f4")).all():
            return [("prompt", f"rows {number} hold what is not a number")]
    return []


class GivenRows:
    """The embedding rows of one prompt [n, hidden], and the (t, h, w) of all positions: `coordinates` [m, 3] of those up to the last row's,
    after which they go on by one from `free`, all three the same."""

    def __init__(self, embeddings: Sequence[tuple[int, EmbeddingRows]]) -> None:
        data = [np.frombuffer(rows.data, "<f4").astype(np.float32, copy=False).reshape(-1, rows.width) for _, rows in embeddings]
        self.rows: F32 = np.concatenate(data)
        positions = (position for start, rows in embeddings for position in range(start, start + len(rows)))
        self._numbers = {position: number for number, position in enumerate(positions)}
        coordinates, self.free = coordinates_of(embeddings)
        self.coordinates: I32 = np.array(coordinates, np.int32)

    def number(self, position: int) -> int:
        """Which of the rows stands there; KeyError where a token does."""
        return self._numbers[position]

    def at(self, position: int, num_rows: int) -> I32:
        """(t, h, w) of so many positions, [num_rows, 3]."""
        known = self.coordinates[position : position + num_rows]
        first = self.free + max(position - len(self.coordinates), 0)
        later = np.arange(first, first + num_rows - len(known), dtype=np.int32)
        return np.concatenate([known, np.repeat(later[:, None], 3, axis=1)])


def numbered(rows: HasRows) -> Sequence[int]:
    """Their tokens; -1 - i stands for row i of what the memory was given."""
    given = rows.memory.given
    if given is None:
        return rows.tokens
    return [token if token >= 0 else -1 - given.number(position) for position, token in enumerate(rows.tokens, rows.position)]


def inputs_of(batch: Sequence[HasRows]) -> tuple[list[int], F32 | None]:
    """Tokens of a batch, in order; -1 - i stands for row i of the rows beside them, if there are any."""
    tokens, found = list[int](), list[F32]()
    for rows in batch:
        for token in numbered(rows):
            if token < 0 and rows.memory.given is not None:
                found.append(rows.memory.given.rows[-1 - token])
                token = -len(found)
            tokens.append(token)
    return tokens, np.array(found) if found else None


@dataclass(frozen=True, slots=True)
class Angles:
    """Cosines and sines [R, dim / 2] of rows, or `by_position` of all positions from 0 on."""

    cos: F32
    sin: F32
    by_position: bool = False


class Rotary:
    """Cosines and sines of positions (M-RoPE: `apply_interleaved_mrope` of transformers' modeling_qwen3_vl.py). Frequency i takes h where
    i % 3 == 1 and i < 3 * sections[1], w where i % 3 == 2 and i < 3 * sections[2], else t; text has equal ones. The table grows by whole
    blocks, so that an entry's bits do not depend on when it was first asked for."""

    _block = 1024

    def __init__(self, dim: int, theta: float, sections: tuple[int, int, int]) -> None:
        self._inverse = frequencies(dim, theta)
        self._cos, self._sin = (np.zeros((0, dim // 2), np.float32) for _ in range(2))
        self._axes = axes_of(dim // 2, sections)

    def __call__(self, batch: Sequence[HasRows]) -> tuple[F32, F32]:
        """Of all rows of a batch, [R, dim / 2] each."""
        if all(rows.memory.given is None for rows in batch):
            positions = [p for rows in batch for p in range(rows.position, rows.position + len(rows.tokens))]
            self._grow(max(positions))
            return self._cos[positions], self._sin[positions]
        coordinates = np.concatenate([places_of(rows) for rows in batch])[:, self._axes]
        self._grow(int(coordinates.max()))
        cos, sin = (np.take_along_axis(table, coordinates, 0) for table in (self._cos, self._sin))
        return np.ascontiguousarray(cos), np.ascontiguousarray(sin)  # as C wants them

    def angles(self, batch: Sequence[HasRows], num_further: int = 0) -> Angles:
        """The same, by position if every row's angle is that of its position, and then also of so many positions more."""
        if any(rows.memory.given is not None for rows in batch):
            return Angles(*self(batch))
        self._grow(max(rows.position + len(rows.tokens) for rows in batch) - 1 + num_further)
        return Angles(self._cos, self._sin, by_position=True)

    def _grow(self, last: int) -> None:
        while len(self._cos) <= last:
            block = np.arange(len(self._cos), len(self._cos) + self._block, dtype=np.float32)
            angle = block[:, None] * self._inverse
            self._cos, self._sin = np.concatenate([self._cos, np.cos(angle)]), np.concatenate([self._sin, np.sin(angle)])


@cache
def frequencies(dim: int, theta: float) -> F32:
    """Of the rotary embedding, [dim / 2]."""
    return (1 / np.float32(theta) ** (np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim))).astype(np.float32)


def axes_of(num_frequencies: int, sections: tuple[int, int, int]) -> npt.NDArray[np.intp]:
    """Which of t, h and w each frequency takes."""
    axes = np.zeros(num_frequencies, np.intp)
    for axis in (1, 2):
        axes[axis : 3 * sections[axis] : 3] = axis
    return axes


def places_of(rows: HasRows) -> I32:
    """(t, h, w) of each row, [R, 3]."""
    count = len(rows.tokens)
    if rows.memory.given is not None:
        return rows.memory.given.at(rows.position, count)
    return np.repeat(np.arange(rows.position, rows.position + count, dtype=np.int32)[:, None], 3, axis=1)
