"""Models on the CUDA kernels, on a CPU in a device's place (`--cuda`: on a device)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forerun.core.embeddings import lay_out
from forerun.core.vocabulary import Choosing, History, SamplingParams
from forerun.kernels.backends import make_head, make_memory, make_trunk
from forerun.kernels.cuda.device import SPAN, CudaMark
from forerun.kernels.cuda.graph import CudaHead, CudaTrunk, build_trunk
from forerun.kernels.cuda.matrices import CudaBackend
from forerun.kernels.cuda.memory import CudaSequence
from forerun.kernels.cuda.program import Program, look_ahead
from forerun.kernels.cuda.recorded import DeviceRows
from forerun.kernels.cuda.rounds import DeviceRounds, Start
from forerun.kernels.cuda.synthetic import FORMATS, synthetic_weights
from forerun.kernels.model.config import load_config
from forerun.kernels.model.drafts import Drafted, MtpRows, Wanted, draft_by_guesses
from forerun.kernels.model.inputs import GivenRows
from forerun.kernels.model.memory import alone
from forerun.kernels.model.recurrent import STORES, StoreName
from forerun.kernels.model.trunk import Rows
from forerun.kernels.reference import ReferenceBackend

from tests.checkpoints import LAYOUTS, prompt, prompt_with_rows
from tests.conftest import load

#: For tests of whole models whose kernels others run in both orders.
in_one_order = pytest.mark.parametrize("cuda", ["forwards"], indirect=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_are_those_of_the_reference_but_for_rounding(cuda: CudaBackend, checkpoints: dict[str, Path], layout: str) -> None:
    found, tokens = list[list[Any]](), prompt(80)
    for backend in (cuda, ReferenceBackend()):
        weights = load(checkpoints[layout], backend)
        trunk, memory = make_trunk(weights, backend), alone(make_memory(weights.config, backend), 100, 9)
        trunk.prefill(Rows(memory, 0, tuple(tokens[:64])), is_last=False)
        results = [trunk.prefill(Rows(memory, 64, tuple(tokens[64:70])), is_last=True)]
        results += trunk.verify([Rows(memory, 70, tuple(tokens[70:74]))])
        if weights.mtp is not None:
            head = make_head(weights, backend)
            hidden = np.random.default_rng(1).normal(size=(5, weights.config.hidden)).astype(np.float32)
            results += head.guess([MtpRows(memory, 0, tuple(tokens[:5]), hidden)])
        found.append([np.asarray(each) for each in results])
    for one, other in zip(*found, strict=True):
        assert np.linalg.norm(one - other) < 0.15 * np.linalg.norm(other)


def test_rows_in_place_of_tokens_and_their_places(cuda: CudaBackend, checkpoints: dict[str, Path]) -> None:
    """With drafts of the MTP head, and from the middle of an image on."""
    found, encoded = list[list[Any]](), lay_out(prompt_with_rows(64))
    for backend in (cuda, ReferenceBackend()):
        weights = load(checkpoints["dense"], backend)
        trunk, head = make_trunk(weights, backend), make_head(weights, backend)
        memory = alone(make_memory(weights.config, backend), 120, 9)
        memory.give(GivenRows(encoded.embeddings))
        results = list[Any]()
        for start, end in ((0, 20), (20, 84), (84, 90)):
            said = [trunk.prefill(Rows(memory, start, encoded.ids[start:end]), is_last=True)]
            said += head.guess([MtpRows(memory, start, encoded.ids[start:end], memory.hidden.before(start, end - start))])
            results += [np.asarray(each) for each in said]
        results += [np.asarray(each) for each in trunk.verify([Rows(memory, 90, (1, 2, 3))])]
        found.append(results)
    for one, other in zip(*found, strict=True):
        assert np.linalg.norm(one - other) < 0.15 * np.linalg.norm(other)


@in_one_order
@pytest.mark.parametrize("store", STORES)
def test_any_held_position_can_be_gone_on_from(cuda: CudaBackend, checkpoints: dict[str, Path], store: StoreName) -> None:
    """tests/gpu/test_rollback.py in short."""
    weights, prefix, text, max_rows = load(checkpoints["dense_r3"], cuda), prompt(20), prompt(14), 5
    trunk = CudaTrunk(weights, cuda)

    def begin() -> Any:
        memory = alone(make_memory(weights.config, cuda), 60, max_rows, store)
        trunk.prefill(Rows(memory, 0, tuple(prefix)), is_last=False)
        return memory

    memory = begin()
    plain = [np.asarray(trunk.verify([Rows(memory, len(prefix) + i, (token,))])[0])[0] for i, token in enumerate(text)]
    rng, memory, at = np.random.default_rng(3), begin(), 0
    for turn in range(17):
        right = int(rng.integers(0, max_rows + 1))
        rows = (text[at : at + right] + [3] * max_rows)[: max(1, int(rng.integers(right, max_rows + 1)))]
        logits = np.asarray(trunk.verify([Rows(memory, len(prefix) + at, tuple(rows))])[0])
        right = min(right, len(rows), len(text) - at)
        np.testing.assert_array_equal(logits[:right], np.array(plain)[at : at + right].reshape(logits[:right].shape))
        at += int(rng.integers(0, right + 1))
        if turn % 8 == 7:
            trunk.freeze(memory, len(prefix) + at, is_whole=True)
            frozen, memory = memory.frozen, begin()
            memory.restore_snapshot(frozen)
        if at > len(text) - max_rows:
            memory, at = begin(), 0


@in_one_order
@pytest.mark.parametrize(("depth", "rates"), [(0, None), (3, None), (3, (0.9, 0.8, 0.7))])
def test_rounds_on_the_device_say_what_single_rows_say(cuda: CudaBackend, checkpoints: dict[str, Path], depth: int, rates: Any) -> None:
    weights, num_tokens = load(checkpoints["dense_r3"], cuda), 8
    trunk, head = CudaTrunk(weights, cuda), CudaHead(weights, cuda)

    def start(tokens: list[int]) -> Start:
        memory = alone(make_memory(weights.config, cuda), 120, 9)
        assert isinstance(memory, CudaSequence)
        trunk.prefill(Rows(memory, 0, tuple(tokens[:-1])), is_last=False)
        head.last([MtpRows(memory, 0, tuple(tokens[:-1]), None)])
        return Start(memory, tokens)

    prompts = [prompt(20 + i) for i in range(2)]
    rounds = DeviceRounds(weights, cuda, head, [start(tokens) for tokens in prompts], depth, rates if depth else None)
    found = [list[int]() for _ in prompts]
    waiting, num_rounds = rounds.launch(), 1
    while min(map(len, found)) < num_tokens:
        following = rounds.launch()  # before the last one's tokens are here
        for text, more in zip(found, waiting(), strict=True):
            text += more
        waiting, num_rounds = following, num_rounds + 1
    if rates is not None and depth:  # what is accepted is not the target's, but it is what was computed
        assert num_rounds < num_tokens
    for tokens, text in zip(prompts, found, strict=True):
        sequence, all_tokens = start(tokens), list(tokens)
        for token in text[:num_tokens]:
            logits = trunk.verify([Rows(sequence.memory, len(all_tokens) - 1, (all_tokens[-1],))])[0]
            assert isinstance(logits, DeviceRows)
            chosen = logits.choose_tokens(None, []).read()
            assert chosen == [int(np.asarray(logits)[0].argmax())]
            assert rates is not None or token == chosen[0]
            all_tokens.append(token)


def test_parts_of_an_attention_one_after_another_have_the_same_bits(
    cuda: CudaBackend, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where there are many rows, or no memory to leave all parts in."""
    weights, tokens, found = load(checkpoints["dense"], cuda), tuple(prompt(300)), list[Any]()
    for most in (10**6, 0):
        monkeypatch.setattr("forerun.kernels.cuda.program.LOOP_PARTS", most)
        trunk, memory = CudaTrunk(weights, cuda), alone(make_memory(weights.config, cuda), 400, 3)
        trunk.prefill(Rows(memory, 0, tokens), is_last=False)
        found.append(np.asarray(trunk.verify([Rows(memory, 300, (1, 2, 3))])[1]))
    assert np.array_equal(found[0], found[1])


