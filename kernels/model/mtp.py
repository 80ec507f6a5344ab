"""The MTP head: predicts the token after next from a target's hidden row and the next token (DeepSeek-V3, section 2.2).

Row p of its cache pairs the target's post-norm hidden of position p - 1 with token p (row 0: zeros); its logits predict
token p + 1. A chained row takes the head's own output of the row before in place of the target's hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...core.errors import InternalBug
from ..backend import F32, Backend
from .memory import SequenceMemory
from .trunk import LayerGraph
from .weights import AttentionWeights, ModelWeights, MtpWeights

#: Tokens that can be drafted where the vocabulary is larger: the LM head would be most of what a draft costs. Byte-level BPE numbers
#: its tokens in the order of their merges, the most frequent first, so these are the first.
DRAFT_VOCABULARY = 32_768
#: Rows from which a chunk's products are the faster ones.
CHUNK_ROWS = 16


@dataclass(frozen=True, slots=True)
class MtpRows:
    """Consecutive rows of one sequence's MTP cache: tokens from an absolute position, and for each the hidden row of the
    position before it, [R, hidden]."""

    memory: SequenceMemory
    position: int
    tokens: tuple[int, ...]
    hidden: F32


class MtpHead(LayerGraph):
    def __init__(self, weights: ModelWeights, backend: Backend) -> None:
        super().__init__(weights, backend)
        if weights.mtp is None or not isinstance(weights.mtp.layer.mixer, AttentionWeights):
            raise InternalBug("this checkpoint has no MTP head")
        self._mtp: MtpWeights = weights.mtp
        self._attention: AttentionWeights = weights.mtp.layer.mixer
        self.hidden = self.config.hidden
        self._num_drafted = min(DRAFT_VOCABULARY, self.config.vocabulary)
        self._head = weights.head
        if self._num_drafted < self.config.vocabulary:
            self._head = backend.first_outputs(weights.head, self._num_drafted)

    def forward(self, batch: Sequence[MtpRows]) -> F32:
        """Writes the rows into each cache; returns the head's post-norm outputs [R, hidden], in batch order. Nothing that is said depends
        on their last bits, so many rows are computed as a chunk."""
        backend, eps = self.backend, self.config.rms_eps
        embedded = backend.embed(self.weights.embedding, [token for rows in batch for token in rows.tokens])
        hidden = np.concatenate([rows.hidden for rows in batch])
        both = [backend.rms_norm(embedded, self._mtp.embedding_norm, eps), backend.rms_norm(hidden, self._mtp.hidden_norm, eps)]
        spans = [(rows.memory.mtp, rows.position, len(rows.tokens)) for rows in batch]
        is_chunk = len(hidden) >= CHUNK_ROWS
        x = self.linear(is_chunk)(np.concatenate(both, axis=-1), self._mtp.fc)
        x = self.layer(x, self._mtp.layer, lambda u: self.attention(u, self._attention, spans, 0, is_chunk), is_chunk)
        return backend.rms_norm(x, self._mtp.norm, eps)

    def logits(self, outputs: F32) -> F32:
        """[R, V], or of the first DRAFT_VOCABULARY tokens."""
        return self.backend.linear(outputs, self._head)

    def seconds(self, num_rows: int) -> float:
        """About how long drafting so many rows takes: one layer and the vocabulary's head."""
        w, c = self.weights, self.config
        return num_rows * (w.num_parameters / (len(w.layers) + 1) + c.hidden * self._num_drafted) / self.backend.operations_per_second
