"""The promise: with and without speculation, alone and in company, the same tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import anyio
import forerun
import pytest
from forerun.actors.model import Defaults, LoadedModel
from forerun.kernels import backends
from forerun.kernels.backend import F32
from forerun.kernels.cuda.graph import CudaTrunk
from forerun.kernels.model.drafts import NextRows
from forerun.kernels.model.trunk import Rows
from forerun.kernels.sampling import Choices

from tests.checkpoints import LAYOUTS, prompt
from tests.conftest import cuda_backend, load

SPEC_TYPES = ("draft-mtp", "ngram-simple", "draft-mtp,ngram-suffix")
SAMPLING: tuple[forerun.Options, ...] = ({"temperature": 0.0}, {"temperature": 0.8, "seed": 7})
HELD_OUT = [case["text"] for case in json.loads((Path(__file__).parent / "data" / "heldout_prompts.json").read_text())]

pytestmark = pytest.mark.anyio


async def all_tokens(
    model: forerun.Model,
    prompts: list[list[int]] | list[str],
    num_tokens: int,
    options: forerun.Options,
    at_once: int,
    spec_type: str,
    n_max: int = 3,
    choose: str = "first",
) -> list[tuple[int, ...]]:
    out: dict[int, tuple[int, ...]] = {}
    # The first draft there is, whole: what is verified is then wrong as often as it can be.
    small: forerun.SpeculationOptions = {
        "choose": choose, "draft_n_max": n_max, "ngram_simple_size_n": 3, "ngram_map_k_size_n": 3, "ngram_map_k4v_size_n": 3,
        "ngram_mod_n_match": 3, "ngram_mod_n_min": 1,
    }  # fmt: skip
    async with forerun.open_engine(model, spec_type=spec_type, num_slots=at_once, **small) as engine:
        options = {**options, "max_tokens": num_tokens}

        async def one(i: int) -> None:
            out[i] = (await engine.complete(prompts[i], **options)).token_ids

        async with anyio.create_task_group() as group:
            for i in range(len(prompts)):
                group.start_soon(one, i)
    return [out[i] for i in range(len(prompts))]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"  # the other tests run on both; these are long


@pytest.mark.parametrize("options", SAMPLING)
@pytest.mark.parametrize("layout", LAYOUTS)
async def test_random_checkpoints(
    layout: str, options: forerun.Options, checkpoints: dict[str, Path], request: pytest.FixtureRequest
) -> None:
    num_tokens = 32 if request.config.getoption("--full") else 20
    model = forerun.load_model(str(checkpoints[layout]))
    prompts = [prompt(length) for length in (1, 5, 63, 64, 65, 130)] + [prompt(9) * 6, [7] * 40]
    plain = await all_tokens(model, prompts, num_tokens, options, 1, "none")
    assert await all_tokens(model, prompts, num_tokens, options, 8, "none") == plain
    for spec_type, n_max, at_once in product(SPEC_TYPES, (1, 3, 8), (1, 8)):
        assert await all_tokens(model, prompts, num_tokens, options, at_once, spec_type, n_max) == plain, (spec_type, n_max, at_once)


@pytest.mark.parametrize("options", SAMPLING)
async def test_the_demo_model(options: forerun.Options, request: pytest.FixtureRequest) -> None:
    is_full = request.config.getoption("--full")
    model = forerun.load_model("demo")
    prompts, num_tokens = (HELD_OUT, 128) if is_full else (HELD_OUT[:8], 64)
    plain = await all_tokens(model, prompts, num_tokens, options, 1, "none")
    for spec_type, n_max, at_once in product(SPEC_TYPES, (1, 3, 8) if is_full else (3,), (1, 8) if is_full else (8,)):
        assert await all_tokens(model, prompts, num_tokens, options, at_once, spec_type, n_max) == plain, (spec_type, n_max, at_once)


COMBINATIONS = (*forerun.DRAFTERS, ",".join(forerun.DRAFTERS), "draft-mtp,ngram-suffix", "ngram-map-k,ngram-cache,ngram-mod")


@pytest.mark.parametrize("choose", ["rate", "first"])
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0, "repetition_penalty": 1.2, "frequency_penalty": 0.3},
        {"temperature": 0.8, "seed": 7, "top_p": 0.9, "presence_penalty": 0.5, "stop": ["self", "return"]},
        {"temperature": 1.5, "seed": 3, "ignore_eos": True},
    ],
)
async def test_every_drafter_and_combination(options: forerun.Options, choose: str) -> None:
    model = forerun.load_model("demo")
    prompts = [HELD_OUT[0], HELD_OUT[1] + HELD_OUT[1][:100], "x = 1\n" * 20]
    plain = await all_tokens(model, prompts, 40, options, 1, "none")
    for spec_type in COMBINATIONS:
        assert await all_tokens(model, prompts, 40, options, 3, spec_type, 3, choose) == plain, spec_type


@pytest.mark.parametrize("options", SAMPLING)
async def test_rounds_that_a_device_begins_early(
    options: forerun.Options, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one before anybody has read what the last one brings: without drafts, and behind the head's; and whatever is drafted."""
    backend, folder, prompts = cuda_backend(is_real=False), checkpoints["dense"], [prompt(70), prompt(5) * 3]
    model = LoadedModel("dense", load(folder, backend), backend, None, Defaults.load(folder))
    asked, early = list[int](), list[int]()

    class Counting(CudaTrunk):
        is_early = False

        def verify(self, batch: Sequence[Rows]) -> tuple[F32, F32]:
            asked.append(len(batch))
            return super().verify(batch)

        def verify_next(self, batch: Sequence[NextRows], choices: Choices, drafts: object) -> F32 | None:
            early.append(len(batch))
            return super().verify_next(batch, choices, drafts) if self.is_early else None

    monkeypatch.setattr(backends, "CudaTrunk", Counting)
    plain = await all_tokens(model, prompts, 18, options, 1, "none")
    Counting.is_early = True
    for spec_type, choose, share in (("none", "rate", 0.8), ("draft-mtp", "first", 0.4), ("draft-mtp,ngram-simple", "rate", 0.0)):
        asked.clear()
        early.clear()
        assert await all_tokens(model, prompts, 18, options, 2, spec_type, 2, choose) == plain, spec_type
        assert len(early) >= share * (len(early) + len(asked)), spec_type
