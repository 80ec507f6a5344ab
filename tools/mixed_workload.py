"""Measures drafters against each other on texts of several kinds, in turn, so that a machine's moods hit all alike.

python -m forerun.tools.mixed_workload PROMPTS.json [--runs 5]      # PROMPTS: [{"text": ...}, ...], at least 12

For each way of drafting and each part: tokens per second relative to the first way, the best run of each against the best of the other
(and the median of the runs' ratios), and tokens a verify.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from pathlib import Path
from typing import NamedTuple

import anyio

from .. import DRAFTERS, Model, Options, Prompt, SpeculationOptions, load_model, open_engine

#: Ways of drafting: spec types, and what else is said of speculation.
WAYS: dict[str, tuple[str, SpeculationOptions]] = {
    "none": ("none", {}),
    **{name: (name, SpeculationOptions()) for name in DRAFTERS},
    "precedence": ("draft-mtp,ngram-simple", {"choose": "first"}),
    "chooser": ("draft-mtp,ngram-suffix", {}),
}


class Measured(NamedTuple):
    seconds: float
    num_tokens: int
    num_rounds: int
    text: tuple[int, ...]


def parts(texts: list[str]) -> dict[str, list[tuple[Prompt, Options]]]:
    """Requests by kind."""
    rng = random.Random(0)
    again = [f"{text}\n\n# The same again:\n{text}\n\n# The same again:\n{text[: len(text) // 4]}" for text in texts[4:7]]
    return {
        "completion": [(text, {"temperature": 0.0}) for text in texts[:4]],
        "the same again": [(text, {"temperature": 0.0}) for text in again],
        "chat": [([{"role": "user", "content": text[:300]}], {"temperature": 0.7, "seed": 1}) for text in texts[7:11]],
        "random text": [([rng.randrange(200, 4000) for _ in range(60)], {"temperature": 1.5, "seed": i}) for i in range(4)],
    }


async def measure(model: Model, way: str, texts: list[str], num_tokens: int) -> dict[str, Measured]:
    spec_type, options = WAYS[way]
    found: dict[str, Measured] = {}
    async with open_engine(model, spec_type=spec_type, prefix_bytes=0, **options) as engine:
        await engine.complete(texts[11], max_tokens=num_tokens)
        for part, requests in parts(texts).items():
            seconds, rounds, tokens = 0.0, 0, list[int]()
            for prompt, how in requests:
                how: Options = {**how, "max_tokens": num_tokens, "ignore_eos": True}
                result = await engine.complete(prompt, **how)
                seconds += result.timings.decode_seconds
                rounds += result.speculation.num_rounds
                tokens += result.token_ids
            found[part] = Measured(seconds, len(tokens), rounds, tuple(tokens))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    args = parser.parse_args()
    texts = [case["text"] for case in json.loads(args.prompts.read_text())]
    model = load_model("demo")
    runs: list[dict[str, dict[str, Measured]]] = []
    for _ in range(args.runs):
        runs.append({way: anyio.run(measure, model, way, texts, args.tokens) for way in args.ways})
        for part in runs[0][args.ways[0]]:
            if len({run[way][part].text for run in runs for way in args.ways}) > 1:
                raise SystemExit(f"{part}: the texts differ")
    first = args.ways[0]
    print("| drafted by | " + " | ".join(runs[0][first]) + " | all |")
    print("|---" * (len(runs[0][first]) + 2) + "|")
    for way in args.ways:
        cells: list[str] = []
        for part in runs[0][first]:
            best = min(run[first][part].seconds for run in runs) / min(run[way][part].seconds for run in runs)
            median = statistics.median(run[first][part].seconds / run[way][part].seconds for run in runs)
            one = runs[-1][way][part]
            cells.append(f"{best:.2f} ({median:.2f}), {one.num_tokens / max(1, one.num_rounds):.2f} a verify")
        sums = {each: sum(min(run[each][part].seconds for run in runs) for part in runs[0][each]) for each in (first, way)}
        total = sums[first] / sums[way]
        print(f"| {way} | " + " | ".join(cells) + f" | {total:.2f} |", flush=True)


if __name__ == "__main__":
    main()
