"""What one sequence remembers, and how it goes back: keys and values, recurrent states, convolution windows, hidden rows.

The recurrent state cannot be cut like a key-value cache. So memory keeps the state at one position (the base) and, for
every row computed after it, what the recurrence consumed of that row (the log). Asking for a position inside the log
replays the rows before it onto the base, with the operations and the order of the verify that computed them: the result
has the same bits. A log folded in another order or precision drifts, and one published engine degenerated that way.
Asking for a position below the base or above the log is refused. Reading a position clears nothing: only writing new
rows from it does.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ...core.errors import InternalBug, LeaseLost, PositionLost
from ...core.protocol import CHUNK
from ..backend import F32, Backend, DeltaInputs
from .config import ModelConfig


class RecurrentLog:
    """Recurrent states [layers, Hv, dk, dv] and convolution windows [layers, width - 1, channels] of one sequence.
    `base` is the state at `base_position`; `num_rows` rows after it are in the log, at most `max_rows`."""

    def __init__(self, config: ModelConfig, max_rows: int) -> None:
        c = config
        state, heads = (c.num_delta, c.value_heads, c.key_dim, c.value_dim), (max_rows, c.num_delta, c.value_heads)
        self.base_position, self.num_rows, self.max_rows = 0, 0, max_rows
        self._base = np.zeros(state, np.float32)
        self._latest = np.zeros(state, np.float32)  # the state after the log's last row
        self._width = c.conv_width - 1
        # Pre-convolution columns: the window at the base, then one column a row. A window at base + n starts at column n.
        self._columns = np.zeros((c.num_delta, self._width + max_rows, c.channels), np.float32)
        self._k = np.zeros((*heads, c.key_dim), np.float32)
        self._v = np.zeros((*heads, c.value_dim), np.float32)
        self._decay, self._beta = np.zeros(heads, np.float32), np.zeros(heads, np.float32)

    def check(self, position: int) -> None:
        """PositionLost unless memory can go to `position` exactly. Changes nothing."""
        if not self.base_position <= position <= self.base_position + self.num_rows:
            held = f"{self.base_position} to {self.base_position + self.num_rows}"
            raise PositionLost(f"recurrent state at position {position} is gone; held: {held}")

    def seek(self, position: int, backend: Backend) -> None:
        """Makes `position` the base and empties the log. PositionLost when memory does not hold it exactly."""
        self.check(position)
        num_kept = position - self.base_position
        if num_kept and num_kept == self.num_rows:
            self._base, self._latest = self._latest, self._base
        else:
            for row in range(num_kept):
                backend.delta_replay(self._base, self._k[row], self._v[row], self._decay[row], self._beta[row])
        if num_kept:
            self._columns[:, : self._width] = self._columns[:, num_kept : num_kept + self._width].copy()
        self.base_position, self.num_rows = position, 0

    def columns(self, layer: int, new: F32) -> F32:
        """The window at the base with the pre-convolution columns `new` [R, channels] after it: [width - 1 + R, channels]."""
        self._columns[layer, self._width : self._width + len(new)] = new
        return self._columns[layer, : self._width + len(new)]

    def steps(self, layer: int, x: DeltaInputs, backend: Backend) -> F32:
        """Computes rows after the base and logs them; they count once `extend` is called. Outputs [R, Hv, dv]."""
        rows, latest = len(x.v), self._latest[layer]
        np.copyto(latest, self._base[layer])
        self._k[:rows, layer], self._v[:rows, layer] = x.k, x.v
        self._decay[:rows, layer], self._beta[:rows, layer] = x.decay, x.beta
        return backend.delta_steps(latest, x)

    def extend(self, num_rows: int) -> None:
        """Every layer has computed its `num_rows` rows."""
        self.num_rows = num_rows

    def chunk(self, layer: int, x: DeltaInputs, backend: Backend) -> F32:
        """Moves one layer's base over a whole prefill chunk. Nothing can go back into a chunk."""
        return backend.delta_chunk(self._base[layer], x)

    def chunk_columns(self, layer: int, new: F32) -> F32:
        columns = np.concatenate([self._columns[layer, : self._width], new])
        self._columns[layer, : self._width] = columns[-self._width :]
        return columns

    def advance(self, num_rows: int) -> None:
        """Every layer has moved over its chunk."""
        self.base_position += num_rows


