"""What the demo model's requests share: a chat is computed turn by turn, many requests live in little memory, the texts stay."""

from __future__ import annotations

import json
import random
from pathlib import Path

import anyio
import forerun
import pytest

HELD_OUT = [case["text"] for case in json.loads((Path(__file__).parent / "data" / "heldout_prompts.json").read_text())]

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def demo() -> forerun.Model:
    return forerun.load_model("demo")


async def chat(
    demo: forerun.Model, prefix_bytes: int, store: forerun.StoreName, turns: int = 10
) -> tuple[list[tuple[int, ...]], forerun.EngineStatistics]:
    """The answers, and what the engine counted."""
    messages: list[forerun.Message] = [{"role": "system", "content": "\n".join(HELD_OUT[:3])}]
    answers: list[tuple[int, ...]] = []
    async with forerun.open_engine(demo, prefix_bytes=prefix_bytes, recurrent_store=store) as engine:
        for turn in range(turns):
            messages.append({"role": "user", "content": HELD_OUT[turn + 3][:120]})
            result = await engine.complete(messages, max_tokens=24, temperature=0.7, seed=turn, ignore_eos=True)
            answers.append(result.token_ids)
            messages.append({"role": "assistant", "content": result.text})
        return answers, engine.statistics()


async def test_a_chat_of_ten_turns_computes_each_message_once_with_either_store(demo: forerun.Model) -> None:
    plain, _ = await chat(demo, 0, "log")
    answers, statistics = await chat(demo, 2**28, "log")
    assert answers == plain
    assert (await chat(demo, 2**28, "snapshots", turns=4))[0] == plain[:4]
    prefixes = statistics.prefixes
    assert (prefixes.num_hits, prefixes.num_misses) == (9, 1)
    num_computed = prefixes.num_prompt_tokens - prefixes.num_cached_tokens
    assert prefixes.num_prompt_tokens >= 5 * num_computed
    assert statistics.num_pages_used == prefixes.num_pages


@pytest.mark.parametrize("spec_type", ["none", "draft-mtp,ngram-suffix"])
@pytest.mark.parametrize("store", ["log", "snapshots"])
async def test_an_answer_is_where_the_next_turn_goes_on_from(demo: forerun.Model, store: forerun.StoreName, spec_type: str) -> None:
    """On the C kernels a row has the same bits however it was computed: only what is new of a turn is."""

    async def talk(prefix_bytes: int | None) -> tuple[list[tuple[float, ...]], list[int], list[int]]:
        tokens, answers, num_known, num_cached = [7] * 90, list[tuple[float, ...]](), list[int](), list[int]()
        async with forerun.open_engine(demo, spec_type=spec_type, recurrent_store=store, prefix_bytes=prefix_bytes) as engine:
            for turn in range(4):
                heat = 0.8 * (turn % 2)
                result = await engine.complete(tokens, max_tokens=50 + turn, temperature=heat, seed=turn, num_logprobs=1, ignore_eos=True)
                num_known.append(len(tokens) + len(result.token_ids) - 1)
                tokens = [*tokens, *result.token_ids, *range(20, 45 - turn)]
                answers.append((*result.token_ids, *(each.logprob for each in result.logprobs or ())))
                num_cached.append(result.usage.num_cached_tokens)
        return answers, num_known, num_cached

    plain, _, _ = await talk(0)
    answers, num_known, num_cached = await talk(None)
    assert answers == plain
    assert num_cached == [0, *num_known[:-1]]


async def test_only_requests_with_the_same_salt_share(demo: forerun.Model) -> None:
    async with forerun.open_engine(demo) as engine:

        async def cached(salt: str | None) -> int:
            return (await engine.complete(HELD_OUT[0] * 3, max_tokens=2, cache_salt=salt)).usage.num_cached_tokens

        assert [await cached(salt) for salt in ("a", "b", None, "a")][:3] == [0, 0, 0]
        assert await cached("a") > 0
        assert await cached(None) > 0


