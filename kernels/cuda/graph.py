"""Trunk and MTP head on the CUDA kernels: the formulas of model/trunk.py and model/mtp.py as programs, recorded once for each shape of a
batch and run as a whole. Here a prefill's rows have the bits of a verify's: both are the same steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from ctypes import c_float
from typing import Any, cast

import numpy as np

from ...core.errors import InternalBug
from ..backend import F32
from ..model.inputs import HasRows, numbered
from ..model.memory import SequenceMemory
from ..model.mtp import HeadBase, MtpRows
from ..model.recurrent import RecurrentLog
from ..model.trunk import Rows, TrunkBase
from ..model.weights import DeltaWeights, ModelWeights
from .device import NOWHERE, SPAN, Array, Device, Kernels, SpanStruct
from .matrices import CudaBackend, CudaMatrix
from .memory import CudaSequence, spans_array
from .program import PART, Column, Parts, Prepared, Program, threads_for

#: Shapes of batches that are kept recorded, for each kind of program; the longest unused is forgotten.
MAX_RECORDED = 32


class DeviceRows:
    """Rows [R, n] on the device. NumPy has them for the asking; of logits, `choices` are the highest of each row, and cost a few bytes."""

    def __init__(self, device: Device, rows: Array, choices: Array | None = None) -> None:
        self.device, self.rows, self._choices = device, rows, choices

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, at: slice) -> DeviceRows:
        return DeviceRows(self.device, self.rows[at], None if self._choices is None else self._choices[at])

    def __iter__(self) -> Iterator[F32]:
        return iter(np.asarray(self))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> F32:
        return self.device.to_host(self.rows).astype(dtype or np.float32, copy=False)

    @property
    def choices(self) -> list[int]:
        if self._choices is None:
            raise InternalBug("these rows are not logits")
        return [int(token) for token in self.device.to_host(self._choices)]


class _Recorded:
    """A program with the places of what changes from call to call: tokens, spans, and whose span a row is in."""

    def __init__(self, program: Program, kernels: Kernels) -> None:
        self.program = program
        program.buffer("spans", (program.num_spans * SPAN.itemsize,), np.uint8)
        program.buffer("span of", (program.rows,), np.int32)
        program.buffer("tokens", (program.rows,), np.int32)
        self._kernels, self._run = kernels, cast("Callable[[], None] | None", None)

    def run(self, spans: Sequence[SpanStruct], tokens: Sequence[int]) -> None:
        device, buffers = self.program.device, self.program.buffers
        device.put(buffers["spans"], spans_array(spans))
        device.put(buffers["span of"], np.repeat(np.arange(len(spans), dtype=np.int32), [span.num_rows for span in spans]))
        device.put(buffers["tokens"], np.array(tokens, np.int32))
        if self._run is None:
            self._run = self._kernels.record(self.program.steps)
        self._run()


class _Graphs:
    """What trunk and head share: programs by the shape of a batch."""

    def __init__(self, weights: ModelWeights, backend: CudaBackend) -> None:
        self.weights, self.config, self.backend = weights, weights.config, backend
        self.device, self.packing = backend.device, backend.packing
        self.kernels = backend.kernels(weights.config)
        self._recorded: dict[tuple[Any, ...], _Recorded] = {}

    def get(self, kind: str, rows: int, num_spans: int, end: int, build: Callable[[Program], None]) -> _Recorded:
        """A program for such a batch that sees up to `end` positions."""
        parts = 1
        while parts * PART < end:
            parts *= 2
        key = kind, rows, num_spans, parts
        found = self._recorded.pop(key, None)
        if found is None:
            found = _Recorded(Program(self.config, self.packing, rows, num_spans, parts), self.kernels)
            build(found.program)
            while len(self._recorded) >= MAX_RECORDED:
                self._recorded.pop(next(iter(self._recorded)))
        self._recorded[key] = found
        return found

    def product(self, head: CudaMatrix, rows: F32) -> F32:
        """Logits of post-norm rows [R, hidden]."""
        num_rows, hidden = len(rows), self.config.hidden

        def build(p: Program) -> None:
            p.buffer("given", (num_rows, hidden))
            ready = p.prepared("ready", hidden, num_rows, {head.format})
            p.step("prepare", (num_rows,), 256, p.address("given"), NOWHERE, hidden, ready.struct, shared=4 * hidden)
            build_logits(p, head, ready, num_rows)

        recorded = self.get("logits", num_rows, 1, 1, build)
        self.device.put(recorded.program.buffers["given"], rows.rows if isinstance(rows, DeviceRows) else rows)
        recorded.run([SpanStruct(num_rows=num_rows)], [0] * num_rows)
        return self.logits(recorded, head)

    def copy(self, recorded: _Recorded, name: str) -> F32:
        """A buffer as it is now: the next call writes over it."""
        return cast("F32", DeviceRows(self.device, self.device.copy(recorded.program.buffers[name])))

    def logits(self, recorded: _Recorded, head: CudaMatrix) -> F32:
        """What build_logits has left there."""
        buffers, device = recorded.program.buffers, self.device
        rows = device.copy(buffers["logits"][0][:, : head.outputs])
        return cast("F32", DeviceRows(device, rows, device.copy(buffers["choices"])))

    def tokens(self, batch: Sequence[HasRows]) -> list[int]:
        """As `embed` in products.cu takes them."""
        tokens = [token for rows in batch for token in numbered(rows)]
        if any(token >= self.config.vocabulary or (token < 0 and rows.memory.given is None) for rows in batch for token in rows.tokens):
            raise IndexError(f"a token is not one of {self.config.vocabulary}")
        return tokens


def build_trunk(p: Program, weights: ModelWeights, *, is_chunk: bool) -> None:
    """Steps of the trunk: post-norm hidden rows into the buffer `hidden` and where their sequences keep them, and if they are no chunk,
    what build_logits says."""
    c, rows = weights.config, p.rows
    x = p.device.address(p.buffer("x", (rows, c.hidden)))
    p.embed(weights.embedding, p.address("tokens"), x, rows)
    parts: Parts | None = None
    counts = [0, 0]
    for w in weights.layers:
        is_delta = isinstance(w.mixer, DeltaWeights)
        parts = p.layer(x, parts, w, counts[is_delta], is_chunk)
        counts[is_delta] += 1
    ready = p.prepared("hidden", c.hidden, rows, {weights.head.format}, keeps_floats="hidden")
    p.add_norm(x, parts, weights.norm, ready, rows)
    p.step("keep_hidden", (rows,), 256, p.address("spans"), p.address("span of"), p.address("hidden"), c.hidden)
    if is_chunk:
        return
    build_logits(p, weights.head, ready, rows)


def build_logits(p: Program, head: CudaMatrix, ready: Prepared, rows: int) -> None:
    """Steps of a vocabulary's head: the buffers `logits`, and `choices`, the highest of each row."""
    logits = p.product(head, ready, "logits", rows)
    p.buffer("choices", (rows,), np.int32)
    p.highest(logits, head.outputs, rows, p.address("choices"))


