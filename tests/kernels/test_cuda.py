"""The CUDA kernels one by one, on a CPU in a device's place (`--cuda`: on a device), forwards and backwards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forerun.core.embeddings import lay_out
from forerun.core.errors import InternalBug
from forerun.core.vocabulary import Choosing, History, SamplingParams
from forerun.kernels.backend import Experts
from forerun.kernels.backends import make_head, make_memory, make_trunk
from forerun.kernels.cuda import program
from forerun.kernels.cuda.device import DRAW, HOPPER_CAPABILITY, NOWHERE, SPAN, CudaMark, SpanStruct
from forerun.kernels.cuda.graph import CudaHead, CudaTrunk, build_trunk
from forerun.kernels.cuda.matrices import BF16, CudaBackend, CudaMatrix
from forerun.kernels.cuda.memory import CudaSequence, spans_array
from forerun.kernels.cuda.program import Column, Program, look_ahead
from forerun.kernels.cuda.recorded import DeviceRows, filters_of, put_draw
from forerun.kernels.cuda.rounds import DeviceRounds, Start
from forerun.kernels.cuda.synthetic import FORMATS, synthetic_weights
from forerun.kernels.formats.stored import BY_NAME, Stored, quantise
from forerun.kernels.model.config import load_config
from forerun.kernels.model.drafts import Drafted, MtpRows, Wanted, draft_by_guesses
from forerun.kernels.model.inputs import GivenRows
from forerun.kernels.model.memory import alone
from forerun.kernels.model.pages import PAGE
from forerun.kernels.model.recurrent import STORES, StoreName
from forerun.kernels.model.sizes import PUBLISHED
from forerun.kernels.model.trunk import Rows
from forerun.kernels.model.weights import DeltaWeights, DenseWeights, MoeWeights
from forerun.kernels.reference import ReferenceBackend
from forerun.kernels.sampling import choose, share

from tests.checkpoints import LAYOUTS, prompt, prompt_with_rows
from tests.conftest import cuda_backend, load
from tests.kernels.blocks import random_weights
from tests.kernels.cuda_on_cpu import HostDevice

#: For tests of whole models whose kernels others run in both orders.
in_one_order = pytest.mark.parametrize("cuda", ["forwards"], indirect=True)


@pytest.fixture(params=["forwards", "backwards"])
def cuda(request: pytest.FixtureRequest) -> Iterator[CudaBackend]:
    backend = cuda_backend(bool(request.config.getoption("--cuda")), request.param == "backwards")
    yield backend
    if isinstance(backend.device, HostDevice):
        backend.device.check()


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


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_are_those_of_the_reference_but_for_rounding(cuda: CudaBackend, checkpoints: dict[str, Path], layout: str) -> None:
    found, tokens = list[list[Any]](), prompt(80)
    for backend in (cuda, ReferenceBackend()):
        weights = load(checkpoints[layout], backend)
        trunk, memory = make_trunk(weights, backend), alone(make_memory(weights.config, backend), 100, 9)
        trunk.prefill(Rows(memory, 0, tuple(tokens[:64])), is_last=False)
        results = [trunk.prefill(Rows(memory, 64, tuple(tokens[64:70])), is_last=True)]
        results += trunk.verify([Rows(memory, 70, tuple(tokens[70:74]))])
        if weights.mtp is not None:
            head = make_head(weights, backend)
            hidden = np.random.default_rng(1).normal(size=(5, weights.config.hidden)).astype(np.float32)
            results += head.guess([MtpRows(memory, 0, tuple(tokens[:5]), hidden)])
        found.append([np.asarray(each) for each in results])
    for one, other in zip(*found, strict=True):
        assert np.linalg.norm(one - other) < 0.15 * np.linalg.norm(other)


def test_rows_in_place_of_tokens_and_their_places(cuda: CudaBackend, checkpoints: dict[str, Path]) -> None:
    """With drafts of the MTP head, and from the middle of an image on."""
    found, encoded = list[list[Any]](), lay_out(prompt_with_rows(64))
    for backend in (cuda, ReferenceBackend()):
        weights = load(checkpoints["dense"], backend)
        trunk, head = make_trunk(weights, backend), make_head(weights, backend)
        memory = alone(make_memory(weights.config, backend), 120, 9)
        memory.give(GivenRows(encoded.embeddings))
        results = list[Any]()
        for start, end in ((0, 20), (20, 84), (84, 90)):
            said = [trunk.prefill(Rows(memory, start, encoded.ids[start:end]), is_last=True)]
            said += head.guess([MtpRows(memory, start, encoded.ids[start:end], memory.hidden.before(start, end - start))])
            results += [np.asarray(each) for each in said]
        results += [np.asarray(each) for each in trunk.verify([Rows(memory, 90, (1, 2, 3))])]
        found.append(results)
    for one, other in zip(*found, strict=True):
        assert np.linalg.norm(one - other) < 0.15 * np.linalg.norm(other)


@in_one_order
@pytest.mark.parametrize("store", STORES)
def test_any_held_position_can_be_gone_on_from(cuda: CudaBackend, checkpoints: dict[str, Path], store: StoreName) -> None:
    """tests/gpu/test_rollback.py in short."""
    weights, prefix, text, max_rows = load(checkpoints["dense_r3"], cuda), prompt(20), prompt(14), 5
    trunk = CudaTrunk(weights, cuda)

    def begin() -> Any:
        memory = alone(make_memory(weights.config, cuda), 60, max_rows, store)
        trunk.prefill(Rows(memory, 0, tuple(prefix)), is_last=False)
        return memory

    memory = begin()
    plain = [np.asarray(trunk.verify([Rows(memory, len(prefix) + i, (token,))])[0])[0] for i, token in enumerate(text)]
    rng, memory, at = np.random.default_rng(3), begin(), 0
    for turn in range(17):
        right = int(rng.integers(0, max_rows + 1))
        rows = (text[at : at + right] + [3] * max_rows)[: max(1, int(rng.integers(right, max_rows + 1)))]
        logits = np.asarray(trunk.verify([Rows(memory, len(prefix) + at, tuple(rows))])[0])
        right = min(right, len(rows), len(text) - at)
        np.testing.assert_array_equal(logits[:right], np.array(plain)[at : at + right].reshape(logits[:right].shape))
        at += int(rng.integers(0, right + 1))
        if turn % 8 == 7:
            trunk.freeze(memory, len(prefix) + at, is_whole=True)
            frozen, memory = memory.frozen, begin()
            memory.restore_snapshot(frozen)
        if at > len(text) - max_rows:
            memory, at = begin(), 0


@in_one_order
@pytest.mark.parametrize(("depth", "rates"), [(0, None), (3, None), (3, (0.9, 0.8, 0.7))])
def test_rounds_on_the_device_say_what_single_rows_say(cuda: CudaBackend, checkpoints: dict[str, Path], depth: int, rates: Any) -> None:
    weights, num_tokens = load(checkpoints["dense_r3"], cuda), 8
    trunk, head = CudaTrunk(weights, cuda), CudaHead(weights, cuda)

    def start(tokens: list[int]) -> Start:
        memory = alone(make_memory(weights.config, cuda), 120, 9)
        assert isinstance(memory, CudaSequence)
        trunk.prefill(Rows(memory, 0, tuple(tokens[:-1])), is_last=False)
        head.last([MtpRows(memory, 0, tuple(tokens[:-1]), None)])
        return Start(memory, tokens)

    prompts = [prompt(20 + i) for i in range(2)]
    rounds = DeviceRounds(weights, cuda, head, [start(tokens) for tokens in prompts], depth, rates if depth else None)
    found = [list[int]() for _ in prompts]
    waiting, num_rounds = rounds.launch(), 1
    while min(map(len, found)) < num_tokens:
        following = rounds.launch()  # before the last one's tokens are here
        for text, more in zip(found, waiting(), strict=True):
            text += more
        waiting, num_rounds = following, num_rounds + 1
    if rates is not None and depth:  # what is accepted is not the target's, but it is what was computed
        assert num_rounds < num_tokens
    for tokens, text in zip(prompts, found, strict=True):
        sequence, all_tokens = start(tokens), list(tokens)
        for token in text[:num_tokens]:
            logits = trunk.verify([Rows(sequence.memory, len(all_tokens) - 1, (all_tokens[-1],))])[0]
            assert isinstance(logits, DeviceRows)
            chosen = logits.choose_tokens(None, []).read()
            assert chosen == [int(np.asarray(logits)[0].argmax())]
            assert rates is not None or token == chosen[0]
            all_tokens.append(token)


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


def test_parts_of_an_attention_one_after_another_have_the_same_bits(
    cuda: CudaBackend, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where there are many rows, or no memory to leave all parts in."""
    weights, tokens, found = load(checkpoints["dense"], cuda), tuple(prompt(300)), list[Any]()
    for most in (10**6, 0):
        monkeypatch.setattr("forerun.kernels.cuda.program.LOOP_PARTS", most)
        trunk, memory = CudaTrunk(weights, cuda), alone(make_memory(weights.config, cuda), 400, 3)
        trunk.prefill(Rows(memory, 0, tokens), is_last=False)
        found.append(np.asarray(trunk.verify([Rows(memory, 300, (1, 2, 3))])[1]))
    assert np.array_equal(found[0], found[1])


