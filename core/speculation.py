"""The words of speculation: who drafts, how far, what came of it. Frozen values, no arrays, no I/O."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from itertools import takewhile
from typing import Literal, TypedDict

from .checks import RANGES, check_ranges
from .errors import InvalidRequest

DrafterName = Literal["draft-mtp", "ngram-simple", "ngram-map-k", "ngram-map-k4v", "ngram-mod", "ngram-cache", "ngram-suffix"]
#: In the order in which a first draft wins where precedence decides: look-ups, which seldom say anything, before the head.
DRAFTERS: tuple[DrafterName, ...] = (
    "ngram-simple", "ngram-map-k", "ngram-map-k4v", "ngram-mod", "ngram-cache", "ngram-suffix", "draft-mtp",
)  # fmt: skip
DRAFT_SAMPLINGS = ("coupled", "greedy")
CHOICES = ("rate", "first")

#: Seconds a drafter may be stuck: everybody it drafts for waits, and goes on without it as soon as it is restarted.
DRAFTER_PATIENCE_SECONDS = 5.0


class SpeculationOptions(TypedDict, total=False):
    """SpeculationParams, but for the drafters' names."""

    draft_n_max: int
    draft_n_min: int
    draft_p_min: float
    draft_sampling: str
    ngram_simple_size_n: int
    ngram_simple_size_m: int
    ngram_map_k_size_n: int
    ngram_map_k_size_m: int
    ngram_map_k_min_hits: int
    ngram_map_k4v_size_n: int
    ngram_map_k4v_size_m: int
    ngram_map_k4v_min_hits: int
    ngram_mod_n_match: int
    ngram_mod_n_min: int
    ngram_mod_n_max: int
    ngram_cache_n_max: int
    ngram_suffix_n_max: int
    ngram_suffix_shared: bool
    lookup_cache_static: str
    lookup_cache_dynamic: str
    choose: str
    synth_rates: tuple[float, ...]


#: Tokens that ngram-suffix must match: shorter matches say next to nothing.
SUFFIX_MIN_MATCH = 2


@dataclass(frozen=True, slots=True)
class SpeculationParams:
    """Which drafters run and how far. Names and defaults are llama-server's (`--spec-type`, `--spec-draft-n-max`,
    `--spec-ngram-mod-n-match`...), but for n-max, which is 3 as for its MTP heads; `ngram_cache_n_max`, `ngram_suffix_*` and `choose`
    are ours."""

    types: tuple[DrafterName, ...] = ()
    draft_n_max: int = 3  # most tokens the MTP head drafts at once
    draft_n_min: int = 0  # it drafts none rather than fewer
    draft_p_min: float = 0.0  # it stops where the share of its likeliest token is below
    draft_sampling: str = "coupled"  # how it chooses above temperature 0: with the target's noise, or its likeliest token
    ngram_simple_size_n: int = 12  # tokens that must match
    ngram_simple_size_m: int = 48  # most tokens drafted
    ngram_map_k_size_n: int = 12
    ngram_map_k_size_m: int = 48
    ngram_map_k_min_hits: int = 1  # times it must have stood there before
    ngram_map_k4v_size_n: int = 12
    ngram_map_k4v_size_m: int = 48
    ngram_map_k4v_min_hits: int = 1
    ngram_mod_n_match: int = 24
    ngram_mod_n_min: int = 48  # it drafts none rather than fewer
    ngram_mod_n_max: int = 64
    ngram_cache_n_max: int = 8
    ngram_suffix_n_max: int = 48
    ngram_suffix_shared: bool = False  # learns from finished requests with the same cache salt too
    lookup_cache_static: str = ""  # file of counts that ngram-cache reads
    lookup_cache_dynamic: str = ""  # file of counts that it reads, and brings up to date
    choose: str = "rate"  # the draft with the most expected tokens per second, and as long as pays; or the first there is, whole
    synth_rates: tuple[float, ...] = ()  # accept drafts at random at these rates by position, for benchmarks: the text is senseless

    def __post_init__(self) -> None:
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        numbers = {name: value for name, value in values.items() if name in RANGES}
        violations = check_ranges(numbers) + [(name, "must be given") for name in numbers if numbers[name] is None]
        for name, allowed in (("draft_sampling", DRAFT_SAMPLINGS), ("choose", CHOICES)):
            if values[name] not in allowed:
                violations.append((name, f"must be one of {', '.join(allowed)}, got {values[name]!r:.50}"))
        if not all(0 <= rate <= 1 for rate in self.synth_rates):
            violations.append(("synth_rates", f"must be between 0 and 1, got {self.synth_rates!r:.50}"))
        if violations:
            raise InvalidRequest(violations)

    def limit(self, drafter: DrafterName) -> int:
        """The most tokens this drafter drafts at once."""
        return {
            "draft-mtp": self.draft_n_max,
            "ngram-simple": self.ngram_simple_size_m,
            "ngram-map-k": self.ngram_map_k_size_m,
            "ngram-map-k4v": self.ngram_map_k4v_size_m,
            "ngram-mod": self.ngram_mod_n_max,
            "ngram-cache": self.ngram_cache_n_max,
            "ngram-suffix": self.ngram_suffix_n_max,
        }[drafter]

    def num_matched(self, drafter: DrafterName) -> int:
        """How many tokens, the newest among them, must have stood in a text before, for this drafter to find anything; 0: it may know of
        them otherwise."""
        return {
            "ngram-simple": self.ngram_simple_size_n,
            "ngram-map-k": self.ngram_map_k_size_n,
            "ngram-map-k4v": self.ngram_map_k4v_size_n,
            "ngram-suffix": 0 if self.ngram_suffix_shared else SUFFIX_MIN_MATCH,
        }.get(drafter, 0)


def parse_spec_type(text: str) -> tuple[DrafterName, ...]:
    """`none`, or a comma list of drafter names."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if names == ["none"]:
        return ()
    if unknown := [name for name in names if name not in DRAFTERS] or ([] if names else ["nothing"]):
        raise InvalidRequest([("spec_type", f"{', '.join(unknown)}: expected none, or a comma list of {', '.join(DRAFTERS)}")])
    return tuple(name for name in DRAFTERS if name in names)


def num_alike(drafted: Sequence[int], tokens: Sequence[int]) -> int:
    """How many of both are the same, from the first on."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(drafted, tokens, strict=False)))


@dataclass(frozen=True, slots=True)
class Draft:
    """Tokens one drafter expects to follow, and for each how sure it is of it once all before it have come, from 0 to 1. One that is not
    `is_typical` took long because something had to be made ready first. One made behind a verify says the `seconds` that took."""

    drafter: DrafterName
    tokens: tuple[int, ...]
    confidences: tuple[float, ...] = ()
    is_typical: bool = True
    seconds: float = 0.0

    def cut(self, length: int) -> Draft:
        return Draft(self.drafter, self.tokens[:length], self.confidences[:length], self.is_typical)


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
    """What speculation did for one request. `num_rounds` counts verifies, those without a draft too; a draft that one drafter began and
    another went on with counts for both. With `is_synthetic` acceptance was drawn at random, and the text means nothing."""

    num_rounds: int = 0
    drafters: dict[DrafterName, DrafterStatistics] = field(default_factory=dict[DrafterName, DrafterStatistics])
    is_synthetic: bool = False

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens committed a round: 1 + accepted / rounds; 1.0 before the first round."""
        accepted = sum(statistics.num_accepted_tokens for statistics in self.drafters.values())
        return 1 + accepted / self.num_rounds if self.num_rounds else 1.0
