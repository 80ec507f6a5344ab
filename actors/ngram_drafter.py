"""The n-gram drafters: one actor for each family of look-ups (actors/lookup), with the histories of all sequences. No weights."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from ..core.actor import Actor, Executor
from ..core.channel import Envelope, Mailbox
from ..core.errors import InternalBug
from ..core.messages import Commit, Forget, Mail, Observe, Propose, Resume
from ..core.speculation import DRAFTER_PATIENCE_SECONDS, Draft, num_alike
from .lookup.base import NOTHING, Lookup
from .lookup.family import Family

#: About what a look-up takes to learn a token.
SECONDS_PER_TOKEN = 1e-5


@dataclass(slots=True)
class _Sequence:
    """`proposed` stands from `position` on, if it is right; what came has not been compared with it yet."""

    lookup: Lookup
    salt: str
    position: int = 0
    proposed: tuple[int, ...] = ()

    def propose(self, ahead: tuple[int, ...], limit: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
        if len(ahead) > 1:  # the continuation of another's draft, which may not come
            return self.lookup.propose(ahead, limit)
        came = (*self.lookup.tokens[self.position :], *ahead)[: len(self.proposed)]
        self.lookup.heard(len(came), num_alike(self.proposed, came))
        proposal = self.lookup.propose(ahead, limit)
        self.position, self.proposed = len(self.lookup.tokens) + 1, proposal[0]
        return proposal


class NgramDrafter(Actor):
    """Of a lease whose beginning it has not heard of (it was restarted meanwhile) it knows nothing, until Resume tells it."""

    patience_seconds = DRAFTER_PATIENCE_SECONDS

    def __init__(self, mailbox: Mailbox, executor: Executor, family: Family) -> None:
        super().__init__(mailbox, executor)
        self._family = family
        self._sequences: dict[int, _Sequence] = {}

    async def run(self) -> None:
        try:
            await super().run()
        finally:
            self._family.close()

    def is_quick(self, message: Mail[Any]) -> bool:
        match message:
            case Propose(since=tokens) | Commit(tokens=tokens):
                return self._executor.is_inline(_seconds(tokens))
            case _:
                return False

    async def handle(self, batch: list[Envelope]) -> None:
        for envelope in batch:
            match envelope.message:
                case Observe(_, lease, position, tokens, salt):
                    if position == 0:
                        self._sequences[lease] = _Sequence(self._family.make(salt), salt)
                    await self._learn(lease, position, tokens)
                    envelope.answer(None)
                case Commit(_, lease, position, tokens):
                    await self._learn(lease, position, tokens)
                    envelope.answer(())
                case Resume(_, lease, tokens, salt):
                    self._sequences[lease] = _Sequence(self._family.make(salt), salt)
                    await self._learn(lease, 0, tokens)
                    envelope.answer(None)
                case Propose(_, lease, position, since, ahead, limit, _, _):
                    await self._learn(lease, position - len(since), since)
                    sequence = self._sequences.get(lease)
                    proposal = NOTHING if sequence is None or envelope.is_abandoned else sequence.propose(ahead, limit)
                    envelope.answer(Draft(self._family.name, *proposal))
                case Forget(_, lease, is_over):
                    sequence = self._sequences.pop(lease, None)
                    if sequence is not None and is_over:
                        end, num_tokens = partial(self._family.ended, sequence.lookup, sequence.salt), len(sequence.lookup.tokens)
                        await self.compute(end, num_tokens * self._family.seconds_to_end)
                    envelope.answer(None)
                case other:
                    raise InternalBug(f"n-gram drafter got {other!r}")

    async def _learn(self, lease: int, position: int, tokens: tuple[int, ...]) -> None:
        sequence = self._sequences.get(lease)
        if sequence is None or not tokens:
            return
        if position != len(sequence.lookup.tokens):
            raise InternalBug(f"tokens at {position} after {len(sequence.lookup.tokens)}")
        await self.compute(lambda: sequence.lookup.extend(tokens), _seconds(tokens))


def _seconds(tokens: tuple[int, ...]) -> float:
    """About what learning them takes."""
    return len(tokens) * SECONDS_PER_TOKEN
