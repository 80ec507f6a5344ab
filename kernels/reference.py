"""The op table in plain NumPy float32: the oracle other backends are tested against, and a backend of its own.

Row invariance here: a product is one matrix-vector call a row, always of the same shape; reductions run over the last
axis of one row; a row attends over exactly the keys it may see; everything else is elementwise.
"""

from __future__ import annotations

from typing import cast

import numpy as np

from .backend import F32, DeltaHeads, DeltaInputs, Experts
from .formats.stored import Stored


def _sigmoid(x: F32) -> F32:
    return np.reciprocal(1 + np.exp(np.minimum(-x, np.float32(88))))  # exp(89) would overflow


def _softmax(x: F32) -> F32:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


class ReferenceBackend:
    """A matrix is kept as [inputs, outputs], C-contiguous: a row times it is then one BLAS gemv over whole cache lines,
    1.3 times faster for four rows than the transposed layout, and than one matrix-matrix product of four rows."""

    name = "reference"
    operations_per_second = 5e9
    instructions = "reference"

    def matrix(self, weight: Stored) -> F32:
        return np.ascontiguousarray(weight.values().T)

    def first_outputs(self, weight: F32, count: int) -> F32:
        return weight[:, :count]

    def embed(self, table: F32, ids: list[int]) -> F32:
        return np.ascontiguousarray(table[:, ids].T)

    def linear(self, x: F32, weight: F32) -> F32:
        # Broadcast over rows, matmul calls gemv once for each: no row can see another, or how many there are.
        return np.matmul(x[:, None, :], weight)[:, 0]

    def linear_chunk(self, x: F32, weight: F32) -> F32:
        return np.matmul(x, weight)

    def rms_norm(self, x: F32, weight: F32, eps: float) -> F32:
        return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + eps) * weight

    def gated_rms_norm(self, x: F32, gate: F32, weight: F32, eps: float) -> F32:
        return self.rms_norm(x, weight, eps) * gate * _sigmoid(gate)

    def swiglu(self, gate: F32, up: F32) -> F32:
        return gate * _sigmoid(gate) * up

    def sigmoid_gate(self, x: F32, gate: F32) -> F32:
        return x * _sigmoid(gate)

    def causal_conv(self, columns: F32, weight: F32) -> F32:
        rows = len(columns) - len(weight) + 1
        total = columns[:rows] * weight[0]
        for tap in range(1, len(weight)):
            total += columns[tap : tap + rows] * weight[tap]
        return total * _sigmoid(total)

    def delta_inputs(self, qkv: F32, b: F32, a: F32, log_decay: F32, bias: F32, heads: DeltaHeads) -> DeltaInputs:
        key_heads, value_heads, dk, dv, is_tiled = heads
        rows, keys = len(qkv), key_heads * dk
        qk = qkv[:, : 2 * keys].reshape(rows, 2, key_heads, dk)
        qk = qk / np.sqrt(np.square(qk).sum(-1, keepdims=True) + 1e-6)
        ratio = value_heads // key_heads
        qk = np.tile(qk, (1, 1, ratio, 1)) if is_tiled else np.repeat(qk, ratio, axis=2)
        g = log_decay * np.logaddexp(np.float32(0), a + bias)
        v = qkv[:, 2 * keys :].reshape(rows, value_heads, dv)
        return DeltaInputs(qk[:, 0] * np.float32(dk**-0.5), np.ascontiguousarray(qk[:, 1]), v, g, np.exp(g), _sigmoid(b))

    def delta_steps(self, state: F32, x: DeltaInputs) -> F32:
        out = np.empty_like(x.v)
        for i in range(len(out)):
            self.delta_replay(state, x.k[i], x.v[i], x.decay[i], x.beta[i])
            out[i] = np.matmul(x.q[i][:, None, :], state)[:, 0]
        return out

    def delta_replay(self, state: F32, k: F32, v: F32, decay: F32, beta: F32) -> None:
        state *= decay[..., None, None]
        read = np.matmul(k[..., None, :], state)
        write = beta[..., None, None] * (v[..., None, :] - read)
        state += k[..., :, None] * write

    def delta_chunk(self, state: F32, x: DeltaInputs) -> F32:
        q, k, v = (np.ascontiguousarray(part.swapaxes(0, 1)) for part in (x.q, x.k, x.v))  # [Hv, C, .]
        beta = x.beta.T[..., None]
        total = x.g.T.cumsum(-1)
        lower = np.tri(len(x.beta), dtype=np.float32)
        difference = (total[:, :, None] - total[:, None, :]) * lower
        decay = np.exp(difference) * lower
        since_start = np.exp(total)[..., None]
        weighted = beta * k
        # Row i's write is beta_i (v_i - what rows before it and the state hold for k_i): a unit triangular system.
        system = np.matmul(weighted, k.swapaxes(1, 2)) * decay
        diagonal = np.arange(len(x.beta))
        system[:, diagonal, diagonal] = 1
        right: F32 = np.concatenate([beta * v, weighted * since_start], -1)
        solved = cast("F32", np.linalg.solve(system, right))
        write = solved[..., : v.shape[-1]] - np.matmul(solved[..., v.shape[-1] :], state)
        out = np.matmul(q * since_start, state) + np.matmul(np.matmul(q, k.swapaxes(1, 2)) * decay, write)
        last = total[:, -1:, None]
        state *= np.exp(last)
        state += np.matmul((k * np.exp(last - total[..., None])).swapaxes(1, 2), write)
        return np.ascontiguousarray(out.swapaxes(0, 1))

    def rotate(self, x: F32, cos: F32, sin: F32) -> F32:
        half = cos.shape[-1]
        cos, sin = cos[:, None], sin[:, None]
        first, second = x[..., :half], x[..., half : 2 * half]
        out = x.copy()
        out[..., :half] = first * cos - second * sin
        out[..., half : 2 * half] = second * cos + first * sin
        return out

    def attention(self, q: F32, keys: F32, values: F32, position: int) -> F32:
        kv, _, dim = keys.shape
        out = np.empty_like(q)
        q = q.reshape(len(q), kv, -1, dim) * np.float32(dim**-0.5)
        for i in range(len(q)):
            seen = position + i + 1
            share = _softmax(np.matmul(q[i], keys[:, :seen].swapaxes(1, 2)))
            out[i] = np.matmul(share, values[:, :seen]).reshape(-1, dim)
        return out

    def attention_chunk(self, q: F32, keys: F32, values: F32, position: int) -> F32:
        (kv, _, dim), (rows, heads, _) = keys.shape, q.shape
        seen = position + rows
        q = (q * np.float32(dim**-0.5)).swapaxes(0, 1).reshape(kv, -1, dim)  # [KV, groups * C, D]
        scores = np.matmul(q, keys[:, :seen].swapaxes(1, 2)).reshape(heads, rows, seen)
        scores[:, ~np.tri(rows, seen, position, dtype=np.bool_)] = -np.inf
        out = np.matmul(_softmax(scores).reshape(kv, -1, seen), values[:, :seen])
        return np.ascontiguousarray(out.reshape(heads, rows, dim).swapaxes(0, 1))

    def mixture(self, x: F32, router: F32, experts: Experts) -> F32:
        shares = _softmax(router)
        chosen = np.argsort(-shares, axis=-1, kind="stable")[:, : experts.num_used]
        weights = np.take_along_axis(shares, chosen, -1)
        weights /= weights.sum(-1, keepdims=True)
        out = np.zeros_like(x)
        # Experts in ascending order: a row adds its own in the same order whoever else uses them.
        for expert in np.unique(chosen):
            rows, rank = np.nonzero(chosen == expert)
            gate, up = self.linear(x[rows], experts.gate[expert]), self.linear(x[rows], experts.up[expert])
            y = self.linear(self.swiglu(gate, up), experts.down[expert])
            out[rows] += weights[rows, rank, None] * y
        return out
