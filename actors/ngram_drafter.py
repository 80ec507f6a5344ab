"""The ngram-simple drafter: what followed the newest earlier occurrence of the last n tokens. Host only, no weights."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..core.actor import Actor, Executor
from ..core.channel import Envelope, Mailbox
from ..core.errors import InternalBug
from ..core.messages import Commit, Forget, Observe, Propose, Resume
from ..core.vocabulary import DRAFTER_PATIENCE_SECONDS, Draft


@dataclass(slots=True)
class History:
    """One sequence's tokens, and for the hash of each n-gram of them where its newest occurrence ends. No rescans."""

    size_n: int
    tokens: list[int] = field(default_factory=list[int])
    ends: dict[int, int] = field(default_factory=dict[int, int])

    def extend(self, tokens: tuple[int, ...]) -> None:
        for token in tokens:
            self.tokens.append(token)
            if len(self.tokens) >= self.size_n:
                self.ends[hash(tuple(self.tokens[-self.size_n :]))] = len(self.tokens)

    def continuation(self, last_token: int, limit: int) -> tuple[int, ...]:
        """Up to `limit` tokens that followed the newest earlier occurrence of the last n tokens, `last_token` included;
        nothing if fewer than n followed."""
        key = (*self.tokens[len(self.tokens) - self.size_n + 1 :], last_token)
        end = self.ends.get(hash(key)) if len(key) == self.size_n else None
        if end is None or len(self.tokens) + 1 - end < self.size_n or tuple(self.tokens[end - self.size_n : end]) != key:
            return ()
        return (*self.tokens[end : end + limit], last_token)[:limit]


class NgramDrafter(Actor):
    """Of a lease whose beginning it has not heard of (it was restarted meanwhile) it knows nothing, until Resume tells it."""

    patience_seconds = DRAFTER_PATIENCE_SECONDS

    def __init__(self, mailbox: Mailbox, executor: Executor, size_n: int) -> None:
        super().__init__(mailbox, executor)
        self._size_n = size_n
        self._histories: dict[int, History] = {}

    async def handle(self, batch: list[Envelope]) -> None:
        for envelope in batch:
            match envelope.message:
                case Observe(_, lease, position, tokens) | Commit(_, lease, position, tokens):
                    self._learn(lease, position, tokens)
                    envelope.answer(None)
                case Resume(_, lease, tokens):
                    self._histories.pop(lease, None)
                    self._learn(lease, 0, tokens)
                    envelope.answer(None)
                case Propose(_, lease, _, last_token, limit, _):
                    history = self._histories.get(lease)
                    tokens = () if history is None or envelope.is_abandoned else history.continuation(last_token, limit)
                    envelope.answer(Draft("ngram-simple", tokens))
                case Forget(_, lease):
                    self._histories.pop(lease, None)
                    envelope.answer(None)
                case other:
                    raise InternalBug(f"n-gram drafter got {other!r}")

    def _learn(self, lease: int, position: int, tokens: tuple[int, ...]) -> None:
        if position == 0:
            self._histories[lease] = History(self._size_n)
        history = self._histories.get(lease)
        if history is None:
            return
        if position != len(history.tokens):
            raise InternalBug(f"tokens at {position} after {len(history.tokens)}")
        history.extend(tokens)
