"""Trunk and MTP head on the C kernels: the formulas of model/trunk.py and model/mtp.py as programs. Here a prefill's rows have the bits
of a verify's: both are the same steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from weakref import WeakKeyDictionary

import numpy as np

from ..backend import F32
from ..model.drafts import Drafted, MtpRows, Wanted
from ..model.inputs import Rotary, inputs_of
from ..model.memory import SequenceMemory
from ..model.mtp import HeadBase
from ..model.pages import PAGE, KeyValues
from ..model.recurrent import RecurrentLog, RecurrentStore, SnapshotRing
from ..model.trunk import Rows, TrunkBase
from ..model.weights import DeltaWeights, ModelWeights
from .library import CHUNK, LOG, RING, SpanStruct, WantedStruct, address, sampling_struct
from .matrices import CpuBackend, CpuMatrix
from .program import EMBED, NORM, Program


class _Spans:
    """What C is told of sequences: where their memory is. That does not change while a lease lasts."""

    def __init__(self) -> None:
        self._known: WeakKeyDictionary[SequenceMemory, tuple[SpanStruct, SpanStruct, object]] = WeakKeyDictionary()

    def trunk(self, memory: SequenceMemory, position: int, num_rows: int, *, is_chunk: bool) -> SpanStruct:
        """Rows that move on from the store's base by as many rows as it takes to `position`."""
        store = memory.recurrent
        span = self._of(memory)[0]
        _check_pages(memory, position, num_rows)
        span.position, span.num_rows, span.num_kept = position, num_rows, position - store.base_position
        span.store, span.states = (LOG if isinstance(store, RecurrentLog) else RING), address(store.states)
        if is_chunk:
            span.store, span.states = CHUNK, address(store.base)
        return span

    def mtp(self, memory: SequenceMemory, position: int, num_rows: int, *, num_further: int = 0) -> SpanStruct:
        """Rows, after which so many more may come."""
        span = self._of(memory)[1]
        _check_pages(memory, position, num_rows + num_further)
        span.position, span.num_rows = position, num_rows
        return span

    def _of(self, memory: SequenceMemory) -> tuple[SpanStruct, SpanStruct, object]:
        if memory not in self._known:
            table = np.array(memory.table, np.int32)
            trunk, mtp = _pages(memory.trunk, table), _pages(memory.mtp, table)
            _states(memory.recurrent, trunk)
            self._known[memory] = trunk, mtp, table
        return self._known[memory]


def _check_pages(memory: SequenceMemory, position: int, num_rows: int) -> None:
    if position < 0 or position + num_rows > len(memory.table) * PAGE:  # C would write where others are
        raise IndexError(f"rows {position} to {position + num_rows} are beyond {len(memory.table)} pages")


