"""Recurrent states and convolution windows of one sequence, and how they go back: two stores behind one interface.

A recurrent state cannot be cut like a key-value cache. After a verify of R rows from position p a store can make any of
p, p + 1, ..., p + R the position it goes on from, with the bits of a run that computed no row beyond it:

    RecurrentLog   one state at p (the base) and, for every row after it, what its part of the recurrence is made of: the
                   pre-convolution columns, b and a. A position is reached by computing k, v, decay and beta of the rows
                   before it again and replaying them onto the base, with the operations and the order of the verify.
    SnapshotRing   the state after every row, in a ring keyed by absolute position.

A log folded in another order or precision drifts, and one published engine degenerated that way. Reading a position
clears nothing: only writing new rows from it does. The convolution needs the last columns before it, so both keep the
rows' columns, and a window is cut out of them; k and v can be had from the same columns, and are not kept as well.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal

import numpy as np

from ...core.errors import PositionLost
from ..backend import F32, Backend, DeltaInputs
from .config import ModelConfig

StoreName = Literal["log", "snapshots"]
#: Moves the states of a log over its first rows, in all layers.
Replay = Callable[["RecurrentLog", int], None]


class RecurrentPositions(ABC):
    """What any store holds: `base_position`, and the `num_rows` positions after it of the rows computed since, of which there are at most
    `max_rows`. A backend that computes all layers in one call works on the arrays themselves, between `begin` and `moved_to`, `extend`
    or `advance`."""

    def __init__(self, config: ModelConfig, max_rows: int) -> None:
        self.config, self.max_rows = config, max_rows
        self.base_position, self.num_rows = 0, 0
        self._is_whole = True  # False while a state is being moved: what fails then has lost it
        self.window = config.conv_width - 1

    def check(self, position: int) -> None:
        """PositionLost unless the store can go to `position` exactly. Changes nothing."""
        if not self._is_whole:
            raise PositionLost(f"recurrent state at position {position} is gone; a rollback failed half way, nothing is held")
        if not self.base_position <= position <= self.base_position + self.num_rows:
            held = f"{self.base_position} to {self.base_position + self.num_rows}"
            raise PositionLost(f"recurrent state at position {position} is gone; held: {held}")

    def begin(self) -> None:
        """Its arrays are about to change: until `moved_to`, nothing is held."""
        self._is_whole = False

    def stayed(self) -> None:
        """They did not change after all."""
        self._is_whole = True

    def moved_to(self, position: int) -> None:
        """The states and windows at `position` are in place; no rows after it are."""
        self.base_position, self.num_rows, self._is_whole = position, 0, True

    def extend(self, num_rows: int) -> None:
        """Every layer has computed its `num_rows` rows."""
        self.num_rows = num_rows

    def advance(self, num_rows: int) -> None:
        """Every layer has moved over its chunk."""
        self.base_position += num_rows
        self._is_whole = True

    @abstractmethod
    def read(self) -> tuple[F32, F32]:
        """Copies of the states [layers, Hv, dk, dv] and windows [layers, width - 1, channels] at the base."""

    @abstractmethod
    def restore(self, position: int, state: F32, columns: F32) -> None:
        """Makes what `read` gave the base at `position`, whatever was here before."""


class RecurrentStore(RecurrentPositions):
    """States [layers, Hv, dk, dv] and windows [layers, width - 1, channels] in NumPy's arrays."""

    states: F32

    def __init__(self, config: ModelConfig, max_rows: int) -> None:
        super().__init__(config, max_rows)
        # Pre-convolution columns: the window at the base, then one column a row. A window at base + n starts at column n.
        self.all_columns = np.zeros((config.num_delta, self.window + max_rows, config.channels), np.float32)

    def seek(self, position: int, replay: Replay) -> None:
        """Makes `position` the base, with no rows after it. PositionLost when it is not held exactly."""
        self.check(position)
        num_kept = position - self.base_position
        self.begin()
        if num_kept:
            self._go(num_kept, replay)
            self.all_columns[:, : self.window] = self.all_columns[:, num_kept : num_kept + self.window].copy()
        self.moved_to(position)

    def columns(self, layer: int, new: F32) -> F32:
        """The window at the base with the pre-convolution columns `new` [R, channels] after it: [width - 1 + R, channels]."""
        self.all_columns[layer, self.window : self.window + len(new)] = new
        return self.all_columns[layer, : self.window + len(new)]

    def chunk(self, layer: int, x: DeltaInputs, backend: Backend) -> F32:
        """Moves one layer's base over a whole prefill chunk. Nothing can go back into a chunk. Outputs [C, Hv, dv]."""
        self._is_whole = False
        return backend.delta_chunk(self.base[layer], x)

    def chunk_columns(self, layer: int, new: F32) -> F32:
        self._is_whole = False
        columns = np.concatenate([self.all_columns[layer, : self.window], new])
        self.all_columns[layer, : self.window] = columns[-self.window :]
        return columns

    def read(self) -> tuple[F32, F32]:
        return self.base.copy(), self.all_columns[:, : self.window].copy()

    def restore(self, position: int, state: F32, columns: F32) -> None:
        self.moved_to(position)
        self.all_columns[:, : self.window] = columns
        self.base[...] = state

    @abstractmethod
    def steps(self, layer: int, x: DeltaInputs, b: F32, a: F32, backend: Backend) -> F32:
        """Computes rows after the base, which `x` was made for from b and a [R, Hv]; they count once `extend` is called. Outputs
        [R, Hv, dv]."""

    @abstractmethod
    def _go(self, num_rows: int, replay: Replay) -> None:
        """Moves the base over `num_rows` rows, in all layers."""

    @property
    @abstractmethod
    def base(self) -> F32:
        """States of all layers at the base [layers, Hv, dk, dv], to be changed in place."""


