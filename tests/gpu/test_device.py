"""What only a device shows, or shows in less time than a CPU in its place: every test here needs `pytest --cuda`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forerun.kernels.backends import make_head, make_memory, make_trunk
from forerun.kernels.cuda.graph import CudaHead, CudaTrunk
from forerun.kernels.cuda.memory import CudaSequence
from forerun.kernels.cuda.rounds import DeviceRounds, Start
from forerun.kernels.model.drafts import MtpRows
from forerun.kernels.model.memory import alone
from forerun.kernels.model.trunk import Rows
from forerun.kernels.model.weights import ModelWeights
from forerun.kernels.reference import ReferenceBackend

from tests.checkpoints import LAYOUTS, prompt
from tests.conftest import cuda_backend, load
from tests.kernels.test_cuda import check_that_chunks_leave_no_trace


def error(found: Any, wanted: Any) -> float:
    found, wanted = np.asarray(found), np.asarray(wanted)
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def run(weights: ModelWeights, backend: Any, tokens: list[int]) -> list[Any]:
    trunk, memory = make_trunk(weights, backend), alone(make_memory(weights.config, backend), 400, 9)
    for start in range(0, 320, 64):
        trunk.prefill(Rows(memory, start, tuple(tokens[start : start + 64])), is_last=False)
    found = [np.asarray(trunk.verify([Rows(memory, 320, tuple(tokens[320:325]))])[0])]
    found.append(np.asarray(trunk.verify([Rows(memory, 322, tuple(tokens[322:330]))])[0]))
    if weights.mtp is not None:
        head, rows = make_head(weights, backend), np.random.default_rng(1).normal(size=(5, weights.config.hidden)).astype(np.float32)
        found += [np.asarray(each) for each in head.guess([MtpRows(memory, 0, tuple(tokens[:5]), rows)])]
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_are_those_of_the_reference_but_for_rounding(checkpoints: dict[str, Path], layout: str) -> None:
    reference, device = ReferenceBackend(), cuda_backend(True)
    tokens = prompt(400)
    wanted = run(load(checkpoints[layout], reference), reference, tokens)
    found = run(load(checkpoints[layout], device), device, tokens)
    for one, other in zip(found, wanted, strict=True):
        assert error(one, other) < 0.1
    np.testing.assert_array_equal(found[0][2:5], found[1][:3])  # rolled back and computed again


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "next"])
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_rounds_on_the_device_say_what_single_rows_say(checkpoints: dict[str, Path], layout: str, depth: int) -> None:
    backend = cuda_backend(True)
    weights = load(checkpoints[layout], backend)
    trunk, head = CudaTrunk(weights, backend), CudaHead(weights, backend)

    def start(tokens: list[int]) -> Start:
        memory = alone(make_memory(weights.config, backend), 300, 9)
        assert isinstance(memory, CudaSequence)
        for at in range(0, len(tokens) - 1, 64):
            chunk = tuple(tokens[at : min(at + 64, len(tokens) - 1)])
            trunk.prefill(Rows(memory, at, chunk), is_last=False)
            head.last([MtpRows(memory, at, chunk, None)])
        return Start(memory, tokens)

    prompts, num_tokens = [prompt(70 + i) for i in range(3)], 30
    plain = list[list[int]]()
    for tokens in prompts:
        sequence, text = start(tokens), list(tokens)
        for _ in range(num_tokens):
            logits = trunk.verify([Rows(sequence.memory, len(text) - 1, (text[-1],))])[0]
            text.append(int(np.asarray(logits)[0].argmax()))
        plain.append(text[len(tokens) :])
    rounds = DeviceRounds(weights, backend, head, [start(tokens) for tokens in prompts], depth)
    found, waiting = [list[int]() for _ in prompts], rounds.launch()
    while min(map(len, found)) < num_tokens:
        following = rounds.launch()  # before the last one's tokens are here
        for text, more in zip(found, waiting(), strict=True):
            text += more
        waiting = following
    assert [text[:num_tokens] for text in found] == plain


@pytest.mark.parametrize("layout", LAYOUTS)
def test_where_chunks_end_leaves_no_trace(checkpoints: dict[str, Path], layout: str) -> None:
    backend = cuda_backend(True)
    weights = load(checkpoints[layout], backend)
    check_that_chunks_leave_no_trace(backend, weights, [300], [64, 64, 64, 64, 44], [1, 2, 40, 100, 7, 150])
