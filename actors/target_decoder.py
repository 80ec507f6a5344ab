"""The target decoder: owns the trunk. Takes all that waits in its mailbox as one batch of rows; prefill chunks go one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from ..core.actor import Actor, Executor
from ..core.channel import Envelope, Mailbox
from ..core.errors import InternalBug, LeaseLost, PositionLost, WorkFailed
from ..core.messages import Forget, Freeze, Mail, Prefill, Verify
from ..core.trace import Trace
from ..core.vocabulary import Verdict
from ..kernels.backend import F32
from ..kernels.model.memory import SequenceMemory, SequencePool
from ..kernels.model.trunk import Rows
from ..kernels.sampling import Ask, choose_rows, logprobs

R = TypeVar("R")


class Target(Protocol):
    """What decodes: a Trunk, or a simulated one."""

    @property
    def num_prepared(self) -> int: ...

    def verify(self, batch: Sequence[Rows]) -> tuple[F32, F32]: ...

    def prefill(self, rows: Rows, is_last: bool) -> F32 | None: ...

    def freeze(self, memory: SequenceMemory, position: int) -> None: ...

    def seconds(self, num_rows: int) -> float:
        """About how long so many rows take."""
        ...


class TargetDecoder(Actor):
    def __init__(self, mailbox: Mailbox, executor: Executor, target: Target, pool: SequencePool, trace: Trace) -> None:
        super().__init__(mailbox, executor)
        self._target, self._pool, self._clock = target, pool, trace.clock

    @property
    def enough(self) -> float:
        """Every sequence there is."""
        return self._pool.num_used

    def is_quick(self, message: Mail[Any]) -> bool:
        if not isinstance(message, Verify) or self._pool.num_used > 1:
            return False
        return self._executor.is_inline(self._target.seconds(len(message.tokens)))

    async def handle(self, batch: list[Envelope]) -> None:
        verifies: list[tuple[Envelope, Verify, Rows]] = []
        prefills: list[tuple[Envelope, Prefill, Rows]] = []
        freezes: list[tuple[Envelope, Freeze]] = []
        forgets: list[Envelope] = []
        for envelope in batch:
            message = envelope.message
            if isinstance(message, Forget):
                forgets.append(envelope)
                continue
            if isinstance(message, Freeze):
                freezes.append((envelope, message))
                continue
            if not isinstance(message, Verify | Prefill):
                raise InternalBug(f"target decoder got {message!r}")
            rows = self._rows(envelope, message)
            if rows is None:
                continue
            if isinstance(message, Verify):
                verifies.append((envelope, message, rows))
            else:
                prefills.append((envelope, message, rows))
        together = [each for each in verifies if not each[1].is_suspect]
        for group in [together, *([each] for each in verifies if each[1].is_suspect)]:
            if group:
                await self._verify(group)
        for envelope, message, rows in prefills:
            if not envelope.is_abandoned:
                await self._prefill(envelope, message, rows)
        for envelope, message in freezes:
            if not envelope.is_abandoned:
                await self._freeze(envelope, message)
        for envelope in forgets:  # what was asked before has been computed or passed over
            envelope.answer(None)

    def _rows(self, envelope: Envelope, message: Verify | Prefill) -> Rows | None:
        """What to compute, or None when the sender has gone away or its memory cannot go there."""
        if envelope.is_abandoned:
            return None
        try:
            memory = self._pool[message.lease]
            memory.check(message.position, len(message.tokens), is_chunk=isinstance(message, Prefill))
        except (LeaseLost, PositionLost) as error:
            envelope.fail(error)
            return None
        return Rows(memory, message.position, message.tokens)

    async def _verify(self, verifies: list[tuple[Envelope, Verify, Rows]]) -> None:
        batch = [rows for _, _, rows in verifies]
        num_rows = sum(len(rows.tokens) for rows in batch)

        def work() -> list[Verdict]:
            logits = self._target.verify(batch)[0]
            return _verdicts(logits, [Ask(message.choosing, message.position + 1, message.tokens[1:]) for _, message, _ in verifies])

        envelopes = [envelope for envelope, _, _ in verifies]
        began, num_prepared = self._clock(), self._target.num_prepared
        verdicts = await self._do(work, num_rows, envelopes)
        seconds, is_typical = (self._clock() - began) / 1e9, self._target.num_prepared == num_prepared
        for envelope, verdict in zip(envelopes, verdicts, strict=True):
            envelope.answer(Verdict(verdict.choices, verdict.logprobs, num_rows, seconds, len(verifies), is_typical))

    async def _prefill(self, envelope: Envelope, message: Prefill, rows: Rows) -> None:
        def work() -> Verdict:
            logits = self._target.prefill(rows, message.is_last)
            if message.is_kept:
                rows.memory.keep()
            return Verdict(()) if logits is None else _verdicts(logits, [Ask(message.choosing, message.position + len(message.tokens))])[0]

        envelope.start()
        envelope.answer(await self._do(work, len(rows.tokens), [envelope]))

    async def _freeze(self, envelope: Envelope, message: Freeze) -> None:
        try:
            memory = self._pool[message.lease]
            memory.check(message.position, 0, is_chunk=False)
            await self._do(lambda: self._target.freeze(memory, message.position), message.position, [envelope])
        except (LeaseLost, PositionLost) as error:
            envelope.fail(error)
        else:
            envelope.answer(None)

    async def _do(self, work: Callable[[], R], num_rows: int, envelopes: list[Envelope]) -> R:
        """Computes; should this actor die of it, those whose work it was are told so."""
        try:
            return await self.compute(work, self._target.seconds(num_rows))
        except Exception:
            for envelope in envelopes:
                envelope.fail(WorkFailed("the target decoder failed working on this request"))
            raise


def _verdicts(logits: F32, asks: list[Ask]) -> list[Verdict]:
    """What is chosen for each sequence, from the logits [R, V] of all."""
    verdicts, start = list[Verdict](), 0
    for ask, choices in zip(asks, choose_rows(logits, asks), strict=True):
        rows, num_top = logits[start : start + ask.num_rows], ask.how.num_logprobs
        start += ask.num_rows
        said = () if num_top is None else tuple(logprobs(row, token, num_top) for row, token in zip(rows, choices, strict=True))
        verdicts.append(Verdict(tuple(choices), said))
    return verdicts
