"""The CUDA kernels one by one, on a CPU in a device's place (`--cuda`: on a device), forwards and backwards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forerun.core.errors import InternalBug
from forerun.core.vocabulary import SamplingParams
from forerun.kernels.backend import Experts
from forerun.kernels.cuda import program
from forerun.kernels.cuda.device import DRAW, HOPPER_CAPABILITY, NOWHERE, SPAN, SpanStruct
from forerun.kernels.cuda.matrices import BF16, CudaBackend, CudaMatrix
from forerun.kernels.cuda.memory import spans_array
from forerun.kernels.cuda.program import Column, Program
from forerun.kernels.cuda.recorded import filters_of, put_draw
from forerun.kernels.formats.stored import BY_NAME, Stored, quantise
from forerun.kernels.model.config import load_config
from forerun.kernels.model.pages import PAGE
from forerun.kernels.model.sizes import PUBLISHED
from forerun.kernels.model.weights import DeltaWeights, DenseWeights, MoeWeights
from forerun.kernels.sampling import choose, share

from tests.kernels.blocks import random_weights
from tests.kernels.cuda_on_cpu import HostDevice


def capabilities(cuda: CudaBackend, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The device as one that has the kernels of 9.0, if it can run them, and as one that has not."""
    own = HOPPER_CAPABILITY if isinstance(cuda.device, HostDevice) else cuda.device.capability
    for capability in {own, 80}:
        monkeypatch.setattr(cuda.device, "capability", capability)
        yield capability


#: Those with products of their own.
KINDS = ["BF16", "Q8_0", "Q4_K", "Q5_K", "Q6_K"]


def stored(kind: str, outputs: int, inputs: int) -> Stored:
    return random_weights(kind, outputs, inputs, np.random.default_rng(outputs), lambda rng, count: rng.uniform(0.001, 0.01, count))


def bf16(values: Any) -> Any:
    return BY_NAME["BF16"].read(quantise(values, "BF16").reshape(-1, 2)).reshape(values.shape)


def int8(values: Any) -> Any:
    """Rows as the products of quantised weights read them: a scale for 32 of them."""
    blocks = values.reshape(-1, 32)
    scale = np.abs(blocks).max(1, keepdims=True) / np.float32(127)
    return (np.rint(blocks / scale) * scale).reshape(values.shape)


def as_rows(halves: Any) -> Any:
    """[rows, inputs] of what place_of_half says: where rows are not one after another, the pieces of each of 8 are exchanged by its number;
    then 32 inputs are [2, 2] pieces of four lanes' two, of whose 8 each they are a part."""
    if halves.ndim == 2:
        return halves
    pieces = halves.reshape(len(halves), -1, 8, 8, 8)  # stage, row / 8, row % 8, piece, value
    pieces = np.stack([pieces[:, :, row, np.arange(8) ^ row] for row in range(8)], 2)
    units = pieces.reshape(len(halves), -1, 2, 2, 2, 4, 2)  # stage, row, unit, step, which two, lane, value
    return units.transpose(1, 0, 2, 5, 3, 4, 6).reshape(halves.shape[1], -1)


def product(cuda: CudaBackend, config: Any, m: CudaMatrix, x: Any, splits: int = 1, *, is_wide: bool = False) -> Any:
    p = Program(config, cuda.packing, len(x), 1, 1, is_wide=is_wide)
    cuda.device.put(p.buffer("given", x.shape), x)
    ready = p.prepared("x", x.shape[1], len(x), p.formats(m))
    p.step("prepare", (len(x),), 64, p.address("given"), NOWHERE, x.shape[1], ready.struct, shared=4 * x.shape[1])
    for name, nobody in (("x scales", np.nan), ("x sums", np.nan), ("x halves", 0x7FC0)):
        buffer: Any = p.buffers.get(name, np.zeros(0))
        buffer = buffer if buffer.ndim == 3 else buffer[None]  # hopper_products.cu has rows of 64 inputs after rows of 64 others
        if buffer.shape[1] > len(x):  # rows that fill up a block of rows are nobody's
            cuda.device.put(buffer[:, len(x) :], np.full((1, 1, 1), nobody, buffer.dtype))
    p.product(m, ready, "y", len(x), splits=splits)
    cuda.kernels(config).run(p.steps)
    return cuda.device.to_host(p.buffers["y"]).sum(0)[:, : m.outputs]


