"""A model graph as a flat program for the C kernels (program.c): one call a forward pass."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from ..backend import F32
from ..model.config import ModelConfig
from ..model.weights import AttentionWeights, DeltaWeights, DenseWeights, LayerWeights
from .library import CallStruct, MatrixStruct, OpStruct, SizesStruct, SpanStruct
from .matrices import CpuBackend, CpuMatrix

EMBED, NORM, LINEAR, SWIGLU, DELTA, COLUMNS, KEYS, ATTEND, ROUTE, EXPERTS_UP, EXPERTS_DOWN, MIX = range(12)


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
        self._alive: list[Any] = []  # what C holds the addresses of

    def buffer(self, name: str, width: int) -> int:
        return self._buffers.setdefault((name, width), len(self._buffers))

    def op(
        self, code: int, inputs: Sequence[int], outputs: Sequence[int], matrices: Sequence[CpuMatrix] = (), weights: Sequence[F32] = (),
        layer: int = 0, adds: bool = False, offset: int = 0, num_used: int = 0,
    ) -> None:  # fmt: skip
        structs = (MatrixStruct * len(matrices))(*(MatrixStruct(m.data.ctypes.data, m.format, m.outputs, m.inputs, 0) for m in matrices))
        floats = [np.ascontiguousarray(w, np.float32) for w in weights]
        op = OpStruct(code=code, layer=layer, num_matrices=len(matrices), adds=adds, offset=offset, num_used=num_used)
        op.inputs[: len(inputs)], op.outputs[: len(outputs)] = list(inputs), list(outputs)
        op.weights[: len(floats)] = [w.ctypes.data for w in floats]
        if matrices:
            op.matrices = structs
        self._alive += [structs, floats, matrices]
        self._ops.append(op)

    def linear(self, x: int, *products: tuple[CpuMatrix, int], adds: bool = False) -> None:
        """Products of one input with several matrices, each into its buffer."""
        self.op(LINEAR, [x], [to for _, to in products], [m for m, _ in products], adds=adds)

    def layer(self, x: int, w: LayerWeights, number: int) -> None:
        """One layer, on the residual stream in buffer `x`; `number` counts the layers of its kind."""
        c = self.config
        u = self.buffer("u", c.hidden)
        self.op(NORM, [x], [u], weights=[w.input_norm])
        if isinstance(w.mixer, DeltaWeights):
            self._delta(x, u, w.mixer, number)
        else:
            self._attention(x, u, w.mixer, number)
        self.op(NORM, [x], [u], weights=[w.ffn_norm])
        if isinstance(w.ffn, DenseWeights):
            self.linear(self._dense(u, w.ffn), (w.ffn.down, x), adds=True)
            return
        experts, num_experts, used = w.ffn.experts, len(w.ffn.experts.down), w.ffn.experts.num_used
        router, gate = self.buffer("router", num_experts), self.buffer("shared gate", 1)
        routes, shared = self.buffer("routes", 2 * used), self.buffer("shared", c.hidden)
        of = [m for i in range(num_experts) for m in (experts.gate[i], experts.up[i], experts.down[i])]
        h, y = self.buffer("experts", used * of[0].outputs), self.buffer("experts down", used * c.hidden)
        self.linear(u, (w.ffn.router, router), (w.ffn.shared_gate, gate))
        self.op(ROUTE, [router], [routes], num_used=used)
        self.op(EXPERTS_UP, [u, routes], [h], of, num_used=used)
        self.op(EXPERTS_DOWN, [h, routes], [y], of, num_used=used)
        self.linear(self._dense(u, w.ffn.shared), (w.ffn.shared.down, shared))
        self.op(MIX, [y, routes, shared, gate], [x], num_used=used)

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

    def _attention(self, x: int, u: int, w: AttentionWeights, number: int) -> None:
        c = self.config
        q, k, v = (self.buffer(name, m.outputs) for name, m in (("q", w.q), ("k", w.k), ("v", w.v)))
        out = self.buffer("mixed", c.heads * c.head_dim)
        self.linear(u, (w.q, q), (w.k, k), (w.v, v))
        self.op(KEYS, [q, k, v], [], weights=[w.q_norm, w.k_norm], layer=number)
        self.op(ATTEND, [q], [out], layer=number)
        self.linear(out, (w.out, x), adds=True)

    def replay(self, w: DeltaWeights, number: int) -> None:
        """Moves a layer's state over the kept rows of its log, and computes none."""
        self.op(DELTA, [], [], weights=[w.conv, w.log_decay, w.dt_bias, w.norm], layer=number)

    @cached_property
    def _frozen(self) -> tuple[ctypes.Array[OpStruct], npt.NDArray[np.int32]]:
        """Steps and widths, once all have been said."""
        return (OpStruct * len(self._ops))(*self._ops), np.array([width for _, width in self._buffers], np.int32)

    def run(
        self, num_rows: int, given: Mapping[int, F32], tokens: Sequence[int] = (), rotary: tuple[F32, F32] | None = None,
        spans: Sequence[SpanStruct] = (),
    ) -> None:  # fmt: skip
        """Runs all steps over `num_rows` rows. `given` are buffers of the caller's, [rows, width], read or written."""
        ops, widths = self._frozen
        addresses = (ctypes.c_void_p * len(widths))()
        for buffer, array in given.items():
            addresses[buffer] = array.ctypes.data
        ids = np.array(tokens, np.int32)
        cos, sin = (np.ascontiguousarray(part) for part in rotary) if rotary is not None else (None, None)
        call = CallStruct(
            ctypes.pointer(self._sizes), ops, len(ops), len(widths), widths.ctypes.data,
            ids.ctypes.data, cos.ctypes.data if cos is not None else None, sin.ctypes.data if sin is not None else None,
            (SpanStruct * len(spans))(*spans), len(spans), num_rows, addresses,
        )  # fmt: skip
        self._backend.library.run(call, self._backend.num_threads)
