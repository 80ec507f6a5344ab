"""`forerun bench`: what a model does on this machine, and beside llama.cpp on the same file. All that is compared runs in turn, as speeds
drift: figures are medians with quartiles, and a ratio is the median of the ratios of runs that followed each other."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import Any

import anyio
import numpy as np

from .. import Engine, InvalidRequest, SpeculationOptions, open_engine
from ..actors.model import LoadedModel, load_model, synthetic_model
from ..core.checks import check_ranges
from ..kernels.model.memory import alone
from ..kernels.model.trunk import Rows
from .llama_cpp import LlamaCpp, Run

#: Rows of one verify whose cost is measured.
ROWS = (1, 2, 3, 4, 8, 16)
#: llama.cpp drafts so many tokens; its best is what counts.
PEER_N_MAX = (1, 2, 3)
PEER = "llama.cpp"
#: Kinds of figures that make a curve: tokens a second by drafts a round, cost by rows of a verify.
DRAFTS, ROW_COSTS = "drafts", "rows"
MOST_AT_ONCE, MOST_DRAFTS = 64, 15
TEXT = "def main(argv=None):\n    import sys\n    for x in"


@dataclass(frozen=True, slots=True)
class BenchParams:
    """What is measured: a prompt of `num_prompt` tokens; `num_tokens` tokens after the text, without and with each of `spec_types`, of one
    request and of as many at once as `parallel` says; the head drafting as many tokens as `draft_lengths` says, whatever it thinks of
    them; `num_runs` times each, in turn. With `synth_rates` drafts are accepted at random."""

    num_prompt: int
    num_tokens: int
    num_runs: int
    spec_types: Sequence[str]
    text: str
    num_threads: int | None
    is_beside_llama_cpp: bool = False
    parallel: Sequence[int] = ()
    draft_lengths: Sequence[int] = ()
    synth_rates: tuple[float, ...] = ()
    size: str | None = None  # random weights, instead of a model
    backend: str | None = None  # as load_model has it


@dataclass(frozen=True, slots=True)
class Figure:
    """`values` of all runs, in order, higher is better for tokens/s; `drafts` says how many were accepted of how many drafted. What is
    measured over `at` of something, as `kind` says, is a point of a curve."""

    name: str
    unit: str
    values: tuple[float, ...]
    drafts: str = ""
    kind: str = ""
    at: int = 0
    is_synthetic: bool = False  # drafts were accepted at random

    @property
    def median(self) -> float:
        return float(np.median(self.values))

    @property
    def quartiles(self) -> tuple[float, float]:
        low, high = np.quantile(self.values, [0.25, 0.75])
        return float(low), float(high)

    def over(self, other: Figure) -> Figure:
        """Run by run."""
        ratios = tuple(x / y for x, y in zip(self.values, other.values, strict=True))
        return Figure(f"{self.name} / {other.name}", "times", ratios, is_synthetic=self.is_synthetic or other.is_synthetic)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name, "unit": self.unit, "median": self.median, "quartiles": self.quartiles, "values": self.values,
            "drafts": self.drafts, "kind": self.kind, "at": self.at,
        }  # fmt: skip


async def bench(path: str, params: BenchParams) -> list[Figure]:
    """All figures. ModelFileError, InvalidRequest, also when the peer does not start."""
    violations = check_ranges({"num_prompt": params.num_prompt, "max_tokens": params.num_tokens, "num_runs": params.num_runs})
    lists = {"--parallel": (params.parallel, MOST_AT_ONCE), "--draft-lengths": (params.draft_lengths, MOST_DRAFTS)}
    for flag, (numbers, most) in lists.items():
        violations += [(flag, f"must be from 1 to {most}, got {number}") for number in numbers if not 1 <= number <= most]
    if violations:
        raise InvalidRequest(violations)
    if params.size is not None:
        size = params.size
        model = await anyio.to_thread.run_sync(lambda: synthetic_model(size, backend=params.backend, num_threads=params.num_threads))
    else:
        model = await anyio.to_thread.run_sync(lambda: load_model(path, backend=params.backend, num_threads=params.num_threads))
    if params.is_beside_llama_cpp and not await anyio.Path(path).is_file():
        raise InvalidRequest([("--vs", "needs a GGUF file, which both can read")])
    if params.draft_lengths and not model.has_mtp:
        raise InvalidRequest([("--draft-lengths", "this model has no MTP head")])
    rng = np.random.default_rng(1)
    prompt = tuple(int(token) for token in rng.integers(0, min(model.num_token_ids, 4000), params.num_prompt))

    def text(i: int) -> Sequence[int]:
        """Another one each time, so that nothing can be remembered of it."""
        return model.vocabulary.encode(f"# {i}\n{params.text}") if model.vocabulary is not None else prompt[i : i + 16]

    figures = rows_of(model, params.num_runs)
    async with AsyncExitStack() as stack:
        engines: dict[str, Engine] = {}
        slots = max(params.parallel, default=1)
        for spec_type in ("none", *params.spec_types):
            rates = params.synth_rates if spec_type != "none" else ()
            engine = open_engine(model, spec_type=spec_type, num_slots=slots, prefix_bytes=0, synth_rates=rates)
            engines[spec_type] = await stack.enter_async_context(engine)
        fixed: dict[int, Engine] = {}
        for length in params.draft_lengths:
            how: SpeculationOptions = {"draft_n_max": length, "draft_p_min": 0.0, "choose": "first", "synth_rates": params.synth_rates}
            engine = open_engine(model, spec_type="draft-mtp", num_slots=1, prefix_bytes=0, **how)
            fixed[length] = await stack.enter_async_context(engine)
        peers: dict[str, LlamaCpp] = {}
        if params.is_beside_llama_cpp:
            context, threads = params.num_prompt + params.num_tokens + 64, _threads(model)
            ways = {f"{PEER}, none": ("none", 0)}
            if model.has_mtp:
                ways |= {f"{PEER}, draft-mtp, n-max {n}": ("draft-mtp", n) for n in PEER_N_MAX}
            for name, (spec_type, n_max) in ways.items():
                peers[name] = await anyio.to_thread.run_sync(LlamaCpp, path, threads, context, spec_type, n_max)
                stack.callback(peers[name].close)
        prompts: dict[str, list[Run]] = {"none": []} | {name: [] for name in list(peers)[:1]}
        decodes: dict[str, list[Run]] = {name: [] for name in (*engines, *peers)}
        lengths: dict[int, list[Run]] = {length: [] for length in fixed}
        at_once: dict[tuple[str, int], list[float]] = {(name, number): [] for name in engines for number in params.parallel}
        for i in range(params.num_runs + 1):
            runs = {name: await _ours(engines[name], prompt, 1) for name in prompts if name in engines}
            runs |= {name: await anyio.to_thread.run_sync(peers[name].run, prompt, 1) for name in prompts if name in peers}
            texts = {name: await _ours(engine, text(i), params.num_tokens) for name, engine in engines.items()}
            texts |= {name: await anyio.to_thread.run_sync(peer.run, tuple(text(i)), params.num_tokens) for name, peer in peers.items()}
            drafting = {length: await _ours(engine, text(i), params.num_tokens) for length, engine in fixed.items()}
            rates = {each: await _at_once(engines[each[0]], each[1], text, i, params.num_tokens) for each in at_once}
            if i:  # the first warms up
                for name, run in runs.items():
                    prompts[name].append(run)
                for name, run in texts.items():
                    decodes[name].append(run)
                for length, run in drafting.items():
                    lengths[length].append(run)
                for each, rate in rates.items():
                    at_once[each].append(rate)
    figures += [
        Figure(f"prompt of {params.num_prompt}, {name}", "tokens/s", tuple(params.num_prompt / run.prompt_seconds for run in runs))
        for name, runs in prompts.items()
    ]
    found = {name: _decode(name, params.num_tokens, runs) for name, runs in decodes.items()}
    figures += found.values()
    figures += [found[name].over(found["none"]) for name in params.spec_types]
    for name in engines:
        rounds = tuple(1e3 * run.seconds / max(run.num_rounds, 1) for run in decodes[name])
        figures.append(Figure(f"round, {name}", "ms", rounds, is_synthetic=found[name].is_synthetic))
    of_drafts = [_decode(f"{length} drafts a round", params.num_tokens, runs, DRAFTS, length) for length, runs in lengths.items()]
    if of_drafts:
        figures += [replace(found["none"], name="0 drafts a round", kind=DRAFTS, at=0), *of_drafts]
    for (name, number), values in at_once.items():
        figures.append(Figure(f"{number} at once, {name}", "tokens/s", tuple(values), is_synthetic=found[name].is_synthetic))
    if peers:
        best = max((found[name] for name in peers), key=lambda figure: figure.median)
        figures.append(figures[len(ROWS)].over(figures[len(ROWS) + 1]))
        figures += [found[name].over(best) for name in engines]
        if best.name != f"{PEER}, none":
            figures.append(found["none"].over(found[f"{PEER}, none"]))
    return [replace(each, name=f"{each.name} (SYNTHETIC acceptance)") if each.is_synthetic else each for each in figures]


def rows_of(model: LoadedModel, num_runs: int) -> list[Figure]:
    """What a verify of so many rows takes, in verifies of one row, and one row's milliseconds; after 64 positions."""
    target, seconds = model.target(), {rows: list[float]() for rows in ROWS}
    memory = alone(model.memory(), 64 + (num_runs + 2) * 3 * sum(ROWS), max(ROWS))
    target.prefill(Rows(memory, 0, tuple(range(64))), is_last=False)
    position = 64
    for i in range(num_runs + 1):
        for rows in ROWS:
            took: list[float] = []
            for _ in range(3):
                began = time.perf_counter()
                target.verify([Rows(memory, position, tuple(range(rows)))])
                took.append(time.perf_counter() - began)
                position += rows
            if i:
                seconds[rows].append(float(np.median(took)))
    one = Figure("verify of 1 row", "ms", tuple(1e3 * s for s in seconds[1]))
    costs: list[Figure] = []
    for rows in ROWS[1:]:
        times = tuple(s / o for s, o in zip(seconds[rows], seconds[1], strict=True))
        costs.append(Figure(f"verify of {rows} rows", "of 1 row", times, kind=ROW_COSTS, at=rows))
    return [one, *costs]


