"""The words everything else uses. Frozen values without behaviour beyond their own checks; no arrays, no I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from operator import index
from pathlib import Path
from typing import Literal, SupportsIndex, TypedDict, cast

from .errors import InvalidRequest

DrafterName = Literal["draft-mtp", "ngram-simple"]
#: In the order they are asked.
DRAFTERS: tuple[DrafterName, ...] = ("ngram-simple", "draft-mtp")

#: Seconds a drafter may be stuck: everybody it drafts for waits, and goes on without it as soon as it is restarted.
DRAFTER_PATIENCE_SECONDS = 5.0

#: The one table of ranges: field -> (lowest, highest), both allowed. The edge, the API and the CLI all use it.
RANGES: dict[str, tuple[float, float]] = {
    "max_tokens": (1, 1_000_000),
    "temperature": (0.0, 100.0),
    "top_k": (0, 1_000_000),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "seed": (0, 2**64 - 1),
    "draft_n_max": (1, 64),
    "ngram_size_n": (1, 64),
    "ngram_size_m": (1, 64),
    "num_slots": (1, 1024),
    "queue_size": (0, 100_000),
    "num_pages": (1, 100_000_000),
    "prefix_bytes": (0, 2**60),
    "folder_bytes": (0, 2**60),
    "timeout_seconds": (0.0, 1e9),
    "preempt_after_seconds": (0.0, 1e9),
}


class Message(TypedDict):
    """One message of a chat."""

    role: str
    content: str


#: What a caller may give as a prompt: text, token ids, or a chat.
Prompt = str | list[int] | list[Message]


#: who may speak in a chat
ROLES = ("system", "user", "assistant", "tool")


def check_prompt(prompt: object) -> Prompt:
    """The prompt, with its ids as plain ints; InvalidRequest lists all that is wrong with its form."""
    violations: list[tuple[str, str]] = []
    if isinstance(prompt, str):
        violations += _check_text("prompt", prompt)
    elif not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray) or not prompt:
        violations.append(("prompt", "must be text, token ids or chat messages, and not empty"))
    elif all(isinstance(part, Mapping) for part in cast("Sequence[object]", prompt)):
        for i, message in enumerate(cast("Sequence[Mapping[str, object]]", prompt)):
            if message.get("role") not in ROLES:
                violations.append((f"prompt[{i}].role", f"must be one of {', '.join(ROLES)}"))
            violations += _check_text(f"prompt[{i}].content", message.get("content"))
            violations += [(f"prompt[{i}].{key}", "is not part of a message") for key in message if key not in ("role", "content")]
    else:
        parts = cast("Sequence[object]", prompt)
        if all(isinstance(part, SupportsIndex) and not isinstance(part, bool) for part in parts):
            return [index(part) for part in cast("Sequence[SupportsIndex]", parts)]
        violations.append(("prompt", "must hold token ids only, or chat messages only"))
    if violations:
        raise InvalidRequest(violations)
    return cast(Prompt, prompt)


def _check_text(field: str, text: object) -> list[tuple[str, str]]:
    if not isinstance(text, str):
        return [(field, "must be text")]
    try:
        text.encode()
    except UnicodeEncodeError:
        return [(field, "contains lone surrogates, which no text has")]
    return []


#: characters of a cache salt: room for a tenant's name and a hash
SALT_CHARACTERS = 256


def check_salt(salt: object) -> list[tuple[str, str]]:
    """What is wrong with a cache salt; None means none."""
    if salt is None:
        return []
    if isinstance(salt, str) and len(salt) > SALT_CHARACTERS:
        return [("cache_salt", f"must have at most {SALT_CHARACTERS} characters")]
    return _check_text("cache_salt", salt)


def check_ranges(values: Mapping[str, object]) -> list[tuple[str, str]]:
    """Every violation of RANGES among `values`; None means unset and is always fine."""
    violations: list[tuple[str, str]] = []
    for name, value in values.items():
        lowest, highest = RANGES[name]
        if value is None:
            continue
        is_whole = isinstance(lowest, int)
        if not isinstance(value, int if is_whole else int | float) or isinstance(value, bool):
            violations.append((name, f"must be a {'whole ' if is_whole else ''}number, got {value!r:.50}"))
        elif not lowest <= value <= highest:  # NaN is not, either
            violations.append((name, f"must be between {lowest} and {highest}, got {value!r:.50}"))
    return violations


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How a token is chosen from its logits. The filters are transformers' (`generation/logits_process.py`), in its order:
    temperature, top-k, top-p, min-p; temperature 0 is greedy. The choice is a pure function of (logits, these, position)."""

    temperature: float = 0.0
    top_k: int = 0  # 0: no limit
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        values = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p, "min_p": self.min_p, "seed": self.seed}
        if violations := check_ranges(values):
            raise InvalidRequest(violations)


