"""The MTP drafter: owns the MTP head and drafts with it, all sequences that ask together as one batch.

A sequence's cache rows are exact once the target's hidden row and the token have gone in. Drafting runs ahead with the
head's own outputs; what is accepted of it is computed again with the target's hidden rows, in the same pass as the next
draft's first step. Hidden rows are read by (slot, position), never by place in a batch.

Above temperature 0 a draft is drawn with the target's own noise for its position, and so agrees with the target more
often than a draw of its own would: coupled noise (figures in kernels/EXPERIMENTS.md).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ..core.actor import Actor, compute
from ..core.channel import Envelope
from ..core.errors import InternalBug
from ..core.messages import Commit, Forget, Observe, Propose
from ..core.protocol import CHUNK
from ..core.vocabulary import Draft
from ..kernels.backend import F32
from ..kernels.model.memory import SequencePool
from ..kernels.model.mtp import MtpHead, MtpRows
from ..kernels.model.sampling import choose


@dataclass(slots=True)
class _Sequence:
    """Rows below `num_exact` are exact; `behind` holds the tokens at `num_exact`... that the target has computed since."""

    num_exact: int = 0
    behind: list[int] = field(default_factory=list[int])

    @property
    def num_known(self) -> int:
        return self.num_exact + len(self.behind)


class MtpDrafter(Actor):
    def __init__(self, head: MtpHead, pool: SequencePool) -> None:
        super().__init__("MTP drafter")
        self._head = head
        self._pool = pool
        self._sequences: dict[int, _Sequence] = {}
        config = head.config
        # multiply-adds a row: one layer and the vocabulary's head
        self._row_cost = head.weights.num_parameters / (len(head.weights.layers) + 1) + config.hidden * config.vocabulary

    def _seconds(self, num_rows: int) -> float:
        return num_rows * self._row_cost / self._head.backend.operations_per_second

    async def handle(self, batch: list[Envelope]) -> None:
        proposals: list[tuple[Envelope, Propose]] = []
        for envelope in batch:
            match envelope.message:
                case Observe() | Commit() as message:
                    if not envelope.is_abandoned:
                        self._learn(message)
                        # A round's few tokens wait for the next draft, to share its pass; a chunk's hidden rows do not last.
                        if isinstance(message, Observe) or len(self._sequences[message.slot].behind) >= CHUNK:
                            await self._catch_up_alone(message.slot)
                        envelope.answer(None)
                case Propose() as message:
                    proposals.append((envelope, message))
                case Forget(slot):
                    self._sequences.pop(slot, None)
                    envelope.answer(None)
                case other:
                    raise InternalBug(f"MTP drafter got {other!r}")
        wanted = [(e, m) for e, m in proposals if not e.is_abandoned]
        if wanted:
            rows = sum(m.limit + len(self._sequences[m.slot].behind) for _, m in wanted)
            drafts = await compute(lambda: self._draft([m for _, m in wanted]), self._seconds(rows))
            for (envelope, _), tokens in zip(wanted, drafts, strict=True):
                envelope.answer(Draft("draft-mtp", tuple(tokens)))

    def _learn(self, message: Observe | Commit) -> None:
        sequence = self._sequences.setdefault(message.slot, _Sequence())
        # The first token of a commit is known already when a draft was asked for that round.
        num_known = sequence.num_known - message.position
        if not 0 <= num_known <= len(message.tokens):
            raise InternalBug(f"tokens at {message.position}, but {sequence.num_known} are known")
        sequence.behind += message.tokens[num_known:]

    async def _catch_up_alone(self, slot: int) -> None:
        rows = self._catch_up(slot)
        await compute(lambda: self._head.forward([rows]), self._seconds(len(rows.tokens)))

    def _catch_up(self, slot: int, *next_tokens: int) -> MtpRows:
        """The rows that make the cache exact up to what the target has computed, then `next_tokens` (one at most)."""
        sequence, memory = self._sequences[slot], self._pool[slot]
        start, tokens = sequence.num_exact, (*sequence.behind, *next_tokens)
        sequence.num_exact, sequence.behind = start + len(tokens), []
        hidden: F32
        if start == 0:
            first = np.zeros((1, self._head.config.hidden), np.float32)
            hidden = np.concatenate([first, memory.hidden.read(0, len(tokens) - 1)])
        else:
            hidden = memory.hidden.read(start - 1, len(tokens))
        return MtpRows(memory, start, tokens, hidden)

    def _draft(self, messages: list[Propose]) -> list[list[int]]:
        for message in messages:
            if message.position != self._sequences[message.slot].num_known:
                raise InternalBug(f"asked to draft from {message.position}, but {self._sequences[message.slot].num_known} are known")
        rows = [self._catch_up(message.slot, message.last_token) for message in messages]
        drafts: list[list[int]] = [[] for _ in messages]
        # The newest token's row holds a token the target has chosen but not computed. Its inputs are exact all the same.
        active = list(range(len(messages)))
        while active:
            outputs = self._head.forward([rows[i] for i in active])
            ends = np.cumsum([len(rows[i].tokens) for i in active]) - 1
            for i, end, logits in zip(active, ends, self._head.logits(outputs[ends]), strict=True):
                position = rows[i].position + len(rows[i].tokens)
                token = choose(logits, messages[i].sampling, position)
                drafts[i].append(token)
                rows[i] = MtpRows(rows[i].memory, position, (token,), outputs[end : end + 1])
            active = [i for i in active if len(drafts[i]) < messages[i].limit]
        return drafts
