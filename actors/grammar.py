"""What an answer may be, by a JSON schema, a regular expression or a grammar, through llguidance (Earley parsing over the vocabulary's
trie; needs the extra `grammar`). Which tokens may follow is a function of those before, so it is the same whoever drafts."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from typing import Any

from ..core.channel import RETRY_AFTER_SECONDS
from ..core.errors import InvalidRequest, Overloaded
from ..core.speculation import num_alike
from ..core.vocabulary import Grammar
from .reply import END_THINK
from .tokenizer import Vocabulary

#: The newest tokens of a continuation that may be drafts, and stand in no other.
MOST_DRAFTED = 64
#: Blanks between the parts of JSON: room for deep indentation, but no end in itself, which some models would make of it.
BLANKS = r"[ \n\r\t]{0,40}"


class Grammars:
    """Those of one model. Blocking; made ready for the vocabulary when they are first asked for, which takes a second or two."""

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
            raise InvalidRequest([(grammar.kind, "needs llguidance, of the extra `grammar`")]) from None
        try:
            with self._lock:
                if self._tokenizer is None:
                    words = _Words(self._vocabulary, self._num_token_ids, self._stop_ids)
                    stops = sorted(self._stop_ids)
                    self._tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(words), eos_token=stops)
            if grammar.kind == "json_schema":
                text = llguidance.LLMatcher.grammar_from_json_schema(grammar.text, overrides={"whitespace_pattern": BLANKS})
            else:
                text = llguidance.grammar_from(grammar.kind, grammar.text)
            matcher = llguidance.LLMatcher(self._tokenizer, text, log_level=0)
            problem = _first_line(matcher.get_error()) if matcher.is_error() else ""
            limits = TokenLimits(matcher, self._vocabulary if opens_reasoning else None)
        except MemoryError:
            raise Overloaded("no memory for a grammar", RETRY_AFTER_SECONDS) from None
        except BaseException as error:
            raise InvalidRequest([(grammar.kind, _what_failed(error))]) from None
        if problem:
            raise InvalidRequest([(grammar.kind, problem)])
        return limits


class TokenLimits:
    """What may follow the tokens of one answer, or with a `thinking` vocabulary, those after the end of its thoughts. For threads that
    draft and verify, which ask about different continuations of one text: the matcher goes back to where they part."""

    def __init__(self, matcher: Any, thinking: Vocabulary | None) -> None:
        self._new: Any = matcher
        self._matcher: Any = matcher.deep_copy()
        self._thought = _Thought(thinking) if thinking is not None else None
        self._lock = threading.Lock()
        self._consumed: tuple[int, ...] = ()
        self._failures: dict[tuple[int, ...], str] = {}

    def error(self, output: Sequence[int]) -> str | None:
        """As vocabulary.Limits has it. A draft that leads nowhere is no failure: nobody has chosen it."""
        return next((why for tokens, why in list(self._failures.items()) if tuple(output[: len(tokens)]) == tokens), None)

    def allowed(self, output: tuple[int, ...]) -> bytes | None:
        """As vocabulary.Limits has it."""
        with self._lock:
            if self._matcher is None:
                self._failures[output] = "it failed before"
                return None
            answer = self._thought.after(output) if self._thought is not None else output
            try:
                if answer is None or not self._go_to(answer):
                    return None
                mask = bytes(self._matcher.compute_bitmask())
                if not self._matcher.is_error():
                    return mask
                self._failures[output] = _first_line(self._matcher.get_error())
            except BaseException as error:
                self._failures[output] = _what_failed(error)
            try:
                self._matcher, self._consumed = self._new.deep_copy(), ()  # one that has failed answers nothing any more
            except BaseException as error:
                self._matcher, self._failures[output] = None, _what_failed(error)
            return None

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


class _Thought:
    """Looks for the end of an answer's thoughts, by bytes, whatever tokens spell it."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._seen: tuple[int, ...] = ()  # tokens without it
        self._whole: tuple[int, ...] | None = None  # those up to its end

    def after(self, output: tuple[int, ...]) -> tuple[int, ...] | None:
        """The tokens after that which ends the thoughts; None while they go on."""
        if self._whole is not None and output[: len(self._whole)] == self._whole:
            return output[len(self._whole) :]
        start = len(self._seen) if output[: len(self._seen)] == self._seen else 0
        text, end = b"", END_THINK.encode()
        for i in range(max(0, start - len(end)), len(output)):
            text = text[-len(end) :] + self._vocabulary.token_bytes(output[i])
            if end in text:
                self._whole = output[: i + 1]
                return output[i + 1 :]
        self._seen = output[: max(0, len(output) - MOST_DRAFTED)]
        return None


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


def _what_failed(error: BaseException) -> str:
    """Of what came out of llguidance, panics of Rust included, which are no Exceptions: its request's matter, and nobody else's."""
    if isinstance(error, KeyboardInterrupt | SystemExit):
        raise error
    return _first_line(str(error) or type(error).__name__)


def _first_line(text: str) -> str:
    return json.dumps(text.strip().partition("\n")[0][:200])[1:-1]
