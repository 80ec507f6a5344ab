"""Trunk and MTP head on the CUDA kernels: the formulas of model/trunk.py and model/mtp.py as programs, recorded once for each shape of a
batch and run as a whole. A row's bits depend neither on the rows beside it nor on where chunks end; those of a prompt are computed with
other products than those of a verify."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from ctypes import c_float
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np

from ...core.begun import Begun
from ...core.errors import InternalBug
from ..backend import F32
from ..model.drafts import Drafted, Following, MtpRows, NextRows, Wanted, draft_by_guesses
from ..model.inputs import HasRows, numbered
from ..model.memory import SequenceMemory
from ..model.mtp import CHUNK_ROWS, HeadBase
from ..model.recurrent import RecurrentLog
from ..model.trunk import Rows, TrunkBase
from ..model.weights import DeltaWeights, ModelWeights
from ..sampling import Choices
from .device import DRAW, NOWHERE, SPAN, Address, NextStruct, RoundStruct, SpanStruct, Step
from .matrices import CudaBackend, CudaMatrix
from .memory import CudaSequence
from .program import PART, Column, Filters, Parts, Prepared, Program, threads_for
from .recorded import DeviceRows, DeviceTokens, Recorded, as_rows, filters_of, put_draw, put_spans, put_tokens, put_verified

#: Programs that a trunk or a head keeps recorded, of all kinds and shapes; the longest unused is forgotten.
MAX_RECORDED = 32
#: Parts of an attention that a program has at least, so that a text is long before it needs another.
MIN_PARTS = 8
#: Rows of one sequence that a program of several has blocks for at least, for the same reason.
MIN_SPAN_ROWS = 4
#: Rows of a verify, at most, behind which the next one is begun before it has been read.
MAX_BEFORE = 512


def rows_for(count: int) -> int:
    """Rows of a program that computes so many: a few shapes for all batches."""
    return 1 << (count - 1).bit_length() if count <= 16 else -(-count // 16) * 16 if count <= 64 else -(-count // 32) * 32


def spans_for(count: int) -> int:
    return 1 << (count - 1).bit_length()


def most_of(batch: Iterable[HasRows]) -> int:
    """Rows of the sequence that has most of them."""
    return max(len(rows.tokens) for rows in batch)


class _Graphs:
    """What trunk and head share: programs by the shape of a batch."""

    def __init__(self, weights: ModelWeights, backend: CudaBackend) -> None:
        self.weights, self.config, self.backend = weights, weights.config, backend
        self.device, self.packing = backend.device, backend.packing
        self.kernels = backend.kernels(weights.config)
        self._recorded: dict[tuple[Any, ...], Recorded] = {}

    def get(
        self, kind: str, num_rows: int, num_spans: int, end: int, build: Callable[[Recorded], None], *, most: int | None = None,
        is_wide: bool = False, has_tokens: bool = True,
    ) -> Recorded:  # fmt: skip
        """A program for such a batch, with at most `most` rows of one sequence, that sees up to `end` positions; `has_tokens`: the host
        tells it those of its rows."""
        parts = 1 if is_wide else MIN_PARTS  # those that there are not cost little
        while parts * PART < end and not is_wide:
            parts *= 2
        rows, spans = rows_for(num_rows), spans_for(num_spans)
        span_rows = rows if most is None or num_spans == 1 else min(rows, max(MIN_SPAN_ROWS, 1 << (most - 1).bit_length()))
        key = kind, rows, spans, parts, span_rows, is_wide
        found = self._recorded.pop(key, None)
        if found is None:
            p = Program(self.config, self.packing, rows, spans, parts, span_rows=span_rows, is_wide=is_wide)
            found = Recorded(p, self.kernels)
            fields: dict[str, tuple[int, Any]] = {"spans": (spans * SPAN.itemsize, np.uint8), "span of": (rows, np.int32)}
            if has_tokens:
                fields["tokens"] = rows, np.int32
            found.take(**fields)
            build(found)
            while len(self._recorded) >= MAX_RECORDED:
                self._recorded.pop(next(iter(self._recorded))).wait()  # what it reads on the host must outlive its last run
        self._recorded[key] = found
        return found

    @property
    def newest(self) -> Recorded:
        """What was asked for last."""
        return next(reversed(self._recorded.values()))

    def product(self, head: CudaMatrix, rows: F32) -> F32:
        """Logits of post-norm rows [R, hidden]."""
        num_rows, hidden = len(rows), self.config.hidden

        def build(recorded: Recorded) -> None:
            p = recorded.program
            p.buffer("given", (p.rows, hidden))
            ready = p.prepared("ready", hidden, p.rows, {head.format})
            p.step("prepare", (p.rows,), 256, p.address("given"), NOWHERE, hidden, ready.struct, shared=4 * hidden)
            build_logits(p, head, ready, p.rows)
            recorded.give("choices")

        recorded = self.get("logits", num_rows, 1, 1, build)
        self.device.put(recorded.program.buffers["given"][:num_rows], rows.on_device if isinstance(rows, DeviceRows) else rows)
        recorded.run([SpanStruct(num_rows=num_rows)], [0] * num_rows)
        return as_rows(recorded, "logits", num_rows, head.outputs)

    def tokens(self, batch: Sequence[HasRows]) -> list[int]:
        """As `embed` in products.cu takes them."""
        tokens = [token for rows in batch for token in numbered(rows)]
        if any(token >= self.config.vocabulary or (token < 0 and rows.memory.given is None) for rows in batch for token in rows.tokens):
            raise IndexError(f"a token is not one of {self.config.vocabulary}")
        return tokens


def build_trunk(p: Program, weights: ModelWeights) -> None:
    """Steps of the trunk: post-norm hidden rows into the buffer `hidden` and where their sequences keep them, and if they are no chunk of a
    prompt, what build_logits says."""
    c, rows = weights.config, p.rows
    x = p.device.address(p.buffer("x", (rows, c.hidden)))
    p.embed(weights.embedding, p.address("tokens"), x, rows)
    parts: Parts | None = None
    counts = [0, 0]
    for w in weights.layers:
        is_delta = isinstance(w.mixer, DeltaWeights)
        parts = p.layer(x, parts, w, counts[is_delta])
        counts[is_delta] += 1
    ready = p.prepared("hidden", c.hidden, rows, p.formats(weights.head), keeps_floats="hidden")
    p.add_norm(x, parts, weights.norm, ready, rows)
    p.step("keep_hidden", (rows,), 256, p.address("spans"), p.address("span of"), p.address("hidden"), c.hidden)
    if not p.is_wide:
        build_logits(p, weights.head, ready, rows)


def build_logits(p: Program, head: CudaMatrix, ready: Prepared, rows: int) -> None:
    """Steps of a vocabulary's head: the buffers `logits`, and `choices`, the highest of each row."""
    logits = p.product(head, ready, "logits", rows)
    p.buffer("choices", (rows,), np.int32)
    p.choose(logits, head.outputs, rows, p.address("choices"))