def _pages(key_values: KeyValues, table: np.ndarray[tuple[int], np.dtype[np.int32]]) -> SpanStruct:
    keys, values = key_values.arrays
    return SpanStruct(keys=address(keys), values=address(values), layer_stride=keys.strides[0] // 4, table=address(table))


def _states(store: RecurrentStore, span: SpanStruct) -> None:
    span.columns, span.columns_stride = address(store.all_columns), store.all_columns.strides[0] // 4
    if isinstance(store, RecurrentLog):
        span.b, span.a, span.gates_stride = address(store.b), address(store.a), store.b.strides[0] // 4
    if isinstance(store, SnapshotRing):
        span.num_slots = len(store.states)


class CpuTrunk(TrunkBase):
    def __init__(self, weights: ModelWeights, backend: CpuBackend) -> None:
        self.weights, c = weights, weights.config
        self.operations_per_second = backend.operations_per_second
        self._rotary, self._spans = Rotary(c.rotary_dim, c.rope_theta, c.mrope_sections), _Spans()
        self._chunks, self._steps, self._replays = (Program(c, backend) for _ in range(3))
        for program in (self._chunks, self._steps):
            x, self._hidden = program.buffer("x", c.hidden), program.buffer("hidden", c.hidden)
            program.op(EMBED, [], [x], [weights.embedding])
            counts = [0, 0]
            for w in weights.layers:
                is_delta = isinstance(w.mixer, DeltaWeights)
                program.layer(x, w, counts[is_delta])
                counts[is_delta] += 1
            program.op(NORM, [x], [self._hidden], weights=[weights.norm])
        self._logits = self._steps.buffer("logits", c.vocabulary)
        self._steps.linear(self._hidden, (weights.head, self._logits))
        for number, delta in enumerate(w.mixer for w in weights.layers if isinstance(w.mixer, DeltaWeights)):
            self._replays.replay(delta, number)
        self._head = _Product(weights, weights.head, backend)

    def logits(self, hidden: F32) -> F32:
        return self._head(hidden)

    def _verify(self, batch: Sequence[Rows]) -> tuple[F32, F32]:
        spans = [self._spans.trunk(rows.memory, rows.position, len(rows.tokens), is_chunk=False) for rows in batch]
        num_rows, c = sum(len(rows.tokens) for rows in batch), self.weights.config
        hidden, logits = np.empty((num_rows, c.hidden), np.float32), np.empty((num_rows, c.vocabulary), np.float32)
        self._run(self._steps, batch, spans, {self._hidden: hidden, self._logits: logits})
        return hidden, logits

    def _prefill(self, rows: Rows) -> F32:
        rows.memory.recurrent.seek(rows.position, self.replay)
        span = self._spans.trunk(rows.memory, rows.position, len(rows.tokens), is_chunk=True)
        hidden = np.empty((len(rows.tokens), self.weights.config.hidden), np.float32)
        self._run(self._chunks, [rows], [span], {self._hidden: hidden})
        return hidden

    def _run(self, program: Program, batch: Sequence[Rows], spans: Sequence[SpanStruct], given: dict[int, F32]) -> None:
        inputs, angles = inputs_of(batch), self._rotary.angles(batch)
        for rows in batch:
            rows.memory.recurrent.begin()
        try:
            program.run(len(inputs[0]), given, inputs, angles, spans)
        except (IndexError, MemoryError):  # nothing has been touched
            for rows in batch:
                rows.memory.recurrent.stayed()
            raise
        for rows in batch:
            rows.memory.recurrent.moved_to(rows.position)

    def replay(self, log: RecurrentLog, num_rows: int) -> None:
        span = SpanStruct(num_kept=num_rows, store=LOG, states=address(log.states))
        _states(log, span)
        self._replays.run(0, {}, spans=[span])


class CpuHead(HeadBase):
    def __init__(self, weights: ModelWeights, backend: CpuBackend) -> None:
        super().__init__(weights, backend)
        c = weights.config
        self._rotary, self._spans = Rotary(c.rotary_dim, c.rope_theta, c.mrope_sections), _Spans()
        self._all, self._last, self._guess = (self._graph(weights, backend, is_last) for is_last in (False, True, True))
        program, _, out = self._guess
        self._logits = program.buffer("logits", self.head.outputs)
        program.linear(out, (self.head, self._logits))
        self._product = _Product(weights, self.head, backend)

    def _graph(self, weights: ModelWeights, backend: CpuBackend, is_last: bool) -> tuple[Program, int, int]:
        """A program, and its buffers for the rows before and the outputs."""
        w, hidden, program = self.mtp, self.hidden, Program(weights.config, backend)
        embedded, both, x = program.buffer("embedded", hidden), program.buffer("both", 2 * hidden), program.buffer("x", hidden)
        before, out = program.buffer("hidden", hidden), program.buffer("out", hidden)
        program.op(EMBED, [], [embedded], [weights.embedding])
        program.op(NORM, [embedded], [both], weights=[w.embedding_norm])
        program.op(NORM, [before], [both], weights=[w.hidden_norm], offset=hidden)
        program.linear(both, (w.fc, x))
        x = program.layer(x, w.layer, 0, is_last)
        program.op(NORM, [x], [out], weights=[w.norm])
        return program, before, out

    def forward(self, batch: Sequence[MtpRows]) -> F32:
        return self._run(self._all, batch, sum(len(rows.tokens) for rows in batch))

    def last(self, batch: Sequence[MtpRows]) -> F32:
        return self._run(self._last, batch, len(batch))

    def guess(self, batch: Sequence[MtpRows]) -> tuple[F32, F32]:
        logits = np.empty((len(batch), self.head.outputs), np.float32)
        return self._run(self._guess, batch, len(batch), {self._logits: logits}), logits

    def _run(
        self, graph: tuple[Program, int, int], batch: Sequence[MtpRows], num_outputs: int, given: Mapping[int, F32] = MappingProxyType({})
    ) -> F32:
        program, before, out = graph
        spans = [self._spans.mtp(rows.memory, rows.position, len(rows.tokens)) for rows in batch]
        hidden, outputs = self.hidden_of(batch), np.empty((num_outputs, self.hidden), np.float32)
        program.run(len(hidden), {before: hidden, out: outputs, **given}, inputs_of(batch), self._rotary.angles(batch), spans)
        return outputs

    def draft(self, batch: Sequence[MtpRows], wanted: Sequence[Wanted]) -> list[Drafted]:
        """All tokens without Python between them, but where it changes logits, or angles are not those of positions."""
        if any(rows.memory.given is not None for rows in batch) or any(each.choosing.needs_host or not each.limit for each in wanted):
            return super().draft(batch, wanted)
        program, before, out = self._guess
        num_further = max(each.limit for each in wanted) - 1
        spans = [
            self._spans.mtp(rows.memory, rows.position, len(rows.tokens), num_further=each.limit - 1)
            for rows, each in zip(batch, wanted, strict=True)
        ]
        hows = [WantedStruct(sampling_struct(each.choosing.sampling), each.floor, each.least, each.limit) for each in wanted]
        hidden, angles = self.hidden_of(batch), self._rotary.angles(batch, num_further)
        found = program.draft(len(hidden), (before, hidden), inputs_of(batch), angles, spans, out, self._logits, hows)
        return [each.cut(*drafted) for each, drafted in zip(wanted, found, strict=True)]

    def logits(self, outputs: F32) -> F32:
        return self._product(outputs)


class _Product:
    """Rows times one matrix."""

    def __init__(self, weights: ModelWeights, matrix: CpuMatrix, backend: CpuBackend) -> None:
        self._outputs, self._program = matrix.outputs, Program(weights.config, backend)
        self._x, self._y = self._program.buffer("x", matrix.inputs), self._program.buffer("y", matrix.outputs)
        self._program.linear(self._x, (matrix, self._y))

    def __call__(self, x: F32) -> F32:
        y = np.empty((len(x), self._outputs), np.float32)
        self._program.run(len(x), {self._x: np.ascontiguousarray(x), self._y: y})
        return y
