"""The engine on a device, end to end: needs `pytest --cuda`."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import forerun
import numpy as np
import pytest
from forerun.actors.model import LoadedModel

HELD_OUT = [case["text"] for case in json.loads((Path(__file__).parents[1] / "data" / "heldout_prompts.json").read_text())]
WAYS = ("none", "draft-mtp", "ngram-simple", "draft-mtp,ngram-suffix")


@pytest.fixture(scope="module")
def demo() -> forerun.Model:
    return forerun.load_model("demo", backend="cuda")


async def at_once(ask: Callable[[int], Awaitable[Any]], count: int) -> list[Any]:
    """What each of so many askers, who ask together, is answered."""
    found: dict[int, Any] = {}

    async def one(i: int) -> None:
        found[i] = await ask(i)

    async with anyio.create_task_group() as group:
        for i in range(count):
            group.start_soon(one, i)
    return [found[i] for i in range(count)]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"temperature": 0.8, "seed": 7},
        {"temperature": 0.7, "seed": 3, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
        {"temperature": 1.0, "seed": 5, "top_p": 0.8, "repetition_penalty": 1.2, "presence_penalty": 0.3},
    ],
)
@pytest.mark.parametrize("store", ["log", "snapshots"])
def test_the_same_tokens_with_and_without_speculation(demo: forerun.Model, options: dict[str, Any], store: Any) -> None:
    async def texts(spec_type: str, num_slots: int) -> list[tuple[int, ...]]:
        async with forerun.open_engine(demo, spec_type=spec_type, num_slots=num_slots, recurrent_store=store, choose="first") as engine:
            results = await at_once(lambda i: engine.complete(HELD_OUT[i], max_tokens=48, ignore_eos=True, **options), 6)
        if spec_type == "draft-mtp":
            counts = [result.speculation.drafters["draft-mtp"] for result in results]
            assert sum(each.num_accepted_tokens for each in counts) > 0.2 * sum(each.num_draft_tokens for each in counts)
        return [result.token_ids for result in results]

    plain = anyio.run(texts, "none", 1)
    for spec_type in WAYS:
        assert anyio.run(texts, spec_type, 6) == plain, spec_type


def test_hidden_rows_beside_requests_that_ask_for_none(demo: forerun.Model) -> None:
    """Four prompts of many chunks, hidden rows asked of half of them: each row right, and the others' drafts as good as before."""
    assert isinstance(demo, LoadedModel)
    prompts = [(HELD_OUT[i] * 40)[: 3000 + 200 * i] for i in range(4)]

    async def hidden(engine: forerun.Engine, prompt: str) -> Any:
        async with engine.embed(prompt) as embedding:
            return np.concatenate([rows async for _, rows in embedding])

    async def run(num_embedded: int) -> list[Any]:
        async with forerun.open_engine(demo, spec_type="draft-mtp", choose="first", prefix_bytes=0) as engine:
            return await at_once(
                lambda i: hidden(engine, prompts[i]) if i < num_embedded else engine.complete(prompts[i], max_tokens=40, ignore_eos=True), 4
            )

    async def on_the_cpu() -> list[Any]:
        async with forerun.open_engine("demo", spec_type="none", backend="reference") as engine:
            return [await hidden(engine, prompt) for prompt in prompts[:2]]

    found, plain, wanted = anyio.run(run, 2), anyio.run(run, 0), anyio.run(on_the_cpu)
    for one, other in zip(found[:2], wanted, strict=True):
        assert one.shape == other.shape
        assert np.linalg.norm(one - other, axis=1).max() < 0.1 * np.linalg.norm(other, axis=1).mean()
    for one, other in zip(found[2:], plain[2:], strict=True):
        assert len(one.token_ids) == 40
        assert one.token_ids == other.token_ids
        assert one.speculation.drafters == other.speculation.drafters
