"""Programs recorded as graphs: what the host tells them and reads of them travels with each launch; rows and logits stay on the device for
who asks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from ...core.begun import Mark
from ...core.errors import InternalBug
from ...core.vocabulary import SamplingParams
from ..backend import F32
from ..sampling import Ask
from .device import DRAW, SPAN, Array, Copy, DrawStruct, Kernels, SpanStruct
from .memory import spans_array
from .program import Column, Filters, Program, look_ahead

#: A span that fills up a batch.
NOBODYS = np.frombuffer(bytes(SpanStruct(state_slots=1, column_slots=1, hidden_slots=1)), np.uint8)


class DeviceRows:
    """Rows [R, n] where a recorded program leaves them, until it runs again. NumPy has them for the asking."""

    def __init__(self, recorded: Recorded, name: str, rows: slice, columns: int) -> None:
        self._recorded, self._name, self._rows, self._columns = recorded, name, rows, columns
        self._run = recorded.num_runs

    def __len__(self) -> int:
        return self._rows.stop - self._rows.start

    def __getitem__(self, at: slice) -> DeviceRows:
        start, stop, _ = at.indices(len(self))
        self._check()
        return DeviceRows(self._recorded, self._name, slice(self._rows.start + start, self._rows.start + stop), self._columns)

    def __iter__(self) -> Iterator[F32]:
        return iter(np.asarray(self))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> F32:
        return self._recorded.device.to_host(self.on_device).astype(dtype or np.float32, copy=False)

    @property
    def on_device(self) -> Array:
        self._check()
        buffer = self._recorded.program.buffers[self._name]
        return buffer.reshape(-1, buffer.shape[-1])[self._rows, : self._columns]

    def _check(self) -> None:
        if self._run != self._recorded.num_runs:
            raise InternalBug("these rows have been written over")

    def choose_tokens(self, how: Sequence[SamplingParams] | None, positions: Sequence[int]) -> DeviceTokens:
        """Of logits, the token of each row at its position, chosen where they are; with None the highest of each row."""
        self._check()
        if how is None:
            return DeviceTokens(self._recorded, "choices", self._rows)
        chooser = self._recorded.chooser(filters_of(how), self._columns)
        draws = chooser.begin()["draws"]
        draws[:] = 0
        for row, each, position in zip(range(self._rows.start, self._rows.stop), how, positions, strict=True):
            put_draw(draws, row, each, position)
        chooser.launch()
        return DeviceTokens(chooser, "drawn", self._rows)


class DeviceTokens:
    """Tokens where a recorded program leaves them, until it runs again: chosen, one a row; or drafted, some a sequence."""

    def __init__(self, recorded: Recorded, name: str, rows: slice) -> None:
        self._recorded, self._name, self._rows, self._run = recorded, name, rows, recorded.num_runs

    def _check(self) -> None:
        if self._run != self._recorded.num_runs:
            raise InternalBug("these tokens have been written over")

    def __len__(self) -> int:
        return self._rows.stop - self._rows.start

    def read(self) -> list[int]:
        self._check()
        return self._recorded.read(self._name)[self._rows].tolist()

    @property
    def on_device(self) -> Array:
        self._check()
        return self._recorded.program.buffers[self._name][self._rows]


def filters_of(how: Sequence[SamplingParams]) -> Filters:
    return Filters(any(each.top_k > 0 for each in how), any(each.top_p < 1 for each in how))


def put_draw(draws: npt.NDArray[np.uint8], row: int, how: SamplingParams, position: int) -> None:
    """Into bytes of Draws, one a row."""
    log_min_p = math.log(how.min_p) if how.min_p > 0 else -math.inf
    struct = DrawStruct(how.temperature, how.top_p, log_min_p, how.seed, position, how.top_k, 0)
    draws[row * DRAW.itemsize : (row + 1) * DRAW.itemsize] = np.frombuffer(bytes(struct), np.uint8)


class Recorded:
    """A program, recorded when it first runs: what the host tells it each time goes to the device with it, and what the host wants of it
    comes back."""

    def __init__(self, program: Program, kernels: Kernels) -> None:
        self.program, self.device, self.num_runs = program, program.device, 0
        self._kernels, self._launch = kernels, cast("Callable[[], None] | None", None)
        self._told, self._wanted = dict[str, npt.NDArray[Any]](), dict[str, npt.NDArray[Any]]()
        self._inputs, self._outputs = list[Copy](), list[Copy]()
        self.mark = cast("Mark | None", None)  # of its last run
        self._choosers: dict[Filters, Recorded] = {}

    def take(self, **fields: tuple[int, Any]) -> None:
        """Buffers that the host fills before each run: so many values of a type."""
        sizes = [-(-count * np.dtype(dtype).itemsize // 16) * 16 for count, dtype in fields.values()]
        there, here, at = self.device.zeros((sum(sizes),), np.uint8), self.device.shared(sum(sizes)), 0
        here[:] = 0
        for (name, (count, dtype)), size in zip(fields.items(), sizes, strict=True):
            end = at + count * np.dtype(dtype).itemsize
            self.program.buffers[name], self._told[name] = there[at:end].view(dtype), here[at:end].view(dtype)
            at += size
        self._inputs.append((there, here))

    def give(self, *names: str) -> None:
        """Buffers that the host reads after each run."""
        for name in names:
            array = self.program.buffers[name]
            here = self.device.shared(array.nbytes)
            self._wanted[name] = here.view(array.dtype).reshape(array.shape)
            self._outputs.append((array, here))

    def begin(self) -> dict[str, npt.NDArray[Any]]:
        """What is to be filled before `launch`."""
        self.wait()
        return self._told

    def record(self) -> Callable[[], None]:
        """What launches it. MemoryError where a device has no room for that."""
        if self._launch is None:
            look_ahead(self.program.steps)
            overlap = not self.program.is_wide  # large blocks that wait keep the places of others
            self._launch = self._kernels.record(self.program.steps, self._inputs, self._outputs, overlap=overlap)
        return self._launch

    def launch(self) -> None:
        launch = self.record()
        self.num_runs += 1
        launch()
        self.mark = self.device.mark()

    def read(self, name: str) -> npt.NDArray[Any]:
        self.wait()
        return self._wanted[name]

    def wait(self) -> None:
        """Until its last run has been computed."""
        if self.mark is not None:
            self.mark.wait()
            self.mark = None

    def run(self, spans: Sequence[SpanStruct], tokens: Sequence[int]) -> None:
        """A program of rows; `take` was told of `spans`, `span of` and `tokens`. What is filled up belongs to no sequence."""
        told = self.begin()
        put_spans(told["spans"], told["span of"], spans)
        put_tokens(told["tokens"], tokens)
        self.launch()

    def chooser(self, how: Filters, num_tokens: int) -> Recorded:
        """What draws tokens from the buffer `logits`."""
        if how not in self._choosers:
            logits = self.program.buffers["logits"]
            num_rows, stride = logits.shape[-2:]
            p = Program(self.program.config, self.program.packing, num_rows, 1, 1)
            found = self._choosers[how] = Recorded(p, self._kernels)
            found.take(draws=(num_rows * DRAW.itemsize, np.uint8))
            p.buffer("drawn", (num_rows,), np.int32)
            p.choose(Column(self.device.address(logits), stride), num_tokens, num_rows, p.address("drawn"), how)
            found.give("drawn")
        return self._choosers[how]


def put_tokens(to: npt.NDArray[np.int32], tokens: Sequence[int]) -> None:
    """Of a batch that is filled up."""
    to[: len(tokens)] = tokens
    to[len(tokens) :] = 0


def put_spans(to: npt.NDArray[np.uint8], span_of: npt.NDArray[np.int32], spans: Sequence[SpanStruct]) -> None:
    """The bytes of spans, and whose each row is; the rest is of none."""
    to[: len(spans) * SPAN.itemsize] = spans_array(spans)
    to[len(spans) * SPAN.itemsize :].reshape(-1, SPAN.itemsize)[:] = NOBODYS
    span_of[:] = -1
    for i, span in enumerate(spans):
        span_of[span.first_row : span.first_row + span.num_rows] = i


def put_verified(verified: npt.NDArray[np.int32], num_right: npt.NDArray[np.int32], asks: Sequence[Ask], some: Sequence[Ask]) -> None:
    """What count_right of rounds.cu goes by: the tokens of all rows of a verify, and of some of its sequences how many are right."""
    tokens = [token for ask in asks for token in (0, *ask.ahead)]  # the first of each is no draft
    verified[: len(tokens)] = tokens
    num_right[: len(some)] = [-1 if ask.num_right is None else ask.num_right for ask in some]


def as_rows(recorded: Recorded, name: str, num_rows: int, columns: int) -> F32:
    """What stands in a program's buffer, to those that think it is NumPy's."""
    return cast("F32", DeviceRows(recorded, name, slice(0, num_rows), columns))
