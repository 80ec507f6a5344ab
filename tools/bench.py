"""`forerun bench`: what a model does on this machine, and beside llama.cpp on the same file. All that is compared runs in turn, as speeds
drift: figures are medians with quartiles, and a ratio is the median of the ratios of runs that followed each other."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import anyio
import numpy as np

from .. import Engine, InvalidRequest, open_engine
from ..actors.model import LoadedModel, load_model
from ..core.checks import check_ranges
from ..kernels.model.memory import alone
from ..kernels.model.trunk import Rows
from .llama_cpp import LlamaCpp, Run

#: Rows of one verify whose cost is measured.
ROWS = (1, 2, 3, 4, 8, 16)
#: llama.cpp drafts so many tokens; its best is what counts.
PEER_N_MAX = (1, 2, 3)
PEER = "llama.cpp"
TEXT = "def main(argv=None):\n    import sys\n    for x in"


@dataclass(frozen=True, slots=True)
class BenchParams:
    """What is measured: a prompt of `num_prompt` tokens; `num_tokens` tokens after the text, without and with each of `spec_types`;
    `num_runs` times each, in turn."""

    num_prompt: int
    num_tokens: int
    num_runs: int
    spec_types: Sequence[str]
    text: str
    num_threads: int | None
    is_beside_llama_cpp: bool


@dataclass(frozen=True, slots=True)
class Figure:
    """`values` of all runs, in order, higher is better; `drafts` says how many were accepted of how many drafted."""

    name: str
    unit: str
    values: tuple[float, ...]
    drafts: str = ""

    @property
    def median(self) -> float:
        return float(np.median(self.values))

    @property
    def quartiles(self) -> tuple[float, float]:
        low, high = np.quantile(self.values, [0.25, 0.75])
        return float(low), float(high)

    def over(self, other: Figure) -> Figure:
        """Run by run."""
        return Figure(f"{self.name} / {other.name}", "times", tuple(x / y for x, y in zip(self.values, other.values, strict=True)))

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name, "unit": self.unit, "median": self.median, "quartiles": self.quartiles, "values": self.values,
            "drafts": self.drafts,
        }  # fmt: skip


async def bench(path: str, params: BenchParams) -> list[Figure]:
    """All figures. ModelFileError, InvalidRequest, also when the peer does not start."""
    if violations := check_ranges({"num_prompt": params.num_prompt, "max_tokens": params.num_tokens, "num_runs": params.num_runs}):
        raise InvalidRequest(violations)
    model = await anyio.to_thread.run_sync(lambda: load_model(path, num_threads=params.num_threads))
    if params.is_beside_llama_cpp and not await anyio.Path(path).is_file():
        raise InvalidRequest([("--vs", "needs a GGUF file, which both can read")])
    rng = np.random.default_rng(1)
    prompt = tuple(int(token) for token in rng.integers(0, min(model.num_token_ids, 4000), params.num_prompt))

    def text(i: int) -> Sequence[int]:
        """Another one each time, so that nothing can be remembered of it."""
        return model.vocabulary.encode(f"# {i}\n{params.text}") if model.vocabulary is not None else prompt[i : i + 16]

    figures = rows_of(model, params.num_runs)
    async with AsyncExitStack() as stack:
        engines: dict[str, Engine] = {}
        for spec_type in ("none", *params.spec_types):
            engine = open_engine(model, spec_type=spec_type, num_slots=1, prefix_bytes=0)
            engines[spec_type] = await stack.enter_async_context(engine)
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
        for i in range(params.num_runs + 1):
            runs = {name: await _ours(engines[name], prompt, 1) for name in prompts if name in engines}
            runs |= {name: await anyio.to_thread.run_sync(peers[name].run, prompt, 1) for name in prompts if name in peers}
            texts = {name: await _ours(engine, text(i), params.num_tokens) for name, engine in engines.items()}
            texts |= {name: await anyio.to_thread.run_sync(peer.run, tuple(text(i)), params.num_tokens) for name, peer in peers.items()}
            if i:  # the first warms up
                for all_runs, new in ((prompts, runs), (decodes, texts)):
                    for name, run in new.items():
                        all_runs[name].append(run)
    figures += [
        Figure(f"prompt of {params.num_prompt}, {name}", "tokens/s", tuple(params.num_prompt / run.prompt_seconds for run in runs))
        for name, runs in prompts.items()
    ]
    found = {name: _decode(name, params.num_tokens, runs) for name, runs in decodes.items()}
    figures += found.values()
    figures += [found[name].over(found["none"]) for name in params.spec_types]
    if peers:
        best = max((found[name] for name in peers), key=lambda figure: figure.median)
        figures.append(figures[len(ROWS)].over(figures[len(ROWS) + 1]))
        figures += [found[name].over(best) for name in engines]
        if best.name != f"{PEER}, none":
            figures.append(found["none"].over(found[f"{PEER}, none"]))
    return figures


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
    costs = [
        Figure(f"verify of {rows} rows", "of 1 row", tuple(s / o for s, o in zip(seconds[rows], seconds[1], strict=True)))
        for rows in ROWS[1:]
    ]
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
    drafters = stream.result.speculation.drafters.values()
    drafted, accepted = (sum(getattr(each, name) for each in drafters) for name in ("num_draft_tokens", "num_accepted_tokens"))
    return Run(first - began, last - first, stream.result.token_ids, drafted, accepted)


def _decode(name: str, num_tokens: int, runs: Sequence[Run]) -> Figure:
    drafted = sum(run.num_drafted for run in runs)
    drafts = f"{sum(run.num_accepted for run in runs)}/{drafted}" if drafted else ""
    return Figure(name, "tokens/s", tuple((num_tokens - 1) / run.seconds for run in runs), drafts)


def table(figures: Sequence[Figure]) -> str:
    """For people, in Markdown."""
    lines = ["| | median | quartiles | | accepted |", "|---|---|---|---|---|"]
    for each in figures:
        low, high = each.quartiles
        digits = 2 if each.unit in ("times", "of 1 row") else 1
        lines.append(f"| {each.name} | {each.median:.{digits}f} | {low:.{digits}f} to {high:.{digits}f} | {each.unit} | {each.drafts} |")
    return "\n".join(lines)
