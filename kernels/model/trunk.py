"""The trunk as a graph over the op table: prefill of one chunk, and verify of several sequences' rows at once.

Shapes as in backend.py. Formulas: `modeling_qwen3_5.py` and `modeling_qwen3_next.py` of transformers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ...core.begun import Mark
from ...core.errors import InternalBug
from ..backend import F32, Backend, DeltaInputs, Matrix
from ..sampling import Choices
from .drafts import NextRows
from .inputs import HasRows, Rotary, inputs_of
from .memory import SequenceMemory
from .pages import KeyValues
from .recurrent import RecurrentLog
from .weights import AttentionWeights, DeltaWeights, DenseWeights, LayerWeights, ModelWeights, MoeWeights


@dataclass(frozen=True, slots=True)
class Rows:
    """Consecutive tokens of one sequence, from an absolute position."""

    memory: SequenceMemory
    position: int
    tokens: tuple[int, ...]


class LayerGraph:
    """What every layer of the trunk and the MTP head shares: `linear` decides whether rows are a chunk or single."""

    def __init__(self, weights: ModelWeights, backend: Backend) -> None:
        self.weights, self.backend, self.config = weights, backend, weights.config
        c = self.config
        self.rotary = Rotary(c.rotary_dim, c.rope_theta, c.mrope_sections)

    def embed(self, batch: Sequence[HasRows]) -> F32:
        """What goes in for each row of a batch, [R, hidden]."""
        tokens, given = inputs_of(batch)
        if given is None:
            return self.backend.embed(self.weights.embedding, tokens)
        is_given = np.array(tokens) < 0
        x = np.empty((len(tokens), self.config.hidden), np.float32)
        x[is_given] = given
        if not is_given.all():
            x[~is_given] = self.backend.embed(self.weights.embedding, [token for token in tokens if token >= 0])
        return x

    def linear(self, is_chunk: bool) -> Callable[[F32, Matrix], F32]:
        return self.backend.linear_chunk if is_chunk else self.backend.linear

    def layer(self, x: F32, w: LayerWeights, mix: Callable[[F32], F32], is_chunk: bool) -> F32:
        x = x + mix(self.backend.rms_norm(x, w.input_norm, self.config.rms_eps))
        return x + self.ffn(self.backend.rms_norm(x, w.ffn_norm, self.config.rms_eps), w.ffn, is_chunk)

    def ffn(self, u: F32, w: DenseWeights | MoeWeights, is_chunk: bool) -> F32:
        linear = self.linear(is_chunk)
        if isinstance(w, DenseWeights):
            return linear(self.backend.swiglu(linear(u, w.gate), linear(u, w.up)), w.down)
        shared = self.backend.sigmoid_gate(self.ffn(u, w.shared, is_chunk), linear(u, w.shared_gate))
        return self.backend.mixture(u, linear(u, w.router), w.experts) + shared

    def attention(
        self, u: F32, w: AttentionWeights, rotary: tuple[F32, F32], spans: Sequence[tuple[KeyValues, int, int]], layer: int, is_chunk: bool
    ) -> F32:
        """`rotary` are the rows' cosines and sines; `spans` says, in their order: whose keys and values, from which position, how many."""
        c, linear, backend = self.config, self.linear(is_chunk), self.backend
        both = linear(u, w.q).reshape(len(u), c.heads, 2, c.head_dim)
        q = backend.rms_norm(np.ascontiguousarray(both[:, :, 0]), w.q_norm, c.rms_eps)
        k = backend.rms_norm(linear(u, w.k).reshape(len(u), c.kv_heads, c.head_dim), w.k_norm, c.rms_eps)
        v = linear(u, w.v).reshape(len(u), c.kv_heads, c.head_dim)
        q, k = backend.rotate(q, *rotary), backend.rotate(k, *rotary)
        attend = backend.attention_chunk if is_chunk else backend.attention
        out, start = np.empty_like(q), 0
        for memory, position, count in spans:
            rows = slice(start, start + count)
            keys, values = memory.write(layer, position, k[rows], v[rows])
            out[rows] = attend(q[rows], keys, values, position)
            start += count
        gated = backend.sigmoid_gate(out, both[:, :, 1]).reshape(len(u), -1)
        return linear(gated, w.out)