@pytest.fixture(scope="module")
def config(checkpoints: dict[str, Path]) -> Any:
    return load_config(checkpoints["dense"])


@pytest.mark.parametrize(
    ("kind", "inputs"),
    [
        ("BF16", 160), ("BF16", 40), ("F32", 64), ("Q8_0", 160), ("Q8_0", 1024), ("Q4_K", 256), ("Q4_K", 768), ("Q4_0", 64), ("Q5_K", 256),
        ("Q5_K", 768), ("Q6_K", 256), ("Q6_K", 768), ("Q4_1", 64), ("IQ4_NL", 64), ("IQ4_XS", 256), ("MXFP4", 64), ("Q2_K", 256),
        ("Q3_K", 256), ("Q5_0", 64), ("Q5_1", 64), ("IQ1_S", 256), ("IQ1_M", 256), ("IQ2_XXS", 256), ("IQ2_S", 256), ("IQ3_XXS", 256),
        ("IQ3_S", 256),
    ],
)  # fmt: skip
def test_products_are_those_of_rounded_rows(cuda: CudaBackend, config: Any, kind: str, inputs: int) -> None:
    weight = stored(kind, 40, inputs)
    m, x = cuda.matrix(weight), np.random.default_rng(1).normal(size=(5, inputs)).astype(np.float32)
    values = bf16(weight.values()) if m.format == BF16 else weight.values()
    wanted = (bf16(x) if m.format == BF16 else int8(x)).astype(np.float64) @ values.astype(np.float64).T
    for splits in (1, 2):
        found = product(cuda, config, m, x, splits)
        # Scales of IQ2_XXS and IQ4_XS are rounded to halves.
        assert np.linalg.norm(found - wanted) < (3e-4 if kind in ("IQ2_XXS", "IQ4_XS") else 1e-5) * np.linalg.norm(wanted)


def test_powers_of_two_that_halves_cannot_hold(cuda: CudaBackend, config: Any) -> None:
    """Scales of MXFP4 from 2^-30 to 2^17, where a table's row is as near as the smallest half, and of IQ4_XS beyond the largest."""
    weight = stored("MXFP4", 40, 256)
    weight.raw[:, ::17] = np.arange(98, 146)[np.arange(320) % 48].reshape(40, 8)
    found = looked_up(cuda, config, weight)
    np.testing.assert_allclose(found, weight.values()[[0, 39, 17], : config.hidden], rtol=1e-6, atol=2.0**-25)
    weight = random_weights("IQ4_XS", 40, 256, np.random.default_rng(1), lambda _, count: np.full(count, 2100.0))
    found = looked_up(cuda, config, weight)
    np.testing.assert_allclose(found, weight.values()[[0, 39, 17], : config.hidden], atol=4 * 65504)  # four steps of a quant


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_has_the_same_bits_whatever_rows_stand_beside_it(cuda: CudaBackend, config: Any, kind: str) -> None:
    m, x = cuda.matrix(stored(kind, 40, 2560)), np.random.default_rng(2).normal(size=(70, 2560)).astype(np.float32)
    alone_ = np.concatenate([product(cuda, config, m, x[i : i + 1]) for i in range(len(x))])
    for count in (3, 8, 9, 16, 17, 35, 49, 70):
        np.testing.assert_array_equal(product(cuda, config, m, x[:count]), alone_[:count])
    np.testing.assert_array_equal(product(cuda, config, m, x[20:33]), alone_[20:33])


@pytest.mark.parametrize("kind", KINDS)
def test_an_embedding_is_a_row_of_the_table(cuda: CudaBackend, config: Any, kind: str) -> None:
    weight = stored(kind, 40, 256)
    np.testing.assert_allclose(looked_up(cuda, config, weight), weight.values()[[0, 39, 17], : config.hidden], rtol=1e-6)


