"""Whole rounds on the device: catching up, drafts, verify, verdict and commit in one recorded graph, which owns positions and accepted
counts. The host reads a few integers a round, and may do so after it has launched the next.

A round of `depth` drafts for each of some sequences, greedy:

    catch up   the MTP head over the rows of the last verify, each with the token that the target chose after it; the output of the last
               accepted row is the first draft's (rows after it are void, and are written again)
    draft      one row of the head for each further draft
    verify     the trunk over the last token and the drafts; the log moves to the position on the way
    accept     drafts while they are what the target chose; all positions move on

A state is read and written once a round: the rows accepted in one are replayed at the start of the next, with the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ...core.errors import InvalidRequest
from ..model.mtp import HeadBase
from ..model.pages import PAGE
from ..model.weights import ModelWeights
from .device import SPAN, RoundStruct, Step
from .graph import build_drafts, build_trunk
from .matrices import CudaBackend
from .memory import CudaSequence, spans_array
from .program import PART, Program, look_ahead


@dataclass(frozen=True, slots=True)
class Start:
    """A sequence whose trunk and MTP head have computed all of `tokens` but the last."""

    memory: CudaSequence
    tokens: Sequence[int]


class DeviceRounds:
    """`rates`: synthetic acceptance, how often the i-th draft is accepted once those before it are."""

    def __init__(
        self, weights: ModelWeights, backend: CudaBackend, head: HeadBase | None, starts: Sequence[Start], depth: int,
        rates: Sequence[float] | None = None, seed: int = 0,
    ) -> None:  # fmt: skip
        if depth and (head is None or any(len(start.tokens) < depth + 2 for start in starts)):
            raise InvalidRequest([("depth", f"{depth} drafts need an MTP head and {depth + 2} tokens")])
        self.weights, self.depth, self._starts, config = weights, depth, starts, weights.config
        device, num, rows = backend.device, len(starts), depth + 1
        ends = max(len(start.memory.table) for start in starts) * PAGE
        parts = -(-ends // PART)

        def program(rows: int) -> Program:
            p = Program(config, backend.packing, rows, num, parts, span_rows=rows // num)
            p.buffer("spans", (num * SPAN.itemsize,), np.uint8)
            p.buffer("span of", (rows,), np.int32)
            device.put(p.buffers["span of"], np.repeat(np.arange(num, dtype=np.int32), rows // num))
            return p

        self._verify = verify = program(num * rows)
        verify.buffer("tokens", (num * rows,), np.int32)
        self._report = verify.buffer("report", (num, rows + 1), np.int32)
        drafted = verify.buffer("drafted", (num,), np.int32)
        picked = verify.buffer("picked", (num,), np.int32)
        verify.buffer("choices", (num * rows,), np.int32)
        self._struct = r = RoundStruct(
            verify=verify.address("spans"), tokens=verify.address("tokens"), choices=verify.address("choices"),
            drafted=device.address(drafted), picked=device.address(picked), report=device.address(self._report), depth=depth,
            sequences=num, seed=seed,
        )  # fmt: skip
        if rates is not None:
            r.rates = device.address(verify.buffer("rates", (depth,)))
            device.put(verify.buffers["rates"], np.array(rates[:depth], np.float32))
        positions = [len(start.tokens) - 1 for start in starts]
        spans = [start.memory.span(at, i * rows, rows, base=start.memory.states.base_position) for i, (start, at) in self._with(positions)]
        device.put(verify.buffers["spans"], spans_array(spans))
        for i, start in enumerate(starts):
            device.put(verify.buffers["tokens"][i * rows : i * rows + 1], np.array(start.tokens[-1:], np.int32))
        steps = list[Step]()
        if depth:
            assert head is not None
            self._catch_up, self._draft = program(num * rows), program(num)
            steps += self._drafting(head, positions, program)
        build_trunk(verify, weights)
        verify.step("accept", (-(-num // 32),), 32, r)
        steps += verify.steps
        look_ahead(steps)
        self._run = backend.kernels(config).record(steps)
        self._device = device

    def _with(self, positions: Sequence[int]) -> enumerate[tuple[Start, int]]:
        return enumerate(zip(self._starts, positions, strict=True))

    def _drafting(self, head: HeadBase, positions: Sequence[int], program: Callable[[int], Program]) -> list[Step]:
        verify, catch_up, draft, r = self._verify, self._catch_up, self._draft, self._struct
        device, num, rows = verify.device, len(self._starts), self.depth + 1
        spans = [start.memory.span(at - self.depth, i * rows, rows) for i, (start, at) in self._with(positions)]
        device.put(catch_up.buffers["spans"], spans_array(spans))
        spans = [start.memory.span(at, i, 1) for i, (start, at) in self._with(positions)]
        device.put(draft.buffers["spans"], spans_array(spans))
        r.catch_up, r.draft = catch_up.address("spans"), draft.address("spans")
        choices = [token for start in self._starts for token in start.tokens[-rows:]]
        device.put(verify.buffers["choices"], np.array(choices, np.int32))
        device.put(verify.buffers["picked"], np.arange(num, dtype=np.int32) * rows + self.depth)
        return build_drafts(catch_up, draft, head, self.weights, r, tokens=verify.address("choices"), picked=verify.address("picked"))

    def launch(self) -> Callable[[], list[list[int]]]:
        """Begins a round; what is returned waits for it, and says the tokens of each sequence. Whoever calls sees to it that there are
        pages."""
        self._run()
        wait = self._device.fetch(self._report)

        def read() -> list[list[int]]:
            return [[int(token) for token in row[1 : 2 + row[0]]] for row in wait()]

        return read

    def replay(self) -> None:
        """A round of which nobody asks anything."""
        self._run()
