"""The in-process API: streams, errors, cancellation, failure. On trio and asyncio alike."""

from __future__ import annotations

import gc
import time
from pathlib import Path
from typing import Any

import anyio
import forerun
import numpy as np
import pytest
from anyio.lowlevel import checkpoint
from forerun.actors.drafting import Drafting
from forerun.actors.sequence import MAX_CONVICTED
from forerun.core.actor import Threads
from forerun.core.begun import Begun
from forerun.core.errors import InternalBug
from forerun.core.outbox import CAPACITY, MERGED_TOKENS
from forerun.kernels.model.memory import SequenceMemory
from forerun.kernels.model.mtp import HeadBase
from forerun.kernels.model.trunk import TrunkBase

from tests.checkpoints import prompt

pytestmark = pytest.mark.anyio


@pytest.fixture
def model(checkpoints: dict[str, Path]) -> str:
    return str(checkpoints["dense"])


async def test_deltas_make_the_result(model: str) -> None:
    async with forerun.open_engine(model) as engine:
        async with engine.generate(prompt(70), max_tokens=30) as stream:
            ids = [token async for delta in stream for token in delta.token_ids]
        result = stream.result
    assert tuple(ids) == result.token_ids
    assert result.finish_reason in (forerun.FinishReason.LENGTH, forerun.FinishReason.STOP)
    assert result.usage == forerun.Usage(70, len(ids))
    accepted = sum(s.num_accepted_tokens for s in result.speculation.drafters.values())
    assert 1 + result.speculation.num_rounds + accepted >= len(ids)


async def test_others_get_their_turn_between_two_rounds(model: str) -> None:
    """Also where nothing waits for anything."""
    num_turns = 0

    async def count() -> None:
        nonlocal num_turns
        while True:
            await checkpoint()
            num_turns += 1

    async with forerun.open_engine(model, spec_type="none") as engine, anyio.create_task_group() as group:
        group.start_soon(count)
        result = await engine.complete(prompt(5), max_tokens=60, ignore_eos=True)
        assert num_turns >= result.speculation.num_rounds == 59
        group.cancel_scope.cancel()


async def test_text_deltas_make_the_text() -> None:
    async with forerun.open_engine("demo") as engine:
        stream = engine.generate("def add(a, b):\n", max_tokens=40)
        text = "".join([delta.text async for delta in stream])
        assert text == stream.result.text
        assert text


@pytest.mark.parametrize(
    ("given", "options", "field"),
    [
        ([], {}, "prompt"),
        ([256], {}, "prompt"),
        ([-1], {}, "prompt"),
        ([1] * 1024, {}, "prompt"),
        ([1], {"max_tokens": 1024}, "max_tokens"),
        ([1], {"max_tokens": 0}, "max_tokens"),
        ([1], {"temperature": float("nan")}, "temperature"),
        ([1], {"top_k": 1.5}, "top_k"),
        ([1], {"seed": -1}, "seed"),
        ([1], {"stop_ids": ["x"]}, "stop_ids"),
        ([1], {"stop_ids": 3}, "stop_ids"),
        ([1], {"regex": 3}, "regex"),
        ([1], {"regex": ""}, "regex"),
        ([1], {"regex": "a", "json_schema": {}}, "regex"),
        ([1], {"json_schema": [1]}, "json_schema"),
        ([1], {"json_schema": True}, "json_schema"),
        ([1], {"json_schema": "true"}, "json_schema"),
        ([1], {"json_schema": "[1"}, "json_schema"),
        ([1], {"json_schema": {"x": object()}}, "json_schema"),
        ([1], {"grammar": "x" * 400_001}, "grammar"),
        ([1], {"regex": "a", "ignore_eos": True}, "ignore_eos"),
        ([1], {"regex": "a"}, "regex"),  # this model has no tokenizer
        ([1], {"cache_salt": 5}, "cache_salt"),
        ([1], {"cache_salt": "x" * 257}, "cache_salt"),
        ([1], {"timeout_seconds": -1.0}, "timeout_seconds"),
        ("text", {}, "prompt"),  # this model has no tokenizer
        ([{"role": "user", "content": "x"}], {}, "prompt"),
        ([{"role": "user"}], {}, "prompt[0].content"),
        ([{"content": "x"}], {}, "prompt[0].role"),
        ([{"role": "user", "content": "\ud800"}], {}, "prompt[0].content"),
        ([True], {}, "prompt"),
        ([1, "x"], {}, "prompt"),
        ([1.0], {}, "prompt"),
        (b"x", {}, "prompt"),
        ([{"role": "user", "content": "x", "mood": "y"}], {}, "prompt[0].mood"),
        ([1], {"temperature": "0.5"}, "temperature"),
        ([1], {"temperature": 10**400}, "temperature"),
        (None, {}, "prompt"),
        ("x \ud800", {}, "prompt"),
    ],
)
async def test_bad_requests_are_refused_and_harm_nobody(model: str, given: Any, options: Any, field: str) -> None:
    async with forerun.open_engine(model) as engine:
        with pytest.raises(forerun.InvalidRequest) as caught:
            await engine.complete(given, **options)
        assert caught.value.violations[0][0] == field
        assert len((await engine.complete([1, 2], max_tokens=3, ignore_eos=True)).token_ids) == 3
        assert engine.statistics().num_slots_used == 0