def looked_up(cuda: CudaBackend, config: Any, weight: Stored) -> Any:
    """Rows 0, 39 and 17 of a table."""
    p = Program(config, cuda.packing, 3, 1, 1)
    tokens = cuda.device.to_device(np.array([0, 39, 17], np.int32))
    out = p.buffer("out", (3, config.hidden))
    m = cuda.matrix(weight)
    p.buffer("spans", (SPAN.itemsize,), np.uint8)
    p.buffer("span of", (3,), np.int32)
    p.embed(m, cuda.device.address(tokens), p.address("out"), 3)
    cuda.kernels(config).run(p.steps)
    return cuda.device.to_host(out)


SAMPLING = [
    SamplingParams(temperature=1.0, seed=3),
    SamplingParams(temperature=0.7, seed=2**63 + 5, top_k=20),
    SamplingParams(temperature=1.3, seed=4, top_p=0.8),
    SamplingParams(temperature=0.8, seed=5, top_k=50, top_p=0.9, min_p=0.02),
    SamplingParams(temperature=1.0, seed=6, min_p=0.1),
    SamplingParams(temperature=1.0, seed=7, top_p=0.0),
    SamplingParams(temperature=2.0, seed=8, top_k=10**6, top_p=0.9999),
    SamplingParams(temperature=0.0),
]


@pytest.mark.parametrize("num_tokens", [5, 1000, 5003])
@pytest.mark.parametrize("kind", ["normal", "steep", "many equal", "no number"])
def test_tokens_are_drawn_as_on_the_host(cuda: CudaBackend, config: Any, num_tokens: int, kind: str) -> None:
    rng, num_rows = np.random.default_rng(num_tokens), len(SAMPLING)
    logits = rng.normal(size=(num_rows, num_tokens)).astype(np.float32) * (20 if kind == "steep" else 3)
    if kind == "many equal":  # a whole number has many tokens; at the edge of a nucleus all of them stay
        logits = np.rint(logits)
    if kind == "no number":
        logits[:, rng.integers(0, num_tokens, 3)] = np.nan
        logits[2] = np.nan
    positions = [int(each) for each in rng.integers(0, 10_000, num_rows)]
    for how in (SAMPLING, [SAMPLING[0]] * num_rows, [SAMPLING[1]] * num_rows, [SAMPLING[-1]] * num_rows):
        p = Program(config, cuda.packing, num_rows, 1, 1)
        cuda.device.put(p.buffer("logits", (num_rows, num_tokens + 3)), np.pad(logits, ((0, 0), (0, 3)), constant_values=99))
        p.buffer("tokens", (num_rows,), np.int32)
        p.buffer("shares", (num_rows,))
        draws = np.zeros(num_rows * DRAW.itemsize, np.uint8)
        for row, (each, position) in enumerate(zip(how, positions, strict=True)):
            put_draw(draws, row, each, position)
        cuda.device.put(p.buffer("draws", draws.shape, np.uint8), draws)
        where = Column(p.address("logits"), num_tokens + 3)
        p.choose(where, num_tokens, num_rows, p.address("tokens"), filters_of(how), p.address("shares"))
        run = cuda.kernels(config).record(p.steps)
        for _ in range(2):  # nothing is left of the first time
            run()
            tokens, shares = (cuda.device.to_host(p.buffers[name]) for name in ("tokens", "shares"))
            for row, (each, position) in enumerate(zip(how, positions, strict=True)):
                if kind == "no number":
                    assert 0 <= tokens[row] < num_tokens
                elif kind != "many equal" or each.top_p in (0.0, 1.0):
                    assert tokens[row] == choose(logits[row], each, position), (row, each)
                if kind != "no number":
                    assert abs(shares[row] - share(logits[row], tokens[row])) < 1e-5


