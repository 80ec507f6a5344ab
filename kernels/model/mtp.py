"""The MTP head: predicts the token after next from a target's hidden row and the next token (DeepSeek-V3, section 2.2).

Row p of its cache pairs the target's post-norm hidden of position p - 1 with token p (row 0: zeros); its logits predict
token p + 1. A chained row takes the head's own output of the row before in place of the target's hidden.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from ...core.begun import Begun
from ...core.errors import InternalBug
from ...core.vocabulary import Choosing
from ..backend import F32, Backend, MatrixMaker
from ..sampling import Ask, Choices, choose_rows
from .drafts import Drafted, Following, MtpRows, Wanted, draft_by_guesses, following
from .trunk import LayerGraph
from .weights import AttentionWeights, ModelWeights, MtpWeights

#: Tokens that can be drafted where the vocabulary is larger: the LM head would be most of what a draft costs. Byte-level BPE numbers
#: its tokens in the order of their merges, the most frequent first, so these are the first.
DRAFT_VOCABULARY = 32_768
#: Rows from which a chunk's products are the faster ones.
CHUNK_ROWS = 16


class HeadBase(ABC):
    """What the MTP heads of all backends have in common."""

    def __init__(self, weights: ModelWeights, backend: MatrixMaker) -> None:
        if weights.mtp is None:
            raise InternalBug("this checkpoint has no MTP head")
        self.mtp: MtpWeights = weights.mtp
        self.hidden = weights.config.hidden
        num_drafted, self.head = min(DRAFT_VOCABULARY, weights.config.vocabulary), weights.head
        if num_drafted < weights.config.vocabulary:
            self.head = backend.first_outputs(weights.head, num_drafted)
        # One layer and the vocabulary's head.
        operations = weights.num_parameters / (len(weights.layers) + 1) + self.hidden * num_drafted
        self._seconds_a_row = operations / backend.operations_per_second

    @property
    def num_prepared(self) -> int:
        """As a trunk's."""
        return 0

    @staticmethod
    def hidden_of(batch: Sequence[MtpRows]) -> F32:
        """The hidden rows of all [R, hidden], in batch order."""
        given = (rows.hidden if rows.hidden is not None else rows.memory.hidden.before(rows.position, len(rows.tokens)) for rows in batch)
        return np.concatenate([rows for rows in given if rows is not None])

    @abstractmethod
    def forward(self, batch: Sequence[MtpRows]) -> F32:
        """Writes the rows into each cache; returns the head's post-norm outputs [R, hidden], in batch order. Nothing that is said depends
        on their last bits, so many rows may be computed as a chunk."""

    def last(self, batch: Sequence[MtpRows]) -> F32:
        """The same for the output of each sequence's last row only, [sequences, hidden]: the rows before it are there for the cache."""
        ends = [end - 1 for end in accumulate(len(rows.tokens) for rows in batch)]
        return self.forward(batch)[ends]

    def guess(self, batch: Sequence[MtpRows]) -> tuple[F32, F32]:
        """`last`, and the logits of that."""
        outputs = self.last(batch)
        return outputs, self.logits(outputs)

    @abstractmethod
    def logits(self, outputs: F32) -> F32:
        """[R, V], or of the first DRAFT_VOCABULARY tokens."""

    def mark(self, rows: MtpRows, num_marked: int, choosing: Choosing) -> tuple[bool, ...]:
        """Writes the rows into the cache. Of the newest `num_marked` tokens, not of all, whether each would have been drafted after those
        before it."""
        before, newest = rows.split(len(rows.tokens) - num_marked - 1 if num_marked else len(rows.tokens))
        if before.tokens:
            self.last([before])  # of which nothing is wanted but what the cache keeps
        if not num_marked:
            return ()
        marked = newest.tokens[1:]
        logits = self.logits(self.forward([newest])[:num_marked])
        (choices,) = choose_rows(logits, [Ask(choosing, newest.position + 1, marked[:-1])])
        return tuple(choice == token for choice, token in zip(choices, marked, strict=True))

    def draft(self, batch: Sequence[MtpRows], wanted: Sequence[Wanted]) -> list[Drafted]:
        """`last`, and what follows it."""
        return draft_by_guesses(self, batch, wanted)

    def begin(self, batch: Sequence[MtpRows], wanted: Sequence[Wanted]) -> Begun[list[Drafted]]:
        """`draft`; a device is at work on it when this returns."""
        return Begun(None, lambda: self.draft(batch, wanted))

    def draft_after(self, batch: Sequence[Following], choices: Choices) -> Begun[list[Drafted]]:
        """`draft` after what a verify brings; a device is at work on it when this returns."""
        return Begun(None, lambda: self.draft(*following(batch, choices)))

    def seconds(self, num_rows: int) -> float:
        """About how long drafting so many rows takes."""
        return num_rows * self._seconds_a_row


class MtpHead(HeadBase):
    """The graph, one op of the table after another."""

    def __init__(self, weights: ModelWeights, backend: Backend) -> None:
        super().__init__(weights, backend)
        if not isinstance(self.mtp.layer.mixer, AttentionWeights):
            raise InternalBug("an MTP head has an attention layer")
        self._graph, self._attention = LayerGraph(weights, backend), self.mtp.layer.mixer

    def forward(self, batch: Sequence[MtpRows]) -> F32:
        graph, backend, eps, w = self._graph, self._graph.backend, self._graph.config.rms_eps, self.mtp
        embedded, rotary, hidden = graph.embed(batch), graph.rotary(batch), self.hidden_of(batch)
        both = [backend.rms_norm(embedded, w.embedding_norm, eps), backend.rms_norm(hidden, w.hidden_norm, eps)]
        spans = [(rows.memory.mtp, rows.position, len(rows.tokens)) for rows in batch]
        is_chunk = len(hidden) >= CHUNK_ROWS
        x = graph.linear(is_chunk)(np.concatenate(both, axis=-1), w.fc)
        x = graph.layer(x, w.layer, lambda u: graph.attention(u, self._attention, rotary, spans, 0, is_chunk), is_chunk)
        return backend.rms_norm(x, w.norm, eps)

    def logits(self, outputs: F32) -> F32:
        return self._graph.backend.linear(outputs, self.head)