@in_one_order
@pytest.mark.parametrize("layout", ["dense", "moe"])
@pytest.mark.parametrize("kind", FORMATS)
def test_weights_made_on_the_device_make_a_model(cuda: CudaBackend, checkpoints: dict[str, Path], layout: str, kind: str) -> None:
    """They keep rows in bounds, and their matrices are the ones that a model of this config has."""
    backend = CudaBackend(cuda.device)
    weights = synthetic_weights(load_config(checkpoints[layout]), kind, backend)
    trunk, memory = make_trunk(weights, backend), alone(make_memory(weights.config, backend), 40, 3)
    hidden, logits = trunk.verify([Rows(memory, 0, (1, 2, 3))])
    assert np.isfinite(np.asarray(logits)).all()
    assert 0.5 < np.sqrt(np.square(np.asarray(hidden)).mean()) < 2
    assert len(np.unique(np.asarray(logits).argmax(1))) > 1
    assert np.isfinite(np.asarray(make_head(weights, backend).last([MtpRows(memory, 1, (2, 3), None)]))).all()


def test_what_a_failed_device_has_begun_says_so() -> None:
    class Failed:
        ptr = 7

        def synchronize(self) -> None:
            raise OSError("an illegal memory access")

    assert [CudaMark(Failed(), lambda ptr, status=status: status).is_done() for status in (0, 600)] == [True, False]
    with pytest.raises(OSError, match="illegal"):
        CudaMark(Failed(), lambda ptr: 700).is_done()


