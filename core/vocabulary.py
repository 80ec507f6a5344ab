"""The words everything else uses. Frozen values without behaviour beyond their own checks; no arrays, no I/O."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from operator import index
from pathlib import Path
from typing import Literal, Protocol, SupportsIndex, TypeVar, cast, get_args

from .chat import MAX_MESSAGES, MAX_VIOLATIONS, Chat, Message, check_chat
from .checks import check_logit_bias, check_ranges, check_text, json_of
from .embeddings import EmbeddingRows, Part
from .errors import InvalidRequest
from .speculation import Draft, DrafterName, Speculation

R_co = TypeVar("R_co", covariant=True)


#: What a caller may give as a prompt: text, token ids, a chat or its messages, or parts that are token ids or embedding rows.
Prompt = str | list[int] | Chat | list[Message] | list[Part]
#: What it is once it was looked at.
CheckedPrompt = str | list[int] | Chat | list[Part]


def check_prompt(prompt: object, most: int) -> CheckedPrompt:
    """The prompt, with its ids as plain ints, `most` of them (rows are counted too); InvalidRequest lists what is wrong with its form."""
    violations: list[tuple[str, str]] = []
    if isinstance(prompt, Chat):
        return check_chat(prompt)
    if isinstance(prompt, str):
        violations += check_text("prompt", prompt)
    elif not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray) or not prompt:
        violations.append(("prompt", "must be text, token ids or chat messages, and not empty"))
    elif len(cast("Sequence[object]", prompt)) > (MAX_MESSAGES if isinstance(prompt[0], Mapping) else most):
        violations.append(("prompt", f"must have at most {most} token ids, or {MAX_MESSAGES} messages"))
    elif all(type(part) is int for part in cast("Sequence[object]", prompt)):
        return list(cast("Sequence[int]", prompt))
    elif all(isinstance(part, Mapping) for part in cast("Sequence[object]", prompt)):
        return check_chat(Chat(cast("Sequence[Message]", prompt)))
    elif (ids := _plain_ids(cast("object", prompt))) is not None:
        return ids
    elif all(isinstance(part, Sequence | EmbeddingRows) for part in cast("Sequence[object]", prompt)):
        return _check_parts(cast("Sequence[object]", prompt), most)
    else:
        violations.append(("prompt", "must hold token ids only, chat messages only, or parts only"))
    if violations:
        raise InvalidRequest(violations)
    return cast(str, prompt)


def _plain_ids(ids: object) -> list[int] | None:
    """A sequence of whole numbers, of whatever type, but for bytes."""
    given = cast("Sequence[object]", ids) if isinstance(ids, Sequence) and not isinstance(ids, str | bytes | bytearray) else (None,)
    if not all(isinstance(each, SupportsIndex) and not isinstance(each, bool) for each in given):
        return None
    return [index(each) for each in cast("Sequence[SupportsIndex]", given)]


def _check_parts(given: Sequence[object], most: int) -> list[Part]:
    parts: list[Part] = []
    violations: list[tuple[str, str]] = []
    for i, part in enumerate(given):
        if isinstance(part, EmbeddingRows):
            violations += part.check(f"prompt[{i}]")
            parts.append(part)
        elif (ids := _plain_ids(part)) is not None:
            parts.append(ids)
        else:
            violations.append((f"prompt[{i}]", "must be token ids or embedding rows"))
        if len(violations) > MAX_VIOLATIONS:
            break
    if not violations and not 0 < sum(len(part) for part in parts) <= most:
        violations.append(("prompt", f"must have 1 to {most} token ids and rows"))
    if violations:
        raise InvalidRequest(violations)
    return parts


#: characters of a cache salt: room for a tenant's name and a hash
SALT_CHARACTERS = 256


def check_request_id(request_id: object) -> list[tuple[str, str]]:
    """What is wrong with a name for a request; None means that it is given one."""
    if request_id is None or (isinstance(request_id, str) and re.fullmatch(r"[!-~]{1,128}", request_id)):
        return []
    return [("request_id", "must be 1 to 128 printable ASCII characters without blanks")]


def check_salt(salt: object) -> list[tuple[str, str]]:
    """What is wrong with a cache salt; None means none."""
    if salt is None:
        return []
    if isinstance(salt, str) and len(salt) > SALT_CHARACTERS:
        return [("cache_salt", f"must have at most {SALT_CHARACTERS} characters")]
    return check_text("cache_salt", salt)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How a token is chosen from its logits. The filters are transformers' (`generation/logits_process.py`), in its order:
    logit bias, repetition penalty, temperature, top-k, top-p, min-p; presence and frequency penalties are vLLM's, of the answer alone,
    and come after the repetition penalty. Temperature 0 is greedy. The choice is a pure function of (logits, these, position, and with
    penalties the tokens before)."""

    temperature: float = 0.0
    top_k: int = 0  # 0: no limit
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    repetition_penalty: float = 1.0  # of tokens in prompt or answer: logits above 0 are divided by it, those below multiplied
    presence_penalty: float = 0.0  # subtracted for tokens in the answer
    frequency_penalty: float = 0.0  # subtracted each time a token stands in the answer
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, added to its logit)

    def __post_init__(self) -> None:
        values = {name: getattr(self, name) for name in SAMPLING_NUMBERS}
        missing = [(name, "must be given") for name in values if values[name] is None]
        if violations := check_ranges(values) + missing + check_logit_bias(self.logit_bias):
            raise InvalidRequest(violations)

    @property
    def needs_history(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


#: fields of SamplingParams that are one number
SAMPLING_NUMBERS: tuple[str, ...] = tuple(name for name in SamplingParams.__slots__ if name != "logit_bias")


#: how a grammar may be told: the options of those names
GrammarKind = Literal["json_schema", "regex", "grammar"]
#: characters that one may have
GRAMMAR_CHARACTERS = 400_000


@dataclass(frozen=True, slots=True)
class Grammar:
    """What an answer must be: a JSON schema, a regular expression (Rust's), or a grammar in Lark's or llama.cpp's notation (GBNF)."""

    kind: GrammarKind
    text: str


def grammar_of(options: Mapping[str, object]) -> Grammar | None:
    """The grammar that options name, if any. InvalidRequest unless it is one, and a text or, of a schema, a JSON value."""
    found: list[Grammar] = []
    for kind in get_args(GrammarKind):
        text = options.get(kind)
        if kind == "json_schema" and isinstance(text, Mapping):
            try:
                text = json.dumps(text, allow_nan=False)
            except (ValueError, TypeError, RecursionError):
                raise InvalidRequest([(kind, "must be a JSON value")]) from None
        if text is None:
            continue
        if violations := check_text(kind, text):
            raise InvalidRequest(violations)
        assert isinstance(text, str)
        if not 0 < len(text) <= GRAMMAR_CHARACTERS:
            raise InvalidRequest([(kind, f"must have 1 to {GRAMMAR_CHARACTERS} characters")])
        if kind == "json_schema" and not isinstance(json_of(text), dict):
            raise InvalidRequest([(kind, "must be a JSON object")])
        found.append(Grammar(kind, text))
    if len(found) > 1:
        raise InvalidRequest([(found[1].kind, f"does not go with {found[0].kind}")])
    if found and options.get("ignore_eos"):
        raise InvalidRequest([("ignore_eos", f"does not go with {found[0].kind}, after which a text ends")])
    return found[0] if found else None


class Limits(Protocol):
    """What an answer may go on with."""

    def error(self, output: Sequence[int]) -> str | None:
        """Why it cannot be said any more what may follow some beginning of `output`, once that was asked in vain."""
        ...

    def allowed(self, output: tuple[int, ...]) -> bytes | None:
        """A bit for each token id, the lowest bit of a byte first; ids beyond may not follow. None: any may, as where no answer begins
        with `output`. From any thread."""
        ...


@dataclass(frozen=True, slots=True)
class History:
    """The tokens before the one to be chosen; the first `num_prompt` of them are the prompt."""

    tokens: tuple[int, ...]
    num_prompt: int

    def then(self, tokens: tuple[int, ...]) -> History:
        return History(self.tokens + tokens, self.num_prompt)


@dataclass(frozen=True, slots=True)
class Choosing:
    """How the tokens of one request are chosen: `history` up to the first row's own token where penalties or limits need it, and how many
    of the likeliest tokens' log probabilities are wanted; None wants not even the chosen one's."""

    sampling: SamplingParams
    history: History | None = None
    num_logprobs: int | None = None
    limits: Limits | None = None

    @property
    def needs_host(self) -> bool:
        """Biases, penalties and limits change logits where Python is."""
        return bool(self.sampling.logit_bias) or self.history is not None

    def then(self, tokens: tuple[int, ...]) -> Choosing:
        """The same after so many tokens more."""
        return self if self.history is None else replace(self, history=self.history.then(tokens))


class FinishReason(Enum):
    """Why a request ended."""

    STOP = "stop"  # a stop token was chosen, or a stop text stands there
    LENGTH = "length"  # max_tokens reached
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Request:
    """A request after encoding, with every default resolved. `vocabulary` is the number of token ids there are; prefill chunks also
    end after a token of `boundary_ids`, which end the messages of a chat. The answer ends where one of `stop` begins. What is cached of
    prompts is shared by those with the same `cache_salt`."""

    request_id: str
    prompt_ids: tuple[int, ...]  # an embedding row has one below 0
    max_tokens: int
    sampling: SamplingParams
    stop_ids: frozenset[int]
    vocabulary: int
    boundary_ids: frozenset[int] = frozenset()
    cache_salt: str = ""
    stop: tuple[str, ...] = ()
    num_logprobs: int | None = None
    embeddings: tuple[tuple[int, EmbeddingRows], ...] = ()  # as in embeddings.Encoded
    opens_reasoning: bool = False  # likewise
    grammar: Grammar | None = None


@dataclass(frozen=True, slots=True)
class Lease:
    """Memory lent to one sequence under a number never given twice, for `max_rows` rows at most in one verify. The first `num_cached`
    tokens of the prompt are in it already."""

    number: int
    max_rows: int
    num_cached: int


@dataclass(frozen=True, slots=True)
class SavedFile:
    """A file that holds a sequence, as it was when it was looked into."""

    path: Path
    checksum: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The log probability of the token that was chosen, before penalties and filters, and those of the likeliest, (token id, log
    probability), the likeliest first."""

    logprob: float
    top: tuple[tuple[int, float], ...]


class Promise(Protocol[R_co]):
    """What an actor still works on when it answers."""

    async def wait(self) -> R_co:
        """Once."""
        ...


@dataclass(frozen=True, slots=True)
class Verdict:
    """The target's own choice for every row of a verify: `choices[i]` follows row i, and has `logprobs[i]` if they were wanted. The batch
    it was computed in had `num_rows` rows of `num_sequences` sequences and took `seconds`; these
    say nothing of the next such batch where it was not `is_typical`, for something had to be made ready first. `draft` is for the round
    after, if it was asked for: it is made while this round's tokens go to the reader, and None if it cannot be."""

    choices: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    num_rows: int = 0
    seconds: float = 0.0
    num_sequences: int = 1
    is_typical: bool = True
    draft: Promise[Draft | None] | None = None


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of the answer: text and the tokens committed in one round, or in several when the reader was slow. `source`
    names the drafter whose draft was accepted in it, None when the target went alone or several rounds differ.
    Concatenated deltas equal the whole answer; `logprobs` has one entry a token if they were wanted, else none."""

    text: str
    token_ids: tuple[int, ...]
    source: DrafterName | None
    logprobs: tuple[TokenLogprob, ...] = ()

    def merged(self, later: Delta) -> Delta:
        """Both in one."""
        source = self.source if self.source == later.source else None
        return Delta(self.text + later.text, self.token_ids + later.token_ids, source, self.logprobs + later.logprobs)


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a request. `num_cached_tokens` of the prompt had been computed before, for a request with the same beginning."""

    num_prompt_tokens: int
    num_completion_tokens: int
    num_cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Started:
    """A request that has got memory: how its tokens are chosen, with every default filled in, how many there may be, and how long it
    waited, in seconds. `num_cached_tokens` of the prompt need not be computed. With `opens_reasoning` the answer begins in mid-thought."""

    request_id: str
    sampling: SamplingParams
    max_tokens: int
    num_prompt_tokens: int
    num_cached_tokens: int
    queue_seconds: float
    opens_reasoning: bool = False


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds: waiting for memory, computing the prompt, and from the first token to the last."""

    queue_seconds: float
    prefill_seconds: float
    decode_seconds: float


@dataclass(frozen=True, slots=True)
class Result:
    """A finished request."""

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    matched_stop: int | str | None  # the token or text that ended it, with FinishReason.STOP
    sampling: SamplingParams  # in effect, the seed included
    usage: Usage
    timings: Timings
    speculation: Speculation
    logprobs: tuple[TokenLogprob, ...] = ()  # one a token, if they were wanted; of a restored request, of those since
