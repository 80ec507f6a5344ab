"""The C kernels: every format against its definition, the same bits in any company, with any number of threads, and (where sums of
quants are exact) on any instruction set."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forerun.core.errors import InternalBug
from forerun.core.vocabulary import Choosing, SamplingParams
from forerun.kernels.backends import make_head, make_memory, make_trunk
from forerun.kernels.cpu.library import FORMATS, INSTRUCTION_SETS, Library, library, physical_cores
from forerun.kernels.cpu.matrices import CpuBackend, CpuMatrix
from forerun.kernels.cpu.program import EMBED, Program
from forerun.kernels.formats.stored import BY_NAME, Stored
from forerun.kernels.model.config import ModelConfig, load_config
from forerun.kernels.model.drafts import MtpRows, Wanted, draft_by_guesses
from forerun.kernels.model.memory import alone
from forerun.kernels.model.trunk import Rows
from forerun.kernels.model.weights import FolderCheckpoint, load_weights
from forerun.kernels.reference import ReferenceBackend

from tests.checkpoints import LAYOUTS, prompt
from tests.kernels.blocks import random_weights

#: Outputs beyond whole tiles, and beyond one unit of work.
OUTPUTS = 83
FLOATS = ("F32", "F16", "BF16")


@pytest.mark.parametrize("number", ["INTERFACE", "ARITHMETIC"])
def test_kernels_of_other_sources_are_not_called(monkeypatch: pytest.MonkeyPatch, number: str) -> None:
    Library()
    monkeypatch.setattr(f"forerun.kernels.cpu.library.{number}", 0)
    with pytest.raises(ImportError, match="install the package again"):
        Library()


def supported() -> list[str]:
    found: list[str] = []
    for name in INSTRUCTION_SETS:
        with suppress(InternalBug):
            found.append(library().use(name))
    library().use("")
    return found


@pytest.fixture(params=supported())
def instructions(request: pytest.FixtureRequest) -> Iterator[str]:
    yield library().use(request.param)
    library().use("")


@pytest.fixture
def config(checkpoints: dict[str, Path]) -> ModelConfig:
    return load_config(checkpoints["dense"])


def stored(kind: str, inputs: int) -> Stored:
    return random_weights(kind, OUTPUTS, inputs, np.random.default_rng(3))


def product(config: ModelConfig, matrix: CpuMatrix, x: Any, num_threads: int = 2, onto: Any = None) -> Any:
    program = Program(config, CpuBackend(num_threads))
    a, b = program.buffer("a", matrix.inputs), program.buffer("b", matrix.outputs)
    program.linear(a, (matrix, b), adds=onto is not None)
    y = np.empty((len(x), matrix.outputs), np.float32) if onto is None else onto.copy()
    program.run(len(x), {a: x, b: y})
    return y


def rounded(kind: str, x: Any) -> Any:
    """What a product sees of its rows: bytes with a scale for 32 values, for 256 (those with names in _K), or the values themselves."""
    if kind in FLOATS:
        return x.astype(np.float64)
    blocks = x.reshape(len(x), -1, 256 if kind.endswith("_K") else 32).astype(np.float64)
    scale = np.abs(blocks).max(-1, keepdims=True) / 127
    return (np.rint(blocks / np.where(scale > 0, scale, 1)) * scale).reshape(x.shape)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("inputs", [512, 39])
def test_products(instructions: str, config: ModelConfig, kind: str, inputs: int) -> None:
    if inputs % BY_NAME[kind].block:
        inputs = 768  # of whole blocks
    weight = stored(kind, inputs)
    matrix, values = CpuBackend(2).matrix(weight), weight.values().astype(np.float64)
    x = np.random.default_rng(4).normal(0, 1, (18, inputs)).astype(np.float32)
    x[1] = 0
    x[2, : inputs // 2] *= 100
    x[3] *= 1e-20
    alone = np.concatenate([product(config, matrix, row[None]) for row in x])
    expected = rounded(kind, x) @ values.T
    size = np.abs(rounded(kind, x)) @ np.abs(values).T
    assert np.abs(alone - expected).max(1).max() < np.inf
    # A place where rounding to bytes goes the other way in float32 is one step of one input.
    np.testing.assert_array_less(np.abs(alone - expected), 2e-3 * size + 1e-30)
    assert np.median(np.abs(alone - expected) / np.maximum(size, 1e-30)) < 2e-6
    for rows in (*range(1, 19), 18):
        for num_threads in (1, 2, 5):
            np.testing.assert_array_equal(product(config, matrix, x[:rows], num_threads), alone[:rows])
    onto = np.random.default_rng(5).normal(0, 1, alone.shape).astype(np.float32)
    np.testing.assert_array_equal(product(config, matrix, x, onto=onto), onto + alone)
    short = CpuBackend(2).first_outputs(matrix, 33)
    np.testing.assert_array_equal(product(config, short, x), alone[:, :33])


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind not in FLOATS])
def test_quantised_products_have_the_same_bits_everywhere(config: ModelConfig, kind: str) -> None:
    matrix = CpuBackend(2).matrix(stored(kind, 512))
    x = np.random.default_rng(6).normal(0, 1, (7, 512)).astype(np.float32)
    results: list[Any] = []
    for name in supported():
        library().use(name)
        results.append(product(config, matrix, x))
    library().use("")
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])


@pytest.mark.parametrize("kind", FORMATS)
def test_embeddings_are_the_values_of_the_file(config: ModelConfig, kind: str) -> None:
    weight = stored(kind, 512)
    program = Program(config, CpuBackend(2))
    x = program.buffer("x", 512)
    program.op(EMBED, [], [x], [CpuBackend(2).matrix(weight)])
    out, tokens = np.empty((4, 512), np.float32), [0, 82, 15, 16]
    program.run(4, {x: out}, (tokens, None))
    np.testing.assert_allclose(out, weight.values()[tokens], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_model_has_the_same_bits_with_any_number_of_threads(checkpoints: dict[str, Path], layout: str) -> None:
    results: list[Any] = []
    for num_threads in (1, 2, 3, 7):
        backend = CpuBackend(num_threads)
        weights = load_weights(FolderCheckpoint(checkpoints[layout]), load_config(checkpoints[layout]), backend)
        trunk, memory = make_trunk(weights, backend), alone(make_memory(weights.config, backend), 90, 5)
        first: Any = trunk.prefill(Rows(memory, 0, tuple(prompt(64))), is_last=True)
        results.append(np.concatenate([first, trunk.verify([Rows(memory, 64, (1, 2, 3, 4, 5))])[0]]))
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])


@pytest.mark.parametrize("layout", ["dense", "moe"])
def test_parts_of_an_attention_are_the_same_whoever_computes_them(checkpoints: dict[str, Path], layout: str) -> None:
    """A row that sees 1,030 positions is three parts: one after another in a chunk, beside each other where there are threads to spare."""
    results, tokens = list[Any](), tuple(prompt(1035))
    for num_threads in (1, 3, 9):
        backend = CpuBackend(num_threads)
        weights = load_weights(FolderCheckpoint(checkpoints[layout]), load_config(checkpoints[layout]), backend)
        trunk, memory = make_trunk(weights, backend), alone(make_memory(weights.config, backend), 1040, 5)
        found = list[Any]([trunk.prefill(Rows(memory, at, tokens[at : at + 64]), is_last=True) for at in range(0, 1024, 64)][-1:])
        found += [trunk.verify([Rows(memory, 1024, tokens[1024:1029])])[0]]
        found += [trunk.verify([Rows(memory, 1029 + i, tokens[1029 + i : 1030 + i])])[0] for i in range(5)]
        results.append(np.concatenate(found))
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])
    slow = ReferenceBackend()
    weights = load_weights(FolderCheckpoint(checkpoints[layout]), load_config(checkpoints[layout]), slow)
    trunk, memory = make_trunk(weights, slow), alone(make_memory(weights.config, slow), 1040, 5)
    for at in range(0, 1024, 64):
        trunk.prefill(Rows(memory, at, tokens[at : at + 64]), is_last=False)
    wanted: Any = trunk.verify([Rows(memory, 1024, tokens[1024:1029])])[0]
    np.testing.assert_allclose(results[0][1:6], wanted, rtol=1e-3, atol=1e-3 * np.abs(wanted).max())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_prefill_and_steps_have_the_same_bits(checkpoints: dict[str, Path], layout: str) -> None:
    backend = CpuBackend(2)
    weights = load_weights(FolderCheckpoint(checkpoints[layout]), load_config(checkpoints[layout]), backend)
    trunk, tokens = make_trunk(weights, backend), tuple(prompt(64))
    chunk, steps, parts = (alone(make_memory(weights.config, backend), 90, 5) for _ in range(3))
    assert make_memory(weights.config, backend).steps_equal_chunks
    logits = trunk.prefill(Rows(chunk, 0, tokens), is_last=True)
    rows = [trunk.verify([Rows(steps, i, tokens[i : i + 4])])[0] for i in range(0, 64, 4)]
    np.testing.assert_array_equal(logits, rows[-1][-1:])
    np.testing.assert_array_equal(chunk.hidden.read(0, 64), steps.hidden.read(0, 64))
    trunk.prefill(Rows(parts, 0, tokens[:37]), is_last=False)
    np.testing.assert_array_equal(trunk.prefill(Rows(parts, 37, tokens[37:]), is_last=True), logits)
    arrays = list[dict[str, Any]]()
    for memory in (chunk, steps, parts):
        trunk.freeze(memory, 64, is_whole=True)
        assert memory.frozen is not None
        arrays.append(memory.frozen.arrays)
    for name, array in arrays[0].items():
        for other in arrays[1:]:
            np.testing.assert_array_equal(other[name], array, name)


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "next"])
def test_the_last_rows_alone_have_the_same_bits(checkpoints: dict[str, Path], layout: str) -> None:
    backend, c = CpuBackend(2), load_config(checkpoints[layout])
    head = make_head(load_weights(FolderCheckpoint(checkpoints[layout]), c, backend), backend)
    rng, sizes = np.random.default_rng(8), (5, 1, 70)
    hidden = [rng.normal(0, 1, (size, c.hidden)).astype(np.float32) for size in sizes]
    results: list[Any] = []
    for compute in (head.forward, head.last):
        memories = [alone(make_memory(c, backend), 80, 4) for _ in sizes]
        batch = [MtpRows(m, 0, tuple(prompt(size)), h) for m, size, h in zip(memories, sizes, hidden, strict=True)]
        results += [compute(batch), np.concatenate([memory.mtp.read(size) for memory, size in zip(memories, sizes, strict=True)], axis=3)]
    np.testing.assert_array_equal(results[2], results[0][[4, 5, 75]])
    np.testing.assert_array_equal(results[3], results[1])
    outputs, logits = head.guess([MtpRows(alone(make_memory(c, backend), 80, 4), 0, tuple(prompt(5)), hidden[0])])
    np.testing.assert_array_equal(outputs, results[2][:1])
    np.testing.assert_array_equal(logits, head.logits(outputs))


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "next"])
def test_drafts_are_those_of_the_loop_in_python(checkpoints: dict[str, Path], layout: str) -> None:
    backend, c = CpuBackend(2), load_config(checkpoints[layout])
    head = make_head(load_weights(FolderCheckpoint(checkpoints[layout]), c, backend), backend)
    rng, sizes = np.random.default_rng(9), (5, 1, 30, 2, 8)
    hidden = [rng.normal(0, 1, (size, c.hidden)).astype(np.float32) for size in sizes]
    wanted = [
        Wanted(Choosing(SamplingParams()), 4),
        Wanted(Choosing(SamplingParams(1.0, seed=3, top_k=30)), 6),
        Wanted(Choosing(SamplingParams(0.7, seed=4, top_p=0.8)), 3),
        Wanted(Choosing(SamplingParams()), 5, floor=0.4),
        Wanted(Choosing(SamplingParams(1.5, seed=5)), 5, least=0.5),
    ]
    results: list[Any] = []
    for draft in (head.draft, partial(draft_by_guesses, head)):
        memories = [alone(make_memory(c, backend), 80, 8) for _ in sizes]
        batch = [MtpRows(m, 0, tuple(prompt(size)), h) for m, size, h in zip(memories, sizes, hidden, strict=True)]
        results.append((draft(batch, wanted), np.concatenate([memory.mtp.read(40) for memory in memories])))
    (found, cache), (expected, expected_cache) = results
    assert [each.tokens for each in found] == [each.tokens for each in expected]
    np.testing.assert_allclose([p for each in found for p in each.shares], [p for each in expected for p in each.shares], rtol=1e-4)
    np.testing.assert_array_equal(cache, expected_cache)
    assert len(found[0].tokens) == 4
    assert sum(len(each.tokens) for each in found) < sum(each.limit for each in wanted)  # some were not sure enough


def test_calls_from_several_threads_wait_for_each_other(config: ModelConfig) -> None:
    matrix = CpuBackend(2).matrix(stored("Q8_0", 512))
    x = np.random.default_rng(7).normal(0, 1, (4, 512)).astype(np.float32)
    expected = product(config, matrix, x)
    with ThreadPoolExecutor(4) as pool:
        for y in pool.map(partial(product, config, matrix, x), [1, 2, 3] * 100):
            np.testing.assert_array_equal(y, expected)


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
def test_threads_that_are_late_change_nothing(tmp_path: Path) -> None:
    source, flags = Path(__file__).with_name("late_threads.c"), ["-O2", "-std=gnu11", "-pthread"]
    subprocess.run(["cc", *flags, str(source), "-o", str(tmp_path / "check")], check=True, timeout=60)
    subprocess.run([str(tmp_path / "check")], check=True, timeout=60)


def test_a_child_process_starts_threads_of_its_own() -> None:
    script = """