class TrunkBase(ABC):
    """What the trunks of all backends have in common."""

    weights: ModelWeights
    operations_per_second: float
    #: Marks what was begun on a device; None where all is done when a call returns.
    marker: Callable[[], Mark] | None = None

    @property
    def num_prepared(self) -> int:
        """Shapes of work that have been made ready so far, each of which took long once."""
        return 0

    def verify(self, batch: Sequence[Rows]) -> tuple[F32, F32]:
        """Computes every sequence's rows from its position, rolling back to it first. Each row's results have the same
        bits whatever else is in the batch. Returns logits [R, V] and post-norm hidden rows [R, hidden], in batch order.
        PositionLost, before anything is written, when a memory cannot go to the position asked for."""
        for rows in batch:
            rows.memory.check(rows.position, len(rows.tokens), is_chunk=False)
        hidden, logits = self._verify(batch)
        for rows in batch:
            rows.memory.recurrent.extend(len(rows.tokens))
        self._keep(batch, hidden)
        return logits, hidden

    def verify_next(self, batch: Sequence[NextRows], choices: Choices, drafts: object) -> F32 | None:
        """Begins the verify behind the one that `choices` were made of, before anybody has read what that brings; `drafts` are those made
        since, where a device has them. Returns the logits [R, V] of its rows; None where that cannot be begun. Memory hears of them by
        `settle`, once it is known where they stand."""
        return None

    def settle(self, memory: SequenceMemory, position: int, num_rows: int) -> None:
        """So many rows of a sequence, begun by `verify_next`, turn out to stand at `position`."""
        raise InternalBug("no rows have been begun")

    def prefill(self, rows: Rows, is_last: bool) -> F32 | None:
        """Computes one chunk of a prompt. Returns the logits [1, V] after its last row when it is the prompt's last."""
        rows.memory.check(rows.position, len(rows.tokens), is_chunk=True)
        hidden = self._prefill(rows)
        rows.memory.recurrent.advance(len(rows.tokens))
        self._keep([rows], hidden)
        return self.logits(hidden[-1:]) if is_last else None

    def freeze(self, memory: SequenceMemory, position: int, *, is_whole: bool) -> None:
        """Copies all of a sequence as it is at `position`, where it goes on from then, or takes a checkpoint there. PositionLost as in
        `verify`."""
        memory.check(position, 0, is_chunk=False)
        memory.recurrent.seek(position, self.replay)
        memory.freeze(is_whole=is_whole)

    def seconds(self, num_rows: int) -> float:
        """About how long so many rows take."""
        return num_rows * self.weights.num_parameters / self.operations_per_second

    @abstractmethod
    def logits(self, hidden: F32) -> F32:
        """[R, V] of post-norm hidden rows."""

    @abstractmethod
    def _verify(self, batch: Sequence[Rows]) -> tuple[F32, F32]:
        """Goes to every sequence's position and computes its rows. Returns post-norm hidden rows [R, hidden] and logits [R, V]."""

    @abstractmethod
    def _prefill(self, rows: Rows) -> F32:
        """Goes to the position and computes a chunk there. Returns post-norm hidden rows [C, hidden]."""

    @abstractmethod
    def replay(self, log: RecurrentLog, num_rows: int) -> None:
        """See recurrent.Replay."""

    def _keep(self, batch: Sequence[Rows], hidden: F32) -> None:
        """Puts post-norm hidden rows where their sequences keep them."""
        start = 0
        for rows in batch:
            rows.memory.hidden.write(rows.position, hidden[start : start + len(rows.tokens)])
            start += len(rows.tokens)


class Trunk(LayerGraph, TrunkBase):
    """The graph, one op of the table after another."""

    def __init__(self, weights: ModelWeights, backend: Backend) -> None:
        super().__init__(weights, backend)
        self.operations_per_second = backend.operations_per_second
        self._deltas = [layer.mixer for layer in weights.layers if isinstance(layer.mixer, DeltaWeights)]

    def logits(self, hidden: F32) -> F32:
        return self.backend.linear(hidden, self.weights.head)

    def _verify(self, batch: Sequence[Rows]) -> tuple[F32, F32]:
        hidden = self._forward(batch, is_chunk=False)
        return hidden, self.logits(hidden)

    def _prefill(self, rows: Rows) -> F32:
        return self._forward([rows], is_chunk=True)

    def _forward(self, batch: Sequence[Rows], is_chunk: bool) -> F32:
        for rows in batch:
            rows.memory.recurrent.seek(rows.position, self.replay)
        x, rotary = self.embed(batch), self.rotary(batch)
        spans = [(rows.memory.trunk, rows.position, len(rows.tokens)) for rows in batch]
        num_delta = num_attention = 0
        for w in self.weights.layers:
            if isinstance(mixer := w.mixer, DeltaWeights):
                delta, at = mixer, num_delta
                x = self.layer(x, w, lambda u, w=delta, i=at: self._delta(u, w, batch, i, is_chunk), is_chunk)
                num_delta += 1
            else:
                full, at = mixer, num_attention
                x = self.layer(x, w, lambda u, w=full, i=at: self.attention(u, w, rotary, spans, i, is_chunk), is_chunk)
                num_attention += 1
        return self.backend.rms_norm(x, self.weights.norm, self.config.rms_eps)

    def replay(self, log: RecurrentLog, num_rows: int) -> None:
        columns, b, a = log.all_columns[:, : log.window + num_rows], log.b[:, :num_rows], log.a[:, :num_rows]
        for layer, state in enumerate(log.states):
            x = self._inputs(layer, columns[layer], b[layer], a[layer])
            for row in range(num_rows):
                self.backend.delta_replay(state, x.k[row], x.v[row], x.decay[row], x.beta[row])

    def _delta(self, u: F32, w: DeltaWeights, batch: Sequence[Rows], layer: int, is_chunk: bool) -> F32:
        c, linear, backend = self.config, self.linear(is_chunk), self.backend
        qkv, b, a = linear(u, w.qkv), linear(u, w.b), linear(u, w.a)
        out, start = np.empty((len(u), c.value_heads, c.value_dim), np.float32), 0
        for rows in batch:
            store, span = rows.memory.recurrent, slice(start, start + len(rows.tokens))
            columns = store.chunk_columns(layer, qkv[span]) if is_chunk else store.columns(layer, qkv[span])
            x = self._inputs(layer, columns, b[span], a[span])
            out[span] = store.chunk(layer, x, backend) if is_chunk else store.steps(layer, x, b[span], a[span], backend)
            start = span.stop
        z = linear(u, w.z).reshape(out.shape)
        return linear(backend.gated_rms_norm(out, z, w.norm, c.rms_eps).reshape(len(u), -1), w.out)

    def _inputs(self, layer: int, columns: F32, b: F32, a: F32) -> DeltaInputs:
        """What the recurrence of gated delta net `layer` consumes, from columns with the window first [width - 1 + R, channels], b and
        a [R, Hv]."""
        c, w = self.config, self._deltas[layer]
        convolved = self.backend.causal_conv(columns, w.conv)
        return self.backend.delta_inputs(convolved, b, a, w.log_decay, w.dt_bias, c.delta_heads)
