"""`forerun bench --device cuda`: kernels and whole rounds of models that need no file, each beside what the memory of this device allows.

Times are medians of a graph of launches, by the device's own clock. Every launch reads other memory than the one before it, so that the
second-level cache does not help; the limit counts each weight, and each recurrent state, once; for a prompt, the operations of its
products.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import cast

import anyio
import numpy as np

from .. import Result, open_engine
from ..actors.model import Defaults, LoadedModel
from ..core.errors import InvalidRequest
from ..kernels.backend import Experts
from ..kernels.cuda.device import SPAN, CudaDevice, Kernels, SpanStruct, Step
from ..kernels.cuda.graph import CudaHead, CudaTrunk
from ..kernels.cuda.matrices import UNIT_BYTES, UNITS, CudaBackend, CudaMatrix
from ..kernels.cuda.memory import CudaMemory, CudaSequence, spans_array
from ..kernels.cuda.program import Column, Program
from ..kernels.cuda.rounds import DeviceRounds, Start
from ..kernels.cuda.synthetic import FORMATS, synthetic_weights
from ..kernels.model.drafts import MtpRows
from ..kernels.model.memory import num_pages
from ..kernels.model.sizes import PUBLISHED
from ..kernels.model.trunk import Rows
from ..kernels.model.weights import DeltaWeights, ModelWeights

#: Bytes that a graph of launches reads: many times the second-level cache.
ENOUGH = 1_500_000_000
RATES = (0.8, 0.7, 0.6)
#: Of an answer.
NUM_TOKENS = 400
#: Of a program that are shown.
NUM_KERNELS = 8


@dataclass(frozen=True, slots=True)
class Figure:
    """`seconds` of one launch or round, and the bytes it must move; `unit` of what is printed."""

    name: str
    seconds: float
    num_bytes: float
    note: str = ""

    def line(self, bandwidth: float) -> str:
        limit = self.num_bytes / bandwidth
        share = f"{100 * limit / self.seconds:.0f} %" if self.num_bytes else ""
        return f"| {self.name} | {1e6 * self.seconds:.1f} | {1e6 * limit:.1f} | {share} | {self.note} |"


class Bench:
    def __init__(self, device: CudaDevice, num_runs: int = 20) -> None:
        self.device, self.num_runs = device, num_runs
        self.backend = CudaBackend(device)
        self.figures: list[Figure] = []
        self.bandwidth, self.rate = self._copy(), self._multiply()

    def _median(self, run: Callable[[], None]) -> float:
        return statistics.median(self.device.seconds(run, self.num_runs))

    def _copy(self) -> float:
        """Bytes a second, read and written, of a large copy."""
        a, b = (self.device.zeros((2**30,), np.uint8) for _ in range(2))

        def run() -> None:
            self.device.put(a, b)

        return 2 * 2**30 / self._median(run)

    def _multiply(self) -> float:
        """Operations a second of a large product of 16-bit floats, by cuBLAS."""
        n, device = 8192, self.device
        with device.using() as cupy:
            a, b = (cupy.random.standard_normal((n, n), np.float32).astype(np.float16) for _ in range(2))
            out = cupy.empty((n, n), np.float16)

        def run() -> None:
            with device.using() as cupy:
                cupy.matmul(a, b, out=out)

        return 2 * n**3 / self._median(run)

    def products(self, outputs: int, inputs: int, rows: Sequence[int]) -> None:
        """One matrix for few rows."""
        config = PUBLISHED["27B"]
        for name, number in FORMATS.items():
            weights, size = list[CudaMatrix](), 0
            while size < ENOUGH:
                weights.append(self._matrix(name, outputs, inputs))
                size += sum(part.nbytes for part in weights[-1].parts if part is not None)
            for count in rows:
                p = Program(config, self.backend.packing, count, 1, 1)
                x = p.prepared("x", inputs, count, {number})
                self._fill(p)
                for m in weights:
                    p.product(m, x, "y", count)
                seconds = self._median(self.backend.kernels(config).record(p.steps)) / len(weights)
                self.figures.append(Figure(f"{outputs} x {inputs} {name}, {count} rows", seconds, size / len(weights)))

    def _matrix(self, kind: str, outputs: int, inputs: int) -> CudaMatrix:
        number, strips = FORMATS[kind], outputs // 16
        units = inputs // UNITS[number]
        of_tiles, of_scales, of_ends = (strips * units * size for size in UNIT_BYTES[number])
        tiles = self.device.random(of_tiles, 1.0 if kind == "bf16" else None)
        m = CudaMatrix(number, outputs, inputs, tiles.reshape(strips, units, -1))
        m.scales = self.device.random(of_scales, 0.01) if of_scales else None
        m.ends = self.device.random(of_ends, 0.01) if of_ends else None
        return m

    def _fill(self, p: Program) -> None:
        for name, buffer in p.buffers.items():
            if name.endswith(("halves", "quants")):
                self.device.put(buffer.view(np.uint8).reshape(-1), self.device.random(buffer.nbytes, 1.0))
            elif name.endswith(("scales", "sums")):
                self.device.put(buffer, np.float32(0.01))

    def delta(self, batch: int, rows: Sequence[int], is_written: bool) -> None:
        """The recurrence of one layer of the 27B shape, one layer after another."""
        config = PUBLISHED["27B"]
        layers = config.num_delta if batch == 1 else 4
        state = config.value_heads * config.key_dim * config.value_dim * 4
        states = self.device.zeros((batch, layers, state // 4), np.float32)
        columns = self.device.zeros((batch, layers, 3 + 32, config.channels), np.float32)
        gates = self.device.zeros((batch, layers, 3 + 32, 2 * config.value_heads), np.float32)
        for count in rows:
            p = Program(config, self.backend.packing, batch * count, batch, 1)
            spans = [
                SpanStruct(
                    position=100, base=100 - is_written, states=self.device.address(states[i]), columns=self.device.address(columns[i]),
                    gates=self.device.address(gates[i]), first_row=i * count, num_rows=count, store=0, state_slots=1, column_slots=35,
                )
                for i in range(batch)
            ]  # fmt: skip
            self.device.put(p.buffer("spans", (batch * SPAN.itemsize,), np.uint8), spans_array(spans))
            stride = config.channels + 2 * config.value_heads
            x = self.device.address(p.buffer("x", (batch * count, stride)))
            mixed = self.device.address(p.buffer("mixed", (batch * count, config.value_heads * config.value_dim)))
            self.device.put(p.buffers["x"].view(np.uint8).reshape(-1), self.device.random(p.buffers["x"].nbytes, 1.0))
            rng = np.random.default_rng(1)
            w = DeltaWeights(
                None, None, None, None, rng.uniform(-0.5, 0.5, (4, config.channels)).astype(np.float32),
                -np.ones(config.value_heads, np.float32), np.ones(config.value_heads, np.float32), np.ones(128, np.float32), None,
            )  # fmt: skip
            b, a = (Column(x + 4 * (config.channels + i * config.value_heads), stride) for i in range(2))
            for layer in range(layers):
                p.delta(w, layer, Column(x, stride), b, a, mixed)
            seconds = self._median(self.backend.kernels(config).record(p.steps)) / layers
            name = f"delta net, 48 heads, batch {batch}, {count} rows" + (" and 1 replayed" if is_written else "")
            self.figures.append(Figure(name, seconds, batch * state * (2 if is_written else 1)))

    def rounds(self, size: str, kind: str, batch: int, depths: Sequence[int], context: int = 512) -> None:
        """Whole rounds, with the acceptance of RATES."""
        config = PUBLISHED[size]
        weights = synthetic_weights(config, kind, self.backend)
        trunk, head = CudaTrunk(weights, self.backend), CudaHead(weights, self.backend)
        maker = CudaMemory(config, self.device)
        capacity, pages = context + 2048, num_pages(context + 2048, 4)
        tokens = [int(t) for t in np.random.default_rng(2).integers(0, 30_000, context)]
        plain = 0.0
        for depth in depths:
            arena = maker.arena(pages * batch)
            starts = list[Start]()
            for _ in range(batch):
                memory = maker.memory(arena, arena.take(pages)[0], capacity, 4, "log")
                _prefill(trunk, head, memory, tokens[:-1])
                starts.append(Start(memory, tokens))
            rounds = DeviceRounds(weights, self.backend, head if depth else None, starts, depth, RATES[:depth] or None)
            seconds = self._median(rounds.replay)
            host, count, begun = list[float](), 0, time.perf_counter()
            waiting = rounds.launch()
            for _ in range(self.num_runs):
                before = time.perf_counter()
                following = rounds.launch()
                host.append(time.perf_counter() - before)
                count += sum(map(len, waiting()))
                waiting = following
            rate = count / (time.perf_counter() - begun)
            plain = rate if depth == 0 else plain
            note = f"{rate:.0f} tokens/s, host {1e6 * statistics.median(host):.0f} us a round"
            if depth and plain:
                note += f", {rate / plain:.2f} of no drafts"
            name = f"{size} {kind}, {batch} sequences, {depth} drafts"
            self.figures.append(Figure(name, seconds, _bytes_of_round(weights, head, batch, depth), note))

    def engine(self, size: str, kind: str, num_requests: Sequence[int]) -> None:
        """Requests at once through the engine, greedy, with the acceptance of RATES; what must be recorded first is recorded before."""
        config = PUBLISHED[size]
        weights = synthetic_weights(config, kind, self.backend)
        model = LoadedModel(size, weights, self.backend, None, Defaults(frozenset(), {"temperature": 0.0}))
        for number in num_requests:
            plain = 0.0
            for spec_type in ("none", "draft-mtp"):
                seconds, results = anyio.run(_answer, model, spec_type, number)
                num_rounds, rate = sum(each.speculation.num_rounds for each in results) / number, number * NUM_TOKENS / seconds
                plain = plain or rate
                note = f"{rate:.0f} tokens/s" + (f", {rate / plain:.2f} of no drafts" if spec_type != "none" else "")
                self.figures.append(Figure(f"{size} {kind}, {number} requests, {spec_type}: a round", seconds / num_rounds, 0, note))

    def steps(self, size: str, kind: str, position: int = 4096) -> None:
        """Where a chunk of a prompt and a verify of four rows go: the kernels that take longest, launched one after another."""
        config = PUBLISHED[size]
        trunk, maker = CudaTrunk(synthetic_weights(config, kind, self.backend), self.backend), CudaMemory(config, self.device)
        kernels, num_tokens = self.backend.kernels(config), position + CudaSequence.max_chunk
        capacity, pages = num_tokens + 4, num_pages(num_tokens + 4, 4)
        arena = maker.arena(pages)
        memory = maker.memory(arena, arena.take(pages)[0], capacity, 4, "log")
        tokens = [int(t) for t in np.random.default_rng(2).integers(0, 30_000, num_tokens)]
        _prefill(trunk, None, memory, tokens)
        programs = {f"a chunk of {CudaSequence.max_chunk} rows": trunk.newest.program}
        trunk.verify([Rows(memory, num_tokens, (1, 2, 3, 4))])
        programs["a verify of 4 rows"] = trunk.newest.program
        for what, program in programs.items():
            of_kernels = dict[str, list[float]]()
            for step, seconds in zip(program.steps, self._each(kernels, program.steps), strict=True):
                of_kernels.setdefault(step.kernel, []).append(seconds)
            for kernel, each in sorted(of_kernels.items(), key=lambda item: -sum(item[1]))[:NUM_KERNELS]:
                note = f"{len(each)} launches, {1e6 * statistics.median(each):.1f} us each"
                self.figures.append(Figure(f"{size} {kind} at {position}, {what}: {kernel}", sum(each), 0, note))

    def _each(self, kernels: Kernels, steps: Sequence[Step]) -> list[float]:
        """What each step takes, with what lies between two launches: medians of runs after the first."""
        number, coming = len(steps), cycle([steps[-1], *steps[:-1]])  # the first is not counted
        taken = self.device.seconds(lambda: kernels.run([next(coming)]), 6 * number)
        return [statistics.median(taken[i + number :: number]) for i in range(number)]

    def prefill(self, size: str, kind: str, num_tokens: int) -> None:
        """A prompt, without and with the MTP head's rows; the limit is that of the products' arithmetic."""
        config = PUBLISHED[size]
        weights = synthetic_weights(config, kind, self.backend)
        trunk, head, maker = CudaTrunk(weights, self.backend), CudaHead(weights, self.backend), CudaMemory(config, self.device)
        pages = num_pages(num_tokens, 4)
        arena = maker.arena(pages)
        table = arena.take(pages)[0]
        tokens = [int(t) for t in np.random.default_rng(2).integers(0, 30_000, num_tokens)]
        seconds = dict[bool, float]()
        for with_head in (False, True):
            taken = list[float]()
            for _ in range(4):  # the first records
                memory = maker.memory(arena, table, num_tokens, 4, "log")
                begun = time.perf_counter()
                _prefill(trunk, head if with_head else None, memory, tokens)
                self.device.wait()
                taken.append(time.perf_counter() - begun)
            seconds[with_head] = statistics.median(taken[1:])
        inner = _count(weights.layers)
        limit = 2 * num_tokens * inner / self.rate
        share = inner / (inner + _count([weights.mtp.fc, weights.mtp.layer] if weights.mtp else []))
        ratio = seconds[False] / seconds[True]
        note = f"{num_tokens / seconds[False]:.0f} tokens/s; with the head's rows {ratio:.2f} of that (its arithmetic: {share:.2f})"
        self.figures.append(Figure(f"{size} {kind}, prompt of {num_tokens}", seconds[False], limit * self.bandwidth, note))


async def _answer(model: LoadedModel, spec_type: str, number: int) -> tuple[float, list[Result]]:
    """The seconds that so many requests at once take, and what came of them."""
    results, begun, rates = list[Result](), 0.0, RATES if spec_type != "none" else ()
    async with open_engine(model, spec_type=spec_type, num_slots=number, prefix_bytes=0, choose="first", synth_rates=rates) as engine:

        async def one(seed: int) -> None:
            results.append(await engine.complete([1, 2, seed], max_tokens=NUM_TOKENS, ignore_eos=True, seed=seed))

        for _ in range(2):
            results.clear()
            begun = time.perf_counter()
            async with anyio.create_task_group() as group:
                for seed in range(number):
                    group.start_soon(one, seed)
        return time.perf_counter() - begun, results


def _prefill(trunk: CudaTrunk, head: CudaHead | None, memory: CudaSequence, tokens: Sequence[int]) -> None:
    for start in range(0, len(tokens), memory.max_chunk):
        chunk = tuple(tokens[start : start + memory.max_chunk])
        trunk.prefill(Rows(memory, start, chunk), is_last=False)
        if head is not None:
            head.last([MtpRows(memory, start, chunk, None)])


def _count(value: object) -> int:
    """Weights of all matrices in a part of a model that a row is multiplied with."""
    if isinstance(value, Experts):
        return value.num_used * sum(_count(each[0]) for each in (value.gate, value.up, value.down))
    if isinstance(value, CudaMatrix):
        return value.outputs * value.inputs
    if isinstance(value, list | tuple):
        return sum(_count(each) for each in cast("Sequence[object]", value))
    return sum(_count(getattr(value, name)) for name in getattr(value, "__dataclass_fields__", {}))


def _bytes_of(value: object, seen: set[int], rows: int) -> float:
    """Of all matrices in a part of a model that so many rows read, each counted once; of experts as many as they use."""
    if isinstance(value, CudaMatrix):
        size = value.strips * value.units * sum(UNIT_BYTES[value.format])
        return 0 if id(value) in seen or seen.add(id(value)) else size
    if isinstance(value, list | tuple):
        return sum(_bytes_of(each, seen, rows) for each in cast("Sequence[object]", value))
    share = 1 - (1 - value.num_used / len(value.gate)) ** rows if isinstance(value, Experts) else 1.0
    fields = getattr(value, "__dataclass_fields__", {})
    return share * sum(_bytes_of(getattr(value, name), seen, rows) for name in fields if name not in ("embedding", "config", "mtp"))


def _bytes_of_round(weights: ModelWeights, head: CudaHead, batch: int, depth: int) -> float:
    """The trunk once and the head's layer and vocabulary for every draft, and every state read and written."""
    c, seen = weights.config, set[int]()
    rows = batch * (depth + 1)
    trunk = _bytes_of(weights.layers, seen, rows) + _bytes_of(weights.head, seen, rows)
    layer = [weights.mtp.fc, weights.mtp.layer] if weights.mtp else []
    drafts = depth * (_bytes_of(layer, seen, batch) + _bytes_of(head.head, set(), batch))
    return trunk + drafts + batch * 2 * 4 * c.num_delta * c.value_heads * c.key_dim * c.value_dim