def build_head(p: Program, head: HeadBase, weights: ModelWeights, *, embedded_tokens: Any, picked: Any, num_picked: int) -> Prepared:
    """Steps of the MTP head over rows whose hidden rows are in the buffer `before`: outputs of the `picked` rows (None: all) into the
    buffer `out`, and made ready for the LM head."""
    c, rows, w = weights.config, p.rows, head.mtp
    embedded = p.device.address(p.buffer("embedded", (rows, c.hidden)))
    p.embed(weights.embedding, embedded_tokens, embedded, rows)
    both = p.prepared("both", 2 * c.hidden, rows, p.formats(w.fc))
    floats = p.packing.floats
    p.step(
        "pair_norm", (rows,), threads_for(c.hidden), embedded, p.address("before"), floats(w.embedding_norm), floats(w.hidden_norm),
        c_float(c.rms_eps), c.hidden, both.struct, shared=8 * c.hidden,
    )  # fmt: skip
    x = p.product(w.fc, both, "mtp x", rows).address
    parts = p.layer(x, None, w.layer, c.num_attention)
    all_out = p.prepared("all out", c.hidden, rows, set(), keeps_floats="all out")
    p.add_norm(x, parts, w.norm, all_out, rows)
    ready = p.prepared("out", c.hidden, num_picked, {head.head.format}, keeps_floats="out")
    out = p.address("all out")
    p.step("prepare", (num_picked,), threads_for(c.hidden), out, picked, c.hidden, ready.struct, shared=4 * c.hidden)
    return ready


