"""Prompts with embedding rows: what they compute, what they share, what is refused."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import anyio
import forerun
import numpy as np
import pytest
from forerun.actors.model import LoadedModel
from forerun.core.embeddings import lay_out
from forerun.kernels.backend import F32
from forerun.kernels.model.inputs import GivenRows
from forerun.kernels.model.trunk import TrunkBase
from forerun.kernels.reference import ReferenceBackend

from tests.checkpoints import LAYOUTS, places_of_rows, prompt, prompt_with_rows

pytestmark = pytest.mark.anyio


def rows_of(ids: list[int], model: forerun.Model) -> forerun.EmbeddingRows:
    """What a model on the reference backend has for tokens."""
    assert isinstance(model, LoadedModel)
    assert isinstance(model.backend, ReferenceBackend)
    return forerun.EmbeddingRows.of(model.backend.embed(model.weights.embedding, ids))


def random_rows(count: int, seed: int = 0, hidden: int = 64) -> F32:
    return np.random.Generator(np.random.PCG64(seed)).standard_normal((count, hidden), np.float32)


@pytest.fixture
def dense(checkpoints: dict[str, Path]) -> forerun.Model:
    return forerun.load_model(str(checkpoints["dense"]))


async def answer(model: forerun.Model, prompt: Any, spec_type: str = "none", **options: Any) -> forerun.Result:
    async with forerun.open_engine(model, spec_type=spec_type, choose="first", num_slots=2) as engine:
        return await engine.complete(prompt, max_tokens=30, ignore_eos=True, **options)


def test_places_are_those_written_down_by_hand() -> None:
    given, expected = GivenRows(lay_out(prompt_with_rows(64)).embeddings), places_of_rows()
    assert given.at(0, len(expected)).tolist() == [list(place) for place in expected]
    for start, count in ((3, 1), (5, 40), (89, 9), (100, 6)):
        assert given.at(start, count).tolist() == [list(place) for place in expected[start : start + count]]


@pytest.mark.parametrize("layout", LAYOUTS)
async def test_rows_that_are_those_of_tokens_say_what_the_tokens_say(layout: str, checkpoints: dict[str, Path]) -> None:
    model, ids = forerun.load_model(str(checkpoints[layout]), backend="reference"), prompt(150)
    parts = [ids[:7], rows_of(ids[7:70], model), rows_of(ids[70:72], model), ids[72:140], rows_of(ids[140:], model)]
    for spec_type in ("none", "draft-mtp"):
        plain, given = [await answer(model, each, spec_type) for each in (ids, parts)]
        assert given.token_ids == plain.token_ids
        assert given.usage.num_prompt_tokens == 150
        if spec_type != "none":
            drafters = [result.speculation.drafters["draft-mtp"] for result in (plain, given)]
            assert drafters[0] == drafters[1]  # the head's cache is the same, too


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "seed": 4}, {"temperature": 1.5, "seed": 5, "repetition_penalty": 1.1}])
async def test_the_same_text_with_and_without_speculation(dense: forerun.Model, options: dict[str, Any]) -> None:
    parts = prompt_with_rows(64)
    plain = await answer(dense, parts, **options)
    for spec_type in ("draft-mtp", "ngram-simple,ngram-map-k4v,ngram-mod,ngram-cache", "draft-mtp,ngram-suffix"):
        assert (await answer(dense, parts, spec_type, **options)).token_ids == plain.token_ids


async def test_the_same_rows_are_computed_once_and_others_never_taken_for_them(dense: forerun.Model) -> None:
    rows, ids = random_rows(100), prompt(80)
    others = rows.copy()
    others[99, 63] += 1e-6
    places = [(0, i // 10, i % 10) for i in range(100)]
    async with forerun.open_engine(dense, spec_type="draft-mtp") as engine:

        async def ask(rows: F32, places: Any = None, end: int = 0) -> tuple[int, tuple[int, ...]]:
            result = await engine.complete([ids[:30], forerun.EmbeddingRows.of(rows, places), [*ids, end]], max_tokens=8, ignore_eos=True)
            return result.usage.num_cached_tokens, result.token_ids

        first = await ask(rows)
        assert first[0] == 0
        again = await ask(rows, end=1)
        assert again[0] == 192  # the rows, and some of what follows them
        assert await ask(rows, [(i, i, i) for i in range(100)]) == (again[0], first[1])  # text's places, said
        assert (await ask(others))[0] == 0
        assert (await ask(rows, places))[0] == 0
    async with forerun.open_engine(dense, prefix_bytes=0) as engine:
        result = await engine.complete([ids[:30], forerun.EmbeddingRows.of(rows), [*ids, 1]], max_tokens=8, ignore_eos=True)
    assert result.token_ids == again[1]


async def test_hidden_rows_of_such_a_prompt(dense: forerun.Model) -> None:
    model, ids = dense, prompt(70)
    reference = forerun.load_model(dense.name, backend="reference")
    async with forerun.open_engine(model) as engine:

        async def hidden(prompt: Any) -> F32:
            async with engine.embed(prompt) as embedding:
                return np.concatenate([rows async for _, rows in embedding])

        assert np.array_equal(await hidden(ids), await hidden([ids[:10], rows_of(ids[10:30], reference), ids[30:]]))


async def test_hidden_rows_that_were_asked_for_in_vain_come_next_time(dense: forerun.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, prefill = prompt(200), TrunkBase.prefill

    def slow(self: TrunkBase, *args: Any) -> Any:
        time.sleep(0.05)
        return prefill(self, *args)

    def seconds(self: TrunkBase, num_rows: int) -> float:
        return 0.05  # too long for the event loop

    monkeypatch.setattr(TrunkBase, "prefill", slow)
    monkeypatch.setattr(TrunkBase, "seconds", seconds)
    async with forerun.open_engine(dense) as engine:
        async with engine.embed(ids) as embedding:
            expected = np.concatenate([rows async for _, rows in embedding])
        found: list[F32] = []
        async with engine.embed(ids, request_id="x") as embedding:
            with pytest.raises(forerun.InvalidRequest, match="another's"):
                await engine.embed(ids, request_id="x").__aenter__()
            found.append((await anext(embedding))[1])
            for _ in range(2):
                with anyio.move_on_after(0.02) as scope:
                    await anext(embedding)
                assert scope.cancelled_caught
                found.append((await anext(embedding))[1])
            found += [rows async for _, rows in embedding]
        assert np.array_equal(np.concatenate(found), expected)


async def test_a_saved_request_has_its_rows_and_goes_on_without_memory(dense: forerun.Model, tmp_path: Path) -> None:
    parts = prompt_with_rows(64)
    expected = (await answer(dense, parts, temperature=0.8, seed=3)).token_ids
    path = tmp_path / "request"
    async with forerun.open_engine(dense, spec_type="none") as engine:
        stream = engine.generate(parts, max_tokens=30, ignore_eos=True, temperature=0.8, seed=3)
        async with stream:
            await anext(stream)
            await stream.save(path)
    async with forerun.open_engine(dense, spec_type="draft-mtp") as engine, engine.restore(path) as stream:
        await anext(stream)
        engine.tree.supervisor.kill("target decoder", RuntimeError("killed by a test"))
        async for _ in stream:
            pass
        assert stream.result.token_ids == expected
    damaged = bytearray(path.read_bytes())
    damaged[damaged.index(parts[1].data)] ^= 1  # type: ignore[union-attr]
    path.write_bytes(damaged)
    async with forerun.open_engine(dense) as engine:
        with pytest.raises(forerun.SavedSequenceError, match="checksum"):
            async with engine.restore(path) as stream:
                async for _ in stream:
                    pass


NAN = np.full((1, 64), np.nan, np.float32)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([[1], forerun.EmbeddingRows(b"", 64)], r"prompt\[1\].data"),
        ([[1], forerun.EmbeddingRows(b"1234567", 1)], r"prompt\[1\].data"),
        ([forerun.EmbeddingRows(b"1234", 0)], r"prompt\[0\].width"),
        ([forerun.EmbeddingRows("1234", 1)], r"prompt\[0\].data"),  # type: ignore[arg-type]
        ([forerun.EmbeddingRows.of(random_rows(2), [(0, 0, 0)])], "one .t, h, w. for each row"),
        ([forerun.EmbeddingRows.of(random_rows(2), [(0, 0, 0), (0, 2, 0)])], r"coordinates\[1\]"),
        ([forerun.EmbeddingRows.of(random_rows(1), [(0, 0, -1)])], r"coordinates\[0\]"),
        ([forerun.EmbeddingRows.of(random_rows(1), [(0, 0)])], r"coordinates\[0\]"),  # type: ignore[list-item]
        ([forerun.EmbeddingRows.of(random_rows(1), 7)], "coordinates"),  # type: ignore[arg-type]
        ([forerun.EmbeddingRows.of(random_rows(1, hidden=32))], "32 dimensions, the model has 64"),
        ([forerun.EmbeddingRows.of(NAN)], "not a number"),
        ([[1], "text"], r"prompt\[1\]"),
        ([[1], ""], r"prompt\[1\]"),
        ([[1], b"ab"], r"prompt\[1\]"),
        ([[1], 2], "parts only"),
        ([[]], "1 to 1024"),
        ([[1], [-5]], "token id -5"),
        ([[0] * 500, forerun.EmbeddingRows.of(random_rows(600))], "1 to 1024"),
    ],
)
async def test_what_makes_no_sense_is_refused(dense: forerun.Model, wrong: Any, message: str) -> None:
    async with forerun.open_engine(dense) as engine:
        with pytest.raises(forerun.InvalidRequest, match=message), anyio.fail_after(5):
            await engine.complete(wrong, max_tokens=2)


def test_only_float32_of_two_dimensions_are_rows() -> None:
    assert len(forerun.EmbeddingRows.of(random_rows(6)[::2])) == 3
    for wrong in (np.zeros(4, np.float32), np.zeros((2, 2), np.float64), np.zeros((2, 2, 2), np.float32)):
        with pytest.raises(TypeError, match="two dimensions of float32"):
            forerun.EmbeddingRows.of(wrong)
