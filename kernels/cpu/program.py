"""A model graph as a flat program for the C kernels (program.c): one call a forward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from ctypes import c_int32, c_void_p, pointer
from functools import cached_property
from typing import Any

import numpy as np

from ..backend import F32
from ..model.config import ModelConfig
from ..model.inputs import Angles
from ..model.weights import AttentionWeights, DeltaWeights, DenseWeights, LayerWeights
from .library import CallStruct, Drafts, HeadBuffers, MatrixStruct, OpStruct, SizesStruct, SpanStruct, WantedStruct, address
from .matrices import CpuBackend, CpuMatrix

EMBED, NORM, LINEAR, SWIGLU, DELTA, COLUMNS, KEYS, ATTEND, ROUTE, EXPERTS_UP, EXPERTS_DOWN, MIX, LAST = range(13)


class Program:
    """Steps over named buffers [rows, width]. A buffer of the same name and width is the same memory."""

    def __init__(self, config: ModelConfig, backend: CpuBackend) -> None:
        self.config, self._backend = config, backend
        c = config
        self._sizes = SizesStruct(
            c.hidden, c.heads, c.kv_heads, c.head_dim, c.rotary_dim, c.key_heads, c.value_heads, c.key_dim, c.value_dim, c.conv_width,
            c.num_delta, c.is_tiled, c.rms_eps,
        )  # fmt: skip
        self._buffers: dict[tuple[str, int], int] = {}
        self._ops: list[OpStruct] = []
        self._is_last, self._num_ids = False, 0
        self._alive: list[Any] = []  # what C holds the addresses of

    def buffer(self, name: str, width: int) -> int:
        return self._buffers.setdefault((name, width), len(self._buffers))

    def op(
        self, code: int, inputs: Sequence[int], outputs: Sequence[int], matrices: Sequence[CpuMatrix] = (), weights: Sequence[F32] = (),
        layer: int = 0, adds: bool = False, offset: int = 0, num_used: int = 0,
    ) -> None:  # fmt: skip
        structs = (MatrixStruct * len(matrices))(*(MatrixStruct(address(m.data), m.format, m.outputs, m.inputs, 0) for m in matrices))
        floats = [np.ascontiguousarray(w, np.float32) for w in weights]
        op = OpStruct(code=code, layer=layer, num_matrices=len(matrices), adds=adds, offset=offset, num_used=num_used)
        op.is_last = self._is_last
        op.inputs[: len(inputs)], op.outputs[: len(outputs)] = list(inputs), list(outputs)
        op.weights[: len(floats)] = [address(w) for w in floats]
        if matrices:
            op.matrices = structs
        if code == EMBED:
            self._num_ids = matrices[0].outputs
        self._alive += [structs, floats, matrices]
        self._ops.append(op)

    def linear(self, x: int, *products: tuple[CpuMatrix, int], adds: bool = False) -> None:
        """Products of one input with several matrices, each into its buffer."""
        self.op(LINEAR, [x], [to for _, to in products], [m for m, _ in products], adds=adds)

    def last(self, *buffers: int) -> list[int]:
        """The last row of each sequence, of each buffer, in a buffer of its own; what follows computes those rows alone."""
        widths = {number: width for (_, width), number in self._buffers.items()}
        kept = [self.buffer(f"last {buffer}", widths[buffer]) for buffer in buffers]
        self.op(LAST, buffers, kept, num_used=len(buffers))
        self._is_last = True
        return kept

    def layer(self, x: int, w: LayerWeights, number: int, is_last: bool = False) -> int:
        """One layer, on the residual stream in buffer `x`; `number` counts the layers of its kind. `is_last`: of the last row of each
        sequence only, once all keys and values are written. Returns the buffer of the residual stream."""
        c = self.config
        u = self.buffer("u", c.hidden)
        self.op(NORM, [x], [u], weights=[w.input_norm])
        if isinstance(w.mixer, DeltaWeights):
            self._delta(x, u, w.mixer, number)
        else:
            x = self._attention(x, u, w.mixer, number, is_last)
        u = self.buffer("u of the last" if is_last else "u", c.hidden)
        self.op(NORM, [x], [u], weights=[w.ffn_norm])
        if isinstance(w.ffn, DenseWeights):
            self.linear(self._dense(u, w.ffn), (w.ffn.down, x), adds=True)
            return x
        experts, num_experts, used = w.ffn.experts, len(w.ffn.experts.down), w.ffn.experts.num_used
        router, gate = self.buffer("router", num_experts), self.buffer("shared gate", 1)
        routes, shared = self.buffer("routes", 2 * used), self.buffer("shared", c.hidden)
        of = [m for i in range(num_experts) for m in (experts.gate[i], experts.up[i], experts.down[i])]
        h, y = self.buffer("experts", used * of[0].outputs), self.buffer("experts down", used * c.hidden)
        self.linear(u, (w.ffn.router, router), (w.ffn.shared_gate, gate))
        self.op(ROUTE, [router], [routes], num_used=used)
        self.op(EXPERTS_UP, [u], [h], of, num_used=used)
        self.op(EXPERTS_DOWN, [h], [y], of, num_used=used)
        self.linear(self._dense(u, w.ffn.shared), (w.ffn.shared.down, shared))
        self.op(MIX, [y, routes, shared, gate], [x], num_used=used)
        return x

    def _dense(self, u: int, w: DenseWeights) -> int:
        gate, up = self.buffer("gate", w.gate.outputs), self.buffer("up", w.up.outputs)
        self.linear(u, (w.gate, gate), (w.up, up))
        self.op(SWIGLU, [gate, up], [gate])
        return gate

    def _delta(self, x: int, u: int, w: DeltaWeights, number: int) -> None:
        c = self.config
        values = c.value_heads * c.value_dim
        qkv, z, out = self.buffer("qkv", c.channels), self.buffer("z", values), self.buffer("mixed", values)
        b, a = self.buffer("b", c.value_heads), self.buffer("a", c.value_heads)
        self.linear(u, (w.qkv, qkv), (w.z, z), (w.b, b), (w.a, a))
        self.op(DELTA, [qkv, b, a, z], [out], weights=[w.conv, w.log_decay, w.dt_bias, w.norm], layer=number)
        self.op(COLUMNS, [qkv, b, a], [], layer=number)
        self.linear(out, (w.out, x), adds=True)

    def _attention(self, x: int, u: int, w: AttentionWeights, number: int, is_last: bool) -> int:
        c = self.config
        q, k, v = (self.buffer(name, m.outputs) for name, m in (("q", w.q), ("k", w.k), ("v", w.v)))
        out = self.buffer("mixed", c.heads * c.head_dim)
        self.linear(u, (w.k, k), (w.v, v), *([] if is_last else [(w.q, q)]))
        self.op(KEYS, [k, v], [], weights=[w.k_norm], layer=number)
        if is_last:
            x, u = self.last(x, u)
            self.linear(u, (w.q, q))
        self.op(ATTEND, [q], [out], weights=[w.q_norm], layer=number)
        self.linear(out, (w.out, x), adds=True)
        return x

    def replay(self, w: DeltaWeights, number: int) -> None:
        """Moves a layer's state over the kept rows of its log, and computes none."""
        self.op(DELTA, [], [], weights=[w.conv, w.log_decay, w.dt_bias, w.norm], layer=number)

    @cached_property
    def _call(self) -> CallStruct:
        """What is the same in every call, once all steps have been said."""
        ops, widths = (OpStruct * len(self._ops))(*self._ops), (c_int32 * len(self._buffers))(*(width for _, width in self._buffers))
        self._alive += [ops, widths]
        return CallStruct(pointer(self._sizes), ops, len(ops), len(widths), widths)

    def run(
        self, num_rows: int, given: Mapping[int, F32], inputs: tuple[Sequence[int], F32 | None] = ((), None),
        angles: Angles | None = None, spans: Sequence[SpanStruct] = (),
    ) -> None:  # fmt: skip
        """Runs all steps over `num_rows` rows, whose `inputs` are as in model/inputs.py. `given` are buffers of the caller's, [rows,
        width], read or written; they, and the tables of `angles`, are C-contiguous. IndexError when a token has no embedding,
        MemoryError: then nothing has been touched."""
        self._backend.library.run(self._prepared(num_rows, given, inputs, angles, spans), self._backend.num_threads)

    def draft(
        self, num_rows: int, hidden: tuple[int, F32], inputs: tuple[Sequence[int], F32 | None], angles: Angles, spans: Sequence[SpanStruct],
        out: int, logits: int, wanted: Sequence[WantedStruct],
    ) -> list[Drafts]:  # fmt: skip
        """Runs a head over rows as `run` does, with angles by position, and on from its own outputs: see forerun_draft in api.h."""
        buffer, rows = hidden
        call = self._prepared(num_rows, {buffer: rows}, inputs, angles, spans)
        return self._backend.library.draft(call, self._backend.num_threads, HeadBuffers(buffer, out, logits), wanted)

    def _prepared(
        self, num_rows: int, given: Mapping[int, F32], inputs: tuple[Sequence[int], F32 | None], angles: Angles | None,
        spans: Sequence[SpanStruct],
    ) -> CallStruct:  # fmt: skip
        call = CallStruct.from_buffer_copy(self._call)  # other threads may be calling, too
        addresses = (c_void_p * call.num_buffers)()
        for buffer, array in given.items():
            addresses[buffer] = address(array)
        tokens, rows = inputs
        num_given = len(rows) if rows is not None else 0
        if any(not -num_given <= token < self._num_ids for token in tokens):  # C would read what is not there
            raise IndexError(f"a token is not one of {self._num_ids}")
        ids, of = (c_int32 * len(tokens))(*tokens), (SpanStruct * len(spans))(*spans)
        call.tokens, call.spans, call.num_spans, call.num_rows, call.given = ids, of, len(spans), num_rows, addresses
        if rows is not None:
            call.rows = address(rows)
        if angles is not None:
            call.cos, call.sin, call.by_position = address(angles.cos), address(angles.sin), angles.by_position
        return call