@in_one_order
@pytest.mark.parametrize("layout", ["dense", "moe"])
@pytest.mark.parametrize("kind", FORMATS)
def test_weights_made_on_the_device_make_a_model(cuda: CudaBackend, checkpoints: dict[str, Path], layout: str, kind: str) -> None:
    """They keep rows in bounds, and their matrices are the ones that a model of this config has."""
    backend = CudaBackend(cuda.device)
    weights = synthetic_weights(load_config(checkpoints[layout]), kind, backend)
    trunk, memory = make_trunk(weights, backend), alone(make_memory(weights.config, backend), 40, 3)
    hidden, logits = trunk.verify([Rows(memory, 0, (1, 2, 3))])
    assert np.isfinite(np.asarray(logits)).all()
    assert 0.5 < np.sqrt(np.square(np.asarray(hidden)).mean()) < 2
    assert len(np.unique(np.asarray(logits).argmax(1))) > 1
    assert np.isfinite(np.asarray(make_head(weights, backend).last([MtpRows(memory, 1, (2, 3), None)]))).all()


def test_what_a_failed_device_has_begun_says_so() -> None:
    class Failed:
        ptr = 7

        def synchronize(self) -> None:
            raise OSError("an illegal memory access")

    assert [CudaMark(Failed(), lambda ptr, status=status: status).is_done() for status in (0, 600)] == [True, False]
    with pytest.raises(OSError, match="illegal"):
        CudaMark(Failed(), lambda ptr: 700).is_done()


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