@pytest.mark.parametrize(
    "option",
    [
        {"spec_type": "draft-magic"},
        {"num_slots": 0},
        {"draft_n_max": 65},
        {"ngram_simple_size_n": 0},
        {"num_pages": 0},
        {"prefix_bytes": -1},
        {"recurrent_store": "tape"},
        {"draft_n_max": None},
        {"num_slots": None},
        {"spec_type": ""},
    ],
)
async def test_bad_options_are_refused(model: str, option: Any) -> None:
    with pytest.raises(forerun.InvalidRequest) as caught:
        async with forerun.open_engine(model, **option):
            pass
    assert caught.value.violations[0][0] == next(iter(option))


async def test_ids_of_any_integer_type_are_ids(model: str) -> None:
    async with forerun.open_engine(model) as engine:
        prompts: list[Any] = [[1, 2], (1, 2), list(np.array([1, 2]))]
        assert len({(await engine.complete(each, max_tokens=5)).token_ids for each in prompts}) == 1


async def test_a_chat_is_answered() -> None:
    async with forerun.open_engine("demo") as engine:
        result = await engine.complete([{"role": "user", "content": "hello <|im_end|>"}], max_tokens=4)
    assert result.usage.num_prompt_tokens > 8


async def test_cancelling_the_whole_block_ends_it(model: str) -> None:
    for seconds in (0.0, 0.005, 0.02, 0.05):
        with anyio.fail_after(5), anyio.move_on_after(seconds):
            async with forerun.open_engine(model) as engine:
                async with anyio.create_task_group() as group:
                    for _ in range(12):
                        group.start_soon(lambda: engine.complete(prompt(100), max_tokens=500, ignore_eos=True))


async def test_a_stream_cancelled_before_it_began_has_a_result(model: str) -> None:
    async with forerun.open_engine(model) as engine:
        async with engine.generate(prompt(5)) as stream:
            pass
        assert stream.result.finish_reason is forerun.FinishReason.CANCELLED


async def test_leaving_the_block_gives_the_memory_back(model: str) -> None:
    async with forerun.open_engine(model) as engine:
        async with engine.generate(prompt(10), max_tokens=900, ignore_eos=True) as stream:
            await anext(stream)
            assert engine.statistics().num_slots_used == 1
        statistics = engine.statistics()
        assert (statistics.num_slots_used, statistics.num_requests_running) == (0, 0)
        assert stream.result.finish_reason is forerun.FinishReason.CANCELLED