import os, numpy as np
from forerun.kernels.cpu.matrices import CpuBackend
from forerun.kernels.formats.stored import Stored
raw = Stored("Q8_0", 32, np.zeros((64, 34), np.uint8))
CpuBackend(2).matrix(raw)
child = os.fork()
CpuBackend(2).matrix(raw)
if child:
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_threads_default_to_the_physical_cores() -> None:
    assert CpuBackend().num_threads == physical_cores() >= 1


@pytest.mark.skipif(
    not (shutil.which("aarch64-linux-gnu-gcc") and shutil.which("qemu-aarch64")), reason="no cross compiler, or no emulator"
)
def test_neon_computes_what_plain_c_does(tmp_path: Path) -> None:
    here = Path(__file__).parent
    sources = [here / "instruction_sets.c", *sorted((here.parents[1] / "kernels" / "cpu").glob("*.c"))]
    flags = ["-O1", "-std=gnu11", "-fno-math-errno", "-ffp-contract=off", "-pthread", "-static", f"-I{sources[1].parent}"]
    subprocess.run(["aarch64-linux-gnu-gcc", *flags, *map(str, sources), "-o", str(tmp_path / "check"), "-lm"], check=True, timeout=100)
    done = subprocess.run(["qemu-aarch64", "-cpu", "max", str(tmp_path / "check")], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout.split()) == (0, ["portable", "neon"])