def test_a_product_knows_what_follows_it(cuda: CudaBackend, checkpoints: dict[str, Path]) -> None:
    """Where the next product's weights are, and, before a delta net alone, that its blocks are to be spread."""
    weights = load(checkpoints["dense"], cuda)
    p = Program(weights.config, cuda.packing, 4, 1, 1)
    for name, shape in (("spans", (SPAN.itemsize,)), ("span of", (4,)), ("tokens", (4,))):
        p.buffer(name, shape, np.uint8 if name == "spans" else np.int32)
    build_trunk(p, weights)
    look_ahead(p.steps)
    kernels = [step.kernel for step in p.steps]
    products = [i for i, kernel in enumerate(kernels) if kernel.startswith(("product", "gated_bf16"))]
    aheads = [p.steps[i].arguments[-1] for i in products]
    assert [ahead.weights for ahead in aheads] == [*(p.steps[i].arguments[0].tiles for i in products[1:]), None]
    assert [bool(ahead.is_spread) for ahead in aheads] == [kernels[i + 1] == "delta" for i in products]
    assert kernels.count("delta") == weights.config.num_delta == sum(ahead.is_spread for ahead in aheads)
    assert all(ahead.bytes > 0 for ahead in aheads[:-1])


@in_one_order
@pytest.mark.parametrize("temperatures", [(0.0, 0.0, 0.0), (0.0, 0.8, 1.2)])
def test_drafts_made_on_the_device_are_those_made_guess_by_guess(
    cuda: CudaBackend, checkpoints: dict[str, Path], temperatures: tuple[float, ...]
) -> None:
    """Of three sequences that catch up with 1, 3 and 4 rows: what is filled up, one sequence more, leaves no trace."""
    weights = load(checkpoints["dense"], cuda)
    trunk, head = CudaTrunk(weights, cuda), CudaHead(weights, cuda)
    batch, wanted, tokens = list[MtpRows](), list[Wanted](), prompt(60)
    for count, temperature in zip((1, 3, 4), temperatures, strict=True):
        memory = alone(make_memory(weights.config, cuda), 80, 9)
        trunk.prefill(Rows(memory, 0, tuple(tokens[: 20 + count])), is_last=False)
        head.last([MtpRows(memory, 0, tuple(tokens[:20]), None)])
        batch.append(MtpRows(memory, 20, tuple(tokens[20 : 20 + count]), None))
        wanted.append(Wanted(Choosing(SamplingParams(temperature=temperature, seed=count, top_k=20 * count)), count))
    plain = draft_by_guesses(head, batch, wanted)
    found = head.draft(batch, wanted)
    assert [each.tokens for each in found] == [each.tokens for each in plain]
    assert [len(each.tokens) for each in found] == [1, 3, 4]
    for one, other in zip(found, plain, strict=True):
        np.testing.assert_allclose(one.shares, other.shares, rtol=1e-4)
    cut = head.draft(batch, [replace(each, least=1.0) for each in wanted])
    assert [each.tokens for each in cut] == [()] * 3
    assert head.draft(batch, [replace(each, floor=1.0) for each in wanted]) == [Drafted(each.tokens[:1], each.shares[:1]) for each in found]
    batch = [MtpRows(rows.memory, 20, rows.tokens[:1], None) for rows in batch]  # fewer rows than sequences, once filled up
    assert head.draft(batch, wanted) == [each for i in range(3) for each in head.draft(batch[i : i + 1], wanted[i : i + 1])]
    penalised = Wanted(Choosing(SamplingParams(repetition_penalty=1.5), History(tuple(tokens[:21]), 21)), 2)
    both = head.draft(batch[:2], [penalised, wanted[1]])
    assert [len(each.tokens) for each in both] == [2, 3]
    assert both[1] == head.draft(batch[1:2], wanted[1:2])[0]


