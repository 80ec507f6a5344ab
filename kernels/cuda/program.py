"""A forward pass as a list of launches over buffers that stay where they are, so that it can be recorded once and run again."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_float, c_int, c_void_p
from dataclasses import dataclass
from math import lcm, prod
from typing import Any, NamedTuple, cast

import numpy as np

from ...core.errors import InternalBug
from ..backend import F32
from ..model.config import ModelConfig
from ..model.inputs import frequencies
from ..model.pages import PAGE
from ..model.weights import AttentionWeights, DeltaWeights, DenseWeights, LayerWeights, MoeWeights
from .device import (
    DRAW,
    HOPPER_CAPABILITY,
    NOWHERE,
    Address,
    AheadStruct,
    Array,
    MatrixStruct,
    RowsStruct,
    Step,
    chunk_columns_of,
    columns_of,
)
from .matrices import BF16, NAMES, Q4_K, Q5_K, Q6_K, Q8_0, STRIP, UNIT_BYTES, CudaMatrix, Packing, Stacked

#: Positions of one part of an attention (PART of forerun.cuh), and pairs of row and head of one block (PAIRS, CHUNK_PAIRS of attention.cu).
PART, PAIRS, CHUNK_PAIRS = 128, 16, 64
#: Shared memory of attend_chunk beside its pages.
ATTEND_STATIC = 10_240
#: Where the parts of a product are that the next norm adds to the residual, and how many there are.
Parts = tuple[Address, int]
#: Blocks that a product into the residual should have, so that all of a large device's multiprocessors read.
MANY_BLOCKS, MAX_SPLITS = 264, 8
#: Values of a row that one block makes ready, where rows are cut.
SEGMENT = 1024
WARPS = 8
#: Bytes of the next product's weights that a product has fetched into the second-level cache: half as many where those are small.
READ_ON, SMALL = 8 << 20, 32 << 20
#: Rows up to which quantised weights are those of products.cu in any case; strips of a block of batch.cu, and units that it has at once.
FEW_ROWS, BATCH_STRIPS, BATCH_STAGES = 8, 2, 2
#: Strips of a block of wide.cu, stages of inputs that it has at once, and a strip's tiles of 512 bytes in a stage.
WIDE_STRIPS, WIDE_STAGES = 8, 3
WIDE_TILES = {BF16: 4, Q8_0: 2, Q4_K: 1, Q5_K: 1, Q6_K: 1}
#: Stages, threads and rows of a block of hopper_products.cu, and what it has of shared memory besides its stages.
HOPPER_STAGES, HOPPER_THREADS, HOPPER_ROWS, HOPPER_REST = 4, 384, (128, 256), 1024 + 64
#: Dimensions of heads that hopper_attend is for, and pages that it has at once.
HOPPER_HEADS, HOPPER_PAGES = (128, 256), 2
#: Blocks of hopper_products.cu that a large device has at once, and what one more part of a product costs, as a share of it.
HOPPER_BLOCKS, HOPPER_SPLIT = 132, 0.04
#: Rows from which an attention loops over its parts, instead of leaving them all for a merge, and rows times parts beyond which it does:
#: each takes a KiB a head.
LOOP_ROWS, LOOP_PARTS = 33, 16_384


@dataclass(slots=True)
class Prepared:
    """Rows in the forms that the matrices which read them want."""

    struct: RowsStruct


@dataclass(frozen=True, slots=True)
class Column:
    """Values of each row from a column on: where, and floats from row to row."""

    address: Address
    stride: int


class Filters(NamedTuple):
    """Which of them some row of a batch has."""

    has_top_k: bool
    has_top_p: bool


class Program:
    """Steps for `rows` rows of `num_spans` sequences, each of which has at most `span_rows` of them (None: all) and sees at most
    `max_parts` parts. `is_wide`: a chunk of a prompt."""

    def __init__(
        self, config: ModelConfig, packing: Packing, rows: int, num_spans: int, max_parts: int, *, span_rows: int | None = None,
        is_wide: bool = False,
    ) -> None:  # fmt: skip
        self.config, self.packing, self.device, self.is_wide = config, packing, packing.device, is_wide
        self.rows, self.num_spans, self.max_parts, self.span_rows = rows, num_spans, max_parts, span_rows or rows
        self.is_looped = rows >= LOOP_ROWS or rows * max_parts > LOOP_PARTS
        self.steps: list[Step] = []
        self.buffers: dict[str, Array] = {}

    # Buffers

    def buffer(self, name: str, shape: Sequence[int], dtype: Any = np.float32) -> Array:
        """The one of that name; InternalBug if it is too small."""
        if name not in self.buffers:
            self.buffers[name] = self.device.zeros(shape, dtype)
        found = self.buffers[name]
        if found.nbytes < prod(shape) * np.dtype(dtype).itemsize:
            raise InternalBug(f"the buffer {name!r} of {tuple(found.shape)} is to be {tuple(shape)}")
        return found

    def address(self, name: str) -> Address:
        return self.device.address(self.buffers[name])

    def prepared(
        self, name: str, width: int, rows: int, formats: set[int], keeps_floats: str | None = None, *, is_routed: bool = False
    ) -> Prepared:
        """Rows of `width` for matrices of `formats`; `keeps_floats` names the buffer that has them in float32 as well. `is_routed`: experts
        are among the matrices."""
        struct = RowsStruct()
        read = rows if rows <= FEW_ROWS or self.is_wide else 16 if rows <= 16 else -(-rows // 32) * 32  # batch.cu reads whole blocks
        if BF16 in formats:
            struct.halves_stride = -(-width // 32) * 32
            shape: tuple[int, ...] = read, struct.halves_stride
            if self.is_wide and self.device.capability == HOPPER_CAPABILITY and not is_routed:
                block = HOPPER_ROWS[rows > HOPPER_ROWS[0]]
                struct.halves_rows = -(-rows // block) * block
                shape = -(-width // 64), struct.halves_rows, 64
            struct.halves = self.device.address(self.buffer(f"{name} halves", shape, np.uint16))
        if formats - {BF16}:
            stride = struct.quants_stride = -(-width // 256) * 256
            struct.quants = self.device.address(self.buffer(f"{name} quants", (read, stride), np.uint8))
            struct.scales = self.device.address(self.buffer(f"{name} scales", (read, stride // 32), np.float32))
            struct.sums = self.device.address(self.buffer(f"{name} sums", (read, stride // 32), np.float32))
        if keeps_floats is not None:
            struct.floats = self.device.address(self.buffer(keeps_floats, (rows, width)))
        return Prepared(struct)

    def formats(self, *matrices: CudaMatrix) -> set[int]:
        """Those of rows that products of these matrices read."""
        return {BF16} if self.is_wide else {m.format for m in matrices}

    # Steps

    def step(self, kernel: str, grid: tuple[int, ...], threads: int, *arguments: Any, shared: int = 0) -> None:
        whole = (*grid, 1, 1)[:3]
        self.steps.append(Step(kernel, (whole[0], whole[1], whole[2]), threads, shared, tuple(_argument(each) for each in arguments)))

    def embed(self, table: CudaMatrix, tokens: Address, out: Address, rows: int) -> None:
        spans, span_of = self.address("spans"), self.address("span of")
        self.step("embed", (rows,), 256, self.packing.struct(table), tokens, spans, span_of, out, self.config.hidden)

    def read_hidden(self) -> None:
        """Into the buffer `before`, for each row the hidden row before it, from where its sequence keeps them."""
        spans, span_of, to = (self.address(name) for name in ("spans", "span of", "before"))
        self.step("read_hidden", (self.rows,), 256, spans, span_of, to, self.config.hidden)

    def add_norm(self, x: Address, parts: Parts | None, weight: F32, to: Prepared, rows: int) -> None:
        """x += parts (where, how many); `to` are its normed rows."""
        n, where = self.config.hidden, parts or (NOWHERE, 0)
        w = self.packing.floats(weight)
        self.step("add_norm", (rows,), threads_for(n), x, where[0], where[1], w, c_float(self.config.rms_eps), n, to.struct, shared=4 * n)

    def product(self, m: CudaMatrix, x: Prepared, name: str, rows: int, *, splits: int = 1) -> Column:
        """Into the buffer `name` [splits, rows, outputs filled up]."""
        stride = STRIP * m.strips
        out = self.device.address(self.buffer(name, (splits, rows, stride)))
        if self.is_wide:
            self._wide(NAMES[m.format], m, x, out, stride, RowsStruct(), rows, splits)
        else:
            self._few(f"product_{NAMES[m.format]}", m, x, out, stride, RowsStruct(), rows, splits)
        return Column(out, stride)

    def _few(
        self, kernel: str, m: CudaMatrix, x: Prepared, out: Address, stride: int, gated: RowsStruct, rows: int, splits: int = 1
    ) -> None:
        """By products.cu, or batch.cu where a block's weights have room there: else 8 rows after 8 others, of which weights come from the
        second-level cache."""
        tiles = 1 if rows <= 8 else 2 if rows <= 16 or m.format in (Q5_K, Q6_K) else 4
        shared = WARPS * BATCH_STRIPS * max(BATCH_STAGES * sum(UNIT_BYTES[m.format]), 512 * tiles)
        if m.format != BF16 and rows > FEW_ROWS and shared <= self.device.max_shared:
            grid = -(-m.strips // BATCH_STRIPS) * -(-rows // (8 * tiles)), splits
            self._product(f"batch_{NAMES[m.format]}_{tiles}", grid, m, x, out, stride, gated, rows, AheadStruct(), shared=shared)
        else:
            tiles = tiles if m.format == BF16 else 1
            strips = 2 if kernel.startswith("gated") or tiles == 4 else 1
            grid = -(-m.strips // strips) * -(-rows // (8 * tiles)), splits
            self._product(f"{kernel}_{tiles}", grid, m, x, out, stride, gated, rows, AheadStruct())

    def _wide(
        self, kernel: str, m: CudaMatrix, x: Prepared, out: Address, stride: int, gated: RowsStruct, rows: int, splits: int = 1
    ) -> None:
        if x.struct.halves_rows:
            self._hopper(kernel, m, x, out, stride, gated, rows, splits)
            return
        groups, block = -(-m.strips // WIDE_STRIPS) * splits, 128
        if m.format != BF16 and _wide_bytes(m, 256) <= self.device.max_shared:
            block = 256  # what makes bfloat16 of weights is shared by more rows
        while block > 64 and (rows <= block // 2 or groups * -(-rows // block) < MANY_BLOCKS // 4):
            block //= 2
        grid = -(-m.strips // WIDE_STRIPS) * -(-rows // block), splits
        self._product(f"wide_{kernel}_{block}", grid, m, x, out, stride, gated, rows, shared=_wide_bytes(m, block))

    def _hopper(
        self, kernel: str, m: CudaMatrix, x: Prepared, out: Address, stride: int, gated: RowsStruct, rows: int, splits: int = 1,
        apart: int = 1,
    ) -> None:  # fmt: skip
        groups = -(-m.strips // WIDE_STRIPS)
        small, large = HOPPER_ROWS
        block = small if rows <= small or groups * -(-rows // large) * splits < HOPPER_BLOCKS // 2 else large
        grid, shared = (groups * -(-rows // block), splits), HOPPER_STAGES * (WIDE_STRIPS * WIDE_TILES[m.format] * 512 + 128 * block)
        self._product(
            f"hopper_{kernel}_{block}", grid, m, x, out, stride, gated, rows, apart, shared=shared + HOPPER_REST, threads=HOPPER_THREADS
        )

    def _product(
        self, kernel: str, grid: tuple[int, ...], m: CudaMatrix, x: Prepared, out: Address, stride: int, gated: RowsStruct, rows: int,
        *more: Any, shared: int = 0, threads: int = 32 * WARPS,
    ) -> None:  # fmt: skip
        self.step(kernel, grid, threads, self.packing.struct(m), x.struct, out, stride, gated, rows, *more, shared=shared)

    def products(self, stacked: Stacked, x: Prepared, name: str, rows: int) -> list[Column]:
        """Each matrix's columns."""
        # Layers may have the same matrices in other types, and so put others together.
        found = [self.product(m, x, f"{name} {i} of {m.strips} strips", rows) for i, m in enumerate(stacked.products)]
        return [Column(found[i].address + 4 * column, found[i].stride) for i, column in stacked.at]

    def into_residual(self, m: CudaMatrix, x: Prepared, rows: int) -> Parts:
        """A product that the next norm adds to the residual: where it is, and in how many parts."""
        if x.struct.halves_rows:
            splits = _splits_of_hopper(m)
        elif self.is_wide:
            splits = max(1, min(MAX_SPLITS, MANY_BLOCKS // 4 // -(-m.strips // WIDE_STRIPS), m.inputs // 256))
        else:
            splits = max(1, min(MAX_SPLITS, MANY_BLOCKS // m.strips, m.units // (2 * WARPS)))
        return self.product(m, x, f"parts of {splits}", rows, splits=splits).address, splits

    def layer(self, x: Address, before: Parts | None, w: LayerWeights, number: int) -> Parts:
        """`before` are the parts still to be added to the residual x; returns those of this layer's end."""
        rows, c = self.rows, self.config
        if isinstance(w.mixer, DeltaWeights):
            formats = self.formats(w.mixer.qkv, w.mixer.z, w.mixer.b, w.mixer.a)
            u = self.prepared(f"u {sorted(formats)}", c.hidden, rows, formats)
            self.add_norm(x, before, w.input_norm, u, rows)
            parts = self._delta(u, w.mixer, number)
        else:
            formats = self.formats(w.mixer.q, w.mixer.k, w.mixer.v)
            u = self.prepared(f"u {sorted(formats)}", c.hidden, rows, formats)
            self.add_norm(x, before, w.input_norm, u, rows)
            parts = self._attention(u, w.mixer, number)
        ffn = w.ffn
        if isinstance(ffn, DenseWeights):
            formats = self.formats(ffn.gate, ffn.up)
        else:
            formats = self.formats(ffn.router, ffn.shared_gate, ffn.shared.gate, ffn.experts.gate[0])
        is_routed = not isinstance(ffn, DenseWeights)
        u = self.prepared(f"u {sorted(formats)}{' routed' * is_routed}", c.hidden, rows, formats, is_routed=is_routed)
        self.add_norm(x, parts, w.ffn_norm, u, rows)
        return self._dense(u, ffn) if isinstance(ffn, DenseWeights) else self._moe(u, ffn)

    def _delta(self, u: Prepared, w: DeltaWeights, number: int) -> Parts:
        c, rows = self.config, self.rows
        values = c.value_heads * c.value_dim
        qkv, z, b, a = self.products(self.packing.stack(w.qkv, w.z, w.b, w.a), u, "delta", rows)
        mixed = self.device.address(self.buffer("mixed", (rows, values)))
        (self.delta_of_chunk if self.is_wide else self.delta)(w, number, qkv, b, a, mixed)
        heads = lcm(32, c.value_dim) // c.value_dim
        heads *= max(1, SEGMENT // 2 // (heads * c.value_dim))
        out = self.prepared(f"mixed {w.out.format}", values, rows, self.formats(w.out))
        self.step(
            "gated_norm", (rows, -(-c.value_heads // heads)), 32 * min(WARPS, heads), mixed, z.address, z.stride,
            self.packing.floats(w.norm), c_float(c.rms_eps), c.value_dim, heads, values, out.struct, shared=4 * heads * c.value_dim,
        )  # fmt: skip
        return self.into_residual(w.out, out, rows)

    def delta(self, w: DeltaWeights, number: int, qkv: Column, b: Column, a: Column, mixed: Address) -> None:
        c, floats = self.config, self.packing.floats
        columns = columns_of(c)
        self.step(
            "delta", (c.value_heads * c.value_dim // columns, self.num_spans), 4 * columns, self.address("spans"), number, qkv.address,
            qkv.stride, b.address, b.stride, a.address, a.stride, floats(w.conv), floats(w.log_decay), floats(w.dt_bias), mixed,
        )  # fmt: skip

    def delta_of_chunk(self, w: DeltaWeights, number: int, qkv: Column, b: Column, a: Column, mixed: Address) -> None:
        c, floats, spans, rows = self.config, self.packing.floats, self.address("spans"), self.rows
        ready = self.device.address(self.buffer("convolved", (rows, c.channels)))
        gates = self.device.address(self.buffer("gates", (rows, 2 * c.value_heads)))
        heads, columns = 2 * c.key_heads + c.value_heads, columns_of(c)
        self.step(
            "convolve", (-(-rows // 8), -(-heads // 4)), 128, spans, number, qkv.address, qkv.stride, b.address, b.stride, a.address,
            a.stride, floats(w.conv), floats(w.log_decay), floats(w.dt_bias), ready, gates,
        )  # fmt: skip
        blocks = c.value_heads * c.value_dim // chunk_columns_of(c)
        self.step("recur", (blocks,), 4 * columns, spans, number, ready, gates, mixed)
        self.step("keep_columns", (-(-c.channels // 256),), 256, spans, number, qkv.address, qkv.stride)

    def _attention(self, u: Prepared, w: AttentionWeights, number: int) -> Parts:
        c, rows, device = self.config, self.rows, self.device
        q, k, v = self.products(self.packing.stack(w.q, w.k, w.v), u, "attention", rows)
        spans, span_of, floats = self.address("spans"), self.address("span of"), self.packing.floats
        queries = device.address(self.buffer("queries", (rows, c.heads, c.head_dim), np.uint16))
        rates = floats(frequencies(c.rotary_dim, c.rope_theta))
        self.step(
            "keys", (rows, -(-(c.heads + c.kv_heads) // 4)), 128, spans, span_of, number, q.address, q.stride, k.address, k.stride,
            v.address, v.stride, floats(w.q_norm), floats(w.k_norm), rates, c_float(c.rms_eps), queries,
        )  # fmt: skip
        sums, ends, parts = self.attend(number, queries)
        out = self.prepared(f"attended {w.out.format}", c.heads * c.head_dim, rows, self.formats(w.out))
        self.step(
            "merge_parts", (rows, c.heads), 128, spans, span_of, sums, ends, parts, int(self.is_looped or self.is_wide), q.address,
            q.stride, 1, out.struct,
            shared=4 * c.head_dim,
        )  # fmt: skip
        return self.into_residual(w.out, out, rows)

    def attend(self, number: int, queries: Address) -> tuple[Address, Address, int]:
        """Sums of values [rows, heads, parts, D], their highest scores and totals [rows, heads, parts, 2], and how many parts."""
        c, rows, device, spans = self.config, self.rows, self.device, self.address("spans")
        parts = 1 if self.is_looped or self.is_wide else self.max_parts
        sums = device.address(self.buffer("sums", (rows, c.heads, parts, c.head_dim)))
        ends = device.address(self.buffer("ends", (rows, c.heads, parts, 2)))
        pairs = (c.heads // c.kv_heads) * (rows if self.is_wide else self.span_rows)
        of_chunk = -(-pairs // CHUNK_PAIRS), c.kv_heads
        if self.is_wide and device.capability == HOPPER_CAPABILITY and c.head_dim in HOPPER_HEADS:
            shared = CHUNK_PAIRS * 2 * c.head_dim + HOPPER_PAGES * 2 * PAGE * 2 * c.head_dim + HOPPER_REST
            self.step("hopper_attend", of_chunk, 256, spans, number, queries, sums, ends, shared=shared)
        elif self.is_wide:
            stage = c.head_dim // 32 * (PAGE * 64 + 64) + 2 * (c.head_dim * 64 + 64)
            stages = 2 if 2 * stage + ATTEND_STATIC <= device.max_shared else 1
            self.step("attend_chunk", of_chunk, 256, spans, number, queries, sums, ends, stages, shared=stages * stage)
        else:
            grid = parts, c.kv_heads * -(-pairs // PAIRS), self.num_spans
            self.step("attend", grid, 256, spans, number, queries, sums, ends, parts, int(self.is_looped))
        return sums, ends, parts

    def _hidden_of_ffn(self, w: DenseWeights, u: Prepared, name: str) -> Prepared:
        """silu(gate) * up, for the matrix that follows."""
        rows, width = self.rows, w.gate.outputs
        h = self.prepared(f"{name} {w.down.format}", width, rows, self.formats(w.down), is_routed=not u.struct.halves_rows)
        if w.gate.format == w.up.format == w.down.format == BF16:
            m = self.packing.gated([w.gate], [w.up], True)
            if self.is_wide:
                self._wide("gated_bf16", m, u, NOWHERE, 0, h.struct, rows)
            else:
                self._few("gated_bf16", m, u, NOWHERE, 0, h.struct, rows)
            return h
        if u.struct.halves_rows and w.gate.format == w.up.format:
            both = self.packing.stack(w.gate, w.up).products[0]
            self._hopper(f"gated_{NAMES[both.format]}", both, u, NOWHERE, 0, h.struct, rows, apart=w.gate.strips)
            return h
        gate, up = self.products(self.packing.stack(w.gate, w.up), u, f"gate up {name}", rows)
        self.swiglu(gate, up, width, rows, h)
        return h

    def swiglu(self, gate: Column, up: Column, width: int, rows: int, to: Prepared) -> None:
        self.step(
            "swiglu", (rows, -(-width // SEGMENT)), 256, gate.address, up.address, gate.stride, width, SEGMENT, to.struct,
            shared=4 * min(SEGMENT, -(-width // 4) * 4),
        )  # fmt: skip

    def _dense(self, u: Prepared, w: DenseWeights) -> Parts:
        return self.into_residual(w.down, self._hidden_of_ffn(w, u, "h"), self.rows)

    def _moe(self, u: Prepared, w: MoeWeights) -> Parts:
        c, rows, used, device = self.config, self.rows, w.experts.num_used, self.device
        experts, num_experts = w.experts, len(w.experts.gate)
        router, gate = self.products(self.packing.stack(w.router, w.shared_gate), u, "router", rows)
        routes = device.address(self.buffer("routes", (rows, 2 * used)))
        self.step("route", (rows,), 32, router.address, router.stride, num_experts, used, routes)
        is_gated = {m.format for m in (*experts.gate, *experts.up, *experts.down)} == {BF16}
        m, down = self.packing.gated(experts.gate, experts.up, is_gated), self.packing.all(experts.down)
        width = experts.gate[0].outputs
        strips = experts.gate[0].strips
        h = self.prepared(f"experts {down.format}", width, rows * used, self.formats(down), is_routed=True)
        y = device.address(self.buffer("experts down", (rows * used, c.hidden)))
        starts, order, is_grouped = NOWHERE, NOWHERE, self.is_wide or 2 * rows * used >= num_experts
        if is_grouped:  # many rows: an expert's weights are read once for all that use it
            starts = device.address(self.buffer("starts", (num_experts + 1,), np.int32))
            order = device.address(self.buffer("order", (rows * used,), np.int32))
            self.step("group_rows", (1,), 1024, routes, rows, used, num_experts, starts, order, shared=4 * (num_experts + 1))

        def run(kernel: str, of: CudaMatrix, x: Prepared, each: int, out: Address, stride: int, gated: RowsStruct) -> None:
            """One of each expert's matrices, of so many strips; of rows u, or of one row for each expert used."""
            struct, divisor, where = self.packing.struct(of), used if x is u else 1, (starts, order)
            if self.is_wide:
                grid, shared = (-(-each // WIDE_STRIPS), num_experts), _wide_bytes(of, 64)
                self.step(f"wide_{kernel}", grid, 32 * WARPS, struct, x.struct, *where, divisor, each, out, stride, gated, shared=shared)
            else:
                grid = each // 2 if "gated" in kernel else each, num_experts if is_grouped else rows * used
                self.step(kernel, grid, 32 * WARPS, struct, x.struct, routes, used, *where, divisor, each, out, stride, gated)

        if is_gated:
            run("expert_gated_bf16", m, u, 2 * strips, NOWHERE, 0, h.struct)
        else:
            both, stride = device.address(self.buffer("experts gate up", (rows * used, 2 * STRIP * strips))), 2 * STRIP * strips
            run(f"expert_{NAMES[m.format]}", m, u, 2 * strips, both, stride, RowsStruct())
            self.swiglu(Column(both, stride), Column(both + 4 * STRIP * strips, stride), width, rows * used, h)
        run(f"expert_{NAMES[down.format]}", down, h, experts.down[0].strips, y, c.hidden, RowsStruct())
        shared = self.product(w.shared.down, self._hidden_of_ffn(w.shared, u, "shared h"), "shared", rows)
        out = device.address(self.buffer("parts of 1", (1, rows, c.hidden)))
        self.step("mix", (rows, -(-c.hidden // 256)), 256, y, routes, used, shared.address, gate.address, gate.stride, out, c.hidden)
        return out, 1

    def choose(
        self, logits: Column, num_tokens: int, rows: int, tokens: Address, how: Filters | None = None, shares: Address = NOWHERE
    ) -> None:
        """The token of each row, from the first num_tokens logits: the highest; or, with `how`, as the buffer `draws` says. `shares`: and
        its probability at temperature 1."""
        many = max(1, min(64, num_tokens // 1024))
        address, where = self.device.address, (logits.address, logits.stride, num_tokens)
        parts = address(self.buffer("parts of logits", (rows, many, 4)))
        draws, histograms, edges, scored = NOWHERE, NOWHERE, NOWHERE, NOWHERE
        if how is not None:
            draws = address(self.buffer("draws", (rows * DRAW.itemsize,), np.uint8))
            scored = address(self.buffer("scored", (rows, many, 2), np.float64))
        if how is not None and any(how):
            histograms = address(self.buffer("histograms", (rows, 6, 2048), np.uint64))
            edges = address(self.buffer("edges", (rows, 6, 2), np.uint64))
        self.step("survey", (many, rows), 256, *where, parts, histograms)
        if how is not None:
            for pass_ in (*(range(3) if how.has_top_k else ()), *(range(3, 6) if how.has_top_p else ())):
                self.step("filter", (many, rows), 256, draws, *where, parts, many, pass_, histograms, edges)
            self.step("score", (many, rows), 256, draws, *where, parts, many, histograms, edges, scored)
        self.step("pick", (rows,), 32, draws, *where, parts, many, scored, tokens, shares)


def look_ahead(steps: Sequence[Step]) -> None:
    """Tells each product of a few rows what follows it, once all steps are there."""
    weights = cast("MatrixStruct | None", None)
    for step, after in zip(reversed(steps), (None, *reversed(steps)), strict=False):
        ahead = step.arguments[-1]
        if not isinstance(ahead, AheadStruct):
            continue
        if weights is not None:
            size = -(-weights.outputs // STRIP) * weights.units * UNIT_BYTES[weights.format][0]
            ahead.weights, ahead.bytes = weights.tiles, min(size, READ_ON if size > SMALL else READ_ON // 2)
        ahead.is_spread = int(after is not None and after.kernel == "delta")
        weights = step.arguments[0]


def _argument(value: Any) -> Any:
    return c_void_p(value) if isinstance(value, Address) else c_int(value) if isinstance(value, int) else value


def _wide_bytes(m: CudaMatrix, rows: int) -> int:
    """Shared memory of a block of wide.cu."""
    return WIDE_STAGES * (WIDE_STRIPS * WIDE_TILES[m.format] * 512 + 2 * (rows * 64 + 64))


def _splits_of_hopper(m: CudaMatrix) -> int:
    """Parts of a product into the residual with which two blocks' rows take least time: in turns of all blocks that there are at once."""
    blocks = 2 * -(-m.strips // WIDE_STRIPS)

    def cost(splits: int) -> float:
        return -(-blocks * splits // HOPPER_BLOCKS) / splits * (1 + HOPPER_SPLIT * (splits - 1))

    return min(range(1, max(1, min(MAX_SPLITS, m.inputs // 256)) + 1), key=cost)


def threads_for(n: int) -> int:
    """Of a block that walks through a row of n."""
    return min(1024, max(32, -(-n // 128) * 32))
