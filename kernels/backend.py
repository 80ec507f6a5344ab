"""The op table: everything a model graph may ask of a backend, and nothing else.

Shapes use these names: R rows (tokens), C rows of one prefill chunk, H query heads, KV key-value heads, D head dim,
Hv value heads, dk and dv key and value dims of a gated delta net head, V vocabulary. Everything is float32.

Row invariance is part of the table: an op without `chunk` in its name gives each row the same bits whatever other rows
stand beside it. A `chunk` op works on consecutive rows of one sequence, and its bits may depend on which.
The formulas are those of Qwen3-Next and Qwen3.5 (Hugging Face `modeling_qwen3_5.py`; gated delta rule: Yang et al. 2024,
arXiv:2412.06464).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from .formats.stored import Stored

F32 = npt.NDArray[np.float32]
#: A matrix in the layout its backend wants; opaque to the graphs.
Matrix = Any


@dataclass(frozen=True, slots=True)
class DeltaInputs:
    """What the gated delta rule consumes, row by row: q and k [R, Hv, dk] (normalised, q scaled, key heads repeated for
    their value heads), v [R, Hv, dv], g, decay = exp(g) and beta [R, Hv]. A replay needs k, v, decay and beta."""

    q: F32
    k: F32
    v: F32
    g: F32
    decay: F32
    beta: F32


class DeltaHeads(NamedTuple):
    """Heads of a gated delta net. Value head h reads key head h // (Hv / Hk), or h mod Hk if they are tiled, as GGUF has them."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    is_tiled: bool


@dataclass(frozen=True, slots=True)
class Experts:
    """Routed experts of one layer: `gate[e]` and `up[e]` are [I, hidden], `down[e]` [hidden, I]."""

    gate: list[Matrix]
    up: list[Matrix]
    down: list[Matrix]
    num_used: int


#: Raised, here and in cpu/api.h, whenever kernels give other bits than before.
ARITHMETIC = 2


class MatrixMaker(Protocol):
    """The part of a backend that weights are loaded for."""

    name: str
    #: rough multiply-adds a second, for telling long work from short
    operations_per_second: float

    @property
    def instructions(self) -> str:
        """What bits depend on besides weights and tokens, as far as this program decides it: not what libraries of the system do. Where it
        differs, nobody goes on from what another has computed."""
        ...

    def matrix(self, weight: Stored) -> Matrix:
        """Takes in a weight [outputs, inputs]."""
        ...

    def first_outputs(self, weight: Matrix, count: int) -> Matrix:
        """A weight's first `count` outputs, sharing its memory."""
        ...


class Backend(MatrixMaker, Protocol):
    """What the eager graphs of trunk.py and mtp.py run on."""

    def embed(self, table: Matrix, ids: list[int]) -> F32:
        """Rows `ids` of a table [V, hidden]: [R, hidden]."""
        ...

    def linear(self, x: F32, weight: Matrix) -> F32:
        """x [R, inputs] times the weight: [R, outputs]. Row-invariant."""
        ...

    def linear_chunk(self, x: F32, weight: Matrix) -> F32:
        """The same product for a prefill chunk."""
        ...

    def rms_norm(self, x: F32, weight: F32, eps: float) -> F32:
        """x / sqrt(mean(x^2) + eps) * weight over the last axis."""
        ...

    def gated_rms_norm(self, x: F32, gate: F32, weight: F32, eps: float) -> F32:
        """rms_norm(x) * silu(gate), all of one shape."""
        ...

    def swiglu(self, gate: F32, up: F32) -> F32:
        """silu(gate) * up."""
        ...

    def sigmoid_gate(self, x: F32, gate: F32) -> F32:
        """x * sigmoid(gate), broadcasting."""
        ...

    def causal_conv(self, columns: F32, weight: F32) -> F32:
        """silu of a depthwise causal convolution. columns [width - 1 + R, channels] with the window first, weight
        [width, channels] oldest tap first: [R, channels]."""
        ...

    def delta_inputs(self, qkv: F32, b: F32, a: F32, log_decay: F32, bias: F32, heads: DeltaHeads) -> DeltaInputs:
        """From the convolved qkv [R, 2 Hk dk + Hv dv], b and a [R, Hv]; log_decay is -exp(A_log) [Hv], bias dt_bias [Hv]."""
        ...

    def delta_steps(self, state: F32, x: DeltaInputs) -> F32:
        """The recurrence, one row after another; `state` [Hv, dk, dv] is updated in place. Outputs [R, Hv, dv]."""
        ...

    def delta_replay(self, state: F32, k: F32, v: F32, decay: F32, beta: F32) -> None:
        """The state half of one row of `delta_steps`, same operations in the same order: state [Hv, dk, dv] in place; k [Hv, dk],
        v [Hv, dv], decay and beta [Hv]."""
        ...

    def delta_chunk(self, state: F32, x: DeltaInputs) -> F32:
        """`delta_steps` in chunked form (WY representation), C at most 64."""
        ...

    def rotate(self, x: F32, cos: F32, sin: F32) -> F32:
        """Rotary embedding of the first 2 * cos.shape[-1] dimensions, rotate-half layout. x [R, heads, D], cos and sin [R, n]."""
        ...

    def attention(self, q: F32, keys: F32, values: F32, position: int) -> F32:
        """Causal attention of rows q [R, H, D] at `position`...; keys and values [KV, capacity, D] hold rows up to and
        including theirs. [R, H, D]."""
        ...

    def attention_chunk(self, q: F32, keys: F32, values: F32, position: int) -> F32:
        """The same for a prefill chunk."""
        ...

    def mixture(self, x: F32, router: F32, experts: Experts) -> F32:
        """Sum over the `num_used` likeliest experts, weights renormalised to 1. x [R, hidden], router logits [R, E]."""
        ...
