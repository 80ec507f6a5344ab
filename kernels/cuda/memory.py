"""One sequence's memory on a device, behind the interfaces of kernels/model: states and windows, pages, hidden rows. What leaves the device
(checkpoints, saved sequences) has the shapes and the float32 of the other backends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from ..backend import F32
from ..model.config import ModelConfig
from ..model.inputs import GivenRows
from ..model.memory import Ring, SequenceMemory
from ..model.pages import PAGE, Arena, PageRows
from ..model.recurrent import RecurrentPositions, StoreName
from .device import LOG, NOWHERE, RING, Array, Device, SpanStruct

#: Rows of a prompt that are computed at once.
MAX_CHUNK = 512


class CudaStates(RecurrentPositions):
    """States [slots, layers, Hv, dv, dk], transposed; of a log one slot. Columns [layers, slots, channels] and gates [layers, slots, 2 Hv]
    stand in slot position % slots: what is read of a verify and what it writes never share one."""

    def __init__(self, config: ModelConfig, max_rows: int, store: StoreName, device: Device) -> None:
        super().__init__(config, max_rows)
        c, self._device = config, device
        self.number = RING if store == "snapshots" else LOG
        self.state_slots = max_rows + 1 if store == "snapshots" else 1
        self.column_slots = self.window + 2 * max_rows
        self.states = device.zeros((self.state_slots, c.num_delta, c.value_heads, c.value_dim, c.key_dim), np.float32)
        self.columns = device.zeros((c.num_delta, self.column_slots, c.channels), np.float32)
        self.gates = device.zeros((c.num_delta, self.column_slots, 2 * c.value_heads), np.float32)

    def read(self) -> tuple[F32, F32]:
        state = self._device.to_host(self.states[self.base_position % self.state_slots].swapaxes(2, 3))
        return state, self._window(self._device.to_host(self.columns))

    def _window(self, columns: F32) -> F32:
        at = np.arange(self.base_position - self.window, self.base_position)
        window = columns[:, at % self.column_slots]
        window[:, at < 0] = 0
        return window

    def restore(self, position: int, state: F32, columns: F32) -> None:
        self.moved_to(position)
        self._device.put(self.states[position % self.state_slots].swapaxes(2, 3), state)
        for i in range(self.window):
            self._device.put(self.columns[:, (position - self.window + i) % self.column_slots], np.ascontiguousarray(columns[:, i]))


class CudaHidden(Ring):
    """The newest post-norm hidden rows, [slots, hidden]. They leave the device for who asks."""

    def __init__(self, width: int, num_rows: int, device: Device) -> None:
        super().__init__(num_rows)
        self._device = device
        self.rows = device.zeros((num_rows, width), np.float32)

    def write(self, position: int, rows: F32) -> None:
        self.begin(position, len(rows))
        for i, row in enumerate(rows):
            self._device.put(self.rows[(position + i) % self.size], row)
        self.written(position, len(rows))

    def read(self, position: int, num_rows: int) -> F32:
        """Copies of the rows, [num_rows, hidden], on the host."""
        self.check(position, num_rows)
        start = position % self.size
        pieces = [self._device.to_host(self.rows[start : start + num_rows])]
        if len(pieces[0]) < num_rows:
            pieces.append(self._device.to_host(self.rows[: num_rows - len(pieces[0])]))
        self.check(position, num_rows)
        return np.concatenate(pieces)

    def before(self, position: int, num_rows: int) -> None:
        """The head reads the rows where they are."""
        self.check(position - 1, num_rows)


class CudaArena(Arena):
    """Keys [layers, pages, KV, PAGE, D] and values [layers, pages, KV, D, PAGE] in bfloat16: the trunk's layers, then the MTP head's."""

    def __init__(self, num_pages: int, config: ModelConfig, device: Device) -> None:
        self._device, c = device, config
        self._shape = (c.num_attention + 1, num_pages, c.kv_heads)
        self.keys = device.zeros((*self._shape, PAGE, c.head_dim), np.uint16)
        self.values = device.zeros((*self._shape, c.head_dim, PAGE), np.uint16)
        super().__init__(num_pages, c.num_attention, c.kv_heads, c.head_dim)

    def _allocate(self, num_pages: int, layers: int, kv_heads: int, head_dim: int) -> None:
        pass

    def clear(self, pages: list[int]) -> None:
        ends = [i for i in range(1, len(pages) + 1) if i == len(pages) or pages[i] != pages[i - 1] + 1]
        for begin, end in pairwise([0, *ends]):  # pages that lie side by side at once: all of them, mostly
            side_by_side = slice(pages[begin], pages[end - 1] + 1)
            for array in (self.keys, self.values):
                self._device.put(array[:, side_by_side], np.zeros((), np.uint16))

    @property
    def page_bytes(self) -> int:
        return (self.keys.nbytes + self.values.nbytes) // self.num_pages

    def read(self, page: int) -> PageRows:
        keys, values = (_widen(self._device.to_host(each[:, page])) for each in (self.keys, self.values))
        both = np.stack([keys, values.swapaxes(2, 3)])
        return np.ascontiguousarray(both[:, :-1]), np.ascontiguousarray(both[:, -1:])

    def write(self, page: int, rows: PageRows) -> None:
        both = _narrow(np.concatenate(rows, axis=1))
        self._device.put(self.keys[:, page], np.ascontiguousarray(both[0]))
        self._device.put(self.values[:, page], np.ascontiguousarray(both[1].swapaxes(2, 3)))


def _widen(halves: npt.NDArray[np.uint16]) -> F32:
    return (halves.astype(np.uint32) << 16).view(np.float32)


def _narrow(values: F32) -> npt.NDArray[np.uint16]:
    """To bfloat16; what came from there comes back as it was."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


