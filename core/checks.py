"""What callers may ask for: the one table of ranges, and the checks that list every violation as (field, what is wrong)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import cast

#: Stop strings a request may have, and characters of each: every new token is compared with them.
MAX_STOPS, STOP_CHARACTERS = 16, 256
#: Tokens whose logits a request may change, and by how much.
MAX_BIASES, MAX_BIAS = 1024, 1000.0

#: The one table of ranges: field -> (lowest, highest), both allowed. The edge, the API and the CLI all use it.
RANGES: dict[str, tuple[float, float]] = {
    "max_tokens": (1, 1_000_000),
    "temperature": (0.0, 100.0),
    "top_k": (0, 1_000_000),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "seed": (0, 2**64 - 1),
    "repetition_penalty": (0.01, 100.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "num_logprobs": (0, 20),
    "draft_n_max": (1, 64),
    "draft_n_min": (0, 64),
    "draft_p_min": (0.0, 1.0),
    "ngram_simple_size_n": (1, 64),
    "ngram_simple_size_m": (1, 64),
    "ngram_map_k_size_n": (1, 64),
    "ngram_map_k_size_m": (1, 64),
    "ngram_map_k_min_hits": (1, 1_000_000),
    "ngram_map_k4v_size_n": (1, 64),
    "ngram_map_k4v_size_m": (1, 64),
    "ngram_map_k4v_min_hits": (1, 1_000_000),
    "ngram_mod_n_match": (1, 64),
    "ngram_mod_n_min": (0, 64),
    "ngram_mod_n_max": (1, 64),
    "ngram_cache_n_max": (1, 64),
    "ngram_suffix_n_max": (1, 64),
    "num_slots": (1, 1024),
    "num_threads": (1, 256),
    "num_prompt": (1, 100_000),
    "num_runs": (1, 1000),
    "queue_size": (0, 100_000),
    "queue_tokens": (0, 1_000_000_000),
    "num_pages": (1, 100_000_000),
    "prefix_bytes": (0, 2**60),
    "folder_bytes": (0, 2**60),
    "timeout_seconds": (0.0, 1e9),
    "preempt_after_seconds": (0.0, 1e9),
    "stall_seconds": (0.1, 1e9),
}


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


def json_of(text: str) -> object:
    """What a JSON text says; None, as `null` does, where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def check_text(field: str, text: object) -> list[tuple[str, str]]:
    """What is wrong with a text that is to be encoded."""
    if not isinstance(text, str):
        return [(field, "must be text")]
    try:
        text.encode()
    except UnicodeEncodeError:
        return [(field, "contains lone surrogates, which no text has")]
    return []


def check_logit_bias(bias: object) -> list[tuple[str, str]]:
    """What is wrong with a logit bias: pairs of token id and what is added to its logit."""
    pairs = list(cast("Sequence[object]", bias)) if isinstance(bias, list | tuple) else None
    if pairs is None or len(pairs) > MAX_BIASES:
        return [("logit_bias", f"must be at most {MAX_BIASES} pairs of token id and bias")]
    for pair in pairs:
        is_pair = isinstance(pair, tuple) and len(cast("tuple[object, ...]", pair)) == 2
        token, value = cast("tuple[object, object]", pair) if is_pair else (None, None)
        if not isinstance(token, int) or isinstance(token, bool) or token < 0:
            return [("logit_bias", f"must be pairs of token id and bias, got {pair!r:.50}")]
        if not isinstance(value, int | float) or isinstance(value, bool) or not -MAX_BIAS <= value <= MAX_BIAS:
            return [("logit_bias", f"must be between {-MAX_BIAS} and {MAX_BIAS}, got {value!r:.50} for token {token}")]
    return []


def check_stop_ids(ids: object) -> list[tuple[str, str]]:
    """What is wrong with the form of stop tokens; None means none."""
    given = cast("Sequence[object]", ids) if isinstance(ids, list | tuple) else () if ids is None else (None,)
    return [] if all(type(each) is int for each in given) else [("stop_ids", "must be a list of token ids")]


def check_stop(stop: object) -> list[tuple[str, str]]:
    """What is wrong with stop strings."""
    texts = list(cast("Sequence[object]", stop)) if isinstance(stop, list | tuple) else None
    if texts is None or len(texts) > MAX_STOPS:
        return [("stop", f"must be at most {MAX_STOPS} texts")]
    violations: list[tuple[str, str]] = []
    for i, text in enumerate(texts):
        violations += check_text(f"stop[{i}]", text)
        if isinstance(text, str) and not 1 <= len(text) <= STOP_CHARACTERS:
            violations.append((f"stop[{i}]", f"must have 1 to {STOP_CHARACTERS} characters"))
    return violations
