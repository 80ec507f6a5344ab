"""What a text costs a model, in bits per byte, and how far one model's predictions are from another's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ... import InvalidRequest
from ...actors.model import LoadedModel
from ...core.protocol import CHUNK
from ...kernels.backends import make_trunk
from ...kernels.model.memory import alone
from ...kernels.model.trunk import Rows

F64 = npt.NDArray[np.float64]
#: Tokens that are read from an empty memory, one after another; the first of them is not predicted by anything.
WINDOW = 2048


@dataclass(frozen=True, slots=True)
class Mean:
    """Of independent pieces, with what it may be off by: 1.96 standard errors."""

    value: float
    error: float

    @staticmethod
    def of(pieces: Sequence[float], weights: Sequence[int]) -> Mean:
        """Of sums over pieces, by how much each weighs."""
        sums, sizes = np.array(pieces), np.array(weights, np.float64)
        mean = float(sums.sum() / sizes.sum())
        spread = float(np.sqrt(((sums - mean * sizes) ** 2).sum()) / sizes.sum()) if len(sums) > 1 else float("nan")
        return Mean(mean, 1.96 * spread)

    def __str__(self) -> str:
        return f"{self.value:.4f} ± {self.error:.4f}"


@dataclass(frozen=True, slots=True)
class TextResult:
    """`bits_per_byte` of the model; against a parent also that one's, the Kullback-Leibler divergence from it in bits a token (of the
    model's distribution from the parent's), and the share of tokens where both find the same one likeliest."""

    num_tokens: int
    num_bytes: int
    bits_per_byte: Mean
    parent_bits_per_byte: Mean | None = None
    divergence: Mean | None = None
    agreement: Mean | None = None


def log_probabilities(model: LoadedModel, tokens: Sequence[int]) -> Iterator[F64]:
    """Of what follows each token, chunk by chunk: [rows, V], natural logarithms. A window starts from an empty memory."""
    trunk, window = make_trunk(model.weights, model.backend), min(WINDOW, model.context)
    for first in range(0, len(tokens), window):
        memory = alone(model.memory(), window, 1)
        for start in range(first, min(first + window, len(tokens)), CHUNK):
            chunk = tuple(tokens[start : min(start + CHUNK, first + window)])
            trunk.prefill(Rows(memory, start - first, chunk), is_last=False)
            logits: F64 = np.asarray(trunk.logits(memory.hidden.read(start - first, len(chunk)))).astype(np.float64)
            logits -= logits.max(-1, keepdims=True)
            yield logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def measure(model: LoadedModel, text: str, seen: Callable[[int, int], None], parent: LoadedModel | None = None) -> TextResult:
    """InvalidRequest when there is too little text, or a model has no tokenizer, or they do not have the same tokens."""
    if model.vocabulary is None:
        raise InvalidRequest([("--model", "has no tokenizer, and cannot read a text")])
    if parent is not None and parent.num_token_ids != model.num_token_ids:
        raise InvalidRequest([("--against", f"has {parent.num_token_ids} tokens, the model has {model.num_token_ids}")])
    tokens, window = model.vocabulary.encode(text), min(WINDOW, model.context)
    if len(tokens) < 2:
        raise InvalidRequest([("file", "has fewer than two tokens")])
    sizes = [len(model.vocabulary.token_bytes(token)) for token in tokens]
    pieces: dict[str, list[float]] = {name: [] for name in ("bits", "parent bits", "divergence", "agreement")}
    num_bytes, num_tokens, start = list[int](), list[int](), 0
    theirs = log_probabilities(parent, tokens) if parent is not None else None
    for ours in log_probabilities(model, tokens):
        its = next(theirs) if theirs is not None else None
        rows = np.array([i for i in range(len(ours)) if start + i + 1 < len(tokens) and (start + i + 1) % window], np.intp)
        following = np.array([tokens[start + i + 1] for i in rows], np.intp)
        num_bytes.append(sum(sizes[start + int(i) + 1] for i in rows))
        num_tokens.append(len(rows))
        pieces["bits"].append(float(-ours[rows, following].sum() / np.log(2)))
        if its is not None:
            pieces["parent bits"].append(float(-its[rows, following].sum() / np.log(2)))
            pieces["divergence"].append(float((np.exp(its[rows]) * (its[rows] - ours[rows])).sum() / np.log(2)))
            pieces["agreement"].append(float((its[rows].argmax(-1) == ours[rows].argmax(-1)).sum()))
        start += len(ours)
        seen(start, len(tokens))
    bits = Mean.of(pieces["bits"], num_bytes)
    if parent is None:
        return TextResult(sum(num_tokens), sum(num_bytes), bits)
    others = Mean.of(pieces["parent bits"], num_bytes), *(Mean.of(pieces[name], num_tokens) for name in ("divergence", "agreement"))
    return TextResult(sum(num_tokens), sum(num_bytes), bits, *others)


def table(result: TextResult) -> str:
    """For people, in Markdown."""
    rows = [
        ("bits per byte", result.bits_per_byte), ("the parent's", result.parent_bits_per_byte),
        ("divergence from it, bits a token", result.divergence), ("same likeliest token, share", result.agreement),
    ]  # fmt: skip
    lines = [f"| {result.num_tokens} tokens, {result.num_bytes} bytes | |", "|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {mean} |" for name, mean in rows if mean is not None)])