class CudaKeyValues:
    """One sequence's keys and values of the trunk (`is_mtp`: of the MTP head), as the host sees them."""

    def __init__(self, arena: CudaArena, table: list[int], is_mtp: bool) -> None:
        self._arena, self._table, self._is_mtp = arena, table, is_mtp

    def read(self, num_positions: int) -> F32:
        """[2, layers, KV, num_positions, D]."""
        pages = [self._arena.read(page)[self._is_mtp] for page in self._table[: max(1, -(-num_positions // PAGE))]]
        return np.ascontiguousarray(np.concatenate(pages, axis=3)[:, :, :, :num_positions])

    def restore(self, rows: F32) -> None:
        for i, start in enumerate(range(0, rows.shape[3], PAGE)):
            whole = list(self._arena.read(self._table[i]))
            part = rows[:, :, :, start : start + PAGE]
            whole[self._is_mtp][:, :, :, : part.shape[3]] = part
            self._arena.write(self._table[i], (whole[0], whole[1]))


class CudaSequence(SequenceMemory):
    """All of one sequence."""

    max_chunk = MAX_CHUNK

    def __init__(  # not the base's: nothing of it is NumPy's
        self, config: ModelConfig, arena: CudaArena, table: list[int], capacity: int, max_rows: int, store: StoreName, device: Device
    ) -> None:
        self.capacity, self.table, self.arena = capacity, table, arena
        self.states = CudaStates(config, max_rows, store, device)
        self.rows = CudaHidden(config.hidden, 2 * MAX_CHUNK + max_rows + 1, device)
        self.recurrent, self.hidden = cast("Any", self.states), cast("Any", self.rows)
        self.trunk, self.mtp = (cast("Any", CudaKeyValues(arena, table, is_mtp)) for is_mtp in (False, True))
        self.max_checkpoint_bytes, self.checkpoint_share, self.checkpoints, self.frozen = 0, 0, [], None
        self._device = device
        self._table: Array = device.to_device(np.array(table, np.int32))
        s, address = self.states, device.address
        self._span = SpanStruct(
            0, 0, address(s.states), address(s.columns), address(s.gates), address(arena.keys), address(arena.values),
            address(self._table), address(self.rows.rows), NOWHERE, NOWHERE, 0, 0, arena.num_pages, 0, 0, s.number,
            s.state_slots, s.column_slots, self.rows.rows.shape[0],
        )  # fmt: skip

    def give(self, given: GivenRows) -> None:
        super().give(given)
        self._given = [self._device.to_device(array) for array in (given.coordinates, given.rows)]
        self._span.coordinates, self._span.given = map(self._device.address, self._given)
        self._span.num_coordinates, self._span.free = len(given.coordinates), given.free

    def span(self, position: int, first_row: int, num_rows: int, *, base: int | None = None) -> SpanStruct:
        """What kernels are told of rows from `position`."""
        if position < 0 or position + num_rows > len(self.table) * PAGE:
            raise IndexError(f"rows {position} to {position + num_rows} are beyond {len(self.table)} pages")
        span = SpanStruct.from_buffer_copy(self._span)
        span.position, span.base = position, position if base is None else base
        span.first_row, span.num_rows = first_row, num_rows
        return span


@dataclass(frozen=True, slots=True)
class CudaMemory:
    """Makes sequences of one model on one device."""

    config: ModelConfig
    device: Device

    steps_equal_chunks = False

    @property
    def max_together(self) -> int:
        return MAX_CHUNK

    def arena(self, num_pages: int) -> CudaArena:
        return CudaArena(num_pages, self.config, self.device)

    def memory(self, arena: Arena, table: list[int], capacity: int, max_rows: int, store: StoreName) -> CudaSequence:
        assert isinstance(arena, CudaArena)
        return CudaSequence(self.config, arena, table, capacity, max_rows, store, self.device)


def spans_array(spans: Sequence[SpanStruct]) -> npt.NDArray[np.uint8]:
    """Their bytes."""
    return np.frombuffer(b"".join(bytes(span) for span in spans), np.uint8)