def test_of_equal_tokens_at_the_edge_of_a_nucleus_all_stay(cuda: CudaBackend, config: Any) -> None:
    logits = np.array([[3.0, 0.0, 2.0, 2.0, 2.0, 2.0, -1.0, 1.0]] * 64, np.float32)
    p = Program(config, cuda.packing, 64, 1, 1)
    cuda.device.put(p.buffer("logits", logits.shape), logits)
    p.buffer("tokens", (64,), np.int32)
    draws = np.zeros(64 * DRAW.itemsize, np.uint8)
    how = SamplingParams(temperature=1.0, top_p=0.5)  # 0.4 of 3.0, 0.147 each of 2.0
    for row in range(64):
        put_draw(draws, row, how, row)
    cuda.device.put(p.buffer("draws", draws.shape, np.uint8), draws)
    p.choose(Column(p.address("logits"), 8), 8, 64, p.address("tokens"), filters_of([how]))
    cuda.kernels(config).run(p.steps)
    assert set(cuda.device.to_host(p.buffers["tokens"]).tolist()) == {0, 2, 3, 4, 5}


def test_layers_with_the_same_matrices_in_other_types_have_room_of_their_own(cuda: CudaBackend, config: Any) -> None:
    """As in files of mixed types, where the values of some layers are finer than those of others."""
    x = np.random.default_rng(3).normal(size=(16, 256)).astype(np.float32)
    p = Program(config, cuda.packing, len(x), 1, 1)
    cuda.device.put(p.buffer("given", x.shape), x)
    found, wanted = list[Any](), list[Any]()
    for kinds in (("Q4_K", "Q4_K", "BF16"), ("Q4_K", "Q4_K", "Q4_K")):
        matrices = [cuda.matrix(stored(kind, 32, 256)) for kind in kinds]
        ready = p.prepared(f"x {kinds}", 256, len(x), p.formats(*matrices))
        p.step("prepare", (len(x),), 64, p.address("given"), NOWHERE, 256, ready.struct, shared=4 * 256)
        found.append(p.products(cuda.packing.stack(*matrices), ready, "attention", len(x)))
        wanted.append([product(cuda, config, m, x) for m in map(cuda.matrix, (stored(kind, 32, 256) for kind in kinds))])
    cuda.kernels(config).run(p.steps)
    for columns, each in zip(found, wanted, strict=True):
        for column, values in zip(columns, each, strict=True):
            buffer = next(b for b in p.buffers.values() if 0 <= column.address - cuda.device.address(b) < b.nbytes)
            start = (column.address - cuda.device.address(buffer)) // 4
            np.testing.assert_array_equal(cuda.device.to_host(buffer).reshape(-1, column.stride)[:, start : start + 32], values)
    with pytest.raises(InternalBug, match="attention"):
        p.buffer(next(name for name in p.buffers if name.startswith("attention")), (17, 4096))