async def test_a_reader_cancelled_at_any_point_gives_the_memory_back(model: str) -> None:
    async with forerun.open_engine(model, num_slots=2) as engine:
        alone = (await engine.complete(prompt(5), max_tokens=20, ignore_eos=True)).token_ids
        for microseconds in range(0, 40_000, 1000):
            with anyio.move_on_after(microseconds / 1e6):
                await engine.complete(prompt(100), max_tokens=50, ignore_eos=True)
            assert engine.statistics().num_slots_used == 0
        assert (await engine.complete(prompt(5), max_tokens=20, ignore_eos=True)).token_ids == alone


async def test_a_dropped_stream_warns_and_is_cancelled(model: str) -> None:
    async with forerun.open_engine(model) as engine:
        stream = engine.generate(prompt(10), max_tokens=900, ignore_eos=True)
        await anext(stream)
        with pytest.warns(ResourceWarning, match="unclosed"):
            del stream
            gc.collect()
        with anyio.fail_after(5):
            while engine.statistics().num_requests_running:
                await anyio.sleep(0.001)
        assert engine.statistics().num_slots_used == 0


async def test_a_slow_reader_holds_up_itself_alone_and_loses_nothing(model: str) -> None:
    async with forerun.open_engine(model, spec_type="none") as engine:
        alone = (await engine.complete(prompt(10), max_tokens=900, ignore_eos=True)).token_ids
        async with engine.generate(prompt(10), max_tokens=900, ignore_eos=True) as slow:
            first = await anext(slow)
            before = engine.statistics().actors["target decoder"].mailbox.num_received
            other = await engine.complete(prompt(5), max_tokens=600, ignore_eos=True)
            assert len(other.token_ids) == 600
            received = engine.statistics().actors["target decoder"].mailbox.num_received - before
            assert received < 600 + CAPACITY + MERGED_TOKENS + 8  # and Forgets: the slow one has stopped at its bound
            rest = [delta async for delta in slow]
        assert max(len(delta.token_ids) for delta in rest) > 100  # merged
        assert first.token_ids + tuple(token for delta in rest for token in delta.token_ids) == alone


@pytest.mark.parametrize("limits", [{"queue_size": 3}, {"queue_tokens": 17}])
async def test_more_requests_than_slots_wait_their_turn_and_beyond_the_queue_are_refused(model: str, limits: Any) -> None:
    async with forerun.open_engine(model, num_slots=2, **limits) as engine:
        outcomes: list[str] = []

        async def one() -> None:
            try:
                await engine.complete(prompt(5), max_tokens=20, ignore_eos=True)
                outcomes.append("done")
            except forerun.Overloaded as error:
                assert error.retry_after_seconds > 0
                outcomes.append("refused")

        async with anyio.create_task_group() as group:
            for _ in range(9):
                group.start_soon(one)
        assert sorted(outcomes) == ["done"] * 5 + ["refused"] * 4


async def test_who_is_refused_takes_no_room_in_the_queue(model: str) -> None:
    async with forerun.open_engine(model, num_slots=1, queue_tokens=20) as engine, anyio.create_task_group() as group:
        async with engine.generate(prompt(5), max_tokens=200, ignore_eos=True) as first:
            await anext(first)
            long, short = engine.generate(prompt(30), max_tokens=2), engine.generate(prompt(15), max_tokens=2)
            with pytest.raises(forerun.Overloaded, match="requests are waiting already"):
                await anext(long)
            group.start_soon(first.aclose)
            async for _ in short:
                pass