def test_a_product_knows_what_follows_it(cuda: CudaBackend, checkpoints: dict[str, Path]) -> None:
    """Where the next product's weights are, and, before a delta net alone, that its blocks are to be spread."""
    weights = load(checkpoints["dense"], cuda)
    p = Program(weights.config, cuda.packing, 4, 1, 1)
    for name, shape in (("spans", (SPAN.itemsize,)), ("span of", (4,)), ("tokens", (4,))):
        p.buffer(name, shape, np.uint8 if name == "spans" else np.int32)
    build_trunk(p, weights)
    look_ahead(p.steps)
    kernels = [step.kernel for step in p.steps]
    products = [i for i, kernel in enumerate(kernels) if kernel.startswith(("product", "gated_bf16"))]
    aheads = [p.steps[i].arguments[-1] for i in products]
    assert [ahead.weights for ahead in aheads] == [*(p.steps[i].arguments[0].tiles for i in products[1:]), None]
    assert [bool(ahead.is_spread) for ahead in aheads] == [kernels[i + 1] == "delta" for i in products]
    assert kernels.count("delta") == weights.config.num_delta == sum(ahead.is_spread for ahead in aheads)
    assert all(ahead.bytes > 0 for ahead in aheads[:-1])


@in_one_order
@pytest.mark.parametrize("temperatures", [(0.0, 0.0, 0.0), (0.0, 0.8, 1.2)])
def test_drafts_made_on_the_device_are_those_made_guess_by_guess(
    cuda: CudaBackend, checkpoints: dict[str, Path], temperatures: tuple[float, ...]
) -> None:
    """Of three sequences that catch up with 1, 3 and 4 rows: what is filled up, one sequence more, leaves no trace."""
    weights = load(checkpoints["dense"], cuda)
    trunk, head = CudaTrunk(weights, cuda), CudaHead(weights, cuda)
    batch, wanted, tokens = list[MtpRows](), list[Wanted](), prompt(60)
    for count, temperature in zip((1, 3, 4), temperatures, strict=True):
        memory = alone(make_memory(weights.config, cuda), 80, 9)
        trunk.prefill(Rows(memory, 0, tuple(tokens[: 20 + count])), is_last=False)
        head.last([MtpRows(memory, 0, tuple(tokens[:20]), None)])
        batch.append(MtpRows(memory, 20, tuple(tokens[20 : 20 + count]), None))
        wanted.append(Wanted(Choosing(SamplingParams(temperature=temperature, seed=count, top_k=20 * count)), count))
    plain = draft_by_guesses(head, batch, wanted)
    found = head.draft(batch, wanted)
    assert [each.tokens for each in found] == [each.tokens for each in plain]
    assert [len(each.tokens) for each in found] == [1, 3, 4]
    for one, other in zip(found, plain, strict=True):
        np.testing.assert_allclose(one.shares, other.shares, rtol=1e-4)
    cut = head.draft(batch, [replace(each, least=1.0) for each in wanted])
    assert [each.tokens for each in cut] == [()] * 3
    assert head.draft(batch, [replace(each, floor=1.0) for each in wanted]) == [Drafted(each.tokens[:1], each.shares[:1]) for each in found]
    batch = [MtpRows(rows.memory, 20, rows.tokens[:1], None) for rows in batch]  # fewer rows than sequences, once filled up
    assert head.draft(batch, wanted) == [each for i in range(3) for each in head.draft(batch[i : i + 1], wanted[i : i + 1])]
    penalised = Wanted(Choosing(SamplingParams(repetition_penalty=1.5), History(tuple(tokens[:21]), 21)), 2)
    both = head.draft(batch[:2], [penalised, wanted[1]])
    assert [len(each.tokens) for each in both] == [2, 3]
    assert both[1] == head.draft(batch[1:2], wanted[1:2])[0]