def _threads(model: LoadedModel) -> int:
    return getattr(model.backend, "num_threads", 1)


async def _ours(engine: Engine, prompt: Sequence[int], num_tokens: int) -> Run:
    stream = engine.generate(list(prompt), max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
    began = first = last = anyio.current_time()
    async with stream:
        async for delta in stream:
            last = anyio.current_time()
            if first == began and delta.token_ids:
                first = last
    speculation = stream.result.speculation
    drafters = speculation.drafters.values()
    drafted, accepted = (sum(getattr(each, name) for each in drafters) for name in ("num_draft_tokens", "num_accepted_tokens"))
    return Run(first - began, last - first, stream.result.token_ids, drafted, accepted, speculation.num_rounds, speculation.is_synthetic)


async def _at_once(engine: Engine, number: int, text: Callable[[int], Sequence[int]], run: int, num_tokens: int) -> float:
    """Tokens a second of so many requests together, from the first one's beginning to the last one's end."""
    began = anyio.current_time()
    async with anyio.create_task_group() as group:
        for i in range(number):
            group.start_soon(_ours, engine, text(1000 * run + i), num_tokens)
    return number * num_tokens / (anyio.current_time() - began)


def _decode(name: str, num_tokens: int, runs: Sequence[Run], kind: str = "", at: int = 0) -> Figure:
    drafted = sum(run.num_drafted for run in runs)
    drafts = f"{sum(run.num_accepted for run in runs)}/{drafted}" if drafted else ""
    rates, is_synthetic = tuple((num_tokens - 1) / run.seconds for run in runs), any(run.is_synthetic for run in runs)
    return Figure(name, "tokens/s", rates, drafts, kind, at, is_synthetic)


def table(figures: Sequence[Figure]) -> str:
    """For people, in Markdown."""
    lines = ["| | median | quartiles | | accepted |", "|---|---|---|---|---|"]
    for each in figures:
        low, high = each.quartiles
        digits = 2 if each.unit in ("times", "of 1 row") else 1
        lines.append(f"| {each.name} | {each.median:.{digits}f} | {low:.{digits}f} to {high:.{digits}f} | {each.unit} | {each.drafts} |")
    return "\n".join(lines)