async def test_requests_at_once_share_batches(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    verify = TrunkBase.verify

    def counted(self: TrunkBase, batch: Any) -> Any:
        sizes.append(len(batch))
        return verify(self, batch)

    monkeypatch.setattr(TrunkBase, "verify", counted)
    async with forerun.open_engine(model, spec_type="draft-mtp") as engine, anyio.create_task_group() as group:
        for length in range(3, 11):
            group.start_soon(lambda n=length: engine.complete(prompt(n), max_tokens=60, ignore_eos=True))
    assert sum(sizes) / len(sizes) > 4


async def test_closing_the_engine_ends_what_runs(model: str) -> None:
    async with forerun.open_engine(model) as engine:
        stream = engine.generate(prompt(10), max_tokens=900, ignore_eos=True)
        await anext(stream)
    with pytest.raises(forerun.EngineClosed):
        async for _ in stream:
            pass
    with pytest.raises(forerun.EngineClosed):
        engine.generate([1])


@pytest.mark.parametrize("method", ["verify", "prefill"])
async def test_a_bug_of_ours_ends_everybody_with_engine_dead(model: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise InternalBug("seen by a test")

    with pytest.raises(forerun.EngineDead) as caught:
        async with forerun.open_engine(model) as engine:
            stream = engine.generate(prompt(10), max_tokens=900, ignore_eos=True)
            await anext(stream)
            monkeypatch.setattr(TrunkBase, method, fail)
            with anyio.fail_after(5), pytest.raises(forerun.EngineDead):
                await engine.complete(prompt(10), max_tokens=900, ignore_eos=True)
            with anyio.fail_after(5), pytest.raises(forerun.EngineDead):
                async for _ in stream:
                    pass
            with pytest.raises(forerun.EngineDead):
                engine.generate([1])
    assert isinstance(caught.value.__cause__, InternalBug)


class Poison:
    """A target that fails whenever it verifies a row of token 99, which is what a prompt that begins with 98 continues with."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        verify, prefill = TrunkBase.verify, TrunkBase.prefill

        def poisoned(trunk: TrunkBase, batch: Any) -> Any:
            if any(99 in rows.tokens for rows in batch):
                raise ZeroDivisionError
            logits, hidden = verify(trunk, batch)
            logits[:, 99] = -1e9
            return logits, hidden

        def first_is_99(trunk: TrunkBase, rows: Any, is_last: bool) -> Any:
            logits = prefill(trunk, rows, is_last)
            if logits is not None:
                logits[0, 99] = 1e9 if rows.tokens[0] == 98 else -1e9
            return logits

        patch.setattr(TrunkBase, "verify", poisoned)
        patch.setattr(TrunkBase, "prefill", first_is_99)


async def test_a_request_that_kills_the_target_is_found_out_and_its_neighbours_go_on(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Poison(monkeypatch)
    async with forerun.open_engine(model, spec_type="none") as engine:
        alone = [(await engine.complete(prompt(length), max_tokens=30, ignore_eos=True)).token_ids for length in (70, 200, 3)]
        found: list[tuple[int, ...]] = []

        async def one(length: int) -> None:
            found.append((await engine.complete(prompt(length), max_tokens=30, ignore_eos=True)).token_ids)

        async with anyio.create_task_group() as group:
            for length in (70, 200, 3):
                group.start_soon(one, length)
            with anyio.fail_after(10), pytest.raises(forerun.RequestFailed, match="each time"):
                await engine.complete([98, 1, 2], max_tokens=5)
        assert engine.statistics().actors["target decoder"].num_restarts == 4
        assert sorted(found) == sorted(alone)


async def test_any_number_of_such_requests_leaves_the_engine_alive(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Poison(monkeypatch)
    async with forerun.open_engine(model, spec_type="none") as engine:
        alone = (await engine.complete(prompt(70), max_tokens=900, ignore_eos=True)).token_ids
        async with engine.generate(prompt(70), max_tokens=900, ignore_eos=True) as stream:
            await anext(stream)
            for _ in range(3):
                with anyio.fail_after(10), pytest.raises(forerun.RequestFailed, match="each time"):
                    await engine.complete([98, 1, 2], max_tokens=5)
            async for _ in stream:
                pass
        assert stream.result.token_ids == alone
        assert engine.statistics().actors["target decoder"].num_restarts == 12


async def test_what_nobody_foresaw_fails_its_request_alone(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with forerun.open_engine(model) as engine:
        wanted = await engine.complete(prompt(10), max_tokens=20)
        async with engine.generate(prompt(20), max_tokens=900, ignore_eos=True) as stream:
            await anext(stream)
            with monkeypatch.context() as patch:

                def fail(*_: Any) -> Any:
                    raise ZeroDivisionError

                patch.setattr("forerun.core.protocol.SequenceProtocol.chunk_computed", fail)
                with pytest.raises(forerun.RequestFailed, match="unexpected") as caught:
                    await engine.complete(prompt(10), max_tokens=20)
            assert isinstance(caught.value.__cause__, ZeroDivisionError)
            assert (await engine.complete(prompt(10), max_tokens=20)).token_ids == wanted.token_ids
            async for _ in stream:
                pass
        assert len(stream.result.token_ids) == 900


async def test_a_bug_in_giving_back_is_no_requests_matter(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    with pytest.raises(forerun.EngineDead):
        async with forerun.open_engine(model) as engine:
            monkeypatch.setattr("forerun.actors.drafting.Drafting.forget", fail)
            with pytest.raises(forerun.EngineDead):
                await engine.complete(prompt(10), max_tokens=20)
            assert engine.tree.pool.num_used == 0  # it was given back all the same


async def test_an_answer_that_is_whole_stays_so_whatever_keeping_it_takes(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    freeze, checkpoint = TrunkBase.freeze, SequenceMemory.checkpoint

    def slow(*args: Any, **how: Any) -> None:
        time.sleep(0.4)
        freeze(*args, **how)

    def a_second(*_: object) -> float:
        return 1.0

    def full(memory: SequenceMemory) -> Any:
        raise MemoryError

    async with forerun.open_engine(model) as engine:
        wanted = await engine.complete(prompt(10), max_tokens=30, ignore_eos=True)
        with monkeypatch.context() as patch:
            patch.setattr(TrunkBase, "freeze", slow)
            patch.setattr(TrunkBase, "seconds", a_second)  # in a thread
            found = await engine.complete(prompt(10), max_tokens=30, ignore_eos=True, timeout_seconds=0.35)
        assert (found.token_ids, found.finish_reason) == (wanted.token_ids, wanted.finish_reason)
        monkeypatch.setattr(SequenceMemory, "checkpoint", full)
        assert (await engine.complete(prompt(10), max_tokens=30, ignore_eos=True)).token_ids == wanted.token_ids
        assert engine.statistics().actors["target decoder"].num_restarts == 0
        monkeypatch.setattr(SequenceMemory, "checkpoint", checkpoint)


async def test_too_many_deaths_end_the_engine(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Poison(monkeypatch)
    with pytest.raises(forerun.EngineDead) as caught:
        async with forerun.open_engine(model, spec_type="none") as engine:
            num_failed = 0
            with anyio.fail_after(20), pytest.raises(forerun.EngineDead):
                while True:
                    with pytest.raises(forerun.RequestFailed):
                        await engine.complete([98, 1, 2], max_tokens=5)
                    num_failed += 1
            assert num_failed >= MAX_CONVICTED
            assert engine.statistics().num_slots_used == 0
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


async def test_a_block_cancelled_from_outside_says_closed_to_other_readers(model: str) -> None:
    streams: list[forerun.Stream] = []
    with anyio.CancelScope() as scope:
        async with forerun.open_engine(model, num_slots=1) as engine:
            streams.append(engine.generate(prompt(100), max_tokens=900, ignore_eos=True))
            await anext(streams[0])
            streams += [engine.generate(prompt(100), max_tokens=900, ignore_eos=True) for _ in range(2)]
            scope.cancel()
            await anyio.sleep(1)
    for stream in streams:
        with anyio.fail_after(1), pytest.raises(forerun.EngineClosed):
            async for _ in stream:
                pass


async def test_the_blocks_own_error_comes_out_as_it_is(model: str) -> None:
    with pytest.raises(KeyError):
        async with forerun.open_engine(model):
            raise KeyError


async def test_an_observer_that_raises_is_dropped_and_the_request_goes_on(model: str, caplog: pytest.LogCaptureFixture) -> None:
    def fail(done: int, total: int) -> None:
        raise ZeroDivisionError

    async with forerun.open_engine(model) as engine:
        result = await engine.complete(prompt(130), max_tokens=5, ignore_eos=True, prefill_progress=fail)
    assert len(result.token_ids) == 5
    assert [record.message for record in caplog.records] == ["prefill_progress of request-1 failed"]


async def test_an_unknown_option_is_a_type_error(model: str) -> None:
    async with forerun.open_engine(model) as engine:
        options: Any = {"temprature": 1.0}
        with pytest.raises(TypeError, match="temprature"):
            engine.generate([1], **options)


async def test_a_stream_whose_end_was_cut_off_says_so(model: str) -> None:
    async with forerun.open_engine(model, spec_type="none") as engine:
        num_tokens = CAPACITY - 1 + MERGED_TOKENS + 1  # one more than the outbox holds
        stream = engine.generate(prompt(5), max_tokens=num_tokens, ignore_eos=True)
        while engine.statistics().actors["target decoder"].mailbox.num_received < num_tokens:
            await anyio.sleep(0.001)
    with pytest.raises(forerun.EngineClosed):
        async for _ in stream:
            pass


async def test_a_deadline_ends_a_request_wherever_it_is_and_gives_the_memory_back(model: str) -> None:
    async with forerun.open_engine(model, num_slots=1, ngram_suffix_n_max=8) as engine:
        for seconds in (0.0, 0.01, 0.05):  # what is not read holds up the rest: 900 do not fit into the outbox
            stream = engine.generate(prompt(100), max_tokens=900, ignore_eos=True, timeout_seconds=seconds)
            await anyio.sleep(seconds)
            with pytest.raises(forerun.DeadlineExceeded):
                async for _ in stream:
                    pass
            assert engine.statistics().num_slots_used == 0
        async with engine.generate(prompt(10), max_tokens=900, ignore_eos=True) as first:
            await anext(first)
            with pytest.raises(forerun.DeadlineExceeded):  # while it waits for memory
                await engine.complete(prompt(5), timeout_seconds=0.02)
            stream = engine.generate(prompt(10), timeout_seconds=60)
            await stream.aclose()
            assert stream.result.finish_reason is forerun.FinishReason.CANCELLED


async def test_draining_finishes_what_runs_and_refuses_what_is_new(model: str) -> None:
    results: list[forerun.Result] = []
    async with forerun.open_engine(model, num_slots=2) as engine, anyio.create_task_group() as group:

        async def one() -> None:
            results.append(await engine.complete(prompt(70), max_tokens=40, ignore_eos=True))

        for _ in range(5):
            group.start_soon(one)
        await anyio.wait_all_tasks_blocked()
        await engine.drain()
        assert engine.statistics().num_requests_running == 0
        with pytest.raises(forerun.EngineClosed, match="draining"):
            engine.generate([1])
        await engine.drain()
    assert [len(result.token_ids) for result in results] == [40] * 5


async def test_the_plain_loop_gives_the_same_tokens(model: str) -> None:
    texts: list[list[tuple[int, ...]]] = []
    for overlap in (True, False):
        async with forerun.open_engine(model, overlap=overlap) as engine:
            found: dict[int, tuple[int, ...]] = {}

            async def one(length: int, engine: forerun.Engine = engine, found: dict[int, tuple[int, ...]] = found) -> None:
                result = await engine.complete(prompt(length), max_tokens=60, ignore_eos=True, temperature=length % 2, seed=length)
                found[length] = result.token_ids

            async with anyio.create_task_group() as group:
                for length in (1, 5, 64, 65, 130, 200):
                    group.start_soon(one, length)
            texts.append([found[length] for length in sorted(found)])
    assert texts[0] == texts[1]


@pytest.mark.parametrize("inline", [1e9, -1.0])
async def test_cancelled_work_never_reaches_the_slots_next_owner(model: str, inline: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything in worker threads, or nothing: requests are cancelled at all points while others take over their slots."""
    monkeypatch.setattr("forerun.core.actor.INLINE_SECONDS", inline)
    async with forerun.open_engine(model, num_slots=3) as engine:
        alone = (await engine.complete(prompt(100), max_tokens=20, ignore_eos=True)).token_ids
        answers: list[tuple[int, ...]] = []

        async def cancelled(milliseconds: int) -> None:
            with anyio.move_on_after(milliseconds / 1000):
                await engine.complete(prompt(130), max_tokens=60, ignore_eos=True)

        async def kept() -> None:
            answers.append((await engine.complete(prompt(100), max_tokens=20, ignore_eos=True)).token_ids)

        async with anyio.create_task_group() as group:
            for i in range(24):
                group.start_soon(cancelled, 3 * i)
                group.start_soon(kept)
        assert answers == [alone] * 24
        assert engine.statistics().num_slots_used == 0
        assert all(actor.mailbox.num_unanswered == 0 for actor in engine.statistics().actors.values())


async def test_a_stop_text_ends_the_answer_before_it_and_is_never_seen() -> None:
    async with forerun.open_engine("demo") as engine:
        plain = (await engine.complete("def add(a, b):", max_tokens=60)).text
        stop = plain[20:26]
        async with engine.generate("def add(a, b):", max_tokens=60, stop=["never there", stop]) as stream:
            pieces = [delta.text async for delta in stream]
        result = stream.result
        assert "".join(pieces) == result.text == plain[: plain.index(stop)]
        assert (result.finish_reason, result.matched_stop) == (forerun.FinishReason.STOP, stop)
        token = result.token_ids[2]
        ended = await engine.complete("def add(a, b):", max_tokens=60, stop_ids=[token])
        assert (ended.token_ids, ended.matched_stop) == (result.token_ids[: result.token_ids.index(token)], token)


async def test_log_probabilities_come_with_every_token_whoever_drafted() -> None:
    found: list[tuple[forerun.TokenLogprob, ...]] = []
    for spec_type in ("none", "draft-mtp,ngram-suffix"):
        async with forerun.open_engine("demo", spec_type=spec_type, choose="first") as engine:
            async with engine.generate("def add(a, b):", max_tokens=40, temperature=0.7, seed=1, num_logprobs=2) as stream:
                deltas = [delta async for delta in stream]
            result = stream.result
            assert len(result.logprobs) == len(result.token_ids) == 40
            assert tuple(each for delta in deltas for each in delta.logprobs) == result.logprobs
            found.append(result.logprobs)
            assert (await engine.complete("def add(a, b):", max_tokens=4)).logprobs == ()
    assert found[0] == found[1]


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "seed": 3}, {"temperature": 0.8, "seed": 3, "presence_penalty": 0.5}])
@pytest.mark.parametrize("choose", ["first", "rate"])
async def test_where_it_will_be_asked_anyway_the_head_drafts_behind_the_verify(options: Any, choose: Any) -> None:
    """One question a round instead of two, and the drafts of the other way round."""
    found = list[Any]()
    for is_behind in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if not is_behind:
                patch.setattr(Drafting, "ahead", lambda *_: (0, 0.0))  # pyright: ignore[reportUnknownLambdaType, reportUnknownArgumentType]
            async with forerun.open_engine("demo", spec_type="draft-mtp", choose=choose) as engine:
                result = await engine.complete("def add(a, b):", max_tokens=120, ignore_eos=True, **options)
                num_asked = engine.statistics().actors["MTP drafter"].mailbox.num_received
        drafts = result.speculation.drafters["draft-mtp"]
        found.append((result.token_ids, drafts.num_accepted_tokens_per_pos))
        if is_behind:
            assert num_asked < 0.5 * drafts.num_drafts + 8
        else:
            assert num_asked >= drafts.num_drafts
    assert found[0][0] == found[1][0]
    if choose == "first":
        assert found[0] == found[1]