def test_drafts_end_where_pages_do_and_go_on_into_the_next_part_of_an_attention(cuda: CudaBackend, checkpoints: dict[str, Path]) -> None:
    """Of two sequences, one has no page for more than two rows; the drafts of the other reach position 256."""
    weights, tokens = load(checkpoints["dense"], cuda), prompt(260)
    trunk, head = CudaTrunk(weights, cuda), CudaHead(weights, cuda)
    wanted, batch = [Wanted(Choosing(SamplingParams()), limit) for limit in (2, 5)], list[MtpRows]()
    for length, capacity in ((62, 64), (254, 300)):
        memory = alone(make_memory(weights.config, cuda), capacity, 1)
        trunk.prefill(Rows(memory, 0, tuple(tokens[:length])), is_last=False)
        head.last([MtpRows(memory, 0, tuple(tokens[:length]), None)])
        batch.append(MtpRows(memory, length, (tokens[length],), None))
    found, plain = head.draft(batch, wanted), draft_by_guesses(head, batch, wanted)
    assert [each.tokens for each in found] == [each.tokens for each in plain]
    assert [len(each.tokens) for each in found] == [2, 5]


def test_many_rows_of_several_sequences_for_the_head(cuda: CudaBackend, checkpoints: dict[str, Path]) -> None:
    weights, tokens = load(checkpoints["dense"], cuda), prompt(40)
    head, trunk = CudaHead(weights, cuda), CudaTrunk(weights, cuda)
    batch = [MtpRows(alone(make_memory(weights.config, cuda), 80, 9), 0, tuple(tokens[i : i + 12]), None) for i in range(3)]
    for rows in batch:
        trunk.prefill(Rows(rows.memory, 0, rows.tokens), is_last=False)
    found = [np.asarray(head.last(batch)), *(np.asarray(head.last([rows])) for rows in batch)]
    for one, other in zip(found[0], found[1:], strict=True):
        np.testing.assert_array_equal(one, other[0])


def check_that_chunks_leave_no_trace(backend: CudaBackend, weights: Any, *partitions: list[int]) -> None:
    tokens, found = prompt(310), list[Any]()
    for sizes in partitions:
        trunk, memory = make_trunk(weights, backend), alone(make_memory(weights.config, backend), 320, 9)
        at = 0
        for size in sizes:
            trunk.prefill(Rows(memory, at, tuple(tokens[at : at + size])), is_last=False)
            at += size
        found.append([np.asarray(each) for each in trunk.verify([Rows(memory, at, tuple(tokens[at : at + 3]))])])
    for other in found[1:]:
        for one, its in zip(found[0], other, strict=True):
            np.testing.assert_array_equal(one, its)


@pytest.mark.parametrize("cuda", ["forwards"], indirect=True)
def test_less_shared_memory_changes_no_bits(cuda: CudaBackend, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a chunk, whose attention has one stage of its pages in a block instead of two."""
    weights, tokens, found = load(checkpoints["dense"], cuda), tuple(prompt(150)), list[Any]()
    for max_shared in (cuda.device.max_shared, 24 * 1024):
        monkeypatch.setattr(cuda.device, "max_shared", max_shared)
        trunk, memory = make_trunk(weights, cuda), alone(make_memory(weights.config, cuda), 160, 4)
        found.append(np.asarray(trunk.prefill(Rows(memory, 0, tokens), is_last=True)))
    np.testing.assert_array_equal(found[0], found[1])


@in_one_order
def test_where_chunks_end_leaves_no_trace(cuda: CudaBackend, checkpoints: dict[str, Path]) -> None:
    """Nor that 300 positions are two parts of an attention. All layouts: tests/gpu/test_device.py."""
    check_that_chunks_leave_no_trace(cuda, load(checkpoints["dense"], cuda), [270], [1, 2, 37, 80, 7, 143])
