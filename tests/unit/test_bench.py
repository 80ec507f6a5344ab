"""forerun bench: every kind of figure, its picture, and models without a file. How large the figures are is nobody's business here."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import forerun
import numpy as np
import pytest
from forerun.kernels.backends import make_backend, make_memory, make_trunk
from forerun.kernels.formats.stored import BY_NAME
from forerun.kernels.model.config import load_config
from forerun.kernels.model.memory import alone
from forerun.kernels.model.synthetic import SyntheticCheckpoint, random_values, size_of
from forerun.kernels.model.trunk import Rows
from forerun.kernels.model.weights import load_weights
from forerun.tools.bench import DRAFTS, ROW_COSTS, BenchParams, Figure, bench, table
from forerun.tools.plots import plot

from tests.checkpoints import LAYOUTS

pytestmark = pytest.mark.anyio
SMALL = BenchParams(num_prompt=70, num_tokens=6, num_runs=2, spec_types=["draft-mtp"], text="x = ", num_threads=2)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_every_kind_of_figure(tmp_path: Path) -> None:
    figures = await bench("demo", replace(SMALL, parallel=[1, 2], draft_lengths=[1, 3], synth_rates=(0.9, 0.5)))
    by_name = {figure.name: figure for figure in figures}
    mark = " (SYNTHETIC acceptance)"
    drafted = {
        f"draft-mtp{mark}",
        f"draft-mtp / none{mark}",
        f"round, draft-mtp{mark}",
        f"3 drafts a round{mark}",
        f"2 at once, draft-mtp{mark}",
    }
    plain = {"none", "round, none", "0 drafts a round", "2 at once, none", "prompt of 70, none", "verify of 16 rows"}
    assert drafted | plain <= set(by_name)
    assert sum(name.endswith(mark) for name in by_name) == len(drafted) + 2  # and one draft a round, and one at once
    assert all(len(figure.values) == 2 and min(figure.values) > 0 for figure in figures)
    assert json.loads(json.dumps([figure.to_json() for figure in figures]))[0]["name"] == "verify of 1 row"
    assert len(table(figures).splitlines()) == len(figures) + 2
    plot(tmp_path / "plot.png", figures, "demo")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(forerun.ForerunError, match="nowhere"):
        plot(tmp_path / "nowhere" / "plot.png", figures, "demo")


def test_ratios_are_taken_run_by_run() -> None:
    one, other = Figure("a", "tokens/s", (2.0, 9.0, 4.0)), Figure("b", "tokens/s", (1.0, 3.0, 4.0))
    assert (one.over(other).values, one.over(other).median) == ((2.0, 3.0, 1.0), 2.0)
    assert {DRAFTS, ROW_COSTS} == {"drafts", "rows"}


@pytest.mark.parametrize(
    ("change", "message"),
    [({"parallel": [0]}, "--parallel"), ({"draft_lengths": [99]}, "--draft-lengths"), ({"size": "9000B:q8_0"}, "--size"),
     ({"size": "0.8B"}, "--size"), ({"num_runs": 0}, "num_runs"), ({"is_beside_llama_cpp": True}, "--vs")],
)  # fmt: skip
async def test_what_makes_no_sense_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(forerun.InvalidRequest, match=message):
        await bench("demo", replace(SMALL, **change))


@pytest.mark.parametrize("kind", ["F32", "BF16", "Q8_0", "Q4_1", "MXFP4"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_random_weights_compute(layout: str, kind: str, checkpoints: dict[str, Path]) -> None:
    config, backend = load_config(checkpoints[layout]), make_backend(None, 2)
    weights = load_weights(SyntheticCheckpoint(config, kind), config, backend)
    memory = alone(make_memory(config, backend), 40, 4)
    logits, hidden = make_trunk(weights, backend).verify([Rows(memory, 0, (1, 2, 3))])
    assert logits.shape == (3, config.vocabulary)
    assert 0.1 < np.abs(hidden).mean() < 2
    assert np.abs(logits).max() > 0


def test_sizes_have_names() -> None:
    config, kind = size_of("27B:bf16")
    assert (config.hidden, kind) == (5120, "BF16")


@pytest.mark.parametrize("kind", BY_NAME)
def test_random_values_have_the_deviation_asked_for(kind: str) -> None:
    raw = random_values(kind, 2**16, 0.03, np.random.default_rng(2))
    values = BY_NAME[kind].read(raw.reshape(-1, BY_NAME[kind].size))
    assert values.size == 2**16
    assert abs(values.mean()) < 0.005
    assert values.std() == pytest.approx(0.03, rel=0.4 if kind == "MXFP4" else 0.02)  # which has powers of two