@pytest.mark.parametrize(
    ("kind", "inputs"), [("BF16", 160), ("BF16", 32), ("Q8_0", 160), ("Q8_0", 1024), ("Q4_K", 768), ("Q5_K", 768), ("Q6_K", 768)]
)
def test_products_of_many_rows(cuda: CudaBackend, config: Any, kind: str, inputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of rounded rows and weights; a row has the same bits whatever rows stand beside it, and in blocks of any size."""
    weight = stored(kind, 152, inputs)
    m, x = cuda.matrix(weight), np.random.default_rng(1).normal(size=(300, inputs)).astype(np.float32)
    wanted = bf16(x).astype(np.float64) @ bf16(weight.values()).astype(np.float64).T
    for _ in capabilities(cuda, monkeypatch):
        for splits in (1, 2) if inputs > 128 else (1,):
            found = product(cuda, config, m, x, splits, is_wide=True)
            assert np.linalg.norm(found - wanted) < 1e-5 * np.linalg.norm(wanted)
            for some in (slice(0, 1), slice(40, 107), slice(3, 140)):
                np.testing.assert_array_equal(product(cuda, config, m, x[some], splits, is_wide=True), found[some])
            if splits == 1:
                with monkeypatch.context() as as_if_large:
                    for name in ("HOPPER_BLOCKS", "MANY_BLOCKS"):
                        as_if_large.setattr(program, name, 0)
                    for some in (slice(0, 300), slice(40, 107)):
                        np.testing.assert_array_equal(product(cuda, config, m, x[some], is_wide=True), found[some])


@pytest.mark.parametrize(("kind", "down"), [("BF16", "BF16"), ("BF16", "Q8_0"), ("Q8_0", "Q8_0"), ("Q4_K", "Q6_K")])
def test_gate_and_up_of_many_rows(cuda: CudaBackend, config: Any, kind: str, down: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, up = stored(kind, 72, 256), stored(kind, 72, 256)
    up = replace(up, raw=up.raw[::-1].copy())
    x = np.random.default_rng(1).normal(size=(150, 256)).astype(np.float32)
    one, other = (bf16(x).astype(np.float64) @ bf16(w.values()).astype(np.float64).T for w in (gate, up))
    wanted = one / (1 + np.exp(-one)) * other
    w = DenseWeights(cuda.matrix(gate), cuda.matrix(up), cuda.matrix(stored(down, 16, 256)))
    for _ in capabilities(cuda, monkeypatch):
        p = Program(config, cuda.packing, len(x), 1, 1, is_wide=True)
        cuda.device.put(p.buffer("given", x.shape), x)
        ready = p.prepared("x", 256, len(x), {BF16})
        p.step("prepare", (len(x),), 64, p.address("given"), NOWHERE, 256, ready.struct, shared=4 * 256)
        p._hidden_of_ffn(w, ready, "h")  # pyright: ignore[reportPrivateUsage]
        cuda.kernels(config).run(p.steps)
        [halves] = [buffer for name, buffer in p.buffers.items() if name.startswith("h ") and name.endswith("halves")]
        found = (as_rows(cuda.device.to_host(halves)).astype(np.uint32) << 16).view(np.float32)[:150, :72]
        assert np.linalg.norm(found - wanted) < 5e-3 * np.linalg.norm(wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_experts_of_every_type(cuda: CudaBackend, checkpoints: dict[str, Path], kind: str) -> None:
    """Of a few rows and of many, beside the formulas in float64."""
    config, rng, num_experts, used = load_config(checkpoints["moe"]), np.random.default_rng(1), 5, 2
    hidden, width, rows = config.hidden, 32, 20
    if BY_NAME[kind].block == 256:
        hidden, width = 256, 256
        config = replace(config, hidden=hidden)

    def weight(outputs: int, inputs: int) -> Stored:
        seed = int(rng.integers(1 << 30))
        return replace(w := stored(kind, outputs, inputs), raw=np.random.default_rng(seed).permutation(w.raw))

    parts = [[weight(*shape) for _ in range(num_experts)] for shape in ((width, hidden), (width, hidden), (hidden, width))]
    shared = [weight(*shape) for shape in ((width, hidden), (width, hidden), (hidden, width))]
    router, gate = stored("F32", 16, hidden), stored("F32", 1, hidden)
    x = rng.normal(size=(rows, hidden)).astype(np.float32) * np.float32(0.1)

    def silu(v: Any) -> Any:
        return v / (1 + np.exp(-v))

    def ffn(row: Any, gate: Stored, up: Stored, down: Stored) -> Any:
        one, other, last = (np.asarray(w.values(), np.float64) for w in (gate, up, down))
        return last @ (silu(one @ row) * (other @ row))

    wanted = np.zeros((rows, hidden))
    for r, row in enumerate(x.astype(np.float64)):
        logits = bf16(router.values())[:num_experts].astype(np.float64) @ bf16(row.astype(np.float32)[None])[0]
        chosen = np.argsort(-logits, kind="stable")[:used]
        shares = np.exp(logits[chosen] - logits.max())
        for e, share_ in zip(chosen, shares / shares.sum(), strict=True):
            wanted[r] += share_ * ffn(row, parts[0][int(e)], parts[1][int(e)], parts[2][int(e)])
        wanted[r] += ffn(row, *shared) / (1 + np.exp(-(gate.values()[0].astype(np.float64) @ row)))

    matrices = [[cuda.matrix(w) for w in part] for part in parts]
    own = cuda.matrix(replace(router, raw=router.raw[:num_experts]))
    experts = Experts(matrices[0], matrices[1], matrices[2], used)
    w = MoeWeights(own, experts, DenseWeights(*map(cuda.matrix, shared)), cuda.matrix(gate))

    def moe(x: Any, *, is_wide: bool = False) -> Any:
        p = Program(config, cuda.packing, len(x), 1, 1, is_wide=is_wide)
        cuda.device.put(p.buffer("given", x.shape), x)
        formats = p.formats(w.router, w.shared_gate, w.shared.gate, w.experts.gate[0])
        u = p.prepared("u", hidden, len(x), formats, is_routed=True)
        p.step("prepare", (len(x),), 64, p.address("given"), NOWHERE, hidden, u.struct, shared=4 * hidden)
        p._moe(u, w)  # pyright: ignore[reportPrivateUsage]
        assert any(step.kernel == "group_rows" for step in p.steps) == (len(x) > 1)  # experts are read once for all rows of several
        cuda.kernels(config).run(p.steps)
        return cuda.device.to_host(p.buffers["parts of 1"])[0]

    together = moe(x)
    for found in (together, moe(x, is_wide=True)):
        assert np.linalg.norm(found - wanted) < 0.03 * np.linalg.norm(wanted)
    for row in range(3):
        np.testing.assert_array_equal(moe(x[row : row + 1])[0], together[row])


@pytest.mark.parametrize("dim", [128, 256])
def test_the_attention_of_a_chunk_of_large_heads(cuda: CudaBackend, dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rows that begin within a page, against every position before them, in chunks that end anywhere."""
    c, layer, start, rows = replace(PUBLISHED["0.8B"], heads=6, kv_heads=2, head_dim=dim, rotary_dim=32), 1, 150, 45
    rng, device = np.random.default_rng(3), cuda.device
    keys, values = (bf16(rng.normal(size=(2, start + rows, dim)).astype(np.float32)) for _ in range(2))  # of each kv head
    queries = bf16(rng.normal(size=(rows, 6, dim)).astype(np.float32))
    table = np.array([3, 0, 5, 2], np.int32)
    in_pages = [np.zeros((2, 6, 2, *shape), np.uint16) for shape in ((PAGE, dim), (dim, PAGE))]  # layers, pages, kv heads
    for position in range(start + rows):
        page, at = table[position // PAGE], position % PAGE
        in_pages[0][layer, page, :, at] = keys[:, position].view(np.uint32) >> 16
        in_pages[1][layer, page, :, :, at] = values[:, position].view(np.uint32) >> 16
    of_keys, of_values, of_table = (device.to_device(each) for each in (*in_pages, table))

    def attend(first: int, count: int) -> list[Any]:
        p = Program(c, cuda.packing, count, 1, 1, is_wide=True)
        span = SpanStruct(
            position=start + first, base=start + first, keys=device.address(of_keys), values=device.address(of_values),
            table=device.address(of_table), num_pages=6, num_rows=count, state_slots=1, column_slots=1,
        )  # fmt: skip
        device.put(p.buffer("spans", (SPAN.itemsize,), np.uint8), spans_array([span]))
        given = device.to_device((queries[first : first + count].view(np.uint32) >> 16).astype(np.uint16))
        p.attend(layer, device.address(given))
        cuda.kernels(c).run(p.steps)
        return [device.to_host(p.buffers[name])[:, :, 0] for name in ("sums", "ends")]

    for _ in capabilities(cuda, monkeypatch):
        sums, ends = attend(0, rows)
        for row in range(rows):
            seen = start + row + 1
            for head in range(6):
                scores = keys[head // 3, :seen].astype(np.float64) @ queries[row, head] / np.sqrt(dim)
                shares = np.exp(scores - scores.max())
                assert abs(ends[row, head, 0] - scores.max()) < 1e-4
                assert abs(ends[row, head, 1] / shares.sum() - 1) < 5e-3
                wanted = shares @ values[head // 3, :seen] / shares.sum()
                assert np.linalg.norm(sums[row, head] / ends[row, head, 1] - wanted) < 5e-3 * np.linalg.norm(wanted)
        for first, count in ((0, 1), (1, 30), (31, 14)):
            for found, whole in zip(attend(first, count), (sums, ends), strict=True):
                np.testing.assert_array_equal(found, whole[first : first + count])


def test_the_recurrence_of_large_heads(cuda: CudaBackend) -> None:
    """Rows one by one, as the formulas say, of the 0.8B shape: of a verify, and of a chunk from the middle of the windows on."""
    config, rng, rows, position = PUBLISHED["0.8B"], np.random.default_rng(1), 11, 2
    c, heads, dim = config, config.value_heads, config.key_dim
    x = rng.normal(size=(position + rows, c.channels)).astype(np.float32)
    b, a = rng.normal(size=(2, rows, heads)).astype(np.float32)
    conv = rng.uniform(-0.5, 0.5, (c.conv_width, c.channels)).astype(np.float32)
    log_decay, dt_bias = -rng.uniform(0.1, 2, heads).astype(np.float32), rng.normal(size=heads).astype(np.float32)
    initial = rng.normal(size=(heads, c.value_dim, dim)).astype(np.float32)

    padded = np.concatenate([np.zeros((c.conv_width - 1, c.channels)), x]).astype(np.float64)
    mixed = sum(padded[tap + position : tap + position + rows] * conv[tap] for tap in range(c.conv_width))
    mixed = (mixed / (1 + np.exp(-mixed))).reshape(rows, -1, dim)
    unit = mixed / np.sqrt((mixed**2).sum(-1, keepdims=True) + 1e-6)
    q, k, v = unit[:, : c.key_heads] / np.sqrt(dim), unit[:, c.key_heads : 2 * c.key_heads], mixed[:, 2 * c.key_heads :]
    state, wanted = initial.astype(np.float64), np.zeros((rows, heads, c.value_dim))
    for t in range(rows):
        state = state * np.exp(log_decay * np.log1p(np.exp(a[t].astype(np.float64) + dt_bias)))[:, None, None]
        of = np.arange(heads) * c.key_heads // heads
        write = (v[t] - np.einsum("hvk,hk->hv", state, k[t, of])) / (1 + np.exp(-b[t].astype(np.float64)))[:, None]
        state = state + write[:, :, None] * k[t, of][:, None]
        wanted[t] = np.einsum("hvk,hk->hv", state, q[t, of])

    for is_wide in (False, True):
        p = Program(config, cuda.packing, rows, 1, 1, is_wide=is_wide)
        device = cuda.device
        states = device.zeros((1, c.num_delta, heads, c.value_dim, dim), np.float32)
        columns = device.zeros((c.num_delta, 64, c.channels), np.float32)
        gates = device.zeros((c.num_delta, 64, 2 * heads), np.float32)
        device.put(states[0, 1], initial)
        device.put(columns[1, :position], x[:position])
        span = SpanStruct(
            position=position, base=position, states=device.address(states), columns=device.address(columns), gates=device.address(gates),
            num_rows=rows, state_slots=1, column_slots=64,
        )  # fmt: skip
        device.put(p.buffer("spans", (SPAN.itemsize,), np.uint8), spans_array([span]))
        for name, values in (("x", x[position:]), ("b", b), ("a", a)):
            device.put(p.buffer(name, values.shape), values)
        out = p.buffer("out", (rows, heads, c.value_dim))
        w = DeltaWeights(None, None, None, None, conv, log_decay, dt_bias, np.ones(1, np.float32), None)
        of_x, of_b, of_a = (Column(p.address(name), width) for name, width in (("x", c.channels), ("b", heads), ("a", heads)))
        (p.delta_of_chunk if is_wide else p.delta)(w, 1, of_x, of_b, of_a, p.address("out"))
        cuda.kernels(config).run(p.steps)
        assert np.linalg.norm(device.to_host(out) - wanted) < 1e-5 * np.linalg.norm(wanted)
        if is_wide:
            assert np.linalg.norm(device.to_host(states)[0, 1] - state) < 1e-5 * np.linalg.norm(state)
            at = np.arange(position + rows - 3, position + rows)
            np.testing.assert_array_equal(device.to_host(columns)[1, at % 64], x[at])