class RecurrentLog(RecurrentStore):
    def __init__(self, config: ModelConfig, max_rows: int) -> None:
        super().__init__(config, max_rows)
        c = config
        self.states = np.zeros((c.num_delta, c.value_heads, c.key_dim, c.value_dim), np.float32)
        self.b, self.a = (np.zeros((c.num_delta, max_rows, c.value_heads), np.float32) for _ in range(2))

    def steps(self, layer: int, x: DeltaInputs, b: F32, a: F32, backend: Backend) -> F32:
        self.b[layer, : len(b)], self.a[layer, : len(a)] = b, a
        return backend.delta_steps(self.states[layer].copy(), x)

    def _go(self, num_rows: int, replay: Replay) -> None:
        replay(self, num_rows)

    @property
    def base(self) -> F32:
        return self.states


class SnapshotRing(RecurrentStore):
    """`max_rows` + 1 states of all layers; the one at position p stands in place p modulo their number."""

    def __init__(self, config: ModelConfig, max_rows: int) -> None:
        super().__init__(config, max_rows)
        c = config
        self.states = np.zeros((max_rows + 1, c.num_delta, c.value_heads, c.key_dim, c.value_dim), np.float32)

    def steps(self, layer: int, x: DeltaInputs, b: F32, a: F32, backend: Backend) -> F32:
        out = np.empty_like(x.v)
        for i in range(len(out)):
            position = self.base_position + i
            state = self._at(position + 1)[layer]
            np.copyto(state, self._at(position)[layer])
            row = DeltaInputs(*(part[i : i + 1] for part in (x.q, x.k, x.v, x.g, x.decay, x.beta)))
            out[i] = backend.delta_steps(state, row)[0]
        return out

    def _at(self, position: int) -> F32:
        return self.states[position % len(self.states)]

    def _go(self, num_rows: int, replay: Replay) -> None:
        pass  # the state is there; only the base's position moves

    @property
    def base(self) -> F32:
        return self._at(self.base_position)

    def advance(self, num_rows: int) -> None:
        before = self.base
        super().advance(num_rows)
        np.copyto(self.base, before)


STORES: dict[StoreName, type[RecurrentStore]] = {"log": RecurrentLog, "snapshots": SnapshotRing}