async def test_200_requests_in_memory_for_20_with_random_cancels(demo: forerun.Model) -> None:
    rng = random.Random(200)
    prompts = [HELD_OUT[i % 20][: rng.randint(20, 160)] for i in range(200)]
    done: dict[int, tuple[int, ...]] = {}
    async with forerun.open_engine(demo, num_slots=20, num_pages=40, prefix_bytes=2**20) as engine:

        async def one(i: int, seconds: float | None) -> None:
            with anyio.move_on_after(seconds):
                done[i] = (await engine.complete(prompts[i], max_tokens=8, temperature=0.7, seed=i, ignore_eos=True)).token_ids

        async with anyio.create_task_group() as group:
            for i in range(200):
                group.start_soon(one, i, rng.random() * 5 if i % 4 == 0 else None)
        statistics = engine.statistics()
        assert (statistics.num_requests_running, statistics.num_requests_waiting, statistics.num_slots_used) == (0, 0, 0)
        assert len(done) >= 150  # nobody was refused, nobody starved
    async with forerun.open_engine(demo, num_slots=1, prefix_bytes=0) as engine:
        for i in rng.sample(sorted(done), 60):
            alone = await engine.complete(prompts[i], max_tokens=8, temperature=0.7, seed=i, ignore_eos=True)
            assert done[i] == alone.token_ids


async def test_a_request_that_can_never_fit_is_refused_at_once(demo: forerun.Model) -> None:
    async with forerun.open_engine(demo, num_pages=2) as engine:
        with pytest.raises(forerun.InvalidRequest, match="2 pages of 64"):
            await engine.complete([1] * 100, max_tokens=28)
        assert len((await engine.complete([1] * 100, max_tokens=27, ignore_eos=True)).token_ids) == 27


async def test_who_waits_too_long_is_made_room_for_and_nobodys_text_changes(demo: forerun.Model) -> None:
    """The newest is pre-empted, for a short request that is done before it goes on; once, though others wait as long."""
    order: list[int] = []
    results: dict[int, forerun.Result] = {}
    lengths = (1000, 1000, 5, 5)  # those running are far from done when room is wanted
    async with forerun.open_engine(demo, spec_type="none", num_slots=2, preempt_after_seconds=0.02) as engine:

        async def one(i: int) -> None:
            results[i] = await engine.complete(HELD_OUT[i], max_tokens=lengths[i], temperature=0.7, seed=i, ignore_eos=True)
            order.append(i)

        async with anyio.create_task_group() as group:
            for i in range(4):
                group.start_soon(one, i)
                await anyio.sleep(0.05 if i < 2 else 0)  # the second is the newest
        assert order[:2] == [2, 3]
        assert engine.statistics().num_preemptions in (1, 2)
    async with forerun.open_engine(demo, num_slots=1, prefix_bytes=0) as engine:
        for i, result in results.items():
            alone = await engine.complete(HELD_OUT[i], max_tokens=lengths[i], temperature=0.7, seed=i, ignore_eos=True)
            assert (result.token_ids, result.text) == (alone.token_ids, alone.text)


async def test_a_reader_that_stopped_does_not_keep_others_from_being_made_room_for(demo: forerun.Model) -> None:
    """The newest, which is pre-empted first, waits for its reader and does not yield; the next one does."""
    async with forerun.open_engine(demo, num_slots=2, preempt_after_seconds=0.2) as engine:
        async with (
            engine.generate(HELD_OUT[0], max_tokens=3000, ignore_eos=True) as long,
            engine.generate(HELD_OUT[1], max_tokens=3000, ignore_eos=True) as _stalled,
        ):

            async def read() -> None:
                async for _ in long:
                    pass

            async with anyio.create_task_group() as group:
                group.start_soon(read)
                await anyio.sleep(5)  # the other's outbox is full by now
                with anyio.fail_after(10):
                    await engine.complete(HELD_OUT[2], max_tokens=4)
                group.cancel_scope.cancel()


async def test_who_gives_up_waiting_makes_way_for_those_behind(demo: forerun.Model) -> None:
    async with forerun.open_engine(demo, num_slots=2, num_pages=20, preempt_after_seconds=None) as engine:
        async with engine.generate([1] * 64, max_tokens=500, ignore_eos=True):
            with anyio.move_on_after(0.3):
                async with anyio.create_task_group() as group:
                    group.start_soon(engine.complete, [1] * 640)  # does not fit beside it
                    await anyio.sleep(0.1)
                    group.start_soon(engine.complete, HELD_OUT[2])
            with anyio.fail_after(5):
                await engine.complete(HELD_OUT[2][:50], max_tokens=4)
