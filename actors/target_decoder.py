"""The target decoder: owns the trunk. Takes all that waits in its mailbox as one batch of rows; prefill chunks go one by one."""

from __future__ import annotations

from ..core.actor import Actor, compute
from ..core.channel import Envelope
from ..core.errors import InternalBug
from ..core.messages import Prefill, Verify
from ..core.vocabulary import Verdict
from ..kernels.model.memory import SequencePool
from ..kernels.model.sampling import choose
from ..kernels.model.trunk import Rows, Trunk


class TargetDecoder(Actor):
    def __init__(self, trunk: Trunk, pool: SequencePool) -> None:
        super().__init__("target decoder")
        self._trunk = trunk
        self._pool = pool

    def _seconds(self, num_rows: int) -> float:
        return num_rows * self._trunk.weights.num_parameters / self._trunk.backend.operations_per_second

    async def handle(self, batch: list[Envelope]) -> None:
        # Who has gone away must not cost the others time; its memory is released by its own sequence.
        wanted = [envelope for envelope in batch if envelope.reply is not None and not envelope.reply.is_abandoned]
        verifies: list[tuple[Envelope, Verify]] = []
        prefills: list[tuple[Envelope, Prefill]] = []
        for envelope in wanted:
            match envelope.message:
                case Verify() as message:
                    verifies.append((envelope, message))
                case Prefill() as message:
                    prefills.append((envelope, message))
                case other:
                    raise InternalBug(f"target decoder got {other!r}")
        if verifies:
            await self._verify(verifies)
        for envelope, message in prefills:
            await self._prefill(envelope, message)

    async def _verify(self, verifies: list[tuple[Envelope, Verify]]) -> None:
        batch = [Rows(self._pool[message.slot], message.position, message.tokens) for _, message in verifies]

        def work() -> list[Verdict]:
            logits, _ = self._trunk.verify(batch)
            rows = iter(logits)
            return [Verdict(tuple(choose(next(rows), m.sampling, m.position + i + 1) for i in range(len(m.tokens)))) for _, m in verifies]

        verdicts = await compute(work, self._seconds(sum(len(rows.tokens) for rows in batch)))
        for (envelope, _), verdict in zip(verifies, verdicts, strict=True):
            envelope.answer(verdict)

    async def _prefill(self, envelope: Envelope, message: Prefill) -> None:
        rows = Rows(self._pool[message.slot], message.position, message.tokens)

        def work() -> Verdict:
            logits = self._trunk.prefill(rows, message.is_last)
            return Verdict(() if logits is None else (choose(logits[0], message.sampling, message.position + len(message.tokens)),))

        envelope.answer(await compute(work, self._seconds(len(rows.tokens))))