async def test_a_rounds_tokens_are_with_the_reader_while_the_head_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    draft_after, in_time = HeadBase.draft_after, list[bool]()
    num_read, num_prompt = 0, 8

    def slow(self: HeadBase, batch: Any, choices: Any) -> Any:
        before, draft = choices.asks[0].position - num_prompt, draft_after(self, batch, choices)

        def wait() -> Any:
            until = time.monotonic() + 5
            while num_read <= before and time.monotonic() < until:
                time.sleep(0.001)
            in_time.append(num_read > before)
            return draft.finish()

        return Begun(None, wait)

    monkeypatch.setattr(HeadBase, "draft_after", slow)
    monkeypatch.setattr(Threads, "is_inline", lambda *_: False)  # pyright: ignore[reportUnknownLambdaType, reportUnknownArgumentType]
    async with (
        forerun.open_engine("demo", spec_type="draft-mtp", choose="first") as engine,
        engine.generate([*range(40, 40 + num_prompt)], max_tokens=40, ignore_eos=True) as stream,
    ):
        async for delta in stream:
            num_read += len(delta.token_ids)
    assert len(in_time) > 5
    assert all(in_time)


class FailedMark:
    """Of a device that has failed since."""

    def is_done(self) -> bool:
        raise ArithmeticError("of a test")

    def wait(self) -> None:
        raise ArithmeticError("of a test")


