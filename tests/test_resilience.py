"""The demo model under fire: actors killed in mid-generation, many requests of which a third are cancelled. The texts stay."""

from __future__ import annotations

import json
import random
from pathlib import Path

import anyio
import forerun
import pytest

HELD_OUT = [case["text"] for case in json.loads((Path(__file__).parent / "data" / "heldout_prompts.json").read_text())]
#: request -> its tokens when it runs alone
ALONE: dict[int, tuple[int, ...]] = {}
OPTIONS: tuple[forerun.Options, ...] = ({"max_tokens": 100, "temperature": 0.0}, {"max_tokens": 100, "temperature": 0.8, "seed": 7})
ACTORS = ("tokenizer", "memory manager", "target decoder", "MTP drafter", "ngram-simple drafter")

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def demo() -> forerun.Model:
    return forerun.load_model("demo")


@pytest.mark.parametrize("options", OPTIONS, ids=["greedy", "sampled"])
async def test_killing_each_actor_in_the_middle_leaves_the_text_as_it_is(demo: forerun.Model, options: forerun.Options) -> None:
    text = HELD_OUT[0]
    drafters: forerun.SpeculationOptions = {"choose": "first", "ngram_simple_size_n": 3}  # asks whom it can
    async with forerun.open_engine(demo, spec_type="draft-mtp,ngram-simple", **drafters) as engine:
        alone = await engine.complete(text, **options)
        for actor in ACTORS:
            async with engine.generate(text, **options) as stream:
                pieces: list[forerun.Delta] = []
                async for delta in stream:
                    pieces.append(delta)
                    if len(pieces) == 4:
                        engine.tree.supervisor.kill(actor, RuntimeError(f"the {actor} was killed by a test"))
            result = stream.result
            assert (result.token_ids, result.text) == (alone.token_ids, alone.text)
            assert "".join(piece.text for piece in pieces) == alone.text
            assert engine.statistics().actors[actor].num_restarts >= 1
            # The drafters draft on, the restarted one too.
            for name, drafter in result.speculation.drafters.items():
                assert drafter.num_drafts > 0.8 * alone.speculation.drafters[name].num_drafts, (actor, name)
        assert engine.statistics().num_slots_used == 0


async def test_64_requests_of_which_a_third_are_cancelled_leave_nothing_behind(demo: forerun.Model) -> None:
    rng = random.Random(64)
    prompts = [rng.choice(HELD_OUT)[:200] for _ in range(64)]
    answers: dict[int, tuple[int, ...]] = {}
    async with forerun.open_engine(demo, num_slots=16) as engine:

        async def one(i: int, seconds: float | None) -> None:
            with anyio.move_on_after(seconds):
                answers[i] = (await engine.complete(prompts[i], max_tokens=16, temperature=0.7, seed=i)).token_ids

        async with anyio.create_task_group() as group:
            for i in range(64):
                group.start_soon(one, i, rng.random() * 2 if i % 3 == 0 else None)
        statistics = engine.statistics()
        assert (statistics.num_requests_running, statistics.num_requests_waiting, statistics.num_slots_used) == (0, 0, 0)
        assert all(actor.mailbox.num_waiting == actor.mailbox.num_unanswered == 0 for actor in statistics.actors.values())
        assert len(answers) >= 42
        for i, tokens in answers.items():
            if i not in ALONE:
                ALONE[i] = (await engine.complete(prompts[i], max_tokens=16, temperature=0.7, seed=i)).token_ids
            assert tokens == ALONE[i]
