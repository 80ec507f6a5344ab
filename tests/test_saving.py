"""Requests and prefixes in files: they go on with the same tokens anywhere, and what is not whole is refused."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from dataclasses import replace
from glob import glob
from pathlib import Path
from typing import Any

import anyio
import forerun
import numpy as np
import pytest
from forerun.core.vocabulary import Request, SamplingParams
from forerun.kernels.formats.safetensors import read_header
from forerun.kernels.model import saved
from forerun.kernels.model.prefix import Checkpoint, Snapshot

HELD_OUT = [case["text"] for case in json.loads((Path(__file__).parent / "data" / "heldout_prompts.json").read_text())]
OPTIONS: forerun.Options = {"max_tokens": 60, "temperature": 0.8, "seed": 7, "ignore_eos": True}

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def demo() -> forerun.Model:
    return forerun.load_model("demo")


async def save_in_the_middle(engine: forerun.Engine, path: Path, num_deltas: int = 4) -> tuple[forerun.Result, int]:
    """The whole request, and how many of its tokens were delivered before it was saved."""
    num_before = 0
    async with engine.generate(HELD_OUT[0], **OPTIONS) as stream:
        async for delta in stream:
            num_before += len(delta.token_ids)
            num_deltas -= 1
            if num_deltas == 0:
                break
        await stream.save(path)
        async for _ in stream:
            pass
    return stream.result, num_before


@pytest.mark.parametrize("store", ["log", "snapshots"])
@pytest.mark.parametrize("spec_type", [None, "none"])
async def test_a_saved_request_goes_on_in_another_engine_and_a_used_slot(
    demo: forerun.Model, tmp_path: Path, store: forerun.StoreName, spec_type: str | None
) -> None:
    path = tmp_path / "request"
    async with forerun.open_engine(demo, recurrent_store=store) as engine:
        whole, num_before = await save_in_the_middle(engine, path)
    async with forerun.open_engine(demo, num_slots=1, spec_type=spec_type, recurrent_store=store) as engine:
        await engine.complete(HELD_OUT[1], max_tokens=20)
        for _ in range(2):
            async with engine.restore(path) as stream:
                deltas = [delta async for delta in stream]
            result = stream.result
            assert (result.token_ids, result.text, result.sampling) == (whole.token_ids, whole.text, whole.sampling)
            assert result.timings.prefill_seconds == 0 <= result.timings.decode_seconds
            tokens = [token for delta in deltas for token in delta.token_ids]
            assert 0 < len(tokens) <= len(whole.token_ids) - num_before
            assert tuple(tokens) == whole.token_ids[-len(tokens) :]
            assert whole.text.endswith("".join(delta.text for delta in deltas))
        engine.tree.supervisor.kill("target decoder", RuntimeError("killed by a test"))
        assert (await engine.complete(HELD_OUT[0], **OPTIONS)).token_ids == whole.token_ids


async def test_a_restored_request_survives_the_loss_of_its_memory(demo: forerun.Model, tmp_path: Path) -> None:
    path = tmp_path / "request"
    async with forerun.open_engine(demo) as engine:
        whole, _ = await save_in_the_middle(engine, path)
        async with engine.restore(path) as stream:
            await anext(stream)
            engine.tree.supervisor.kill("target decoder", RuntimeError("killed by a test"))
            async for _ in stream:
                pass
        assert stream.result.token_ids == whole.token_ids
        assert engine.statistics().actors["target decoder"].num_restarts == 1


async def test_a_reader_that_has_read_nothing_can_save(demo: forerun.Model, tmp_path: Path) -> None:
    async with forerun.open_engine(demo) as engine:
        async with engine.generate(HELD_OUT[0], **(OPTIONS | {"max_tokens": 1000})) as stream:
            before, now = -1, 0
            while now != before:  # until its outbox is full
                await anyio.sleep(0.3)
                before, now = now, engine.statistics().actors["target decoder"].mailbox.num_received
            with anyio.fail_after(20):
                await stream.save(tmp_path / "request")
        async with engine.restore(tmp_path / "request", timeout_seconds=100) as stream:
            await anext(stream)
        with pytest.raises(forerun.SavedSequenceError, match="has ended"):
            await stream.save(tmp_path / "request")


async def test_what_cannot_be_written_is_said_and_the_request_goes_on(demo: forerun.Model, tmp_path: Path) -> None:
    async with forerun.open_engine(demo) as engine:
        with pytest.raises(forerun.SavedSequenceError, match="cannot be written"):
            await save_in_the_middle(engine, tmp_path / "nowhere" / "request")
        async with engine.generate(HELD_OUT[0], **OPTIONS) as stream:
            for odd in (tmp_path, "", "/", "a\0b", "\ud800", str(tmp_path / ("x" * 300))):
                with pytest.raises(forerun.SavedSequenceError, match="cannot be written"):
                    await stream.save(odd)
            await stream.save(tmp_path / "a**b[")
            async for _ in stream:
                pass
        assert len(stream.result.token_ids) == 60
    assert os.listdir(tmp_path) == ["a**b["]


async def test_damaged_and_foreign_files_are_refused_and_what_runs_goes_on(
    demo: forerun.Model, tmp_path: Path, checkpoints: dict[str, Path]
) -> None:
    path, bad = tmp_path / "request", tmp_path / "bad"
    async with forerun.open_engine(demo) as engine:
        whole, _ = await save_in_the_middle(engine, path)
        good = path.read_bytes()
        with path.open("rb") as file:
            header = read_header(file, path)
        places = [0, 9, *(len(header.raw) + (info.begin + info.end) // 2 for info in header.tensors.values())]
        places += [good.index(text) + 12 for text in (b'"checksum"', b'"position"', b'"record"')] + [len(good) - 1]
        places += random.Random(1).sample(range(len(header.raw)), 20) + random.Random(2).sample(range(len(good)), 20)
        broken = [good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :] for place in places]
        broken += [good[:-1], good + b"\0", good[:100], b"", good.replace(b"sequence 2", b"sequence 1")]
        async with engine.generate(HELD_OUT[0], **OPTIONS) as running:
            for contents in broken:
                bad.write_bytes(contents)
                with pytest.raises(forerun.SavedSequenceError, match=str(bad)):
                    async for _ in engine.restore(bad):
                        pass
            async for _ in running:
                pass
        assert running.result.token_ids == whole.token_ids
        os.mkfifo(tmp_path / "pipe")
        for path, problem in ((tmp_path / "missing", "cannot be read"), (tmp_path, "not a file"), (tmp_path / "pipe", "not a file")):
            with pytest.raises(forerun.SavedSequenceError, match=problem):
                await anext(engine.restore(path))
        statistics = engine.statistics()
        assert (statistics.num_slots_used, statistics.num_requests_running) == (0, 0)
    async with forerun.open_engine(checkpoints["dense"]) as engine:
        with pytest.raises(forerun.SavedSequenceError, match="another model"):
            await anext(engine.restore(tmp_path / "request"))


async def test_a_forged_answer_ends_its_own_request_when_it_is_computed_again(demo: forerun.Model, tmp_path: Path) -> None:
    async with forerun.open_engine(demo) as engine:
        await save_in_the_middle(engine, tmp_path / "request", 8)
        make = demo.memory()
        blank = make.memory(make.arena(1), [0], 0, 1, "log").snapshot()
        record, snapshot = saved.read(tmp_path / "request", demo.fingerprint, blank)
        values = json.loads(record)
        values["output_ids"][2] = (values["output_ids"][2] + 1) % 4000
        saved.write(tmp_path / "forged", demo.fingerprint, json.dumps(values), snapshot)
        async with engine.generate(HELD_OUT[1], **OPTIONS) as other:
            with pytest.raises(forerun.RequestFailed, match="as it was saved"):
                async with engine.restore(tmp_path / "forged") as stream:
                    await anext(stream)
                    engine.tree.supervisor.kill("target decoder", RuntimeError("killed by a test"))
                    async for _ in stream:
                        pass
            async for _ in other:
                pass
        assert len(other.result.token_ids) == 60


NO_ROWS = np.zeros((0, 4), np.float32)


def test_requests_that_make_no_sense_are_refused() -> None:
    request = Request("a", (1, 2), 10, SamplingParams(0.5, seed=2**63), frozenset({5}), 100, frozenset({5}), "salt")
    record = saved.record_of(request, [3, 4])
    assert saved.parse_record(record, NO_ROWS, "b", 100, 50) == (replace(request, request_id="b"), (3, 4))
    values: dict[str, Any] = json.loads(record)
    wrong: list[dict[str, Any]] = [
        {"prompt_ids": []}, {"prompt_ids": [1, 100]}, {"prompt_ids": [1.5]}, {"prompt_ids": 7}, {"output_ids": []}, {"output_ids": [-1]},
        {"output_ids": [1] * 10}, {"max_tokens": None}, {"max_tokens": 0}, {"max_tokens": 49}, {"max_tokens": "9"},
        {"sampling": {"seed": -1}},
        {"sampling": {"code": 1}}, {"sampling": None}, {"sampling": values["sampling"] | {"temperature": None}},
        {"sampling": values["sampling"] | {"logit_bias": [[1]]}}, {"stop": [""]}, {"num_logprobs": 99},
        {"stop_ids": [True]}, {"cache_salt": None}, {"cache_salt": "x" * 1000}, {"more": 1},
    ]  # fmt: skip
    for change in wrong:
        with pytest.raises(forerun.SavedSequenceError, match="makes no sense"):
            saved.parse_record(json.dumps(values | change), NO_ROWS, "b", 100, 50)
    for text in ("", "[]", "null", "{}", "[" * 100_000):
        with pytest.raises(forerun.SavedSequenceError, match="makes no sense"):
            saved.parse_record(text, NO_ROWS, "b", 100, 50)


def snapshot(value: float, position: int = 64) -> Snapshot:
    state = [np.full((2, 1, 1, 64, 512), value, np.float32) for _ in range(3)]
    trunk, mtp = (np.full((2, 1, 1, position, 512), value, np.float32) for _ in range(2))
    return Snapshot(Checkpoint(position, *state), trunk, mtp, np.full((1, 512), value, np.float32))


def value_in(path: Path) -> float:
    """Of the one of these snapshots that a file holds, whole."""
    _, whole = saved.read(path, "f" * 64, snapshot(0, 0))
    value = float(whole.trunk[0, 0, 0, 0, 0])
    assert all((array == value).all() for array in whole.arrays.values())
    return value


def test_killing_who_saves_100_times_leaves_the_old_file_or_the_new(tmp_path: Path) -> None:
    path, rng, seen = tmp_path / "request", random.Random(9), set[float]()
    snapshots = [snapshot(0), snapshot(1)]
    saved.write(path, "f" * 64, "", snapshots[0])
    left_behind, number = list[str](), 0
    while number < 100 or len(left_behind) <= 10 or len(seen) < 2:  # some must have died in the middle, and some after a write
        child = os.fork()
        if not child:
            while True:
                for each in snapshots[::-1]:
                    saved.write(path, "f" * 64, "", each)
        time.sleep(rng.random() * 0.02)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        seen.add(value_in(path))
        left_behind, number = [name for name in os.listdir(tmp_path) if name != "request"], number + 1
        assert number < 2000
    assert seen == {0, 1}
    for name in left_behind[1:]:
        os.utime(tmp_path / name, (0, 0))
    saved.write(path, "f" * 64, "", snapshots[0])
    assert sorted(os.listdir(tmp_path)) == sorted([left_behind[0], "request"])  # the newest may be somebody's who still writes


def test_many_who_save_at_once_and_links_in_the_way_leave_one_of_theirs(tmp_path: Path) -> None:
    path, victim = tmp_path / "request", tmp_path / "victim"
    victim.write_text("untouched")
    (tmp_path / f".request.{os.getpid()}.saving").symlink_to(victim)

    def save(value: float) -> None:
        for _ in range(20):
            saved.write(path, "f" * 64, "", snapshot(value))

    threads = [threading.Thread(target=save, args=(value,)) for value in (0.0, 1.0, 2.0)]
    saved.write(path, "f" * 64, "", snapshot(0))
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert value_in(path) in (0, 1, 2)
    assert victim.read_text() == "untouched"
    assert path.stat().st_mode & 0o77 == 0


def test_hostile_headers_cost_nothing(tmp_path: Path) -> None:
    def refused(header: dict[str, Any] | bytes, size: int = 0) -> None:
        raw = header if isinstance(header, bytes) else json.dumps(header).encode()
        (tmp_path / "bad").write_bytes(len(raw).to_bytes(8, "little") + raw)
        os.truncate(tmp_path / "bad", 8 + len(raw) + size)
        with pytest.raises(forerun.SavedSequenceError):
            saved.check(tmp_path / "bad", "f" * 64, snapshot(0, 0))

    metadata = {"format": saved.FORMAT, "model": "f" * 64, "position": "64", "record": "", "checksum": "0" * 64}
    shapes = snapshot(0, 0).shapes_at(64, 1)
    offset, tensors = 0, dict[str, Any]()
    for name, shape in sorted(shapes.items()):
        end = offset + 4 * int(np.prod(shape))
        tensors[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    refused({"__metadata__": metadata, **tensors}, offset)  # all right, but for its checksum
    for change in ({"checksum": "0"}, {"checksum": ""}, {"checksum": "\ud800"}, {"checksum": "\u0660" * 64}, {"position": "9" * 5000},
                   {"position": "-1"}, {"position": "65"}, {"position": str(2**62)}):  # fmt: skip
        refused({"__metadata__": metadata | change, **tensors}, offset)
    refused({"__metadata__": metadata, "trunk": {"dtype": "F32", "shape": [2**62] * 1000, "data_offsets": [0, 0]}})
    refused({"__metadata__": metadata, "trunk": {"dtype": "BF16", "shape": [2**40], "data_offsets": [0, 2**41]}}, 2**41)
    refused(b"[" + b"[]," * 6_000_000 + b"[]]")


async def chat(demo: forerun.Model, folder: Path | None, prefix_bytes: int) -> tuple[list[tuple[int, ...]], forerun.PrefixStatistics]:
    messages: list[forerun.Message] = [{"role": "system", "content": "\n".join(HELD_OUT[:2])}]
    answers: list[tuple[int, ...]] = []
    async with forerun.open_engine(demo, prefix_bytes=prefix_bytes, prefix_folder=folder, num_slots=2, num_pages=60) as engine:
        for turn in range(4):
            messages.append({"role": "user", "content": HELD_OUT[turn + 3][:120]})
            result = await engine.complete(messages, max_tokens=16, temperature=0.7, seed=turn, ignore_eos=True)
            answers.append(result.token_ids)
            messages.append({"role": "assistant", "content": result.text})
        with anyio.fail_after(5):  # what there is no room for is written after the answer
            while (prefixes := engine.statistics().prefixes).num_bytes > prefix_bytes:
                await anyio.sleep(0.01)
        return answers, prefixes


async def test_prefixes_outlive_the_engine_in_a_folder(demo: forerun.Model, tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    plain, _ = await chat(demo, None, 0)
    first, statistics = await chat(demo, tmp_path, 2**28)
    assert (first, statistics.num_hits, statistics.num_loaded, statistics.num_files) == (plain, 3, 0, 0)
    second, statistics = await chat(demo, tmp_path, 2**28)
    assert (second, statistics.num_hits) == (plain, 4)
    assert statistics.num_loaded >= 1
    files = [tmp_path / name for name in glob("**/*.safetensors", root_dir=tmp_path, recursive=True)]
    assert statistics.num_files == len(files) > 3
    contents = [path.read_bytes() for path in files]
    for path, others in zip(files, contents[1:] + contents[:1], strict=True):
        path.write_bytes(others)  # whole, but another prefix's
    swapped, statistics = await chat(demo, tmp_path, 2**28)
    assert (swapped, statistics.num_loaded) == (plain, 0)
    for path, others in zip(files, contents, strict=True):
        path.write_bytes(others[:-1] + b"\xff")
    (tmp_path / os.path.basename(os.path.dirname(files[0])) / "dangling.safetensors").symlink_to("nowhere")
    third, statistics = await chat(demo, tmp_path, 2**28)
    assert (third, statistics.num_loaded) == (plain, 0)
    async with forerun.open_engine(checkpoints["dense"], prefix_folder=tmp_path) as engine:
        assert engine.statistics().prefixes.num_files == 0
    async with forerun.open_engine(demo, prefix_folder=tmp_path, folder_bytes=1) as engine:
        assert engine.statistics().prefixes.num_files == 0  # a bound is one from the start


async def test_what_other_kernels_have_left_in_a_folder_is_not_found(
    demo: forerun.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await chat(demo, tmp_path, 2**28)
    monkeypatch.setattr("forerun.kernels.cpu.matrices.ARITHMETIC", -1)
    _, statistics = await chat(demo, tmp_path, 2**28)
    assert statistics.num_loaded == 0


async def test_what_host_memory_has_no_room_for_goes_to_the_folder_and_comes_back(demo: forerun.Model, tmp_path: Path) -> None:
    plain, statistics = await chat(demo, None, 2**28)
    room = statistics.num_bytes // 3
    answers, statistics = await chat(demo, tmp_path, room)
    assert (answers, statistics.num_hits) == (plain, 3)
    assert 0 < statistics.num_bytes <= room
    assert statistics.num_files > 0


async def test_a_folder_that_cannot_be_used_is_said_at_once(demo: forerun.Model, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(forerun.SavedSequenceError, match="cannot be used"):
        async with forerun.open_engine(demo, prefix_folder=tmp_path / "file"):
            pass
