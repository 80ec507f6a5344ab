"""The arithmetic against what transformers computed (tests/make_fixtures.py): every logit, every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forerun.core.embeddings import lay_out
from forerun.core.protocol import CHUNK
from forerun.kernels.backends import AnyBackend, make_head, make_memory, make_trunk
from forerun.kernels.model.drafts import MtpRows
from forerun.kernels.model.inputs import GivenRows
from forerun.kernels.model.memory import SequenceMemory, alone
from forerun.kernels.model.trunk import Rows, TrunkBase
from forerun.kernels.model.weights import ModelWeights

from tests.checkpoints import DRAFT_FROM, LAYOUTS, LENGTHS, NUM_DRAFTS, STEPS, prompt, prompt_with_rows
from tests.conftest import ALL_BACKENDS

DATA = Path(__file__).parents[1] / "data"

pytestmark = pytest.mark.parametrize("backend", ALL_BACKENDS, indirect=True)


def assert_close(ours: Any, recorded: Any) -> None:
    assert ours.shape == recorded.shape
    worst = np.abs(ours - recorded).max() / np.abs(recorded).max()
    assert worst < 2e-4, f"off by {worst:.2g} of the largest logit"
    assert (ours.argmax(-1) == recorded.argmax(-1)).all()


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def recorded(layout: str) -> Any:
    with np.load(DATA / f"{layout}.npz") as archive:
        return dict(archive)


def prefill_all(trunk: TrunkBase, memory: SequenceMemory, ids: list[int]) -> Any:
    """Prefills in chunks and returns the logits of every row, [len(ids), V]."""
    logits: list[Any] = []
    for start in range(0, len(ids), CHUNK):
        chunk = tuple(ids[start : start + CHUNK])
        trunk.prefill(Rows(memory, start, chunk), is_last=True)
        logits.append(trunk.logits(memory.hidden.read(start, len(chunk))))
    return np.concatenate(logits)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("rows_a_verify", [1, 4])
def test_trunk(weights: ModelWeights, backend: AnyBackend, recorded: Any, length: int, rows_a_verify: int) -> None:
    trunk = make_trunk(weights, backend)
    memory = alone(make_memory(weights.config, backend), length + STEPS, 8)
    logits = [prefill_all(trunk, memory, prompt(length))]
    tokens = recorded[f"tokens_{length}"].tolist()
    for i in range(0, STEPS, rows_a_verify):
        logits.append(trunk.verify([Rows(memory, length + i, tuple(tokens[i : i + rows_a_verify]))])[0])
    assert_close(np.concatenate(logits), recorded[f"logits_{length}"])


@pytest.mark.parametrize("length", LENGTHS)
def test_the_step_form_alone_computes_a_prompt(weights: ModelWeights, backend: AnyBackend, recorded: Any, length: int) -> None:
    trunk = make_trunk(weights, backend)
    memory = alone(make_memory(weights.config, backend), length, 8)
    logits = [trunk.verify([Rows(memory, i, (token,))])[0] for i, token in enumerate(prompt(length))]
    assert_close(np.concatenate(logits), recorded[f"logits_{length}"][:length])


def test_mtp_warm_up_over_a_prompt(weights: ModelWeights, backend: AnyBackend, recorded: Any) -> None:
    trunk, head = make_trunk(weights, backend), make_head(weights, backend)
    ids = prompt(65) + recorded["tokens_65"].tolist()
    memory = alone(make_memory(weights.config, backend), len(ids), 20)
    logits: list[Any] = []
    for start in range(0, len(ids), CHUNK):
        tokens = tuple(ids[start : start + CHUNK])
        trunk.prefill(Rows(memory, start, tokens), is_last=False)
        before = np.zeros((1, weights.config.hidden), np.float32) if start == 0 else memory.hidden.read(start - 1, 1)
        hidden = np.concatenate([before, memory.hidden.read(start, len(tokens))[:-1]])
        logits.append(head.logits(head.forward([MtpRows(memory, start, tokens, hidden)])))
    assert_close(np.concatenate(logits), recorded["mtp_warm"])


@pytest.mark.parametrize("chain", range(len(DRAFT_FROM)))
def test_mtp_chained_drafts(weights: ModelWeights, backend: AnyBackend, recorded: Any, chain: int) -> None:
    trunk, head = make_trunk(weights, backend), make_head(weights, backend)
    ids = (prompt(65) + recorded["tokens_65"].tolist())[: DRAFT_FROM[chain] + 2]
    memory = alone(make_memory(weights.config, backend), len(ids), 70)
    trunk.verify([Rows(memory, 0, tuple(ids))])
    zero = np.zeros((1, weights.config.hidden), np.float32)
    hidden = np.concatenate([zero, memory.hidden.read(0, len(ids) - 1)])
    outputs = head.forward([MtpRows(memory, 0, tuple(ids), hidden)])[-1:]
    logits = [head.logits(outputs)]
    for i in range(NUM_DRAFTS - 1):
        token = int(logits[-1].argmax())
        outputs = head.forward([MtpRows(memory, len(ids) + i, (token,), outputs)])
        logits.append(head.logits(outputs))
    assert_close(np.concatenate(logits), recorded["mtp_chains"][chain])


def test_a_large_vocabulary_is_drafted_from_its_beginning(
    weights: ModelWeights, backend: AnyBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_head(weights, backend)
    monkeypatch.setattr("forerun.kernels.model.mtp.DRAFT_VOCABULARY", 100)
    short = make_head(weights, backend)
    outputs = np.random.default_rng(0).random((3, weights.config.hidden), np.float32)
    np.testing.assert_allclose(short.logits(outputs), whole.logits(outputs)[:, :100], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows_a_verify", [1, 4])
def test_rows_in_place_of_tokens(weights: ModelWeights, backend: AnyBackend, layout: str, recorded: Any, rows_a_verify: int) -> None:
    encoded, tokens = lay_out(prompt_with_rows(weights.config.hidden, is_text=layout == "next")), recorded["tokens_rows"].tolist()
    trunk, length = make_trunk(weights, backend), len(encoded.ids)
    memory = alone(make_memory(weights.config, backend), length + STEPS, 8)
    memory.give(GivenRows(encoded.embeddings))
    logits = [prefill_all(trunk, memory, list(encoded.ids))]
    for i in range(0, STEPS, rows_a_verify):
        logits.append(trunk.verify([Rows(memory, length + i, tuple(tokens[i : i + rows_a_verify]))])[0])
    assert_close(np.concatenate(logits), recorded["logits_rows"])