def test_drafts_end_where_pages_do_and_go_on_into_the_next_part_of_an_attention(cuda: CudaBackend, checkpoints: dict[str, Path]) -> None:
    """Of two sequences, one has no page for more than two rows; the drafts of the other reach position 256."""
    weights, tokens = load(checkpoints["dense"], cuda), prompt(260)
    trunk, head = CudaTrunk(weights, cuda), CudaHead(weights, cuda)
    wanted, batch = [Wanted(Choosing(SamplingParams()), limit) for limit in (2, 5)], list[MtpRows]()
    for length, capacity in ((62, 64), (254, 300)):
        memory = alone(make_memory(weights.config, cuda), capacity, 1)
        trunk.prefill(Rows(memory, 0, tuple(tokens[:length])), is_last=False)
        head.last([MtpRows(memory, 0, tuple(tokens[:length]), None)])
        batch.append(MtpRows(memory, length, (tokens[length],), None))
    found, plain = head.draft(batch, wanted), draft_by_guesses(head, batch, wanted)
    assert [each.tokens for each in found] == [each.tokens for each in plain]
    assert [len(each.tokens) for each in found] == [2, 5]


def test_many_rows_of_several_sequences_for_the_head(cuda: CudaBackend, checkpoints: dict[str, Path]) -> None:
    weights, tokens = load(checkpoints["dense"], cuda), prompt(40)
    head, trunk = CudaHead(weights, cuda), CudaTrunk(weights, cuda)
    batch = [MtpRows(alone(make_memory(weights.config, cuda), 80, 9), 0, tuple(tokens[i : i + 12]), None) for i in range(3)]
    for rows in batch:
        trunk.prefill(Rows(rows.memory, 0, rows.tokens), is_last=False)
    found = [np.asarray(head.last(batch)), *(np.asarray(head.last([rows])) for rows in batch)]
    for one, other in zip(found[0], found[1:], strict=True):
        np.testing.assert_array_equal(one, other[0])


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


def check_that_chunks_leave_no_trace(backend: CudaBackend, weights: Any, *partitions: list[int]) -> None:
    tokens, found = prompt(310), list[Any]()
    for sizes in partitions:
        trunk, memory = make_trunk(weights, backend), alone(make_memory(weights.config, backend), 320, 9)
        at = 0
        for size in sizes:
            trunk.prefill(Rows(memory, at, tuple(tokens[at : at + size])), is_last=False)
            at += size
        found.append([np.asarray(each) for each in trunk.verify([Rows(memory, at, tuple(tokens[at : at + 3]))])])
    for other in found[1:]:
        for one, its in zip(found[0], other, strict=True):
            np.testing.assert_array_equal(one, its)


@pytest.mark.parametrize("cuda", ["forwards"], indirect=True)
def test_less_shared_memory_changes_no_bits(cuda: CudaBackend, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a chunk, whose attention has one stage of its pages in a block instead of two."""
    weights, tokens, found = load(checkpoints["dense"], cuda), tuple(prompt(150)), list[Any]()
    for max_shared in (cuda.device.max_shared, 24 * 1024):
        monkeypatch.setattr(cuda.device, "max_shared", max_shared)
        trunk, memory = make_trunk(weights, cuda), alone(make_memory(weights.config, cuda), 160, 4)
        found.append(np.asarray(trunk.prefill(Rows(memory, 0, tokens), is_last=True)))
    np.testing.assert_array_equal(found[0], found[1])


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


@in_one_order
def test_where_chunks_end_leaves_no_trace(cuda: CudaBackend, checkpoints: dict[str, Path]) -> None:
    """Nor that 300 positions are two parts of an attention. All layouts: tests/gpu/test_device.py."""
    check_that_chunks_leave_no_trace(cuda, load(checkpoints["dense"], cuda), [270], [1, 2, 37, 80, 7, 143])


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