def build_head(p: Program, head: HeadBase, weights: ModelWeights, *, embedded_tokens: Any, picked: Any, num_picked: int) -> Prepared:
    """Steps of the MTP head over rows whose hidden rows are in the buffer `before`: outputs of the `picked` rows (None: all) into the
    buffer `out`, and made ready for the LM head."""
    c, rows, w = weights.config, p.rows, head.mtp
    embedded = p.device.address(p.buffer("embedded", (rows, c.hidden)))
    p.embed(weights.embedding, embedded_tokens, embedded, rows)
    both = p.prepared("both", 2 * c.hidden, rows, {w.fc.format})
    floats = p.packing.floats
    p.step(
        "pair_norm", (rows,), threads_for(c.hidden), embedded, p.address("before"), floats(w.embedding_norm), floats(w.hidden_norm),
        c_float(c.rms_eps), c.hidden, both.struct, shared=8 * c.hidden,
    )  # fmt: skip
    x = p.product(w.fc, both, "mtp x", rows).address
    parts = p.layer(x, None, w.layer, c.num_attention)
    all_out = p.prepared("all out", c.hidden, rows, set(), keeps_floats="all out")
    p.add_norm(x, parts, w.norm, all_out, rows)
    ready = p.prepared("out", c.hidden, num_picked, {head.head.format}, keeps_floats="out")
    out = p.address("all out")
    p.step("prepare", (num_picked,), threads_for(c.hidden), out, picked, c.hidden, ready.struct, shared=4 * c.hidden)
    return ready