class FinishReason(Enum):
    """Why a request ended."""

    STOP = "stop"  # an end-of-text token was chosen
    LENGTH = "length"  # max_tokens reached
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Request:
    """A request after encoding, with every default resolved. `vocabulary` is the number of token ids there are; prefill chunks also
    end after a token of `boundary_ids`, which end the messages of a chat. What is cached of prompts is shared by those with the
    same `cache_salt`."""

    request_id: str
    prompt_ids: tuple[int, ...]
    max_tokens: int
    sampling: SamplingParams
    stop_ids: frozenset[int]
    vocabulary: int
    boundary_ids: frozenset[int] = frozenset()
    cache_salt: str = ""


@dataclass(frozen=True, slots=True)
class SpeculationParams:
    """Which drafters run and how far. Names and defaults are llama-server's (`--spec-type`, `--spec-draft-n-max`,
    `--spec-ngram-simple-size-n`, `--spec-ngram-simple-size-m`), but for n-max, which is 3 as for its MTP heads."""

    types: tuple[DrafterName, ...] = ()
    draft_n_max: int = 3
    ngram_size_n: int = 12
    ngram_size_m: int = 48

    def __post_init__(self) -> None:
        names = ("draft_n_max", "ngram_size_n", "ngram_size_m")
        values = {name: getattr(self, name) for name in names}
        if violations := check_ranges(values) or [(name, "must be given") for name in names if values[name] is None]:
            raise InvalidRequest(violations)

    def limit(self, drafter: DrafterName) -> int:
        """The most tokens this drafter drafts at once."""
        return self.draft_n_max if drafter == "draft-mtp" else self.ngram_size_m


def parse_spec_type(text: str) -> tuple[DrafterName, ...]:
    """`none`, or a comma list of drafter names, in the order they are asked."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if names == ["none"]:
        return ()
    if unknown := [name for name in names if name not in DRAFTERS] or ([] if names else ["nothing"]):
        raise InvalidRequest([("spec_type", f"{', '.join(unknown)}: expected none, or a comma list of {', '.join(DRAFTERS)}")])
    return tuple(name for name in DRAFTERS if name in names)


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


@dataclass(frozen=True, slots=True)
class Draft:
    """Tokens one drafter expects to follow."""

    drafter: DrafterName
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Verdict:
    """The target's own choice for every row of a verify: `choices[i]` follows row i."""

    choices: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of the answer: text and the tokens committed in one round, or in several when the reader was slow. `source`
    names the drafter whose draft was accepted in it, None when the target went alone or several rounds differ.
    Concatenated deltas equal the whole answer."""

    text: str
    token_ids: tuple[int, ...]
    source: DrafterName | None

    def merged(self, later: Delta) -> Delta:
        """Both in one."""
        source = self.source if self.source == later.source else None
        return Delta(self.text + later.text, self.token_ids + later.token_ids, source)


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a request. `num_cached_tokens` of the prompt had been computed before, for a request with the same beginning."""

    num_prompt_tokens: int
    num_completion_tokens: int
    num_cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds: waiting for memory, computing the prompt, and from the first token to the last."""

    queue_seconds: float
    prefill_seconds: float
    decode_seconds: float


@dataclass(frozen=True, slots=True)
class DrafterStatistics:
    """vLLM's counters: drafts made, tokens in them, tokens accepted, and accepted per position in the draft."""

    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_accepted_tokens_per_pos: tuple[int, ...] = ()

    def after(self, num_draft_tokens: int, num_accepted: int) -> DrafterStatistics:
        """These counters with one more draft."""
        per_pos = list(self.num_accepted_tokens_per_pos)
        per_pos += [0] * (num_accepted - len(per_pos))
        for i in range(num_accepted):
            per_pos[i] += 1
        return DrafterStatistics(
            self.num_drafts + 1,
            self.num_draft_tokens + num_draft_tokens,
            self.num_accepted_tokens + num_accepted,
            tuple(per_pos),
        )


@dataclass(frozen=True, slots=True)
class Speculation:
    """What speculation did for one request. `num_rounds` counts verifies, those without a draft too."""

    num_rounds: int = 0
    drafters: dict[DrafterName, DrafterStatistics] = field(default_factory=dict[DrafterName, DrafterStatistics])

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens committed a round: 1 + accepted / rounds; 1.0 before the first round."""
        accepted = sum(statistics.num_accepted_tokens for statistics in self.drafters.values())
        return 1 + accepted / self.num_rounds if self.num_rounds else 1.0


@dataclass(frozen=True, slots=True)
class Result:
    """A finished request."""

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    sampling: SamplingParams  # in effect, the seed included
    usage: Usage
    timings: Timings
    speculation: Speculation