def bench_cuda(write: Callable[[str], object], sizes: Sequence[str]) -> None:
    """All kernels, then rounds of the `sizes` (each NAME:TYPE, a name of PUBLISHED and one of FORMATS); a table whose lines are written as
    they are found. InvalidRequest when a size is unknown or there is no device."""
    for size in sizes:
        name, _, kind = size.partition(":")
        if name not in PUBLISHED or kind not in FORMATS:
            known = f"{', '.join(PUBLISHED)}, then : and {', '.join(FORMATS)}"
            raise InvalidRequest([("--size", f"{size!r:.50} is unknown; expected one of {known}")])
    try:
        device = CudaDevice()
    except OSError as error:
        raise InvalidRequest([("--device", str(error))]) from error
    bench = Bench(device)
    write(f"copy: {bench.bandwidth / 1e12:.2f} TB/s; product: {bench.rate / 1e12:.0f} TFLOP/s\n")
    write("| | us | limit, us | of the limit | |\n|---|---|---|---|---|\n")
    parts: list[Callable[[], None]] = [
        lambda: bench.products(17408, 5120, (1, 4, 8, 16, 32, 64)),
        lambda: bench.products(5120, 17408, (1, 4, 16, 64)),
        lambda: bench.delta(1, (1, 2, 4, 8), False),
        lambda: bench.delta(1, (4,), True),
        lambda: bench.delta(64, (1, 4), True),
    ]
    for size in sizes:
        name, _, kind = size.partition(":")
        parts.append(lambda name=name, kind=kind: bench.rounds(name, kind, 1, (0, 3)))
        parts.append(lambda name=name, kind=kind: bench.steps(name, kind))
        parts.append(lambda name=name, kind=kind: bench.prefill(name, kind, 8192))
        parts.append(lambda name=name, kind=kind: bench.engine(name, kind, (1, 16)))
    if "0.8B:bf16" in sizes:
        parts.append(lambda: bench.rounds("0.8B", "bf16", 16, (0, 3)))
    for measure in parts:
        begun, bench.backend = len(bench.figures), CudaBackend(device)  # which keeps what it has put together
        measure()
        for figure in bench.figures[begun:]:
            write(figure.line(bench.bandwidth) + "\n")
        gc.collect()
        device.free()