@pytest.mark.parametrize("is_inline", [True, False])
@pytest.mark.parametrize("has_begun", [False, True])
async def test_a_head_that_fails_behind_a_verify_costs_nothing_but_that_way(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, has_begun: bool, is_inline: bool
) -> None:
    monkeypatch.setattr(Threads, "is_inline", lambda *_: is_inline)  # pyright: ignore[reportUnknownLambdaType, reportUnknownArgumentType]
    model = forerun.load_model("demo")
    async with forerun.open_engine(model, spec_type="draft-mtp", choose="first") as engine:
        expected = await engine.complete("def add(a, b):", max_tokens=60, ignore_eos=True)
    with pytest.MonkeyPatch.context() as patch:

        def fail(*_: Any) -> Any:
            mark = FailedMark()
            return Begun(mark, mark.wait) if has_begun else mark.wait()

        patch.setattr(HeadBase, "draft_after", fail)
        async with forerun.open_engine(model, spec_type="draft-mtp", choose="first") as engine:
            result = await engine.complete("def add(a, b):", max_tokens=60, ignore_eos=True)
            assert all(actor.num_restarts == 0 for actor in engine.statistics().actors.values())
    assert result.token_ids == expected.token_ids
    assert result.speculation.drafters["draft-mtp"].num_accepted_tokens > 20
    assert [record.message for record in caplog.records].count("the target decoder's MTP head failed") == 1