class HiddenRows:
    """The newest post-norm hidden rows, keyed by position. A row that has been overwritten is refused, never another's."""

    def __init__(self, size: int, num_rows: int) -> None:
        self._rows = np.zeros((num_rows, size), np.float32)
        self._positions = np.full(num_rows, -1)

    def write(self, position: int, rows: F32) -> None:
        at = np.arange(position, position + len(rows)) % len(self._rows)
        self._rows[at] = rows
        self._positions[at] = range(position, position + len(rows))

    def read(self, position: int, num_rows: int) -> F32:
        """Rows `position` to `position + num_rows`, [num_rows, hidden]; PositionLost when one of them is gone."""
        wanted = np.arange(position, position + num_rows)
        at = wanted % len(self._rows)
        if not np.array_equal(self._positions[at], wanted):
            raise PositionLost(f"hidden rows {position} to {position + num_rows} are gone")
        return self._rows[at]


class KeyValues:
    """Keys and values [layers, KV, capacity, D] of one sequence. Rows at and after the position written from are void."""

    def __init__(self, layers: int, config: ModelConfig, capacity: int) -> None:
        shape = (layers, config.kv_heads, capacity, config.head_dim)
        self.keys, self.values = np.zeros(shape, np.float32), np.zeros(shape, np.float32)

    def write(self, layer: int, position: int, keys: F32, values: F32) -> tuple[F32, F32]:
        """Rows [R, KV, D] from `position`; returns the layer's whole keys and values [KV, capacity, D]."""
        end = position + len(keys)
        self.keys[layer, :, position:end] = keys.swapaxes(0, 1)
        self.values[layer, :, position:end] = values.swapaxes(0, 1)
        return self.keys[layer], self.values[layer]


class SequenceMemory:
    """All of one sequence: room for `capacity` positions and for `max_rows` rows in one verify."""

    def __init__(self, config: ModelConfig, capacity: int, max_rows: int) -> None:
        self.capacity = capacity
        self.trunk = KeyValues(config.num_attention, config, capacity)
        self.recurrent = RecurrentLog(config, max_rows)
        # A drafter reads a chunk's rows while the next is computed, and needs the row before its first.
        self.hidden = HiddenRows(config.hidden, 2 * CHUNK + max_rows + 1)
        self.mtp = KeyValues(1, config, capacity + max_rows)  # drafts may run past the last position

    def check(self, position: int, num_rows: int, *, is_chunk: bool) -> None:
        """PositionLost unless `num_rows` rows can be computed from `position`. Changes nothing."""
        self.recurrent.check(position)
        max_rows = CHUNK if is_chunk else self.recurrent.max_rows
        if position + num_rows > self.capacity or num_rows > max_rows:
            lease = f"a lease of {self.capacity} positions, {max_rows} at once"
            raise PositionLost(f"rows {position} to {position + num_rows} do not fit {lease}")


class SequencePool:
    """Memory by lease number, the handle that messages carry. The memory manager fills and empties it, the actors that compute
    read it. `make(capacity, max_rows)` makes one sequence's memory; a number is never given twice."""

    def __init__(self, make: Callable[[int, int], SequenceMemory], num_slots: int) -> None:
        self._make = make
        self._leases: dict[int, tuple[str, SequenceMemory]] = {}
        self._first = self._next = 1  # the numbers lent in this life: from _first, below _next
        self.num_slots = num_slots

    def __getitem__(self, lease: int) -> SequenceMemory:
        if lease not in self._leases:
            raise LeaseLost(f"lease {lease} is not lent")
        return self._leases[lease][1]

    @property
    def num_free(self) -> int:
        return self.num_slots - len(self._leases)

    @property
    def owners(self) -> dict[int, str]:
        """Lease number -> who has it."""
        return {lease: owner for lease, (owner, _) in self._leases.items()}

    def lease(self, owner: str, capacity: int, max_rows: int) -> int | None:
        """A new lease with fresh memory, or None while all slots are lent."""
        if not self.num_free:
            return None
        number, self._next = self._next, self._next + 1
        self._leases[number] = (owner, self._make(capacity, max_rows))
        return number

    def release(self, lease: int) -> None:
        """The lease ends. One of a former life has ended already."""
        if lease >= self._first and self._leases.pop(lease, None) is None:
            raise InternalBug(f"lease {lease} was given back, but is not lent")

    def reset(self) -> None:
        """All leases end, and a new life begins."""
        self._leases.clear()
        self._first = self._next