class CudaTrunk(TrunkBase):
    def __init__(self, weights: ModelWeights, backend: CudaBackend) -> None:
        self.weights, self.operations_per_second = weights, backend.operations_per_second
        self._graphs = _Graphs(weights, backend)

    def logits(self, hidden: F32) -> F32:
        return self._graphs.product(self.weights.head, hidden)

    def _verify(self, batch: Sequence[Rows]) -> tuple[F32, F32]:
        spans, row = list[SpanStruct](), 0
        for rows in batch:
            memory = _sequence(rows.memory)
            spans.append(memory.span(rows.position, row, len(rows.tokens), base=memory.states.base_position))
            row += len(rows.tokens)
        recorded = self._run("verify", batch, spans, lambda p: build_trunk(p, self.weights, is_chunk=False))
        return self._graphs.copy(recorded, "hidden"), self._graphs.logits(recorded, self.weights.head)

    def _prefill(self, rows: Rows) -> F32:
        memory = _sequence(rows.memory)
        self._seek(memory, rows.position)
        span = memory.span(rows.position, 0, len(rows.tokens), is_chunk=True)
        recorded = self._run("chunk", [rows], [span], lambda p: build_trunk(p, self.weights, is_chunk=True))
        self._graphs.device.wait()
        return self._graphs.copy(recorded, "hidden")

    def _run(self, kind: str, batch: Sequence[Rows], spans: Sequence[SpanStruct], build: Callable[[Program], Any]) -> _Recorded:
        tokens = self._graphs.tokens(batch)
        end = max(rows.position + len(rows.tokens) for rows in batch)
        recorded = self._graphs.get(kind, len(tokens), len(spans), end, build)
        for rows in batch:
            rows.memory.recurrent.begin()
        recorded.run(spans, tokens)
        for rows in batch:
            rows.memory.recurrent.moved_to(rows.position)
        return recorded

    def freeze(self, memory: SequenceMemory, position: int) -> None:
        memory.check(position, 0, is_chunk=False)
        self._seek(_sequence(memory), position)
        memory.frozen = memory.snapshot()

    def _seek(self, memory: CudaSequence, position: int) -> None:
        states = memory.states
        states.check(position)
        if position != states.base_position:
            states.begin()
            if states.state_slots == 1:
                span = memory.span(position, 0, 0, base=states.base_position)
                self._graphs.get("replay", 0, 1, 1, self._build_replay).run([span], [])
        states.moved_to(position)

    def _build_replay(self, p: Program) -> None:
        deltas = [w.mixer for w in self.weights.layers if isinstance(w.mixer, DeltaWeights)]
        for number, w in enumerate(deltas):
            p.delta(w, number, Column(NOWHERE, 0), Column(NOWHERE, 0), Column(NOWHERE, 0), NOWHERE)

    def replay(self, log: RecurrentLog, num_rows: int) -> None:
        raise InternalBug("the device replays its logs itself")

    def _keep(self, batch: Sequence[Rows], hidden: F32) -> None:
        for rows in batch:
            _sequence(rows.memory).rows.written(rows.position, len(rows.tokens))


class CudaHead(HeadBase):
    def __init__(self, weights: ModelWeights, backend: CudaBackend) -> None:
        super().__init__(weights, backend)
        self._graphs, self._device, self._weights = _Graphs(weights, backend), backend.device, weights

    def forward(self, batch: Sequence[MtpRows]) -> F32:
        return self._run(batch, "all", list(range(sum(len(rows.tokens) for rows in batch))))[0]

    def last(self, batch: Sequence[MtpRows]) -> F32:
        return self._run(batch, "last", _ends(batch))[0]

    def guess(self, batch: Sequence[MtpRows]) -> tuple[F32, F32]:
        outputs, logits = self._run(batch, "guess", _ends(batch))
        assert logits is not None
        return outputs, logits

    def logits(self, outputs: F32) -> F32:
        return self._graphs.product(self.head, outputs)

    def _run(self, batch: Sequence[MtpRows], kind: str, picked: list[int]) -> tuple[F32, F32 | None]:
        device, hidden = self._device, self._weights.config.hidden
        tokens = self._graphs.tokens(batch)
        is_given = all(rows.hidden is not None for rows in batch)
        end = max(rows.position + len(rows.tokens) for rows in batch)

        def build(p: Program) -> None:
            p.buffer("before", (p.rows, hidden))
            p.buffer("picked", (len(picked),), np.int32)
            if not is_given:
                p.step("read_hidden", (p.rows,), 256, p.address("spans"), p.address("span of"), p.address("before"), hidden)
            ready = build_head(
                p, self, self._weights, embedded_tokens=p.address("tokens"), picked=p.address("picked"), num_picked=len(picked)
            )
            if kind == "guess":
                build_logits(p, self.head, ready, len(picked))

        recorded = self._graphs.get(f"{kind} {is_given}", len(tokens), len(batch), end, build)
        buffers, row, spans = recorded.program.buffers, 0, list[SpanStruct]()
        for rows in batch:
            memory, count = _sequence(rows.memory), len(rows.tokens)
            spans.append(memory.span(rows.position, row, count))
            row += count
        if is_given:
            row = 0
            for rows in batch:
                given = rows.hidden.rows if isinstance(rows.hidden, DeviceRows) else rows.hidden
                device.put(buffers["before"][row : row + len(rows.tokens)], given)
                row += len(rows.tokens)
        elif any(rows.hidden is not None for rows in batch):
            raise InternalBug("some hidden rows are given, and others are not")
        for rows in batch:
            if rows.hidden is None:
                _sequence(rows.memory).rows.check(rows.position - 1, len(rows.tokens))
        device.put(buffers["picked"], np.array(picked, np.int32))
        recorded.run(spans, tokens)
        outputs = self._graphs.copy(recorded, "out")
        if kind == "guess":
            return outputs, self._graphs.logits(recorded, self.head)
        device.wait()
        return outputs, None


def _ends(batch: Sequence[MtpRows]) -> list[int]:
    return [int(end) - 1 for end in np.cumsum([len(rows.tokens) for rows in batch])]


def _sequence(memory: SequenceMemory) -> CudaSequence:
    assert isinstance(memory, CudaSequence)
    return memory