async def test_synthetic_acceptance_is_as_ordered_and_marked() -> None:
    async with forerun.open_engine("demo", spec_type="draft-mtp", choose="first", synth_rates=(0.8, 0.5, 0.0)) as engine:
        result = await engine.complete("def add(a, b):", max_tokens=600, ignore_eos=True)
    assert result.speculation.is_synthetic
    drafter = result.speculation.drafters["draft-mtp"]
    first, second, *rest = drafter.num_accepted_tokens_per_pos
    assert 0.7 < first / drafter.num_drafts < 0.9
    assert 0.35 < second / first < 0.65
    assert not any(rest)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"stop": "x" * 300}, "stop[0]"), ({"stop": ["a"] * 17}, "stop"), ({"stop": ["a", ""]}, "stop[1]"), ({"stop": 7}, "stop"),
        ({"stop": ["\ud800"]}, "stop[0]"), ({"logit_bias": {1: float("nan")}}, "logit_bias"), ({"logit_bias": {-1: 1.0}}, "logit_bias"),
        ({"logit_bias": {"a": 1.0}}, "logit_bias"), ({"stop_ids": [4096]}, "stop_ids"), ({"num_logprobs": 21}, "num_logprobs"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"), ({"presence_penalty": 3.0}, "presence_penalty"),
        ({"frequency_penalty": float("inf")}, "frequency_penalty"),
    ],
)  # fmt: skip
async def test_new_options_out_of_range_are_named(options: Any, field: str) -> None:
    async with forerun.open_engine("demo") as engine:
        with pytest.raises(forerun.InvalidRequest) as caught:
            await engine.complete("x", **options)
        assert caught.value.violations[0][0] == field