def build_drafts(
    catch_up: Program, draft: Program, head: HeadBase, weights: ModelWeights, r: RoundStruct, *, tokens: Address, picked: Address,
    how: Filters | None = None,
) -> list[Step]:  # fmt: skip
    """Steps of r.depth drafts of each sequence: the head over the rows of `catch_up`, whose hidden rows are where their sequences keep
    them, then over one row of `draft` for each further token. The one before stands in r.drafted."""
    num, hidden, steps = draft.rows, weights.config.hidden, list[Step]()
    catch_up.buffer("before", (catch_up.rows, hidden))
    # What the head said of a row is what its next row goes on from.
    draft.buffers["out"] = catch_up.buffers["out"] = draft.buffer("before", (num, hidden))
    catch_up.read_hidden()
    for step in range(1, r.depth + 1):
        p = catch_up if step == 1 else draft
        ready = build_head(
            p, head, weights, embedded_tokens=tokens if step == 1 else Address(r.drafted), picked=picked if step == 1 else NOWHERE,
            num_picked=num,
        )  # fmt: skip
        logits = p.product(head.head, ready, "draft logits", num)
        p.choose(logits, head.head.outputs, num, Address(r.drafted), how, Address(r.sure or 0))
        p.step("drafted", (-(-num // 32),), 32, r, step)
        steps += p.steps
        p.steps = []
    return steps


class CudaTrunk(TrunkBase):
    def __init__(self, weights: ModelWeights, backend: CudaBackend) -> None:
        self.weights, self.config, self.operations_per_second = weights, weights.config, backend.operations_per_second
        self._graphs, self.marker = _Graphs(weights, backend), backend.device.mark
        # Of two programs for each shape of a verify: the one that ran last, and whether nobody had asked for what it computed.
        self._turn, self._is_begun, self._is_full = 0, False, False

    @property
    def num_prepared(self) -> int:
        return self._graphs.kernels.num_recorded

    @property
    def newest(self) -> Recorded:
        """The program that ran last."""
        return self._graphs.newest

    def seconds(self, num_rows: int) -> float:
        return super().seconds(1 + num_rows // 16)  # weights are read once for all of them

    def logits(self, hidden: F32) -> F32:
        return self._graphs.product(self.weights.head, hidden)

    def _verify(self, batch: Sequence[Rows]) -> tuple[F32, F32]:
        spans, row = list[SpanStruct](), 0
        for rows in batch:
            memory = _sequence(rows.memory)
            spans.append(memory.span(rows.position, row, len(rows.tokens), base=memory.states.base_position))
            row += len(rows.tokens)
        tokens, turn = self._graphs.tokens(batch), self._turn ^ self._is_begun
        recorded = self._verifying(row, len(batch), most_of(batch), _end(batch), turn)
        self._is_begun = False
        for rows in batch:
            rows.memory.recurrent.begin()
        recorded.begin()["first"][:] = -1
        recorded.run(spans, tokens)
        for rows in batch:
            rows.memory.recurrent.moved_to(rows.position)
        return as_rows(recorded, "hidden", row, self.config.hidden), as_rows(recorded, "logits", row, self.weights.head.outputs)

    def verify_next(self, batch: Sequence[NextRows], choices: Choices, drafts: object) -> F32 | None:
        chosen, asks = choices.on_device, [choices.asks[each.index] for each in batch]
        *starts, num_before = accumulate((ask.num_rows for ask in choices.asks), initial=0)
        if chosen is None or self._is_full or num_before > MAX_BEFORE:
            return None
        assert isinstance(chosen, DeviceTokens)
        spans, row, end = list[SpanStruct](), 0, 0
        for each, ask in zip(batch, asks, strict=True):
            memory, count = _sequence(each.memory), 1 + each.num_drafts
            most = len(ask.ahead) + count  # there are pages for so many
            span = memory.span(ask.position, row, most, base=memory.states.base_position)
            span.num_rows = count
            spans.append(span)
            row, end = row + count, max(end, ask.position + most)
        try:
            recorded = self._verifying(row, len(batch), 1 + max(each.num_drafts for each in batch), end, self._turn ^ 1)
        except MemoryError:  # of the device: the next one begins when this one has been read
            self._is_full = True
            return None
        self._is_begun = True
        told, put, buffers, num = recorded.begin(), self._graphs.device.put, recorded.program.buffers, len(batch)
        told["first"][:num] = [starts[each.index] for each in batch]
        told["num_drafts"][:num] = [len(ask.ahead) for ask in asks]
        put_verified(told["verified"], told["num_right"], choices.asks, asks)
        put(buffers["chosen"][:num_before], chosen.on_device)
        if any(each.num_drafts for each in batch):
            assert isinstance(drafts, DeviceTokens)
            later = drafts.on_device
            put(buffers["later"][: later.size], later.reshape(-1))
            told["later_at"][:num] = [each.draft * later.shape[1] for each in batch]
        recorded.run(spans, [0] * row)
        return as_rows(recorded, "logits", row, self.weights.head.outputs)

    def _verifying(self, num_rows: int, num_spans: int, most: int, end: int, turn: int) -> Recorded:
        """A program of a verify that sees up to `end` positions. What one brings is read while the next one is computed: two take turns.
        MemoryError where there is no room for it."""
        found = self._graphs.get(f"verify {turn}", num_rows, num_spans, end, self._build_verify, most=most)
        found.record()
        self._turn = turn
        return found

    def _build_verify(self, recorded: Recorded) -> None:
        p, num = recorded.program, recorded.program.num_spans
        told = ("first", "num_drafts", "num_right", "later_at")
        recorded.take(verified=(MAX_BEFORE, np.int32), **dict.fromkeys(told, (num, np.int32)))
        p.buffer("chosen", (MAX_BEFORE,), np.int32)
        p.buffer("later", (num * p.rows,), np.int32)
        names = ("spans", "tokens", "chosen", "verified", *told, "later")
        p.step("go_on", (-(-num // 32),), 32, NextStruct(*(p.address(name) for name in names), num))
        build_trunk(p, self.weights)
        recorded.give("choices")

    def settle(self, memory: SequenceMemory, position: int, num_rows: int) -> None:
        memory.recurrent.moved_to(position)
        memory.recurrent.extend(num_rows)
        _sequence(memory).rows.written(position, num_rows)

    def _prefill(self, rows: Rows) -> F32:
        memory = _sequence(rows.memory)
        self._seek(memory, rows.position)
        tokens, span = self._graphs.tokens([rows]), memory.span(rows.position, 0, len(rows.tokens))
        recorded = self._graphs.get(
            "chunk", len(tokens), 1, _end([rows]), lambda each: build_trunk(each.program, self.weights), is_wide=True
        )
        memory.recurrent.begin()
        recorded.run([span], tokens)
        memory.recurrent.moved_to(rows.position)
        return as_rows(recorded, "hidden", len(rows.tokens), self.config.hidden)

    def freeze(self, memory: SequenceMemory, position: int, *, is_whole: bool) -> None:
        memory.check(position, 0, is_chunk=False)
        self._seek(_sequence(memory), position)
        memory.freeze(is_whole=is_whole)

    def _seek(self, memory: CudaSequence, position: int) -> None:
        states = memory.states
        states.check(position)
        if position != states.base_position:
            states.begin()
            if states.state_slots == 1:
                span = memory.span(position, 0, 0, base=states.base_position)
                self._graphs.get("replay", 0, 1, 1, self._build_replay).run([span], [])
        states.moved_to(position)

    def _build_replay(self, recorded: Recorded) -> None:
        p = recorded.program
        deltas = [w.mixer for w in self.weights.layers if isinstance(w.mixer, DeltaWeights)]
        for number, w in enumerate(deltas):
            p.delta(w, number, Column(NOWHERE, 0), Column(NOWHERE, 0), Column(NOWHERE, 0), NOWHERE)

    def replay(self, log: RecurrentLog, num_rows: int) -> None:
        raise InternalBug("the device replays its logs itself")

    def _keep(self, batch: Sequence[Rows], hidden: F32) -> None:
        for rows in batch:
            _sequence(rows.memory).rows.written(rows.position, len(rows.tokens))


class CudaHead(HeadBase):
    def __init__(self, weights: ModelWeights, backend: CudaBackend) -> None:
        super().__init__(weights, backend)
        self._graphs, self._device, self._weights = _Graphs(weights, backend), backend.device, weights

    @property
    def num_prepared(self) -> int:
        return self._graphs.kernels.num_recorded

    def forward(self, batch: Sequence[MtpRows]) -> F32:
        return self._run(batch, "all", list(range(sum(len(rows.tokens) for rows in batch))))

    def last(self, batch: Sequence[MtpRows]) -> F32:
        return self._run(batch, "last", _ends(batch))

    def logits(self, outputs: F32) -> F32:
        return self._graphs.product(self.head, outputs)

    def begin(self, batch: Sequence[MtpRows], wanted: Sequence[Wanted]) -> Begun[list[Drafted]]:
        if any(_needs_host(rows, each) for rows, each in zip(batch, wanted, strict=True)):
            return super().begin(batch, wanted)
        return self._begin(batch, wanted)

    def draft(self, batch: Sequence[MtpRows], wanted: Sequence[Wanted]) -> list[Drafted]:
        """All steps without the host, but for those that have hidden rows or penalties of their own."""
        needs_host = [_needs_host(rows, each) for rows, each in zip(batch, wanted, strict=True)]
        found = dict[int, Drafted]()
        for is_host, draft in ((False, self._draft), (True, partial(draft_by_guesses, self))):
            some = [i for i, is_one in enumerate(needs_host) if is_one == is_host]
            if some:
                found |= zip(some, draft([batch[i] for i in some], [wanted[i] for i in some]), strict=True)
        return [found[i] for i in range(len(batch))]

    def draft_after(self, batch: Sequence[Following], choices: Choices) -> Begun[list[Drafted]]:
        """Behind the verify, before anybody has read what it chose."""
        chosen = choices.on_device
        if chosen is None or any(each.wanted.choosing.needs_host or choices.asks[each.index].how.needs_host for each in batch):
            return super().draft_after(batch, choices)
        assert isinstance(chosen, DeviceTokens)
        asks, wanted = [choices.asks[each.index] for each in batch], [each.wanted for each in batch]
        starts = list(accumulate((ask.num_rows for ask in choices.asks), initial=0))  # a row stands where the verify's stood
        rows = [MtpRows(each.memory, ask.position, (0,) * ask.num_rows, None) for each, ask in zip(batch, asks, strict=True)]
        first = [starts[each.index] for each in batch]
        recorded = self._tell(rows, wanted, first, starts[-1], is_after=True)
        told = recorded.begin()
        put_verified(told["verified"], told["num_right"], choices.asks, asks)
        self._device.put(recorded.program.buffers["tokens"][: starts[-1]], chosen.on_device)
        recorded.launch()
        return Begun(recorded.mark, partial(self._read, recorded, wanted), on_device=DeviceTokens(recorded, "drafts", slice(0, len(batch))))

    def _draft(self, batch: Sequence[MtpRows], wanted: Sequence[Wanted]) -> list[Drafted]:
        return self._begin(batch, wanted).finish()

    def _begin(self, batch: Sequence[MtpRows], wanted: Sequence[Wanted]) -> Begun[list[Drafted]]:
        *starts, num_rows = accumulate((len(rows.tokens) for rows in batch), initial=0)
        recorded = self._tell(batch, wanted, starts, num_rows, is_after=False)
        told = recorded.begin()
        told["picked"][: len(batch)] = _ends(batch)
        put_tokens(told["tokens"], self._graphs.tokens(batch))
        recorded.launch()
        return Begun(recorded.mark, partial(self._read, recorded, wanted))

    def _tell(
        self, batch: Sequence[MtpRows], wanted: Sequence[Wanted], starts: Sequence[int], num_rows: int, *, is_after: bool
    ) -> Recorded:
        """A program of drafts after the rows of a batch, which stand at `starts` among so many; told of all but tokens. `is_after`: after
        as many of them as turn out to be right, which is known on the device."""
        hows, num_steps = [each.choosing.sampling for each in wanted], max(each.limit for each in wanted)
        how = filters_of(hows) if any(each.temperature > 0 for each in hows) else None
        build = partial(self._build_drafts, num_steps, how, is_after)
        kind = f"{'after' if is_after else 'draft'} {num_steps} {how}"
        recorded = self._get(batch, kind, build, num_rows=num_rows, num_further=num_steps - 1, has_tokens=not is_after)
        told, at = recorded.begin(), list[SpanStruct]()
        for i, (rows, each) in enumerate(zip(batch, wanted, strict=True)):
            most = rows.position + len(rows.tokens)
            end = rows.position + 1 if is_after else most
            span = _sequence(rows.memory).span(end - 1, i, most - end + each.limit)  # there are pages for so many
            span.num_rows = 1
            at.append(span)
            put_draw(told["draws"], i, each.choosing.sampling, end)
        put_spans(told["draft spans"], told["draft span of"], at)
        put_spans(told["spans"], told["span of"], self._spans(batch, starts))
        told["limits"][: len(batch)] = [each.limit for each in wanted]
        return recorded

    @staticmethod
    def _read(recorded: Recorded, wanted: Sequence[Wanted]) -> list[Drafted]:
        tokens, shares = recorded.read("drafts")[:, 1:].tolist(), recorded.read("shares").tolist()
        return [each.cut(*found) for each, found in zip(wanted, zip(tokens, shares, strict=True), strict=False)]

    def _build_drafts(self, num_steps: int, how: Filters | None, is_after: bool, recorded: Recorded) -> None:
        p, num = recorded.program, recorded.program.num_spans
        draft = Program(p.config, p.packing, num, num, p.max_parts, span_rows=1)
        fields: dict[str, tuple[int, Any]] = {
            "draft spans": (num * SPAN.itemsize, np.uint8), "draft span of": (num, np.int32), "limits": (num, np.int32),
            "draws": (num * DRAW.itemsize, np.uint8),
        }  # fmt: skip
        if is_after:
            fields |= {"verified": (p.rows, np.int32), "num_right": (num, np.int32)}
            p.buffer("picked", (num,), np.int32)
            p.buffer("tokens", (p.rows,), np.int32)
        else:
            fields["picked"] = num, np.int32
        recorded.take(**fields)
        draft.buffers = {name: p.buffers[f"draft {name}"] for name in ("spans", "span of")} | {"draws": p.buffers["draws"]}
        for name, shape, dtype in (
            ("drafts", (num, num_steps + 1), np.int32), ("shares", (num, num_steps), np.float32), ("sure", (num,), np.float32),
            ("drafted", (num,), np.int32),
        ):  # fmt: skip
            p.buffer(name, shape, dtype)
        r = RoundStruct(
            draft=p.address("draft spans"), tokens=p.address("drafts"), drafted=p.address("drafted"), draws=p.address("draws"),
            limits=p.address("limits"), draft_span_of=p.address("draft span of"), shares=p.address("shares"), sure=p.address("sure"),
            depth=num_steps, sequences=num,
        )  # fmt: skip
        if is_after:
            r.catch_up, r.span_of, r.choices = p.address("spans"), p.address("span of"), p.address("tokens")
            r.verified, r.num_right, r.picked = p.address("verified"), p.address("num_right"), p.address("picked")
            p.step("follow", (-(-num // 32),), 32, r)
        p.steps = build_drafts(p, draft, self, self._weights, r, tokens=p.address("tokens"), picked=p.address("picked"), how=how)
        p.buffers |= {f"drafting {name}": buffer for name, buffer in draft.buffers.items()}
        recorded.give("drafts", "shares")

    def _get(
        self, batch: Sequence[MtpRows], kind: str, build: Callable[[Recorded], None], *, is_chunk: bool = False,
        num_rows: int | None = None, num_further: int = 0, has_tokens: bool = True,
    ) -> Recorded:  # fmt: skip
        """`num_further`: rows after those of a batch that its sequences may have."""
        end = max(rows.position + len(rows.tokens) for rows in batch)
        for rows in batch:
            if rows.hidden is None:
                _sequence(rows.memory).rows.check(rows.position - 1, len(rows.tokens))
        count = sum(len(rows.tokens) for rows in batch) if num_rows is None else num_rows
        is_wide = is_chunk and len(batch) == 1 and count >= CHUNK_ROWS
        return self._graphs.get(
            kind, count, len(batch), end + num_further, build, most=most_of(batch), is_wide=is_wide, has_tokens=has_tokens
        )

    @staticmethod
    def _spans(batch: Sequence[MtpRows], starts: Iterable[int]) -> list[SpanStruct]:
        return [_sequence(rows.memory).span(rows.position, row, len(rows.tokens)) for rows, row in zip(batch, starts, strict=False)]

    def _run(self, batch: Sequence[MtpRows], kind: str, picked: list[int]) -> F32:
        hidden, is_given = self._weights.config.hidden, all(rows.hidden is not None for rows in batch)
        if not is_given and any(rows.hidden is not None for rows in batch):
            raise InternalBug("some hidden rows are given, and others are not")

        def build(recorded: Recorded) -> None:
            p = recorded.program
            num_picked = p.rows if kind == "all" else p.num_spans
            p.buffer("before", (p.rows, hidden))
            recorded.take(picked=(num_picked, np.int32))
            if not is_given:
                p.read_hidden()
            build_head(p, self, self._weights, embedded_tokens=p.address("tokens"), picked=p.address("picked"), num_picked=num_picked)

        recorded = self._get(batch, f"{kind} {is_given}", build, is_chunk=True)
        if is_given:
            row = 0
            for rows in batch:
                given = rows.hidden.on_device if isinstance(rows.hidden, DeviceRows) else rows.hidden
                self._device.put(recorded.program.buffers["before"][row : row + len(rows.tokens)], given)
                row += len(rows.tokens)
        recorded.begin()["picked"][: len(picked)] = picked
        starts = accumulate((len(rows.tokens) for rows in batch), initial=0)
        recorded.run(self._spans(batch, starts), self._graphs.tokens(batch))
        return as_rows(recorded, "out", len(picked), hidden)


def _needs_host(rows: MtpRows, wanted: Wanted) -> bool:
    """Whether drafts are made guess by guess."""
    return wanted.choosing.needs_host or rows.hidden is not None


def _ends(batch: Sequence[MtpRows]) -> list[int]:
    return [int(end) - 1 for end in np.cumsum([len(rows.tokens) for rows in batch])]


def _end(batch: Sequence[Rows]) -> int:
    return max(rows.position + len(rows.tokens) for rows in batch)


def _sequence(memory: SequenceMemory) -> CudaSequence:
    assert isinstance(memory, CudaSequence)
    return memory
