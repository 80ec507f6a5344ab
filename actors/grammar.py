"""What an answer may be, by a JSON schema, a regular expression or a grammar, through llguidance (Earley parsing over the vocabulary's
trie; needs the extra `grammar`). Which tokens may follow is a function of those before, so it is the same whoever drafts."""

from __future__ import annotations

import json
import threading
from typing import Any

from ..core.errors import InvalidRequest
from ..core.speculation import num_alike
from ..core.vocabulary import Grammar
from .reply import END_THINK
from .tokenizer import Vocabulary

#: Blanks between the parts of JSON: room for deep indentation, but no end in itself, which some models would make of it.
BLANKS = r"[ \n\r\t]{0,40}"


class Grammars:
    """Those of one model. Blocking; made ready for the vocabulary when they are first asked for, which takes up to a second."""

    def __init__(self, vocabulary: Vocabulary | None, num_token_ids: int, stop_ids: frozenset[int]) -> None:
        self._vocabulary, self._num_token_ids, self._stop_ids = vocabulary, num_token_ids, stop_ids
        self._lock = threading.Lock()
        self._tokenizer: Any = None

    def limits(self, grammar: Grammar, opens_reasoning: bool) -> TokenLimits:
        """What a grammar means for the tokens of an answer, from where its thoughts end if it `opens_reasoning`. InvalidRequest when it is
        no grammar, or too large a one."""
        if self._vocabulary is None or not self._stop_ids:
            raise InvalidRequest([(grammar.kind, "this model has no tokenizer.json, or no token that ends a text")])
        try:
            import llguidance
        except ImportError:
            raise InvalidRequest([(grammar.kind, "needs llguidance: pip install 'forerun[grammar]'")]) from None
        with self._lock:
            if self._tokenizer is None:
                words = _Words(self._vocabulary, self._num_token_ids, self._stop_ids)
                stops = sorted(self._stop_ids)
                self._tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(words), eos_token=stops)
        try:
            if grammar.kind == "json_schema":
                text = llguidance.LLMatcher.grammar_from_json_schema(grammar.text, overrides={"whitespace_pattern": BLANKS})
            else:
                text = llguidance.grammar_from(grammar.kind, grammar.text)
            matcher = llguidance.LLMatcher(self._tokenizer, text, log_level=0)
        except ValueError as error:
            raise InvalidRequest([(grammar.kind, _first_line(str(error)))]) from None
        if matcher.is_error():
            raise InvalidRequest([(grammar.kind, _first_line(matcher.get_error()))])
        return TokenLimits(matcher, self._vocabulary if opens_reasoning else None)


class TokenLimits:
    """What may follow the tokens of one answer, or with a `thinking` vocabulary, those after the end of its thoughts. For threads that
    draft and verify, which ask about different continuations of one text: the matcher goes back to where they part."""

    def __init__(self, matcher: Any, thinking: Vocabulary | None) -> None:
        self._matcher, self._thinking = matcher, thinking
        self._lock = threading.Lock()
        self._consumed: tuple[int, ...] = ()
        self.error: str | None = None

    def allowed(self, output: tuple[int, ...]) -> bytes | None:
        """As vocabulary.Limits has it."""
        with self._lock:
            if self._thinking is not None:
                output, is_over = _after_thought(output, self._thinking)
                if not is_over:
                    return None
            if not self._go_to(output):
                return None
            mask = bytes(self._matcher.compute_bitmask())
            if self._matcher.is_error():
                self.error = _first_line(self._matcher.get_error())
                return None
            return mask

    def _go_to(self, output: tuple[int, ...]) -> bool:
        """Whether a grammar has these tokens."""
        before = self._consumed
        num_known = len(before) if output[: len(before)] == before else num_alike(before, output)  # the first, mostly, is told quickly
        if num_known < len(before):
            self._matcher.rollback(len(before) - num_known)
        more = list(output[num_known:])
        num_consumed = self._matcher.try_consume_tokens(more) if more else 0
        self._consumed = output[: num_known + num_consumed]
        return num_consumed == len(more)


def _after_thought(output: tuple[int, ...], vocabulary: Vocabulary) -> tuple[tuple[int, ...], bool]:
    """What comes after the end of a thought, and whether it has come."""
    end = vocabulary.encode(END_THINK)
    if len(end) == 1:  # as in all of the family
        at = output.index(end[0]) + 1 if end[0] in output else 0
        return output[at:], at > 0
    text = b""
    for i, token in enumerate(output, 1):
        text = text[-len(END_THINK) :] + vocabulary.token_bytes(token)
        if END_THINK.encode() in text:
            return output[i:], True
    return (), False


class _Words:
    """A vocabulary as llguidance.TokenizerWrapper wants it."""

    def __init__(self, vocabulary: Vocabulary, num_token_ids: int, stop_ids: frozenset[int]) -> None:
        self._vocabulary = vocabulary
        self.eos_token_id, self.bos_token_id = min(stop_ids), None
        self.special_token_ids = sorted({*vocabulary.special_ids, *stop_ids})
        specials = {token: vocabulary.name(token).encode() for token in self.special_token_ids}
        self.tokens = [specials.get(token) or vocabulary.token_bytes(token) for token in range(num_token_ids)]

    def __call__(self, text: bytes | str) -> list[int]:
        return list(self._vocabulary.encode(text.decode(errors="replace") if isinstance(text, bytes) else text))


def _first_line(text: str) -> str:
    return json.dumps(text.strip().partition("\n")[0][:200])[1:-1]
